"""JSON Web Tokens, by PyJWT (extra ``auth``): from a token to an identity.

What decides is fixed when a :class:`JWT` is made: algorithms, keys, audience, issuer. A token's
header only says which of the keys it means. No exception of this has a token or a claim in it, nor
one as its cause: PyJWT's sentences sometimes do.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, cast

from pgchannels.errors import ConfigurationError, InvalidUser
from pgchannels.web.auth.identity import Identity
from pgchannels.web.auth.keys import FetchedKeys, FixedKeys, check_algorithms, pyjwt
from pgchannels.web.auth.sources import check_token, invalid_token
from pgchannels.web.errors import AuthenticationError, TokenExpired

if TYPE_CHECKING:
    from pgchannels.web.auth.keys import Key, KeySource

__all__ = ["JWT"]

logger = logging.getLogger("pgchannels.web")

# Besides PyJWT's own: what parsers raise of texts that are made to break them, and, OSError,
# fromtimestamp() of a time that the C library cannot tell.
_BROKEN = (
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
    OSError,
)

Fetch = Callable[[], Awaitable[Mapping[str, Any]]]


class JWT:
    """Verifies tokens: ``await jwt(token)`` gives their :class:`Identity`.

    ::

        JWT(public_key_pem, algorithms=["RS256"], audience="chat", issuer="https://login.example")
        JWT({"2026-01": old, "2026-07": new}, algorithms=["EdDSA"], audience="chat")
        JWT(fetch_jwks, algorithms=["ES256"], audience="chat")      # async, returns the document

    Args:
        key: a PEM, a secret (str or bytes), a key of cryptography or a JWK; several of them by
            their ids (``kid``); a JWKS document; or an async callable that fetches that, which is
            called again when a token names a key that is not there.
        algorithms: which signatures are accepted, such as ``["RS256"]``: with a secret or with a
            key pair, not both.
        audience: the token must be for this (one of these). If None, tokens that are for anyone in
            particular are refused.
        issuer: the token must be from this (one of these).
        leeway: seconds by which clocks may differ: tokens are accepted for that much longer, and a
            revocation covers those that say they were issued up to so much later.
        require_expiry: refuse tokens that never expire.
        user_claim: what the user's id is taken from.
        min_refresh: seconds between two fetches on account of unknown key ids.
        max_age: seconds after which fetched keys are fetched anew.
        clock: seconds, for these two.

    Raises:
        ConfigurationError: PyJWT is not installed, or this could not work, or would not be safe: a
            key that does not fit the algorithms, a short secret, an empty audience.
    """

    def __init__(
        self,
        key: Any,
        *,
        algorithms: Sequence[str],
        audience: str | Sequence[str] | None = None,
        issuer: str | Sequence[str] | None = None,
        leeway: float = 0.0,
        require_expiry: bool = True,
        user_claim: str = "sub",
        min_refresh: float = 60.0,
        max_age: float = 3600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._jwt = pyjwt()
        self.algorithms = check_algorithms(algorithms)
        self._audience = _names("audience", audience)
        self._issuer = _names("issuer", issuer)
        if not 0 <= leeway <= 3600:
            raise ConfigurationError(f"leeway is in seconds, up to 3600, not {leeway!r}")
        if not user_claim:
            raise ConfigurationError("user_claim needs a name")
        self._leeway = leeway
        self._user_claim = user_claim
        self._required = [user_claim, *(["exp"] if require_expiry else [])]
        self._keys: KeySource
        if callable(key):
            self._keys = FetchedKeys(
                cast("Fetch", key),
                self.algorithms,
                min_refresh=min_refresh,
                max_age=max_age,
                clock=clock,
            )
        else:
            self._keys = FixedKeys.load(key, self.algorithms)

    async def __call__(self, token: str) -> Identity:
        """Verify *token*.

        Raises:
            TokenExpired: it was good once.
            AuthenticationError: it is not, for whatever reason.
            KeysUnavailable: the keys could not be fetched.
        """
        check_token(token)
        key_id, algorithm = self._header(token)
        key = await self._keys.find(key_id, algorithm)
        claims = self._claims(token, key)
        try:
            return self._identity(claims)
        except (InvalidUser, *_BROKEN):
            failure = invalid_token()
        raise failure

    def _header(self, token: str) -> tuple[str | None, str]:
        try:
            header = self._jwt.get_unverified_header(token)
        except (self._jwt.PyJWTError, *_BROKEN) as error:
            header = _refused(error)
        key_id, algorithm = header.get("kid"), header.get("alg")
        # Nothing that "crit" could demand is known here (RFC 7515, section 4.1.11).
        if "crit" in header or not isinstance(key_id, str | None):
            raise invalid_token()
        if not isinstance(algorithm, str) or algorithm not in self.algorithms:
            raise invalid_token()
        return key_id, algorithm

    def _claims(self, token: str, key: Key) -> Mapping[str, Any]:
        failure: AuthenticationError
        try:
            claims: Mapping[str, Any] = self._jwt.decode(
                token,
                key.value,
                algorithms=list(key.algorithms),
                audience=self._audience,
                issuer=self._issuer,
                leeway=self._leeway,
                options={"require": self._required},
            )
        except self._jwt.ExpiredSignatureError:
            failure = TokenExpired()
        except (self._jwt.PyJWTError, *_BROKEN) as error:
            logger.debug("a token is refused: %s", type(error).__name__)
            failure = invalid_token()
        else:
            return claims
        # Not inside the except: the exception would have PyJWT's as its context.
        raise failure

    def _identity(self, claims: Mapping[str, Any]) -> Identity:
        user_id: Any = claims[self._user_claim]
        if type(user_id) is int:
            user_id = str(user_id)
        expires, issued = claims.get("exp"), claims.get("iat")
        return Identity(
            user_id=user_id,
            claims=claims,
            token_id=claims.get("jti"),
            # An issuer's clock may be ahead of the database's, by which tokens are revoked: a token
            # must not outlive its revocation by the difference.
            issued_at=None if issued is None else _time(issued) - timedelta(seconds=self._leeway),
            # Without its fraction, as PyJWT looks at it.
            expires_at=None if expires is None else _time(int(expires) + self._leeway),
        )


def _refused(error: Exception) -> dict[str, Any]:
    logger.debug("a token is refused: %s", type(error).__name__)
    return {}


def _time(seconds: Any) -> datetime:
    # A fraction counts (RFC 7519, section 2): a new token may be of the second of a revocation.
    return datetime.fromtimestamp(seconds if isinstance(seconds, float) else int(seconds), UTC)


def _names(what: str, given: str | Sequence[str] | None) -> list[str] | None:
    # An empty one comes from a setting that is missing, and must not mean "any".
    if given is None:
        return None
    names = [given] if isinstance(given, str) else list(given)
    if not names or not all(names):
        raise ConfigurationError(f"{what} is a name, or several; it must not be empty")
    return names
