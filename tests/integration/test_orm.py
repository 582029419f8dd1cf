"""Publishing from SQLAlchemy sessions of every shape: what commits is published, nothing else is.

All with real commits, read back from the log in the order that readers get.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from decimal import Decimal
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy import event, orm
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Mapped, Session, mapped_column, sessionmaker
from sqlalchemy.pool import NullPool

from pgchannels import (
    ConfigurationError,
    InvalidChannel,
    InvalidMessage,
    InvalidPayload,
    Message,
    MessageTooLarge,
    PostgresLayer,
    Settings,
)
from pgchannels.migrate import upgrade
from pgchannels.orm import install, publish
from tests.support.eventually import eventually
from tests.support.sessions import SHAPES, Log, Make, WakeCounter


class Base(orm.DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int | None] = mapped_column(
        sa.ForeignKey("orders.id", deferrable=True, initially="DEFERRED")
    )
    name: Mapped[str] = mapped_column(unique=True, default="")


ids = itertools.count(1)


def order(**values: Any) -> Order:
    id = next(ids)
    return Order(**{"id": id, "name": f"order {id}", **values})


@pytest.fixture
def settings(database_url: str) -> Settings:
    return Settings(database_url=database_url)


@pytest.fixture
def counter(settings: Settings) -> WakeCounter:
    return WakeCounter(settings)


@pytest.fixture
def engine(database_url: str) -> Iterator[sa.Engine]:
    url = database_url.replace("postgresql:", "postgresql+psycopg:")
    engine = sa.create_engine(url, poolclass=NullPool)
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def make(engine: sa.Engine, counter: WakeCounter) -> sessionmaker[Session]:
    maker = sessionmaker(engine)
    install(maker, counter.layer)
    return maker


@pytest.fixture
async def async_engine(engine: sa.Engine, database_url: str) -> AsyncIterator[AsyncEngine]:
    url = database_url.replace("postgresql:", "postgresql+asyncpg:")
    created = create_async_engine(url, poolclass=NullPool)
    yield created
    await created.dispose()


@pytest.fixture
def log(database_url: str, engine: sa.Engine) -> Iterator[Log]:
    with closing(Log(database_url)) as log:
        yield log


class Stop(Exception):
    """Ends a block."""


# Endings: each uses one session; the numbers are those that must have been published.


def commit(make: Make) -> list[int]:
    session = make()
    publish(session, "room", {"n": 1})
    session.add(order())
    publish(session, "room", {"n": 2})
    session.commit()
    publish(session, "room", {"n": 3})
    session.commit()
    session.close()
    return [1, 2, 3]


def commit_without_objects(make: Make) -> list[int]:
    session = make()
    publish(session, "room", {"n": 1})
    session.commit()
    session.close()
    return [1]


def rollback(make: Make) -> list[int]:
    session = make()
    publish(session, "room", {"n": 1})
    session.flush()
    publish(session, "room", {"n": 2})
    session.rollback()
    session.commit()
    session.close()
    return []


def savepoint_rolled_back(make: Make) -> list[int]:
    session = make()
    publish(session, "room", {"n": 1})
    savepoint = session.begin_nested()
    publish(session, "room", {"n": 2})
    session.flush()
    publish(session, "room", {"n": 3})
    savepoint.rollback()
    publish(session, "room", {"n": 4})
    session.commit()
    session.close()
    return [1, 4]


def nested_savepoints(make: Make) -> list[int]:
    session = make()
    publish(session, "room", {"n": 1})
    with session.begin_nested():
        publish(session, "room", {"n": 2})
        inner = session.begin_nested()
        publish(session, "room", {"n": 3})
        inner.rollback()
        with session.begin_nested():
            publish(session, "room", {"n": 4})
        publish(session, "room", {"n": 5})
    outer = session.begin_nested()
    publish(session, "room", {"n": 6})
    with session.begin_nested():
        publish(session, "room", {"n": 7})
    outer.rollback()
    publish(session, "room", {"n": 8})
    session.commit()
    session.close()
    return [1, 2, 4, 5, 8]


def flush_fails(make: Make) -> list[int]:
    session = make()
    first = order()
    session.add(first)
    session.commit()
    publish(session, "room", {"n": 1})
    session.add(order(name=first.name))
    publish(session, "room", {"n": 2})
    with pytest.raises(IntegrityError):
        session.flush()
    session.rollback()
    publish(session, "room", {"n": 3})
    session.commit()
    session.close()
    return [3]


def flush_fails_in_a_savepoint(make: Make) -> list[int]:
    session = make()
    first = order()
    session.add(first)
    publish(session, "room", {"n": 1})
    savepoint = session.begin_nested()
    publish(session, "room", {"n": 2})
    session.add(order(name=first.name))
    with pytest.raises(IntegrityError):
        session.flush()
    assert not savepoint.is_active
    savepoint.rollback()
    publish(session, "room", {"n": 3})
    session.commit()
    session.close()
    return [1, 3]


def closed_without_commit(make: Make) -> list[int]:
    session = make()
    publish(session, "room", {"n": 1})
    session.flush()
    publish(session, "room", {"n": 2})
    session.close()
    # The same object, or a new one on the same connection: nothing of the above may turn up.
    session.commit()
    session = make()
    publish(session, "room", {"n": 3})
    session.commit()
    session.close()
    return [3]


def block_left_by_an_exception(make: Make) -> list[int]:
    session = make()
    with suppress(Stop), session.begin():
        publish(session, "room", {"n": 1})
        session.flush()
        publish(session, "room", {"n": 2})
        raise Stop
    with session.begin():
        publish(session, "room", {"n": 3})
    session.close()
    return [3]


def queries_between(make: Make) -> list[int]:
    session = make()
    for n in range(5):
        publish(session, "room", {"n": n})
        session.execute(sa.select(Order)).all()
    session.commit()
    session.close()
    return [0, 1, 2, 3, 4]


ENDINGS = [
    commit,
    commit_without_objects,
    rollback,
    savepoint_rolled_back,
    nested_savepoints,
    flush_fails,
    flush_fails_in_a_savepoint,
    closed_without_commit,
    block_left_by_an_exception,
    queries_between,
]


class TestMatrix:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("ending", ENDINGS)
    def test_sync(
        self,
        engine: sa.Engine,
        counter: WakeCounter,
        log: Log,
        shape: Callable[..., Any],
        ending: Callable[[Make], list[int]],
    ) -> None:
        with shape(engine, counter.layer) as make:
            expected = ending(make)
        assert log.read() == expected

    @pytest.mark.parametrize("ending", ENDINGS)
    async def test_async(
        self,
        async_engine: AsyncEngine,
        counter: WakeCounter,
        log: Log,
        ending: Callable[[Make], list[int]],
    ) -> None:
        maker = async_sessionmaker(async_engine)
        install(maker, counter.layer)

        async with maker() as session:
            expected = await session.run_sync(
                lambda sync: ending(lambda: _reused(sync)),
            )
        assert log.read() == expected

    @pytest.mark.parametrize("ending", ENDINGS)
    def test_two_phase(
        self,
        engine: sa.Engine,
        counter: WakeCounter,
        log: Log,
        ending: Callable[[Make], list[int]],
    ) -> None:
        maker = sessionmaker(engine, twophase=True)
        install(maker, counter.layer)
        expected = ending(maker)
        assert log.read() == expected


def _reused(session: Session) -> Session:
    return session


class TestTwoPhase:
    def test_prepared_is_not_published_yet(
        self, engine: sa.Engine, counter: WakeCounter, log: Log
    ) -> None:
        maker = sessionmaker(engine, twophase=True)
        install(maker, counter.layer)
        with maker() as first, maker() as second:
            publish(first, "room", {"n": "first"})
            first.prepare()
            publish(second, "room", {"n": "second"})
            second.commit()
            assert log.read() == ["second"]
            first.commit()
        assert log.read() == ["second", "first"]

    def test_prepared_and_rolled_back(
        self, engine: sa.Engine, counter: WakeCounter, log: Log
    ) -> None:
        maker = sessionmaker(engine, twophase=True)
        install(maker, counter.layer)
        with maker() as session:
            publish(session, "room", {"n": 1})
            session.prepare()
            session.rollback()
        assert log.read() == []


class TestAsync:
    async def test_commit_and_rollback(
        self, async_engine: AsyncEngine, counter: WakeCounter, log: Log
    ) -> None:
        maker = async_sessionmaker(async_engine)
        install(maker, counter.layer)
        async with maker() as session, session.begin():
            publish(session, "room", {"n": 1})
            async with session.begin_nested():
                publish(session, "room", {"n": 2})
        async with maker() as session:
            publish(session, "room", {"n": 3})
            await session.flush()
        with suppress(Stop):
            async with maker() as session, session.begin():
                publish(session, "room", {"n": 4})
                raise Stop
        assert log.read() == [1, 2]
        assert counter.woken == 1

    async def test_scoped(self, async_engine: AsyncEngine, counter: WakeCounter, log: Log) -> None:
        maker = async_sessionmaker(async_engine)
        install(maker, counter.layer)
        registry = async_scoped_session(maker, scopefunc=asyncio.current_task)
        publish(registry, "room", {"n": 1})
        await registry.commit()
        publish(registry, "room", {"n": 2})
        await registry.remove()
        assert log.read() == [1]

    async def test_installing_a_scoped_session(
        self, async_engine: AsyncEngine, counter: WakeCounter, log: Log
    ) -> None:
        maker = async_sessionmaker(async_engine)
        registry = async_scoped_session(maker, scopefunc=asyncio.current_task)
        install(registry, counter.layer)
        publish(registry, "room", {"n": 1})
        await registry.commit()
        await registry.remove()
        assert log.read() == [1]
        assert counter.woken == 1

    async def test_a_class(self, async_engine: AsyncEngine, counter: WakeCounter, log: Log) -> None:
        class Mine(AsyncSession):
            pass

        install(Mine, counter.layer)
        async with Mine(async_engine) as session:
            publish(session, "room", {"n": 1})
            await session.commit()
        assert log.read() == [1]
        async with AsyncSession(async_engine) as other:
            with pytest.raises(ConfigurationError, match="install"):
                publish(other, "room", {"n": 2})

    async def test_cancelled_in_the_middle(
        self, async_engine: AsyncEngine, counter: WakeCounter, log: Log
    ) -> None:
        maker = async_sessionmaker(async_engine)
        install(maker, counter.layer)
        flushed = asyncio.Event()

        async def work() -> None:
            async with maker() as session, session.begin():
                publish(session, "room", {"n": 1})
                await session.flush()
                flushed.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(work())
        await flushed.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert log.read() == []

    async def test_reaches_a_subscriber(
        self, async_engine: AsyncEngine, settings: Settings
    ) -> None:
        async with PostgresLayer(settings) as layer, layer.subscribe("room") as stream:
            maker = async_sessionmaker(async_engine)
            install(maker, layer)
            async with maker() as session:
                publish(session, "room", {"n": 1}, ttl=60)
                await session.commit()
            async with asyncio.timeout(10):
                assert (await anext(stream))["n"] == 1


class TestSync:
    def test_a_commit_that_fails(self, make: sessionmaker[Session], log: Log) -> None:
        with make() as session:
            publish(session, "room", {"n": 1})
            session.add(order(number=10**6))  # a constraint that is looked at when committing
            with pytest.raises(IntegrityError):
                session.commit()
            session.rollback()
            publish(session, "room", {"n": 2})
            session.commit()
        assert log.read() == [2]

    def test_a_connections_transaction_rolled_back(
        self, engine: sa.Engine, counter: WakeCounter, log: Log
    ) -> None:
        with engine.connect() as connection:
            transaction = connection.begin()
            maker = sessionmaker(connection, join_transaction_mode="create_savepoint")
            install(maker, counter.layer)
            with maker() as session:
                publish(session, "room", {"n": 1})
                session.commit()
            transaction.rollback()
        assert log.read() == []

    def test_abandoned_sessions_leak_nothing(self, database_url: str, log: Log) -> None:
        # One connection, which the pool hands from one session to the next.
        url = database_url.replace("postgresql:", "postgresql+psycopg:")
        engine = sa.create_engine(url, pool_size=1, max_overflow=0)
        maker = sessionmaker(engine)
        install(maker, settings=Settings(database_url=database_url))
        abandoned = maker()
        publish(abandoned, "room", {"n": 1})
        abandoned.flush()
        publish(abandoned, "room", {"n": 2})
        abandoned.invalidate()
        session = maker()
        publish(session, "room", {"n": 3})
        session.close()
        with maker() as session:
            publish(session, "room", {"n": 4})
            session.commit()
        engine.dispose()
        assert log.read() == [4]

    def test_several_make_one_insert(
        self, engine: sa.Engine, make: sessionmaker[Session], log: Log
    ) -> None:
        inserts: list[str] = []

        def count(_: Any, cursor: Any, statement: str, *rest: Any) -> None:
            if "outbox" in statement:
                inserts.append(statement)

        event.listen(engine, "before_cursor_execute", count)
        with make() as session:
            for n in range(50):
                publish(session, "room", {"n": n})
                session.add(order())
            session.commit()
        assert len(inserts) == 1
        assert log.read() == list(range(50))

    def test_nothing_published_costs_nothing(
        self, engine: sa.Engine, make: sessionmaker[Session], counter: WakeCounter
    ) -> None:
        statements: list[str] = []
        event.listen(engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
        with make() as session:
            session.add(order())
            session.commit()
        assert len(statements) == 1
        assert counter.woken == 0

    def test_order_across_flushes(self, make: sessionmaker[Session], log: Log) -> None:
        with make() as session:
            for n in range(10):
                publish(session, "room", {"n": n})
                if n % 3 == 0:
                    session.add(order())
                    session.flush()
            session.commit()
        assert log.read() == list(range(10))

    def test_ttl(self, make: sessionmaker[Session], database_url: str) -> None:
        with make() as session:
            publish(session, "room", {"n": 1}, ttl=3600)
            publish(session, "room", {"n": 2})
            session.commit()
        with psycopg.connect(database_url) as connection:
            rows = connection.execute(
                "select extract(epoch from expires_at - created_at)::int from pgchannels.outbox"
                " order by id"
            ).fetchall()
        assert rows == [(3600,), (None,)]

    def test_what_the_session_holds_is_the_applications(self, make: sessionmaker[Session]) -> None:
        with make() as session:
            publish(session, "room", {"n": 1})
            session.flush()
            assert not session.new
            assert not list(session)

    def test_refusals_write_nothing(self, make: sessionmaker[Session], log: Log) -> None:
        with make() as session:
            publish(session, "room", {"n": 1})
            with pytest.raises(InvalidChannel):
                publish(session, "no channel", {})
            with pytest.raises(InvalidPayload):
                publish(session, "room", {"n": float("nan")})
            with pytest.raises(MessageTooLarge):
                publish(session, "room", {"n": "x" * 1024 * 1024})
            with pytest.raises(InvalidMessage):
                publish(session, "room", {}, ttl=-1)
            session.commit()
        assert log.read() == [1]

    def test_the_payload_is_that_of_the_call(self, make: sessionmaker[Session], log: Log) -> None:
        payload = {"n": 1}
        with make() as session:
            publish(session, "room", payload)
            payload["n"] = 2
            session.commit()
        assert log.read() == [1]


class TestRetrying:
    @pytest.mark.parametrize("end", [Session.commit, Session.flush])
    def test_on_the_same_session_after_no_connection_could_be_had(
        self, engine: sa.Engine, counter: WakeCounter, log: Log, end: Callable[[Session], None]
    ) -> None:
        failures: list[Exception] = [psycopg.OperationalError("connection refused")]

        @event.listens_for(engine, "do_connect")
        def refuse(*_: object) -> None:
            if failures:
                raise failures.pop()

        maker = sessionmaker(engine)
        install(maker, counter.layer)
        with maker() as session:
            session.add(order())
            publish(session, "room", {"n": 1})
            publish(session, "room", {"n": 2})
            with pytest.raises(sa.exc.OperationalError, match="connection refused"):
                end(session)
            assert counter.woken == 0
            publish(session, "room", {"n": 3})
            session.commit()
            assert counter.woken == 1
            session.commit()
        assert log.orders() == 1
        assert log.read() == [1, 2, 3]


class TestRouting:
    """Sessions that choose an engine themselves: SQLAlchemy's Custom Vertical Partitioning."""

    def routing(self, leader: sa.Engine, replica: sa.Engine) -> type[Session]:
        class Routing(Session):
            def get_bind(self, mapper: Any = None, *, clause: Any = None, **_: Any) -> sa.Engine:
                if mapper is not None:
                    assert issubclass(mapper.class_, object)  # of a mapper, not of a class
                if self._flushing or isinstance(clause, sa.Update | sa.Delete):
                    return leader
                return replica

        return Routing

    async def test_publishing_and_acknowledging_go_where_writes_go(
        self, engine: sa.Engine, settings: Settings, log: Log
    ) -> None:
        # Refuses what writes, as a replica does.
        read_only = {"options": "-c default_transaction_read_only=on"}
        replica = sa.create_engine(engine.url, poolclass=NullPool, connect_args=read_only)
        maker = sessionmaker(class_=self.routing(engine, replica))
        async with PostgresLayer(settings) as layer:
            install(maker, layer)
            with maker() as session:
                session.add(order())
                publish(session, "room", {"n": 1})
                session.commit()
                publish(session, "room", {"n": 2})
                session.commit()
            async with layer.follow("room", name="billing", after="0") as batches:
                batch = await anext(aiter(batches))
                with maker.begin() as session:
                    await batch.ack(session)
            (follower,) = await layer.followers()
        assert follower.position == batch[-1].position
        assert log.read() == [1, 2]

    async def test_of_async_sessions(
        self, async_engine: AsyncEngine, settings: Settings, log: Log
    ) -> None:
        read_only = {"server_settings": {"default_transaction_read_only": "on"}}
        replica = create_async_engine(async_engine.url, poolclass=NullPool, connect_args=read_only)
        maker = async_sessionmaker(
            sync_session_class=self.routing(async_engine.sync_engine, replica.sync_engine)
        )
        async with PostgresLayer(settings) as layer:
            install(maker, layer)
            async with maker() as session:
                session.add(order())
                publish(session, "room", {"n": 1})
                await session.commit()
            async with layer.follow("room", name="billing", after="0") as batches:
                batch = await anext(aiter(batches))
                async with maker.begin() as session:
                    await batch.ack(session)
            (follower,) = await layer.followers()
        assert follower.position == batch[-1].position
        assert log.read() == [1]


