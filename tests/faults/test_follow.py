"""Durable readers that are killed, paused, cancelled, cut off: each effect once, and in order."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import asyncpg
import pytest

from pgchannels import FollowerLost, PostgresLayer, Settings
from pgchannels.embedded import EmbeddedPostgres
from pgchannels.follower import Batch, Follower
from tests.support.eventually import eventually
from tests.support.processes import Processes
from tests.support.tcp_proxy import TcpProxy

LEASE = 1.0
QUICK = {"lease_time": LEASE, "heartbeat_interval": 0.3, "poll_interval": 0.3}
# Small batches, so that there are many of them.
SMALL = {"page_size": 20, "buffer_size": 40}
MESSAGES = 6000
CHAOS = 14.0  # seconds

# Does its work as its user should, in a world that does not: transactions are rolled back at any
# moment and cancelled at any moment, also while they commit.
WORKER = """
import asyncio, os, random, sys
import asyncpg
from pgchannels import FollowerLost, PostgresLayer

class RolledBack(Exception):
    pass

async def handle(pool, batch, acknowledged):
    async with pool.acquire() as connection, connection.transaction():
        for message in batch:
            await connection.execute(
                "insert into effects (n, pid) values ($1, $2)", message["n"], os.getpid()
            )
            if random.random() < 0.02:
                await asyncio.sleep(random.random() * 0.05)
        if random.random() < 0.05:
            raise RolledBack
        acknowledged.append(await batch.ack(connection))
        if random.random() < 0.05:
            raise RolledBack
        if random.random() < 0.01:
            await asyncio.sleep(random.random() * 1.5)

async def follow(layer, pool):
    async with layer.follow("a", "b", name="f", after="0") as batches:
        async for batch in batches:
            while True:
                acknowledged = []
                try:
                    async with asyncio.timeout(random.choice([10, 10, random.random() * 0.1])):
                        await handle(pool, batch, acknowledged)
                    break
                except FollowerLost:
                    print("lost", flush=True)
                    break
                except RolledBack:
                    print("rolled back", flush=True)
                except TimeoutError:
                    print("cancelled", flush=True)
                except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
                    print("failed", repr(error), flush=True)
                # The same one again, or leave; or else, if it was acknowledged, just go on.
                choice = random.random()
                if choice < 0.1:
                    return
                if choice < 0.5 and acknowledged:
                    break

async def main():
    random.seed(int(sys.argv[1]))
    url = os.environ["PGCHANNELS_DATABASE_URL"]
    async with asyncpg.create_pool(url, min_size=1, max_size=3) as pool, PostgresLayer() as layer:
        print("started", flush=True)
        while True:
            await follow(layer, pool)

