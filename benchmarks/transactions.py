"""What publishing costs the transaction that does it: 32 writers at once, by pgbench.

Each transaction inserts one business row, and in the variants one thing more:

- *publish*: a row into the outbox, as :mod:`pgchannels.orm` does, beside a node that sequences.
  *Woken* stands for writers in that node's own process, which tell the sequencer of each commit, so
  that it is always at work; *polled* for writers elsewhere.
- *notify*: the same payload by ``pg_notify``, and one session that listens.

All are measured as the disk is, and with ``commit_delay`` at 2 ms, which makes each flush of the
WAL take as long as on many a disk in the network. It is set in the database, so it holds for the
sequencer too.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from functools import partial
from typing import Any

import asyncpg

from benchmarks.arrivals import now
from benchmarks.context import Benchmark, Context
from benchmarks.figures import Figure, figure, ratio
from benchmarks.payloads import PAYLOAD_TEXT
from benchmarks.pgbench import pgbench
from pgchannels import PostgresLayer

__all__ = ["BENCHMARK"]

WRITERS = 32
SLOW_FLUSH = {"commit_delay": "2000", "commit_siblings": "0"}
WAKE_INTERVAL = 0.001
PATIENCE = 60.0

TABLE = """
create table orders (
    id bigint generated always as identity primary key,
    customer integer not null,
    note text not null,
    created_at timestamptz not null default clock_timestamp()
)
"""

BUSINESS = """\
\\set customer random(1, 100000)
begin;
insert into orders (customer, note) values (:customer, 'paid by card, to be sent tomorrow');
{more}
commit;
"""

SCRIPTS = {
    "plain": BUSINESS.format(more=""),
    "publish": BUSINESS.format(
        more="insert into pgchannels.outbox (channel, payload, expires_at)"
        f" values ('orders', '{PAYLOAD_TEXT}', clock_timestamp() + null::interval);"
    ),
    "notify": BUSINESS.format(more=f"select pg_notify('orders', '{PAYLOAD_TEXT}');"),
}

Beside = Callable[[str], AbstractAsyncContextManager[None]]


async def measure(context: Context) -> list[Figure]:
    seconds = context.pick(2.0, 1.0)
    async with (
        context.server.database() as fast,
        context.server.database(settings=SLOW_FLUSH) as slow,
    ):
        variants: dict[str, Callable[[], Awaitable[dict[str, float]]]] = {}
        for flush, url in (("disk", fast), ("2 ms flush", slow)):
            await _execute(url, TABLE)
            for name, script, beside in (
                ("plain", "plain", _nothing),
                ("publish, woken", "publish", _woken_node),
                ("publish, polled", "publish", _node),
                ("notify", "notify", _listener),
            ):
                variants[f"{flush}: {name}"] = partial(
                    _measure, context.server.bin_path, url, SCRIPTS[script], beside, seconds
                )
        results = await context.interleave(variants)
    figures: list[Figure] = []
    for flush, expected in (("disk", None), ("2 ms flush", 0.85)):
        rates = {
            name: figure(f"{flush}: {name}", "transactions/s", results[f"{flush}: {name}"], "rate")
            for name in ("plain", "publish, woken", "publish, polled", "notify")
        }
        figures += rates.values()
        plain = rates["plain"]
        figures += [
            ratio(f"{flush}: {name} / plain", rates[name], plain, at_least=at_least)
            for name, at_least in (
                ("publish, woken", expected),
                ("publish, polled", expected),
                ("notify", None),
            )
        ]
    return figures


async def _measure(
    bin_path: Any, url: str, script: str, beside: Beside, seconds: float
) -> dict[str, float]:
    await _execute(url, "truncate orders")
    async with beside(url):
        before = await _sealed(url)
        result = await pgbench(bin_path / "pgbench", url, script, clients=WRITERS, seconds=seconds)
        if script is SCRIPTS["publish"]:
            await _all_sealed(url, before + result.transactions)
    return {"rate": result.per_second}


def _nothing(_: str) -> AbstractAsyncContextManager[None]:
    return nullcontext()


@asynccontextmanager
async def _node(url: str) -> AsyncIterator[None]:
    async with PostgresLayer(url):
        yield


@asynccontextmanager
async def _woken_node(url: str) -> AsyncIterator[None]:
    async def wake(layer: PostgresLayer) -> None:
        while True:
            layer.wake()
            await asyncio.sleep(WAKE_INTERVAL)

    async with PostgresLayer(url) as layer:
        waking = asyncio.create_task(wake(layer))
        try:
            yield
        finally:
            waking.cancel()
            await asyncio.gather(waking, return_exceptions=True)


@asynccontextmanager
async def _listener(url: str) -> AsyncIterator[None]:
    connection = await asyncpg.connect(url)
    try:
        await connection.add_listener("orders", lambda *_: None)
        yield
    finally:
        await connection.close()


async def _all_sealed(url: str, expected: int) -> None:
    deadline = now() + PATIENCE
    while (sealed := await _sealed(url)) != expected:
        if sealed > expected or now() > deadline:
            raise RuntimeError(f"{sealed} messages are in the log instead of {expected}")
        await asyncio.sleep(0.02)


async def _sealed(url: str) -> int:
    connection = await asyncpg.connect(url)
    try:
        count: int = await connection.fetchval(
            "select coalesce(max(last_id), 0) from pgchannels.batches"
        )
    finally:
        await connection.close()
    return count


async def _execute(url: str, statement: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


BENCHMARK = Benchmark("transactions", f"{WRITERS} writers, one business row each", measure)
