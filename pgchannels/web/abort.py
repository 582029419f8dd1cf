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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.websockets import WebSocket

__all__ = ["abort", "abort_unless_written", "is_lost"]


def abort(websocket: WebSocket) -> None:
    """Drop the connection at once, with what is still to be written to it."""
    transport = _transport(websocket)
    if transport is not None:
        transport.abort()


def abort_unless_written(websocket: WebSocket, within: float) -> None:
    """Drop it after *within* seconds, if what it has been given is not written out by then."""
    transport = _transport(websocket)
    if transport is not None and transport.get_write_buffer_size():
        # Once it has been closed, this does nothing.
        asyncio.get_running_loop().call_later(within, transport.abort)


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
