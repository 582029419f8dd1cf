"""Nodes die, stall, lose the database, or close: who leaves, who stays, and who comes back."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from datetime import timedelta
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from pgchannels import Message, PostgresLayer, Settings
from pgchannels.channels import presence_channel
from pgchannels.sql import in_schema
from pgchannels.stream import Stream
from tests.support.eventually import eventually
from tests.support.processes import Processes
from tests.support.tcp_proxy import TcpProxy

APPLICATION = """
import asyncio, socket, uvicorn
from fastapi import FastAPI
from pgchannels import PostgresLayer
from pgchannels.web import JsonConsumer, lifespan

layer = PostgresLayer()
app = FastAPI(lifespan=lifespan(layer))

class Room(JsonConsumer):
    async def connect(self, presence: str, user: str):
        await self.accept()
        await self.identify(user)
        await self.join("presence:room")
        await self.group_add("room", presence=presence)
        await self.send_json({"name": self.channel_name})

app.add_api_websocket_route("/{presence}/{user}", Room.as_endpoint())

async def main():
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    while not server.started:
        await asyncio.sleep(0.01)
    print("port", listening.getsockname()[1], flush=True)
    await serving

asyncio.run(main())
"""

LEASE = 3.0
SETTINGS: dict[str, Any] = {"lease_time": LEASE, "heartbeat_interval": 1.0, "presence_grace": 1.0}
# What is promised for departures, beyond the lease.
SOON = 2.0


class Node:
    """A process that serves the application."""

    def __init__(self, processes: Processes, database_url: str) -> None:
        env = {f"PGCHANNELS_{name.upper()}": str(value) for name, value in SETTINGS.items()}
        env["PGCHANNELS_DATABASE_URL"] = database_url
        self._processes = processes
        self.process: subprocess.Popen[bytes] = processes.start("-c", APPLICATION, env=env)
        self.address = ""

    async def started(self) -> None:
        self.address = f"127.0.0.1:{await eventually(self._port, timeout=30)}"

    def _port(self) -> str | None:
        words = self._processes.output(self.process).split()
        return words[words.index("port") + 1] if "port" in words else None

    def signal(self, number: int) -> None:
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait()


class Member:
    """A socket that is in the room, counted, and watches who comes and goes."""

    def __init__(self, socket: ClientConnection, user: str) -> None:
        self.socket = socket
        self.user = user
        self.name = ""
        self.events: list[dict[str, Any]] = []
        self.said: list[int] = []

    async def run(self) -> None:
        with suppress(ConnectionClosed):
            async for frame in self.socket:
                match json.loads(frame):
                    case {"name": name}:
                        self.name = name
                    case {"channel": "presence:room", "data": event}:
                        self.events.append(event)
                    case {"channel": "room", "data": {"n": n}}:
                        self.said.append(n)
                    case other:
                        raise AssertionError(f"nobody has sent {other}")

    def saw(self, what: str) -> list[tuple[str, int]]:
        """Who, and how many there were then."""
        kind = f"presence.{what}"
        return [(e["user_id"], e["count"]) for e in self.events if e["type"] == kind]


class Room:
    """Opens sockets in the room, and asks the database about it, as nobody's node."""

    def __init__(self, stack: AsyncExitStack, connection: asyncpg.Connection) -> None:
        self._stack = stack
        self._connection = connection
        self._tasks = asyncio.TaskGroup()

    async def __aenter__(self) -> Room:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._stack.aclose()  # the sockets, with which the tasks end
        await self._tasks.__aexit__(*error)

    async def enter(self, node: Node, users: list[str], *, by: str = "connection") -> list[Member]:
        members = []
        for start in range(0, len(users), 20):
            some = users[start : start + 20]
            members += await asyncio.gather(*(self._open(node, user, by) for user in some))
        await eventually(lambda: all(member.name for member in members), timeout=30)
        return members

    async def _open(self, node: Node, user: str, by: str) -> Member:
        url = f"ws://{node.address}/{by}/{user}"
        socket = await self._stack.enter_async_context(
            connect(url, proxy=None, max_queue=None, ping_interval=None, close_timeout=1)
        )
        member = Member(socket, user)
        self._tasks.create_task(member.run())
        return member

    async def steady(self, nodes: int) -> None:
        """Wait until all nodes have lived long enough to declare others dead."""
        await eventually(
            lambda: self.value(
                "select count(*) filter (where clock_timestamp() - steady_since > $1) = $2"
                " and count(*) = $2 from pgchannels.nodes",
                timedelta(seconds=LEASE),
                nodes,
            ),
            timeout=30,
        )

    async def renewed(self) -> None:
        """Wait until all nodes that there are have shown that they live."""
        now = await self.value("select clock_timestamp()")
        await eventually(
            lambda: self.value("select min(heartbeat_at) > $1 from pgchannels.nodes", now)
        )

    async def say(self, n: int) -> None:
        await self.value("select pgchannels.publish('room', json_build_object('n', $1::int))", n)

    async def members(self) -> list[str]:
        rows = await self._connection.fetch(
            "select channel from pgchannels.memberships where group_name = 'room'"
            " and left_at is null order by channel"
        )
        return [row["channel"] for row in rows]

    async def value(self, sql: str, *arguments: Any) -> Any:
        return await self._connection.fetchval(sql, *arguments)


