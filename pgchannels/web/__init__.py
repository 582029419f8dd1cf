"""FastAPI: sockets that follow channels, who may do what on them, history over REST.

Authentication has a package of its own, :mod:`pgchannels.web.auth`; all errors that clients are
told of are in :mod:`pgchannels.web.errors`.
"""

from pgchannels.limits import Limits
from pgchannels.overflow import Overflow
from pgchannels.rates import FixedWindow, TokenBucket
from pgchannels.web.admin import admin_router
from pgchannels.web.auth import (
    JWT,
    Authentication,
    Capabilities,
    CookieToken,
    FirstMessageToken,
    HeaderToken,
    Identity,
    OAuth2Bearer,
    Origins,
    QueryToken,
    RowSecurity,
    SubprotocolToken,
    http_authorize,
)
from pgchannels.web.bytes_consumer import BytesConsumer
from pgchannels.web.connection import Connection
from pgchannels.web.connections import ConnectionManager, Shutdown
from pgchannels.web.consumer import WebSocketConsumer
from pgchannels.web.error_handlers import exception_handlers, install_error_handlers
from pgchannels.web.errors import (
    AuthenticationError,
    AuthorizationError,
    Category,
    ConnectionRefused,
    ErrorResponse,
    RateLimitExceeded,
    Severity,
    SocketError,
    TokenExpired,
    ValidationFailed,
)
from pgchannels.web.handle import ahandle, handle
from pgchannels.web.handlers import handles, receives
from pgchannels.web.history import channels_router
from pgchannels.web.incoming import Frame
from pgchannels.web.json_consumer import JsonConsumer
from pgchannels.web.lifespan import lifespan
from pgchannels.web.liveness import Heartbeat
from pgchannels.web.middleware import (
    Chain,
    Logging,
    Middleware,
    RateLimit,
    Validation,
    inbound,
    outbound,
)
from pgchannels.web.statistics import Statistics
from pgchannels.web.status import status_router
from pgchannels.web.wire import ConnectionState

__all__ = [
    "JWT",
    "Authentication",
    "AuthenticationError",
    "AuthorizationError",
    "BytesConsumer",
    "Capabilities",
    "Category",
    "Chain",
    "Connection",
    "ConnectionManager",
    "ConnectionRefused",
    "ConnectionState",
    "CookieToken",
    "ErrorResponse",
    "FirstMessageToken",
    "FixedWindow",
    "Frame",
    "HeaderToken",
    "Heartbeat",
    "Identity",
    "JsonConsumer",
    "Limits",
    "Logging",
    "Middleware",
    "OAuth2Bearer",
    "Origins",
    "Overflow",
    "QueryToken",
    "RateLimit",
    "RateLimitExceeded",
    "RowSecurity",
    "Severity",
    "Shutdown",
    "SocketError",
    "Statistics",
    "SubprotocolToken",
    "TokenBucket",
    "TokenExpired",
    "Validation",
    "ValidationFailed",
    "WebSocketConsumer",
    "admin_router",
    "ahandle",
    "channels_router",
    "exception_handlers",
    "handle",
    "handles",
    "http_authorize",
    "inbound",
    "install_error_handlers",
    "lifespan",
    "outbound",
    "receives",
    "status_router",
]