asyncio.run(main())
"""


class Workers:
    """Four processes that read as one."""

    def __init__(self, processes: Processes, url: str) -> None:
        env = {f"PGCHANNELS_{name.upper()}": str(value) for name, value in (QUICK | SMALL).items()}
        self._env = {**env, "PGCHANNELS_DATABASE_URL": url}
        self._processes = processes
        self._all: list[subprocess.Popen[bytes]] = []
        self.running = [self._start() for _ in range(4)]

    def _start(self) -> subprocess.Popen[bytes]:
        started = self._processes.start("-c", WORKER, str(len(self._all)), env=self._env)
        self._all.append(started)
        return started

    async def are_started(self) -> None:
        await eventually(lambda: self.said("started") >= 4, timeout=30)

    def said(self, what: str) -> int:
        """How often a line begins with *what*."""
        outputs = map(self._processes.output, self._all)
        return sum(line.startswith(what) for text in outputs for line in text.splitlines())

    def kill(self, victim: subprocess.Popen[bytes]) -> None:
        victim.kill()
        victim.wait()
        self.running[self.running.index(victim)] = self._start()

    async def pause(self, victim: subprocess.Popen[bytes]) -> None:
        """For longer than its lease."""
        victim.send_signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(LEASE * random.uniform(1.1, 2))
        finally:
            victim.send_signal(signal.SIGCONT)

    def check_alive(self) -> None:
        for process in self.running:
            assert process.poll() is None, self._processes.output(process)


@pytest.fixture
async def connection(database_url: str) -> AsyncIterator[Any]:
    connection = await asyncpg.connect(database_url)
    # No constraint that would hide what comes twice.
    await connection.execute(
        "create table effects (id bigint generated always as identity, n int, pid int)"
    )
    yield connection
    await connection.close(timeout=5)


async def effects(connection: Any) -> list[int]:
    return [row["n"] for row in await connection.fetch("select n from effects order by id")]


async def test_effects_are_exactly_once_whatever_happens_to_the_readers(
    database_url: str, processes: Processes, connection: Any
) -> None:
    workers = Workers(processes, database_url)
    await workers.are_started()
    loop = asyncio.get_running_loop()

    async def publish(layer: PostgresLayer, publisher: int) -> None:
        """Spread over the time of the faults."""
        for n in range(publisher, MESSAGES, 4):
            await layer.send("ab"[random.randrange(2)], {"n": n})
            if n % 16 < 4:
                await asyncio.sleep(CHAOS * 16 / MESSAGES)

    async def active() -> subprocess.Popen[bytes]:
        """The worker that has done the newest effect; a random one if that is gone."""
        pid = await connection.fetchval("select pid from effects order by id desc limit 1")
        found = [each for each in workers.running if each.pid == pid]
        return random.choice(found or workers.running)

    async with (
        PostgresLayer(Settings(database_url=database_url)) as layer,
        asyncio.TaskGroup() as group,
    ):
        for publisher in range(4):
            group.create_task(publish(layer, publisher))
        end = loop.time() + CHAOS
        paused = killed = 0
        while loop.time() < end:
            workers.check_alive()
            victim = await active() if random.random() < 0.8 else random.choice(workers.running)
            if random.random() < 0.6:
                await workers.pause(victim)
                paused += 1
            else:
                workers.kill(victim)
                killed += 1
            done = await count(connection)
            await eventually(partial(progressed, connection, done), timeout=30)

    async def all_done() -> Any:
        workers.check_alive()
        return await count(connection) >= MESSAGES

    await eventually(all_done, timeout=60)
    expected = await connection.fetch(
        "select (payload->>'n')::int as n from pgchannels.messages order by id"
    )
    assert len(expected) == MESSAGES
    assert await effects(connection) == [row["n"] for row in expected]
    assert paused
    assert killed
    for what in ("lost", "rolled back", "cancelled"):
        assert workers.said(what), f"nothing was {what}"
    assert not workers.said("failed")


async def count(connection: Any) -> int:
    return int(await connection.fetchval("select count(*) from effects"))


async def progressed(connection: Any, done: int) -> Any:
    now = await count(connection)
    return now > done or now >= MESSAGES


async def consume(follower: Follower, got: list[int]) -> None:
    """At least once: whatever comes is worked on, and acknowledged then."""
    async for batch in follower:
        got += [message["n"] for message in batch]
        try:
            await batch.ack()
        except FollowerLost:
            continue


@pytest.mark.parametrize("how", ["fast", "immediate"])
async def test_the_database_restarts(own_server: EmbeddedPostgres, how: str) -> None:
    """Nobody who reads or acknowledges gets an error of it; nothing is lost, or out of order."""
    settings = Settings(database_url=own_server.url(), **QUICK)
    got: list[int] = []
    async with PostgresLayer(settings) as layer, layer.follow("a", name="f") as follower:
        consumer = asyncio.create_task(consume(follower, got))
        sent = 0
        for _ in range(3):
            restarting = asyncio.create_task(asyncio.to_thread(own_server.restart, how))  # type: ignore[arg-type]
            while not restarting.done():
                try:
                    await layer.send("a", {"n": sent}, key=str(sent))
                except Exception:  # noqa: BLE001 - tried again, with its key
                    await asyncio.sleep(0.05)
                else:
                    sent += 1
            await restarting
            assert not consumer.done()
        await layer.send("a", {"n": sent})
        await eventually(lambda: got and got[-1] == sent, timeout=30)

        async def saved() -> Any:
            (status,) = await layer.followers()
            return status.lag == 0

        await eventually(saved)
    await consumer
    assert list(dict.fromkeys(got)) == list(range(sent + 1))


async def test_a_reader_that_is_cut_off_stops_and_another_goes_on(
    database_url: str, connection: Any
) -> None:
    async with TcpProxy(database_url) as proxy:
        cut_off = Settings(database_url=proxy.url, command_timeout=60, **QUICK)
        direct = Settings(database_url=database_url, **QUICK)
        async with (
            PostgresLayer(cut_off) as layer,
            PostgresLayer(direct) as other,
            layer.follow("a", name="f") as follower,
        ):
            await other.send("a", {"n": 1})
            async with asyncio.timeout(20):
                batch = await anext(follower)
                assert numbers(batch) == [1]
                async with other.follow("a", name="f") as successor:
                    reader = asyncio.create_task(following(follower))
                    proxy.stall()
                    await other.send("a", {"n": 2})
                    taken_over = await anext(successor)
                    assert numbers(taken_over) == [1, 2]
                    assert not reader.done()
                    # The answers that were on their way tell of a lease that it no longer has.
                    proxy.resume()
                    with pytest.raises(FollowerLost):
                        await batch.ack()
                    await taken_over.ack()
                    assert not reader.done()
                await other.send("a", {"n": 3})
                assert numbers(await reader) == [3]


async def following(follower: Follower) -> Batch:
    return await anext(follower)


def numbers(batch: Batch) -> list[int]:
    return [message["n"] for message in batch]
