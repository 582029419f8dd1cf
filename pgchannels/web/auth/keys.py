"""The keys that tokens are verified with: which fit which algorithms, and how they are replaced.

A key is bound to the algorithms that it fits when it is loaded, never by what a token says of
itself. A public key is so never a secret, whatever the token's header asks for.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pgchannels.errors import ConfigurationError
from pgchannels.web.auth.sources import invalid_token
from pgchannels.web.codes import TRY_AGAIN_LATER
from pgchannels.web.errors import Category, Problem, Severity, SocketError

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["FetchedKeys", "FixedKeys", "Key", "KeySource", "KeysUnavailable", "pyjwt"]

logger = logging.getLogger("pgchannels.web")

# RFC 7518, section 3.2: a secret is at least as long as the hash.
_SECRET_LENGTHS = {"HS256": 32, "HS384": 48, "HS512": 64}
# RFC 7518, section 3.4, and RFC 8812, section 3.2.
_CURVES = {"ES256": "secp256r1", "ES384": "secp384r1", "ES512": "secp521r1", "ES256K": "secp256k1"}
_RSA = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"})
_MIN_RSA_BITS = 2048
_KNOWN = frozenset({*_SECRET_LENGTHS, *_CURVES, *_RSA, "EdDSA"})


class KeysUnavailable(SocketError):
    """The keys could not be fetched, so that nobody can say what the token is worth."""

    problem: ClassVar = Problem(
        "unavailable",
        "the service is not available now",
        Category.BACKEND,
        Severity.ERROR,
        http_status=503,
        ws_code=TRY_AGAIN_LATER,
        disconnects=True,
        retry_after=5.0,
    )


def pyjwt() -> ModuleType:
    """PyJWT, which is an extra.

    Raises:
        ConfigurationError: it is not installed.
    """
    try:
        import jwt
    except ImportError as error:
        raise ConfigurationError("JWT() needs PyJWT: pip install 'pgchannels[auth]'") from error
    return jwt


def check_algorithms(algorithms: Sequence[str]) -> tuple[str, ...]:
    """The algorithms that tokens may be signed by.

    Raises:
        ConfigurationError: none, ``none``, an unknown one, or both secrets and key pairs.
    """
    if isinstance(algorithms, str) or not algorithms:
        raise ConfigurationError("algorithms= lists the algorithms that are accepted")
    unknown = [name for name in algorithms if name not in _KNOWN]
    if unknown:
        raise ConfigurationError(
            f"{unknown[0]!r} is not an algorithm to verify tokens by; these are: "
            + ", ".join(sorted(_KNOWN))
        )
    if len({name in _SECRET_LENGTHS for name in algorithms}) > 1:
        raise ConfigurationError(
            "algorithms with a secret (HS…) and with a key pair cannot both be accepted: a public "
            "key could pass for a secret"
        )
    return tuple(dict.fromkeys(algorithms))


@dataclass(frozen=True, repr=False)
class Key:
    """A key, ready for use, and the algorithms that it may be used for."""

    value: Any
    algorithms: tuple[str, ...]

    @classmethod
    def load(cls, given: Any, algorithms: Sequence[str], what: str = "the key") -> Key:
        """Make one of a secret, a PEM, a key of cryptography or a JWK, as far as it fits.

        Raises:
            ConfigurationError: it fits none of the algorithms. It is not in the message.
        """
        jwk: Mapping[str, Any] | None = given if isinstance(given, Mapping) else None
        value, fitting, reason = None, [], "it is not for signatures by them"
        for name in algorithms:
            if jwk is not None and not _is_for(jwk, name):
                continue
            prepared, problem = _prepare(given, name)
            if problem:
                reason = problem
            else:
                value = prepared
                fitting.append(name)
        if not fitting:
            raise ConfigurationError(f"{what} does not fit {', '.join(algorithms)}: {reason}")
        return cls(value, tuple(fitting))


def _prepare(given: Any, name: str) -> tuple[Any, str]:
    """The key as PyJWT wants it, and what is wrong with it."""
    jwt = pyjwt()
    try:
        if isinstance(given, Mapping):
            value = jwt.PyJWK(dict(given), algorithm=name).key
        else:
            value = jwt.PyJWS().get_algorithm_by_name(name).prepare_key(given)
    except NotImplementedError:
        return None, "cryptography is not installed: pip install 'pgchannels[auth]'"
    except (jwt.PyJWTError, ValueError, TypeError, AttributeError):
        return None, "it is not a key of that kind"  # theirs might repeat it
    if name in _SECRET_LENGTHS and len(value) < _SECRET_LENGTHS[name]:
        return None, f"a secret has {_SECRET_LENGTHS[name]} bytes or more"
    if name in _RSA and value.key_size < _MIN_RSA_BITS:
        return None, f"an RSA key has {_MIN_RSA_BITS} bits or more"
    if name in _CURVES and value.curve.name != _CURVES[name]:
        return None, "it is on another curve"
    return value, ""


def _is_for(jwk: Mapping[str, Any], algorithm: str) -> bool:
    # RFC 7517, sections 4.2 to 4.4.
    operations = jwk.get("key_ops")
    return (
        jwk.get("alg", algorithm) == algorithm
        and jwk.get("use", "sig") == "sig"
        and (operations is None or (isinstance(operations, list) and "verify" in operations))
    )


class KeySource(Protocol):
    def find(self, key_id: str | None, algorithm: str) -> Awaitable[Key]:
        """The key of that name that fits the algorithm.

        Raises:
            AuthenticationError: there is none.
            KeysUnavailable: nobody knows.
        """
        ...


class FixedKeys:
    """One key, or some by their ids, which stay as they are."""

    def __init__(self, keys: Mapping[str | None, Sequence[Key]]) -> None:
        self._keys = keys

    @classmethod
    def load(cls, given: Any, algorithms: Sequence[str]) -> FixedKeys:
        """One key, a mapping of ids to keys, or a JWKS document.

        Raises:
            ConfigurationError: one of them fits none of the algorithms.
        """
        if not isinstance(given, Mapping) or "kty" in given:
            key = Key.load(given, algorithms)
            if not isinstance(given, Mapping) and len(key.algorithms) < len(algorithms):
                unfit = ", ".join(sorted({*algorithms} - {*key.algorithms}))
                raise ConfigurationError(f"the key does not fit {unfit}")
            return cls({None: [key]})
        if isinstance(given.get("keys"), list):
            return cls(parse_jwks(given, algorithms))
        if not given:
            raise ConfigurationError("there is no key")
        return cls(
            {kid: [Key.load(key, algorithms, f"the key {kid!r}")] for kid, key in given.items()}
        )

    async def find(self, key_id: str | None, algorithm: str) -> Key:
        key = find_key(self._keys, key_id, algorithm)
        if key is None:
            raise invalid_token()
        return key


def parse_jwks(document: object, algorithms: Sequence[str]) -> dict[str | None, Sequence[Key]]:
    """The keys of a JWKS document (RFC 7517, section 5) that fit; others are left out.

    Raises:
        ConfigurationError: it is none, or none of its keys fits.
    """
    listed = document.get("keys") if isinstance(document, Mapping) else None
    if not isinstance(listed, list):
        raise ConfigurationError("this is not a set of keys: {'keys': […]}")
    found: dict[str | None, Sequence[Key]] = {}
    for jwk in listed:
        if not isinstance(jwk, Mapping):
            continue
        kid = jwk.get("kid")
        try:
            key = Key.load(jwk, algorithms)
        except ConfigurationError:
            continue
        if kid is None or isinstance(kid, str):
            found[kid] = [*found.get(kid, ()), key]
    if not found:
        raise ConfigurationError(f"no key of the set fits {', '.join(algorithms)}")
    return found


def find_key(
    keys: Mapping[str | None, Sequence[Key]], key_id: str | None, algorithm: str
) -> Key | None:
    """None if there is no such key. A token without an id means the only key that there is."""
    if key_id is None or keys.keys() == {None}:
        candidates = [key for those in keys.values() for key in those]
        candidates = candidates if len(candidates) == 1 else []
    else:
        candidates = list(keys.get(key_id, ()))
    return next((key for key in candidates if algorithm in key.algorithms), None)


class FetchedKeys:
    """A set of keys that somebody else publishes, and replaces now and then.

    Fetched when it is first needed, when a token names a key that is not in it, and when it has
    grown old; one fetch at a time, whose result all that wait for it share. If fetching fails, the
    old set goes on being used.

    Args:
        fetch: gets the JWKS document, parsed.
        algorithms: which are accepted; keys for others are left out.
        min_refresh: seconds between two fetches because of unknown ids, which anyone can make up.
        max_age: seconds after which a set is fetched anew, so that withdrawn keys are noticed.
        timeout: seconds for a fetch.
        clock: seconds, of a clock that never goes back.
    """

    RETRY = 5.0
    """Seconds after a failure until the next attempt, at most."""

    def __init__(
        self,
        fetch: Callable[[], Awaitable[Mapping[str, Any]]],
        algorithms: Sequence[str],
        *,
        min_refresh: float = 60.0,
        max_age: float = 3600.0,
        timeout: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        for name, value in (("min_refresh", min_refresh), ("max_age", max_age)):
            if not value >= 0:
                raise ConfigurationError(f"{name} is in seconds, not {value!r}")
        if not timeout > 0:
            raise ConfigurationError(f"timeout is in seconds, not {timeout!r}")
        if any(name in _SECRET_LENGTHS for name in algorithms):
            raise ConfigurationError("a secret that can be fetched is none: use a key pair")
        self._fetch = fetch
        self._algorithms = algorithms
        self._min_refresh = min_refresh
        self._max_age = max_age
        self._timeout = timeout
        self._clock = clock
        self._fetching: asyncio.Task[None] | None = None
        self._keys: dict[str | None, Sequence[Key]] = {}
        self._fetched_at = -float("inf")
        self._attempted_at = -float("inf")
        self._failed = False

    async def find(self, key_id: str | None, algorithm: str) -> Key:
        key = find_key(self._keys, key_id, algorithm)
        fetching = self._under_way()
        if fetching is None and (key is None or self._is_old()) and self._may_fetch():
            fetching = self._fetching = asyncio.create_task(
                self._refresh(), name="pgchannels fetch keys"
            )
        elif key is not None:
            fetching = None  # it wants a newer set only, and does not wait for who gets it
        if fetching is not None:
            # Shared and shielded: a client that gives up must neither stop the fetch nor begin
            # another one, and so set aside how often we may fetch.
            await asyncio.shield(fetching)
            key = find_key(self._keys, key_id, algorithm)
        if key is not None:
            return key
        if self._failed:
            raise KeysUnavailable
        raise invalid_token()

    def _under_way(self) -> asyncio.Task[None] | None:
        """The fetch that is under way in this event loop."""
        task = self._fetching
        if task is None or task.done() or task.get_loop() is not asyncio.get_running_loop():
            return None
        return task

    def _is_old(self) -> bool:
        return self._clock() - self._fetched_at >= self._max_age

    def _may_fetch(self) -> bool:
        pause = min(self._min_refresh, self.RETRY) if self._failed else self._min_refresh
        return self._clock() - self._attempted_at >= pause

    async def _refresh(self) -> None:
        self._attempted_at = self._clock()
        try:
            async with asyncio.timeout(self._timeout):
                document = await self._fetch()
            self._keys = parse_jwks(document, self._algorithms)
        except Exception:
            self._failed = True
            logger.warning("the keys that tokens are signed by could not be fetched", exc_info=True)
        else:
            self._failed = False
            self._fetched_at = self._clock()
