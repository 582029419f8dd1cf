"""The positions that a client has not been told, because it was not sent the messages. Pure.

An envelope tells its position. A message that a consumer's method has handled, or that middleware
has dropped, tells the client nothing: it would be replayed to each later connection. Kept by
channel, the newest of them are told now and then, and before the socket is closed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pgchannels.channels import DIRECT, is_connection

if TYPE_CHECKING:
    from pgchannels.messages import Message

__all__ = ["Untold"]


class Untold:
    """What one client has not been told."""

    __slots__ = ("_current", "_positions", "wanted")

    def __init__(self) -> None:
        self._positions: dict[str, str] = {}
        self._current: Message | None = None
        self.wanted = False
        """The client keeps positions: it has given one, or has been sent one."""

    def __bool__(self) -> bool:
        return self.wanted and bool(self._positions)

    def begin(self, message: Message) -> None:
        """*message* is about to be handled, or dropped, or sent: that is for others to decide."""
        self._current = message

    def sent(self, message: Message) -> None:
        """The client gets the envelope of *message*."""
        if not message.ephemeral:
            self.wanted = True
            self._positions.pop(message.channel, None)
            self._current = None

    def done(self) -> bool:
        """The message that was begun is done with, and was not sent; False if it was sent."""
        message, self._current = self._current, None
        if message is not None and not message.ephemeral and _can_resume(message.channel):
            self._positions[message.channel] = str(message.position)
        return message is not None

    def again(self) -> None:
        """The message that was begun is not done with. The client may get it again."""
        self._current = None

    def forget(self, channel: str | None = None) -> None:
        """A channel, or all, are not read any more, or from another position on."""
        if channel is None:
            self._positions.clear()
        else:
            self._positions.pop(channel, None)
        if self._current is not None and channel in (None, self._current.channel):
            self._current = None

    def take(self) -> dict[str, str]:
        """The positions by channel; from now on they count as told."""
        if not self.wanted:
            return {}
        positions, self._positions = self._positions, {}
        return positions


def _can_resume(channel: str) -> bool:
    # A connection's own channel ends with it, and with that all that was sent to it alone.
    return channel != DIRECT and not is_connection(channel)
