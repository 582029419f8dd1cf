"""Rows that change with each call, beside a snapshot that is held for long: by a backup, a report.

What such a snapshot could see is not cleaned up. The cost of a call is counted in pages that it
looks at, not in time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.rows import dict_row

from pgchannels.sql import load_queries
from tests.support.eventually import eventually

Connection = psycopg.Connection[dict[str, Any]]

TAKE = "pgchannels.take('{k}', '{1}', '{1000000}', '{null}', '{3600}')"
QUERIES = load_queries("pgchannels")
COUNT = QUERIES["count_connections"]


@pytest.fixture
def connection(database_url: str) -> Iterator[Connection]:
    """A session with the plans of the layer's sessions."""
    with psycopg.connect(database_url, autocommit=True, row_factory=dict_row) as connection:
        connection.execute("set enable_seqscan = off")
        connection.execute("set enable_bitmapscan = off")
        connection.execute("set plan_cache_mode = force_generic_plan")
        yield connection


@pytest.fixture
def node(connection: Connection) -> UUID:
    node = uuid4()
    connection.execute("insert into pgchannels.nodes (id) values (%s)", [node])
    return node


@pytest.fixture
def held_snapshot(database_url: str, connection: Connection) -> Iterator[None]:
    with psycopg.connect(database_url) as report:
        report.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        report.execute("select 1")
        yield


def pages(connection: Connection, query: str) -> int:
    """How many pages the *query* looks at; the first one in a session reads catalogs, too."""
    found = connection.execute(f"explain (analyze, buffers) {query}".encode()).fetchall()
    plan = "\n".join(row["QUERY PLAN"] for row in found)
    return max(int(count) for count in re.findall(r"hit=(\d+)", plan))


def repeat(connection: Connection, first: int, last: int, *calls: str) -> None:
    """Make the calls for each ``i``, each in a transaction of its own."""
    body = "".join(f"perform * from {call}; commit;" for call in calls)
    connection.execute(
        f"do $$ begin for i in {first}..{last} loop {body} end loop; end $$".encode()
    )


def admit(node: UUID, name: str) -> str:
    return (
        f"pgchannels.admit('{node}', array[{name}], '{{null}}', '{{null}}', '{{null}}', '{{null}}',"
        " '{100000}')"
    )


def remove(node: UUID, name: str) -> str:
    return f"pgchannels.remove_channels(array[{name}], '0', '{node}')"


@pytest.mark.usefixtures("held_snapshot")
def test_taking_from_a_rate_does_not_slow_down(connection: Connection) -> None:
    def cost() -> int:
        return pages(connection, f"select * from {TAKE}")

    repeat(connection, 1, 10, TAKE)
    cost()
    before = cost()
    repeat(connection, 1, 3000, TAKE)
    assert cost() <= before + 8
    assert connection.execute("select taken from pgchannels.rates").fetchall() == [{"taken": 3013}]


@pytest.mark.usefixtures("held_snapshot")
def test_connecting_does_not_slow_down(connection: Connection, node: UUID) -> None:
    def cost(name: str) -> list[int]:
        return [
            pages(connection, f"select * from {admit(node, repr(name))}"),
            pages(connection, COUNT),
            pages(connection, f"select * from {remove(node, repr(name))}"),
        ]

    each = admit(node, "'x' || i"), remove(node, "'x' || i")
    repeat(connection, 1, 10, *each)
    cost("a")
    before = cost("b")
    repeat(connection, 11, 1500, *each)
    after = cost("c")
    assert all(late <= early + 15 for early, late in zip(before, after, strict=True)), after
    assert connection.execute("select connections from pgchannels.places").fetchall() == [
        {"connections": 0}
    ]


@pytest.mark.usefixtures("held_snapshot")
def test_coming_and_going_with_presence_does_not_slow_down(
    connection: Connection, node: UUID
) -> None:
    def change(name: str, adding: str) -> str:
        return (
            f"pgchannels.change_memberships(array['room'], array[{name}], '{{{adding}}}',"
            f" '{{connection}}', '0', '{node}')"
        )

    def cost(name: str) -> list[int]:
        return [pages(connection, f"select {change(repr(name), adding)}") for adding in "tf"]

    connection.execute(
        "insert into pgchannels.channels (name, node) select 'x' || n, %s"
        " from generate_series(1, 1004) n",
        [node],
    )
    each = change("'x' || i", "t"), change("'x' || i", "f")
    connection.execute(f"select {change(repr('x1001'), 't')}".encode())
    repeat(connection, 1, 10, *each)
    cost("x1002")
    before = cost("x1003")
    repeat(connection, 11, 1000, *each)
    after = cost("x1004")
    assert all(late <= early + 20 for early, late in zip(before, after, strict=True)), (
        before,
        after,
    )
    assert connection.execute("select count from pgchannels.present").fetchall() == [{"count": 1}]


