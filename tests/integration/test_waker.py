"""Processes without a node: what they publish is found at once, however they fork and end."""

from __future__ import annotations

import asyncio
import os
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Any

import asyncpg
import psycopg
import pytest
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker

from pgchannels import PostgresLayer, Settings
from pgchannels.embedded import EmbeddedPostgres
from pgchannels.errors import ConfigurationError
from pgchannels.migrate import upgrade
from pgchannels.orm import install
from pgchannels.orm import publish as publish_in
from pgchannels.waker import Waker, close_wakers, waker_for
from tests.support.eventually import eventually
from tests.support.processes import Processes
from tests.support.tcp_proxy import TcpProxy

# Nothing is found by polling while a test runs.
NEVER = 600.0
SOON = 10.0

WAKERS = "select pid from pg_stat_activity where application_name = 'pgchannels waker'"

# A process that tells of what it leaves open, but not that it forks with threads, as it is to do.
STRICTLY = ("-W", "error", "-W", "ignore:This process:DeprecationWarning")

PUBLISHING = """
import multiprocessing, os, sys, threading, time
import psycopg
import pgchannels.waker as waker_module
from pgchannels import Settings
from pgchannels.waker import waker_for

# A second, in which a busy machine might not get so far.
waker_module._EXIT_TIME = 30.0

url = sys.argv[1]
waker = waker_for(Settings(database_url=url))


def publish(name):
    with psycopg.connect(url) as connection:
        query = "select pgchannels.publish('a', json_build_object('by', %s::text))"
        connection.execute(query, [name])
    waker.wake()


def sending():
    "The server processes of all wakers on this database."
    with psycopg.connect(url) as connection:
        return {row[0] for row in connection.execute(
            "select pid from pg_stat_activity where datname = current_database()"
            " and application_name = 'pgchannels waker' and query like '%pg_notify%'")}


def wait_for(condition, what):
    ends_at = time.monotonic() + 30
    while not (value := condition()):
        assert time.monotonic() < ends_at, f"not within 30 s: {what}"
        time.sleep(0.01)
    return value

"""


def settings(url: str, **more: float) -> Settings:
    return Settings.model_validate(
        {"database_url": url, "poll_interval": NEVER, "outbox_poll_interval": NEVER, **more}
    )


@pytest.fixture
async def layer(database_url: str) -> AsyncIterator[PostgresLayer]:
    """A node that finds nothing by itself."""
    async with PostgresLayer(settings(database_url)) as layer:
        await eventually(lambda: layer.is_listening)
        yield layer


@pytest.fixture
def waker(database_url: str) -> Iterator[Waker]:
    waker = Waker(database_url, "pgchannels")
    yield waker
    waker.close(SOON)
    assert not waker_threads()


@pytest.fixture
async def connection(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


def publish(url: str, name: str) -> None:
    with psycopg.connect(url) as connection:
        connection.execute(
            "select pgchannels.publish('a', json_build_object('by', %s::text))", [name]
        )


async def received(layer: PostgresLayer, count: int) -> set[str]:
    """By whom the first so many messages are."""
    found: set[str] = set()
    async with asyncio.timeout(30), layer.subscribe("a", after="0") as messages:
        while len(found) < count:
            found.add((await anext(messages))["by"])
    return found


def waker_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "pgchannels waker"]


async def ended(process: subprocess.Popen[bytes]) -> int:
    return await asyncio.to_thread(process.wait, 60)


# --- What nodes do when they are asked to look ---


async def test_a_commit_is_told_to_the_node_that_polls(
    layer: PostgresLayer, waker: Waker, database_url: str
) -> None:
    for round in range(3):
        await asyncio.to_thread(publish, database_url, f"{round}")
        waker.wake()
        assert len(await received(layer, round + 1)) == round + 1


async def test_any_role_can_ask_and_other_nodes_do_not_look(
    layer: PostgresLayer, connection: asyncpg.Connection, database_url: str
) -> None:
    async with PostgresLayer(settings(database_url)) as second:
        await eventually(lambda: second.is_listening)
        looks = [count_looks(layer), count_looks(second)]
        publish(database_url, "psql")
        await connection.execute("notify pgchannels")
        assert await received(second, 1) == {"psql"}
        assert looks[0]() >= 1
        assert looks[1]() == 0


async def test_a_flood_costs_a_bounded_number_of_looks(
    layer: PostgresLayer, connection: asyncpg.Connection, database_url: str
) -> None:
    looks = count_looks(layer)
    started = time.monotonic()
    for _ in range(2000):
        await connection.execute("notify pgchannels")
    duration = time.monotonic() - started
    assert looks() <= duration / 0.05 + 3

    # What is published in the middle of it is found all the same.
    publish(database_url, "honest")
    await connection.execute("notify pgchannels")
    assert await received(layer, 1) == {"honest"}


