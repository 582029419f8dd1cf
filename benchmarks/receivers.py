"""Ten thousand receivers that wait, and receivers that compete for a backlog.

Beside the latter stands the classic queue in PostgreSQL: a table, and as many workers, each with a
connection, that delete the first row that nobody else has locked.
"""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import asyncpg

from benchmarks.arrivals import Arrivals, now
from benchmarks.context import Benchmark, Context
from benchmarks.figures import Figure, figure, ratio
from benchmarks.payloads import PAYLOAD, PAYLOAD_TEXT
from pgchannels import PostgresLayer

__all__ = ["BENCHMARK"]

WAITING = 10_000
COMPETING = (1, 4, 32)
CHANNEL = "jobs"

Take = Callable[[int], Awaitable[object]]
"""Takes one message, for the receiver of that number."""


async def measure(context: Context) -> list[Figure]:
    seconds = context.pick(2.0, 0.5)
    # More than anyone takes in the time.
    backlog = context.pick(60_000, 20_000)
    variants: dict[str, Callable[[], Awaitable[dict[str, float]]]] = {
        "memory": partial(_measure_waiting, context, traced=True),
        "waiting": partial(_measure_waiting, context, traced=False),
    }
    for count in COMPETING:
        variants[f"layer {count}"] = partial(_measure_layer, context, count, backlog, seconds)
        variants[f"queue {count}"] = partial(_measure_queue, context, count, backlog, seconds)
    results = await context.interleave(variants)
    figures = [
        figure(f"{WAITING} receivers wait: memory of each", "bytes", results["memory"], "memory"),
        figure("  … began to wait → all are known", "ms", results["waiting"], "begin"),
        figure("  … one message each: sent → all received", "ms", results["waiting"], "end"),
        figure("  … received", "messages/s", results["waiting"], "rate"),
    ]
    for count in COMPETING:
        ours = figure(
            f"receive(), {count} at once", "messages/s", results[f"layer {count}"], "rate"
        )
        name = f"delete … for update skip locked, {count} workers"
        queue = figure(name, "messages/s", results[f"queue {count}"], "rate")
        figures += [ours, queue, ratio("  … receive() / delete", ours, queue)]
    return figures


async def _measure_waiting(context: Context, *, traced: bool) -> dict[str, float]:
    async with context.server.database() as url, PostgresLayer(url) as layer:
        received = Arrivals()

        async def wait(number: int) -> None:
            await layer.receive(f"{CHANNEL}:{number}")
            received.add()

        gc.collect()
        if traced:
            tracemalloc.start()
        start = now()
        tasks = [asyncio.create_task(wait(number)) for number in range(WAITING)]
        await _known(url, WAITING)
        begin = now() - start
        gc.collect()
        memory = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        start = now()
        await asyncio.gather(
            *(layer.send(f"{CHANNEL}:{number}", PAYLOAD) for number in range(WAITING))
        )
        end = await received.reached(WAITING) - start
        await asyncio.gather(*tasks)
    return {
        "memory": memory / WAITING,
        "begin": 1000 * begin,
        "end": 1000 * end,
        "rate": WAITING / end,
    }


async def _known(url: str, count: int) -> None:
    """Wait until so many channels have been looked at for the first time."""
    async with _connected(url) as connection:
        known = "select count(*) from pgchannels.channels"
        while await connection.fetchval(known) < count:  # noqa: ASYNC110 - it is the database that changes
            await asyncio.sleep(0.01)


async def _measure_layer(
    context: Context, count: int, backlog: int, seconds: float
) -> dict[str, float]:
    async with context.server.database() as url, PostgresLayer(url) as layer:
        async with _connected(url) as connection, layer.subscribe("end") as end:
            await connection.execute(
                "select pgchannels.publish($1, $2::json) from generate_series(1, $3)",
                CHANNEL,
                PAYLOAD_TEXT,
                backlog,
            )
            await layer.send("end", {})
            await anext(end)
        return await _take(lambda _: layer.receive(CHANNEL), count, backlog, seconds)


async def _measure_queue(
    context: Context, count: int, backlog: int, seconds: float
) -> dict[str, float]:
    async with (
        context.server.database() as url,
        asyncpg.create_pool(url, min_size=count, max_size=count) as pool,
    ):
        await pool.execute(
            "create table queue (id bigint generated always as identity primary key, payload json)"
        )
        await pool.execute(
            "insert into queue (payload) select $1::json from generate_series(1, $2)",
            PAYLOAD_TEXT,
            backlog,
        )
        await pool.execute("vacuum analyze queue")
        connections = [await pool.acquire() for _ in range(count)]
        taking = [
            await connection.prepare(
                "delete from queue where id = (select id from queue order by id"
                " for update skip locked limit 1) returning id, payload"
            )
            for connection in connections
        ]
        try:
            return await _take(lambda number: taking[number].fetchrow(), count, backlog, seconds)
        finally:
            for connection in connections:
                await pool.release(connection)


async def _take(take: Take, count: int, backlog: int, seconds: float) -> dict[str, float]:
    start = now()
    end = start + seconds
    taken = 0

    async def work(number: int) -> None:
        nonlocal taken
        while now() < end and taken < backlog - count:
            await take(number)
            taken += 1

    await asyncio.gather(*(work(number) for number in range(count)))
    return {"rate": taken / (now() - start)}


@asynccontextmanager
async def _connected(url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(url)
    try:
        yield connection
    finally:
        await connection.close()


BENCHMARK = Benchmark("receivers", "Waiting to receive, and competing", measure)
