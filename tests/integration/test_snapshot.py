"""A snapshot and a position that fit: the state, and then what is published, make the state."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any

import asyncpg
import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.pool import NullPool

from pgchannels import (
    ChannelLayerClosed,
    ConfigurationError,
    DatabaseError,
    PostgresLayer,
    Settings,
)
from pgchannels.embedded import EmbeddedPostgres
from pgchannels.sealer import Sealer
from tests.support.eventually import eventually
from tests.support.partitions import make_small

ITEMS = 20


@pytest.fixture
def settings(database_url: str) -> Settings:
    with psycopg.connect(database_url) as connection:
        connection.execute("create table items (id integer primary key, n bigint not null)")
        connection.execute(f"insert into items select i, 0 from generate_series(1, {ITEMS}) i")
    return Settings(database_url=database_url)


@pytest.fixture
async def layer(settings: Settings) -> AsyncIterator[PostgresLayer]:
    async with PostgresLayer(settings) as layer:
        yield layer


@pytest.fixture
async def connection(settings: Settings) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(settings.dsn)
    yield connection
    await connection.close()


@pytest.fixture
async def engine(database_url: str) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(
        database_url.replace("postgresql:", "postgresql+asyncpg:"), poolclass=NullPool
    )
    yield engine
    await engine.dispose()


@pytest.fixture
def sync_engine(database_url: str) -> Iterator[sa.Engine]:
    engine = sa.create_engine(
        database_url.replace("postgresql:", "postgresql+psycopg:"), poolclass=NullPool
    )
    yield engine
    engine.dispose()


async def change(connection: asyncpg.Connection, item: int, by: int) -> None:
    """Change the state, and publish by how much, so that nothing may be missed or repeated."""
    await connection.execute("update items set n = n + $2 where id = $1", item, by)
    await connection.execute(
        "select pgchannels.publish('items', json_build_object('id', $1::int, 'by', $2::int))",
        item,
        by,
    )


STATE = "select id, n from items"


async def write(dsn: str, seed: int, done: asyncio.Event) -> None:
    """Random transactions: short and long ones, savepoints, rollbacks."""
    chance = random.Random(seed)
    connection = await asyncpg.connect(dsn)
    try:
        while not done.is_set():
            transaction = connection.transaction()
            await transaction.start()
            # In one order, for no deadlocks.
            for item in sorted(chance.sample(range(1, ITEMS + 1), chance.choice([1, 1, 2, 5]))):
                savepoint = connection.transaction()
                await savepoint.start()
                await change(connection, item, chance.randint(-9, 9))
                await (savepoint.rollback() if chance.random() < 0.1 else savepoint.commit())
            await (transaction.rollback() if chance.random() < 0.1 else transaction.commit())
    finally:
        await connection.close()


@pytest.mark.slow
async def test_a_thousand_snapshots_in_a_storm(settings: Settings) -> None:
    """One client follows the stream from the first; each later snapshot must show what it has."""
    done = asyncio.Event()
    reader = await asyncpg.connect(settings.dsn)
    # Two nodes sequence, and one of them also takes the snapshots.
    async with PostgresLayer(settings) as layer, PostgresLayer(settings) as other:  # noqa: SIM117
        async with asyncio.TaskGroup() as group:
            for seed in range(6):
                group.create_task(write(settings.dsn, seed, done))
            group.create_task(wake(other, done))
            try:
                async with reader.transaction():
                    position = await layer.snapshot(reader)
                    state = Counter(dict(await reader.fetch(STATE)))
                moved = 0
                async with layer.subscribe("items", after=position) as messages:
                    for number in range(1000):
                        async with reader.transaction():
                            later = await layer.snapshot(reader)
                            expected = dict(await reader.fetch(STATE))
                        async with asyncio.timeout(30):
                            # Nothing else is published, so the log has a message at each id.
                            while position.id < later.id:
                                message = await anext(messages)
                                assert message.id == position.id + 1
                                state[message["id"]] += message["by"]
                                position = message.position
                        assert position == later
                        assert dict(state) == expected, f"snapshot {number}, at {later}"
                        moved += 1
                assert moved == 1000
                assert position.id > 1000, "the storm was a calm"
            finally:
                done.set()
    await reader.close()


async def wake(layer: PostgresLayer, done: asyncio.Event) -> None:
    """Keep a sequencer at work."""
    while not done.is_set():
        layer.wake()
        await asyncio.sleep(0.001)


Begin = Callable[[], AbstractAsyncContextManager[tuple[Any, Callable[[], Any]]]]


@pytest.fixture(
    params=[
        *("asyncpg", "pool", "Connection", "Session", "scoped_session"),
        *("AsyncConnection", "AsyncSession", "async_scoped_session"),
    ]
)
def begin(request: pytest.FixtureRequest, engine: AsyncEngine, sync_engine: sa.Engine) -> Begin:
    """Begins a transaction: gives what snapshot() takes, and what reads the first item's number."""
    query = sa.text("select n from items where id = 1")

    @asynccontextmanager
    async def with_asyncpg() -> AsyncIterator[Any]:
        connection = await asyncpg.connect(
            engine.url.set(drivername="postgresql").render_as_string()
        )
        async with connection.transaction():
            yield connection, lambda: connection.fetchval(str(query))
        await connection.close()

    @asynccontextmanager
    async def with_a_pool() -> AsyncIterator[Any]:
        url = engine.url.set(drivername="postgresql").render_as_string()
        async with (
            asyncpg.create_pool(url, min_size=0) as pool,
            pool.acquire() as connection,
            connection.transaction(),
        ):
            yield connection, lambda: connection.fetchval(str(query))

    @asynccontextmanager
    async def with_async_session() -> AsyncIterator[Any]:
        async with async_sessionmaker(engine).begin() as session:
            yield session, lambda: session.scalar(query)

    @asynccontextmanager
    async def with_async_connection() -> AsyncIterator[Any]:
        async with engine.begin() as connection:
            yield connection, lambda: connection.scalar(query)

    @asynccontextmanager
    async def with_async_scoped() -> AsyncIterator[Any]:
        registry = async_scoped_session(async_sessionmaker(engine), asyncio.current_task)
        yield registry, lambda: registry.scalar(query)
        await registry.remove()

    @asynccontextmanager
    async def with_session() -> AsyncIterator[Any]:
        with sessionmaker(sync_engine).begin() as session:
            yield session, lambda: session.scalar(query)

    @asynccontextmanager
    async def with_scoped() -> AsyncIterator[Any]:
        registry: scoped_session[Session] = scoped_session(sessionmaker(sync_engine))
        yield registry, lambda: registry.scalar(query)
        registry.remove()

    @asynccontextmanager
    async def with_connection() -> AsyncIterator[Any]:
        with sync_engine.begin() as connection:
            yield connection, lambda: connection.scalar(query)

    found: dict[str, Begin] = {
        "asyncpg": with_asyncpg,
        "pool": with_a_pool,
        "AsyncSession": with_async_session,
        "AsyncConnection": with_async_connection,
        "async_scoped_session": with_async_scoped,
        "Session": with_session,
        "scoped_session": with_scoped,
        "Connection": with_connection,
    }
    return found[request.param]


