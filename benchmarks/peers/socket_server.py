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

from benchmarks.arrivals import Arrivals, now
from benchmarks.loop import run
from benchmarks.payloads import PAYLOAD_TEXT
from benchmarks.peers.protocol import serve
from pgchannels import Message, PostgresLayer
from pgchannels.web import JsonConsumer, lifespan

GROUP = "room:1"


class Sends:
    """What has been sent by the consumers, counted by `Counting`."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.arrivals = Arrivals()
        self.bytes = 0
        self.first = 0.0

    def add(self, size: int) -> None:
        if not self.bytes:
            self.first = now()
        self.bytes += size
        self.arrivals.add()


class Server:
    def __init__(self, layer: PostgresLayer) -> None:
        self._sends = sends = Sends()
        self._bare: list[WebSocket] = []
        self._joined = 0

        class Counting(JsonConsumer):
            async def connect(_self) -> None:  # noqa: N805 - `self` is the server
                await _self.accept()
                await _self.join(GROUP)
                self._joined += 1

            async def forward(_self, message: Message) -> None:  # noqa: N805
                # What JsonConsumer's own method does, and the counting.
                text = message.envelope
                await _self.websocket.send_text(text)
                sends.add(len(text))

        self.app = FastAPI(lifespan=lifespan(layer))
        self.app.add_api_websocket_route("/consumer", Counting.as_endpoint(layer))
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

    def expect(self) -> None:
        """Messages are about to be published."""
        self._sends.reset()

    async def forwarded(self, count: int) -> dict[str, float]:
        """Wait until the consumers have sent *count*; what it took, from the first to the last."""
        sends = self._sends
        end = await sends.arrivals.reached(count)
        return {"seconds": end - sends.first, "bytes": sends.bytes}

    async def loop(self, messages: int, *, yielding: bool) -> dict[str, float]:
        """Send as many messages of the same form to each bare socket.

        *yielding* lets the event loop write out each message before the next, as when they come one
        by one. Without it uvloop gathers what is written to a socket and sends it at once.
        """
        texts = [
            Message(
                10_000 + n, GROUP, PAYLOAD_TEXT, datetime.now(UTC), len(PAYLOAD_TEXT), 1
            ).envelope
            for n in range(messages)
        ]
        start = now()
        for text in texts:
            for websocket in self._bare:
                await websocket.send_text(text)
            if yielding:
                await asyncio.sleep(0)
        await asyncio.sleep(0)
        seconds = now() - start
        return {"seconds": seconds, "bytes": sum(map(len, texts)) * len(self._bare)}


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
                "expect": server.expect,
                "forwarded": server.forwarded,
                "loop": server.loop,
            }
        )
    finally:
        uvicorn_server.should_exit = True
        await serving


if __name__ == "__main__":
    run(main())