class TestOrder:
    """Of two transactions that change the same row, the one that had to wait comes second."""

    async def test_of_two_that_change_the_same_row(
        self, make: sessionmaker[Session], database_url: str, log: Log
    ) -> None:
        with make() as session:
            session.add(order(id=0))
            session.commit()

        def second() -> None:
            with make() as session:
                session.get_one(Order, 0).name = "second"
                publish(session, "room", {"n": "second"})
                session.commit()

        def is_waiting() -> bool:
            with psycopg.connect(database_url) as connection:
                waiting = connection.execute(
                    "select from pg_stat_activity"
                    " where datname = current_database() and wait_event_type = 'Lock'"
                )
                return waiting.rowcount > 0

        with make() as first, ThreadPoolExecutor(1) as pool:
            first.get_one(Order, 0).name = "first"
            first.flush()
            waiting = pool.submit(second)
            try:
                await eventually(is_waiting)
                publish(first, "room", {"n": "first"})
                first.commit()
            finally:
                first.close()
            waiting.result(20)
        with make() as session:
            assert session.get_one(Order, 0).name == "second"
        assert log.read() == ["first", "second"]

    @pytest.mark.parametrize("first", [True, False])
    def test_published_from_before_flush(
        self, engine: sa.Engine, counter: WakeCounter, first: bool, log: Log
    ) -> None:
        statements: list[str] = []
        event.listen(engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
        maker = sessionmaker(engine)

        def flushing(session: Session, *_: Any) -> None:
            publish(session, "room", {"n": len(session.dirty)})

        if first:
            event.listen(maker, "before_flush", flushing)
        install(maker, counter.layer)
        if not first:
            event.listen(maker, "before_flush", flushing)
        with maker() as session:
            session.add(order())
            publish(session, "room", {"n": "call"})
            session.commit()
        assert ["outbox" in statement for statement in statements] == [False, True]
        assert log.read() == ["call", 0]


class TestEvents:
    """Publishing from inside a flush, where nothing may be added to the session."""

    @pytest.fixture
    def listen(self) -> Iterator[Callable[..., None]]:
        """Like event.listen(), but only for this test."""
        listening: list[tuple[Any, str, Any]] = []

        def listen(target: Any, name: str, function: Callable[..., None]) -> None:
            event.listen(target, name, function)
            listening.append((target, name, function))

        yield listen
        for registered in listening:
            event.remove(*registered)

    def test_from_mapper_events(
        self, make: sessionmaker[Session], log: Log, listen: Callable[..., None]
    ) -> None:
        def inserted(mapper: Any, connection: Any, target: Order) -> None:
            session = orm.object_session(target)
            assert session is not None
            publish(session, "room", {"n": target.name})

        listen(Order, "after_insert", inserted)
        with make() as session:
            publish(session, "room", {"n": "first"})
            session.add_all([order(name="a"), order(name="b")])
            publish(session, "room", {"n": "second"})
            session.commit()
            savepoint = session.begin_nested()
            session.add(order(name="c"))
            session.flush()
            savepoint.rollback()
            session.add(order(name="d"))
            session.commit()
            session.add(order(name="e"))
            session.flush()
            session.rollback()
        assert log.read() == ["first", "second", "a", "b", "d"]

    @pytest.mark.parametrize("name", ["before_flush", "after_flush", "after_flush_postexec"])
    @pytest.mark.parametrize("first", [True, False])
    def test_from_flush_events(
        self,
        engine: sa.Engine,
        counter: WakeCounter,
        log: Log,
        listen: Callable[..., None],
        name: str,
        first: bool,
    ) -> None:
        maker = sessionmaker(engine)
        left = ["event"]

        def flushing(session: Session, *_: Any) -> None:
            if left:
                publish(session, "room", {"n": left.pop()})

        if first:
            listen(maker, name, flushing)
        install(maker, counter.layer)
        if not first:
            listen(maker, name, flushing)
        with maker() as session:
            publish(session, "room", {"n": "call"})
            session.add(order())
            session.commit()
            publish(session, "room", {"n": "later"})
            session.commit()
        assert log.read() == ["call", "event", "later"]

    def test_from_the_end_of_each_flush(
        self, make: sessionmaker[Session], log: Log, listen: Callable[..., None]
    ) -> None:
        # A commit flushes until nothing is left to be flushed.
        listen(
            make, "after_flush_postexec", lambda session, _: publish(session, "room", {"n": "end"})
        )
        with make() as session:
            session.add(order())
            publish(session, "room", {"n": 1})
            session.commit()
            publish(session, "room", {"n": 2})
            session.commit()
        assert log.read() == [1, "end", 2]

    def test_a_refusal_before_the_flush_loses_nothing(
        self, make: sessionmaker[Session], log: Log, listen: Callable[..., None]
    ) -> None:
        def refuse(session: Session, *_: Any) -> None:
            publish(session, "room", {"n": "event"})
            if any(one.name == "bad" for one in session.new if isinstance(one, Order)):
                raise Stop

        listen(make, "before_flush", refuse)
        with make() as session:
            one = order(name="bad")
            session.add(one)
            publish(session, "room", {"n": 1})
            with pytest.raises(Stop):
                session.flush()
            session.expunge(one)
            session.commit()
        assert log.read() == [1, "event", "event"]

    def test_a_flush_that_is_left_without_work_loses_nothing(
        self, make: sessionmaker[Session], log: Log, listen: Callable[..., None]
    ) -> None:
        def expunge(session: Session, *_: Any) -> None:
            for one in session.new:
                if isinstance(one, Order):
                    session.expunge(one)

        listen(make, "before_flush", expunge)
        with make() as session:
            session.add(order())
            publish(session, "room", {"n": 1})
            session.commit()
        assert log.read() == [1]
        assert log.orders() == 0

    @pytest.mark.parametrize("name", ["after_flush", "after_flush_postexec"])
    def test_after_a_flush_that_failed_at_its_end(
        self,
        engine: sa.Engine,
        counter: WakeCounter,
        log: Log,
        listen: Callable[..., None],
        name: str,
    ) -> None:
        failures = [Stop()]
        maker = sessionmaker(engine)

        def flushing(session: Session, *_: Any) -> None:
            publish(session, "room", {"n": "event"})

        def fail(*_: Any) -> None:
            if failures:
                raise failures.pop()

        listen(maker, "before_flush", flushing)
        if name == "after_flush_postexec":
            listen(maker, name, fail)
        install(maker, counter.layer)
        if name == "after_flush":
            listen(maker, name, fail)
        with maker() as session:
            savepoint = session.begin_nested()
            session.add(order())
            publish(session, "room", {"n": 1})
            with pytest.raises(Stop):
                session.flush()
            savepoint.rollback()
            session.add(order())
            publish(session, "room", {"n": 2})
            session.commit()
        assert log.read() == [2, "event"]

    def test_from_before_commit(
        self, make: sessionmaker[Session], log: Log, listen: Callable[..., None]
    ) -> None:
        listen(make, "before_commit", lambda session: publish(session, "room", {"n": "last"}))
        with make() as session:
            publish(session, "room", {"n": "first"})
            session.commit()
        assert log.read() == ["first", "last"]

    async def test_from_an_async_sessions_flush(
        self,
        async_engine: AsyncEngine,
        counter: WakeCounter,
        log: Log,
        listen: Callable[..., None],
    ) -> None:
        def inserted(mapper: Any, connection: Any, target: Order) -> None:
            session = orm.object_session(target)
            assert session is not None
            publish(session, "room", {"n": target.name})

        listen(Order, "after_insert", inserted)
        maker = async_sessionmaker(async_engine)
        install(maker, counter.layer)
        async with maker() as session:
            session.add(order(name="a"))
            await session.commit()
        assert log.read() == ["a"]


class TestInstalling:
    def test_a_class_in_the_place_of_another(
        self, engine: sa.Engine, counter: WakeCounter, log: Log
    ) -> None:
        # A new class may lie where one lay that is gone; events must not be taken for attached.
        for n in range(5):
            maker = sessionmaker(engine)
            install(maker, counter.layer)
            with maker() as session:
                publish(session, "room", {"n": n})
                session.commit()
            del maker, session
            gc.collect()
        assert counter.woken == 5
        assert log.read() == list(range(5))

    def test_sqlite_is_refused(self, settings: Settings) -> None:
        maker = sessionmaker(sa.create_engine("sqlite://", poolclass=NullPool))
        install(maker, settings=settings)
        with maker() as session:
            with pytest.raises(ConfigurationError, match="sqlite"):
                publish(session, "room", {})
            assert not session.new

    @pytest.mark.parametrize("level", ["engine", "execution option", "connection", "later"])
    def test_autocommit_is_refused(
        self, engine: sa.Engine, settings: Settings, log: Log, level: str
    ) -> None:
        connection = None
        bind: sa.Engine | sa.Connection = engine
        if level == "engine":
            bind = sa.create_engine(engine.url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
        elif level == "execution option":
            bind = engine.execution_options(isolation_level="AUTOCOMMIT")
        elif level == "connection":
            bind = connection = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        maker = sessionmaker(bind)
        install(maker, settings=settings)
        with maker() as session:
            if level == "later":
                session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
            publish(session, "room", {"n": 1})
            session.add(order())
            with pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
                session.commit()
            session.rollback()
        if connection is not None:
            connection.close()
        assert log.read() == []
        assert log.orders() == 0

    async def test_autocommit_is_refused_with_asyncpg(
        self, async_engine: AsyncEngine, settings: Settings, log: Log
    ) -> None:
        maker = async_sessionmaker(async_engine.execution_options(isolation_level="AUTOCOMMIT"))
        install(maker, settings=settings)
        async with maker() as session:
            publish(session, "room", {"n": 1})
            with pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
                await session.commit()
        assert log.read() == []

    def test_autocommit_is_refused_inside_a_flush(
        self, engine: sa.Engine, settings: Settings, log: Log
    ) -> None:
        maker = sessionmaker(engine.execution_options(isolation_level="AUTOCOMMIT"))
        install(maker, settings=settings)

        def flushing(session: Session, *_: Any) -> None:
            publish(session, "room", {"n": 1})

        event.listen(maker, "before_flush", flushing)
        with maker() as session:
            session.add(order())
            with pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
                session.commit()
        assert log.read() == []

    def test_other_isolation_levels(self, engine: sa.Engine, settings: Settings, log: Log) -> None:
        for n, level in enumerate(("SERIALIZABLE", "REPEATABLE READ", "READ COMMITTED")):
            maker = sessionmaker(engine.execution_options(isolation_level=level))
            install(maker, settings=settings)
            with maker() as session:
                publish(session, "room", {"n": n})
                session.commit()
        assert log.read() == [0, 1, 2]

    def test_not_installed(self, engine: sa.Engine) -> None:
        for session in (sessionmaker(engine)(), Session(engine)):
            with session, pytest.raises(ConfigurationError, match=r"install\(\)"):
                publish(session, "room", {})

    @pytest.mark.parametrize("target", [None, Session.commit, object, int, "Session"])
    def test_no_targets(self, target: Any, settings: Settings) -> None:
        with pytest.raises(ConfigurationError, match="sessionmaker"):
            install(target, settings=settings)

    @pytest.mark.parametrize("session", [None, Session, object(), "session"])
    def test_no_sessions(self, session: Any) -> None:
        with pytest.raises(ConfigurationError, match="session"):
            publish(session, "room", {})

    def test_binds_for_some_classes_only(self, engine: sa.Engine, settings: Settings) -> None:
        maker = sessionmaker(binds={Order: engine})
        install(maker, settings=settings)
        with maker() as session, pytest.raises(ConfigurationError, match="bind"):
            publish(session, "room", {})

    def test_others_are_left_alone(self, engine: sa.Engine, settings: Settings) -> None:
        ours, theirs = sessionmaker(engine), sessionmaker(engine)
        install(ours, settings=settings)
        with theirs() as session:
            with pytest.raises(ConfigurationError):
                publish(session, "room", {})
            session.add(order())
            session.commit()

    def test_twice_publishes_once(self, engine: sa.Engine, counter: WakeCounter, log: Log) -> None:
        maker = sessionmaker(engine)
        install(maker, counter.layer)
        install(maker, counter.layer)
        with maker() as session:
            publish(session, "room", {"n": 1})
            session.commit()
        assert log.read() == [1]
        assert counter.woken == 1

    async def test_twice_on_an_async_maker(
        self, async_engine: AsyncEngine, counter: WakeCounter, log: Log
    ) -> None:
        maker = async_sessionmaker(async_engine)
        install(maker, counter.layer)
        other = WakeCounter(counter.settings)
        install(maker, other.layer)
        async with maker() as session:
            publish(session, "room", {"n": 1})
            await session.commit()
        assert log.read() == [1]
        assert (counter.woken, other.woken) == (0, 1)

    def test_another_layer_replaces_the_first(
        self, engine: sa.Engine, counter: WakeCounter
    ) -> None:
        maker = sessionmaker(engine)
        install(maker, counter.layer)
        other = WakeCounter(counter.settings)
        install(maker, other.layer)
        with maker() as session:
            publish(session, "room", {"n": 1})
            session.commit()
        assert (counter.woken, other.woken) == (0, 1)

    def test_a_subclass_of_an_installed_class(
        self, engine: sa.Engine, counter: WakeCounter, log: Log
    ) -> None:
        class Parent(Session):
            pass

        class Child(Parent):
            pass

        install(Parent, counter.layer)
        other = WakeCounter(counter.settings)
        install(Child, other.layer)
        with Child(engine) as session:
            publish(session, "room", {"n": 1})
            session.commit()
        with Parent(engine) as parent:
            publish(parent, "room", {"n": 2})
            parent.commit()
        assert log.read() == [1, 2]
        assert (counter.woken, other.woken) == (1, 1)

    def test_another_schema(self, engine: sa.Engine, database_url: str) -> None:
        settings = Settings(database_url=database_url, schema_name="other")
        upgrade(settings)
        maker = sessionmaker(engine)
        install(maker, settings=settings)
        with maker() as session:
            publish(session, "room", {"n": 1})
            session.commit()
        with closing(Log(database_url, "other")) as log, closing(Log(database_url)) as usual:
            assert (log.read(), usual.read()) == ([1], [])


class TestWaking:
    def test_after_the_commit_of_the_whole(
        self, make: sessionmaker[Session], counter: WakeCounter
    ) -> None:
        with make() as session:
            with session.begin_nested():
                publish(session, "room", {"n": 1})
            session.flush()
            assert counter.woken == 0
            session.commit()
            assert counter.woken == 1
            session.add(order())
            session.commit()
            assert counter.woken == 1

    def test_not_after_a_rollback(self, make: sessionmaker[Session], counter: WakeCounter) -> None:
        with make() as session:
            publish(session, "room", {"n": 1})
            session.flush()
            session.rollback()
            session.add(order())
            session.commit()
        assert counter.woken == 0

    def test_not_for_what_a_savepoint_took_back(
        self, make: sessionmaker[Session], counter: WakeCounter, log: Log
    ) -> None:
        with make() as session:
            publish(session, "room", {"n": 1})
            savepoint = session.begin_nested()
            publish(session, "room", {"n": 2})
            session.flush()
            savepoint.rollback()
            session.commit()
        assert counter.woken == 1  # for the first
        assert log.read() == [1]

    def test_a_failure_to_wake_harms_nothing(
        self,
        make: sessionmaker[Session],
        counter: WakeCounter,
        log: Log,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        counter.error = RuntimeError("no loop")
        with make() as session:
            publish(session, "room", {"n": 1})
            session.commit()
            assert "no loop" in caplog.text
            publish(session, "room", {"n": 2})
            session.commit()
        assert log.read() == [1, 2]
        assert counter.woken == 2

    def test_without_a_layer(self, engine: sa.Engine, settings: Settings, log: Log) -> None:
        maker = sessionmaker(engine)
        install(maker, settings=settings)
        with maker() as session:
            publish(session, "room", {"n": 1})
            session.commit()
        assert log.read() == [1]

    def test_from_another_thread(self, engine: sa.Engine, database_url: str, log: Log) -> None:
        layer = PostgresLayer(database_url)  # one that is not open
        maker = sessionmaker(engine)
        install(maker, layer)
        with maker() as session:
            publish(session, "room", {"n": 1})
            session.commit()
        assert log.read() == [1]


class TestWhatAMessageCanCarry:
    """Headers, bytes and a serialiser of one's own, by one insert for all that are flushed."""

    async def read(self, database_url: str, count: int) -> list[Message]:
        async with (
            PostgresLayer(Settings(database_url=database_url), serializer=Tagged()) as layer,
            layer.subscribe("room", after="0") as stream,
            asyncio.timeout(10),
        ):
            messages: list[Message] = []
            while len(messages) < count:
                messages += await stream.batch()
        return messages

    async def test_sync(self, make: sessionmaker[Session], database_url: str, log: Log) -> None:
        with make() as session:
            publish(session, "room", {"n": 1, "b": b"\0\xff"}, headers={"trace": "é"})
            publish(session, "room", {"n": 2})
            publish(session, "room", {"n": 3, "b": [b"", {"c/d": b"x" * 5000}]})
            publish(session, "room", {"n": 4}, headers={"trace": "C:\\users"})
            session.commit()
        messages = await self.read(database_url, 4)
        assert [message.data["n"] for message in messages] == [1, 2, 3, 4]
        assert messages[0]["b"] == b"\0\xff"
        assert messages[2]["b"] == [b"", {"c/d": b"x" * 5000}]
        assert [message.headers.get("trace") for message in messages] == [
            "é",
            None,
            None,
            "C:\\users",
        ]

    async def test_async(
        self, async_engine: AsyncEngine, settings: Settings, database_url: str
    ) -> None:
        maker = async_sessionmaker(async_engine)
        install(maker, settings=settings)
        async with maker() as session:
            publish(session, "room", {"n": 1, "b": bytearray(b"x")})
            publish(session, "room", {"n": 2})
            await session.commit()
        messages = await self.read(database_url, 2)
        assert [message.data["n"] for message in messages] == [1, 2]
        assert messages[0]["b"] == b"x"

    @pytest.mark.parametrize(
        "headers",
        [{"a": 1}, {1: "a"}, {"pgchannels-only": "[]"}, {"a": "b\0"}, {"a": "b" * 9000}],
    )
    def test_bad_headers(self, make: sessionmaker[Session], headers: Any) -> None:
        with make() as session, pytest.raises(InvalidMessage):
            publish(session, "room", {"n": 1}, headers=headers)

    async def test_a_serialiser_of_ones_own(
        self, make: sessionmaker[Session], counter: WakeCounter, database_url: str, log: Log
    ) -> None:
        counter.serializer = Tagged()
        with make() as session:
            publish(session, "room", {"n": 1, "price": Decimal("1.10"), "b": b"x"})
            session.commit()
        (message,) = await self.read(database_url, 1)
        assert message.data == {"n": 1, "price": Decimal("1.10"), "b": b"x"}


class Tagged:
    """Knows decimals."""

    def dumps(self, payload: Mapping[str, Any]) -> str:
        def tag(value: object) -> object:
            if isinstance(value, Decimal):
                return {"decimal": str(value)}
            raise TypeError(f"not {value!r}")

        return json.dumps(payload, default=tag)

    def loads(self, text: str) -> dict[str, Any]:
        def untag(found: dict[str, Any]) -> Any:
            return Decimal(found["decimal"]) if found.keys() == {"decimal"} else found

        loaded: dict[str, Any] = json.loads(text, object_hook=untag)
        return loaded