def count_looks(layer: PostgresLayer) -> Callable[[], int]:
    assert layer._node is not None
    sequencer = layer._node._sequencer
    run_once, looks = sequencer.run_once, 0

    async def counted() -> int:
        nonlocal looks
        looks += 1
        return await run_once()

    sequencer.run_once = counted  # type: ignore[method-assign]
    return lambda: looks


# --- The waker ---


async def test_ten_thousand_wake_ups_become_a_few_notifications(
    waker: Waker, connection: asyncpg.Connection
) -> None:
    heard: list[str] = []
    await connection.add_listener("pgchannels", lambda *args: heard.append(args[3]))
    waker.wake()
    await eventually(lambda: heard)
    before = len(heard)

    def wake_often() -> None:
        for _ in range(10_000):
            waker.wake()

    await asyncio.to_thread(wake_often)
    await eventually(lambda: len(heard) > before)
    # And one that is certain to be the last.
    await asyncio.to_thread(waker.close, SOON)
    await connection.execute("notify pgchannels, 'end'")
    await eventually(lambda: heard[-1] == "end")
    assert set(heard[:-1]) == {""}
    assert len(heard) < 2000


async def test_threads_that_race_for_the_first_wake_up_share_one_connection(
    database_url: str, connection: asyncpg.Connection
) -> None:
    for _ in range(10):
        waker = Waker(database_url, "pgchannels")
        barrier = threading.Barrier(16)

        def race(waker: Waker = waker, barrier: threading.Barrier = barrier) -> None:
            barrier.wait(SOON)
            waker.wake()

        threads = [threading.Thread(target=race) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            await asyncio.to_thread(thread.join, SOON)
        assert len(waker_threads()) == 1
        await eventually(lambda: connection.fetch(WAKERS))
        assert len(await connection.fetch(WAKERS)) == 1
        await asyncio.to_thread(waker.close, SOON)
        assert not waker_threads()
        await eventually(partial(is_gone, connection))


async def is_gone(connection: asyncpg.Connection) -> Any:
    return not await connection.fetch(WAKERS)


async def test_it_ends_when_it_is_idle_and_begins_again(
    layer: PostgresLayer, connection: asyncpg.Connection, database_url: str
) -> None:
    waker = Waker(database_url, "pgchannels", idle_time=0.05)
    for round in range(3):
        await asyncio.to_thread(publish, database_url, f"{round}")
        waker.wake()
        await received(layer, round + 1)
        await eventually(lambda: not waker_threads())
        await eventually(partial(is_gone, connection))


async def test_wake_ups_while_it_becomes_idle_are_not_lost(
    database_url: str, connection: asyncpg.Connection
) -> None:
    heard: list[str] = []
    await connection.add_listener("pgchannels", lambda *args: heard.append(args[3]))
    waker = Waker(database_url, "pgchannels", idle_time=0.001)
    for _ in range(100):
        before = len(heard)
        waker.wake()
        await eventually(lambda before=before: len(heard) > before)  # type: ignore[misc]
    waker.close(SOON)
    await eventually(lambda: not waker_threads())


def test_closing_what_does_not_run_does_nothing(waker: Waker) -> None:
    waker.close()
    waker.wake()
    waker.close(SOON)
    waker.close()


async def test_a_database_can_be_dropped_once_the_wakers_of_its_sessions_are_closed(
    postgres: EmbeddedPostgres, database_url: str, connection: asyncpg.Connection
) -> None:
    await connection.execute("create database copy template template0")
    url = postgres.url("copy")
    try:
        await asyncio.to_thread(upgrade, url)
        engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
        maker = sessionmaker(engine)
        install(maker, settings=Settings(database_url=url))
        with maker.begin() as session:
            publish_in(session, "a", {})
        engine.dispose()
        await eventually(lambda: connection.fetch(WAKERS + " and datname = 'copy'"))
        await asyncio.to_thread(close_wakers, SOON)
        assert not waker_threads()
    finally:
        # It waits for sessions that are about to end, and for no others.
        await connection.execute("drop database copy")


def test_nothing_opens_before_the_first_wake_up(waker: Waker) -> None:
    assert not waker_threads()


def test_there_is_one_for_a_database_and_schema() -> None:
    one = Settings(database_url="postgresql://host/one")
    assert waker_for(one) is waker_for(Settings(database_url="postgresql+psycopg://host/one"))
    other = Settings(database_url="postgresql://host/one", schema_name="other")
    assert waker_for(one) is not waker_for(other)


def test_a_session_s_url_serves_where_the_settings_have_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: os.PathLike[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PGCHANNELS_DATABASE_URL", raising=False)
    nowhere = Settings()
    with pytest.raises(ConfigurationError, match="no database"):
        waker_for(nowhere)
    known = Settings(database_url="postgresql://host/one")
    assert waker_for(nowhere, "postgresql+psycopg://host/one") is waker_for(known)
    assert waker_for(known, "postgresql://other/two") is waker_for(known)
    # What is meant for another driver would be refused by the server.
    url = "postgresql+psycopg2://u:p%40@/db?host=%2Ftmp&connect_timeout=5&sslmode=require&x=1"
    same = Settings(database_url="postgresql://u:p%40@/db?host=%2Ftmp&sslmode=require")
    assert waker_for(nowhere, url) is waker_for(same)


# --- How a process ends ---


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_what_is_pending_at_exit_is_still_sent(
    layer: PostgresLayer, processes: Processes, database_url: str, host: str
) -> None:
    async with TcpProxy(database_url) as proxy:
        url = proxy.url.replace("127.0.0.1", host)
        process = processes.start(*STRICTLY, "-c", PUBLISHING + "publish('script')", url)
        assert await ended(process) == 0
        assert processes.output(process) == ""
        assert await received(layer, 1) == {"script"}
        # And it said goodbye.
        await eventually(lambda: proxy.active == 0)


@pytest.mark.parametrize("end", ["", "sys.exit(0)", "os._exit(0)"])
async def test_the_exit_waits_for_nothing_and_leaves_nothing(
    processes: Processes, database_url: str, end: str
) -> None:
    # What is registered first is run last.
    last = """
import atexit, threading
atexit.register(lambda: print([thread.name for thread in threading.enumerate()]))
"""
    script = f"""
publish('script')
wait_for(sending, 'a connection')
{end}
"""
    process = processes.start(*STRICTLY, "-c", last + PUBLISHING + script, database_url)
    assert await ended(process) == 0
    assert processes.output(process) == ("" if "_exit" in end else "['MainThread']\n")


# --- How a process forks ---


async def test_parent_and_children_publish(
    layer: PostgresLayer, processes: Processes, database_url: str
) -> None:
    """The parent's connection is the same before and after, whatever the children did."""
    script = """
def shared():
    "What a child would share with its parent, apart from files."
    descriptors = os.listdir('/proc/self/fd') if sys.platform == 'linux' else []
    links = {os.readlink(f'/proc/self/fd/{n}') for n in descriptors
             if os.path.lexists(f'/proc/self/fd/{n}')}
    return {link for link in links if link.startswith(('socket:', 'anon_inode:'))}

publish('parent')
before = wait_for(sending, 'the connection of the parent')
of_the_parent = shared()
for number in range(6):
    if (child := os.fork()) == 0:
        # The writing end of the loop's own pipe, which wakes the parent up and does nothing else.
        assert len(shared() & of_the_parent) <= 1, shared()
        # As asyncpg does when it finds a connection among the garbage.
        waker._inherited[0]._connection.terminate()
        if number in (0, 1, 2, 3):
            publish(f'child {number}')
        if number in (0, 1):
            wait_for(lambda: len(sending()) >= 2, 'a connection of the child')
        if number in (0, 2, 4):
            sys.exit(0)
        elif number == 3:
            waker.close(30)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, number
publish('parent again')
assert before <= sending(), 'the connection of the parent is gone'
waker.close(30)
"""
    process = processes.start(*STRICTLY, "-c", PUBLISHING + script, database_url)
    assert await ended(process) == 0, processes.output(process)
    assert processes.output(process) == ""
    assert await received(layer, 6) == {
        "parent",
        "parent again",
        *(f"child {number}" for number in range(4)),
    }


async def test_children_of_multiprocessing_publish(
    layer: PostgresLayer, processes: Processes, database_url: str
) -> None:
    script = """
def work(number):
    publish(f'child {number}')
    waker.close(30)

publish('parent')
wait_for(sending, 'the connection of the parent')
context = multiprocessing.get_context('fork')
for _ in range(2):
    children = [context.Process(target=work, args=(number,)) for number in range(4)]
    for child in children:
        child.start()
    publish('parent again')
    for child in children:
        child.join()
        assert child.exitcode == 0
"""
    process = processes.start(*STRICTLY, "-c", PUBLISHING + script, database_url)
    assert await ended(process) == 0, processes.output(process)
    assert processes.output(process) == ""
    assert len(await received(layer, 6)) == 6


async def test_a_fork_at_any_moment_is_harmless(
    layer: PostgresLayer, processes: Processes, database_url: str
) -> None:
    """While threads wake, connect and end, too: nobody inherits a lock that is held."""
    script = """
stopped = False

def wake_on():
    while not stopped:
        waker.wake()
        waker.close(0)

threads = [threading.Thread(target=wake_on) for _ in range(3)]
for thread in threads:
    thread.start()
for number in range(40):
    if (child := os.fork()) == 0:
        try:
            publish(f'child {number}')
            waker.close(30)
        except BaseException as error:
            print(repr(error), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
stopped = True
for thread in threads:
    thread.join()
"""
    process = processes.start(*STRICTLY, "-c", PUBLISHING + script, database_url)
    assert await ended(process) == 0, processes.output(process)
    assert processes.output(process) == ""
    assert len(await received(layer, 40)) == 40
