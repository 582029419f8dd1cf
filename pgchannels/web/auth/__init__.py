"""Who a client is, and what it may do. Each part works alone, in endpoints and in consumers."""

from pgchannels.web.auth.authentication import Authentication, Verify
from pgchannels.web.auth.authorization import (
    ACTIONS,
    Action,
    Authorize,
    Capabilities,
    Grants,
    http_authorize,
    is_allowed,
    require,
)
from pgchannels.web.auth.bearer import OAuth2Bearer
from pgchannels.web.auth.identity import Identity
from pgchannels.web.auth.jwt import JWT
from pgchannels.web.auth.keys import KeysUnavailable
from pgchannels.web.auth.origins import Origins
from pgchannels.web.auth.row_security import RowSecurity
from pgchannels.web.auth.sources import (
    CookieToken,
    FirstMessageToken,
    HeaderToken,
    QueryToken,
    SubprotocolToken,
    TokenSource,
)

__all__ = [
    "ACTIONS",
    "JWT",
    "Action",
    "Authentication",
    "Authorize",
    "Capabilities",
    "CookieToken",
    "FirstMessageToken",
    "Grants",
    "HeaderToken",
    "Identity",
    "KeysUnavailable",
    "OAuth2Bearer",
    "Origins",
    "QueryToken",
    "RowSecurity",
    "SubprotocolToken",
    "TokenSource",
    "Verify",
    "http_authorize",
    "is_allowed",
    "require",
]
