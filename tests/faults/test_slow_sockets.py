"""Clients that read slowly, or not at all, through a server: what it costs them, and the others."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial

import asyncpg
import pytest
import uvicorn
from fastapi import FastAPI, WebSocket
from websockets.asyncio.client import connect

from pgchannels import Message, Overflow, PostgresLayer, Settings
from pgchannels.subscription import State
from pgchannels.web import Connection, ConnectionManager
from tests.support.eventually import eventually
from tests.support.slow_client import SlowClient

SOCKETS = 100
MESSAGES = 500
# Of all that a client is sent, this much fits into buffers of the kernel, the server and itself.
PAGE, BUFFER = 50, 50
PATIENCE = 90.0
ROOM = "room:1"
KEYS = 7
PER_COMMIT = 10


@pytest.fixture
async def layer(database_url: str) -> AsyncIterator[PostgresLayer]:
    settings = Settings(
        database_url=database_url, page_size=PAGE, buffer_size=BUFFER, poll_interval=0.2
    )
    async with PostgresLayer(settings) as layer:
        yield layer


@asynccontextmanager
async def serving(connections: ConnectionManager) -> AsyncIterator[str]:
    """A server with small buffers; the address."""
    app = FastAPI()

    @app.websocket("/room")
    async def endpoint(websocket: WebSocket) -> None:
        async with connections.connect(websocket, user_id=websocket.query_params["name"]) as found:
            await found.join(ROOM, after=found.resume_position)
            async for _ in found:
                pass

    listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
    # Inherited by what it accepts (socket(7)).
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
    server = uvicorn.Server(
        # Pings would end the slow ones, and that is not what this is about.
        uvicorn.Config(app, log_config=None, log_level="warning", ws_ping_interval=None)
    )
    task = asyncio.create_task(server._serve(sockets=[listening]))
    try:
        await eventually(lambda: server.started or task.done())
        yield f"127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        await asyncio.wait_for(task, PATIENCE)
        listening.close()


def path(name: str, after: str = "0") -> str:
    return f"/room?name={name}&after={after}"


async def connection(connections: ConnectionManager, name: str) -> Connection:
    """The server's side of it, when it follows the room."""

    def joined() -> list[Connection]:
        return [each for each in connections.get_user_connections(name) if ROOM in each.groups]

    return (await eventually(joined, timeout=PATIENCE))[0]


async def publish(layer: PostgresLayer, padding: int = 1000) -> None:
    """All of them, in many transactions, so that they also come in many batches."""
    assert layer.settings.database_url is not None
    connection = await asyncpg.connect(layer.settings.database_url.get_secret_value())
    try:
        for first in range(0, MESSAGES, PER_COMMIT):
            await connection.execute(
                "insert into pgchannels.outbox (channel, payload)"
                " select $1, json_build_object('number', n, 'key', n % $2::int, 'text', $3::text)"
                " from generate_series($4::int, $5::int) n",
                ROOM,
                KEYS,
                "x" * padding,
                first,
                first + PER_COMMIT - 1,
            )
    finally:
        await connection.close(timeout=5)


