"""Batches of a node: they shrink when they take too long, and need no notification."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from uuid import uuid4

import asyncpg
import psycopg
import pytest
from psycopg.rows import scalar_row
from sqlalchemy.engine import make_url

from pgchannels import DatabaseError, DatabaseUnavailable, PostgresLayer, Settings
from pgchannels.sealer import BATCH_BYTES, Sealer
from pgchannels.store import Session

Connection = psycopg.Connection[int]

# As a statement_timeout does it that is too short for more messages.
CANCEL_MORE_THAN_TEN = """
create function too_many() returns trigger language plpgsql as $$
begin
    if (select count(*) from new_messages) > 10 then
        raise exception 'canceling statement due to statement timeout' using errcode = '57014';
    end if;
    return null;
end
$$;
create trigger too_many after insert on pgchannels.messages referencing new table as new_messages
for each statement execute function too_many();
"""


@pytest.fixture
def connection(database_url: str) -> Iterator[Connection]:
    with psycopg.connect(database_url, autocommit=True, row_factory=scalar_row) as connection:
        yield connection


@pytest.fixture
async def sealer(database_url: str) -> AsyncIterator[Sealer]:
    settings = Settings(database_url=database_url, batch_size=80, command_timeout=30)
    session = Session(settings, "sequencer")
    yield Sealer(settings, session, sealed=lambda head: None)
    await session.close()


@pytest.fixture
def no_notify(connection: Connection, database_url: str) -> Iterator[str]:
    """The URL of a node for which notifying fails, after the batch has been committed."""
    node = f"node_{uuid4().hex[:12]}"
    connection.execute(f"create role {node} login".encode())
    connection.execute("select pgchannels.grant_access('node', %s)", [node])
    connection.execute("revoke execute on function pg_notify(text, text) from public")
    yield make_url(database_url).set(username=node).render_as_string(hide_password=False)
    connection.execute(f"drop owned by {node} cascade; drop role {node}".encode())


def publish(connection: Connection, count: int) -> None:
    connection.execute(
        "insert into pgchannels.outbox (channel, payload)"
        " select 'room', '{}' from generate_series(1, %s)",
        [count],
    )


def sizes(connection: Connection, after: int = 0) -> list[int]:
    """Of the batches after an id, oldest first."""
    return connection.execute(
        "select (last_id - lag(last_id, 1, 0::bigint) over (order by last_id))::int as size"
        " from pgchannels.batches order by last_id offset"
        " (select count(*) from pgchannels.batches where last_id <= %s)",
        [after],
    ).fetchall()


async def test_a_batch_that_takes_too_long_is_halved_and_later_doubled(
    connection: Connection, sealer: Sealer
) -> None:
    connection.execute(CANCEL_MORE_THAN_TEN)
    publish(connection, 100)
    failures = 0
    async with asyncio.timeout(60):
        while True:
            try:
                assert await sealer.drain() > 0
                break
            except DatabaseUnavailable:
                failures += 1
    assert failures >= 3, "80, 40, 20"
    assert sum(sizes(connection)) == 100
    assert max(sizes(connection)) == 10
    connection.execute("drop trigger too_many on pgchannels.messages")
    publish(connection, 1000)
    assert await sealer.drain() == 1000
    assert sizes(connection, 100)[-2] == 80


async def test_our_own_timeout_halves_a_batch_too(
    connection: Connection, database_url: str
) -> None:
    settings = Settings(database_url=database_url, batch_size=10, command_timeout=1)
    session = Session(settings, "sequencer")
    sealer = Sealer(settings, session, sealed=lambda head: None)
    publish(connection, 10)
    try:
        with psycopg.connect(database_url) as holder:
            holder.execute("lock table pgchannels.sequencer_lock in share update exclusive mode")
            with pytest.raises(DatabaseUnavailable):
                await sealer.drain()
            # The statement may run on in the server, and must not seal in our place.
            connection.execute(
                "select pg_terminate_backend(pid, 30000) from pg_stat_activity"
                " where application_name = 'pgchannels sequencer' and datname = current_database()"
            )
        assert await sealer.drain() == 10
    finally:
        await session.close()
    assert sizes(connection) == [5, 5]


async def test_large_messages_make_small_batches(connection: Connection, sealer: Sealer) -> None:
    connection.execute("select pgchannels.limit_messages(%s)", [BATCH_BYTES])
    connection.execute("alter table pgchannels.outbox alter attachments set storage external")
    connection.execute(
        "insert into pgchannels.outbox (channel, payload, attachments)"
        " select 'room', '{}', array[convert_to(repeat('x', %s), 'UTF8')]"
        " from generate_series(1, 9)",
        [BATCH_BYTES // 4],
    )
    assert await sealer.drain() == 9
    assert sizes(connection) == [4, 4, 1]


async def test_without_notifications_batches_are_sealed_all_the_same(
    connection: Connection, no_notify: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(database_url=no_notify, batch_size=10)
    session = Session(settings, "sequencer")
    heads: list[int] = []
    sealer = Sealer(settings, session, sealed=heads.append)
    publish(connection, 25)
    try:
        with caplog.at_level(logging.WARNING):
            await sealer.drain()
    finally:
        await session.close()
    assert sizes(connection) == [10, 10, 5]
    assert heads[-1] == 25, "this node's hub looks at once"
    assert "will find messages by polling" in caplog.text
    assert {record.levelname for record in caplog.records} == {"WARNING"}


async def test_a_batch_that_fails_raises(connection: Connection, sealer: Sealer) -> None:
    publish(connection, 1)
    connection.execute("alter table pgchannels.messages add constraint never check (false)")
    with pytest.raises(DatabaseError, match="never"):
        await sealer.drain()


async def test_without_notifications_messages_and_snapshots_are_delivered(
    connection: Connection, no_notify: str, caplog: pytest.LogCaptureFixture
) -> None:
    """By polling. Those that were published in SQL, for a node's own sequencer tells its hub."""
    settings = Settings(database_url=no_notify, outbox_poll_interval=3600.0, poll_interval=0.1)
    reader = await asyncpg.connect(no_notify)
    try:
        async with (
            PostgresLayer(settings) as layer,
            layer.subscribe("room") as messages,
            asyncio.timeout(30),
        ):
            publish(connection, 1)
            async with reader.transaction():
                position = await layer.snapshot(reader)
            assert position.id == 1
            assert (await anext(messages)).position == position
    finally:
        await reader.close()
    assert "cannot sequence" not in caplog.text
