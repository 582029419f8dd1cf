"""Served applications, and clients of their sockets."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from websockets.asyncio.client import ClientConnection

from tests.support.eventually import eventually

# uvicorn says so of every handshake that is answered by a response of its own.
REFUSED = "ASGI callable returned without completing handshake."


@asynccontextmanager
async def serve(app: Any, **options: Any) -> AsyncIterator[str]:
    """Run uvicorn; the address that it listens on."""
    config = uvicorn.Config(app, port=0, log_level="warning", log_config=None, **options)
    server = uvicorn.Server(config)
    # Signals are the test runner's.
    task = asyncio.create_task(server._serve())
    try:
        await eventually(lambda: server.started or task.done())
        (listening,) = server.servers
        yield f"127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        await task


async def answer(socket: ClientConnection) -> Any:
    async with asyncio.timeout(10):
        return json.loads(await socket.recv())


async def ask(socket: ClientConnection, content: object) -> Any:
    await socket.send(json.dumps(content))
    return await answer(socket)


async def closed(socket: ClientConnection) -> int:
    """The code that the server closes with."""
    async with asyncio.timeout(10):
        await socket.wait_closed()
    assert socket.close_code is not None
    return socket.close_code
