"""A process without a node, and a database that goes away: nothing waits, nothing is flooded."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Iterator

import asyncpg
import psycopg
import pytest

from pgchannels import PostgresLayer, Settings
from pgchannels import waker as waker_module
from pgchannels.waker import Waker
from tests.support.eventually import eventually
from tests.support.processes import Processes
from tests.support.tcp_proxy import TcpProxy

# Nothing is found by polling while a test runs.
NEVER = 600.0

PUBLISHING = """
import sys
import psycopg
import pgchannels.waker as waker_module
from pgchannels import Settings
from pgchannels.waker import waker_for

waker_module._PATIENCE = 60.0
with psycopg.connect(sys.argv[1]) as connection:
    connection.execute("select pgchannels.publish('a', '{}')")
waker_for(Settings(database_url=sys.argv[2])).wake()
"""


@pytest.fixture
async def layer(database_url: str) -> AsyncIterator[PostgresLayer]:
    """A node that finds nothing by itself."""
    settings = Settings.model_validate(
        {"database_url": database_url, "poll_interval": NEVER, "outbox_poll_interval": NEVER}
    )
    async with PostgresLayer(settings) as layer:
        await eventually(lambda: layer.is_listening)
        yield layer


@pytest.fixture
async def proxy(database_url: str) -> AsyncIterator[TcpProxy]:
    async with TcpProxy(database_url) as proxy:
        yield proxy


@pytest.fixture
def waker(proxy: TcpProxy) -> Iterator[Waker]:
    waker = Waker(proxy.url, "pgchannels")
    yield waker
    waker.close(0)


@pytest.fixture(autouse=True)
def _no_thread_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        if thread.name == "pgchannels waker":
            thread.join(10)
            assert not thread.is_alive()


def publish(url: str) -> None:
    with psycopg.connect(url) as connection:
        connection.execute("select pgchannels.publish('a', '{}')")


async def received(layer: PostgresLayer, count: int) -> None:
    async with asyncio.timeout(30), layer.subscribe("a", after="0") as messages:
        for _ in range(count):
            await anext(messages)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "pgchannels.waker" and record.levelno >= logging.WARNING
    ]


def recoveries(caplog: pytest.LogCaptureFixture) -> int:
    return [record.getMessage() for record in caplog.records].count("nodes are woken again")


async def test_an_outage_is_told_once_and_got_over(
    layer: PostgresLayer,
    proxy: TcpProxy,
    waker: Waker,
    database_url: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "pgchannels.waker")
    for outage in range(2):
        await proxy.cut(refuse=True)
        attempts = proxy.accepted
        for _ in range(20):
            await asyncio.to_thread(waker.wake)
            await asyncio.sleep(0.01)
        await eventually(lambda outage=outage: len(warnings(caplog)) == outage + 1)  # type: ignore[misc]
        assert proxy.accepted == attempts
        assert "find by polling" in warnings(caplog)[-1]

        proxy.resume()
        await asyncio.to_thread(publish, database_url)
        waker.wake()
        await received(layer, outage + 1)
        # The message may be here before the answer is there by which the outage is over.
        await eventually(lambda outage=outage: recoveries(caplog) == outage + 1)  # type: ignore[misc]
        assert len(warnings(caplog)) == outage + 1


async def test_the_first_wake_up_after_a_lost_connection_arrives(
    layer: PostgresLayer,
    proxy: TcpProxy,
    waker: Waker,
    database_url: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    connection = await asyncpg.connect(database_url)
    try:
        for round in range(5):
            await asyncio.to_thread(publish, database_url)
            waker.wake()
            await received(layer, round + 1)
            await connection.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity"
                " where application_name = 'pgchannels waker'"
            )
    finally:
        await connection.close()
    assert proxy.accepted == 5
    assert not warnings(caplog)


async def test_a_refusal_is_not_tried_again_and_again(
    proxy: TcpProxy, caplog: pytest.LogCaptureFixture
) -> None:
    waker = Waker(proxy.url + "_that_is_not_there", "pgchannels")
    for _ in range(50):
        waker.wake()
        await asyncio.sleep(0.01)
    await eventually(lambda: warnings(caplog))
    assert "does not exist" in warnings(caplog)[0]
    for _ in range(50):
        waker.wake()
        await asyncio.sleep(0.01)
    assert proxy.accepted == 1
    waker.close(0)


@pytest.mark.parametrize("url", ["postgresql://host:none/db", "postgresql://localhost:1/db"])
async def test_whatever_is_wrong_with_the_url_the_publisher_goes_on(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    waker = Waker(url, "pgchannels")
    waker.wake()
    await eventually(lambda: warnings(caplog))
    waker.close(10)


async def test_an_unforeseen_error_ends_the_thread_and_not_the_waker(
    layer: PostgresLayer,
    waker: Waker,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(waker_module, "connect", None)
        waker.wake()
        await eventually(lambda: warnings(caplog))
    await asyncio.to_thread(publish, database_url)
    waker.wake()
    await received(layer, 1)


async def test_a_stalled_network_delays_the_exit_by_a_second_at_most(
    proxy: TcpProxy, processes: Processes, database_url: str
) -> None:
    proxy.stall()
    process = processes.start("-W", "error", "-c", PUBLISHING, database_url, proxy.url)
    async with asyncio.timeout(90):
        await eventually(lambda: proxy.active, timeout=30)
        started = asyncio.get_running_loop().time()
        assert await asyncio.to_thread(process.wait, 60) == 0
    # A connection may take sixty here, and its end again some.
    assert asyncio.get_running_loop().time() - started < 30
    assert processes.output(process) == ""
