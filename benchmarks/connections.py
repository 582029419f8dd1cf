"""What a connection costs: to open it, and to have it; beside a bare endpoint of Starlette's.

A server of its own for each run, so that what it has grown by is the connections'. CPU time is the
server's, and does not depend on what else the machine is doing; the rate does.
"""

from __future__ import annotations

import asyncio
from functools import partial

from benchmarks.arrivals import now
from benchmarks.context import Benchmark, Context
from benchmarks.figures import Figure, figure, ratio
from benchmarks.peers.protocol import Peer

__all__ = ["BENCHMARK", "until_joined"]

PATIENCE = 120.0
WARM_UP = 100

NAMES = {
    "bare": "Starlette endpoint",
    "consumer": "JsonConsumer.as_endpoint(layer)",
    "function": "connections.connect()",
    "guarded": "connect(), token, limits, middleware",
}
MEASURES = {
    "cpu": ("server's CPU, a connection", "ms"),
    "rate": ("connections opened, one server", "1/s"),
    "memory": ("memory, an idle connection", "KiB"),
}


async def measure(context: Context) -> list[Figure]:
    count = context.pick(2000, 500)
    results = await context.interleave(
        {name: partial(_measure, context, name, count) for name in NAMES}
    )
    figures: list[Figure] = []
    for key, (what, unit) in MEASURES.items():
        found = {name: figure(f"{what}: {NAMES[name]}", unit, results[name], key) for name in NAMES}
        figures += found.values()
        figures += [
            ratio(f"{key}: {NAMES[name]} / bare", found[name], found["bare"])
            for name in NAMES
            if name != "bare"
        ]
    return figures


async def _measure(context: Context, name: str, count: int) -> dict[str, float]:
    async with (
        context.server.database() as url,
        Peer("connection_server", url, "room:1") as server,
        Peer("connection_clients") as clients,
    ):
        port = await server.ask("port")
        path = f"/{name}"
        await clients.ask("connect", port=port, path=path, clients=WARM_UP)
        await until_joined(server, name, WARM_UP)
        memory, cpu, start = await server.ask("memory"), await server.ask("cpu"), now()
        await clients.ask("connect", port=port, path=path, clients=count)
        await until_joined(server, name, WARM_UP + count)
        took, used = now() - start, await server.ask("cpu") - cpu
        grown = await server.ask("memory") - memory
    return {
        "cpu": 1000 * used / count,
        "rate": count / took,
        "memory": grown / 1024 / count,
    }


async def until_joined(server: Peer, name: str, count: int) -> None:
    """Wait until so many sockets have got as far as they are to come."""
    deadline = now() + PATIENCE
    while await server.ask("joined", name=name) < count:
        if now() > deadline:
            raise RuntimeError("the clients have not connected")
        await asyncio.sleep(0.01)


BENCHMARK = Benchmark("connections", "What a connection costs", measure)
