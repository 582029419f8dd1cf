"""A reader that stops reading costs a bounded buffer, delays nobody, and has lost nothing."""

from __future__ import annotations

import asyncio
import json
import socket
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import asyncpg
import psutil
import pytest
import uvicorn
from fastapi import FastAPI
from websockets.asyncio.client import connect

from pgchannels import PostgresLayer, Settings, Stream
from pgchannels.subscription import State
from pgchannels.web import ConnectionManager, JsonConsumer, lifespan
from tests.support.eventually import eventually

if TYPE_CHECKING:
    from asyncpg import Connection, Record

MESSAGES = 50_000
PADDING = "x" * 400
# Between pages and buffers that are being handed over, never more than these together.
PAGE, BUFFER = 500, 300
BOUND = 2 * (PAGE + BUFFER)
# Within so many seconds, anything that goes on at all gets on.
STALLED = 20
MiB = 1024 * 1024

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def make_settings(database_url: str) -> Settings:
    return Settings(
        database_url=database_url,
        page_size=PAGE,
        buffer_size=BUFFER,
        poll_interval=0.2,
    )


@pytest.fixture
async def publisher(database_url: str) -> AsyncIterator[Connection[Record]]:
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close(timeout=5)


async def publish_all(connection: Connection[Record]) -> None:
    """In many transactions, so that they also come in many batches."""
    for first in range(0, MESSAGES, 1000):
        await connection.execute(
            "insert into pgchannels.outbox (channel, payload)"
            " select 'a', json_build_object('number', n, 'padding', $3::text)"
            " from generate_series($1::int, $2::int) n",
            first,
            first + 999,
            PADDING,
            timeout=STALLED,
        )


class Watch:
    """The most that a stream has held at any moment."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._offer = stream.offer
        self.most = 0
        stream.offer = self._watched_offer  # type: ignore[method-assign]

    def _watched_offer(self, message: Any) -> None:
        self._offer(message)
        self.look()

    @property
    def is_behind(self) -> bool:
        return self._stream.state is State.REPLAYING

    def look(self) -> None:
        self.most = max(self.most, self._stream.pending)


async def read_all(stream: Stream, watch: Watch) -> None:
    """To the last message, each in its place."""
    expected = 1
    while expected <= MESSAGES:
        async with asyncio.timeout(STALLED):
            messages = await stream.batch()
        for message in messages:
            assert message.id == expected
            expected += 1
        watch.look()


async def test_it_is_bounded_and_catches_up(
    database_url: str, publisher: Connection[Record]
) -> None:
    async with AsyncExitStack() as stack:
        layer = await stack.enter_async_context(PostgresLayer(make_settings(database_url)))
        slow = await stack.enter_async_context(layer.subscribe("a"))
        others = [await stack.enter_async_context(layer.subscribe("a")) for _ in range(3)]
        watches = [Watch(stream) for stream in (slow, *others)]
        tracemalloc.start()
        stack.callback(tracemalloc.stop)
        async with asyncio.TaskGroup() as group:
            for stream, watch in zip(others, watches[1:], strict=True):
                group.create_task(read_all(stream, watch))
            await publish_all(publisher)
        _, peak = tracemalloc.get_traced_memory()
        # The others have everything; the slow one has not so much as looked.
        assert watches[0].is_behind
        assert max(watch.most for watch in watches) <= BOUND
        # All of them as objects would be ten times that.
        assert peak < 8 * MiB
        await read_all(slow, watches[0])
        assert watches[0].most <= BOUND
        await layer.send("a", {"number": -1})
        assert (await asyncio.wait_for(anext(slow), 10))["number"] == -1


async def test_a_socket_that_stops_reading(
    database_url: str, publisher: Connection[Record]
) -> None:
    layer = PostgresLayer(make_settings(database_url))
    consumers: list[Consumer] = []

    class Consumer(JsonConsumer):
        watch: Watch

        async def connect(self) -> None:
            consumers.append(self)
            self.watch = Watch(self._stream)
            await self.accept()
            await self.join("a", "0")

    app = FastAPI(lifespan=lifespan(layer))
    connections = ConnectionManager(layer, send_timeout=None)  # the slow one has all the time
    app.add_api_websocket_route("/", Consumer.as_endpoint(connections))
    listening = socket.create_server(("127.0.0.1", 0))
    # Deflate would hide in the compressor how much is under way; pings would end such a socket.
    server = uvicorn.Server(
        uvicorn.Config(
            app, log_level="warning", ws_per_message_deflate=False, ws_ping_interval=None
        )
    )
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    url = f"ws://127.0.0.1:{listening.getsockname()[1]}/"
    try:
        await eventually(lambda: server.started)
        async with AsyncExitStack() as stack:
            slow_socket = socket.socket()
            slow_socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow_socket.setblocking(False)
            await asyncio.get_running_loop().sock_connect(
                slow_socket, ("127.0.0.1", listening.getsockname()[1])
            )
            slow = await stack.enter_async_context(
                connect(
                    url,
                    sock=slow_socket,
                    max_queue=2,
                    compression=None,
                    proxy=None,
                    ping_interval=None,
                )
            )
            quick = await stack.enter_async_context(
                connect(url, compression=None, proxy=None, ping_interval=None)
            )
            await eventually(lambda: len(consumers) == 2)
            before = psutil.Process().memory_info().rss
            async with asyncio.timeout(90):
                reading = asyncio.create_task(_receive_all(quick))
                await publish_all(publisher)
                await reading
            grown = psutil.Process().memory_info().rss - before
            # 50 000 envelopes are 25 MB as text alone, several times that as objects.
            assert grown < 24 * MiB
            assert consumers[0].watch.is_behind
            assert max(consumer.watch.most for consumer in consumers) <= BOUND
            async with asyncio.timeout(90):
                await _receive_all(slow)
            assert max(consumer.watch.most for consumer in consumers) <= BOUND
    finally:
        server.should_exit = True
        await asyncio.wait_for(serving, 20)
        listening.close()


async def _receive_all(client: Any) -> None:
    for expected in range(1, MESSAGES + 1):
        assert json.loads(await client.recv())["id"] == expected
