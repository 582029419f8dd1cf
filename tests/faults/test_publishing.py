"""The network breaks in the middle of a COMMIT: published is what the database has committed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker
from sqlalchemy.pool import NullPool

from pgchannels import PostgresLayer, Settings
from pgchannels.orm import install
from tests.support.eventually import eventually
from tests.support.orders import (
    ACTS,
    Act,
    Base,
    Checked,
    Rows,
    bulk_insert,
    delete,
    insert,
    prepare,
    publish_beside,
    told,
    update,
)
from tests.support.sessions import ALL_SHAPES, Log, Make, WakeCounter
from tests.support.tcp_proxy import TcpProxy


class CutAtCommit(TcpProxy):
    """Resets a connection when it passes on a COMMIT, or the answer to one."""

    def __init__(self, database_url: str, *, answer: bool) -> None:
        super().__init__(database_url)
        # The answer says COMMIT, too: it is the name of what has been done.
        self._left = 2 if answer else 1
        self.has_cut = False

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            if b"COMMIT" in data:
                self._left -= 1
                if not self._left:
                    self.has_cut = True
                    raise ConnectionResetError
            sink.write(data)
            await sink.drain()


@pytest.fixture
def checked(database_url: str) -> Iterator[Checked]:
    engine = prepare(database_url)
    with closing(Log(database_url)) as log, closing(Rows(database_url)) as rows:
        yield Checked(engine, log, rows)
    engine.dispose()


@pytest.fixture
def counter(database_url: str) -> WakeCounter:
    return WakeCounter(Settings(database_url=database_url))


async def gone(database_url: str) -> None:
    """Wait until the server has noticed."""

    def nobody() -> bool:
        with psycopg.connect(database_url) as connection:
            row = connection.execute(
                "select count(*) from pg_stat_activity"
                " where datname = current_database() and application_name = 'cut off'"
            ).fetchone()
        return row == (0,)

    await eventually(nobody, timeout=30)


def through(proxy: TcpProxy) -> sa.Engine:
    return sa.create_engine(
        proxy.url.replace("postgresql:", "postgresql+psycopg:"),
        poolclass=NullPool,
        connect_args={"application_name": "cut off"},
    )


@contextmanager
def with_binds(engine: sa.Engine, layer: PostgresLayer) -> Iterator[Make]:
    maker = sessionmaker(engine, binds={Base: engine})
    install(maker, layer)
    yield maker


@contextmanager
def two_phase(engine: sa.Engine, layer: PostgresLayer) -> Iterator[Make]:
    maker = sessionmaker(engine, twophase=True)
    install(maker, layer)
    yield maker


def work(make: Make, customer: int) -> None:
    """Something of everything, some of it in a savepoint."""
    session = make()
    try:
        with session.begin_nested():
            for act in (insert, update, publish_beside):
                act(session, customer)
        for act in (bulk_insert, delete, publish_beside):
            act(session, customer)
        session.commit()
    finally:
        session.close()


answers = pytest.mark.parametrize("answer", [False, True], ids=["request lost", "answer lost"])


@answers
@pytest.mark.parametrize("act", ACTS)
class TestConnectionLostDuringCommit:
    async def test_sync(
        self, database_url: str, checked: Checked, counter: WakeCounter, act: Act, answer: bool
    ) -> None:
        with checked.expecting(answer) as customer:
            async with CutAtCommit(database_url, answer=answer) as proxy:

                def work() -> None:
                    maker = sessionmaker(through(proxy))
                    install(maker, counter.layer)
                    with maker() as session:
                        act(session, customer)
                        with pytest.raises(DBAPIError):
                            session.commit()
                        session.rollback()

                async with asyncio.timeout(60):
                    await asyncio.to_thread(work)
                assert proxy.has_cut
            await gone(database_url)
        assert counter.woken == 0

    async def test_async(
        self, database_url: str, checked: Checked, counter: WakeCounter, act: Act, answer: bool
    ) -> None:
        with checked.expecting(answer) as customer:
            async with CutAtCommit(database_url, answer=answer) as proxy:
                engine = create_async_engine(
                    proxy.url.replace("postgresql:", "postgresql+asyncpg:"),
                    poolclass=NullPool,
                    connect_args={"server_settings": {"application_name": "cut off"}},
                )
                maker = async_sessionmaker(engine)
                install(maker, counter.layer)
                async with asyncio.timeout(60), maker() as session:
                    await session.run_sync(act, customer)
                    with pytest.raises((DBAPIError, OSError)):
                        await session.commit()
                    await session.rollback()
                assert proxy.has_cut
            await gone(database_url)
        assert counter.woken == 0


@answers
class TestOfEveryShape:
    """Whoever's COMMIT it is: the session's, or that of the transaction which it is in."""

    @pytest.mark.parametrize("shape", [*ALL_SHAPES, with_binds])
    async def test_sync(
        self,
        database_url: str,
        checked: Checked,
        counter: WakeCounter,
        shape: Callable[..., Any],
        answer: bool,
    ) -> None:
        with checked.expecting(answer) as customer:
            async with CutAtCommit(database_url, answer=answer) as proxy:

                def lose() -> None:
                    with (
                        pytest.raises(DBAPIError),
                        shape(through(proxy), counter.layer) as make,
                    ):
                        work(make, customer)

                async with asyncio.timeout(60):
                    await asyncio.to_thread(lose)
                assert proxy.has_cut
            await gone(database_url)

    async def test_two_phase(
        self, database_url: str, checked: Checked, counter: WakeCounter, answer: bool
    ) -> None:
        """Without an answer it is committed or prepared; what is prepared can yet be committed."""
        log, rows = checked.log, checked.rows
        with checked.expecting(answer) as customer:
            before = len(rows.history())
            async with CutAtCommit(database_url, answer=answer) as proxy:

                def lose() -> None:
                    with (
                        pytest.raises((DBAPIError, psycopg.Error)),
                        two_phase(through(proxy), counter.layer) as make,
                    ):
                        work(make, customer)

                async with asyncio.timeout(60):
                    await asyncio.to_thread(lose)
                assert proxy.has_cut
            await gone(database_url)
        with psycopg.connect(database_url, autocommit=True) as connection:
            left = connection.execute(
                "select gid from pg_prepared_xacts where database = current_database()"
            ).fetchall()
            assert len(left) == (0 if answer else 1)
            for (name,) in left:
                connection.execute(psycopg.sql.SQL("commit prepared {}").format(name))
        assert sorted(told(log)) == sorted(rows.history()[before:])
        assert [channel for channel, _ in log.messages()].count("beside") == rows.beside() == 2
