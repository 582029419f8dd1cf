"""What it costs that objects publish themselves: ``@publishes``, or a watched table.

The same rows, from one ``AsyncSession`` after the other, one at a time and beside a layer that
sequences in the same process, as an application has it:

- *plain*: a model that publishes nothing.
- *@publishes*: the same with that decorator. It does not see what Core writes, so it is not there.
- *watched*: a plain model, its table watched by ``pgchannels.watch()``: a trigger, called once for
  each statement that reaches the server.

How many statements there are is up to SQLAlchemy and the driver. The unit of work inserts 1000
objects by one, since it asks for their keys. So does ``bulk_save_objects()`` where a message needs
the key; it does not for a plain model, and Core does not for a list of rows unless told to by
``returning()``: these are one statement a row, in one go (``executemany``).

Time counts from making the objects until the commit has returned, and not until the last message
has come into the log.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeAlias

from sqlalchemy import Table, insert
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from benchmarks.arrivals import now
from benchmarks.context import Benchmark, Context
from benchmarks.figures import Figure, figure, ratio
from benchmarks.log import all_sealed, execute, sealed
from benchmarks.sessions import Order, PublishingOrder, WatchedOrder, publishing_sessions
from pgchannels import PostgresLayer

__all__ = ["BENCHMARK"]

BULK = 1000
CUSTOMERS = 1000
NOTE = "paid by card, to be sent tomorrow"

Model: TypeAlias = type[Order] | type[PublishingOrder] | type[WatchedOrder]

PLAIN = "plain"
MODELS: dict[str, Model] = {PLAIN: Order, "@publishes": PublishingOrder, "watched": WatchedOrder}

Write = Callable[[AsyncSession, Model, int], Awaitable[None]]
"""Writes some rows, without the commit."""


async def measure(context: Context) -> list[Figure]:
    singles, bulks = context.pick(500, 100), context.pick(10, 3)
    ways: dict[str, tuple[Write, int, int]] = {
        "session.add(), 1 a commit": (_add, 1, singles),
        f"session.add(), {BULK} a commit": (_add, BULK, bulks),
        f"bulk_save_objects(), {BULK} a commit": (_bulk_save, BULK, bulks),
        f"Core insert(), {BULK} a commit": (_insert, BULK, bulks),
        f"Core insert().returning(), {BULK} a commit": (_insert_returning, BULK, bulks),
    }
    async with (
        context.server.database() as url,
        PostgresLayer(url) as layer,
        publishing_sessions(url, layer, pool_size=1) as sessions,
    ):
        variants = {
            f"{way}: {name}": partial(_measure, url, sessions, write, model, size, commits)
            for way, (write, size, commits) in ways.items()
            for name, model in MODELS.items()
            if model is not PublishingOrder or write in (_add, _bulk_save)
        }
        for variant in variants.values():
            await variant()
        results = await context.interleave(variants)
    figures: list[Figure] = []
    for way in ways:
        rates = {
            name: figure(f"{way}: {name}", "rows/s", results[f"{way}: {name}"], "rate")
            for name in MODELS
            if f"{way}: {name}" in results
        }
        figures += rates.values()
        figures += [
            ratio(f"  … {name} / {PLAIN}", rate, rates[PLAIN])
            for name, rate in rates.items()
            if name != PLAIN
        ]
    return figures


async def _measure(
    url: str,
    sessions: async_sessionmaker[AsyncSession],
    write: Write,
    model: Model,
    size: int,
    commits: int,
) -> dict[str, float]:
    await execute(url, f"truncate {model.__tablename__}")
    before = await sealed(url)
    start = now()
    for _ in range(commits):
        async with sessions() as session:
            await write(session, model, size)
            await session.commit()
    seconds = now() - start
    rows = commits * size
    await all_sealed(url, before + (0 if model is Order else rows))
    return {"rate": rows / seconds}


async def _add(session: AsyncSession, model: Model, count: int) -> None:
    session.add_all([model(**values) for values in _values(count)])


async def _bulk_save(session: AsyncSession, model: Model, count: int) -> None:
    objects = [model(**values) for values in _values(count)]
    await session.run_sync(lambda sync_session: sync_session.bulk_save_objects(objects))


async def _insert(session: AsyncSession, model: Model, count: int) -> None:
    await session.execute(insert(_table(model)), _values(count))


async def _insert_returning(session: AsyncSession, model: Model, count: int) -> None:
    table = _table(model)
    await session.execute(insert(table).returning(table.c.id), _values(count))


def _table(model: Model) -> Table:
    return model.metadata.tables[model.__tablename__]


def _values(count: int) -> list[dict[str, object]]:
    return [{"customer": 1 + n % CUSTOMERS, "note": NOTE} for n in range(count)]


BENCHMARK = Benchmark("models", "SQLAlchemy models that publish themselves", measure)
