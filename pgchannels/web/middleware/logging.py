"""Logs that something was sent, and never what."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from pgchannels.errors import ConfigurationError
from pgchannels.messages import Message
from pgchannels.web.incoming import Frame
from pgchannels.web.middleware.chain import Middleware, overrides, types_of

if TYPE_CHECKING:
    from pgchannels.web.connection import Connection

__all__ = ["Logging"]

# Bytes of a frame that is parsed for nothing but its type.
MAX_PARSED = 64 * 1024
# Characters of a type, which the client has chosen.
MAX_TYPE = 100


class Logging(Middleware):
    """Logs each frame and each message, or a sample of them, by the logger ``pgchannels.messages``.

    A record has, as ``extra``: ``direction`` (``"inbound"`` or ``"outbound"``), ``connection`` (its
    id), ``user_id``, ``message_type`` (of 100 characters at most; None of a frame that is not JSON,
    or has more than 64 KiB) and ``size`` in bytes; outbound also ``channel`` and ``position``. What
    is in a message is not logged, nor what a handshake had in it: tokens are in both.

    In a chain, it sees inbound what those on its left have let through, and outbound those on its
    right.

    Args:
        sample: the share that is logged, 0 to 1; each frame is drawn by itself.
        level: of the records.
        exclude: types that are not logged.
        logger: instead of ``pgchannels.messages``.
        random: draws from [0, 1).

    Raises:
        ConfigurationError: *sample* is out of its range.
    """

    def __init__(
        self,
        sample: float = 1.0,
        *,
        level: int = logging.INFO,
        exclude: Collection[str] = (),
        logger: logging.Logger | None = None,
        random: Callable[[], float] = random.random,
    ) -> None:
        if not 0 <= sample <= 1:
            raise ConfigurationError(f"sample must be 0 to 1, not {sample!r}")
        if not isinstance(level, int):
            raise ConfigurationError(f"level is a number such as logging.INFO, not {level!r}")
        if logger is not None and not isinstance(logger, logging.Logger):
            raise ConfigurationError(f"logger is a logging.Logger, not {logger!r}")
        self.sample = sample
        self.level = level
        self.exclude = types_of(exclude)
        self._logger = logger or logging.getLogger("pgchannels.messages")
        self._random = random

    @property
    def is_immediate(self) -> bool:
        return not overrides(self.inbound, Logging.inbound)

    async def inbound(self, connection: Connection, frame: Frame) -> Frame | None:
        if self._is_drawn():
            kind = frame.type if frame.size <= MAX_PARSED else None
            self._log("inbound", connection, kind, frame.size)
        return frame

    async def outbound(self, connection: Connection, message: Message) -> Message | None:
        if self._is_drawn():
            kind = (message.document or {}).get("type")
            place = {"channel": message.channel, "position": str(message.position)}
            self._log(
                "outbound", connection, kind if isinstance(kind, str) else None, message.size, place
            )
        return message

    def _is_drawn(self) -> bool:
        return self._logger.isEnabledFor(self.level) and self._random() < self.sample

    def _log(
        self,
        direction: str,
        connection: Connection,
        kind: str | None,
        size: int,
        more: dict[str, Any] | None = None,
    ) -> None:
        if kind in self.exclude:
            return
        extra = {
            "direction": direction,
            "connection": connection.id,
            "user_id": connection.user_id,
            "message_type": None if kind is None else kind[:MAX_TYPE],
            "size": size,
            **(more or {}),
        }
        # The type is the client's, and may hold anything: it stays out of the sentence.
        self._logger.log(self.level, "%s %d bytes: %s", direction, size, connection.id, extra=extra)

    def __repr__(self) -> str:
        return f"<Logging sample={self.sample}>"
