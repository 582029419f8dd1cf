"""Layers and event loops: one that goes on keeps its layer, one that has ended does not."""

from __future__ import annotations

import asyncio
import gc
import warnings
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from pgchannels import (
    ChannelLayer,
    ChannelLayerClosed,
    ConfigurationError,
    MemoryLayer,
    PostgresLayer,
)
from pgchannels.web import ConnectionManager
from pgchannels.web.health import Health

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

Make = Callable[[], ChannelLayer]


@pytest.fixture(params=["memory", "postgres"])
def layer(request: pytest.FixtureRequest) -> Iterator[ChannelLayer]:
    if request.param == "memory":
        yield MemoryLayer()
    else:
        yield PostgresLayer(request.getfixturevalue("database_url"))
    # The driver complains of connections that were left open, when they are collected.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()


async def use(layer: ChannelLayer) -> int:
    async with layer:
        await layer.send("a", {})
        async with layer.subscribe("a", after="0") as messages, asyncio.timeout(20):
            return (await anext(messages)).id


def test_one_that_was_left_open_can_be_opened_again(layer: ChannelLayer) -> None:
    asyncio.run(layer.open())
    with pytest.raises(ChannelLayerClosed):
        asyncio.run(send(layer))
    assert asyncio.run(use(layer)) == 1
    asyncio.run(layer.open())
    asyncio.run(layer.close())
    asyncio.run(layer.close())
    assert asyncio.run(use(layer)) == 1


async def send(layer: ChannelLayer) -> None:
    await layer.send("a", {})


async def test_another_loop_neither_opens_nor_closes_it(layer: ChannelLayer) -> None:
    def elsewhere(call: Callable[[], Awaitable[Any]]) -> None:
        async def run() -> None:
            await call()

        with pytest.raises(ConfigurationError, match="another event loop"):
            asyncio.run(run())

    async with layer:
        for call in (layer.open, layer.close, layer.__aenter__, lambda: send(layer)):
            await asyncio.to_thread(elsewhere, call)
        await layer.send("a", {})
    async with layer:
        await layer.send("a", {})


def test_what_outlives_a_loop_waits_in_the_next_one_too(layer: ChannelLayer) -> None:
    """A lock of asyncio belongs to the loop in which somebody has first waited for it."""
    health = Health(ConnectionManager(layer))

    async def at_the_same_time() -> None:
        await asyncio.gather(*(layer.open() for _ in range(3)))
        await asyncio.gather(*(health.problems() for _ in range(3)))
        await asyncio.gather(*(layer.close() for _ in range(3)))

    for _ in range(2):
        asyncio.run(at_the_same_time())
