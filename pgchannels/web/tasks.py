"""The tasks of one socket: they live and end together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import anyio
from anyio.abc import TaskGroup

__all__ = ["SocketTasks"]

_T = TypeVar("_T")


class SocketTasks:
    """Runs what serves a socket, and others beside it. The first end is the end of all.

    By anyio's task group, because Starlette cancels by anyio's scopes, which repeat themselves
    until they are obeyed: asyncio's own ways of waiting for a cancelled task do not stand it.

    Args:
        ended_by: how an exception is to count: as itself, or as a code that was closed with.
    """

    def __init__(self, ended_by: Callable[[Exception], int | Exception]) -> None:
        self._ended_by = ended_by
        self._group: TaskGroup | None = None
        self._ended: list[int | Exception] = []

    async def run(self, main: Callable[[], Awaitable[int]]) -> int:
        """Run *main* in the caller's own task; return its code, or raise what came first."""
        try:
            async with anyio.create_task_group() as group:
                self._group = group
                code = await self._until_end(main())
                if code is not None:
                    self._end(code)
        finally:
            self._group = None
        first = self._ended[0]
        if isinstance(first, Exception):
            raise first
        return first

    def spawn(self, coroutine: Coroutine[Any, Any, object]) -> None:
        """Run *coroutine* beside the others. If it raises, that ends them all.

        Raises:
            RuntimeError: ``run()`` is not under way.
        """
        if self._group is None:
            coroutine.close()
            raise RuntimeError("tasks run while their socket is served, from connect() on")
        self._group.start_soon(self._until_end, coroutine)

    async def _until_end(self, running: Awaitable[_T]) -> _T | None:
        # Raised inside the group, an error would come out wrapped.
        try:
            return await running
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Not this task was cancelled, but one that it has waited for. Taken for the end that
            # somebody has asked for, it would leave the socket to nobody.
            self._end(
                RuntimeError("what was waited for has been cancelled").with_traceback(
                    error.__traceback__
                )
            )
        except Exception as error:  # noqa: BLE001 - raised again by run()
            self._end(error)
        return None

    def _end(self, end: int | Exception) -> None:
        self._ended.append(self._ended_by(end) if isinstance(end, Exception) else end)
        if self._group is not None:
            self._group.cancel_scope.cancel()
