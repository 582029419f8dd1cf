"""Processes that race for the places of a user, and die, close or are paused with one."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import asyncpg
import pytest

from pgchannels.sql import in_schema
from tests.support.eventually import eventually
from tests.support.processes import Processes

# Does what it is told, a line each, and says what came of it.
WORKER = """
import asyncio, json, os
from pgchannels import Limits, PGChannelsError, PostgresLayer, Settings, TooManyConnections

LIMITS = Limits(per_user=5)

async def main():
    reader, writer = await asyncio.open_unix_connection(os.environ["SOCKET"])
    layer = PostgresLayer(Settings(pool_size=2))
    await layer.open()
    reading = set()

    def say(**what):
        writer.write(json.dumps(what).encode() + b"\\n")

    async def read(channel):
        try:
            async with layer.subscribe(member=channel) as stream:
                async for _ in stream:
                    pass
        except TooManyConnections as error:
            say(ended=channel, scope=error.scope)

    async def connect():
        try:
            channel = await layer.new_channel(user_id="u", limits=LIMITS)
        except TooManyConnections as error:
            say(refused=error.scope)
        except PGChannelsError as error:
            say(failed=repr(error))
        else:
            task = asyncio.create_task(read(channel))
            reading.add(task)
            task.add_done_callback(reading.discard)
            say(channel=channel)

    say(pid=os.getpid())
    while line := await reader.readline():
        match line.decode().split():
            case ["connect"]:
                await connect()
            case ["leave", channel]:
                await layer.delete_channel(channel)
                say(left=channel)
            case ["reopen"]:
                await layer.close()
                await layer.open()
                say(reopened=True)

