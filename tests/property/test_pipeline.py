"""The whole way, from a crowd of writers to readers that come and go: the promises, all at once.

Writers commit, roll back and nest savepoints; several nodes, in this process and in others, compete
for the sequencing, one is killed; readers move from node to node. Then the log and what each
reader got are compared with what was committed.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from pgchannels import BEGINNING, PostgresLayer, Settings
from pgchannels.orm import install
from pgchannels.orm import publish as publish_in
from pgchannels.store import Store
from tests.support.eventually import eventually
from tests.support.partitions import make_small
from tests.support.processes import Processes

if TYPE_CHECKING:
    from asyncpg import Connection, Record
    from sqlalchemy.ext.asyncio import AsyncEngine

    from pgchannels import Message, Position

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240), pytest.mark.xdist_group("crowds")]

CHANNELS = tuple(f"room:{number}" for number in range(6))
PARTITION = 100
TRANSACTIONS = 30
ASYNCPG_WRITERS = 18
ORM_WRITERS = 4
SENDERS = 3

# Small pages, buffers and batches, so that each has many ends to go wrong at.
SMALL = {
    "batch_size": 20,
    "page_size": 25,
    "buffer_size": 10,
    "poll_interval": 0.2,
    "heartbeat_interval": 0.5,
    "lease_time": 1.5,
    "prune_interval": 0.3,
}

# A node that seals as often as it can, whether or not there is something.
SEQUENCING_NODE = """
import asyncio
from pgchannels import PostgresLayer

async def main():
    async with PostgresLayer() as layer:
        print("sequencing", flush=True)
        while True:
            layer.wake()
            await asyncio.sleep(0.002)

