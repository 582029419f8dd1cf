"""Consumers that are too slow, and what a stream then does."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack

import pytest

from pgchannels.errors import ChannelLayerClosed, ConfigurationError, SlowConsumer
from pgchannels.messages import Message
from pgchannels.overflow import Overflow
from pgchannels.subscription import State
from pgchannels.testing.support import (
    PATIENCE,
    MakeLayer,
    numbers,
    send_numbers,
    settle,
    take,
    until,
)

__all__ = ["OverflowTests"]


def _tens(message: Message) -> int:
    n: int = message["n"]
    return n // 10


@pytest.mark.asyncio
class OverflowTests:
    """``subscribe(overflow=…)``."""

    async def test_drop_oldest(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        overflow = Overflow("drop_oldest", max_messages=5)
        async with layer.subscribe("room", overflow=overflow) as stream:
            sent = await send_numbers(layer, "room", range(20))
            await settle(layer)
            assert (stream.state, stream.pending, stream.dropped) == (State.LIVE, 5, 15)
            assert await stream.batch() == sent[15:]
            sent += await send_numbers(layer, "room", range(20, 23))
            assert await take(stream, 3) == sent[20:]
            assert (stream.dropped, stream.replaced, stream.truncated) == (15, 0, False)

    async def test_drop_oldest_by_bytes(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        overflow = Overflow("drop_oldest", max_bytes=1000)
        async with layer.subscribe("room", overflow=overflow) as stream:
            for n, length in enumerate((10, 400, 400, 400, 2000, 400)):
                await layer.send("room", {"n": n, "text": "x" * length})
            await settle(layer)
            assert numbers(await stream.batch()) == [5]
            await layer.send("room", {"n": 6, "text": "x" * 2000})
            await settle(layer)
            assert numbers(await stream.batch()) == [6]
            assert stream.dropped == 5

    async def test_positions_are_good_whatever_was_dropped(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(), await make_layer()
        overflow = Overflow("drop_oldest", max_messages=2)
        async with layer.subscribe("room", overflow=overflow) as stream:
            sent = await send_numbers(layer, "room", range(3))
            (_, first, *_) = sent
            await settle(layer)
            taken = await stream.batch()
            assert taken == sent[1:]
            sent += await send_numbers(layer, "room", range(3, 10))
        # What a node has still to read comes live, and may be dropped.
        await settle(layer, other)
        for node in (layer, other):
            async with node.subscribe("room", after=first.position, overflow=overflow) as stream:
                assert await take(stream, 8) == sent[2:]
            async with node.subscribe("room", after=taken[-1].position) as stream:
                assert await take(stream, 7) == sent[3:]

    async def test_latest_by_key(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        overflow = Overflow("latest_by_key", max_messages=3, key=_tens)
        async with layer.subscribe("a", "b", overflow=overflow) as stream:
            for channel, n in [("a", 1), ("a", 11), ("b", 2), ("a", 3), ("a", 12)]:
                await layer.send(channel, {"n": n})
            await settle(layer)
            assert numbers(await stream.batch()) == [2, 3, 12]
            assert (stream.replaced, stream.dropped) == (2, 0)
            for n in (1, 11, 21, 2, 31):
                await layer.send("a", {"n": n})
            await settle(layer)
            assert numbers(await stream.batch()) == [21, 2, 31]
            assert (stream.replaced, stream.dropped) == (3, 1)
            assert stream.state is State.LIVE

    async def test_messages_without_a_key_are_not_replaced(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        overflow = Overflow("latest_by_key", key=lambda message: message.get("key"))
        async with layer.subscribe("room", overflow=overflow) as stream:
            for n, key in enumerate(("x", None, "x", None)):
                await layer.send("room", {"n": n, "key": key})
            await settle(layer)
            assert numbers(await stream.batch()) == [1, 2, 3]

    async def test_disconnect(
        self, make_layer: MakeLayer, caplog: pytest.LogCaptureFixture
    ) -> None:
        layer = await make_layer()
        overflow = Overflow("disconnect", max_messages=3)
        async with AsyncExitStack() as stack:
            # Those before and behind it get everything.
            first = await stack.enter_async_context(layer.subscribe("room"))
            stream = await stack.enter_async_context(layer.subscribe("room", overflow=overflow))
            last = await stack.enter_async_context(layer.subscribe("room"))
            sent = await send_numbers(layer, "room", range(3))
            await settle(layer)
            assert (stream.state, stream.error) == (State.LIVE, None)
            assert await stream.batch() == sent
            sent += await send_numbers(layer, "room", range(3, 10))
            await settle(layer)
            assert stream.state is State.ENDED
            assert isinstance(stream.error, SlowConsumer)
            for _ in range(2):
                with pytest.raises(SlowConsumer) as caught:
                    await stream.batch()
                assert caught.value.pending == 4
                with pytest.raises(SlowConsumer):
                    await anext(stream)
            assert (stream.pending, stream.dropped) == (0, 4)
            for other in (first, last):
                assert await take(other, 10) == sent
        # It must not end in the midst of the source's going through who reads: what does that may
        # start again, and nobody else would notice.
        assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
        async with layer.subscribe("room", after=sent[2].position, overflow=overflow) as stream:
            assert await take(stream, 7) == sent[3:]

    async def test_iteration_gives_what_it_has_before_the_end(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        overflow = Overflow("disconnect", max_messages=3)
        async with layer.subscribe("room", overflow=overflow) as stream:
            await send_numbers(layer, "room", range(3))
            await settle(layer)
            assert numbers(await take(stream, 1)) == [0]
            await send_numbers(layer, "room", range(3, 7))
            await settle(layer)
            assert numbers(await take(stream, 2)) == [1, 2]
            with pytest.raises(SlowConsumer):
                await anext(stream)

    async def test_who_waits_is_not_too_slow(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        overflow = Overflow("disconnect", max_messages=1, max_bytes=10)
        async with layer.subscribe("room", overflow=overflow) as stream:
            for n in range(5):
                await layer.send("room", {"n": n, "text": "x" * 100})
                assert numbers(await take(stream, 1)) == [n]

    @pytest.mark.parametrize(
        "overflow",
        [
            Overflow("drop_oldest", max_messages=3),
            Overflow("latest_by_key", max_messages=3, key=_tens),
            Overflow("disconnect", max_messages=3),
        ],
        ids=lambda overflow: str(overflow.policy),
    )
    async def test_the_log_is_read_at_the_readers_pace(
        self, make_layer: MakeLayer, overflow: Overflow
    ) -> None:
        layer = await make_layer(page_size=7)
        before = await settle(layer)
        a = await send_numbers(layer, "a", range(30))
        b = await send_numbers(layer, "b", range(30))
        async with layer.subscribe("a", after=before.position, overflow=overflow) as stream:
            read = await stream.batch()
            # What comes while it is behind is read from the log in its turn.
            a += await send_numbers(layer, "a", range(30, 50))
            await settle(layer)
            while len(read) < 50:
                read += await asyncio.wait_for(stream.batch(), PATIENCE)
            assert read == a
            await until(lambda: stream.caught_up is not None)
            await stream.join("b", after="0")
            assert await take(stream, 30) == b
            assert (stream.dropped, stream.replaced) == (0, 0)

    async def test_joining_while_live_messages_are_dropped(self, make_layer: MakeLayer) -> None:
        layer = await make_layer(page_size=7)
        b = await send_numbers(layer, "b", range(30))
        overflow = Overflow("drop_oldest", max_messages=3)
        async with layer.subscribe("a", overflow=overflow) as stream:
            await stream.join("b", after="0")
            a = await send_numbers(layer, "a", range(10))
            await settle(layer)
            taken = await take(stream, 33)
            assert [message for message in taken if message.channel == "a"] == a[7:]
            assert [message for message in taken if message.channel == "b"] == b
            assert stream.dropped == 7

    async def test_who_is_told_of_the_end(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        told: list[BaseException] = []
        overflow = Overflow("disconnect", max_messages=3)
        async with layer.subscribe("a", overflow=overflow) as stream:
            stream.on_end(told.append)
            await send_numbers(layer, "a", range(10))
            # Nobody takes anything.
            await until(lambda: bool(told))
            assert told == [stream.error]
            assert isinstance(told[0], SlowConsumer)
            late: list[BaseException] = []
            stream.on_end(late.append)
            assert late == told
        assert len(told) == len(late) == 1
        async with layer.subscribe("a") as stream:
            stream.on_end(told.append)
        assert len(told) == 1  # it has ended without an error
        async with layer.subscribe("a") as stream:
            stream.on_end(told.append)
            await layer.close()
            assert isinstance(told[1], ChannelLayerClosed)

    async def test_overflow_that_cannot_be(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        for overflow in ("", "latest_by_key", "newest"):
            with pytest.raises(ConfigurationError):
                layer.subscribe("room", overflow=overflow)
