"""Competing receivers under cancellation, kills and lost connections: none twice, none lost.

Each process writes down what `receive()` has returned, before anything else can happen. What it was
handed and could not write, because it was killed, is all that may be missing.
"""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
from collections import Counter
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from pgchannels import PostgresLayer, Settings, receivers
from pgchannels.embedded import EmbeddedPostgres
from pgchannels.errors import DatabaseUnavailable
from pgchannels.receivers import Receivers
from tests.support.eventually import eventually
from tests.support.processes import Processes
from tests.support.tcp_proxy import TcpProxy

# Its arguments: the file to write to, how many receive at once, a seed.
RECEIVER = """
import asyncio, os, random, signal, sys
from pgchannels import PostgresLayer

path, count, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
draw = random.Random(seed)
layer = PostgresLayer()

def note(message):
    os.write(file, b"%d\\n" % message["n"])

async def receive():
    note(await layer.receive("jobs"))

async def cancelled():
    task = asyncio.create_task(receive())
    await asyncio.sleep(draw.random() * 0.02)
    task.cancel()
    await asyncio.wait([task])

async def waited_for():
    note(await asyncio.wait_for(layer.receive("jobs"), draw.random() * 0.02))

async def timed_out():
    async with asyncio.timeout(draw.random() * 0.02):
        await receive()

async def its_own_timeout():
    note(await layer.receive("jobs", timeout=draw.choice([0, 0.01])))

WAYS = (receive, receive, cancelled, waited_for, timed_out, its_own_timeout)

async def work():
    while True:
        try:
            await draw.choice(WAYS)()
        except TimeoutError:
            pass

async def main():
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    async with layer:
        working = [asyncio.create_task(work()) for _ in range(count)]
        print("ready", flush=True)
        await stopped.wait()
        for task in working:
            task.cancel()
        await asyncio.gather(*working, return_exceptions=True)

asyncio.run(main())
"""

QUICK = {"poll_interval": 0.2, "heartbeat_interval": 0.5, "lease_time": 1.0}
TASKS = 30


class Receiving:
    """Processes that compete for one channel, and what they have written down."""

    def __init__(self, processes: Processes, directory: Path, database_url: str) -> None:
        self._processes = processes
        self._directory = directory
        self._env = {f"PGCHANNELS_{name.upper()}": str(value) for name, value in QUICK.items()}
        self._env["PGCHANNELS_DATABASE_URL"] = database_url
        self._files: list[Path] = []
        self.running: list[subprocess.Popen[bytes]] = []

    async def start(self, count: int) -> None:
        """Start processes, and wait until they receive."""
        started = []
        for _ in range(count):
            path = self._directory / f"received-{len(self._files)}"
            path.touch()
            self._files.append(path)
            arguments = ("-c", RECEIVER, str(path), str(TASKS), str(len(self._files)))
            started.append(self._processes.start(*arguments, env=self._env))
        self.running += started
        output = self._processes.output
        await eventually(lambda: all("ready" in output(each) for each in started), timeout=60)

    def kill(self) -> None:
        """SIGKILL the one that has run longest."""
        process = self.running.pop(0)
        process.kill()
        process.wait()

    async def stop(self) -> None:
        """Let them all hand back what nobody has taken."""
        for process in self.running:
            process.send_signal(signal.SIGTERM)
        for process in self.running:
            assert await asyncio.to_thread(process.wait, 30) == 0, self._processes.output(process)

    def received(self) -> list[int]:
        """What all have received so far; lines that a kill has cut short are left out."""
        lines: list[str] = []
        for path in self._files:
            lines += path.read_text().split("\n")[:-1]
        return [int(line) for line in lines]

    def size(self) -> int:
        """Grows with every message; cheap to ask."""
        return sum(path.stat().st_size for path in self._files)

    async def reached(self, size: int) -> None:
        await eventually(lambda: self.size() > size, timeout=60)