asyncio.run(main())
"""

INSERT = """
insert into pgchannels.outbox (channel, payload)
values ($1, json_build_object('key', $2::text))
"""


@dataclass
class Transaction:
    """What it committed, and when, by a clock that ticks at each event."""

    began: int
    committed: int = 0
    messages: list[tuple[str, str]] = field(default_factory=list)


class Scene:
    """What the writers have in common."""

    def __init__(self, seed: int, layers: list[PostgresLayer]) -> None:
        self.seed = seed
        self.layers = layers
        self.clock = count(1)
        self.committed: list[Transaction] = []
        self.ended = 0

    def random(self, who: str) -> random.Random:
        return random.Random(f"{self.seed} {who}")

    def commit(self, transaction: Transaction) -> None:
        transaction.committed = next(self.clock)
        self.committed.append(transaction)


class Rollback(Exception):
    """Undo a savepoint or a transaction."""


async def pause(draw: random.Random) -> None:
    if draw.random() < 0.3:
        await asyncio.sleep(draw.uniform(0, 0.01))


async def write_with_asyncpg(scene: Scene, connection: Connection[Record], name: str) -> None:
    draw = scene.random(name)
    serial = count(1)

    async def write(depth: int, messages: int) -> list[tuple[str, str]]:
        written: list[tuple[str, str]] = []
        for _ in range(messages):
            await pause(draw)
            if depth < 3 and draw.random() < 0.3:
                inner: list[tuple[str, str]] = []
                with suppress(Rollback):
                    async with connection.transaction():
                        inner = await write(depth + 1, draw.randint(1, 3))
                        if draw.random() < 0.4:
                            inner = []
                            raise Rollback
                written += inner
            else:
                message = (draw.choice(CHANNELS), f"{name}.{next(serial)}")
                await connection.execute(INSERT, *message)
                written.append(message)
        return written

    for _ in range(TRANSACTIONS):
        transaction = Transaction(next(scene.clock))
        with suppress(Rollback):
            async with connection.transaction():
                transaction.messages = await write(0, draw.randint(1, 5))
                if draw.random() < 0.2:
                    raise Rollback
            scene.commit(transaction)
            if draw.random() < 0.5:
                draw.choice(scene.layers).wake()
        scene.ended += 1


async def write_with_the_orm(
    scene: Scene, sessions: async_sessionmaker[AsyncSession], name: str
) -> None:
    draw = scene.random(name)
    serial = count(1)

    async def write(session: AsyncSession, depth: int, messages: int) -> list[tuple[str, str]]:
        written: list[tuple[str, str]] = []
        for _ in range(messages):
            await pause(draw)
            if depth < 3 and draw.random() < 0.3:
                inner: list[tuple[str, str]] = []
                with suppress(Rollback):
                    async with session.begin_nested():
                        inner = await write(session, depth + 1, draw.randint(1, 3))
                        if draw.random() < 0.4:
                            inner = []
                            raise Rollback
                written += inner
            else:
                message = (draw.choice(CHANNELS), f"{name}.{next(serial)}")
                publish_in(session, message[0], {"key": message[1]})
                written.append(message)
        return written

    for _ in range(TRANSACTIONS):
        transaction = Transaction(next(scene.clock))
        with suppress(Rollback):
            async with sessions() as session, session.begin():
                transaction.messages = await write(session, 0, draw.randint(1, 5))
                if draw.random() < 0.2:
                    raise Rollback
            scene.commit(transaction)
        scene.ended += 1


async def write_by_sending(scene: Scene, name: str) -> None:
    draw = scene.random(name)
    for number in range(TRANSACTIONS):
        transaction = Transaction(next(scene.clock))
        transaction.messages = [(draw.choice(CHANNELS), f"{name}.{number}")]
        channel, key = transaction.messages[0]
        await draw.choice(scene.layers).send(channel, {"key": key})
        scene.commit(transaction)
        scene.ended += 1
        await pause(draw)


class Reader:
    """Reads some channels to their last message, on one node after the other."""

    def __init__(self, scene: Scene, name: str) -> None:
        self._draw = scene.random(name)
        self._layers = scene.layers
        self.channels = self._draw.sample(CHANNELS, self._draw.randint(1, len(CHANNELS)))
        self.name = f"{name} {self.channels}"
        self.got: list[Message] = []
        self._missing = set(self.channels)
        self.visits = 0

    async def read(self) -> None:
        while self._missing:
            self.visits += 1
            patience = self._draw.uniform(0.01, 0.5)
            with suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    await self._visit(self._draw.choice(self._layers), self._draw.randint(1, 80))

    async def _visit(self, layer: PostgresLayer, messages: int) -> None:
        position = self.got[-1].position if self.got else BEGINNING
        async with layer.subscribe(*self.channels, after=position) as stream:
            async for message in stream:
                self._receive(message)
                messages -= 1
                if messages == 0 or not self._missing:
                    return

    def _receive(self, message: Message) -> None:
        self.got.append(message)
        if message["key"] == "end":
            self._missing.discard(message.channel)

    def check(self, log: list[tuple[int, str, str]]) -> None:
        got = [(message.id, message.channel, message["key"]) for message in self.got]
        assert got == [row for row in log if row[1] in self.channels], self.name


class JoiningReader(Reader):
    """Keeps a position for each channel, as a client of a socket does, and joins them in turn."""

    async def _visit(self, layer: PostgresLayer, messages: int) -> None:
        positions: dict[str, Position] = {m.channel: m.position for m in self.got}
        async with layer.subscribe() as stream:
            waiting = self._draw.sample(self.channels, len(self.channels))
            while messages > 0 and self._missing:
                if waiting:
                    channel = waiting.pop()
                    await stream.join(channel, positions.get(channel, BEGINNING))
                for message in await stream.batch():
                    self._receive(message)
                    messages -= 1

    def check(self, log: list[tuple[int, str, str]]) -> None:
        for channel in self.channels:
            got = [(m.id, m.channel, m["key"]) for m in self.got if m.channel == channel]
            assert got == [row for row in log if row[1] == channel], self.name


def check_log(log: list[tuple[int, str, str]], committed: list[Transaction]) -> None:
    assert [row[0] for row in log] == list(range(1, len(log) + 1)), "a hole in the log"
    published = Counter(message for transaction in committed for message in transaction.messages)
    assert Counter((channel, key) for _, channel, key in log) == published

    ids = {(channel, key): id for id, channel, key in log}
    events: list[tuple[int, int]] = []
    for transaction in committed:
        own = [ids[message] for message in transaction.messages]
        assert own == sorted(own), f"not in the order of publishing: {transaction}"
        if own:
            events += [(transaction.began, own[0]), (transaction.committed, -own[-1])]
    newest = 0
    for _, event in sorted(events):
        if event > 0:
            assert newest < event, f"{event} began after {newest} was committed, but is before it"
        else:
            newest = max(newest, -event)


@pytest.fixture
async def connection(database_url: str) -> AsyncIterator[Connection[Record]]:
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close(timeout=5)


@pytest.fixture
async def engine(database_url: str) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(
        "postgresql+asyncpg://", async_creator=lambda: asyncpg.connect(database_url)
    )
    yield engine
    await engine.dispose()


@pytest.mark.parametrize("held_open", [False, True], ids=["", "beside an open transaction"])
@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_every_committed_message_once_in_one_order(
    database_url: str,
    connection: Connection[Record],
    engine: AsyncEngine,
    processes: Processes,
    seed: int,
    held_open: bool,
) -> None:
    make_small(database_url, PARTITION)
    env = {f"PGCHANNELS_{name.upper()}": str(value) for name, value in SMALL.items()}
    env["PGCHANNELS_DATABASE_URL"] = database_url
    others = [processes.start("-c", SEQUENCING_NODE, env=env) for _ in range(2)]
    async with AsyncExitStack() as stack:
        settings = Settings.model_validate({**SMALL, "database_url": database_url})
        layers = [await stack.enter_async_context(PostgresLayer(settings)) for _ in range(3)]
        scene = Scene(seed, layers)
        sessions = async_sessionmaker(engine)
        install(sessions, layers[0])
        await eventually(lambda: all("sequencing" in processes.output(other) for other in others))
        if held_open:
            await connection.execute("begin")
            await connection.execute(INSERT, CHANNELS[0], "held open")

        readers = [Reader(scene, f"reader {number}") for number in range(5)]
        readers += [JoiningReader(scene, f"joining reader {number}") for number in range(3)]
        writers = []
        for number in range(ASYNCPG_WRITERS):
            own = await asyncpg.connect(database_url)
            stack.push_async_callback(own.close, timeout=5)
            writers.append(write_with_asyncpg(scene, own, f"asyncpg {number}"))
        writers += [write_with_the_orm(scene, sessions, f"orm {n}") for n in range(ORM_WRITERS)]
        writers += [write_by_sending(scene, f"sender {number}") for number in range(SENDERS)]

        async with asyncio.timeout(200), asyncio.TaskGroup() as reading:
            for reader in readers:
                reading.create_task(reader.read())
            async with asyncio.TaskGroup() as writing:
                for writer in writers:
                    writing.create_task(writer)
                await eventually(lambda: scene.ended > TRANSACTIONS * len(writers) / 2, timeout=150)
                others[0].kill()  # in the middle of a batch, perhaps
            for channel in CHANNELS:
                await layers[0].send(channel, {"key": "end"})

        # Of itself, not of a transaction that anyone waited for.
        ends = [Transaction(next(scene.clock), next(scene.clock), [(c, "end")]) for c in CHANNELS]
        rows = await layers[1]._opened.store.fetch("read_log", 0, 10**6, 10**9, 0, 0)
        log = [(row["id"], row["channel"], json.loads(row["payload"])["key"]) for row in rows]
        try:
            check_log(log, scene.committed + ends)
            for reader in readers:
                reader.check(log)
        except AssertionError as error:
            error.add_note(f"seed {seed}; visits: {[reader.visits for reader in readers]}")
            raise
        assert len(log) > 5 * PARTITION, "too few messages to have rolled partitions over"
        if held_open:
            async with layers[2].subscribe(CHANNELS[0], after=f"1-{len(log)}") as stream:
                await connection.execute("commit")
                late = await asyncio.wait_for(anext(stream), 10)
            assert (late.id, late["key"]) == (len(log) + 1, "held open")
        assert await connection.fetchval("select count(*) from pgchannels.outbox") == 0


@pytest.mark.parametrize("by_channel", [False, True])
async def test_a_page_is_whole_although_the_log_grew_a_partition_while_it_was_planned(
    database_url: str, connection: Connection[Record], by_channel: bool
) -> None:
    """A plan without the newest partition must not meet a snapshot that has messages in it."""
    make_small(database_url, PARTITION)
    await connection.execute(
        "insert into pgchannels.outbox (channel, payload) select 'a', '{}'"
        " from generate_series(1, 100)"
    )
    await connection.execute("select pgchannels.seal(100)")  # fills the first partition
    await connection.execute(
        "insert into pgchannels.outbox (channel, payload) select 'a', '{}'"
        " from generate_series(1, 20)"
    )
    blocker = await asyncpg.connect(database_url)
    store = Store(Settings.model_validate({"database_url": database_url}))
    await store.open()
    try:
        async with blocker.transaction():
            # The planner has the list of partitions, and waits for the first of them.
            await blocker.execute("lock table pgchannels.messages_1")
            reading = asyncio.create_task(
                store.read_channels(["a"], 90) if by_channel else store.read_log(90)
            )
            await eventually(
                lambda: connection.fetchval(
                    "select count(*) from pg_locks"
                    " where relation = 'pgchannels.messages_1'::regclass and not granted"
                )
            )
            await connection.execute("select pgchannels.seal(20)")
        page = await asyncio.wait_for(reading, 10)
        assert [message.id for message in page.messages] == list(range(91, page.head.id + 1))
    finally:
        await store.close()
        await blocker.close(timeout=5)
