"""What publishing costs the transaction that does it: 32 writers at once, by pgbench.

Each transaction inserts one business row, and in the variants one thing more:

- *publish*: a row into the outbox, as :mod:`pgchannels.orm` does, beside a node that sequences.
  *Woken* stands for writers in that node's own process, which tell the sequencer of each commit, so
  that it is always at work; *polled* for writers elsewhere.
- *watched*: nothing more, but the table is watched, so that a trigger inserts into the outbox; its
  message is of about the same size. Polled.
- *notify*: the same payload by ``pg_notify``, and one session that listens.
- *lock and notify*: :mod:`benchmarks.locking_stream`, and one session that listens. All to *one
  stream*, or spread over *1000 streams*, so that hardly any two wait for the same row.

All are measured as the disk is, and with ``commit_delay`` at 2 ms, which makes each flush of the
WAL take as long as on many a disk in the network. It is set in the database, so it holds for the
sequencer too.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import asyncpg

from benchmarks import locking_stream
from benchmarks.context import Benchmark, Context
from benchmarks.figures import Figure, figure, ratio
from benchmarks.log import all_sealed, execute, sealed
from benchmarks.payloads import PAYLOAD_TEXT
from benchmarks.pgbench import pgbench
from pgchannels import PostgresLayer

__all__ = ["BENCHMARK"]

WRITERS = 32
SLOW_FLUSH = {"commit_delay": "2000", "commit_siblings": "0"}
WAKE_INTERVAL = 0.001
STREAMS = 1000

TABLE = """
create table {name} (
    id bigint generated always as identity primary key,
    customer integer not null,
    note text not null,
    created_at timestamptz not null default clock_timestamp()
);
"""

SCHEMA = (
    TABLE.format(name="orders")
    + TABLE.format(name="watched_orders")
    + "select pgchannels.watch('watched_orders', 'orders:{customer}');"
    + locking_stream.SCHEMA
)

BUSINESS = """\
\\set customer random(1, 100000)
begin;
insert into {table} (customer, note) values (:customer, 'paid by card, to be sent tomorrow');
{more}
commit;
"""


def business(more: str = "", *, table: str = "orders") -> str:
    """The script of a transaction that inserts a business row and does *more*."""
    return BUSINESS.format(table=table, more=more)


Beside = Callable[[str], AbstractAsyncContextManager[None]]


class Variant(NamedTuple):
    script: str
    beside: Beside
    """What runs meanwhile, on a database."""

    sequenced: bool = False
    """Each transaction has a message that is to come into the log."""

    at_least: float | None = None
    """Expected of the ratio to *plain* where a flush takes long."""


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


def _listener(channel: str) -> Beside:
    @asynccontextmanager
    async def listening(url: str) -> AsyncIterator[None]:
        connection = await asyncpg.connect(url)
        try:
            await connection.add_listener(channel, lambda *_: None)
            yield
        finally:
            await connection.close()

    return listening


PUBLISH = business(
    "insert into pgchannels.outbox (channel, payload, expires_at)"
    f" values ('orders', '{PAYLOAD_TEXT}', clock_timestamp() + null::interval);"
)

VARIANTS = {
    "plain": Variant(business(), _nothing),
    "publish, woken": Variant(PUBLISH, _woken_node, sequenced=True, at_least=0.85),
    "publish, polled": Variant(PUBLISH, _node, sequenced=True, at_least=0.85),
    "watched": Variant(business(table="watched_orders"), _node, sequenced=True),
    "notify": Variant(
        business(f"select pg_notify('orders', '{PAYLOAD_TEXT}');"), _listener("orders")
    ),
    "lock and notify, one stream": Variant(
        business(f"select publish_to_stream('orders', '{PAYLOAD_TEXT}');"),
        _listener(locking_stream.CHANNEL),
    ),
    f"lock and notify, {STREAMS} streams": Variant(
        business(
            f"select publish_to_stream('orders:' || :customer % {STREAMS}, '{PAYLOAD_TEXT}');"
        ),
        _listener(locking_stream.CHANNEL),
    ),
}


async def measure(context: Context) -> list[Figure]:
    seconds = context.pick(2.0, 1.0)
    async with (
        context.server.database() as fast,
        context.server.database(settings=SLOW_FLUSH) as slow,
    ):
        runs: dict[str, Callable[[], Awaitable[dict[str, float]]]] = {}
        for flush, url in (("disk", fast), ("2 ms flush", slow)):
            await execute(url, SCHEMA)
            for name, variant in VARIANTS.items():
                runs[f"{flush}: {name}"] = partial(
                    _measure, context.server.bin_path, url, variant, seconds
                )
        results = await context.interleave(runs)
    figures: list[Figure] = []
    for flush, slow_flush in (("disk", False), ("2 ms flush", True)):
        rates = {
            name: figure(f"{flush}: {name}", "transactions/s", results[f"{flush}: {name}"], "rate")
            for name in VARIANTS
        }
        figures += rates.values()
        figures += [
            ratio(
                f"{flush}: {name} / plain",
                rates[name],
                rates["plain"],
                at_least=variant.at_least if slow_flush else None,
            )
            for name, variant in VARIANTS.items()
            if name != "plain"
        ]
        figures += [
            ratio(f"{flush}: publish, woken / {name}", rates["publish, woken"], rates[name])
            for name in VARIANTS
            if "notify" in name
        ]
    return figures


async def _measure(bin_path: Path, url: str, variant: Variant, seconds: float) -> dict[str, float]:
    await execute(url, f"truncate orders, watched_orders, {locking_stream.TABLES}")
    async with variant.beside(url):
        before = await sealed(url)
        result = await pgbench(
            bin_path / "pgbench", url, variant.script, clients=WRITERS, seconds=seconds
        )
        if variant.sequenced:
            await all_sealed(url, before + result.transactions)
    return {"rate": result.per_second}


BENCHMARK = Benchmark("transactions", f"{WRITERS} writers, one business row each", measure)
