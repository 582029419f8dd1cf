"""How many partitions the log has, and that making them holds up nobody."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg.rows import scalar_row

from pgchannels.sql import load_queries
from tests.support.partitions import make_small

Connection = psycopg.Connection[Any]
QUERIES = load_queries("pgchannels")
DAY = 86_400
MILLION = 10**6


@pytest.fixture
def connection(database_url: str) -> Iterator[Connection]:
    with psycopg.connect(database_url, autocommit=True, row_factory=scalar_row) as connection:
        # Who waits for a lock that these tests hold is to fail, not to hang.
        connection.execute("set statement_timeout = '20s'")
        yield connection


def value(connection: Connection, sql: str, *arguments: Any) -> Any:
    return connection.execute(sql.encode(), arguments).fetchone()


def partitions(connection: Connection) -> int:
    count: int = value(
        connection,
        "select count(*) from pg_inherits where inhparent = 'pgchannels.messages'::regclass",
    )
    return count


def publish(connection: Connection, count: int = 1) -> None:
    connection.execute(
        "select pgchannels.publish('room', '{}') from generate_series(1, %s)", [count]
    )


def advance(connection: Connection, head: int) -> None:
    """Let the log end at an id, as if so many messages had come; and do what a pruner does then."""
    connection.execute(
        "insert into pgchannels.batches (last_id, snapshot) values (%s, pg_current_snapshot())",
        [head],
    )
    connection.execute(QUERIES["add_partitions_ahead"].encode())


class TestWidth:
    def test_a_busy_log_has_few_partitions(self, connection: Connection) -> None:
        """Ten thousand messages a second, kept for thirty days: 26 000 times a million ids."""
        retained = 10_000 * 30 * DAY
        head = 0
        while head < retained:
            # As far as the partitions reach; they are empty.
            head = value(connection, "select attached_to - 1 from pgchannels.log")
            advance(connection, head)
            assert value(connection, "select attached_to from pgchannels.log") > head + MILLION
        assert 20 < partitions(connection) < 100
        connection.execute("set plan_cache_mode = force_generic_plan")
        connection.execute(("prepare read as " + QUERIES["read_log"]).encode())
        with connection.transaction():
            connection.execute("execute read(0, 1000, 1000000, 0, 0)")
            locks = "select count(*) from pg_locks where pid = pg_backend_pid()"
            assert value(connection, locks) < 500

    def test_once_old_messages_go_there_are_fewer(self, connection: Connection) -> None:
        make_small(connection.info.dsn, 10)
        retained, head = 100_000, 0
        counts = []
        while head < 4 * retained:
            head = value(connection, "select attached_to - 1 from pgchannels.log")
            advance(connection, head)
            floor = max(0, head - retained)
            connection.execute("update pgchannels.log set floor = %s", [floor])
            for name in connection.execute(
                "select relname from pg_class join pg_inherits on inhrelid = oid"
                " where inhparent = 'pgchannels.messages'::regclass"
                "   and substring(pg_get_expr(relpartbound, oid)"
                "                 from 'TO [(]''?([0-9]+)')::bigint <= %s",
                [floor + 1],
            ).fetchall():
                connection.execute(f"drop table pgchannels.{name}".encode())
            counts.append(partitions(connection))
        assert max(counts) < 100
        assert 15 < counts[-1] < 30

    def test_a_small_log_has_partitions_of_the_given_size(self, connection: Connection) -> None:
        for head in range(0, 10 * MILLION, MILLION):
            advance(connection, head)
        assert partitions(connection) == 10
        assert value(connection, "select attached_to from pgchannels.log") == 10 * MILLION + 1


class TestLocks:
    @pytest.fixture
    def analyzing(self, database_url: str) -> Iterator[Connection]:
        """Another session, with the lock that ANALYZE holds while it samples all partitions."""
        with psycopg.connect(database_url) as holder:
            holder.execute("lock table only pgchannels.messages in share update exclusive mode")
            yield holder

    def test_while_the_log_is_analyzed_no_partition_is_made_and_nobody_waits(
        self, connection: Connection, analyzing: Connection, database_url: str
    ) -> None:
        add = "select pgchannels.add_partitions(1500000)"
        assert value(connection, add) == 0
        with connection.transaction():
            assert value(connection, add) == 0
            # Nothing is held, either, that the sequencer needs.
            with psycopg.connect(database_url, autocommit=True) as sequencer:
                sequencer.execute("set statement_timeout = '20s'")
                publish(sequencer)
                sealed = sequencer.execute("select sealed from pgchannels.seal()").fetchone()
                assert sealed == (1,)
        analyzing.rollback()
        assert value(connection, add) == 1

    def test_the_last_ids_are_given_out_while_the_log_is_analyzed(
        self, connection: Connection, database_url: str
    ) -> None:
        make_small(database_url, 10)
        publish(connection, 25)
        sealed = "select sealed from pgchannels.seal(4)"
        with psycopg.connect(database_url) as holder:
            holder.execute("lock table only pgchannels.messages in share update exclusive mode")
            assert [value(connection, sealed) for _ in range(5)] == [4, 4, 2, 0, 0]
        # Whatever call makes room, a later one uses it.
        assert [value(connection, sealed) for _ in range(6)] == [0, 4, 4, 4, 3, 0]
