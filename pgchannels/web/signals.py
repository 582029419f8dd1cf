"""Something to be done between a signal to end and what it usually does.

A server that gets SIGTERM closes every socket at once, before the application's lifespan hears of
it. So the signal is held back until clients have been told what to do.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import FrameType
from typing import TypeAlias

__all__ = ["before_exit"]

logger = logging.getLogger("pgchannels.web")

_Handler: TypeAlias = Callable[[int, FrameType | None], object]

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@asynccontextmanager
async def before_exit(do: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """In this block, SIGTERM and SIGINT first do that, and then what they did before.

    A second signal does not wait for the end of the first. Only where the handler is a Python
    function that a server has set, in the main thread: a program without one ends by the signal,
    and asyncio's own are not to be found.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting = _Waiting(do)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    ours = {number: waiting for number, handler in before.items() if _is_a_servers(handler)}
    for number in ours:
        waiting.handlers[number] = before[number]  # type: ignore[assignment]
        signal.signal(number, waiting.caught)
    try:
        yield
    finally:
        for number in ours:
            # Not if somebody has set another one since.
            if signal.getsignal(number) == waiting.caught:
                signal.signal(number, before[number])
        await waiting.done()


class _Waiting:
    """Signals that have come, and what is done before they are passed on."""

    def __init__(self, do: Callable[[], Awaitable[None]]) -> None:
        self.handlers: dict[int, _Handler] = {}
        self._do = do
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[None] | None = None

    def caught(self, number: int, frame: FrameType | None) -> None:
        # Between any two instructions of the program: no more than this.
        self._loop.call_soon_threadsafe(self._begin, number)

    def _begin(self, number: int) -> None:
        if self._task is None:
            logger.info("%s: saying goodbye first", signal.Signals(number).name)
            self._task = asyncio.create_task(self._run(number))
        else:
            self.handlers[number](number, None)

    async def _run(self, number: int) -> None:
        try:
            await self._do()
        except Exception:
            logger.exception("what was to be done before the end has failed")
        self.handlers[number](number, None)

    async def done(self) -> None:
        if self._task is not None:
            await asyncio.wait([self._task])


def _is_a_servers(handler: object) -> bool:
    if not callable(handler) or isinstance(handler, signal.Handlers):
        return False
    return handler is not signal.default_int_handler and not str(
        getattr(handler, "__module__", "")
    ).startswith("asyncio")
