"""Counting what a reader gets. Used in the benchmark's own process and in its peers."""

from __future__ import annotations

import asyncio
import time
from array import array
from types import TracebackType
from typing import Self

from pgchannels import PostgresLayer

__all__ = ["Arrivals", "Reader", "now"]

_PATIENCE = 60.0


def now() -> float:
    """Seconds on CLOCK_MONOTONIC, which all processes of a machine share."""
    return time.monotonic()


class Arrivals:
    """How many have come, and when. ``add()`` is all that is paid per message.

    Args:
        stamped: keep the time of each, not only of the last that was waited for.
    """

    def __init__(self, *, stamped: bool = False) -> None:
        self.count = 0
        self.times = array("d")
        self._stamped = stamped
        self._target = -1
        self._reached = asyncio.Event()
        self._reached_at = 0.0

    def add(self) -> None:
        self.count += 1
        if self._stamped:
            self.times.append(now())
        if self.count == self._target:
            self._reached_at = now()
            self._reached.set()

    async def reached(self, target: int) -> float:
        """Wait until *target* have come; return when the last of them came.

        If they have come before this is called, that is now: right to within the time that it took
        to ask, and never too early.
        """
        if self.count >= target:
            return now()
        self._target = target
        self._reached.clear()
        try:
            async with asyncio.timeout(_PATIENCE):
                await self._reached.wait()
        except TimeoutError:
            raise RuntimeError(f"{self.count} of {target} messages have arrived") from None
        return self._reached_at


class Reader:
    """Subscribes to a channel from now on and counts, as an application would: ``async for``.

    That nothing is missing and nothing comes twice is seen by the count and the ids.
    """

    def __init__(self, layer: PostgresLayer, channel: str, *, stamped: bool = False) -> None:
        self.arrivals = Arrivals(stamped=stamped)
        self._layer = layer
        self._channel = channel
        self._subscribed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._read())
        await self._subscribed.wait()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._task is not None
        self._task.cancel()
        results = await asyncio.gather(self._task, return_exceptions=True)
        if isinstance(results[0], Exception):
            raise results[0]

    async def _read(self) -> None:
        add = self.arrivals.add
        last = 0
        async with self._layer.subscribe(self._channel) as messages:
            self._subscribed.set()
            async for message in messages:
                if message.id <= last:
                    raise RuntimeError(f"message {message.id} came after {last}")
                last = message.id
                add()
