"""Durable readers: each goes on from where it has got its work done, one at a time."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from pgchannels.errors import FollowerLost, InvalidChannel, InvalidPosition, UnknownPosition
from pgchannels.follower import Batch, Follower
from pgchannels.layer import ChannelLayer
from pgchannels.messages import Message, Position
from pgchannels.records import FollowerStatus
from pgchannels.testing.reading import BAD_POSITIONS
from pgchannels.testing.sending import BAD_CHANNELS
from pgchannels.testing.support import PATIENCE, MakeLayer, numbers, send_numbers, settle, until

__all__ = ["FollowingTests"]


async def next_batch(follower: Follower) -> Batch:
    async with asyncio.timeout(PATIENCE):
        return await anext(follower)


async def work(follower: Follower, count: int) -> list[Message]:
    """Take *count* messages or more, and acknowledge each batch."""
    done: list[Message] = []
    while len(done) < count:
        batch = await next_batch(follower)
        done += batch
        await batch.ack()
    return done


async def status(layer: ChannelLayer, name: str) -> FollowerStatus:
    return next(each for each in await layer.followers() if each.name == name)


@pytest.mark.asyncio
class FollowingTests:
    """``follow()``."""

    async def test_batches(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        sent = await send_numbers(layer, "orders", range(5))
        async with layer.follow("orders", name="billing", after="0") as batches:
            batch = await next_batch(batches)
            assert list(batch) == sent
            assert len(batch) == 5
            assert batch[0] == sent[0]
            assert list(batch[1:3]) == sent[1:3]
            assert batch.position == sent[-1].position
            await batch.ack()
            await layer.send("orders", {"n": 5})
            assert numbers(await next_batch(batches)) == [5]
            assert not batches.truncated

    async def test_batches_are_pages(self, make_layer: MakeLayer) -> None:
        layer = await make_layer(page_size=4)
        await send_numbers(layer, "orders", range(10))
        async with layer.follow("orders", name="billing", after="0") as batches:
            assert numbers(await work(batches, 10)) == list(range(10))

    async def test_several_channels(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        for n in range(9):
            await layer.send("abc"[n % 3], {"n": n})
        await settle(layer)
        async with layer.follow("c", "a", "c", name="reader", after="0") as batches:
            assert numbers(await work(batches, 6)) == [0, 2, 3, 5, 6, 8]
        assert (await status(layer, "reader")).channels == ("c", "a")

    async def test_new_names_begin_now(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        await send_numbers(layer, "orders", [1])
        async with layer.follow("orders", name="billing") as batches:
            await layer.send("orders", {"n": 2})
            assert numbers(await work(batches, 1)) == [2]

    async def test_going_on_where_it_was(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(), await make_layer()
        sent = await send_numbers(layer, "orders", range(3))
        async with layer.follow("orders", name="billing", after=sent[0].position) as batches:
            assert numbers(await work(batches, 2)) == [1, 2]
        await layer.send("orders", {"n": 3})
        # where a new name would begin means nothing to one that is known
        for after in ("0", None):
            async with other.follow("orders", name="billing", after=after) as batches:
                assert numbers(await next_batch(batches)) == [3]
        async with other.follow("orders", name="shipping", after="0") as batches:
            assert numbers(await work(batches, 4)) == [0, 1, 2, 3]

    async def test_what_was_not_acknowledged_is_read_again(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        await send_numbers(layer, "orders", range(3))
        for _ in range(3):
            async with layer.follow("orders", name="billing", after="0") as batches:
                assert numbers(await next_batch(batches)) == [0, 1, 2]

    async def test_an_ack_covers_what_came_before(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(page_size=2), await make_layer()
        await send_numbers(layer, "orders", range(6))
        async with layer.follow("orders", name="billing", after="0") as batches:
            read = [await next_batch(batches) for _ in range(3)]
            assert [numbers(batch) for batch in read] == [[0, 1], [2, 3], [4, 5]]
            await read[1].ack()
            await read[1].ack()
            await read[0].ack()
        async with other.follow("orders", name="billing") as batches:
            assert numbers(await next_batch(batches)) == [4, 5]

    async def test_who_was_replaced_can_save_nothing(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(), await make_layer()
        await send_numbers(layer, "orders", range(3))
        async with layer.follow("orders", name="billing", after="0") as batches:
            left = await next_batch(batches)
        async with other.follow("orders", name="billing") as batches:
            batch = await next_batch(batches)
            with pytest.raises(FollowerLost):
                await left.ack()
            assert (await status(layer, "billing")).lag == 3
            await batch.ack()
        assert (await status(layer, "billing")).lag == 0

    async def test_one_at_a_time(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(), await make_layer()
        await send_numbers(layer, "orders", [0])
        async with layer.follow("orders", name="billing", after="0") as active:
            assert numbers(await work(active, 1)) == [0]
            async with other.follow("orders", name="billing", after="0") as standby:
                waiting = asyncio.create_task(next_batch(standby))
                for n in range(1, 4):
                    await layer.send("orders", {"n": n})
                    assert numbers(await work(active, 1)) == [n]
                assert not waiting.done()
                await active.__aexit__(None, None, None)
                await layer.send("orders", {"n": 4})
                batch = await waiting
                assert numbers(batch) == [4]
                await batch.ack()
                assert (await status(layer, "billing")).lag == 0

    async def test_many_take_turns(self, make_layer: MakeLayer) -> None:
        nodes = [await make_layer(page_size=3), await make_layer(page_size=3)]
        done: list[int] = []

        async def follow(layer: ChannelLayer) -> None:
            while len(done) < 30:
                async with layer.follow("orders", name="billing", after="0") as batches:
                    batch = await next_batch(batches)
                    done.extend(numbers(batch))
                    await batch.ack()

        async with asyncio.timeout(3 * PATIENCE), asyncio.TaskGroup() as group:
            readers = [group.create_task(follow(nodes[n % 2])) for n in range(4)]
            for n in range(30):
                await nodes[n % 2].send("orders", {"n": n})
            await until(lambda: len(done) >= 30)
            # those who wait for more than there is
            for reader in readers:
                reader.cancel()
        assert done == list(range(30))

    async def test_status(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(), await make_layer()
        assert await layer.followers() == []
        sent = await send_numbers(layer, "orders", range(5))
        await send_numbers(layer, "others", range(5))
        async with layer.follow("orders", name="b", after=sent[1].position) as batches:
            batch = await next_batch(batches)
            before = await status(other, "b")
            assert before.channels == ("orders",)
            assert (before.position, before.lag, before.active) == (sent[1].position, 3, True)
            await batch.ack()
            after = await status(other, "b")
            assert (after.lag, after.active) == (0, True)
            assert after.position >= sent[4].position
            assert after.moved_at > before.moved_at
            async with other.follow("orders", name="a", after="0") as more:
                await next_batch(more)
                assert [each.name for each in await layer.followers()] == ["a", "b"]

        async def at_rest() -> bool:
            return not any(each.active for each in await layer.followers())

        await until(at_rest)
        assert (await status(layer, "a")).lag == 5

    async def test_forgotten(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(), await make_layer()
        await send_numbers(layer, "orders", [1, 2])
        async with layer.follow("orders", name="billing", after="0") as batches:
            batch = await next_batch(batches)
            assert await other.forget_follower("billing") is True
            with pytest.raises(FollowerLost) as raised:
                await batch.ack()
            assert raised.value.name == "billing"
        assert await other.forget_follower("nobody") is False
        await other.forget_follower("billing")
        async with other.follow("orders", name="billing", after="0") as batches:
            assert numbers(await work(batches, 2)) == [1, 2]

    async def test_the_layer_closes(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(), await make_layer()
        await send_numbers(layer, "orders", [1])
        async with layer.follow("orders", name="billing", after="0") as batches:
            await work(batches, 1)
            waiting = asyncio.create_task(next_batch(batches))
            await asyncio.sleep(0)
            await layer.close()
            with pytest.raises(StopAsyncIteration):
                await waiting
        await other.send("orders", {"n": 2})
        async with other.follow("orders", name="billing") as batches:
            assert numbers(await next_batch(batches)) == [2]

    async def test_messages_that_were_not_retained(self, make_layer: MakeLayer) -> None:
        layer = await make_layer(retention=timedelta(seconds=2.5), prune_interval=0.1)
        async with layer.follow("orders", name="billing"):
            pass
        await layer.send("orders", {"n": 1})
        await layer.send("orders", {"n": 2})
        await settle(layer)

        async def gone() -> bool:
            await layer.send("other", {})
            return not (await layer.history("orders")).messages

        await until(gone)
        async with layer.follow("orders", name="billing") as batches:
            assert len(await next_batch(batches)) == 0
            assert batches.truncated
        async with layer.follow("orders", name="new", after="0") as batches:
            await layer.send("orders", {"n": 3})
            assert numbers(await work(batches, 1)) == [3]

    async def test_bad_arguments(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        for channel in BAD_CHANNELS:
            with pytest.raises(InvalidChannel):
                layer.follow(channel, name="billing")
            with pytest.raises(InvalidChannel):
                layer.follow("orders", name=channel)
        with pytest.raises(ValueError, match="channel"):
            layer.follow(name="billing")
        for position in BAD_POSITIONS:
            with pytest.raises(InvalidPosition):
                layer.follow("orders", name="billing", after=position)

    async def test_positions_to_follow_after_that_never_were(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        head = (await settle(layer)).position
        for position in (Position(head.epoch, head.id + 1), Position(head.epoch + 1, 0)):
            follower = layer.follow("orders", name="billing", after=position)
            with pytest.raises(UnknownPosition):
                await follower.__aenter__()
        assert await layer.followers() == []
