"""publish() in each of SQLAlchemy's session events: what it accepts commits, or is rolled back."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing, suppress
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy import event, orm
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Mapped, Session, SessionEvents, mapped_column, sessionmaker

from pgchannels import ConfigurationError, Settings
from pgchannels.orm import install, publish
from pgchannels.orm.outbox import Entry
from tests.support.sessions import Log, Make, WakeCounter

EVENTS = sorted(
    name
    for name, value in vars(SessionEvents).items()
    if not name.startswith("_") and name != "dispatch"
)


class Base(orm.DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "items"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    other: Mapped[int | None] = mapped_column(
        sa.ForeignKey("items.id", deferrable=True, initially="DEFERRED")
    )


numbers = itertools.count(1)


def item(**values: Any) -> Item:
    n = next(numbers)
    return Item(**{"id": n, "name": str(n), **values})


@pytest.fixture
def counter(database_url: str) -> WakeCounter:
    return WakeCounter(Settings(database_url=database_url))


@pytest.fixture
def engine(database_url: str) -> Iterator[sa.Engine]:
    # With room for one connection: nobody may ask for another one while holding it.
    engine = sa.create_engine(
        database_url.replace("postgresql:", "postgresql+psycopg:"),
        pool_size=1,
        max_overflow=0,
        pool_timeout=10,
    )
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
async def async_engine(engine: sa.Engine, database_url: str) -> AsyncIterator[AsyncEngine]:
    created = create_async_engine(
        database_url.replace("postgresql:", "postgresql+asyncpg:"),
        pool_size=1,
        max_overflow=0,
        pool_timeout=10,
    )
    yield created
    await created.dispose()


@pytest.fixture
def log(database_url: str, engine: sa.Engine) -> Iterator[Log]:
    with closing(Log(database_url)) as log:
        yield log


class Stop(Exception):
    """Ends a block."""


def work(session: Session) -> None:
    """Come by every event there is, but for those of the end."""
    first, second = session.scalars(sa.select(Item).order_by(Item.id).limit(2)).all()
    session.execute(sa.update(Item).where(Item.id == 0).values(name="0"))
    session.execute(sa.delete(Item).where(Item.id == 0))
    session.add(item())
    session.flush()
    session.delete(first)
    session.flush()
    with session.begin_nested():
        session.add(item())
    savepoint = session.begin_nested()
    session.add(item())
    session.delete(second)
    session.flush()
    savepoint.rollback()
    session.expunge(second)
    session.add(second)
    pending = item()
    session.add(pending)
    session.expunge(pending)


def commit(session: Session) -> None:
    work(session)
    session.commit()
    session.close()


def commit_twice(session: Session) -> None:
    work(session)
    session.commit()
    work(session)
    session.commit()
    session.close()


def commit_without_a_statement(session: Session) -> None:
    session.begin()
    session.commit()
    session.close()


def commit_with_an_open_savepoint(session: Session) -> None:
    work(session)
    session.begin_nested()
    session.add(item())
    session.commit()
    session.close()


def block(session: Session) -> None:
    with session, session.begin():
        work(session)


def block_left_by_an_exception(session: Session) -> None:
    with suppress(Stop), session, session.begin():
        work(session)
        raise Stop


def rollback(session: Session) -> None:
    work(session)
    session.rollback()
    session.close()


def rollback_with_an_open_savepoint(session: Session) -> None:
    work(session)
    session.begin_nested()
    session.add(item())
    session.flush()
    session.rollback()
    session.close()


def close(session: Session) -> None:
    work(session)
    session.close()


def close_without_a_statement(session: Session) -> None:
    session.begin()
    session.close()


def close_with_an_open_savepoint(session: Session) -> None:
    work(session)
    session.begin_nested()
    session.add(item())
    session.close()
    # Nothing of that turns up in another transaction of the same session.
    session.commit()


def flush_fails(session: Session) -> None:
    work(session)
    name = session.scalars(sa.select(Item.name)).first()
    session.add(item(name=name))
    with pytest.raises(IntegrityError):
        session.flush()
    session.rollback()
    work(session)
    session.commit()
    session.close()


def flush_fails_in_a_savepoint(session: Session) -> None:
    work(session)
    name = session.scalars(sa.select(Item.name)).first()
    with pytest.raises(IntegrityError), session.begin_nested():
        session.add(item(name=name))
    session.commit()
    session.close()


def commit_fails(session: Session) -> None:
    work(session)
    session.add(item(other=10**6))  # a constraint that is looked at when committing
    with pytest.raises(IntegrityError):
        session.commit()
    session.rollback()
    session.close()


def prepare_and_commit(session: Session) -> None:
    work(session)
    session.prepare()
    session.commit()
    session.close()


def prepare_and_roll_back(session: Session) -> None:
    work(session)
    session.prepare()
    session.rollback()
    session.close()


ENDINGS = [
    commit,
    commit_twice,
    commit_without_a_statement,
    commit_with_an_open_savepoint,
    block,
    block_left_by_an_exception,
    rollback,
    rollback_with_an_open_savepoint,
    close,
    close_without_a_statement,
    close_with_an_open_savepoint,
    flush_fails,
    flush_fails_in_a_savepoint,
    commit_fails,
]


class Publishing:
    """Publishes in one of the events of a class, and notes what should become of it."""

    def __init__(self) -> None:
        self.accepted: dict[int, list[orm.SessionTransaction]] = {}
        self.refusals: list[str] = []
        self._committed: set[orm.SessionTransaction] = set()
        self._is_publishing = False

    def listen(self, session_class: Any, name: str) -> None:
        def called(*args: Any) -> None:
            if not self._is_publishing and not any(isinstance(arg, Entry) for arg in args):
                session = args[0] if isinstance(args[0], Session) else args[0].session
                self._is_publishing = True
                self._publish(session)
                self._is_publishing = False

        event.listen(session_class, name, called)

    def watch(self, session_class: Any) -> None:
        @event.listens_for(session_class, "after_commit")
        def committed(session: Session) -> None:
            transaction = session.get_nested_transaction() or session.get_transaction()
            assert transaction is not None
            self._committed.add(transaction)

    def _publish(self, session: Session) -> None:
        n = next(numbers)
        try:
            publish(session, "room", {"n": n})
        except ConfigurationError as error:
            self.refusals.append(str(error))
            return
        transaction = session._transaction
        chain = self.accepted[n] = []
        while transaction is not None:
            if transaction.parent is None or transaction.nested:
                chain.append(transaction)
            transaction = transaction.parent

    def expected(self) -> set[int]:
        """All that was accepted, but for what was in a transaction that was not committed."""
        return {n for n, chain in self.accepted.items() if self._committed.issuperset(chain)}


def fill(engine: sa.Engine) -> None:
    """Add the two items that :func:`work` is about."""
    with Session(engine) as session:
        session.add_all([item(), item()])
        session.commit()


def tried(
    make_class: Callable[[], type[Session]],
    run: Callable[[type[Session]], None],
    engine: sa.Engine,
    counter: WakeCounter,
    log: Log,
    *,
    first: bool,
) -> dict[str, Any]:
    """Publish in each event; return what was found and expected, where the two differ."""
    wrong = {}
    seen = called = 0
    for name in EVENTS:
        fill(engine)
        session_class = make_class()
        publishing = Publishing()
        if first:
            publishing.listen(session_class, name)
        install(session_class, counter.layer)
        if not first:
            publishing.listen(session_class, name)
        publishing.watch(session_class)
        run(session_class)
        called += len(publishing.accepted) + len(publishing.refusals)
        assert all("Publish" in refusal for refusal in publishing.refusals)  # what to do instead
        found, expected = log.read()[seen:], sorted(publishing.expected())
        seen += len(found)
        if found != expected:
            wrong[name] = found, expected
    assert called > 0
    return wrong


def session_class() -> type[Session]:
    return type("Session", (Session,), {})


# A listener may be called before ours, or after.
BEFORE = [pytest.param(ending, True, id=ending.__name__) for ending in ENDINGS]
AFTER = [
    pytest.param(ending, False, id=f"{ending.__name__}, listening last")
    for ending in (commit, block_left_by_an_exception, close, flush_fails)
]


@pytest.mark.parametrize(("ending", "first"), BEFORE + AFTER)
def test_every_event_and_every_ending(
    engine: sa.Engine,
    counter: WakeCounter,
    log: Log,
    ending: Callable[[Session], None],
    first: bool,
) -> None:
    def run(session_class: type[Session]) -> None:
        ending(session_class(engine))

    assert tried(session_class, run, engine, counter, log, first=first) == {}


@pytest.mark.parametrize("ending", [commit, rollback, prepare_and_commit, prepare_and_roll_back])
def test_every_event_in_two_phases(
    engine: sa.Engine, counter: WakeCounter, log: Log, ending: Callable[[Session], None]
) -> None:
    def run(session_class: type[Session]) -> None:
        ending(session_class(engine, twophase=True))

    assert tried(session_class, run, engine, counter, log, first=True) == {}


@pytest.mark.parametrize("ending", [commit, block, rollback, close_with_an_open_savepoint])
async def test_every_event_of_an_async_session(
    engine: sa.Engine,
    async_engine: AsyncEngine,
    counter: WakeCounter,
    log: Log,
    ending: Callable[[Session], None],
) -> None:
    loop = asyncio.get_running_loop()

    async def run_async(session_class: type[Session]) -> None:
        async with AsyncSession(async_engine, sync_session_class=session_class) as session:
            await session.run_sync(ending)

    def run(session_class: type[Session]) -> None:
        asyncio.run_coroutine_threadsafe(run_async(session_class), loop).result(60)

    wrong = await asyncio.to_thread(tried, session_class, run, engine, counter, log, first=True)
    assert wrong == {}


@pytest.fixture
def make(engine: sa.Engine, counter: WakeCounter) -> sessionmaker[Session]:
    maker = sessionmaker(engine)
    install(maker, counter.layer)
    return maker


def publish_at(target: Any, name: str, *ns: int) -> list[Exception]:
    """Publish in the event *name* of *target*, once each; return the list of what is raised."""
    left = list(ns)
    raised: list[Exception] = []

    def called(session: Session, *args: Any) -> None:
        if args and args[0].parent is not None:
            return  # the end of a flush
        while left:
            try:
                publish(session, "room", {"n": left.pop(0)})
            except ConfigurationError as error:
                raised.append(error)
                raise

    event.listen(target, name, called)
    return raised


class TestAfterTheCommit:
    """A transaction of its own, at once: when commit() returns, the message has been published."""

    def in_a_block(self, make: Make) -> None:
        with make() as session, session.begin():
            session.add(item())

    def in_an_outer_block(self, make: Make) -> None:
        with make() as session:
            session.add(item())
            session.commit()

    def and_closed(self, make: Make) -> None:
        session = make()
        session.add(item())
        session.commit()
        session.close()

    def and_used_again(self, make: Make) -> None:
        session = make()
        session.add(item())
        session.commit()
        session.scalars(sa.select(Item)).all()
        session.rollback()
        session.close()

    def and_left_open(self, make: Make) -> None:
        session = make()
        session.add(item())
        session.commit()

    @pytest.mark.parametrize("name", ["after_commit", "after_transaction_end"])
    @pytest.mark.parametrize(
        "use", [in_a_block, in_an_outer_block, and_closed, and_used_again, and_left_open]
    )
    def test_is_published_whatever_becomes_of_the_session(
        self,
        make: sessionmaker[Session],
        counter: WakeCounter,
        log: Log,
        name: str,
        use: Callable[[Any, Make], None],
    ) -> None:
        publish_at(make, name, 1, 2)
        use(self, make)
        assert log.read() == [1, 2]
        assert counter.woken == (1 if name == "after_commit" else 2)

    async def test_of_an_async_session(
        self, async_engine: AsyncEngine, counter: WakeCounter, log: Log
    ) -> None:
        maker = async_sessionmaker(async_engine)
        install(maker, counter.layer)
        publish_at(maker.kw["sync_session_class"], "after_commit", 2, 3)
        async with maker.begin() as session:
            publish(session, "room", {"n": 1})
        assert log.read() == [1, 2, 3]
        assert counter.woken == 2

    def test_in_the_order_of_the_calls(self, make: sessionmaker[Session], log: Log) -> None:
        publish_at(make, "after_transaction_end", 4, 5)
        publish_at(make, "after_commit", 2)
        publish_at(make, "after_commit", 3)
        with make() as session:
            publish(session, "room", {"n": 1})
            session.commit()
            publish(session, "room", {"n": 6})
            session.commit()
        assert log.read() == [1, 2, 3, 4, 5, 6]

    def test_each_commit_its_own(self, make: sessionmaker[Session], log: Log) -> None:
        event.listen(
            make, "after_commit", lambda session: publish(session, "room", {"n": session.info["n"]})
        )
        with make() as session:
            for n in range(3):
                session.info["n"] = n
                session.add(item())
                session.commit()
            session.info["n"] = "last"
        assert log.read() == [0, 1, 2]

    def test_a_message_is_what_it_is_elsewhere(
        self, make: sessionmaker[Session], database_url: str
    ) -> None:
        @event.listens_for(make, "after_commit")
        def committed(session: Session) -> None:
            publish(session, "room", {"n": 1, "b": b"x"}, ttl=60, headers={"a": "b"})

        with make.begin() as session:
            session.add(item())
        with psycopg.connect(database_url) as connection:
            rows = connection.execute(
                "select headers->>'a', attachments is null,"
                " extract(epoch from expires_at - created_at)::int from pgchannels.outbox"
            ).fetchall()
        assert rows == [("b", False, 60)]

    @pytest.mark.parametrize("level", ["AUTOCOMMIT", "SERIALIZABLE"])
    def test_whatever_the_engines_isolation_is(
        self,
        engine: sa.Engine,
        counter: WakeCounter,
        log: Log,
        level: Any,
    ) -> None:
        maker = sessionmaker(engine.execution_options(isolation_level=level))
        install(maker, counter.layer)
        levels: list[str] = []

        @event.listens_for(maker, "after_commit")
        def committed(session: Session) -> None:
            publish(session, "room", {"n": 1})

        @event.listens_for(engine, "before_cursor_execute")
        def look(connection: sa.Connection, _: Any, statement: str, *rest: Any) -> None:
            if "outbox" in statement:
                driver_connection: Any = connection.connection.dbapi_connection
                levels.append(connection.get_isolation_level())
                assert not driver_connection.autocommit

        with maker.begin() as session:
            session.add(item())
        assert levels == ["READ COMMITTED"]
        assert log.read() == [1]

    def test_its_key_is_claimed_once(self, make: sessionmaker[Session], log: Log) -> None:
        @event.listens_for(make, "after_commit")
        def committed(session: Session) -> None:
            publish(session, "room", {"n": session.info["n"]}, key="one")

        with make() as session:
            for n in range(3):
                session.info["n"] = n
                session.add(item())
                session.commit()
        assert log.read() == [0]

    def test_in_a_connections_transaction_it_shares_its_fate(
        self, engine: sa.Engine, counter: WakeCounter, log: Log
    ) -> None:
        """As a test has it that rolls back everything that an application does."""
        for mode in ("conditional_savepoint", "rollback_only", "create_savepoint"):
            for n, commits in enumerate((False, True)):
                with engine.connect() as connection, connection.begin() as transaction:
                    maker = sessionmaker(connection, join_transaction_mode=mode)
                    install(maker, counter.layer)
                    publish_at(maker, "after_commit", n)
                    with maker() as session:
                        session.add(item())
                        session.commit()
                    if not commits:
                        transaction.rollback()
        assert log.read() == [1, 1, 1]

    def test_on_a_connection_whose_transaction_the_session_has_committed(
        self, engine: sa.Engine, counter: WakeCounter, log: Log
    ) -> None:
        with engine.connect() as connection:
            maker = sessionmaker(connection)
            install(maker, counter.layer)
            publish_at(maker, "after_commit", 1)
            with maker() as session:
                session.add(item())
                session.commit()
            assert log.read() == [1]


class TestInARollback:
    @pytest.mark.parametrize(
        "name", ["after_rollback", "after_soft_rollback", "after_transaction_end"]
    )
    @pytest.mark.parametrize("end", [Session.rollback, Session.close])
    def test_it_is_refused(
        self, make: sessionmaker[Session], log: Log, name: str, end: Callable[[Session], None]
    ) -> None:
        raised = publish_at(make, name, 1)
        session = make()
        session.add(item())
        session.flush()
        if end is Session.close and name != "after_transaction_end":
            end(session)  # comes by neither of the other two
        else:
            with pytest.raises(ConfigurationError, match="in a session of its own"):
                end(session)
            assert len(raised) == 1
        # The session can be used, and so can its one connection.
        session.add(item())
        publish(session, "room", {"n": 2})
        session.commit()
        session.close()
        assert log.read() == [2]

    def test_a_session_of_its_own_can_tell_of_it(
        self, make: sessionmaker[Session], log: Log
    ) -> None:
        others: list[Session] = []

        @event.listens_for(make, "after_soft_rollback")
        def rolled_back(_: Session, transaction: orm.SessionTransaction) -> None:
            if transaction.parent is None and not others:
                others.append(make())
                with others[0] as other, other.begin():
                    publish(other, "room", {"n": 1})

        with suppress(Stop), make.begin() as session:
            session.add(item())
            raise Stop
        assert log.read() == [1]

    def test_it_is_refused_until_a_failed_flush_is_rolled_back(
        self, make: sessionmaker[Session], log: Log
    ) -> None:
        with make() as session:
            session.add_all([item(name="same"), item(name="same")])
            with pytest.raises(IntegrityError):
                session.flush()
            with pytest.raises(ConfigurationError, match=r"rollback\(\)"):
                publish(session, "room", {"n": 1})
            session.rollback()
            publish(session, "room", {"n": 2})
            session.commit()
        assert log.read() == [2]


class TestBetweenThePhases:
    def test_it_is_refused_when_prepared(
        self, engine: sa.Engine, counter: WakeCounter, log: Log
    ) -> None:
        maker = sessionmaker(engine, twophase=True)
        install(maker, counter.layer)
        with maker() as session:
            publish(session, "room", {"n": 1})
            session.prepare()
            with pytest.raises(ConfigurationError, match="before_commit"):
                publish(session, "room", {"n": 2})
            session.commit()
        assert log.read() == [1]

    def test_in_an_event_of_the_engine_it_is_published_or_refused(
        self, engine: sa.Engine, counter: WakeCounter, log: Log
    ) -> None:
        maker = sessionmaker(engine, twophase=True)
        install(maker, counter.layer)
        with maker() as session:
            left = [1]

            def called(*_: Any) -> None:
                if left:
                    publish(session, "room", {"n": left.pop()})

            event.listen(engine, "prepare_twophase", called)
            session.add(item())
            session.commit()
        assert log.read() == [1]
        with sessionmaker(engine)() as other:
            install(type(other), counter.layer)
            event.listen(engine, "commit", lambda _: publish(other, "room", {"n": 2}))
            other.add(item())
            with pytest.raises(ConfigurationError, match="being committed"):
                other.commit()


class TestWhenPostgresIsAway:
    """The commit has succeeded, so nothing is raised; a message that is lost is in the log."""

    def losses(self, caplog: pytest.LogCaptureFixture) -> list[str]:
        return [
            record.getMessage()
            for record in caplog.records
            if record.name == "pgchannels.orm" and record.levelno == logging.ERROR
        ]

    def test_a_connection_that_has_died_is_replaced(
        self,
        make: sessionmaker[Session],
        database_url: str,
        log: Log,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        publish_at(make, "after_commit", 1)

        @event.listens_for(make, "after_commit")
        def end_connection(_: Session) -> None:
            with psycopg.connect(database_url) as connection:
                ended = connection.execute(
                    "select pg_terminate_backend(pid, 10000) from pg_stat_activity"
                    " where datname = current_database() and query = 'COMMIT'"
                ).fetchall()
            assert ended == [(True,)]

        with make.begin() as session:
            session.add(item())
        assert log.read() == [1]
        assert not self.losses(caplog)

    def test_two_attempts_are_made(
        self,
        engine: sa.Engine,
        make: sessionmaker[Session],
        counter: WakeCounter,
        log: Log,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        attempts: list[str] = []
        publish_at(make, "after_commit", 1, 2)

        def fail(_: Any, __: Any, statement: str, *rest: Any) -> None:
            if "outbox" in statement:
                attempts.append(statement)
                raise psycopg.OperationalError("no server\nand this is a secret")

        event.listen(engine, "before_cursor_execute", fail)
        with make() as session:
            session.add(item())
            session.commit()
            event.remove(engine, "before_cursor_execute", fail)
            assert len(attempts) == 2
            assert self.losses(caplog) == [
                "2 messages that were published after a commit are lost, on room: no server"
            ]
            assert counter.woken == 0
            # The session goes on.
            session.add(item())
            publish(session, "room", {"n": 3})
            session.commit()
        assert log.read() == [3]

    def test_a_commit_of_unknown_outcome_is_not_repeated(
        self,
        engine: sa.Engine,
        make: sessionmaker[Session],
        log: Log,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        publish_at(make, "after_commit", 1)
        commits: list[None] = []

        @event.listens_for(engine, "commit")
        def fail(connection: sa.Connection) -> None:
            commits.append(None)
            if len(commits) == 2:
                connection.connection.dbapi_connection.commit()  # type: ignore[union-attr]
                raise psycopg.OperationalError("the answer is lost")

        with make.begin() as session:
            session.add(item())
        assert log.read() == [1]
        assert len(commits) == 2
        (line,) = self.losses(caplog)
        assert "may be lost" in line
        assert "the answer is lost" in line

    async def test_a_cancelled_task_publishes_first(
        self,
        async_engine: AsyncEngine,
        counter: WakeCounter,
        log: Log,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        maker = async_sessionmaker(async_engine)
        install(maker, counter.layer)
        publish_at(maker.kw["sync_session_class"], "after_commit", 1)

        async def commit() -> None:
            async with maker() as session:
                session.add(item())
                await session.commit()

        task = asyncio.create_task(commit())
        left = [None]

        @event.listens_for(async_engine.sync_engine, "before_cursor_execute")
        def cancel(_: Any, __: Any, statement: str, *rest: Any) -> None:
            if "outbox" in statement and left:
                left.pop()
                task.cancel()

        with pytest.raises(asyncio.CancelledError):
            await task
        assert log.read() == [1]
        assert not self.losses(caplog)
