"""A FastAPI application under uvicorn: the same socket as bare as can be, and by pgchannels.

Each follows one channel, but for the bare one, and waits for its client to go. The process measures
its own CPU time and memory.
"""

from __future__ import annotations

import asyncio
import gc
import socket
import sys
import time
from collections import Counter

import psutil
import uvicorn
from fastapi import FastAPI, WebSocket
from starlette.websockets import WebSocketDisconnect

from benchmarks.loop import run
from benchmarks.peers.protocol import serve
from pgchannels import PostgresLayer, Settings
from pgchannels.web import (
    Authentication,
    ConnectionManager,
    HeaderToken,
    Identity,
    JsonConsumer,
    Limits,
    RateLimit,
    TokenBucket,
    Validation,
    lifespan,
)

BULK = "bulk:1"
"""What only slow clients follow."""

SEND_BUFFER = 16 * 1024
"""Of the kernel, a socket: what is written to a client that does not read must not vanish there."""


async def verify(token: str) -> Identity:
    return Identity(token)


class Server:
    def __init__(self, layer: PostgresLayer, group: str) -> None:
        self._group = group
        self.app = FastAPI(lifespan=lifespan(layer))
        self.joined: Counter[str] = Counter()
        server = self

        class Consumer(JsonConsumer):
            async def connect(self) -> None:
                await self.accept()
                await self.join(group)
                server.joined["consumer"] += 1

        self.app.add_api_websocket_route("/consumer", Consumer.as_endpoint(layer))
        self.app.add_api_websocket_route("/bare", self._bare)
        self._add("function", ConnectionManager(layer))
        self._add("slow", ConnectionManager(layer, send_timeout=None), BULK)
        self._add(
            "guarded",
            ConnectionManager(
                layer,
                limits=Limits(per_user=10_000, per_node=10_000, total=10_000, groups=100),
                authentication=Authentication(verify, HeaderToken()),
                middleware=RateLimit(TokenBucket(10, 20)) >> Validation(),
            ),
        )

    def _add(self, name: str, connections: ConnectionManager, *channels: str) -> None:
        @self.app.websocket(f"/{name}")
        async def endpoint(websocket: WebSocket) -> None:
            async with connections.connect(websocket) as connection:
                for channel in (self._group, *channels):
                    await connection.join(channel)
                self.joined[name] += 1
                async for _ in connection:
                    pass

    async def _bare(self, websocket: WebSocket) -> None:
        await websocket.accept()
        self.joined["bare"] += 1
        try:
            while True:
                await websocket.receive_text()
        except WebSocketDisconnect:
            return

    def memory(self) -> int:
        gc.collect()
        return int(psutil.Process().memory_info().rss)


async def main() -> None:
    # Small buffers, so that a client that does not read is soon back at reading the log.
    layer = PostgresLayer(Settings(database_url=sys.argv[1], buffer_size=100, buffer_bytes=2**18))
    server = Server(layer, sys.argv[2])
    listening = socket.create_server(("127.0.0.1", 0), backlog=4096)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    uvicorn_server = uvicorn.Server(
        # Without pings: the clients never answer one.
        uvicorn.Config(server.app, log_level="warning", ws_ping_interval=None)
    )
    serving = asyncio.create_task(uvicorn_server.serve(sockets=[listening]))
    try:
        await serve(
            {
                "port": lambda: listening.getsockname()[1],
                "joined": lambda name: server.joined[name],
                "cpu": time.process_time,
                "memory": server.memory,
            }
        )
    finally:
        uvicorn_server.should_exit = True
        await serving


if __name__ == "__main__":
    run(main())
