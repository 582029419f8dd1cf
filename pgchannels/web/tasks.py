"""The tasks of one socket: they live and end together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Coroutine
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any

import anyio
from anyio.abc import TaskGroup

from pgchannels.web.codes import INTERNAL_ERROR, NORMAL

__all__ = ["SocketTasks"]

# The tasks that the running code is one of: the block, a task beside it, or one that these started.
_current: ContextVar[SocketTasks | None] = ContextVar("pgchannels_socket_tasks", default=None)


class SocketTasks:
    """Runs what serves a socket beside a block of code. The first end is the end of all.

    By anyio's task group, because Starlette cancels by anyio's scopes, which repeat themselves
    until they are obeyed: asyncio's own ways of waiting for a cancelled task do not stand it.

    ``spawn()`` and ``end()`` may also be called by callbacks of the loop (``call_later()``,
    ``add_done_callback()``), in which there is no current task.
    """

    def __init__(self) -> None:
        self._group: TaskGroup | None = None
        self._to_start: list[Coroutine[Any, Any, object]] = []
        self._starter: asyncio.Task[None] | None = None
        self._first: int | Exception | None = None
        self._host: asyncio.Task[Any] | None = None
        self._cancelling = 0

    @property
    def ended(self) -> int | Exception | None:
        """What came first: a code to close with, or what was raised. None while all run."""
        return self._first

    @property
    def code(self) -> int:
        """The code that came first; 1011 if it was an error."""
        return self._first if isinstance(self._first, int) else INTERNAL_ERROR

    @property
    def are_running(self) -> bool:
        """Whether tasks may be spawned."""
        return self._group is not None

    @property
    def is_current(self) -> bool:
        """Whether the running code is the block, or one of these tasks."""
        return _current.get() is self

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Tasks may be spawned in this block. It ends at the first end: its own, or a task's.

        What a task has raised is raised here. Where the end came from outside of the block,
        the block is cancelled, and no exception leaves it.
        """
        self._host = asyncio.current_task()
        self._cancelling = 0 if self._host is None else self._host.cancelling()
        around = _current.get()
        _current.set(self)
        try:
            async with anyio.create_task_group() as group:
                self._group = group
                if self._first is not None:  # it has been ended before it began
                    group.cancel_scope.cancel()
                # Raised inside the group, an error would come out wrapped.
                try:
                    yield
                except asyncio.CancelledError as error:
                    self._cancelled(error)
                except Exception as error:  # noqa: BLE001 - raised again below
                    self.forget_cancellation()
                    self.end(error)
                else:
                    self.end(NORMAL)
        finally:
            self._group = None
            _current.set(around)
            for coroutine in self._to_start:
                coroutine.close()
            if self._first is None:
                self._first = INTERNAL_ERROR  # the block was cancelled, from far outside
        if isinstance(self._first, Exception):
            raise self._first

    def forget_cancellation(self) -> None:
        """An exception has come out of what was awaited, and nobody ends the tasks.

        Before Python 3.13, asyncio's TaskGroup may cancel the task that it is in and not take that
        back. Anyio would then not know its own cancellation, and let it out of the block.
        """
        task, group = self._host, self._group
        if task is asyncio.current_task() and group and not group.cancel_scope.cancel_called:
            while task and task.cancelling() > self._cancelling:
                task.uncancel()

    def spawn(self, coroutine: Coroutine[Any, Any, object]) -> None:
        """Run *coroutine* beside the others. If it raises, that ends them all.

        Raises:
            RuntimeError: outside of ``running()``.
        """
        if self._group is None:
            coroutine.close()
            raise RuntimeError("tasks run while their socket is served, from connect() on")
        if asyncio.current_task() is not None:
            self._group.start_soon(self._until_end, coroutine)
            return
        # Anyio asks in which library it runs, and where sniffio is installed, the answer in a
        # callback is: in none. In a task of our own it is asyncio.
        self._to_start.append(coroutine)
        if self._starter is None:
            self._starter = asyncio.get_running_loop().create_task(self._start_all())

    def end(self, end: int | Exception) -> None:
        """End everything, with a close code or an error; only the first one counts."""
        if self._first is None:
            self._first = end
        if self._group is not None:
            # As anyio's own timeouts do it, from a callback too: it needs no current task.
            self._group.cancel_scope.cancel()

    async def _start_all(self) -> None:
        """Start the tasks that callbacks have asked for. It waits for nothing."""
        self._starter = None
        if self._group is not None:
            for coroutine in self._to_start:
                self._group.start_soon(self._until_end, coroutine)
            self._to_start.clear()

    async def _until_end(self, running: Awaitable[object]) -> None:
        _current.set(self)  # whoever has spawned it
        try:
            await running
        except asyncio.CancelledError as error:
            self._cancelled(error)
        except Exception as error:  # noqa: BLE001 - raised again by running()
            self.end(error)

    def _cancelled(self, error: asyncio.CancelledError) -> None:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise error
        # Not this task was cancelled, but one that it has waited for. Taken for the end that
        # somebody has asked for, it would leave the socket to nobody.
        self.end(
            RuntimeError("what was waited for has been cancelled").with_traceback(
                error.__traceback__
            )
        )