asyncio.run(main())
"""

LIMIT = 5
LEASE = 5.0
SETTINGS = {"lease_time": LEASE, "heartbeat_interval": 1, "poll_interval": 0.5}
PATIENCE = 60.0


class Worker:
    """A process with a layer of its own."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.channels: set[str] = set()
        self.ended: list[dict[str, Any]] = []
        self._answers: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._writer: asyncio.StreamWriter | None = None

    @property
    def is_there(self) -> bool:
        return self._writer is not None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        while line := await reader.readline():
            answer = json.loads(line)
            if "ended" in answer:
                self.ended.append(answer)
            else:
                self._answers.put_nowait(answer)

    def tell(self, what: str) -> None:
        assert self._writer is not None
        self._writer.write(what.encode() + b"\n")

    async def answer(self) -> dict[str, Any]:
        async with asyncio.timeout(PATIENCE):
            answer = await self._answers.get()
        if "channel" in answer:
            self.channels.add(answer["channel"])
        return answer

    async def connect(self) -> dict[str, Any]:
        self.tell("connect")
        return await self.answer()

    async def leave(self) -> None:
        for channel in list(self.channels):
            self.tell(f"leave {channel}")
            assert await self.answer() == {"left": channel}
            self.channels.remove(channel)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Workers:
    """Starts them, and takes their calls."""

    def __init__(self, processes: Processes, database_url: str, path: str) -> None:
        self._processes = processes
        self._path = path
        self._env = {f"PGCHANNELS_{name.upper()}": str(value) for name, value in SETTINGS.items()}
        self._env |= {"PGCHANNELS_DATABASE_URL": database_url, "SOCKET": path}
        self._by_pid: dict[int, Worker] = {}
        self._calls: set[asyncio.Task[None]] = set()

    def start(self) -> Worker:
        worker = Worker(self._processes.start("-c", WORKER, env=self._env))
        self._by_pid[worker.process.pid] = worker
        return worker

    async def started(self, workers: Iterable[Worker]) -> None:
        waited_for = list(workers)
        await eventually(lambda: all(worker.is_there for worker in waited_for), timeout=PATIENCE)

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        server = await asyncio.start_unix_server(self._call, self._path)
        try:
            yield
        finally:
            server.close()
            for call in self._calls:
                call.cancel()
            await asyncio.gather(*self._calls, return_exceptions=True)

    async def _call(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._calls.add(task)
        try:
            pid = json.loads(await reader.readline())["pid"]
            await self._by_pid[pid].serve(reader, writer)
        except (ConnectionError, asyncio.CancelledError):
            pass  # it was killed, or the test is over
        finally:
            writer.close()


class Places:
    """The places of the user, as the database has them; watched all the time."""

    def __init__(self, connection: asyncpg.Connection, watching: asyncpg.Connection) -> None:
        self._connection = connection
        self._watching = watching
        self.most = 0
        self.looks = 0

    async def taken(self) -> set[str]:
        rows = await self._connection.fetch(
            "select name from pgchannels.channels where is_connection and user_id = 'u'"
        )
        return {row["name"] for row in rows}

    async def check(self) -> None:
        """What the nodes count is what there is."""
        rows = await self._connection.fetch(
            """
            select coalesce(p.connections, 0) as connections, count(c.name) as count
              from pgchannels.nodes n
              left join pgchannels.places p on p.node = n.id
              left join pgchannels.channels c on c.node = n.id and c.is_connection
             group by n.id, p.version, p.connections
            """
        )
        assert all(row["connections"] == row["count"] for row in rows), rows

    async def watch(self) -> None:
        while True:
            count = await self._watching.fetchval(
                "select count(*) from pgchannels.channels where is_connection and user_id = 'u'"
            )
            self.most = max(self.most, count)
            self.looks += 1

    @asynccontextmanager
    async def barrier(self, count: int) -> AsyncIterator[None]:
        """Nobody is given a place inside of this; it ends when so many ask for one."""
        key = in_schema("1885823851, hashtext('pgchannels.u') & 255", "pgchannels")
        async with self._connection.transaction():
            await self._connection.execute(f"select pg_advisory_xact_lock({key})")
            yield

            async def all_wait() -> Any:
                waiting: int = await self._connection.fetchval(
                    "select count(*) from pg_locks where locktype = 'advisory'"
                    " and classid = 1885823851 and not granted"
                )
                return waiting == count

            await eventually(all_wait, timeout=PATIENCE)


@pytest.fixture
async def places(database_url: str) -> AsyncIterator[Places]:
    async with AsyncExitStack() as stack:
        connections = []
        for _ in range(2):
            connection = await asyncpg.connect(database_url)
            stack.push_async_callback(connection.close, timeout=5)
            connections.append(connection)
        places = Places(*connections)
        watching = asyncio.create_task(places.watch())
        yield places
        watching.cancel()
        await asyncio.wait([watching])


@pytest.fixture
async def workers(
    database_url: str, processes: Processes, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Workers]:
    path = tmp_path_factory.mktemp("w") / "s"
    workers = Workers(processes, database_url, str(path))
    async with workers.listening():
        yield workers


@pytest.mark.timeout(300)
async def test_never_a_sixth(workers: Workers, places: Places) -> None:
    """200 rounds in which 16 processes race; in some of them winners are killed, or close."""
    racers = [workers.start() for _ in range(16)]
    await workers.started(racers)
    for round in range(200):
        if round % 4 == 0:
            async with places.barrier(len(racers)):
                for racer in racers:
                    racer.tell("connect")
        else:
            for racer in racers:
                racer.tell("connect")
        answers = await asyncio.gather(*(racer.answer() for racer in racers))
        winners = [racer for racer in racers if racer.channels]
        assert len(winners) == LIMIT, answers
        assert sum(answer.get("refused") == "user" for answer in answers) == 16 - LIMIT, answers
        assert await places.taken() == {name for racer in winners for name in racer.channels}
        if round % 50 == 25:
            await _a_crash(workers, places, racers, winners[0])
        elif round % 50 == 45:
            await _a_close(places, racers, winners[0])
        await asyncio.gather(*(racer.leave() for racer in racers))
        if round % 20 == 0:
            await places.check()
    assert places.most == LIMIT
    assert places.looks > 200
    assert not any(racer.ended for racer in racers)


async def _a_crash(workers: Workers, places: Places, racers: list[Worker], victim: Worker) -> None:
    """Its place is nobody's until its lease has run out, and then somebody's, once."""
    victim.kill()
    racers.remove(victim)
    racers.append(workers.start())
    others = [racer for racer in racers[:-1] if not racer.channels]
    await workers.started(racers)

    async def somebody_got_it() -> Any:
        answers = await asyncio.gather(*(racer.connect() for racer in others[:2]))
        return any("channel" in answer for answer in answers)

    await eventually(somebody_got_it, timeout=PATIENCE)
    assert not await places.taken() & victim.channels
    assert await places.taken() == {name for racer in racers for name in racer.channels}
    assert len(await places.taken()) == LIMIT


async def _a_close(places: Places, racers: list[Worker], closing: Worker) -> None:
    """Its place is free at once."""
    closing.tell("reopen")
    assert await closing.answer() == {"reopened": True}
    closing.channels.clear()
    assert len(await places.taken()) == LIMIT - 1
    assert "channel" in await closing.connect()
    assert "refused" in await closing.connect()


@pytest.mark.timeout(300)
async def test_one_that_was_paused_has_lost_its_places(workers: Workers, places: Places) -> None:
    paused, other = workers.start(), workers.start()
    await workers.started([paused, other])
    for _ in range(LIMIT):
        assert "channel" in await paused.connect()
    assert await other.connect() == {"refused": "user"}
    paused.process.send_signal(signal.SIGSTOP)

    async def took_all() -> Any:
        await other.connect()
        return len(other.channels) == LIMIT

    await eventually(took_all, timeout=PATIENCE)
    paused.process.send_signal(signal.SIGCONT)
    await eventually(lambda: len(paused.ended) == LIMIT, timeout=PATIENCE)
    assert {answer["ended"] for answer in paused.ended} == paused.channels
    assert {answer["scope"] for answer in paused.ended} == {"user"}
    assert await places.taken() == other.channels
    # It goes on as one that has none.
    await other.leave()
    paused.channels.clear()

    async def connected() -> Any:
        return "channel" in await paused.connect()

    await eventually(connected, timeout=PATIENCE)
    assert await places.taken() == paused.channels
    await places.check()
    assert places.most == LIMIT
