"""The network breaks in the middle of a COMMIT: published is what the database has committed."""

from __future__ import annotations

import asyncio

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker
from sqlalchemy.pool import NullPool

from pgchannels import Settings
from pgchannels.orm import install
from tests.support.eventually import eventually
from tests.support.orders import ACTS, Act, Checked, Rows, prepare
from tests.support.sessions import Log, WakeCounter
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
def checked(database_url: str) -> Checked:
    return Checked(prepare(database_url), Log(database_url), Rows(database_url))


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


@pytest.mark.parametrize("answer", [False, True], ids=["request lost", "answer lost"])
@pytest.mark.parametrize("act", ACTS)
class TestConnectionLostDuringCommit:
    async def test_sync(
        self, database_url: str, checked: Checked, counter: WakeCounter, act: Act, answer: bool
    ) -> None:
        with checked.expecting(answer) as customer:
            async with CutAtCommit(database_url, answer=answer) as proxy:

                def work() -> None:
                    engine = sa.create_engine(
                        proxy.url.replace("postgresql:", "postgresql+psycopg:"),
                        poolclass=NullPool,
                        connect_args={"application_name": "cut off"},
                    )
                    maker = sessionmaker(engine)
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
