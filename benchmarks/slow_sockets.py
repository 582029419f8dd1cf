"""A thousand sockets, and two more whose clients hardly read: are the thousand any slower?

One of the two reads nothing, the other a byte a second. Both follow a channel besides whose backlog
is many times what may wait for them, so that they are behind while the others are measured.

Two servers with a thousand sockets each take turns, message by message, and one of them has the two
slow ones besides: what else the machine is doing hits both alike. In the next run it is the other.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass

import asyncpg

from benchmarks.arrivals import now
from benchmarks.connections import until_joined
from benchmarks.context import Benchmark, Context
from benchmarks.figures import Figure, figure, ratio
from benchmarks.payloads import PAYLOAD
from benchmarks.peers.protocol import Peer
from pgchannels import PostgresLayer

__all__ = ["BENCHMARK"]

BULK = "bulk:1"
BULK_MESSAGES, BULK_SIZE = 2000, 10_000
MEMORY_BOUND = 8.0
"""MiB that the server may grow by: what is configured for two streams, in pages that are read and
buffers, is less; the backlog of the two is five times that."""

SOCKETS = 1000
WARM_UP = 5
"""Messages. Whoever reads the bulk has done so when these have come."""

APART = 0.15
"""Seconds between two messages: no server is to be busy all the time."""

PATIENCE = 120.0

UNITS = {"p50": "ms", "p99": "ms", "cpu": "ms"}


async def measure(context: Context) -> list[Figure]:
    messages = context.pick(100, 20)
    runs: list[dict[str, float]] = []
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(context.server.database())
        layer = await stack.enter_async_context(PostgresLayer(url))
        nodes = []
        for number in range(2):
            group = f"room:{number}"
            server = await stack.enter_async_context(Peer("connection_server", url, group))
            clients = await stack.enter_async_context(Peer("connection_clients"))
            nodes.append(Node(server, clients, group, await server.ask("port")))
        for node in nodes:
            await node.connect()
        for run in range(context.runs):
            context.progress(f"run {run + 1} of {context.runs}")
            alone, beside = nodes if run % 2 == 0 else nodes[::-1]
            runs.append(await _measure(layer, url, alone, beside, messages))
    return _figures(runs)


def _figures(runs: list[dict[str, float]]) -> list[Figure]:
    figures: list[Figure] = []
    for key, unit in UNITS.items():
        what = "server's CPU, a message" if key == "cpu" else f"message to {SOCKETS} sockets, {key}"
        alone = figure(what, unit, runs, f"alone {key}")
        beside = figure(f"  … beside two slow ones, {key}", unit, runs, f"beside {key}")
        at_most = None if key == "p50" else 1.1
        name = f"beside slow ones / alone, {key}"
        figures += [alone, beside, ratio(name, beside, alone, at_most=at_most)]
    backlog = 2 * BULK_MESSAGES * BULK_SIZE / 1024 / 1024
    name = f"memory for two slow ones that have {backlog:.0f} MiB to come"
    figures.append(figure(name, "MiB", runs, "memory", at_most=MEMORY_BOUND))
    return figures


@dataclass
class Node:
    """A server, and the process of its clients."""

    server: Peer
    clients: Peer
    group: str
    port: int
    slow: int = 0

    async def connect(self) -> None:
        await self.clients.ask("connect", port=self.port, path="/function", clients=SOCKETS)
        await until_joined(self.server, "function", SOCKETS)

    async def connect_slow(self) -> None:
        for trickles in (False, True):
            await self.clients.ask("connect_slow", port=self.port, path="/slow", trickles=trickles)
        self.slow += 2
        await until_joined(self.server, "slow", self.slow)

    async def received(self, messages: int) -> None:
        deadline = now() + PATIENCE
        while await self.clients.ask("received") < messages * SOCKETS:
            if now() > deadline:
                raise RuntimeError("messages are missing")
            await asyncio.sleep(0.05)


async def _measure(
    layer: PostgresLayer, url: str, alone: Node, beside: Node, messages: int
) -> dict[str, float]:
    memory = await beside.server.ask("memory")
    await beside.connect_slow()
    await _write_bulk(url)
    await _send_in_turns(layer, (alone, beside), WARM_UP)
    found: dict[str, float] = {}
    for node in (alone, beside):
        await node.clients.ask("delays")
    cpu = {node.group: await node.server.ask("cpu") for node in (alone, beside)}
    await _send_in_turns(layer, (alone, beside), messages)
    for name, node in (("alone", alone), ("beside", beside)):
        used = await node.server.ask("cpu") - cpu[node.group]
        delays: dict[str, float] = await node.clients.ask("delays")
        found |= {f"{name} {key}": delay for key, delay in delays.items()}
        found[f"{name} cpu"] = 1000 * used / messages
    found["memory"] = (await beside.server.ask("memory") - memory) / 1024 / 1024
    await beside.clients.ask("close_slow")
    return found


async def _send_in_turns(layer: PostgresLayer, nodes: tuple[Node, ...], messages: int) -> None:
    for _ in range(messages):
        for node in nodes:
            await layer.send(node.group, {**PAYLOAD, "at": now()})
            await asyncio.sleep(APART)
    for node in nodes:
        await node.received(messages)


async def _write_bulk(url: str) -> None:
    connection = await asyncpg.connect(url)
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
