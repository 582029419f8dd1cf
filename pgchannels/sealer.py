"""Seals batches: moves what has been committed to the outbox into the log, and notifies the nodes.

A batch is bounded in messages and in bytes. One that took too long is tried again with half its
size, for it would take too long again: as long as it is tried, nothing at all is delivered.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from pgchannels.errors import DatabaseError, DatabaseUnavailable

if TYPE_CHECKING:
    from pgchannels.settings import Settings
    from pgchannels.store import Batch, Session

__all__ = ["BATCH_BYTES", "Sealer"]

logger = logging.getLogger("pgchannels.sealer")

BATCH_BYTES = 16 * 1024**2
"""Bytes of messages, as they are stored, that end a batch. The message that exceeds them is in."""

# Batches in time after which the next one may be twice as large again.
_BATCHES_IN_TIME = 8

_QUERY_CANCELED = "57014"


class Sealer:
    """Seals on one session.

    Args:
        settings: how much at a time.
        session: nobody else uses it meanwhile.
        sealed: called with the new head of the log after each batch; this node need not wait for
            its own notification.
    """

    def __init__(
        self, settings: Settings, session: Session, *, sealed: Callable[[int], None]
    ) -> None:
        self._settings = settings
        self._session = session
        self._sealed = sealed
        self._divisor = 1
        self._in_time = 0

    async def drain(self) -> int:
        """Seal until the outbox has been emptied; return how many messages were moved."""
        moved = 0
        while True:
            batch = await self._seal()
            moved += batch.sealed
            # A log that has no room at the moment stops a batch before its first message.
            if not batch.stopped or not batch.sealed:
                return moved

    async def notify(self, head: int) -> None:
        """Tell the nodes how far the log reaches. A failure is logged: they poll, too."""
        try:
            await self._session.notify(self._settings.schema_name, str(head))
        except DatabaseError as error:
            _log_not_notified(error)

    async def _seal(self) -> Batch:
        max_messages = max(1, self._settings.batch_size // self._divisor)
        max_bytes = max(1, BATCH_BYTES // self._divisor)
        try:
            batch = await self._session.seal(max_messages, max_bytes)
        except DatabaseUnavailable as error:
            if _took_too_long(error):
                self._divisor = min(2 * self._divisor, BATCH_BYTES)
                self._in_time = 0
            raise
        except DatabaseError as error:
            # A batch is committed before its notification, which fails when the queue of
            # notifications is full. If it was the batch that failed, this raises again.
            batch = await self._session.seal_only(max_messages, max_bytes)
            _log_not_notified(error)
            self._sealed(batch.head)
        else:
            if batch.sealed:
                self._sealed(batch.head)
        if self._divisor > 1:
            self._in_time += 1
            if self._in_time == _BATCHES_IN_TIME:
                self._divisor //= 2
                self._in_time = 0
        return batch


def _took_too_long(error: DatabaseUnavailable) -> bool:
    """Whether a statement was cancelled, by a timeout of the server or by ours."""
    return error.sqlstate == _QUERY_CANCELED or isinstance(error.__cause__, TimeoutError)


def _log_not_notified(error: DatabaseError) -> None:
    logger.warning("cannot notify the nodes; they will find messages by polling: %s", error)
