"""From the commit in one process to the message in another, with little else going on.

Two clocks start for each message: *called* when COMMIT (or ``send()``) is about to be called, and
*returned* when it has returned; the flush of the session lies before both. Messages are sent one at
a time at a steady pace, far from what the server can take, so what is measured is the way and not a
queue. Beside them the least that PostgreSQL itself needs: ``pg_notify`` with the whole payload in a
transaction with a row, and a bare LISTEN.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, NamedTuple

import asyncpg
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from benchmarks.arrivals import now
from benchmarks.context import Benchmark, Context
from benchmarks.figures import Figure, figure, percentile, ratio
from benchmarks.payloads import PAYLOAD, PAYLOAD_TEXT
from benchmarks.peers.protocol import Peer
from benchmarks.sessions import Order, publishing_sessions
from pgchannels import PostgresLayer
from pgchannels.orm import publish

__all__ = ["BENCHMARK"]

RATE = 200
"""Messages a second."""

CHANNEL = "orders"


class Sent(NamedTuple):
    called: float
    returned: float


async def measure(context: Context) -> list[Figure]:
    count = int(RATE * context.pick(3.0, 1.0))
    async with (
        context.server.database() as url,
        PostgresLayer(url) as layer,
        publishing_sessions(url, layer, pool_size=1) as sessions,
        Peer("subscriber", url) as peer,
    ):
        connection = await asyncpg.connect(url)
        ways: dict[str, tuple[str, Callable[[], Awaitable[Sent]]]] = {
            "publish": ("subscribe", partial(_commit_session, sessions)),
            "send": ("subscribe", partial(_send, layer)),
            "notify": ("listen", partial(_commit_notify, connection)),
        }
        try:
            for begin, send in ways.values():
                await _measure(peer, begin, send, RATE // 4)
            results = await context.interleave(
                {
                    name: partial(_measure, peer, begin, send, count)
                    for name, (begin, send) in ways.items()
                }
            )
        finally:
            await connection.close()
    figures = []
    for way, name in (
        ("publish", "publish(), commit()"),
        ("send", "layer.send()"),
        ("notify", "pg_notify(), commit(), bare LISTEN"),
    ):
        for clock in ("returned", "called"):
            figures += [
                figure(f"{name} {clock} → received, {p}", "ms", results[way], f"{clock} {p}")
                for p in ("p50", "p99")
            ]
    called = [
        figure(way, "ms", results[way], "called p50") for way in ("publish", "send", "notify")
    ]
    figures.append(ratio("publish() / bare NOTIFY, called → received, p50", called[0], called[2]))
    figures.append(ratio("send() / bare NOTIFY, called → received, p50", called[1], called[2]))
    return figures


async def _measure(
    peer: Peer, begin: str, send: Callable[[], Awaitable[Sent]], count: int
) -> dict[str, float]:
    if begin == "subscribe":
        await peer.ask("subscribe", channel=CHANNEL, stamped=True)
    else:
        await peer.ask("listen", channel=CHANNEL)
    sent = []
    start = now()
    for index in range(count):
        await asyncio.sleep(max(0.0, start + index / RATE - now()))
        sent.append(await send())
    # One sender and one order: the arrival of the same rank is the same message.
    arrived = await peer.ask("times", count=count)
    result = {}
    for clock in ("called", "returned"):
        delays = [
            1000 * (arrival - getattr(message, clock))
            for message, arrival in zip(sent, arrived, strict=True)
        ]
        result[f"{clock} p50"] = percentile(delays, 50)
        result[f"{clock} p99"] = percentile(delays, 99)
    return result


async def _commit_session(sessions: async_sessionmaker[AsyncSession]) -> Sent:
    async with sessions() as session:
        session.add(Order(customer=7, note="paid"))
        publish(session, CHANNEL, PAYLOAD)
        await session.flush()
        called = now()
        await session.commit()
        return Sent(called, now())


async def _send(layer: PostgresLayer) -> Sent:
    called = now()
    await layer.send(CHANNEL, PAYLOAD)
    return Sent(called, now())


async def _commit_notify(connection: Any) -> Sent:
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute("insert into orders (customer, note) values ($1, $2)", 7, "paid")
    await connection.execute("select pg_notify($1, $2)", CHANNEL, PAYLOAD_TEXT)
    called = now()
    await transaction.commit()
    return Sent(called, now())


BENCHMARK = Benchmark("latency", f"Commit to another process, {RATE} messages/s", measure)
