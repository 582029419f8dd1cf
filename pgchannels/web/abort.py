"""Dropping a TCP connection whose client takes nothing, not even that it is closed.

ASGI has no word for that. A server that closes a connection writes out first what it has been
given, however long that takes, and at its own end it waits for that: a client that does not read
could keep a process alive, or any number of connections that are counted nowhere.

So the transport is looked for behind the ``receive`` that the server gave, where uvicorn has it.
Where it is not to be found (another server, a middleware around ``receive``) this does nothing, and
it is the server's, the proxy's or TCP's to give up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pgchannels.web.liveness import MIN_PACE

if TYPE_CHECKING:
    from starlette.websockets import WebSocket

__all__ = ["Writing", "abort", "abort_later", "abort_unless_written", "is_lost", "unwritten"]


def abort(websocket: WebSocket) -> None:
    """Drop the connection at once, with what is still to be written to it."""
    transport = _transport(websocket)
    if transport is not None:
        transport.abort()


def abort_unless_written(websocket: WebSocket, every: float, within: float) -> None:
    """Drop it unless what it has been given is being written out: see :class:`Writing`."""
    transport = _transport(websocket)
    if transport is not None and transport.get_write_buffer_size():
        # Once it has been closed, this does nothing.
        Writing(websocket, every, within, transport.abort)


def abort_later(websocket: WebSocket, after: float) -> None:
    """Drop it after so many seconds, unless it has been closed by then."""
    transport = _transport(websocket)
    if transport is not None:
        asyncio.get_running_loop().call_later(after, transport.abort)


def unwritten(websocket: WebSocket) -> int:
    """Bytes that are still to be written to it; 0 where that is not known."""
    transport = _transport(websocket)
    return 0 if transport is None else int(transport.get_write_buffer_size())


class Writing:
    """Looks whether a client takes what is written to it, for as long as there is anything.

    Args:
        websocket: its socket.
        every: seconds between two looks.
        within: seconds for all of it, however quickly it is taken.
        give_up: called when the client is slower than :data:`MIN_PACE`, or takes nothing at all.
    """

    def __init__(
        self, websocket: WebSocket, every: float, within: float, give_up: Callable[[], object]
    ) -> None:
        self._websocket = websocket
        self._every = every
        self._give_up = give_up
        self._loop = asyncio.get_running_loop()
        self._until = self._loop.time() + within
        self._unwritten = unwritten(websocket)
        self._timer = self._loop.call_later(every, self._look)

    def stop(self) -> None:
        """Look no more."""
        self._timer.cancel()

    def _look(self) -> None:
        before, self._unwritten = self._unwritten, unwritten(self._websocket)
        is_taken = before - self._unwritten >= MIN_PACE * self._every
        if is_taken and self._loop.time() < self._until:
            self._timer = self._loop.call_later(self._every, self._look)
        else:
            self._give_up()


def is_lost(websocket: WebSocket) -> bool:
    """Whether the connection is known to be closed, though the application was not told so yet."""
    transport = _transport(websocket)
    return transport is not None and bool(transport.is_closing())


def _transport(websocket: WebSocket) -> Any:
    # Not by its class: uvloop's transports are none of asyncio's.
    receive = getattr(websocket, "_receive", None)
    transport = getattr(getattr(receive, "__self__", None), "transport", None)
    needed = ("abort", "get_write_buffer_size", "is_closing")
    return transport if all(callable(getattr(transport, name, None)) for name in needed) else None
