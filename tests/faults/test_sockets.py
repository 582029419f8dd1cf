"""The database goes away for ten seconds, while 200 sockets are open and some handlers raise.

Afterwards each socket works, or was closed with a code. None is open and deaf.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from contextlib import AsyncExitStack
from typing import Any

import pytest
from fastapi import FastAPI
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from pgchannels import Message, PostgresLayer, Settings
from pgchannels.web import JsonConsumer, lifespan, receives
from tests.support.eventually import eventually
from tests.support.sockets import serve
from tests.support.tcp_proxy import TcpProxy

SOCKETS = 200
GROUPS = 20
OUTAGE = 10.0

# A lease that runs out in the meantime: the node that can still reach the database declares the
# others dead, and they have to get everything back.
QUICK = {"lease_time": 3.0, "heartbeat_interval": 1.0, "presence_grace": 0.0}


class Room(JsonConsumer):
    """One of the groups; the client may ask for trouble."""

    async def connect(self, group: str) -> None:
        self.group = group
        await self.accept()
        await self.group_add(group)
        await self.send_json({"name": self.channel_name})

    async def trouble_ahead(self, event: Message) -> None:
        """Only for the sockets that are told so."""
        if self.channel_name in event["names"]:
            raise RuntimeError("an event that nobody expected")
        await self.forward(event)

    @receives("raise")
    async def on_raise(self, content: Any) -> None:
        raise RuntimeError("a request that nobody expected")

    @receives("say")
    async def on_say(self, content: Any) -> None:
        await self.layer.group_send(f"said in {self.group}".replace(" ", "."), {"said": True})

    @receives("add")
    async def on_add(self, content: Any) -> None:
        await self.group_add(f"{self.group}.more")

    @receives("spawn")
    async def on_spawn(self, content: Any) -> None:
        self.spawn(self.ask_the_database())

    async def ask_the_database(self) -> None:
        """It cannot do without, and does not handle that either."""
        while True:
            await self.layer.history(self.group, limit=1)
            await asyncio.sleep(0.1)

    @receives("spawn and raise")
    async def on_spawn_and_raise(self, content: Any) -> None:
        self.spawn(self.on_raise(content))


class Client:
    """A socket, and what has come of it."""

    def __init__(self, socket: ClientConnection, group: str) -> None:
        self.socket = socket
        self.group = group
        self.name = ""
        self.numbers: list[int] = []
        self.errors: list[str] = []
        self.code: int | None = None

    async def run(self) -> None:
        try:
            async for frame in self.socket:
                self._receive(json.loads(frame))
        except ConnectionClosed:
            pass  # its code tells
        self.code = self.socket.close_code

    def _receive(self, content: dict[str, Any]) -> None:
        match content:
            case {"name": name}:
                self.name = name
            case {"type": "error", "code": code}:
                self.errors.append(code)
            case {"data": {"number": number}, "channel": self.group}:
                self.numbers.append(number)

    async def ask(self, kind: str) -> None:
        await self.socket.send(json.dumps({"type": kind}))


class Outside:
    """Publishes past the fault, to all groups."""

    def __init__(self, layer: PostgresLayer) -> None:
        self._layer = layer
        self.published = 0

    async def publish(self) -> None:
        """The next number."""
        self.published += 1
        for group in range(GROUPS):
            await self._layer.group_send(f"group:{group}", {"number": self.published})


@pytest.mark.slow
async def test_the_database_is_away_for_ten_seconds(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(TcpProxy(database_url))
        addresses = []
        for _ in range(2):
            layer = PostgresLayer(Settings(database_url=proxy.url, **QUICK))
            app = FastAPI(lifespan=lifespan(layer))
            app.add_api_websocket_route("/{group}", Room.as_endpoint())
            addresses.append(await stack.enter_async_context(serve(app)))
        other = PostgresLayer(Settings(database_url=database_url, **QUICK))
        outside = Outside(await stack.enter_async_context(other))
        tasks = await stack.enter_async_context(asyncio.TaskGroup())

        async def open_socket(number: int) -> Client:
            group = f"group:{number % GROUPS}"
            # Neighbours in a group are on different nodes.
            url = f"ws://{addresses[number // GROUPS % 2]}/{group}"
            socket = await stack.enter_async_context(
                connect(url, proxy=None, max_queue=None, open_timeout=30)
            )
            client = Client(socket, group)
            tasks.create_task(client.run())
            return client

        clients = [await open_socket(number) for number in range(SOCKETS)]
        await eventually(lambda: all(client.name for client in clients))
        await outside.publish()
        await eventually(lambda: all(client.numbers == [1] for client in clients))

        await proxy.cut(refuse=True)
        troubled = [clients[number :: SOCKETS // 8] for number in range(6)]
        raising, told, saying, adding, spawning, failing = troubled
        async with asyncio.timeout(OUTAGE), asyncio.TaskGroup() as asking:
            for kind, some in (
                ("raise", raising),
                ("say", saying),
                ("add", adding),
                ("spawn", spawning),
                ("spawn and raise", failing),
            ):
                for client in some:
                    asking.create_task(client.ask(kind))
        await outside.publish()
        for client in told:
            await other.send(
                client.group, {"type": "trouble.ahead", "names": [c.name for c in told]}
            )
        await outside.publish()
        late, refusals = [], []
        for number in range(10):
            try:
                late.append(await open_socket(number))
            except InvalidStatus as refusal:
                refusals.append(refusal.response.status_code)
        assert set(refusals) <= {503}
        await asyncio.sleep(OUTAGE)  # how long it is away is what this is about
        proxy.resume()

        expected = Counter({1011: len(raising) + len(told) + len(failing), 1013: len(spawning)})
        await eventually(
            lambda: Counter(c.code for c in clients if c.code is not None) == expected, timeout=60
        )
        # Each of those who were let in meanwhile was so in the end, or told to come back.
        await eventually(lambda: all(c.name or c.code == 1013 for c in late), timeout=60)
        working = [client for client in clients + late if client.code is None]
        assert len(working) >= SOCKETS - sum(map(len, troubled)) + len(saying) + len(adding)
        await outside.publish()
        await eventually(
            lambda: all(client.numbers[-1:] == [outside.published] for client in working),
            timeout=60,
        )
        # Nothing was lost on the way, either, and nothing came twice.
        for client in working:
            if client not in late:
                assert client.numbers == [*range(1, outside.published + 1)]
        for client in saying + adding:
            assert client.errors in ([], ["unavailable"])

        async def are_members_again() -> Any:
            members: list[str] = []
            for group in range(GROUPS):
                members += await other.group_members(f"group:{group}")
            return sorted(members) == sorted(client.name for client in working)

        assert await eventually(are_members_again, timeout=60)
        assert caplog.text.count("had been declared dead") >= 2
        for client in working:
            await client.socket.close()
