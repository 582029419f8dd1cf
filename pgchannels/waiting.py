"""Waiting: for an event, with a limit; for a lock, in whichever event loop."""

from __future__ import annotations

import asyncio
from weakref import WeakKeyDictionary

from pgchannels.errors import ConfigurationError

__all__ = ["LoopLock", "belongs_here", "set_within"]


async def set_within(event: asyncio.Event, seconds: float) -> bool:
    """Wait until *event* is set, or for so many seconds; say whether it is. Does not clear it."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True


def belongs_here(loop: asyncio.AbstractEventLoop) -> bool:
    """Return whether a layer that was opened in *loop* can be used: False if *loop* has ended.

    Raises:
        ConfigurationError: *loop* is another one, and goes on.
    """
    if loop is asyncio.get_running_loop():
        return True
    if loop.is_closed():
        return False
    raise ConfigurationError(
        "this layer was opened in another event loop; each loop needs a layer of its own"
    )


class LoopLock:
    """A lock for an object that outlives event loops: each loop has one of its own.

    An :class:`asyncio.Lock` belongs to the loop in which somebody has first waited for it. ::

        async with self._lock.here():
    """

    def __init__(self) -> None:
        self._locks: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock]
        self._locks = WeakKeyDictionary()

    def here(self) -> asyncio.Lock:
        """The lock of the running loop."""
        return self._locks.setdefault(asyncio.get_running_loop(), asyncio.Lock())
