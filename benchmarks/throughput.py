"""Messages a second from publishers in one process to the last of them at a subscriber.

A run publishes for a fixed time and then waits for the subscriber, which reads with ``async for``;
the rate counts from the first call to the last arrival. The publishers' own rate stands beside it:
where it is the higher one, the subscriber lagged behind.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from benchmarks.arrivals import Reader, now
from benchmarks.context import Benchmark, Context
from benchmarks.figures import Figure, figure, ratio
from benchmarks.payloads import PAYLOAD
from benchmarks.peers.protocol import Peer
from benchmarks.sessions import publishing_sessions
from pgchannels import PostgresLayer
from pgchannels.orm import publish

__all__ = ["BENCHMARK"]

CHANNEL = "orders"
SENDERS = 2000
SESSIONS = 8
BULK = 100

Publish = Callable[[], Awaitable[int]]
"""Publishes a little; returns how many messages."""


async def measure(context: Context) -> list[Figure]:
    seconds = context.pick(1.5, 0.5)
    async with (
        context.server.database() as url,
        PostgresLayer(url) as layer,
        publishing_sessions(url, layer, pool_size=SESSIONS) as sessions,
        Peer("subscriber", url) as peer,
    ):
        ways: dict[str, tuple[int, Publish]] = {
            f"layer.send(), {SENDERS} tasks": (SENDERS, partial(_send, layer)),
            f"publish(), {BULK} a transaction, {SESSIONS} sessions": (
                SESSIONS,
                partial(_commit, sessions, BULK),
            ),
            f"publish(), 1 a transaction, {SESSIONS} sessions": (
                SESSIONS,
                partial(_commit, sessions, 1),
            ),
        }
        variants: dict[str, Callable[[], Awaitable[dict[str, float]]]] = {}
        for name, (tasks, publish_some) in ways.items():
            variants[f"{name} → same process"] = partial(
                _to_this_process, layer, tasks, publish_some, seconds
            )
            variants[f"{name} → another process"] = partial(
                _to_another_process, peer, tasks, publish_some, seconds
            )
        for variant in variants.values():
            await variant()
        results = await context.interleave(variants)
    figures = []
    for name, runs in results.items():
        expected = 50_000 if name.startswith("layer.send()") else None
        received = figure(name, "messages/s", runs, "received", at_least=expected)
        published = figure("  … published meanwhile", "messages/s", runs, "published")
        figures += [received, published, ratio("  … received / published", received, published)]
    return figures


async def _to_this_process(
    layer: PostgresLayer, tasks: int, publish_some: Publish, seconds: float
) -> dict[str, float]:
    async with Reader(layer, CHANNEL) as reader:
        return await _measure(reader.arrivals.reached, tasks, publish_some, seconds)


async def _to_another_process(
    peer: Peer, tasks: int, publish_some: Publish, seconds: float
) -> dict[str, float]:
    await peer.ask("subscribe", channel=CHANNEL, stamped=False)

    async def reached(count: int) -> float:
        return float(await peer.ask("reached", count=count))

    return await _measure(reached, tasks, publish_some, seconds)


async def _measure(
    reached: Callable[[int], Awaitable[float]], tasks: int, publish_some: Publish, seconds: float
) -> dict[str, float]:
    start = now()
    end = start + seconds

    async def publish_until_end() -> int:
        count = 0
        while now() < end:
            count += await publish_some()
        return count

    published = sum(await asyncio.gather(*(publish_until_end() for _ in range(tasks))))
    publishing = now() - start
    receiving = await reached(published) - start
    return {"published": published / publishing, "received": published / receiving}


async def _send(layer: PostgresLayer) -> int:
    await layer.send(CHANNEL, PAYLOAD)
    return 1


async def _commit(sessions: async_sessionmaker[AsyncSession], messages: int) -> int:
    async with sessions() as session:
        for _ in range(messages):
            publish(session, CHANNEL, PAYLOAD)
        await session.commit()
    return messages


BENCHMARK = Benchmark("throughput", "End to end, 200-byte payloads", measure)
