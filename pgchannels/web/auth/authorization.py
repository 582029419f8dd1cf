"""Who may do what with a channel: one question, asked of an async callable, and ready answers.

Nothing is allowed unless the answer is True: not by a truthy value, and not by default.
"""

# No postponed annotations here: FastAPI resolves the dependency's, which names what is local.

import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Annotated, Any, Literal, TypeAlias, get_args
from weakref import ref

from fastapi import Depends
from starlette.requests import HTTPConnection

from pgchannels.channels import (
    MAX_CHANNEL_LENGTH,
    PRESENCE,
    RESERVED,
    check_channel,
    is_connection,
)
from pgchannels.errors import ConfigurationError, InvalidChannel
from pgchannels.web.auth.identity import Identity
from pgchannels.web.errors import AuthorizationError, SocketError
from pgchannels.web.refusal import refusal

__all__ = [
    "ACTIONS",
    "Action",
    "Authorize",
    "Capabilities",
    "Grants",
    "http_authorize",
    "is_allowed",
    "require",
]

logger = logging.getLogger("pgchannels.web")

Action: TypeAlias = Literal["subscribe", "publish", "history", "presence"]
"""What may be done with a channel: read on live, write, read what is past, see who is there."""

ACTIONS: frozenset[Action] = frozenset(get_args(Action))

Authorize: TypeAlias = Callable[[Identity | None, Action, str], Awaitable[bool]]
"""May this identity (None: nobody in particular) do that with this channel? True, or no."""


async def is_allowed(
    authorize: Authorize, identity: Identity | None, action: Action, channel: str
) -> bool:
    """Ask. Names that are no channel's are not allowed, and not asked about."""
    if action not in ACTIONS or not _is_channel(channel):
        return False
    return await authorize(identity, action, channel) is True


async def require(
    authorize: Authorize, identity: Identity | None, action: Action, channel: str
) -> None:
    """Ask, and raise if the answer is no.

    Raises:
        AuthorizationError: it is not allowed.
    """
    if not await is_allowed(authorize, identity, action, channel):
        raise AuthorizationError(
            context={"action": action, "channel": channel[:MAX_CHANNEL_LENGTH]}
        )


class Grants:
    """Channels, and what is allowed with them: ``{"room:*": ["subscribe", "history"]}``. Pure.

    A pattern is a channel's name, or the beginning of names and a ``*`` for whatever follows. What
    is allowed is the union of all that match; ``"*"`` among the actions is all of them.

    No ``*`` reaches the channel of a connection, and only ``presence:…*`` reaches the channels that
    tell who is present: name them.

    Raises:
        ValueError: it is not such a table. What it holds does not stand in the message.
    """

    MAX_PATTERNS = 1000

    def __init__(self, table: object) -> None:
        self._exact: dict[str, frozenset[str]] = {}
        self._prefixes: list[tuple[str, frozenset[str]]] = []
        if not isinstance(table, Mapping):
            raise ValueError("capabilities are an object")
        if len(table) > self.MAX_PATTERNS:
            raise ValueError(f"there may be {self.MAX_PATTERNS} capabilities")
        for pattern, actions in table.items():
            allowed = _parse_actions(actions)
            name, is_prefix = _parse_pattern(pattern)
            if is_prefix:
                self._prefixes.append((name, allowed))
            else:
                self._exact[name] = allowed

    def allow(self, action: Action, channel: str) -> bool:
        if channel.startswith(RESERVED):
            return False  # everyone's, for one: no capability is meant to reach all there are
        if action in self._exact.get(channel, ()):
            return True
        if is_connection(channel):
            return False  # another client's
        # An event of presence is the log's own word, not that of whoever may publish to all rooms.
        needed = PRESENCE if channel.startswith(PRESENCE) else ""
        return any(
            action in allowed and channel.startswith(prefix) and prefix.startswith(needed)
            for prefix, allowed in self._prefixes
        )


def _parse_pattern(pattern: object) -> tuple[str, bool]:
    if not isinstance(pattern, str):
        raise ValueError("a capability is for a channel's name")
    name = pattern.removesuffix("*")
    is_prefix = name != pattern
    if name or not is_prefix:
        try:
            check_channel(name)
        except InvalidChannel:
            raise ValueError(
                "a capability is for a channel's name, or for the beginning of one and a *"
            ) from None
    return name, is_prefix


def _parse_actions(actions: object) -> frozenset[str]:
    if isinstance(actions, str | Mapping) or not isinstance(actions, Collection):
        raise ValueError("a capability lists actions")
    found: set[str] = set()
    for action in actions:
        if action == "*":
            found |= ACTIONS
        elif isinstance(action, str) and action in ACTIONS:
            found.add(action)
        else:
            raise ValueError("a capability lists actions")
    return frozenset(found)


class Capabilities:
    """Allows what the token says: ``{"cap": {"room:*": ["subscribe", "history"]}}``.

    The patterns and actions are those of :class:`Grants`. A claim that is missing, or is not such a
    table as a whole, allows nothing. An :class:`Identity` with capabilities of its own goes by
    those. The table is read once for each identity: to change it, make another one.

    Args:
        claim: where the table stands.
    """

    def __init__(self, claim: str = "cap") -> None:
        self.claim = claim
        # By id(): claims cannot be hashed. An entry goes with its identity, before the id is given
        # to another object.
        self._parsed: dict[int, tuple[ref[Identity], Grants | None]] = {}

    async def __call__(self, identity: Identity | None, action: Action, channel: str) -> bool:
        if identity is None or not _is_channel(channel):
            return False
        grants = self._grants(identity)
        return grants is not None and grants.allow(action, channel)

    def _grants(self, identity: Identity) -> Grants | None:
        # A socket asks for each of its channels, a thousand times with the same table.
        key = id(identity)
        if key not in self._parsed:
            parsed = self._parsed
            parsed[key] = (ref(identity, lambda _: parsed.pop(key, None)), self._parse(identity))
        return self._parsed[key][1]

    def _parse(self, identity: Identity) -> Grants | None:
        table = identity.capabilities
        if table is None:
            table = identity.claims.get(self.claim)
        if table is None:
            return None
        try:
            return Grants(table)
        except ValueError as error:
            # Whose it is, and what it says, is not for the log.
            logger.warning("the claim %r allows nothing: %s", self.claim, error)
            return None


def http_authorize(
    authorize: Authorize, identity: Callable[..., Any], action: Action = "history"
) -> Callable[..., Awaitable[bool]]:
    """Make the dependency that ``channels_router(authorize=…)`` wants of an :data:`Authorize`.

    Args:
        authorize: the same that sockets go by.
        identity: a dependency that gives an :class:`Identity`, or None, such as
            ``authentication.dependency()``.
        action: what is asked for.

    Raises:
        ConfigurationError: an action that there is not, or one of the two that cannot be called.
    """
    if action not in ACTIONS:
        raise ConfigurationError(f"there is no action {action!r}")
    for given in (authorize, identity):
        if not callable(given):
            raise ConfigurationError(f"expected a callable, not {given!r}")

    async def allowed(
        connection: HTTPConnection, channel: str, who: Annotated[Any, Depends(identity)]
    ) -> bool:
        try:
            return await is_allowed(authorize, who, action, channel)
        except SocketError as error:
            failure = refusal(connection, error.describe())
        raise failure

    return allowed


def _is_channel(channel: object) -> bool:
    try:
        check_channel(channel)
    except InvalidChannel:
        return False
    return True
