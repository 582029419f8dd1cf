"""The tasks of one socket, and callbacks of the event loop that start or end them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from pgchannels.web.tasks import SocketTasks


class NotFound(RuntimeError):
    """As sniffio's own."""


def current_async_library() -> str:
    # sniffio asks for the current task, and a callback has none.
    if asyncio.current_task() is None:
        raise NotFound
    return "asyncio"


@pytest.fixture(autouse=True)
def sniffio(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anyio as it is where sniffio is installed, also where it is not."""
    module = SimpleNamespace(
        current_async_library=current_async_library, AsyncLibraryNotFoundError=NotFound
    )
    monkeypatch.setattr("anyio._core._eventloop.sniffio", module, raising=False)


def soon(call: Callable[[], None]) -> None:
    asyncio.get_running_loop().call_soon(call)


def later(call: Callable[[], None]) -> None:
    asyncio.get_running_loop().call_later(0, call)


def from_a_thread(call: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()
    threading.Thread(target=loop.call_soon_threadsafe, args=(call,)).start()


def when_done(call: Callable[[], None]) -> None:
    future = asyncio.get_running_loop().create_future()
    future.add_done_callback(lambda _: call())
    future.set_result(None)


callbacks = pytest.mark.parametrize("callback", [soon, later, from_a_thread, when_done])


@callbacks
async def test_spawned_by_a_callback(callback: Callable[[Callable[[], None]], None]) -> None:
    tasks, ran = SocketTasks(), asyncio.Event()

    async def note() -> None:
        assert asyncio.current_task() is not None
        ran.set()

    async with asyncio.timeout(10), tasks.running():
        callback(lambda: tasks.spawn(note()))
        await ran.wait()
    assert tasks.code == 1000


@callbacks
async def test_an_error_of_what_a_callback_has_spawned_ends_all(
    callback: Callable[[Callable[[], None]], None],
) -> None:
    tasks = SocketTasks()

    async def fail() -> None:
        raise ValueError("bug")

    async def serve() -> None:
        async with asyncio.timeout(10), tasks.running():
            callback(lambda: tasks.spawn(fail()))
            await asyncio.Event().wait()

    with pytest.raises(ValueError, match="bug"):
        await serve()


@callbacks
async def test_ended_by_a_callback(callback: Callable[[Callable[[], None]], None]) -> None:
    tasks = SocketTasks()
    async with asyncio.timeout(10), tasks.running():
        callback(lambda: tasks.end(4000))
        await asyncio.Event().wait()
    assert tasks.code == 4000


async def test_what_is_spawned_at_the_very_end_does_not_run() -> None:
    """Nor does Python say that it was never awaited."""
    ran: list[bool] = []
    tasks = SocketTasks()

    async def note() -> None:
        ran.append(True)

    def both() -> None:
        tasks.end(4000)
        tasks.spawn(note())

    async with asyncio.timeout(10), tasks.running():
        soon(both)
        await asyncio.Event().wait()
    assert tasks.code == 4000
    with pytest.raises(RuntimeError, match="while their socket is served"):
        tasks.spawn(note())
    assert ran == []
