"""A thousand sockets, and two more whose clients hardly read: are the thousand any slower?

One of the two reads nothing, the other a byte a second. Both follow a channel besides whose backlog
is many times what may wait for them, so that they are behind while the others are measured. That
channel is written to in either case.
"""

from __future__ import annotations

import asyncio
from functools import partial

import asyncpg

from benchmarks.arrivals import now
from benchmarks.connections import until_joined
from benchmarks.context import Benchmark, Context
from benchmarks.figures import Figure, figure, ratio
from benchmarks.payloads import PAYLOAD
from benchmarks.peers.protocol import Peer
from pgchannels import PostgresLayer

__all__ = ["BENCHMARK"]

GROUP = "room:1"
BULK = "bulk:1"
BULK_MESSAGES, BULK_SIZE = 2000, 10_000
MEMORY_BOUND = 8.0
"""MiB that the server may grow by: what is configured for two streams, in pages that are read and
buffers, is less; the backlog of the two is five times that."""

SOCKETS = 1000
APART = 0.25
"""Seconds between two messages: the server is not to be busy all the time."""

PATIENCE = 120.0


async def measure(context: Context) -> list[Figure]:
    async with (
        context.server.database() as url,
        PostgresLayer(url) as layer,
        Peer("connection_server", url) as server,
        Peer("connection_clients") as clients,
    ):
        port = await server.ask("port")
        await clients.ask("connect", port=port, path="/function", clients=SOCKETS)
        await until_joined(server, "function", SOCKETS)
        scene = Scene(layer, url, server, clients, port, context.pick(40, 10))
        await scene.measure(slow=True)
        results = await context.interleave(
            {
                "alone": partial(scene.measure, slow=False),
                "beside": partial(scene.measure, slow=True),
            }
        )
    figures = []
    for key in ("p50", "p99"):
        alone = figure(f"message to {SOCKETS} sockets, {key}", "ms", results["alone"], key)
        beside = figure(f"  … beside two slow ones, {key}", "ms", results["beside"], key)
        at_most = 1.1 if key == "p99" else None
        figures += [
            alone,
            beside,
            ratio(f"beside slow ones / alone, {key}", beside, alone, at_most=at_most),
        ]
    backlog = 2 * BULK_MESSAGES * BULK_SIZE / 1024 / 1024
    name = f"memory for two slow ones that have {backlog:.0f} MiB to come"
    figures.append(figure(name, "MiB", results["beside"], "memory", at_most=MEMORY_BOUND))
    return figures


class Scene:
    def __init__(
        self,
        layer: PostgresLayer,
        url: str,
        server: Peer,
        clients: Peer,
        port: int,
        messages: int,
    ) -> None:
        self._layer = layer
        self._url = url
        self._server = server
        self._clients = clients
        self._port = port
        self._messages = messages
        self._slow = 0

    async def measure(self, *, slow: bool) -> dict[str, float]:
        memory = await self._server.ask("memory")
        if slow:
            for trickles in (False, True):
                await self._clients.ask(
                    "connect_slow", port=self._port, path="/slow", trickles=trickles
                )
            self._slow += 2
            await until_joined(self._server, "slow", self._slow)
        await self._write_bulk()
        await self._send_all(5)  # whoever reads the bulk has done so when these have come
        await self._clients.ask("delays")
        await self._send_all(self._messages)
        delays: dict[str, float] = await self._clients.ask("delays")
        grown = await self._server.ask("memory") - memory
        await self._clients.ask("close_slow")
        return {**delays, "memory": grown / 1024 / 1024}

    async def _send_all(self, messages: int) -> None:
        before = await self._clients.ask("received")
        for _ in range(messages):
            await self._layer.send(GROUP, {**PAYLOAD, "at": now()})
            await asyncio.sleep(APART)
        deadline = now() + PATIENCE
        while await self._clients.ask("received") < before + messages * SOCKETS:
            if now() > deadline:
                raise RuntimeError("messages are missing")
            await asyncio.sleep(0.05)

    async def _write_bulk(self) -> None:
        connection = await asyncpg.connect(self._url)
        try:
            for _ in range(BULK_MESSAGES // 100):
                await connection.execute(
                    "insert into pgchannels.outbox (channel, payload)"
                    " select $1, json_build_object('text', $2::text) from generate_series(1, 100)",
                    BULK,
                    "x" * BULK_SIZE,
                )
        finally:
            await connection.close()


BENCHMARK = Benchmark("slow-sockets", f"{SOCKETS} WebSockets beside two slow ones", measure)