@pytest.mark.usefixtures("held_snapshot")
def test_what_a_node_does_each_second_does_not_slow_down(connection: Connection) -> None:
    """What was removed long ago is not looked at: only what has become due within a minute."""
    sweep = QUERIES["sweep_ephemeral"].replace("$1", "'10 s'").replace("$2", "'1 min'")
    settle = "select pgchannels.settle_departures('0', 100, '1 min')"
    for query in (sweep, settle):
        connection.execute(query.encode())
    connection.execute(
        "insert into pgchannels.ephemeral (channel, payload, created_at)"
        " select 'room', '{}', now() - interval '1 h' from generate_series(1, 5000)"
    )
    connection.execute(
        "insert into pgchannels.memberships (group_name, channel, since, presence, left_at)"
        " select 'room', 'c' || n, 0, 'connection', now() - interval '1 h'"
        " from generate_series(1, 5000) n"
    )
    before = [pages(connection, query) for query in (sweep, settle)]
    assert connection.execute("select count(*) from pgchannels.ephemeral").fetchall() == [
        {"count": 5000}
    ]
    connection.execute("delete from pgchannels.ephemeral")
    connection.execute("delete from pgchannels.memberships")
    after = [pages(connection, query) for query in (sweep, settle)]
    assert all(late <= early + 3 for early, late in zip(before, after, strict=True)), (
        before,
        after,
    )
    assert max(after) < 20


@pytest.mark.parametrize("within", [None, "2 h"])
def test_what_has_become_due_is_removed(connection: Connection, within: str | None) -> None:
    bound = "null" if within is None else f"'{within}'"
    sweep = QUERIES["sweep_ephemeral"].replace("$1", "'10 s'").replace("$2", bound)
    connection.execute(
        "insert into pgchannels.ephemeral (channel, payload, created_at)"
        " values ('room', '{}', now() - interval '1 h'), ('room', '{}', now())"
    )
    connection.execute(
        "insert into pgchannels.memberships (group_name, channel, since, presence, left_at)"
        " values ('room', 'a', 0, 'connection', now() - interval '1 h'),"
        " ('room', 'b', 0, 'connection', now())"
    )
    assert connection.execute(sweep.encode()).fetchall() == [{"count": 1}]
    connection.execute(f"select pgchannels.settle_departures('10 s', 100, {bound})".encode())
    assert connection.execute("select channel from pgchannels.memberships").fetchall() == [
        {"channel": "b"}
    ]


@pytest.mark.usefixtures("held_snapshot")
def test_receiving_does_not_slow_down(connection: Connection) -> None:
    """Each claim takes a message. A process claims with another row after some time."""

    def receive(count: int) -> None:
        connection.execute(
            "do $$ declare me uuid; begin"
            f" for i in 1..{count} loop"
            "   if i % 200 = 1 then"
            "     delete from pgchannels.claims;"
            "     insert into pgchannels.claims (claimant) values (gen_random_uuid())"
            "       returning claimant into me;"
            "   end if;"
            "   perform * from pgchannels.claim("
            "     '{jobs}', '{1}', '{1}', me, i, 1000000, 1000000);"
            "   commit;"
            " end loop;"
            " end $$".encode()
        )

    def cost() -> int:
        me = uuid4()
        connection.execute("insert into pgchannels.claims (claimant) values (%s)", [me])
        return pages(
            connection,
            "select * from pgchannels.claim("
            f"'{{jobs}}', '{{1}}', '{{1}}', '{me}', 1, 1000000, 1000000)",
        )

    connection.execute("insert into pgchannels.channels (name) values ('jobs')")
    connection.execute(
        "insert into pgchannels.outbox (channel, payload)"
        " select 'jobs', '{}' from generate_series(1, 4000)"
    )
    connection.execute("select pgchannels.seal(10000)")
    receive(10)
    cost()
    before = cost()
    receive(3000)
    assert cost() <= before + 15
    assert connection.execute("select cursor from pgchannels.cursors").fetchall() == [
        {"cursor": 3013}
    ]


async def test_a_take_that_waited_counts_on_from_a_row_that_has_moved_in_the_index(
    database_url: str, connection: Connection
) -> None:
    connection.execute(f"select * from {TAKE}".encode())
    connection.execute("update pgchannels.rates set changes = 200")
    await _takes_beside(database_url, connection, f"select * from {TAKE}", taken=3)


async def test_a_take_that_waited_for_the_row_to_be_made(
    database_url: str, connection: Connection
) -> None:
    """By a transaction that has moved it in the index before its end: no second row is left."""
    await _takes_beside(
        database_url,
        connection,
        f"select * from {TAKE}; update pgchannels.rates set version = 1",
        taken=2,
    )


async def _takes_beside(
    database_url: str, connection: Connection, statements: str, *, taken: int
) -> None:
    with ThreadPoolExecutor(1) as thread, psycopg.connect(database_url) as other:
        other.execute(statements.encode())
        waiting = thread.submit(connection.execute, f"select * from {TAKE}".encode())
        pid = connection.info.backend_pid
        with psycopg.connect(database_url, autocommit=True) as watcher:
            await eventually(
                lambda: watcher.execute(
                    "select from pg_locks where pid = %s and not granted", [pid]
                ).fetchall()
            )
        other.commit()
        (row,) = waiting.result(30).fetchall()
    assert row["remaining"] == 1_000_000 - taken
    (row,) = connection.execute("select version, taken from pgchannels.rates").fetchall()
    assert row == {"version": 1, "taken": taken}