async def publish(layer: PostgresLayer, numbers: range) -> None:
    """Send to the channel and to two groups that it is a member of, in several tasks."""

    async def some(part: range) -> None:
        for n in part:
            if n % 3 == 0:
                await layer.send("jobs", {"n": n})
            else:
                await layer.group_send(f"team:{n % 3}", {"n": n})

    async with asyncio.TaskGroup() as group:
        for start in range(20):
            group.create_task(some(numbers[start::20]))


async def all_taken(database_url: str) -> Any:
    """Whether nothing is left, neither unclaimed nor handed back."""
    connection = await asyncpg.connect(database_url)
    try:
        return await connection.fetchval(
            "select not exists (select from pgchannels.outbox)"
            " and c.cursor >= (select max(m.id) from pgchannels.messages m"
            "                   where m.channel = 'jobs' or m.channel like 'team:%')"
            " and c.returned = '{}' from pgchannels.cursors c where c.name = 'jobs'"
        )
    finally:
        await connection.close(timeout=5)


async def rest(layer: PostgresLayer) -> list[int]:
    """What the others have left or handed back."""
    numbers = []
    with suppress(TimeoutError):
        while True:
            numbers.append((await layer.receive("jobs", timeout=1))["n"])
    return numbers


async def joined(layer: PostgresLayer) -> None:
    for number in (1, 2):
        await layer.group_add(f"team:{number}", "jobs")


def check(received: list[int], expected: range, *, may_lack: int = 0) -> None:
    repeats = [n for n, count in Counter(received).items() if count > 1]
    assert not repeats, f"{len(repeats)} were received twice, such as {repeats[:5]}"
    assert set(received) <= set(expected)
    missing = sorted(set(expected) - set(received))
    assert len(missing) <= may_lack, f"{len(missing)} were lost, such as {missing[:5]}"