@pytest.fixture
async def room(database_url: str) -> AsyncIterator[Room]:
    connection = await asyncpg.connect(database_url)
    try:
        async with AsyncExitStack() as stack, Room(stack, connection) as room:
            yield room
    finally:
        await connection.close(timeout=5)


async def two_nodes(processes: Processes, database_url: str) -> tuple[Node, Node]:
    nodes = Node(processes, database_url), Node(processes, database_url)
    for node in nodes:
        await node.started()
    return nodes


def names(members: list[Member]) -> list[str]:
    return sorted(member.name for member in members)


def users(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{number}" for number in range(count)]


@pytest.mark.slow
async def test_a_node_is_killed(room: Room, database_url: str, processes: Processes) -> None:
    """200 sockets on two nodes: those of the other one see just these 100 leave, in time."""
    doomed, surviving = await two_nodes(processes, database_url)
    lost = await room.enter(doomed, users("a", 100))
    left = await room.enter(surviving, users("b", 100))
    await room.steady(2)
    assert await room.members() == names(lost + left)

    doomed.signal(signal.SIGKILL)
    start = time.monotonic()
    await eventually(lambda: all(len(m.saw("left")) >= 100 for m in left), timeout=2 * LEASE + SOON)
    assert time.monotonic() - start < LEASE + SOON

    await room.say(1)
    await eventually(lambda: all(member.said == [1] for member in left))
    await room.renewed()
    await room.steady(1)
    assert await room.members() == names(left)
    departures = left[0].saw("left")
    assert {user for user, _ in departures} == {member.user for member in lost}
    assert [count for _, count in departures] == list(range(199, 99, -1))
    for member in left:
        assert member.saw("left") == departures
        assert member.saw("joined") == left[0].saw("joined")[-len(member.saw("joined")) :]
        assert member.said == [1]
    async with PostgresLayer(database_url) as layer:
        assert await layer.group_members("room") == names(left)
        assert sorted(p.connection or "" for p in await layer.presence("room")) == names(left)


async def test_a_user_who_is_elsewhere_by_then(
    room: Room, database_url: str, processes: Processes
) -> None:
    """Of a killed node's users, those who come back elsewhere before it is noticed never left."""
    doomed, surviving = await two_nodes(processes, database_url)
    (witness,) = await room.enter(surviving, ["w"], by="user")
    await room.enter(doomed, users("a", 10), by="user")
    await room.steady(2)
    doomed.signal(signal.SIGKILL)
    back = await room.enter(surviving, users("a", 5), by="user")
    await eventually(lambda: len(witness.saw("left")) >= 5, timeout=30)
    await room.renewed()
    assert await room.members() == names([witness, *back])
    assert sorted(user for user, _ in witness.saw("left")) == [f"a{n}" for n in range(5, 10)]
    assert [count for _, count in witness.saw("left")] == [10, 9, 8, 7, 6]
    assert len(witness.saw("joined")) == 11, "each has come once"


async def test_a_node_that_was_stopped_comes_back(
    room: Room, database_url: str, processes: Processes
) -> None:
    """Its members leave, as far as others can know; they come back by themselves, with all news."""
    stopped, other = await two_nodes(processes, database_url)
    theirs = await room.enter(stopped, users("a", 20))
    others = await room.enter(other, users("b", 20))
    await room.steady(2)
    before = len(others[-1].saw("joined"))
    stopped.signal(signal.SIGSTOP)
    await eventually(lambda: all(len(m.saw("left")) >= 20 for m in others), timeout=30)
    assert await room.members() == names(others)
    await room.say(1)
    stopped.signal(signal.SIGCONT)
    await eventually(lambda: len(others[-1].saw("joined")) >= before + 20, timeout=30)
    assert await room.members() == names(theirs + others)
    await room.say(2)
    await eventually(lambda: all(m.said == [1, 2] for m in theirs + others))
    await room.steady(2)
    assert await room.members() == names(theirs + others)
    for member in others:
        assert sorted(user for user, _ in member.saw("left")) == sorted(users("a", 20))
        assert [count for _, count in member.saw("left")] == list(range(39, 19, -1))
        assert [count for _, count in member.saw("joined")[-20:]] == list(range(21, 41))


async def test_a_node_hears_of_its_death_before_all_is_settled(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What lived by it is gone, and it is told so. It must not believe that it was ended."""
    settings = Settings(database_url=database_url, **{**SETTINGS, "heartbeat_interval": 0.2})
    connection = await asyncpg.connect(database_url)
    try:
        async with PostgresLayer(settings) as layer, AsyncExitStack() as stack:
            name = await layer.new_channel()
            await layer.group_add("room", name)
            stream = await stack.enter_async_context(layer.subscribe(member=name))
            for n in range(2):
                await layer.send(name, {"n": n})
                assert (await layer.receive(name, timeout=5))["n"] == n
            receiving = asyncio.create_task(layer.receive(name))
            # What reap() does, with time in between: the lock keeps the node from doing it itself.
            reaping = in_schema("(1885823850, hashtext('pgchannels.'))", settings.schema_name)
            await connection.execute(f"select pg_advisory_lock{reaping}")
            await connection.execute("update pgchannels.nodes set dead_since = clock_timestamp()")
            await eventually(lambda: "was declared dead" in caplog.text)
            await connection.execute(
                "select pgchannels.remove_channels($1, interval '0', $2)", [name], uuid4()
            )
            # Somebody, just then, had something else to tell of it.
            await connection.execute(
                "insert into pgchannels.outbox (channel, payload) values"
                " ('pgchannels:members', json_build_object('channels', array[$1::text]))",
                name,
            )
            await layer.send("later", {})
            async with layer.subscribe("later", after="0") as later:
                await anext(later)  # and so the news before it has been read
            caplog.clear()
            await eventually(lambda: "was declared dead" in caplog.text)
            assert await layer.group_members("room") == []
            await connection.execute(f"select pg_advisory_unlock{reaping}")

            async def is_back() -> Any:
                return await layer.group_members("room") == [name]

            await eventually(is_back)
            await layer.group_send("room", {"n": 2})
            async with asyncio.timeout(20):
                assert [(await anext(stream))["n"] for _ in range(3)] == [0, 1, 2]
                assert (await receiving)["n"] == 2, "it had received what came before"
    finally:
        await connection.close(timeout=5)


async def test_the_database_is_away_for_longer_than_the_lease(database_url: str) -> None:
    """No node could renew its lease, and none is declared dead for it."""
    connection = await asyncpg.connect(database_url)
    lease = timedelta(seconds=LEASE)
    try:
        async with AsyncExitStack() as stack:
            proxy = await stack.enter_async_context(TcpProxy(database_url))
            settings = Settings(database_url=proxy.url, **SETTINGS)
            layers = [await stack.enter_async_context(PostgresLayer(settings)) for _ in range(3)]
            channels = []
            for number in range(30):
                by = ("connection", "user")[number % 2]
                channels.append(await layers[number % 3].new_channel(user_id=f"u{number}"))
                await layers[0].group_add("room", channels[-1], presence=by)  # type: ignore[arg-type]
            watching = await stack.enter_async_context(
                layers[0].subscribe(presence_channel("room"), after="0")
            )

            async def all_are(condition: str) -> Any:
                return await connection.fetchval(
                    f"select bool_and({condition}) and count(*) = 3 from pgchannels.nodes", lease
                )

            await eventually(
                lambda: all_are("clock_timestamp() - steady_since > $1::interval"),
                timeout=30,
            )
            nodes = await connection.fetch("select id from pgchannels.nodes order by id")
            await proxy.cut(refuse=True)
            await eventually(
                lambda: all_are("heartbeat_at < clock_timestamp() - $1::interval * 1.2"),
                timeout=30,
            )
            proxy.resume()
            # Each has come back, and has then had the time to declare others dead.
            await eventually(
                lambda: all_are(
                    "dead_since is null and heartbeat_at > clock_timestamp() - $1::interval"
                    " and steady_since < clock_timestamp() - $1::interval * 1.2"
                ),
                timeout=30,
            )
            assert await connection.fetch("select id from pgchannels.nodes order by id") == nodes
            assert await layers[1].group_members("room") == sorted(channels)
            assert len(await layers[2].presence("room")) == 30
            await layers[1].send(presence_channel("room"), {"type": "end"})
            events = await until_the_end(watching)
            assert [event["type"] for event in events] == ["presence.joined"] * 30
    finally:
        await connection.close(timeout=5)


async def until_the_end(stream: Stream) -> list[Message]:
    events = []
    async with asyncio.timeout(20):
        while (event := await anext(stream))["type"] != "end":
            events.append(event)
    return events


async def test_a_node_closes(database_url: str) -> None:
    """Connections leave at once; users when they have not come back within the time of grace."""
    settings = Settings(database_url=database_url, **{**SETTINGS, "presence_grace": 4.0})
    connection = await asyncpg.connect(database_url)
    try:
        async with (
            PostgresLayer(settings) as other,
            other.subscribe(presence_channel("room")) as events,
        ):
            layer = PostgresLayer(settings)
            async with layer:
                singles = [await layer.new_channel() for _ in range(50)]
                clients = {f"u{n}": await layer.new_channel(user_id=f"u{n}") for n in range(50)}
                async with asyncio.TaskGroup() as group:
                    for name in singles:
                        group.create_task(layer.group_add("room", name, presence="connection"))
                    for name in clients.values():
                        group.create_task(layer.group_add("room", name, presence="user"))
                for _ in range(100):
                    assert (await anext(events))["type"] == "presence.joined"
                closed_at = await connection.fetchval("select clock_timestamp()")
            # Half of the users come back on another node.
            back = {}

            async def come_back(user: str) -> None:
                back[user] = await other.new_channel(user_id=user)
                await other.group_add("room", back[user], presence="user")

            # At once: there is no time to lose.
            await asyncio.gather(*map(come_back, list(clients)[::2]))
            async with asyncio.timeout(20):
                gone = [await anext(events) for _ in range(75)]
            assert await other.group_members("room") == sorted(back.values())
            assert {p.user_id for p in await other.presence("room")} == set(back)
            await other.send(presence_channel("room"), {"type": "end"})
            assert await until_the_end(events) == [], "those who came back have not flapped"
    finally:
        await connection.close(timeout=5)
    assert {event["type"] for event in gone} == {"presence.left"}
    assert [event["count"] for event in gone] == list(range(99, 24, -1))
    grace = timedelta(seconds=settings.presence_grace)
    assert sorted(event["connection"] for event in gone[:50]) == sorted(singles)
    assert all(event.created_at < closed_at + grace for event in gone[:50])
    assert {event["user_id"] for event in gone[50:]} == set(clients) - set(back)
    assert all(event.created_at >= closed_at + grace for event in gone[50:])


async def test_a_user_who_moves_to_another_node(database_url: str) -> None:
    """Again and again, never away for longer than the time of grace: nobody is told."""
    settings = Settings(database_url=database_url, **{**SETTINGS, "presence_grace": 4.0})
    async with (
        PostgresLayer(settings) as one,
        PostgresLayer(settings) as two,
        one.subscribe(presence_channel("room")) as events,
    ):
        names = [""] * 20
        for move in range(6):
            layer, before = (one, two) if move % 2 == 0 else (two, one)
            for n, name in enumerate(names):
                if name:
                    await before.delete_channel(name)
                names[n] = await layer.new_channel(user_id=f"u{n}")
                await layer.group_add("room", names[n], presence="user")
            present = await one.presence("room")
            assert {p.user_id: p.connections for p in present} == {f"u{n}": 1 for n in range(20)}
        # When whoever is on the way out would have been told of:
        late = await one.new_channel(user_id="late")
        await one.group_add("room", late, presence="user")
        await one.group_discard("room", late)
        seen: list[Message] = []
        async with asyncio.timeout(20):
            while not seen or seen[-1]["type"] != "presence.left":
                seen.append(await anext(events))
        assert [e["user_id"] for e in seen] == [*(f"u{n}" for n in range(20)), "late", "late"]
