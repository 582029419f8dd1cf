"""One message to a thousand subscriptions in a process, and a burst of them.

Beside it the least that a process must do to wake as many tasks: an ``asyncio.Queue`` each.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

from benchmarks.arrivals import Arrivals, now
from benchmarks.context import Benchmark, Context
from benchmarks.figures import Figure, figure, ratio
from benchmarks.payloads import PAYLOAD
from pgchannels import Message, PostgresLayer

__all__ = ["BENCHMARK"]

CHANNEL = "room:1"
SUBSCRIBERS = 1000
BURST = 100
"""Messages published at once."""

ALONE = 20
"""Messages published one by one, each after the last has reached all."""


async def measure(context: Context) -> list[Figure]:
    async with context.server.database() as url, PostgresLayer(url) as layer:
        variants: dict[str, Callable[[], Awaitable[dict[str, float]]]] = {
            "pgchannels": partial(_measure_layer, layer),
            "queues": _measure_queues,
        }
        for variant in variants.values():
            await variant()
        results = await context.interleave(variants)
    ours, queues = results["pgchannels"], results["queues"]
    burst = f"burst of {BURST} to {SUBSCRIBERS}"
    rate = figure(f"{burst} subscriptions", "deliveries/s", ours, "rate")
    bare = figure(f"{burst} asyncio.Queue", "deliveries/s", queues, "rate")
    return [
        figure("one message: send() called → all have it", "ms", ours, "alone"),
        figure("one message: first has it → last has it", "ms", ours, "spread"),
        rate,
        bare,
        ratio("subscriptions / queues", rate, bare),
    ]


async def _measure_layer(layer: PostgresLayer) -> dict[str, float]:
    arrivals = Arrivals(stamped=True)
    async with _subscribers(layer, arrivals):
        alone, spread = [], []
        for index in range(ALONE):
            start = now()
            await layer.send(CHANNEL, PAYLOAD)
            end = await arrivals.reached((index + 1) * SUBSCRIBERS)
            alone.append(1000 * (arrivals.times[-1] - start))
            spread.append(1000 * (end - arrivals.times[index * SUBSCRIBERS]))
        before = arrivals.count
        start = now()
        _, end = await asyncio.gather(
            asyncio.gather(*(layer.send(CHANNEL, PAYLOAD) for _ in range(BURST))),
            arrivals.reached(before + BURST * SUBSCRIBERS),
        )
    return {
        "alone": statistics.median(alone),
        "spread": statistics.median(spread),
        "rate": BURST * SUBSCRIBERS / (end - start),
    }


@asynccontextmanager
async def _subscribers(layer: PostgresLayer, arrivals: Arrivals) -> AsyncIterator[None]:
    ready = Arrivals()

    async def read() -> None:
        async with layer.subscribe(CHANNEL) as messages:
            ready.add()
            async for _ in messages:
                arrivals.add()

    tasks = [asyncio.create_task(read()) for _ in range(SUBSCRIBERS)]
    try:
        await ready.reached(SUBSCRIBERS)
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _measure_queues() -> dict[str, float]:
    arrivals = Arrivals(stamped=True)
    queues: list[asyncio.Queue[Message | None]] = [asyncio.Queue() for _ in range(SUBSCRIBERS)]

    async def read(queue: asyncio.Queue[Message | None]) -> None:
        while True:
            await queue.get()
            arrivals.add()

    tasks = [asyncio.create_task(read(queue)) for queue in queues]
    await asyncio.sleep(0)
    start = now()
    for _ in range(BURST):
        for queue in queues:
            queue.put_nowait(None)
        await asyncio.sleep(0)
    end = await arrivals.reached(BURST * SUBSCRIBERS)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return {"rate": BURST * SUBSCRIBERS / (end - start)}


BENCHMARK = Benchmark("fanout", f"One process, {SUBSCRIBERS} subscriptions of a channel", measure)
