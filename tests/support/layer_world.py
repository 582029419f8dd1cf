"""A channel layer's nodes and whoever uses them, so that two layers can be driven alike.

A :class:`World` does what it is told and says what came of it, in terms that do not depend on the
layer: names that it has made up are symbols, positions are those of messages and of markers.
Everything that lasts, lasts by a time that passes only in :meth:`World.advance`.
"""

from __future__ import annotations

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, cast

import asyncpg

from pgchannels import MemoryLayer, PostgresLayer, Settings
from pgchannels.channels import DIRECT, EVERYONE, presence_channel, user_channel
from pgchannels.memory import MemoryLog
from pgchannels.messages import ATTACHMENTS, EXCEPT, ONLY
from tests.support.eventually import eventually
from tests.support.pruning import only_by_hand, prune

if TYPE_CHECKING:
    from asyncpg import Connection, Record

    from pgchannels import Message, Position
    from pgchannels.records import Receipt
    from pgchannels.stream import Stream

KEEPER, CAPPED = 0, 2
"""The node that is never closed or killed; and the one that fills no channel beyond capacity."""
NODES = 3

SECONDS = (100, 200, 300, 1000)
"""By how much time advances. All that lasts ends halfway between, so that the seconds which a run
takes change nothing."""
TTLS = (50, 450)

SETTINGS: dict[str, Any] = {
    "lease_time": 150,
    "presence_grace": 150,
    "group_expiry": 250,
    "key_lifetime": timedelta(seconds=350),
    "retention": timedelta(seconds=950),
    "poll_interval": 0.25,
    # Small, so that each has many ends to go wrong at.
    "page_size": 4,
    "buffer_size": 3,
    "pool_size": 3,
}
CAPACITY = 3

ORDINARY = ("a", "b")
GROUPS = ("g", "h")
USERS = ("u", "v")

Outcome = Any


