"""Sealing beside a transaction that stays open and keeps vacuum from the outbox's dead rows.

Each batch leaves its rows behind, dead but not to be removed. If a batch had to walk over them, the
last ones would take many times as long as the first.
"""

from __future__ import annotations

import statistics
from functools import partial

import asyncpg

from benchmarks.arrivals import now
from benchmarks.context import Benchmark, Context
from benchmarks.figures import Figure, figure, ratio
from benchmarks.payloads import PAYLOAD_TEXT
from pgchannels import Settings
from pgchannels.records import Outgoing
from pgchannels.sealer import BATCH_BYTES
from pgchannels.store import Session

__all__ = ["BENCHMARK"]

PER_BATCH = 100


async def measure(context: Context) -> list[Figure]:
    batches = context.pick(1500, 600)
    results = await context.interleave(
        {
            "held": partial(_measure, context, batches, held=True),
            "free": partial(_measure, context, batches, held=False),
        }
    )
    figures = []
    for key, name, at_most in (
        ("held", "a transaction is open", 1.5),
        ("free", "none is", None),
    ):
        runs = results[key]
        first = figure(f"{name}: first tenth of {batches} batches", "ms", runs, "first")
        last = figure(f"{name}: last tenth", "ms", runs, "last")
        figures += [first, last, ratio(f"{name}: last / first", last, first, at_most=at_most)]
    return figures


async def _measure(context: Context, batches: int, *, held: bool) -> dict[str, float]:
    messages = [Outgoing("orders", PAYLOAD_TEXT)] * PER_BATCH
    # A database each, so that each begins without dead rows.
    async with context.server.database() as url:
        holder = await asyncpg.connect(url)
        settings = Settings(database_url=url)
        publisher, sequencer = Session(settings, "publisher"), Session(settings, "sequencer")
        try:
            if held:
                await holder.execute("create table held (id integer)")
                transaction = holder.transaction()
                await transaction.start()
                await holder.execute("insert into held values (1)")
            times = []
            for _ in range(batches):
                await publisher.insert(messages)
                start = now()
                batch = await sequencer.seal(settings.batch_size, BATCH_BYTES)
                times.append(1000 * (now() - start))
                if batch.sealed != PER_BATCH:
                    raise RuntimeError(f"{batch.sealed} were sealed instead of {PER_BATCH}")
        finally:
            await sequencer.close()
            await publisher.close()
            await holder.close()
    tenth = batches // 10
    return {
        "first": statistics.median(times[:tenth]),
        "last": statistics.median(times[-tenth:]),
    }


BENCHMARK = Benchmark("held-open", "Sealing beside a transaction that stays open", measure)
