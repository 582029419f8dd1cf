"""Objects of mapped classes publish what becomes of their rows, if it commits, and nothing else.

A trigger on the table writes down what really happened to each row, in the same transaction. The
log must agree with it, whatever the sessions went through.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from typing import Any, cast

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given
from hypothesis import settings as settings_
from hypothesis import strategies as st
from sqlalchemy import orm
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import NullPool

from pgchannels import Settings
from pgchannels.orm import install
from tests.support.orders import (
    ACTS,
    Act,
    Base,
    Checked,
    Customer,
    Order,
    Rows,
    order,
    prepare,
    publish_beside,
    replayed,
    told,
)
from tests.support.sessions import ALL_SHAPES, Log, Make, WakeCounter


@pytest.fixture
def settings(database_url: str) -> Settings:
    return Settings(database_url=database_url)


@pytest.fixture
def counter(settings: Settings) -> WakeCounter:
    return WakeCounter(settings)


@pytest.fixture
def engine(database_url: str) -> Iterator[sa.Engine]:
    engine = prepare(database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def log(database_url: str) -> Iterator[Log]:
    with closing(Log(database_url)) as log:
        yield log


@pytest.fixture
def rows(database_url: str, engine: sa.Engine) -> Iterator[Rows]:
    with closing(Rows(database_url)) as rows:
        yield rows


@pytest.fixture
def make(engine: sa.Engine, counter: WakeCounter) -> sessionmaker[Session]:
    maker = sessionmaker(engine)
    install(maker, counter.layer)
    return maker


# How it ends.

Ending = Callable[[Make, Act, int], None]


def commit(make: Make, act: Act, customer: int) -> None:
    session = make()
    act(session, customer)
    session.commit()
    session.close()


def savepoint_released(make: Make, act: Act, customer: int) -> None:
    session = make()
    with session.begin_nested():
        act(session, customer)
    session.commit()
    session.close()


def rollback(make: Make, act: Act, customer: int) -> None:
    session = make()
    act(session, customer)
    session.rollback()
    session.close()


def rollback_after_flush(make: Make, act: Act, customer: int) -> None:
    session = make()
    act(session, customer)
    session.flush()
    session.rollback()
    session.close()


def savepoint_rolled_back(make: Make, act: Act, customer: int) -> None:
    session = make()
    savepoint = session.begin_nested()
    act(session, customer)
    session.flush()
    savepoint.rollback()
    session.commit()
    session.close()


def flush_fails(make: Make, act: Act, customer: int) -> None:
    session = make()
    act(session, customer)
    session.add(order(id=-customer, customer_id=-1))
    with pytest.raises(IntegrityError):
        session.flush()
    session.rollback()
    session.close()


def flush_fails_in_a_savepoint(make: Make, act: Act, customer: int) -> None:
    session = make()
    savepoint = session.begin_nested()
    act(session, customer)
    session.add(order(id=-customer, customer_id=-1))
    with pytest.raises(IntegrityError):
        session.flush()
    savepoint.rollback()
    session.commit()
    session.close()


def close_without_commit(make: Make, act: Act, customer: int) -> None:
    session = make()
    act(session, customer)
    session.flush()
    session.close()


COMMITTING = [commit, savepoint_released]
ENDINGS = [
    *COMMITTING,
    rollback,
    rollback_after_flush,
    savepoint_rolled_back,
    flush_fails,
    flush_fails_in_a_savepoint,
    close_without_commit,
]


def commits(shape: Callable[..., Any], ending: Ending) -> bool:
    if ending is close_without_commit:
        # With these, a session that is closed leaves the outer transaction to go on.
        return shape.__name__ in ("joined_conditional_savepoint", "joined_rollback_only")
    return ending in COMMITTING


@pytest.fixture
def checked(engine: sa.Engine, log: Log, rows: Rows) -> Checked:
    return Checked(engine, log, rows)


def in_sync(session: Session, ending: Ending, act: Act, customer: int) -> None:
    ending(lambda: session, act, customer)


class TestMatrix:
    """Every shape of session, with everything that is done in it, in every way that it ends."""

    @pytest.mark.parametrize("shape", ALL_SHAPES)
    @pytest.mark.parametrize("ending", ENDINGS)
    def test_sync(
        self,
        engine: sa.Engine,
        counter: WakeCounter,
        checked: Checked,
        shape: Callable[..., Any],
        ending: Ending,
    ) -> None:
        for act in ACTS:
            with (
                checked.expecting(commits(shape, ending)) as customer,
                shape(engine, counter.layer) as make,
            ):
                ending(make, act, customer)

    @pytest.mark.parametrize("ending", ENDINGS)
    def test_with_the_models_engine(
        self, engine: sa.Engine, counter: WakeCounter, checked: Checked, ending: Ending
    ) -> None:
        maker = sessionmaker(binds={Base: engine})
        install(maker, counter.layer)
        for act in ACTS:
            if act is not publish_beside:  # which does not know to where
                with checked.expecting(ending in COMMITTING) as customer:
                    ending(maker, act, customer)

    @pytest.mark.parametrize("expire_on_commit", [True, False])
    @pytest.mark.parametrize("ending", ENDINGS)
    async def test_async(
        self,
        async_engine: AsyncEngine,
        counter: WakeCounter,
        checked: Checked,
        ending: Ending,
        expire_on_commit: bool,
    ) -> None:
        maker = async_sessionmaker(async_engine, expire_on_commit=expire_on_commit)
        install(maker, counter.layer)
        for act in ACTS:
            with checked.expecting(ending in COMMITTING) as customer:
                async with maker() as session:
                    await session.run_sync(in_sync, ending, act, customer)

    @pytest.mark.parametrize("ending", [commit, rollback, close_without_commit])
    async def test_async_scoped(
        self,
        async_engine: AsyncEngine,
        counter: WakeCounter,
        checked: Checked,
        ending: Ending,
    ) -> None:
        maker = async_sessionmaker(async_engine)
        install(maker, counter.layer)
        scoped = async_scoped_session(maker, scopefunc=lambda: None)
        for act in ACTS:
            with checked.expecting(ending in COMMITTING) as customer:
                await scoped().run_sync(in_sync, ending, act, customer)
                await scoped.remove()

    @pytest.mark.parametrize("ending", ENDINGS)
    def test_two_phase(
        self, engine: sa.Engine, counter: WakeCounter, checked: Checked, ending: Ending
    ) -> None:
        maker = sessionmaker(engine, twophase=True)
        install(maker, counter.layer)
        for act in ACTS:
            with checked.expecting(ending in COMMITTING) as customer:
                ending(maker, act, customer)


# Random work: a session goes on through whatever happens to it.

STEPS = (
    "insert", "insert", "update", "update", "count", "move", "same", "delete", "orphan",
    "bulk insert", "bulk update", "flush", "expire", "savepoint", "savepoint", "release", "undo",
    "commit", "rollback", "fail",
)  # fmt: skip


class Worker:
    def __init__(self, maker: sessionmaker[Session], customers: list[int]) -> None:
        self.maker = maker
        self.session = maker()
        self.customers = customers
        self.savepoints: list[orm.SessionTransaction] = []

    def step(self, what: str, number: int) -> None:
        session = self.session
        customer = self.customers[number % len(self.customers)]
        match what:
            case "insert":
                session.add(order(customer_id=customer))
            case "bulk insert":
                session.bulk_save_objects(
                    [order(customer_id=customer), order(customer_id=customer)]
                )
            case "flush":
                session.flush()
            case "expire":
                session.flush()
                session.expire_all()
            case "savepoint":
                self.savepoints.append(session.begin_nested())
            case "release" | "undo" if self.savepoints:
                savepoint = self.savepoints.pop()
                if what == "release":
                    savepoint.commit()
                else:
                    savepoint.rollback()
            case "commit" | "rollback":
                # The outermost transaction ends, with all savepoints in it.
                self.savepoints.clear()
                getattr(session, what)()
            case "fail":
                session.add(order(customer_id=-1))
                with pytest.raises(IntegrityError):
                    session.flush()
                if self.savepoints:
                    self.savepoints.pop().rollback()
                else:
                    session.rollback()
            case "orphan":
                found = session.get_one(Customer, customer)
                if found.orders:
                    found.orders.pop(number % len(found.orders))
            case _:
                if what == "bulk update":
                    session.flush()  # or it could take one that is about to be deleted
                orders = session.scalars(sa.select(Order).order_by(Order.id)).all()
                if orders:
                    self.change(what, orders[number % len(orders)], customer, number)

    def change(self, what: str, one: Order, customer: int, number: int) -> None:
        match what:
            case "update":
                one.count = number
            case "count":
                one.count = cast(Any, Order.count + 1)
            case "move":
                one.customer_id = customer
            case "same":
                one.name, one.count = one.name, one.count
                one.customer_id = one.customer_id
            case "delete":
                self.session.delete(one)
            case "bulk update":
                self.session.expunge(one)
                one.count += 1
                self.session.bulk_save_objects([one])


class TestAnything:
    @settings_(
        max_examples=60,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    @given(
        steps=st.lists(
            st.tuples(st.sampled_from(STEPS), st.integers(0, 50)), min_size=5, max_size=40
        ),
        autoflush=st.booleans(),
        expire_on_commit=st.booleans(),
    )
    def test_the_log_agrees_with_the_table(
        self,
        engine: sa.Engine,
        counter: WakeCounter,
        checked: Checked,
        log: Log,
        rows: Rows,
        steps: list[tuple[str, int]],
        autoflush: bool,
        expire_on_commit: bool,
    ) -> None:
        maker = sessionmaker(engine, autoflush=autoflush, expire_on_commit=expire_on_commit)
        install(maker, counter.layer)
        with maker() as session:
            customers = [Customer(), Customer()]
            session.add_all(customers)
            session.commit()
            ids = [customer.id for customer in customers]
        worker = Worker(maker, ids)
        try:
            for what, number in steps:
                worker.step(what, number)
        finally:
            worker.session.close()
        assert sorted(told(log)) == sorted(rows.history())
        assert replayed(log) == rows.table()


@pytest.fixture
async def async_engine(engine: sa.Engine, database_url: str) -> AsyncIterator[AsyncEngine]:
    url = database_url.replace("postgresql:", "postgresql+asyncpg:")
    created = create_async_engine(url, poolclass=NullPool)
    yield created
    await created.dispose()
