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
COUNT = load_queries("pgchannels")["count_connections"]


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