async def read(number: Callable[[], Any]) -> int:
    found = number()
    value: int = await found if asyncio.iscoroutine(found) else found
    return value


class TestTransactions:
    async def test_of_every_kind(
        self, layer: PostgresLayer, connection: asyncpg.Connection, begin: Begin
    ) -> None:
        await change(connection, 1, 5)
        async with begin() as (transaction, number):
            position = await layer.snapshot(transaction)
            await change(connection, 1, 7)
            assert await read(number) == 5
            async with asyncio.timeout(10), layer.subscribe("items", after=position) as messages:
                assert (await anext(messages))["by"] == 7

    async def test_after_a_query_it_is_too_late(self, layer: PostgresLayer, begin: Begin) -> None:
        async with begin() as (transaction, number):
            await read(number)
            with pytest.raises(ConfigurationError, match=r"a query already.* session of its own"):
                await layer.snapshot(transaction)

    async def test_elsewhere_than_in_the_layers_database(
        self,
        layer: PostgresLayer,
        empty_database_url: str,
        make_server: Callable[[], EmbeddedPostgres],
    ) -> None:
        other_server = await asyncio.to_thread(make_server)
        for url in (empty_database_url, other_server.url()):
            connection = await asyncpg.connect(url)
            with pytest.raises(ConfigurationError, match="another database than the layer"):
                async with connection.transaction():
                    await layer.snapshot(connection)
            await connection.close()

    async def test_a_session_that_has_run_a_query_can_commit_first(
        self, layer: PostgresLayer, engine: AsyncEngine, connection: asyncpg.Connection
    ) -> None:
        await change(connection, 1, 5)
        async with AsyncSession(engine) as session:
            query = sa.text("select n from items where id = 1")
            await session.execute(query)
            await session.commit()
            position = await layer.snapshot(session)
            await change(connection, 1, 7)
            assert await session.scalar(query) == 5
            async with asyncio.timeout(10), layer.subscribe("items", after=position) as messages:
                assert (await anext(messages))["by"] == 7

    async def test_the_session_may_write(
        self, layer: PostgresLayer, engine: AsyncEngine, connection: asyncpg.Connection
    ) -> None:
        async with AsyncSession(engine) as session, session.begin():
            await layer.snapshot(session)
            await session.execute(sa.text("update items set n = 3 where id = 1"))
        assert await connection.fetchval("select n from items where id = 1") == 3

    @pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
    async def test_of_every_isolation_level(
        self, layer: PostgresLayer, engine: AsyncEngine, level: Any
    ) -> None:
        async with engine.execution_options(isolation_level=level).connect() as connection:
            await layer.snapshot(connection)
            shown = await connection.scalar(sa.text("show transaction_isolation"))
        assert shown == "repeatable read"

    async def test_read_only(self, layer: PostgresLayer, connection: asyncpg.Connection) -> None:
        async with connection.transaction(readonly=True):
            assert (await layer.snapshot(connection)).id == 0

    async def test_outside_of_a_transaction(
        self, layer: PostgresLayer, connection: asyncpg.Connection
    ) -> None:
        with pytest.raises(ConfigurationError, match="in no transaction"):
            await layer.snapshot(connection)

    async def test_in_autocommit(self, layer: PostgresLayer, engine: AsyncEngine) -> None:
        engine = engine.execution_options(isolation_level="AUTOCOMMIT")
        async with engine.connect() as connection:
            with pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
                await layer.snapshot(connection)

    async def test_in_a_savepoint(
        self, layer: PostgresLayer, connection: asyncpg.Connection
    ) -> None:
        with pytest.raises(ConfigurationError, match="in a savepoint"):
            async with connection.transaction(), connection.transaction():
                await layer.snapshot(connection)

    @pytest.mark.parametrize("transaction", [None, "session", 1])
    async def test_something_else(self, layer: PostgresLayer, transaction: Any) -> None:
        with pytest.raises(ConfigurationError, match="expected"):
            await layer.snapshot(transaction)

    async def test_of_a_layer_that_is_closed(self, settings: Settings) -> None:
        with pytest.raises(ChannelLayerClosed):
            await PostgresLayer(settings).snapshot(None)