@dataclass
class Reader:
    """Who reads a stream: all the time, or a slow one only when it is told to."""

    world: World
    stream: Stream
    node: int
    symbols: tuple[str, ...]
    member: str | None
    slow: bool
    new: list[tuple[Any, ...]] = field(default_factory=list)
    last: Position | None = None
    _task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._read())

    async def pause(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def close(self) -> None:
        await self.pause()
        self.stream.close()

    @property
    def is_settled(self) -> bool:
        """Whether all that there is has been read."""
        if self._task is None or self.ended:
            return True
        return self.stream.caught_up is not None and not self.stream.pending

    @property
    def ended(self) -> bool:
        return self._task is not None and self._task.done()

    async def _read(self) -> None:
        async for message in self.stream:
            self.last = message.position
            self.new.append(self.world.describe(message))

    def view(self, *, ordered: bool) -> Outcome:
        if self.ended:
            return "ended"  # until then, it may or may not have been told what the closing did
        new: Any = self.new
        if not ordered:
            new = {what[0]: [each for each in new if each[0] == what[0]] for what in new}
            new = {channel: in_free_order(each) for channel, each in new.items()}
        names = [name for name in self.world.known_names() if self.stream.reads(name)]
        return new, self.stream.truncated, sorted(str(self.world.symbol(name)) for name in names)


def in_free_order(events: Iterable[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Those who leave in one moment are told of in any order; the counts go down all the same."""
    result: list[tuple[Any, ...]] = []
    leaving: list[tuple[Any, ...]] = []
    for event in (*events, None):
        if event is not None and event[1] == "presence.left":
            leaving.append(event)
            continue
        result += sorted((each[:-1] for each in leaving), key=repr)
        result += [("counts", *(each[-1] for each in leaving))] if leaving else []
        leaving = []
        result += [] if event is None else [event]
    return result


@dataclass
class Waiting:
    """A call of ``receive()`` that is under way."""

    node: int
    task: asyncio.Task[Message]


class World(ABC):
    """Nodes, numbered; channels of connections, numbered; streams, numbered."""

    def __init__(self) -> None:
        self.layers: list[Any] = []
        self.prefix = ""
        self._begin_names("")

    def _begin_names(self, prefix: str) -> None:
        self.prefix = prefix
        self.connections: list[str] = []
        self.readers: dict[int, Reader] = {}
        self.waiting: dict[str, list[Waiting]] = {}
        self.received: list[Outcome] = []
        self.markers: list[Position] = []
        self.seen: dict[int, Position] = {}
        self.receipts: dict[tuple[str, str], datetime] = {}

    # Names

    def name(self, channel: str | int) -> str:
        """The channel of a symbol: a connection's is a number."""
        if isinstance(channel, int):
            return self.connections[channel]
        return channel if channel == EVERYONE else f"{self.prefix}{channel}"

    def symbol(self, name: str | None) -> str | None:
        return f"connection {self.connections.index(name)}" if name in self.connections else name

    def user(self, user: str | None) -> str | None:
        return None if user is None else f"{self.prefix}{user}"

    def known_names(self) -> list[str]:
        plain = [self.name(symbol) for symbol in (*ORDINARY, *GROUPS)]
        users = [user_channel(f"{self.prefix}{user}") for user in USERS]
        presences = [presence_channel(name) for name in plain]
        return [*plain, *users, *presences, *self.connections, EVERYONE, DIRECT]

    def position(self, where: Any) -> Position | str | None:
        """What ``("marker", n)`` or ``("message", n)`` stand for; anything else is itself."""
        if not isinstance(where, tuple):
            return cast("str | None", where)
        kind, number = where
        return self.markers[number] if kind == "marker" else self.seen[number]

    def describe(self, message: Message) -> tuple[Any, ...]:
        """What a message is, whichever layer it came from. Its channel comes first."""
        data = message.data
        channel = self.symbol(message.channel)
        if message.channel.startswith("presence:"):
            who: tuple[Any, ...] = (data["user_id"], self.symbol(data["connection"]))
            if data["type"] == "presence.joined":  # who leaves may have been there several times
                who += (data["metadata"],)
            assert sorted(data) == sorted(
                ("type", "group", "user_id", "connection", "metadata", "count")
            )
            return channel, data["type"], data["group"], *who, data["count"]
        if "n" in data:
            self.seen[data["n"]] = message.position
        headers = dict(message.headers)
        headers.pop(ATTACHMENTS, None)
        excluded = self.symbol(headers.pop(EXCEPT, None))
        only = sorted(str(self.symbol(name)) for name in json.loads(headers.pop(ONLY, "[]")))
        size, attachments = message.size, tuple(message.attachments)
        return channel, message.payload, repr(data), attachments, size, headers, excluded, only

    def checked(self, receipt: Receipt, channel: str, extra: dict[str, Any]) -> Outcome:
        """Whether it was repeated; then, it is the first one's."""
        if (key := extra.get("key")) is not None:
            if receipt.repeated:
                assert receipt.created_at == self.receipts[channel, key]
            self.receipts[channel, key] = receipt.created_at
        return receipt.repeated

    # Who receives

    def start_receiving(self, node: int, channel: str | int) -> None:
        name = self.name(channel)
        receiving = self.layers[node].receive(name)
        self.waiting.setdefault(name, []).append(Waiting(node, asyncio.create_task(receiving)))

    async def cancel_receiver(self, channel: str | int) -> bool:
        """Cancel one of those who wait, any; what has come for them has been gathered."""
        self.gather()
        if not (waiting := self.waiting.get(self.name(channel))):
            return False
        task = waiting.pop().task
        task.cancel()
        await asyncio.wait([task])
        return task.cancelled()

    async def cancel_receivers(self, where: Callable[[str, Waiting], bool]) -> None:
        for name, waiting in self.waiting.items():
            for each in [each for each in waiting if where(name, each)]:
                waiting.remove(each)
                each.task.cancel()
                await asyncio.gather(each.task, return_exceptions=True)

    def gather(self) -> None:
        """Take what has been received in the meantime."""
        for name, waiting in self.waiting.items():
            for each in [each for each in waiting if each.task.done()]:
                waiting.remove(each)
                error = each.task.exception()
                what = type(error).__name__ if error else self.describe(each.task.result())
                self.received.append((self.symbol(name), what))

    # What is to be compared

    def view(self, *, ordered: bool) -> Outcome:
        self.gather()
        waiting = {self.symbol(name): len(each) for name, each in self.waiting.items() if each}
        streams = {number: reader.view(ordered=ordered) for number, reader in self.readers.items()}
        return {
            "waiting": waiting,
            "received": sorted(self.received, key=repr),
            "streams": streams,
        }

    def forget(self) -> None:
        """What is new from here on is news."""
        self.received.clear()
        for reader in self.readers.values():
            reader.new.clear()

    async def membership(self, node: int, group: str) -> Outcome:
        layer, name = self.layers[node], self.name(group)
        members = {self.symbol(member) for member in await layer.group_members(name)}
        present = [
            (each.user_id, self.symbol(each.connection), each.connections, each.metadata)
            for each in await layer.presence(name)
        ]
        return members, present

    # Life and death

    @property
    def open_nodes(self) -> list[int]:
        return [node for node, layer in enumerate(self.layers) if layer._node is not None]

    async def open(self, node: int) -> None:
        await self.layers[node].open()

    async def close(self, node: int) -> None:
        await self.layers[node].close()

    async def kill(self, node: int) -> None:
        """Let the node be gone without a word; also to those who use it here."""
        await self._leave(node)
        await self._kill(node)

    async def _leave(self, node: int) -> None:
        await self.cancel_receivers(lambda _, waiting: waiting.node == node)
        for number, reader in list(self.readers.items()):
            if reader.node == node:
                await reader.close()
                del self.readers[number]

    async def leave_all(self) -> None:
        for node in range(len(self.layers)):
            await self._leave(node)

    async def settle(self) -> None:
        """Wait until all that was done before has had its effects; put a marker there."""
        marker = f"{self.prefix}marker"
        streams = [self.layers[node].subscribe(marker) for node in self.open_nodes]
        for stream in streams:
            await stream.__aenter__()
        try:
            await self.layers[KEEPER].send(marker, {"marker": len(self.markers)})
            async with asyncio.timeout(10):
                positions = [(await anext(stream)).position for stream in streams]
        finally:
            for stream in streams:
                stream.close()
        self.markers.append(positions[0])
        await eventually(lambda: all(reader.is_settled for reader in self.readers.values()))

    @abstractmethod
    async def begin(self, prefix: str) -> None:
        """Begin anew: an empty log, all nodes open."""

    @abstractmethod
    async def end(self) -> None:
        """Leave nothing behind that the next run would meet."""

    @abstractmethod
    async def _kill(self, node: int) -> None: ...

    @abstractmethod
    async def advance(self, seconds: int) -> None:
        """Let time pass, and what is due by then happen."""


class MemoryWorld(World):
    """Memory layers on one log."""

    async def begin(self, prefix: str) -> None:
        self._begin_names(prefix)
        self._now = datetime(2026, 1, 1, tzinfo=UTC)
        log = MemoryLog(clock=self._clock)
        self._log = log
        self.layers = [MemoryLayer(_settings(node), log=log) for node in range(NODES)]
        for layer in self.layers:
            await layer.open()

    async def end(self) -> None:
        for layer in self.layers:
            await layer.close()

    def _clock(self) -> datetime:
        self._now += timedelta(microseconds=1)  # no two things happen at once
        return self._now

    async def settle(self) -> None:
        await super().settle()
        for _ in range(10):
            await asyncio.sleep(0)  # who has been woken, gets what there is

    async def _kill(self, node: int) -> None:
        self.layers[node].kill()

    async def advance(self, seconds: int) -> None:
        self._now += timedelta(seconds=seconds)
        self._log.prune()


class PostgresWorld(World):
    """PostgreSQL layers on one database. They live on from one run to the next.

    Time passes by moving back what is compared with the clock.
    """

    def __init__(self, database_url: str) -> None:
        super().__init__()
        self._url = database_url
        self._dead: list[Any] = []
        self._connection: Connection[Record]

    async def connect(self) -> None:
        self._connection = await asyncpg.connect(self._url)
        only_by_hand(self._url)
        self.layers = [PostgresLayer(_settings(node, self._url)) for node in range(NODES)]

    async def disconnect(self) -> None:
        for layer in self.layers:
            await layer.close()
        await self._connection.close(timeout=5)

    async def begin(self, prefix: str) -> None:
        self._begin_names(prefix)
        self._dead.clear()
        for node in range(NODES):
            await self.open(node)
        await self._connection.execute(
            """
            truncate pgchannels.memberships, pgchannels.present, pgchannels.channels,
                     pgchannels.keys;
            update pgchannels.log set floor = (select head from pgchannels.bounds);
            """
        )
        await self._connection.execute(
            "delete from pgchannels.nodes where id <> all ($1)",
            [layer._node.members._id for layer in self.layers],
        )

    async def end(self) -> None:
        # The others' names are of no run to come, but a node has what it has made.
        for layer in self.layers:
            for name in self.connections:
                if layer._node is not None:
                    await layer.delete_channel(name)

    async def open(self, node: int) -> None:
        await super().open(node)
        layer: Any = self.layers[node]
        await eventually(lambda: layer.is_listening)

    async def _kill(self, node: int) -> None:
        layer: Any = self.layers[node]
        gone, layer._node = layer._node, None
        self._dead.append(gone.members._id)
        tasks = [*gone._tasks.values(), *gone.hub._replays.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for part in (gone.hub, gone._sequencer, gone._pruner, gone.members, gone.receivers):
            part._session.abort()
        gone.store._pool.terminate()
        for _ in range(3):
            await asyncio.sleep(0)  # the sockets are closed by then

    async def advance(self, seconds: int) -> None:
        by = timedelta(seconds=seconds)
        await self._connection.execute(
            f"""
            update pgchannels.messages set expires_at = expires_at - {_interval(by)}
             where expires_at is not null;
            update pgchannels.keys set expires_at = expires_at - {_interval(by)};
            update pgchannels.channels set last_active_at = last_active_at - {_interval(by)};
            update pgchannels.batches set sealed_at = sealed_at - {_interval(by)};
            update pgchannels.nodes set steady_since = steady_since - {_interval(by)};
            update pgchannels.memberships set joined_at = joined_at - {_interval(by)},
                   renewed_at = renewed_at - {_interval(by)}, left_at = left_at - {_interval(by)};
            """
        )
        await self._renew_what_is_waited_for()
        report = await prune(self.layers[KEEPER].settings)
        assert not report.problems
        assert not report.stragglers
        await self._until_none(
            "memberships where left_at < clock_timestamp() - $1::interval", "presence_grace"
        )
        await self._connection.execute(
            "update pgchannels.nodes set heartbeat_at = heartbeat_at - $1::interval"
            " where id = any ($2)",
            *(by, self._dead),
        )
        await self._until_none(
            "nodes where dead_since is not null or heartbeat_at < clock_timestamp() - $1::interval",
            "lease_time",
        )

    async def _renew_what_is_waited_for(self) -> None:
        """What the nodes' housekeeping would have done all the time."""
        self.gather()
        waited_for = [name for name, waiting in self.waiting.items() if waiting]
        for node in self._open_nodes():
            node.receivers._swept_at = float("-inf")
            node.receivers._wakeup.set()
        query = """
            select count(*) from pgchannels.channels
             where name = any ($1) and last_active_at < clock_timestamp() - interval '50 seconds'
            """
        await eventually(lambda: self._is_zero(query, waited_for))

    async def _until_none(self, what: str, setting: str) -> None:
        query = f"select count(*) from pgchannels.{what}"
        duration = timedelta(seconds=getattr(self.layers[KEEPER].settings, setting))

        async def none_is_left() -> Any:
            for node in self._open_nodes():
                # More time has passed than lies between two looks at what is due.
                node.members._rounds = 0
                node.members._wakeup.set()
            return await self._is_zero(query, duration)

        await eventually(none_is_left)

    async def _is_zero(self, query: str, *arguments: Any) -> Any:
        return await self._connection.fetchval(query, *arguments) == 0

    def _open_nodes(self) -> list[Any]:
        return [self.layers[node]._node for node in self.open_nodes]


def _settings(node: int, url: str | None = None) -> Settings:
    capacity = CAPACITY if node == CAPPED else None
    return Settings(**{**SETTINGS, "database_url": url, "capacity": capacity})


def _interval(by: timedelta) -> str:
    return f"interval '{by.total_seconds()} seconds'"
