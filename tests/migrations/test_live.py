"""Migrating while the application runs: up, down, and to a schema newer than the code."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import asyncpg
import psycopg
import pytest
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.pool import NullPool

import pgchannels.alembic  # noqa: F401 - adds the operations
from pgchannels import DatabaseError, PostgresLayer, SchemaError, Settings, Stream, migrate
from pgchannels.embedded import EmbeddedPostgres
from pgchannels.orm import install, publish
from pgchannels.pruner import Pruner
from pgchannels.schema import NEEDED_REVISION, REVISIONS
from pgchannels.store import Session
from tests.migrations.databases import column, dump, execute, wait_for_a_waiter
from tests.support.processes import Processes

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("crowds")]

PREVIOUS = REVISIONS[-2]
CYCLES = 3

Send = Callable[[int], Awaitable[object]]


@asynccontextmanager
async def by_function(url: str) -> AsyncIterator[Send]:
    connection = await asyncpg.connect(url)

    async def send(n: int) -> None:
        await connection.execute(
            "select pgchannels.publish('room', json_build_object('by', 'function', 'n', $1::int))",
            n,
        )

    try:
        yield send
    finally:
        await connection.close()


@asynccontextmanager
async def by_session(url: str, layer: PostgresLayer) -> AsyncIterator[Send]:
    engine = create_async_engine(url.replace("postgresql:", "postgresql+asyncpg:"))
    sessions: async_sessionmaker[AsyncSession] = async_sessionmaker(engine)
    install(sessions, layer)

    async def send(n: int) -> None:
        async with sessions.begin() as session:
            publish(session, "room", {"by": "session", "n": n})

    try:
        yield send
    finally:
        await engine.dispose()


async def publish_until(stop: asyncio.Event, send: Send) -> tuple[int, list[Exception]]:
    """Publish 0, 1, 2 …; how many, and what went wrong. What has failed is tried again."""
    failures: list[Exception] = []
    n = 0
    while not stop.is_set():
        try:
            await send(n)
        except (DatabaseError, asyncpg.PostgresError) as error:
            failures.append(error)
        else:
            n += 1
    return n, failures


async def publish_across(url: str, n: int, run: Callable[[str, str], None], to: str) -> None:
    """Publish in a transaction that is open from before a migration until after it."""
    connection = await asyncpg.connect(url)
    async with connection.transaction():
        await connection.execute(
            "select pgchannels.publish('room', json_build_object('by', 'across', 'n', $1::int))", n
        )
        migration = asyncio.create_task(asyncio.to_thread(run, url, to))
        # Not for ever: one that has to change the outbox waits for this transaction.
        await asyncio.wait([migration], timeout=5)
    await connection.close()
    await migration


async def read(stream: Stream, ends: set[str]) -> dict[str, list[int]]:
    """What each publisher has published, up to the ends that they have announced."""
    found: dict[str, list[int]] = {by: [] for by in ends}
    missing = set(ends)
    while missing:
        message = await anext(stream)
        if message.get("end"):
            missing.remove(message["by"])
        else:
            found[message["by"]].append(message["n"])
    return found


async def test_migrating_down_and_up_under_publishers_and_subscribers(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(PostgresLayer(database_url)) for _ in range(2)]
        streams = [await stack.enter_async_context(node.subscribe("room")) for node in nodes]
        publishers: dict[str, Send] = {
            "layer": lambda n: nodes[0].send("room", {"by": "layer", "n": n}),
            "function": await stack.enter_async_context(by_function(database_url)),
            "session": await stack.enter_async_context(by_session(database_url, nodes[1])),
        }
        stop = asyncio.Event()
        await stack.enter_async_context(asyncio.timeout(100))
        async with asyncio.TaskGroup() as tasks:
            reading = [
                tasks.create_task(read(stream, {*publishers, "across"})) for stream in streams
            ]
            publishing = {
                by: tasks.create_task(publish_until(stop, send)) for by, send in publishers.items()
            }
            for n in range(0, 2 * CYCLES, 2):
                await publish_across(database_url, n, migrate.downgrade, PREVIOUS)
                await publish_across(database_url, n + 1, migrate.upgrade, NEEDED_REVISION)
            stop.set()
            counts = {"across": 2 * CYCLES}
            for by, task in publishing.items():
                counts[by], failures = await task
                # PostgreSQL locks no function while it runs: publish() may miss what it calls.
                unexpected = [e for e in failures if by != "function" or not is_missing(e)]
                assert not unexpected
            for by in counts:
                await nodes[0].send("room", {"by": by, "end": True})
        for found in reading:
            assert found.result() == {by: list(range(count)) for by, count in counts.items()}
        assert all(counts.values())
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def is_missing(error: Exception) -> bool:
    return isinstance(error, (asyncpg.UndefinedFunctionError, asyncpg.InternalServerError))


def operation(url: str) -> None:
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"), poolclass=NullPool)
    with engine.begin() as connection:
        op: Any = Operations(MigrationContext.configure(connection))
        op.pgchannels_upgrade(to=NEEDED_REVISION)


@pytest.mark.parametrize("upgrade", [migrate.upgrade, operation])
def test_publishers_do_not_wait_while_a_migration_waits(
    database_url: str, upgrade: Callable[[str], None]
) -> None:
    """Behind a lock that is waited for, others queue; a migration leaves the queue to them."""
    migrate.downgrade(database_url, "0001")
    with ThreadPoolExecutor(1) as pool, psycopg.connect(database_url) as holder:
        holder.execute("select pgchannels.publish('room', '{}')")
        migrated = pool.submit(upgrade, database_url)
        with psycopg.connect(database_url, autocommit=True) as publisher:
            publisher.execute("set lock_timeout = '20s'")
            for _ in range(3):
                wait_for_a_waiter(database_url)
                publisher.execute("select pgchannels.publish('room', '{}')")
        assert not migrated.done()
        holder.commit()
        migrated.result(timeout=60)
    assert column(database_url, "select sealed from pgchannels.seal()") == [4]


@pytest.fixture
def newer_url(database_url: str) -> str:
    """A database that a later version has migrated, in a way that this one can live with."""
    execute(
        database_url,
        "alter table pgchannels.outbox add column later text;"
        "alter table pgchannels.messages add column later text;"
        "create table pgchannels.later (id int primary key);"
        "update pgchannels.alembic_version set version_num = '9999'",
    )
    return database_url


async def test_a_newer_schema_is_worked_on(newer_url: str) -> None:
    settings = Settings(database_url=newer_url)
    async with (
        asyncio.timeout(60),
        PostgresLayer(settings) as layer,
        PostgresLayer(settings) as other,
        by_function(newer_url) as call,
        by_session(newer_url, other) as commit,
        layer.subscribe("room") as messages,
    ):
        await other.send("room", {"n": 0})
        await call(1)
        await commit(2)
        assert [(await anext(messages))["n"] for _ in range(3)] == [0, 1, 2]
        page = await other.history("room", after="0")
        assert [message["n"] for message in page.messages] == [0, 1, 2]

        channel = await layer.new_channel("ws")
        await other.group_add("room", channel)
        assert await layer.group_members("room") == [channel]
        await other.group_send("room", {"n": 3})
        assert (await layer.receive(channel, timeout=30))["n"] == 3

        async with layer.follow("room", name="billing", after="0") as batches:
            batch = await anext(batches)
            assert batch[0]["n"] == 0
            await batch.ack()
        (follower,) = await layer.followers()
        assert (follower.name, follower.lag) == ("billing", 4 - len(batch))

        # The next partition has what the table has.
        execute(newer_url, "select pgchannels.add_partitions(3000000)")
        session = Session(settings, "prune")
        try:
            assert not (await Pruner(settings, session).run_once()).problems
        finally:
            await session.close()


def test_a_newer_schema_is_left_alone(
    newer_url: str, postgres: EmbeddedPostgres, processes: Processes
) -> None:
    before = dump(postgres, newer_url)
    migrate.check(newer_url)
    assert not migrate.is_behind(newer_url)
    migrate.upgrade(newer_url)
    operation(newer_url)
    command = processes.start(
        "-c",
        "from pgchannels.cli import main; main()",
        "migrate",
        "--database-url",
        newer_url,
    )
    assert command.wait(60) == 0, processes.output(command)
    assert migrate.current(newer_url) == "9999"
    assert dump(postgres, newer_url) == before
    with pytest.raises(SchemaError) as raised:
        migrate.downgrade(newer_url, "base")
    assert raised.value.newer


async def test_a_newer_schema_that_needs_newer_code(newer_url: str) -> None:
    execute(newer_url, "update pgchannels.log set works_from = '9999'")
    with pytest.raises(SchemaError) as raised:
        await PostgresLayer(newer_url).open()
    assert (raised.value.newer, raised.value.found) == (True, "9999")
    for function in (migrate.check, migrate.upgrade):
        with pytest.raises(SchemaError) as raised:
            await asyncio.to_thread(function, newer_url)
        assert raised.value.newer
