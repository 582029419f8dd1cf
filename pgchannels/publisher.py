"""Inserts into the outbox. What is published while an insert is under way goes into the next one.

So one publisher alone waits for nothing, and a thousand at once share a transaction: the batch
grows with the time that a commit takes, and no delay is ever added.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pgchannels.errors import ChannelLayerClosed, DatabaseError, DatabaseUnavailable
from pgchannels.store import Outgoing

if TYPE_CHECKING:
    from pgchannels.store import Store

__all__ = ["Publisher"]

_MAX_MESSAGES = 2000
_MAX_CHARACTERS = 8 * 1024 * 1024
# Seconds that close() leaves for what is under way.
_CLOSING_TIME = 5.0


class _Waiting(NamedTuple):
    message: Outgoing
    done: asyncio.Future[None]


class Publisher:
    """Coalesces the publishing of one process.

    Args:
        store: where to.
        published: called after each commit; must not raise.
    """

    def __init__(self, store: Store, published: Callable[[], None]) -> None:
        self._store = store
        self._published = published
        self._waiting: deque[_Waiting] = deque()
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    async def publish(self, message: Outgoing) -> None:
        """Return when *message* is committed.

        Cancelled before its insert began, it is not published; after that, it may be.

        Raises:
            DatabaseUnavailable: the connection broke; the message may or may not be published.
            DatabaseError: PostgreSQL refused this very message.
        """
        if self._closed:
            raise ChannelLayerClosed
        done = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(message, done))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._flush())
        await done

    async def close(self) -> None:
        """Publish what is waiting, within a few seconds, and refuse more."""
        self._closed = True
        if self._task is not None:
            _, late = await asyncio.wait([self._task], timeout=_CLOSING_TIME)
            for task in late:
                task.cancel()
                await asyncio.wait([task])

    async def _flush(self) -> None:
        while batch := self._next_batch():
            try:
                await self._insert(batch)
            except BaseException as error:
                # Failed in an unforeseen way, or cancelled because the loop shuts down: whoever
                # waits must learn of it.
                interrupted = DatabaseUnavailable(f"publishing was interrupted: {error!r}")
                interrupted.__cause__ = error
                _settle(batch, interrupted)
                if not isinstance(error, Exception):
                    _settle(self._waiting, interrupted)
                    self._waiting.clear()
                    raise

    def _next_batch(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        size = 0
        while self._waiting and len(batch) < _MAX_MESSAGES and size < _MAX_CHARACTERS:
            waiting = self._waiting.popleft()
            if not waiting.done.cancelled():
                batch.append(waiting)
                size += len(waiting.message.payload)
        return batch

    async def _insert(self, batch: Sequence[_Waiting]) -> None:
        try:
            await self._store.insert([waiting.message for waiting in batch])
        except DatabaseUnavailable as error:
            _settle(batch, error)
        except DatabaseError as error:
            if len(batch) == 1:
                _settle(batch, error)
            else:
                # One of them was refused, and with it all: find out which.
                for waiting in batch:
                    await self._insert([waiting])
        else:
            self._published()
            _settle(batch, None)


def _settle(batch: Iterable[_Waiting], error: DatabaseError | None) -> None:
    for waiting in batch:
        if waiting.done.done():
            continue  # cancelled while the insert was under way
        if error is None:
            waiting.done.set_result(None)
        else:
            waiting.done.set_exception(error)