class Healthy:
    """Reads all, as fast as it comes."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    async def run(self, address: str) -> None:
        async with connect(
            f"ws://{address}{path('healthy')}", compression=None, proxy=None, ping_interval=None
        ) as client:
            while len(self.numbers) < MESSAGES:
                self.numbers.append(json.loads(await client.recv())["data"]["number"])


class Bound:
    """The most that a connection has had waiting, at any message."""

    def __init__(self, connection: Connection) -> None:
        self._stream = connection._stream
        self._offer = self._stream.offer
        self.most = 0
        self.was_behind = False
        self._stream.offer = self._watched  # type: ignore[method-assign]

    def _watched(self, message: Message) -> None:
        self._offer(message)
        self.most = max(self.most, self._stream.pending)
        self.was_behind = self.was_behind or self._stream.state is State.REPLAYING


@pytest.mark.timeout(300)
async def test_two_slow_ones_among_a_hundred(layer: PostgresLayer) -> None:
    """One does not read, one reads a byte a second: nobody else notices, and they lose nothing."""
    connections = ConnectionManager(layer, send_timeout=None)
    async with serving(connections) as address, AsyncExitStack() as stack:
        silent = await stack.enter_async_context(SlowClient(address, path("silent")))
        trickling = await stack.enter_async_context(SlowClient(address, path("trickling")))
        slow = [await connection(connections, name) for name in ("silent", "trickling")]
        bounds = [Bound(each) for each in slow]
        trickle = asyncio.create_task(_trickle(trickling))
        healthy = [Healthy() for _ in range(SOCKETS - 2)]
        async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
            for client in healthy:
                group.create_task(client.run(address))
            await eventually(lambda: len(connections) == SOCKETS, timeout=PATIENCE)
            await publish(layer)
        # All others have everything, while the two still wait for most of it.
        for client in healthy:
            assert client.numbers == list(range(MESSAGES))
        assert all(bound.was_behind for bound in bounds)
        assert len(trickling.numbers) < 5
        assert silent.contents == []
        assert max(each.messages_out for each in slow) < MESSAGES / 2
        trickle.cancel()
        with suppress(asyncio.CancelledError):
            await trickle
        # They read on, and have it all.
        async with asyncio.timeout(PATIENCE):
            for late in (silent, trickling):
                await late.read_until(partial(late.has, MESSAGES))
                assert late.numbers == list(range(MESSAGES))
        # What is being handed over, and what has come meanwhile.
        assert max(bound.most for bound in bounds) <= PAGE + BUFFER
        assert [each.close_code for each in slow] == [None, None]


async def _trickle(client: SlowClient) -> None:
    while True:
        await client.read(1)
        await asyncio.sleep(1)


@pytest.mark.parametrize("is_back_in_time", [True, False])
async def test_one_that_is_stuck_for_too_long(
    layer: PostgresLayer, monkeypatch: pytest.MonkeyPatch, is_back_in_time: bool
) -> None:
    """Closed with 1013, which it hears if it still reads; it resumes without a loss either way."""
    monkeypatch.setattr("pgchannels.web.wire.CLOSING_TIME", 60.0 if is_back_in_time else 0.5)
    connections = ConnectionManager(layer, send_timeout=1.0)
    async with serving(connections) as address, AsyncExitStack() as stack:
        client = await stack.enter_async_context(SlowClient(address, path("slow")))
        stuck = await connection(connections, "slow")
        await publish(layer)
        if is_back_in_time:
            await eventually(lambda: stuck.state.value == "closing", timeout=PATIENCE)
        else:
            await eventually(lambda: stuck.state.value == "closed", timeout=PATIENCE)
        async with asyncio.timeout(PATIENCE):
            await client.read_until(lambda: client.at_end)
        assert client.close_code == (1013 if is_back_in_time else 1006)
        await eventually(lambda: len(connections) == 0, timeout=PATIENCE)
        assert connections.statistics().closed == {1013: 1}
        had = client.numbers
        assert had == list(range(len(had)))
        assert 0 < len(had) < MESSAGES
        again = await stack.enter_async_context(
            SlowClient(address, path("slow", after=client.position))
        )
        async with asyncio.timeout(PATIENCE):
            await again.read_until(partial(again.has, MESSAGES - len(had)))
        assert had + again.numbers == list(range(MESSAGES))


class TestOverflow:
    # Whatever a burst drops before the consumer has had a turn, the rest fills the buffers.
    PADDING = 10_000

    async def test_drop_oldest(self, layer: PostgresLayer) -> None:
        """It has the beginning, and the newest."""
        connections = ConnectionManager(layer, overflow=Overflow("drop_oldest", max_messages=5))
        async with serving(connections) as address, SlowClient(address, path("slow")) as client:
            found = await connection(connections, "slow")
            await publish(layer, self.PADDING)
            await eventually(lambda: found._stream._source.cursor >= MESSAGES, timeout=PATIENCE)
            assert found.pending == 5
            await self._read_to_the_last(client)
            numbers = client.numbers
            assert numbers == sorted(set(numbers))
            assert numbers[-5:] == list(range(MESSAGES - 5, MESSAGES))
            assert len(numbers) + found._stream.dropped == MESSAGES
            assert found._stream.dropped > 0

    async def test_latest_by_key(self, layer: PostgresLayer) -> None:
        """It has the last of each key, whatever it has missed before."""
        overflow = Overflow("latest_by_key", key=lambda message: message["key"])
        connections = ConnectionManager(layer, overflow=overflow)
        async with serving(connections) as address, SlowClient(address, path("slow")) as client:
            found = await connection(connections, "slow")
            await publish(layer, self.PADDING)
            await eventually(lambda: found._stream._source.cursor >= MESSAGES, timeout=PATIENCE)
            assert found.pending == KEYS
            await self._read_to_the_last(client)
            assert client.numbers[-KEYS:] == list(range(MESSAGES - KEYS, MESSAGES))
            assert client.numbers == sorted(set(client.numbers))
            assert len(client.numbers) + found._stream.replaced == MESSAGES

    async def test_disconnect(self, layer: PostgresLayer, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is closed although it is stuck in a send, and has the rest when it comes again."""
        monkeypatch.setattr("pgchannels.web.wire.CLOSING_TIME", 60.0)
        connections = ConnectionManager(layer, overflow="disconnect", send_timeout=None)
        async with serving(connections) as address, AsyncExitStack() as stack:
            client = await stack.enter_async_context(SlowClient(address, path("slow")))
            found = await connection(connections, "slow")
            await publish(layer)
            await eventually(lambda: found.state.value == "closing", timeout=PATIENCE)
            async with asyncio.timeout(PATIENCE):
                await client.read_until(lambda: client.at_end)
            assert client.close_code == 1013
            assert client.contents[-1]["code"] == "slow_consumer"
            assert client.contents[-1]["retry_after"] == 1.0
            await eventually(lambda: len(connections) == 0)
            had = client.numbers
            assert had == list(range(len(had)))
            # What is replayed is read at the client's own pace, and overflows nothing.
            again = await stack.enter_async_context(
                SlowClient(address, path("slow", after=client.position))
            )
            async with asyncio.timeout(PATIENCE):
                await again.read_until(partial(again.has, MESSAGES - len(had)))
            assert had + again.numbers == list(range(MESSAGES))

    async def _read_to_the_last(self, client: SlowClient) -> None:
        async with asyncio.timeout(PATIENCE):
            await client.read_until(lambda: client.numbers[-1:] == [MESSAGES - 1])