class TestTheLog:
    async def test_what_is_pending_comes_before_the_position(
        self, settings: Settings, connection: asyncpg.Connection
    ) -> None:
        quiet = settings.model_copy(update={"batch_size": 10, "outbox_poll_interval": 3600.0})
        async with PostgresLayer(quiet) as layer:
            await connection.execute(
                "select pgchannels.publish('items', '{}') from generate_series(1, 35)"
            )
            async with connection.transaction():
                assert (await layer.snapshot(connection)).id == 35

    async def test_what_did_not_fit_into_the_partition_comes_before_the_position(
        self,
        settings: Settings,
        connection: asyncpg.Connection,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        make_small(settings.dsn, 10)
        monkeypatch.setattr("pgchannels.snapshots._MAX_MESSAGES", 100)

        # As if it all were committed just after the backlog has been sealed.
        async def drain(sealer: Sealer) -> int:
            return 0

        monkeypatch.setattr(Sealer, "drain", drain)
        async with PostgresLayer(settings) as layer:
            await connection.execute(
                "select pgchannels.publish('items', '{}') from generate_series(1, 35)"
            )
            async with connection.transaction():
                assert (await layer.snapshot(connection)).id == 35

    async def test_readers_are_told_of_what_it_has_sealed(
        self, settings: Settings, connection: asyncpg.Connection
    ) -> None:
        patient = settings.model_copy(
            update={"outbox_poll_interval": 3600.0, "poll_interval": 3600.0}
        )
        async with (
            PostgresLayer(patient) as layer,
            PostgresLayer(patient) as other,
            layer.subscribe("items") as here,
            other.subscribe("items") as there,
        ):
            await eventually(lambda: layer.is_listening and other.is_listening)
            await change(connection, 1, 1)
            async with connection.transaction():
                await layer.snapshot(connection)
            async with asyncio.timeout(10):
                assert (await anext(here))["by"] == (await anext(there))["by"] == 1

    async def test_many_at_once(
        self, layer: PostgresLayer, settings: Settings, connection: asyncpg.Connection
    ) -> None:
        await change(connection, 1, 1)

        async def one() -> tuple[int, int]:
            mine = await asyncpg.connect(settings.dsn)
            try:
                async with mine.transaction():
                    position = await layer.snapshot(mine)
                    return position.id, await mine.fetchval("select sum(n)::int from items")
            finally:
                await mine.close()

        async with asyncio.timeout(30):
            assert set(await asyncio.gather(*(one() for _ in range(20)))) == {(1, 1)}


class TestFailures:
    async def test_cancelled_it_lets_others_seal(
        self, layer: PostgresLayer, connection: asyncpg.Connection
    ) -> None:
        reached = asyncio.Event()

        async def stay(snapshot: str) -> None:
            reached.set()
            await asyncio.Event().wait()

        task = asyncio.create_task(layer._opened.snapshots.take(stay))
        await reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(10), layer.subscribe("items", after="0") as messages:
            await change(connection, 1, 1)
            assert (await anext(messages))["by"] == 1
        async with connection.transaction():
            assert (await layer.snapshot(connection)).id == 1

    async def test_whoever_dallies_is_cut_off_by_the_server(
        self, layer: PostgresLayer, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Long enough to get that far on a busy machine.
        monkeypatch.setattr("pgchannels.snapshots._IDLE_TIME", 2)
        async with layer.subscribe("items") as messages:

            async def until_the_next_message(snapshot: str) -> None:
                # Which cannot be sealed before the server has ended the session that we wait in.
                await change(connection, 1, 1)
                async with asyncio.timeout(10):
                    assert (await anext(messages))["by"] == 1

            with pytest.raises(DatabaseError):
                await layer._opened.snapshots.take(until_the_next_message)
        async with connection.transaction():
            assert (await layer.snapshot(connection)).id == 1

    async def test_its_connection_is_lost(
        self, layer: PostgresLayer, connection: asyncpg.Connection, engine: AsyncEngine
    ) -> None:
        async with connection.transaction():
            await layer.snapshot(connection)
        killed = await connection.fetchval(
            "select count(pg_terminate_backend(pid)) from pg_stat_activity"
            " where application_name = 'pgchannels snapshots' and datname = current_database()"
        )
        assert killed == 1
        # What is not there is noticed when it is used, and said; the next time there is a new one.
        async with connection.transaction():
            with suppress(DatabaseError):
                await layer.snapshot(connection)
        async with connection.transaction():
            assert (await layer.snapshot(connection)).id == 0
