"""A hundred thousand members of ten thousand groups, and a message to a large one.

Beside the joining stands the least that it takes: the same rows into the same table, by inserts of
as many at a time as one batch of ours may hold.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeVar

import asyncpg

from benchmarks.arrivals import Arrivals, now
from benchmarks.context import Benchmark, Context
from benchmarks.figures import Figure, figure, ratio
from benchmarks.payloads import PAYLOAD
from pgchannels import PostgresLayer

__all__ = ["BENCHMARK"]

T = TypeVar("T")

PER_GROUP = 10
TASKS = 4000
"""Calls under way at a time: while half of them are being served, the others gather."""

BATCH = 2000
SIZES = (1000, 10_000)
ALONE = 10
"""Messages published one by one, each after the last has reached all."""


async def measure(context: Context) -> list[Figure]:
    count = context.pick(100_000, 10_000)
    variants: dict[str, Callable[[], Awaitable[dict[str, float]]]] = {
        "layer": partial(_join, context, count),
        "insert": partial(_insert, context, count),
    }
    for size in SIZES:
        variants[f"{size}"] = partial(_send, context, size)
    results = await context.interleave(variants)
    ours, bare = results["layer"], results["insert"]
    joining = f"{count} members of {count // PER_GROUP} groups"
    rate = figure(f"{joining}: group_add()", "members/s", ours, "join")
    least = figure(
        f"the same rows: insert … select unnest, {BATCH} each", "members/s", bare, "rate"
    )
    figures = [
        figure("new_channel()", "channels/s", ours, "make"),
        rate,
        least,
        ratio("group_add() / insert", rate, least),
        figure("  … transactions that it took", "transactions", ours, "transactions"),
        figure("group_discard()", "members/s", ours, "leave"),
    ]
    for size in SIZES:
        runs = results[f"{size}"]
        figures += [
            figure(f"group_send() to {size} members: rows", "rows", runs, "rows", at_most=1),
            figure("  … called → committed", "ms", runs, "committed"),
            figure("  … called → all have it", "ms", runs, "delivered"),
        ]
    return figures


async def _join(context: Context, count: int) -> dict[str, float]:
    async with context.server.database() as url, PostgresLayer(url) as layer:
        names: list[str] = []

        async def make(_: int) -> None:
            names.append(await layer.new_channel())

        making = await _each(range(count), make)
        members = [(_group(number, count), name) for number, name in enumerate(names)]
        joining = await _each(members, lambda member: layer.group_add(*member))
        connection = await asyncpg.connect(url)
        try:
            rows, transactions = await connection.fetchrow(
                "select count(*), count(distinct xmin::text) from pgchannels.memberships"
            )
        finally:
            await connection.close()
        if rows != count:
            raise RuntimeError(f"there are {rows} members instead of {count}")
        leaving = await _each(members, lambda member: layer.group_discard(*member))
    return {
        "make": count / making,
        "join": count / joining,
        "leave": count / leaving,
        "transactions": transactions,
    }


async def _each(items: Iterable[T], do: Callable[[T], Awaitable[None]]) -> float:
    """Do it for all, so many at a time; the seconds that it took."""
    left = iter(items)

    async def work() -> None:
        for item in left:
            await do(item)

    start = now()
    await asyncio.gather(*(work() for _ in range(TASKS)))
    return now() - start


def _group(number: int, count: int) -> str:
    return f"room:{number % (count // PER_GROUP)}"


async def _insert(context: Context, count: int) -> dict[str, float]:
    async with context.server.database() as url:
        connection = await asyncpg.connect(url)
        try:
            names = [f"channel.{number:032x}.{number:016x}" for number in range(count)]
            groups = [_group(number, count) for number in range(count)]
            start = now()
            for first in range(0, count, BATCH):
                await connection.execute(
                    "insert into pgchannels.memberships (group_name, channel, since)"
                    " select m.group_name, m.channel, 0"
                    " from unnest($1::text[], $2::text[]) m(group_name, channel)",
                    groups[first : first + BATCH],
                    names[first : first + BATCH],
                )
            return {"rate": count / (now() - start)}
        finally:
            await connection.close()


async def _send(context: Context, size: int) -> dict[str, float]:
    async with context.server.database() as url, PostgresLayer(url) as layer:
        arrivals = Arrivals()
        committed, delivered = [], []
        async with _members(layer, size, arrivals):
            for number in range(ALONE):
                start = now()
                await layer.group_send("room", PAYLOAD)
                committed.append(1000 * (now() - start))
                delivered.append(1000 * (await arrivals.reached((number + 1) * size) - start))
        page = await layer.history("room", limit=1000)
    return {
        "rows": len(page.messages) / ALONE,
        "committed": statistics.median(committed),
        "delivered": statistics.median(delivered),
    }


@asynccontextmanager
async def _members(layer: PostgresLayer, size: int, arrivals: Arrivals) -> AsyncIterator[None]:
    ready = Arrivals()

    async def read() -> None:
        name = await layer.new_channel()
        await layer.group_add("room", name)
        async with layer.subscribe(member=name) as messages:
            ready.add()
            async for _ in messages:
                arrivals.add()

    tasks = [asyncio.create_task(read()) for _ in range(size)]
    try:
        await ready.reached(size)
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


BENCHMARK = Benchmark("members", "Joining groups, and one message to a large one", measure)
