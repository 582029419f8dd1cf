"""A node that dies from one moment to the next: its clients and its messages live on elsewhere."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections import Counter
from contextlib import suppress
from typing import Any

import asyncpg
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException

from pgchannels import PostgresLayer, Settings
from tests.support.eventually import eventually
from tests.support.processes import Processes

# One application as anyone would write it. It prints the port that it got.
APPLICATION = """
import asyncio, socket, uvicorn
from fastapi import FastAPI
from pgchannels import PostgresLayer
from pgchannels.web import JsonConsumer, lifespan

layer = PostgresLayer()
app = FastAPI(lifespan=lifespan(layer))

class Rooms(JsonConsumer):
    async def receive_json(self, content):
        await self.join(content["join"], content["after"])

app.add_api_websocket_route("/rooms", Rooms.as_endpoint(layer))

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

# Publishes, says so, and does nothing more: what is committed waits in the outbox.
PUBLISHER = """
import asyncio, os, time, asyncpg

async def main():
    connection = await asyncpg.connect(os.environ["PGCHANNELS_DATABASE_URL"])
    async with connection.transaction():
        for number in range(10):
            await connection.execute(
                "select pgchannels.publish('room:0', json_build_object('number', $1::int))", number
            )
    print("committed", flush=True)
    time.sleep(60)

asyncio.run(main())
"""

ROOMS = ("room:0", "room:1", "room:2")
QUICK = {"poll_interval": 0.2, "heartbeat_interval": 0.5, "lease_time": 1.0}


class Node:
    """A process that serves the application."""

    def __init__(self, processes: Processes, database_url: str) -> None:
        env = {f"PGCHANNELS_{name.upper()}": str(value) for name, value in QUICK.items()}
        env["PGCHANNELS_DATABASE_URL"] = database_url
        self._processes = processes
        self.process: subprocess.Popen[bytes] = processes.start("-c", APPLICATION, env=env)
        self.url = ""

    async def started(self) -> None:
        output = await eventually(self._port, timeout=30)
        self.url = f"ws://127.0.0.1:{output}/rooms"

    def _port(self) -> str | None:
        words = self._processes.output(self.process).split()
        return words[words.index("port") + 1] if "port" in words else None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Client:
    """A socket that resumes, with its positions, on the next node when one is gone."""

    def __init__(self, nodes: list[Node], rooms: tuple[str, ...], first: int) -> None:
        self._nodes = nodes
        self._next = first
        self._rooms = rooms
        self._unfinished = set(rooms)
        self._positions: dict[str, str] = dict.fromkeys(rooms, "0")
        self.on_the_wire: list[tuple[str, int]] = []
        self.got: dict[str, list[int]] = {room: [] for room in rooms}
        self.connections = 0

    async def run(self) -> None:
        while self._unfinished:
            node = self._nodes[self._next % len(self._nodes)]
            self._next += 1
            with suppress(OSError, WebSocketException):
                await self._converse(node.url)

    async def _converse(self, url: str) -> None:
        async with connect(url, proxy=None, open_timeout=5, close_timeout=1) as socket:
            self.connections += 1
            for room in self._rooms:
                await socket.send(json.dumps({"join": room, "after": self._positions[room]}))
            while self._unfinished:
                self._receive(json.loads(await socket.recv()))

    def _receive(self, envelope: dict[str, Any]) -> None:
        assert "type" not in envelope, envelope
        room, id_ = envelope["channel"], envelope["id"]
        self.on_the_wire.append((room, id_))
        if self.got[room] and id_ <= self.got[room][-1]:
            return  # a repeat, known by its id
        self.got[room].append(id_)
        self._positions[room] = envelope["position"]
        if envelope["data"] == {"end": True}:
            self._unfinished.discard(room)


async def test_clients_resume_on_another_node(database_url: str, processes: Processes) -> None:
    nodes = [Node(processes, database_url) for _ in range(2)]
    for node in nodes:
        await node.started()
    clients = [
        Client(nodes, ROOMS[: 1 + number % len(ROOMS)], first=number) for number in range(12)
    ]
    published = 0
    settings = Settings.model_validate({**QUICK, "database_url": database_url, "page_size": 5000})
    async with asyncio.timeout(60), PostgresLayer(settings) as layer:
        async with asyncio.TaskGroup() as group:
            for client in clients:
                group.create_task(client.run())

            async def publish(count: int) -> None:
                nonlocal published
                for _ in range(count):
                    await layer.send(ROOMS[published % len(ROOMS)], {"number": published})
                    published += 1

            async def published_more_than(number: int) -> None:
                await eventually(lambda: published > number)

            await publish(200)
            for victim in (0, 1, 0):
                # In mid-stream: everyone has something, and nobody waits for the rest.
                await eventually(lambda: all(client.on_the_wire for client in clients))
                publishing = asyncio.create_task(publish(300))
                await published_more_than(published + 50)
                nodes[victim].kill()
                await publishing
                nodes[victim] = Node(processes, database_url)
                await nodes[victim].started()
            for room in ROOMS:
                await layer.send(room, {"end": True})
        store = layer._opened.store
        expected = {
            room: [message.id for message in (await store.read_channels([room], 0)).messages]
            for room in ROOMS
        }
    assert sum(map(len, expected.values())) == published + len(ROOMS)
    for client in clients:
        assert client.got == {room: expected[room] for room in client.got}
        # Within a connection nothing comes twice; over several, at most what was unacknowledged.
        repeats = Counter(client.on_the_wire)
        assert max(repeats.values()) == 1, "a client that gives its position is sent no repeat"
    assert sum(client.connections for client in clients) > len(clients), "nobody had to resume"


async def test_a_publisher_that_dies_after_its_commit(
    database_url: str, processes: Processes
) -> None:
    """The node that polls finds what it left, although nobody was told."""
    settings = Settings.model_validate({**QUICK, "database_url": database_url})
    async with PostgresLayer(settings) as layer, layer.subscribe("room:0") as stream:
        publisher = processes.start("-c", PUBLISHER, env={"PGCHANNELS_DATABASE_URL": database_url})
        await eventually(lambda: "committed" in processes.output(publisher))
        publisher.kill()
        async with asyncio.timeout(10):
            got = [(await anext(stream))["number"] for _ in range(10)]
    assert got == list(range(10))


@pytest.mark.parametrize("dies", ["before", "after"])
async def test_a_node_dies_around_its_batch(
    database_url: str, processes: Processes, dies: str
) -> None:
    """The node with the lease is killed with a batch under way, or after it and before the hint."""
    script = f"""
import asyncio, os, asyncpg

async def main():
    connection = await asyncpg.connect(os.environ["PGCHANNELS_DATABASE_URL"])
    await connection.execute("begin")
    await connection.execute("select pgchannels.seal()")
    if {dies == "after"}:
        await connection.execute("commit")
    print("sealed", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""
    connection = await asyncpg.connect(database_url)
    try:
        await connection.execute(
            "select pgchannels.publish('room:0', json_build_object('number', n))"
            " from generate_series(0, 9) n"
        )
        node = processes.start("-c", script, env={"PGCHANNELS_DATABASE_URL": database_url})
        await eventually(lambda: "sealed" in processes.output(node))
        settings = Settings.model_validate({**QUICK, "database_url": database_url})
        async with (
            PostgresLayer(settings) as layer,
            layer.subscribe("room:0", after="0") as stream,
        ):
            node.kill()
            async with asyncio.timeout(10):
                got = [await anext(stream) for _ in range(10)]
    finally:
        await connection.close(timeout=5)
    assert [(message.id, message["number"]) for message in got] == [(n + 1, n) for n in range(10)]
