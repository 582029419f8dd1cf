"""Rate limits that all nodes share, with the database and without it."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import pytest

from pgchannels import FixedWindow, MemoryLayer, PostgresLayer, Settings
from pgchannels.layer import ChannelLayer
from pgchannels.web import Frame, RateLimit, RateLimitExceeded, SocketError
from pgchannels.web.errors import describe
from tests.support.eventually import eventually
from tests.support.tcp_proxy import TcpProxy

FRAME = Frame('{"type": "chat.send", "text": "hello"}')
# So long that it does not end in the middle of a test.
WINDOW = 24 * 3600.0


class FakeConnection:
    def __init__(self, layer: ChannelLayer, user_id: str = "ada") -> None:
        self.id = "ws.1"
        self.user_id = user_id
        self.layer = layer


async def passes(limit: RateLimit, layer: ChannelLayer, user_id: str = "ada") -> bool:
    connection: Any = FakeConnection(layer, user_id)
    try:
        await limit.inbound(connection, FRAME)
    except RateLimitExceeded:
        return False
    return True


async def test_four_nodes_admit_the_limit_together(database_url: str) -> None:
    settings = Settings(database_url=database_url)
    async with AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(PostgresLayer(settings)) for _ in range(4)]
        # Each node has made its chain for itself.
        limits = [RateLimit(FixedWindow(100, WINDOW), by="user", shared=True) for _ in nodes]
        answers = await asyncio.gather(
            *(passes(limits[number % 4], nodes[number % 4]) for number in range(400)),
            *(passes(limits[number % 4], nodes[number % 4], "bob") for number in range(60)),
        )
    assert sum(answers[:400]) == 100
    assert all(answers[400:])


async def test_the_memory_layer_counts_alike() -> None:
    limit = RateLimit(FixedWindow(3, WINDOW), by="user", shared=True)
    async with MemoryLayer() as layer:
        answers = [await passes(limit, layer) for _ in range(5)]
    assert answers == [True] * 3 + [False] * 2


async def test_while_the_database_is_away(database_url: str) -> None:
    strict = RateLimit(FixedWindow(2, WINDOW), by="user", shared=True, name="strict")
    local = RateLimit(
        FixedWindow(2, WINDOW), by="user", shared=True, name="local", when_unavailable="local"
    )
    async with TcpProxy(database_url) as proxy, PostgresLayer(proxy.url) as layer:
        assert await passes(strict, layer)
        await proxy.cut(refuse=True)
        for _ in range(3):
            with pytest.raises(SocketError) as caught:
                await passes(strict, layer)
            problem = describe(caught.value)
            assert (problem.code, problem.disconnects) == ("unavailable", False)
            assert str(proxy.port) not in problem.response().encode()
        assert [await passes(local, layer) for _ in range(3)] == [True, True, False]
        proxy.resume()

        async def is_back() -> bool:
            try:
                return await passes(strict, layer)
            except SocketError:
                return False

        back: Any = is_back
        await eventually(back, timeout=30)
        # What was counted before is still counted.
        assert not await passes(strict, layer)
