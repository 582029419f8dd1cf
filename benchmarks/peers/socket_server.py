"""A FastAPI application under uvicorn: sockets served by pgchannels, and sockets served by a loop.

It measures itself. CPU time is the process's own, so neither the clients' work nor PostgreSQL's is
in it, nor what other programs take from the machine.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from datetime import UTC, datetime

import uvicorn
from fastapi import FastAPI, WebSocket
from starlette.websockets import WebSocketDisconnect

from benchmarks.loop import run
from benchmarks.payloads import PAYLOAD_TEXT
from benchmarks.peers.protocol import serve
from pgchannels import Message, PostgresLayer
from pgchannels.web import JsonConsumer, lifespan

GROUP = "room:1"


class Server:
    def __init__(self, layer: PostgresLayer) -> None:
        self._layer = layer
        self._bare: list[WebSocket] = []
        self._joined = 0

        class Consumer(JsonConsumer):
            async def connect(_self) -> None:  # noqa: N805 - `self` is the server
                await _self.accept()
                await _self.join(GROUP)
                self._joined += 1

        self.app = FastAPI(lifespan=lifespan(layer))
        self.app.add_api_websocket_route("/consumer", Consumer.as_endpoint(layer))
        self.app.add_api_websocket_route("/bare", self._bare_endpoint)

    async def _bare_endpoint(self, websocket: WebSocket) -> None:
        await websocket.accept()
        self._bare.append(websocket)
        try:
            await websocket.receive_text()
        except WebSocketDisconnect:
            self._bare.remove(websocket)

    def connected(self) -> list[int]:
        return [len(self._bare), self._joined]

    def cpu(self) -> float:
        return time.process_time()

    async def head(self) -> str:
        return str((await self._layer.history(GROUP, limit=1)).position)

    async def published(self, after: str, count: int) -> int:
        """Wait until *count* messages have come after a position; the bytes of their envelopes."""
        size = 0
        async with self._layer.subscribe(GROUP, after=after) as messages:
            async for message in messages:
                size += len(message.envelope)
                count -= 1
                if not count:
                    break
        return size

    async def loop(self, messages: int, *, apart: float) -> int:
        """Send as many messages of the same form to each bare socket; the bytes of one copy.

        They come *apart* seconds from each other. Without a pause uvloop gathers what is written to
        a socket and sends it at once, and clients that are awake need not be woken: both make a
        loop cheaper than messages that come one by one can be.
        """
        texts = [
            Message(
                10_000 + n, GROUP, PAYLOAD_TEXT, datetime.now(UTC), len(PAYLOAD_TEXT), 1
            ).envelope
            for n in range(messages)
        ]
        for text in texts:
            for websocket in self._bare:
                await websocket.send_text(text)
            if apart:
                await asyncio.sleep(apart)
        await asyncio.sleep(0)
        return sum(map(len, texts))


async def main() -> None:
    layer = PostgresLayer(sys.argv[1])
    server = Server(layer)
    listening = socket.create_server(("127.0.0.1", 0), backlog=2048)
    uvicorn_server = uvicorn.Server(
        # Without pings: the clients never answer one.
        uvicorn.Config(server.app, log_level="warning", ws_ping_interval=None)
    )
    serving = asyncio.create_task(uvicorn_server.serve(sockets=[listening]))
    try:
        await serve(
            {
                "port": lambda: listening.getsockname()[1],
                "connected": server.connected,
                "cpu": server.cpu,
                "head": server.head,
                "published": server.published,
                "loop": server.loop,
            }
        )
    finally:
        uvicorn_server.should_exit = True
        await serving


if __name__ == "__main__":
    run(main())
