"""Messages that are for who is there, and leave no trace."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import orjson
import pytest

from pgchannels.layer import ChannelLayer
from pgchannels.testing.support import MakeLayer, numbers, settle, take

__all__ = ["EphemeralTests"]


@asynccontextmanager
async def telling(
    layer: ChannelLayer, channel: str, *, exclude: str | None = None
) -> AsyncIterator[None]:
    """Send again and again: each is delivered at most once, and may not be."""

    async def tell() -> None:
        while True:
            await layer.send_ephemeral(channel, {"n": -1, "b": b"\x00"}, exclude=exclude)
            await asyncio.sleep(0.02)

    task = asyncio.create_task(tell())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})
    assert task.cancelled(), task.exception()


@pytest.mark.asyncio
class EphemeralTests:
    """``send_ephemeral()``."""

    async def test_who_is_there_gets_it_on_all_nodes(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(), await make_layer()
        async with (
            layer.subscribe("room") as here,
            other.subscribe("x", "room") as there,
            telling(layer, "room"),
        ):
            messages = [*await take(here, 1), *await take(there, 1)]
        for message in messages:
            assert message.ephemeral
            assert message.channel == "room"
            assert dict(message) == {"n": -1, "b": b"\x00"}
            envelope = orjson.loads(message.envelope)
            assert envelope["ephemeral"] is True
            assert not {"id", "position"} & set(envelope)

    async def test_members_get_it(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(), await make_layer()
        channel = await layer.new_channel()
        async with layer.subscribe(member=channel) as stream:
            await layer.group_add("room", channel)
            for target in ("room", channel):
                async with telling(other, target):
                    while (await take(stream, 1))[0].channel != target:
                        pass

    async def test_who_is_excluded_is_not_told(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        sender, reader = await layer.new_channel(), await layer.new_channel()
        for channel in (sender, reader):
            await layer.group_add("room", channel)
        async with (
            layer.subscribe(member=sender) as mine,
            layer.subscribe(member=reader) as theirs,
        ):
            async with telling(layer, "room", exclude=sender):
                assert numbers(await take(theirs, 2)) == [-1, -1]
            await layer.send(sender, {"n": 1})
            assert numbers(await take(mine, 1)) == [1]

    async def test_it_is_nowhere_afterwards(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        before = await settle(layer)
        async with (
            layer.subscribe("room") as stream,
            layer.follow("room", name="reader") as batches,
        ):
            async with telling(layer, "room"):
                await take(stream, 2)
            await layer.send("room", {"n": 1})
            assert numbers(await anext(batches)) == [1]
        (stored,) = (await layer.history("room")).messages
        assert stored["n"] == 1
        assert stored.id == before.id + 1
        async with layer.subscribe("room", after="0") as stream:
            assert numbers(await take(stream, 1)) == [1]

    async def test_it_is_not_received(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        receiving = asyncio.create_task(layer.receive("room"))
        async with layer.subscribe("room") as stream, telling(layer, "room"):
            await take(stream, 2)
        assert not receiving.done()
        await layer.send("room", {"n": 1})
        async with asyncio.timeout(20):
            assert (await receiving)["n"] == 1

    async def test_resuming_after_one(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        async with layer.subscribe("room") as stream:
            await layer.send("room", {"n": 1})
            await take(stream, 1)
            async with telling(layer, "room"):
                (fleeting,) = await take(stream, 1)
        await layer.send("room", {"n": 2})
        async with layer.subscribe("room", after=fleeting.position) as stream:
            assert numbers(await take(stream, 1)) == [2]
