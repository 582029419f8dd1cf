"""What all nodes are told to do with connections. Pure."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias, get_args

from pgchannels.channels import check_channel, check_user
from pgchannels.errors import InvalidMessage

if TYPE_CHECKING:
    from pgchannels.messages import Message

__all__ = ["COMMAND_LIFETIME", "REVOKED", "Action", "Command", "CommandWatch", "check_token_id"]

COMMAND_LIFETIME = timedelta(days=1)
"""How long a command is stored, so that nodes that could not read for a while find it."""

REVOKED = "revoked"
"""The reason to reauthorize, where tokens have been revoked."""

Action: TypeAlias = Literal["close", "reauthorize"]

logger = logging.getLogger("pgchannels.control")

_SELECTORS = ("channel", "user_id", "token_id", "group")
_MAX_REASON = 123
# RFC 6455, section 7.4: reserved, or of nobody yet.
_NOT_SENT = frozenset({1004, 1005, 1006})
_MAX_TOKEN_ID = 1000


@dataclass(frozen=True)
class Command:
    """What to do, and with which connections: exactly one selector.

    Args:
        action: ``"close"`` them; or ``"reauthorize"``, ask again whether they may do what they do.
        channel: the one with this channel.
        user_id: those of a user.
        token_id: those that came with this token.
        group: those that are members of a group.
        everyone: all there are.
        code: to close with, 1000 to 4999, but those that may not be sent, as 1005 and 1006.
        reason: to close with, up to 123 bytes. The client sees it.

    Raises:
        InvalidMessage: for anything else.
    """

    action: Action
    channel: str | None = None
    user_id: str | None = None
    token_id: str | None = None
    group: str | None = None
    everyone: bool = False
    code: int = 1000
    reason: str = ""

    def __post_init__(self) -> None:
        if self.action not in get_args(Action):
            raise InvalidMessage(f"a command is one of {get_args(Action)}, not {self.action!r}")
        chosen = [name for name in _SELECTORS if getattr(self, name) is not None]
        everyone: object = self.everyone
        if not isinstance(everyone, bool) or len(chosen) + everyone != 1:
            raise InvalidMessage(f"a command takes one of {(*_SELECTORS, 'everyone')}")
        for name in ("channel", "group"):
            if getattr(self, name) is not None:
                check_channel(getattr(self, name))
        if self.user_id is not None:
            check_user(self.user_id)
        if self.token_id is not None:
            check_token_id(self.token_id)
        code: object = self.code
        if not isinstance(code, int) or isinstance(code, bool) or not 1000 <= code <= 4999:
            raise InvalidMessage(f"a close code is an integer of 1000 to 4999, not {code!r}")
        if code in _NOT_SENT or 1014 < code < 3000:
            raise InvalidMessage(f"{code} cannot be sent as a close code")
        reason: object = self.reason
        if not isinstance(reason, str) or len(_encoded(reason)) > _MAX_REASON:
            raise InvalidMessage(f"a reason is a str of up to {_MAX_REASON} bytes")

    def to_dict(self) -> dict[str, Any]:
        """The payload of a message; what it lacks is as it is by default."""
        payload: dict[str, Any] = {"action": self.action, "code": self.code, "reason": self.reason}
        if self.everyone:
            payload["everyone"] = True
        for name in _SELECTORS:
            if getattr(self, name) is not None:
                payload[name] = getattr(self, name)
        return payload

    @classmethod
    def parse(cls, payload: Mapping[str, Any]) -> Self:
        """The command of a message to all nodes.

        Fields that this version does not know are left out.

        Raises:
            InvalidMessage: it is none: of a later version, say.
        """
        known = {name: payload[name] for name in cls.__dataclass_fields__ if name in payload}
        if "action" not in known:
            raise InvalidMessage("a command needs an action")
        return cls(**known)


class CommandWatch:
    """Reads the channel of commands for somebody. It is registered where streams are.

    Args:
        obey: is called with each command.
        missed: is called when some may have been lost.
    """

    def __init__(self, obey: Callable[[Command], None], missed: Callable[[], None]) -> None:
        self._obey = obey
        self._missed = missed
        self._stopped = False

    def stop(self) -> None:
        """Call nothing any more, though it may still be offered what is being handed out."""
        self._stopped = True

    def offer(self, message: Message) -> None:
        if self._stopped:
            return
        try:
            # It is the library's own, whatever the layer's serialiser makes of it.
            command = Command.parse(message.document or {})
        except InvalidMessage as error:
            # Of a later version, or of somebody who may write to the outbox and should not.
            logger.warning("a command that is none: %s", error)
            return
        self._obey(command)

    def missed(self, floor: int) -> None:
        if not self._stopped:
            self._missed()


def check_token_id(token_id: object) -> str:
    """Return *token_id* if it can be one: a text of 1 to 1000 characters.

    Raises:
        InvalidMessage: if not.
    """
    if not isinstance(token_id, str) or not 1 <= len(token_id) <= _MAX_TOKEN_ID:
        raise InvalidMessage(f"the id of a token is a str of 1 to {_MAX_TOKEN_ID} characters")
    if "\0" in token_id:
        raise InvalidMessage("the id of a token must not hold NUL")
    _encoded(token_id)
    return token_id


def _encoded(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InvalidMessage("a text must not hold lone surrogates") from error