@pytest.mark.slow
@pytest.mark.parametrize("kills", [0, 2])
async def test_four_processes_compete(
    database_url: str, processes: Processes, tmp_path: Path, kills: int
) -> None:
    """20 000 messages, random cancellation; two processes are killed midway and replaced."""
    expected = range(20_000)
    receiving = Receiving(processes, tmp_path, database_url)
    async with asyncio.timeout(100), PostgresLayer(database_url) as layer:
        await joined(layer)
        await receiving.start(4)
        # What comes last waits for the kills, which are midway on any machine.
        first = expected[: len(expected) * 3 // 4]
        publishing = asyncio.create_task(publish(layer, first))
        lines = len("12345\n")
        for kill in range(kills):
            share = (kill + 2) * len(expected) * lines // (kills + 4)
            await receiving.reached(share)
            receiving.kill()
            await receiving.start(1)
        await publishing
        await publish(layer, expected[len(first) :])
        await eventually(lambda: all_taken(database_url), timeout=60)
        await receiving.stop()
        check(receiving.received() + await rest(layer), expected, may_lack=kills * TASKS)


class Publishing:
    """Publishes until it is stopped, each message until that is certain: its key makes it once."""

    def __init__(self, layer: PostgresLayer) -> None:
        self._layer = layer
        self._stopped = False
        self._count = 0
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> range:
        """Return what has been published."""
        self._stopped = True
        await self._task
        return range(self._count)

    async def _run(self) -> None:
        while not self._stopped:
            some = range(self._count, self._count + 20)
            self._count = some.stop
            # Not more than receivers that are held up all the time can take in the end.
            await asyncio.gather(*map(self._publish, some), asyncio.sleep(0.04))

    async def _publish(self, n: int) -> None:
        channel = "jobs" if n % 3 == 0 else f"team:{n % 3}"
        while True:
            try:
                await self._layer.send(channel, {"n": n}, key=str(n))
                return
            except DatabaseUnavailable:
                await asyncio.sleep(0.05)


async def test_their_backends_are_terminated(
    database_url: str, processes: Processes, tmp_path: Path
) -> None:
    """Whatever a session was doing: claims are repeated, not doubled, and none is lost."""
    receiving = Receiving(processes, tmp_path, database_url)
    draw = random.Random(0)
    terminated = 0
    connection = await asyncpg.connect(database_url)
    try:
        async with asyncio.timeout(90), PostgresLayer(database_url) as layer:
            await joined(layer)
            publishing = Publishing(layer)
            await receiving.start(2)
            while terminated < 30:
                # Time enough to connect and to claim, often: who never gets that far waits for
                # longer and longer, and is in no danger.
                await asyncio.sleep(draw.random() * 0.3)
                terminated += await connection.fetchval(
                    "select count(*) filter (where pg_terminate_backend(pid)) from pg_stat_activity"
                    " where datname = current_database()"
                    " and application_name = 'pgchannels receivers'"
                )
            expected = await publishing.stop()
            await eventually(lambda: all_taken(database_url), timeout=60)
            await receiving.stop()
            received = receiving.received() + await rest(layer)
    finally:
        await connection.close(timeout=5)
    check(received, expected)


async def test_the_server_crashes(
    own_server: EmbeddedPostgres, processes: Processes, tmp_path: Path
) -> None:
    url = own_server.url()
    receiving = Receiving(processes, tmp_path, url)
    async with asyncio.timeout(90), PostgresLayer(url) as layer:
        await joined(layer)
        publishing = Publishing(layer)
        await receiving.start(2)
        for _ in range(2):
            await receiving.reached(receiving.size() + 1_000)
            await asyncio.to_thread(own_server.restart, "immediate")
        await receiving.reached(receiving.size() + 1_000)
        expected = await publishing.stop()
        await eventually(lambda: all_taken(url), timeout=60)
        await receiving.stop()
        check(receiving.received() + await rest(layer), expected)


@pytest.mark.parametrize("overtaking", [False, True])
async def test_a_claim_outlives_its_connection(database_url: str, *, overtaking: bool) -> None:
    """A claim waits for a lock, and its connection breaks, which the server does not notice.

    It is made, and its answer lost, before it is repeated; or it is repeated while it still waits.
    """
    holder = await asyncpg.connect(database_url)
    watcher = await asyncpg.connect(database_url)

    async def claims_that_wait() -> Any:
        return await watcher.fetchval(
            "select count(*) from pg_stat_activity where datname = current_database()"
            " and application_name = 'pgchannels receivers' and wait_event_type = 'Lock'"
        )

    async def claimed() -> Any:
        return await watcher.fetchval(
            "select cursor > 1 from pgchannels.cursors where name = 'jobs'"
        )

    try:
        async with (
            asyncio.timeout(30),
            TcpProxy(database_url) as proxy,
            PostgresLayer(database_url) as other,
            PostgresLayer(Settings(database_url=proxy.url, **QUICK)) as layer,
        ):
            await other.send("jobs", {"n": 0})
            assert (await layer.receive("jobs"))["n"] == 0
            async with other.subscribe("jobs", after="0") as stream:
                for n in range(1, 4):
                    await other.send("jobs", {"n": n})
                while (await anext(stream))["n"] < 3:
                    pass
            transaction = holder.transaction()
            await transaction.start()
            await holder.execute("select from pgchannels.channels where name = 'jobs' for update")
            receiving = asyncio.create_task(layer.receive("jobs"))
            await eventually(claims_that_wait)
            await proxy.cut(refuse=not overtaking)
            if overtaking:

                async def both_wait() -> Any:
                    return await claims_that_wait() == 2

                await eventually(both_wait)
                await transaction.rollback()
            else:
                await transaction.rollback()
                await eventually(claimed)
                proxy.resume()
            received = [(await receiving)["n"]]
            received += [(await layer.receive("jobs", timeout=5))["n"] for _ in range(2)]
            assert received == [1, 2, 3]
            with pytest.raises(TimeoutError):
                await layer.receive("jobs", timeout=0)
    finally:
        await holder.close(timeout=5)
        await watcher.close(timeout=5)


async def cancelled_too_late(layer: PostgresLayer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be cancelled when the message 1 has been handed out, and before it could be taken."""
    pass_on = Receivers._pass_on
    receiving = asyncio.create_task(layer.receive("jobs"))

    def pass_on_and_cancel(*arguments: Any) -> None:
        pass_on(*arguments)
        receiving.cancel()

    with monkeypatch.context() as patch:
        patch.setattr(Receivers, "_pass_on", pass_on_and_cancel)
        await layer.send("jobs", {"n": 1})
        await asyncio.wait([receiving])
    assert receiving.cancelled()


async def test_cancelled_when_its_channel_is_forgotten(
    database_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The inbox is cleared away just when what it has handed out comes back."""
    connection = await asyncpg.connect(database_url)

    async def handed_back() -> Any:
        return await connection.fetchval("select returned from pgchannels.cursors")

    try:
        async with PostgresLayer(database_url) as layer:
            monkeypatch.setattr(receivers, "_IDLE_TIME", 0.0)
            await cancelled_too_late(layer, monkeypatch)
            await eventually(handed_back)
            monkeypatch.undo()
            assert (await layer.receive("jobs", timeout=5))["n"] == 1
    finally:
        await connection.close(timeout=5)
    assert "failed" not in caplog.text


async def test_handing_back_is_refused(
    database_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By a deadlock, say. It is tried again."""
    async with PostgresLayer(database_url) as layer:
        connection = await asyncpg.connect(database_url)
        try:
            await connection.execute(
                "create sequence attempts;"
                "create function refuse() returns trigger language plpgsql as $$ begin"
                "  if nextval('public.attempts') = 1 then"
                "    raise exception 'refused' using errcode = 'deadlock_detected';"
                "  end if;"
                "  return new; end $$;"
                "create trigger refuse before update of returned on pgchannels.cursors"
                "  for each row when (new.returned <> '{}') execute function refuse()"
            )
        finally:
            await connection.close(timeout=5)
        await cancelled_too_late(layer, monkeypatch)
        await eventually(lambda: "refused" in caplog.text)
        assert (await layer.receive("jobs", timeout=10))["n"] == 1


async def test_the_row_of_a_new_channel_is_refused(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What the same claim has taken for another channel is not lost for that."""
    connection = await asyncpg.connect(database_url)
    try:
        async with asyncio.timeout(30), PostgresLayer(database_url) as layer:
            await layer.send("jobs", {"n": 0})
            assert (await layer.receive("jobs"))["n"] == 0
            await connection.execute(
                "create function refuse() returns trigger language plpgsql as $$ begin"
                "  raise exception 'refused' using errcode = 'deadlock_detected';"
                "end $$;"
                "create trigger refuse before insert on pgchannels.channels"
                "  for each row execute function refuse()"
            )
            async with layer.subscribe("jobs") as stream:
                await layer.send("jobs", {"n": 1})
                await anext(stream)  # and so it is there to be claimed
            receiving = [asyncio.create_task(layer.receive(name)) for name in ("jobs", "new")]
            assert (await receiving[0])["n"] == 1
            await eventually(lambda: "refused" in caplog.text)
            await connection.execute("drop trigger refuse on pgchannels.channels")
            await layer.send("new", {"n": 2})
            assert (await receiving[1])["n"] == 2
    finally:
        await connection.close(timeout=5)


async def test_claims_and_handing_back_for_many_channels(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Several nodes lock the same channels, many at a time, and not against each other."""
    draw = random.Random(1)
    channels = [f"jobs:{n}" for n in range(40)]
    received: list[int] = []

    async def work(layer: PostgresLayer) -> None:
        async def receive() -> None:
            received.append((await layer.receive(draw.choice(channels)))["n"])

        # Until told, and not until cancelled: before Python 3.12, wait_for() that is cancelled just
        # as it has a result returns that, and goes on.
        while not stopping.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(receive(), draw.random() * 0.006)

    stopping = asyncio.Event()
    async with AsyncExitStack() as stack:
        layers = [await stack.enter_async_context(PostgresLayer(database_url)) for _ in range(4)]
        working = [asyncio.create_task(work(layer)) for layer in layers for _ in range(60)]
        for n in range(0, 3_000, 200):
            await asyncio.gather(
                *(layers[0].send(draw.choice(channels), {"n": n + i}) for i in range(200))
            )
        await eventually(lambda: len(received) == 3_000, timeout=90)
        stopping.set()
        await asyncio.gather(*working)
    check(received, range(3_000))
    assert "deadlock" not in caplog.text
