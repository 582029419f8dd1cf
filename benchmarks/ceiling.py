"""How far the log is from what PostgreSQL can do with such rows at all.

In: ``COPY`` into a table of the same shape, bare and with the log's indexes, beside ``seal()`` on a
backlog. Out: the rows by plain ``select`` in pages of the same size, beside a stream that replays
and ``history()``.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import asyncpg

from benchmarks.arrivals import now
from benchmarks.context import Benchmark, Context
from benchmarks.figures import Figure, ratio
from benchmarks.payloads import PAYLOAD_TEXT
from pgchannels import PostgresLayer, Settings
from pgchannels.messages import BEGINNING, Position
from pgchannels.sealer import BATCH_BYTES
from pgchannels.store import Session

__all__ = ["BENCHMARK"]

CHANNEL = "orders"
PAGE = 1000
PER_TRANSACTION = 500
START = 0.3
"""Seconds after which a layer that was opened has done what it does at first."""

FILL = """
insert into pgchannels.outbox (channel, payload)
select $1::text, $2::text::json from generate_series(1, $3)
"""

PLAIN_READ = """
select id, channel, payload, created_at, size from pgchannels.messages where id > $1
 order by id limit $2
"""


BARE_TABLE = "create table bare as table pgchannels.messages with no data"

INDEXED_TABLE = "create table indexed (like pgchannels.messages including all)"


async def measure(context: Context) -> list[Figure]:
    rows = context.pick(100_000, 30_000)
    async with context.server.database() as url:
        settings = Settings(database_url=url)
        connection = await asyncpg.connect(url)
        session = Session(settings, "sequencer")
        try:
            await connection.execute(BARE_TABLE)
            await connection.execute(INDEXED_TABLE)
            log = Log(settings, connection, session, rows)
            variants: dict[str, Callable[[], Awaitable[float]]] = {
                "copy": partial(log.copy, "bare"),
                "copy indexed": partial(log.copy, "indexed"),
                "seal": log.seal,
                "select": log.select,
                "replay": log.replay,
                "history": log.history,
            }
            results = await context.interleave(variants)
        finally:
            await session.close()
            await connection.close()
    batch = settings.batch_size
    copy = Figure("COPY into a bare table", "rows/s", tuple(results["copy"]))
    indexed = Figure("COPY into an indexed one", "rows/s", tuple(results["copy indexed"]))
    seal = Figure(f"outbox → log, batches of {batch}", "messages/s", tuple(results["seal"]))
    select = Figure("plain select, pages of 1000", "rows/s", tuple(results["select"]))
    replay = Figure("stream that replays", "messages/s", tuple(results["replay"]))
    history = Figure("history(), pages of 1000", "messages/s", tuple(results["history"]))
    return [
        copy,
        indexed,
        seal,
        ratio("seal / COPY bare", seal, copy),
        ratio("seal / COPY indexed", seal, indexed),
        select,
        replay,
        history,
        ratio("replay / plain select", replay, select),
        ratio("history / plain select", history, select),
    ]


class Log:
    """The log of a database in which nothing else is going on, not even a layer's sequencer."""

    def __init__(self, settings: Settings, connection: Any, session: Session, rows: int) -> None:
        self._settings = settings
        self._connection = connection
        self._session = session
        self._rows = rows

    async def copy(self, table: str) -> float:
        """COPY the rows into *table*, in one transaction; rows a second."""
        row = f"%d\t{CHANNEL}\t{PAYLOAD_TEXT}\t\\N\t\\N\t200\t2026-01-01 00:00:00+00\t\\N\n"
        source = io.BytesIO("".join(row % index for index in range(self._rows)).encode())
        await self._connection.execute(f"truncate {table}")
        start = now()
        await self._connection.copy_to_table(table, source=source, format="text")
        return self._rows / (now() - start)

    async def seal(self) -> float:
        """Seal a backlog of many transactions; messages a second."""
        for _ in range(0, self._rows, PER_TRANSACTION):
            await self._connection.execute(FILL, CHANNEL, PAYLOAD_TEXT, PER_TRANSACTION)
        moved = 0
        start = now()
        while moved < self._rows:
            batch = await self._session.seal(self._settings.batch_size, BATCH_BYTES)
            if not batch.sealed:
                raise RuntimeError(f"only {moved} of {self._rows} were sealed")
            moved += batch.sealed
        return self._rows / (now() - start)

    async def select(self) -> float:
        """Read the newest rows by plain queries; rows a second."""
        after, count = await self._before(), 0
        start = now()
        while rows := await self._connection.fetch(PLAIN_READ, after, PAGE):
            after = rows[-1]["id"]
            count += len(rows)
        return self._rate(count, start)

    async def replay(self) -> float:
        """Read them by a stream that resumes; messages a second."""
        count, after = 0, Position(1, await self._before())
        async with self._warm_layer() as layer:
            start = now()
            async with layer.subscribe(CHANNEL, after=after) as messages:
                async for _ in messages:
                    count += 1
                    if count == self._rows:
                        break
            return self._rate(count, start)

    async def history(self) -> float:
        """Read them page by page; messages a second."""
        count, after = 0, await self._before()
        async with self._warm_layer() as layer:
            start = now()
            position: Position | None = Position(1, after)
            while position is not None:
                page = await layer.history(CHANNEL, after=position, limit=PAGE)
                count += len(page.messages)
                position = page.next
            return self._rate(count, start)

    @asynccontextmanager
    async def _warm_layer(self) -> AsyncIterator[PostgresLayer]:
        """A layer that has started: its tasks are at rest, its connections have been used."""
        async with PostgresLayer(self._settings) as layer:
            await asyncio.sleep(START)
            await layer.history(CHANNEL, limit=PAGE)
            async with layer.subscribe(CHANNEL, after=BEGINNING) as messages:
                await messages.batch()
            yield layer

    async def _before(self) -> int:
        return (await self._session.head()).id - self._rows

    def _rate(self, count: int, start: float) -> float:
        seconds = now() - start
        if count != self._rows:
            raise RuntimeError(f"{count} messages were read instead of {self._rows}")
        return count / seconds


BENCHMARK = Benchmark("ceiling", "The log beside bare PostgreSQL", measure)
