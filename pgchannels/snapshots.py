"""Snapshots of the database that end where the log does.

A transaction that reads state, and wants to go on with what is published after it, needs a position
that fits: all that it sees is before, all that it does not see comes after. No position fits an
ordinary snapshot, for at any moment some messages are committed and have no position yet. So one is
made to fit. A batch is sealed in a REPEATABLE READ transaction, which takes exactly what its
snapshot shows, and that snapshot is exported to the reader (manual, SET TRANSACTION). Meanwhile
nobody else may seal: for a few round trips, and at the most, by the server's clock, for seconds.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from pgchannels.errors import DatabaseError, DatabaseUnavailable
from pgchannels.messages import Position
from pgchannels.sealer import BATCH_BYTES, Sealer
from pgchannels.sql import in_schema

if TYPE_CHECKING:
    from pgchannels.settings import Settings
    from pgchannels.store import Session

__all__ = ["Snapshots"]

logger = logging.getLogger("pgchannels.snapshots")

# What the last batch may hold; the backlog before it is sealed in the ordinary way.
_MAX_MESSAGES = 100_000
_MAX_BYTES = 4 * BATCH_BYTES
# Seconds until a session that holds the others up, and does nothing, is ended.
_IDLE_TIME = 5
# Conflicts with a pruner, and publishers that are faster than the sequencer.
_ATTEMPTS = 20
_SERIALIZATION_FAILURE = "40001"
_NO_TRANSACTION = "25P01"


class Snapshots:
    """Makes them, one at a time.

    Args:
        settings: of the layer.
        session: a connection of its own.
        sealed: called with the new head of the log when something was sealed.
    """

    def __init__(
        self, settings: Settings, session: Session, *, sealed: Callable[[int], None]
    ) -> None:
        self._session = session
        self._sealed = sealed
        self._sealer = Sealer(settings, session, sealed=sealed)
        self._lock = asyncio.Lock()
        self._lock_table = in_schema("pgchannels.sequencer_lock", settings.schema_name)

    async def take(self, adopt: Callable[[str], Awaitable[None]]) -> Position:
        """Export a snapshot, call *adopt* with its name, and return the position that fits.

        Raises:
            DatabaseUnavailable: no connection; or *adopt* took seconds.
            DatabaseError: PostgreSQL refused.
            Exception: what *adopt* raises.
        """
        async with self._lock:
            for _ in range(_ATTEMPTS):
                try:
                    position = await self._attempt(adopt)
                except DatabaseError as error:
                    # Whatever state it is in: a new connection holds no lock and no transaction.
                    self._session.abort()
                    if error.sqlstate != _SERIALIZATION_FAILURE:
                        raise
                except BaseException:
                    self._session.abort()
                    raise
                else:
                    if position is not None:
                        return position
        raise DatabaseError(f"no snapshot could be taken, in {_ATTEMPTS} attempts")

    async def close(self) -> None:
        await self._session.close()

    async def _attempt(self, adopt: Callable[[str], Awaitable[None]]) -> Position | None:
        session = self._session
        await self._sealer.drain()
        # The lock before the snapshot, which must show what the previous holder has committed: none
        # of these statements takes one. A session that is left waiting is ended by the server.
        await session.execute(
            "begin isolation level repeatable read;"
            f" set local idle_in_transaction_session_timeout = '{_IDLE_TIME}s';"
            f" lock table {self._lock_table} in share update exclusive mode"
        )
        batch = await session.seal_only(_MAX_MESSAGES, _MAX_BYTES)
        if batch.stopped:
            position = None  # more was to be seen
        else:
            ((snapshot, epoch),) = await session.fetch("export_snapshot")
            await adopt(snapshot)
            position = Position(epoch, batch.head)
        # The reader has adopted it: it outlives the transaction that it was exported from. The
        # savepoint is refused outside of a transaction, and so on another connection than the one
        # that has sealed. Then nothing was committed.
        try:
            await session.execute("savepoint sealed; commit")
        except DatabaseError as error:
            if error.sqlstate != _NO_TRANSACTION:
                raise
            raise DatabaseUnavailable(
                "the connection was lost that a snapshot was made on"
            ) from error
        if batch.sealed:
            self._sealed(batch.head)
            await self._sealer.notify(batch.head)
        return position
