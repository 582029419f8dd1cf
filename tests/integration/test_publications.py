"""Logical replication by others: what they publish of our tables must not stop us."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import psycopg
from psycopg.rows import scalar_row

from pgchannels import PostgresLayer, Settings
from pgchannels.pruner import Pruner
from pgchannels.store import Session
from tests.support.partitions import make_small


def test_every_table_has_a_replica_identity(database_url: str) -> None:
    with psycopg.connect(database_url, row_factory=scalar_row) as connection:
        of_ours = (
            "from pg_class c where c.relnamespace = 'pgchannels'::regnamespace"
            # Only these can be in a publication. A partitioned table's rows are its partitions'.
            " and c.relkind = 'r' and c.relpersistence = 'p'"
        )
        (count,) = connection.execute(f"select count(*) {of_ours}").fetchall()
        assert count > 10
        without = connection.execute(
            f"select c.relname {of_ours} and c.relreplident <> 'f' and not exists ("
            " select from pg_index i where i.indrelid = c.oid and case c.relreplident"
            " when 'd' then i.indisprimary when 'i' then i.indisreplident end)"
        ).fetchall()
    assert without == []


async def test_a_publication_for_all_tables_stops_neither_delivery_nor_pruning(
    database_url: str,
) -> None:
    settings = Settings(database_url=database_url, retention=None, batch_size=5)
    with psycopg.connect(database_url, autocommit=True, row_factory=scalar_row) as connection:
        connection.execute("create publication everything for all tables")
        make_small(database_url, 10)
        async with (
            PostgresLayer(settings) as layer,
            layer.subscribe("room") as messages,
            asyncio.timeout(30),
        ):
            for n in range(25):
                await layer.send("room", {"n": n})
            for n in range(25):
                assert (await anext(messages))["n"] == n
        # Of a transaction that, by every snapshot, was dealt with long ago.
        connection.execute(
            "insert into pgchannels.outbox (xid, channel, payload) values ('3', 'room', '{}')"
        )
        session = Session(settings, "pruner")
        pruning = settings.model_copy(update={"retention": timedelta(microseconds=1)})
        try:
            report = await Pruner(pruning, session).run_once()
        finally:
            await session.close()
        assert report.stragglers == 1
        assert report.partitions_dropped
        assert connection.execute("select sealed from pgchannels.seal(5)").fetchone() == 1
