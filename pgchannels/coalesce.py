"""Many small requests, few statements: what is asked for while one is under way goes into the next.

So one caller alone waits for nothing, and a thousand at once share a transaction: the batch grows
with the time that a commit takes, and no delay is ever added.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Generic, TypeAlias, TypeVar

from pgchannels.errors import (
    ChannelLayerClosed,
    DatabaseError,
    DatabaseUnavailable,
    PGChannelsError,
)

__all__ = ["Coalescer"]

T = TypeVar("T")
R = TypeVar("R")

_Waiting: TypeAlias = tuple[T, asyncio.Future[R]]

# Seconds that close() leaves for what is under way.
_CLOSING_TIME = 5.0


class Coalescer(Generic[T, R]):
    """Runs requests together, one batch at a time, in the order in which they came.

    Args:
        run: does what is asked for in a list of requests, all or nothing, and returns a result for
            each; an exception among them is raised for that request alone.
        max_items: requests in a batch.
        max_size: what the sizes in a batch may add up to, give or take one request.
        size: of a request.
    """

    def __init__(
        self,
        run: Callable[[Sequence[T]], Awaitable[Sequence[R | PGChannelsError]]],
        *,
        max_items: int,
        max_size: int = 0,
        size: Callable[[T], int] | None = None,
    ) -> None:
        self._run = run
        self._max_items = max_items
        self._max_size = max_size
        self._size = size
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[_Waiting[T, R]] = deque()
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def submit(self, item: T) -> asyncio.Future[R]:
        """Ask for *item*. The future has the result when the batch that it is in has been run.

        Cancelled before that began, it is not done; after that, it may be.

        Raises:
            DatabaseUnavailable: the connection broke; it may or may not have been done.
            DatabaseError: PostgreSQL refused this very request.
        """
        if self._closed:
            raise ChannelLayerClosed
        done: asyncio.Future[R] = self._loop.create_future()
        self._waiting.append((item, done))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run_all())
        return done

    async def close(self) -> None:
        """Do what is waiting, within a few seconds, and refuse more."""
        self._closed = True
        if self._task is not None:
            _, late = await asyncio.wait([self._task], timeout=_CLOSING_TIME)
            for task in late:
                task.cancel()
                await asyncio.wait([task])

    async def _run_all(self) -> None:
        while batch := self._next_batch():
            try:
                await self._run_batch(batch)
            except BaseException as error:
                # Failed in an unforeseen way, or cancelled because the loop shuts down: whoever
                # waits must learn of it.
                interrupted = DatabaseUnavailable(f"a request was interrupted: {error!r}")
                interrupted.__cause__ = error
                _fail(batch, interrupted)
                if not isinstance(error, Exception):
                    _fail(self._waiting, interrupted)
                    self._waiting.clear()
                    raise

    def _next_batch(self) -> list[_Waiting[T, R]]:
        batch: list[_Waiting[T, R]] = []
        size = 0
        while self._waiting and len(batch) < self._max_items and size <= self._max_size:
            waiting = self._waiting.popleft()
            item, done = waiting
            if not done.cancelled():
                batch.append(waiting)
                if self._size is not None:
                    size += self._size(item)
        return batch

    async def _run_batch(self, batch: Sequence[_Waiting[T, R]]) -> None:
        try:
            results = await self._run([item for item, _ in batch])
        except DatabaseUnavailable as error:
            _fail(batch, error)
        except DatabaseError as error:
            if len(batch) == 1:
                _fail(batch, error)
            else:
                # One of them was refused, and with it all: find out which.
                for waiting in batch:
                    await self._run_batch([waiting])
        else:
            for (_, done), result in zip(batch, results, strict=True):
                if done.done():
                    continue  # cancelled while it was under way
                if isinstance(result, PGChannelsError):
                    done.set_exception(result)
                else:
                    done.set_result(result)


def _fail(batch: Iterable[_Waiting[Any, Any]], error: DatabaseError) -> None:
    for _, done in batch:
        if not done.done():
            done.set_exception(error)
