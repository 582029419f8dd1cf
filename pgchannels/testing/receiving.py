"""Receiving: each message to exactly one, whoever competes and whoever is cancelled."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

from pgchannels.errors import ChannelFull, InvalidChannel
from pgchannels.layer import ChannelLayer
from pgchannels.messages import Message
from pgchannels.testing.sending import BAD_CHANNELS
from pgchannels.testing.support import PATIENCE, MakeLayer, send_numbers, settle, until

__all__ = ["CapacityTests", "ReceivingTests"]


async def receive(layer: ChannelLayer, channel: str, count: int) -> list[int]:
    """The next *count* numbers."""
    return [(await layer.receive(channel, timeout=PATIENCE))["n"] for _ in range(count)]


async def assert_empty(layer: ChannelLayer, channel: str) -> None:
    await settle(layer)
    with pytest.raises(TimeoutError):
        await layer.receive(channel, timeout=0)


async def by_cancel(layer: ChannelLayer, patience: float) -> Message | None:
    task = asyncio.create_task(layer.receive("jobs"))
    await asyncio.wait({task}, timeout=patience)
    task.cancel()
    await asyncio.wait({task})
    return None if task.cancelled() else task.result()


async def by_wait_for(layer: ChannelLayer, patience: float) -> Message | None:
    try:
        return await asyncio.wait_for(layer.receive("jobs"), patience)
    except TimeoutError:
        return None


async def by_timeout(layer: ChannelLayer, patience: float) -> Message | None:
    message = None
    try:
        async with asyncio.timeout(patience):
            message = await layer.receive("jobs")
    except TimeoutError:
        assert message is None  # it cannot be both returned and lost
    return message


async def by_its_own_timeout(layer: ChannelLayer, patience: float) -> Message | None:
    try:
        return await layer.receive("jobs", timeout=patience)
    except TimeoutError:
        return None


@pytest.mark.asyncio
class ReceivingTests:
    """``receive()``."""

    async def test_a_receiver_may_change_what_it_has_received(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        first, second = [await layer.new_channel("worker") for _ in range(2)]
        for channel in (first, second):
            await layer.group_add("jobs", channel)
        await layer.group_send("jobs", {"n": [1]})
        for channel in (first, second):
            message = await layer.receive(channel, timeout=PATIENCE)
            assert message.data == {"n": [1]}
            message["n"].append(2)

    async def test_in_order(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(), await make_layer()
        await send_numbers(layer, "jobs", range(10))
        assert await receive(layer, "jobs", 3) == [0, 1, 2]
        assert await receive(other, "jobs", 4) == [3, 4, 5, 6]
        assert await receive(layer, "jobs", 3) == [7, 8, 9]
        await assert_empty(layer, "jobs")
        assert len((await layer.history("jobs")).messages) == 10

    async def test_waiting(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(), await make_layer()
        waiting = asyncio.create_task(layer.receive("jobs"))
        await settle(layer, other)
        assert not waiting.done()
        await other.send("jobs", {"n": 1})
        async with asyncio.timeout(PATIENCE):
            assert (await waiting)["n"] == 1

    async def test_without_waiting(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        for timeout in (0, -1, -0.5):
            with pytest.raises(TimeoutError):
                await layer.receive("jobs", timeout=timeout)
            await send_numbers(layer, "jobs", [1, 2])
            assert (await layer.receive("jobs", timeout=timeout))["n"] == 1
            assert (await layer.receive("jobs", timeout=timeout))["n"] == 2
            with pytest.raises(TimeoutError):
                await layer.receive("jobs", timeout=timeout)

    async def test_a_timeout_that_is_no_number(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        with pytest.raises(ValueError, match="NaN"):
            async with asyncio.timeout(1):
                await layer.receive("jobs", timeout=float("nan"))

    async def test_a_timeout(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        with pytest.raises(TimeoutError):
            await layer.receive("jobs", timeout=0.05)
        await layer.send("jobs", {"n": 1})
        assert await receive(layer, "jobs", 1) == [1]

    async def test_each_message_has_one_receiver(self, make_layer: MakeLayer) -> None:
        nodes = [await make_layer(), await make_layer()]
        receiving = [asyncio.create_task(nodes[n % 2].receive("jobs")) for n in range(40)]
        await asyncio.gather(*(nodes[n % 2].send("jobs", {"n": n}) for n in range(40)))
        async with asyncio.timeout(PATIENCE):
            received = await asyncio.gather(*receiving)
        assert sorted(message["n"] for message in received) == list(range(40))
        await assert_empty(nodes[0], "jobs")

    @pytest.mark.parametrize("attempt", [by_cancel, by_wait_for, by_timeout, by_its_own_timeout])
    async def test_whoever_is_cancelled_nothing_is_lost(
        self,
        make_layer: MakeLayer,
        attempt: Callable[[ChannelLayer, float], Awaitable[Message | None]],
    ) -> None:
        nodes = [await make_layer(), await make_layer()]
        moods = random.Random(7)
        total = 150
        received: list[int] = []

        async def send() -> None:
            for n in range(total):
                await nodes[n % 2].send("jobs", {"n": n})
                if not n % 10:
                    await asyncio.sleep(moods.uniform(0, 0.005))

        async def receive(layer: ChannelLayer) -> None:
            while len(received) < total:
                # Some wait long enough for a message in any case, or it might never end.
                message = await attempt(layer, moods.choice([0.0, 0.001, 0.003, 0.01, 0.3]))
                if message is not None:
                    received.append(message["n"])

        async with asyncio.timeout(3 * PATIENCE), asyncio.TaskGroup() as group:
            group.create_task(send())
            for n in range(8):
                group.create_task(receive(nodes[n % 2]))
        assert sorted(received) == list(range(total))
        await assert_empty(nodes[0], "jobs")

    async def test_one_that_gives_up_leaves_it_to_the_others(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        for n in range(20):
            impatient = asyncio.create_task(layer.receive("jobs"))
            patient = asyncio.create_task(layer.receive("jobs"))
            await asyncio.sleep(0)
            sending = asyncio.create_task(layer.send("jobs", {"n": n}))
            for _ in range(n % 5):
                await asyncio.sleep(0)
            impatient.cancel()
            await asyncio.wait({impatient})
            await sending
            if impatient.cancelled():
                async with asyncio.timeout(PATIENCE):
                    assert (await patient)["n"] == n
            else:
                assert impatient.result()["n"] == n
                patient.cancel()
                await asyncio.wait({patient})
                assert patient.cancelled()

    async def test_groups(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(), await make_layer()
        channel = await layer.new_channel()
        await layer.group_send("a", {"n": 0})
        await settle(layer)
        await layer.group_add("a", channel)
        await other.group_add("b", channel)
        for n, target in enumerate(["a", "b", channel, "c", "a"], start=1):
            await other.send(target, {"n": n})
        assert await receive(layer, channel, 4) == [1, 2, 3, 5]
        await assert_empty(layer, channel)

    async def test_groups_of_ordinary_channels(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(), await make_layer()
        await layer.group_send("room", {"n": 0})
        await layer.send("jobs", {"n": 1})
        await settle(layer)
        await layer.group_add("room", "jobs")
        await layer.group_add("room", "more")
        await other.group_send("room", {"n": 2})
        await other.send("jobs", {"n": 3})
        # the group's each once for each of its members, the channel's own from the beginning
        assert await receive(layer, "jobs", 3) == [1, 2, 3]
        assert await receive(other, "more", 1) == [2]
        await assert_empty(layer, "jobs")
        await assert_empty(layer, "more")

    async def test_adding_again_changes_nothing(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        await layer.group_add("room", "jobs")
        await layer.group_send("room", {"n": 1})
        await settle(layer)
        await layer.group_add("room", "jobs")
        assert await receive(layer, "jobs", 1) == [1]

    async def test_a_membership_that_ended(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        await layer.group_add("room", "jobs")
        await layer.group_send("room", {"n": 1})
        await settle(layer)
        await layer.group_discard("room", "jobs")
        await layer.group_add("room", "jobs")
        await layer.group_send("room", {"n": 2})
        assert await receive(layer, "jobs", 1) == [2]

    async def test_sent_to_several(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(), await make_layer()
        mine, theirs = await layer.new_channel(), await other.new_channel()
        await layer.send_to([mine, theirs, mine], {"n": 1})
        await layer.send_to([theirs], {"n": 2})
        await layer.send_to(iter([mine]), {"n": 3})
        assert await receive(layer, mine, 2) == [1, 3]
        assert await receive(other, theirs, 2) == [1, 2]
        await assert_empty(layer, mine)
        await assert_empty(other, theirs)

    async def test_who_is_excluded_does_not_receive(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        sender, other = await layer.new_channel(), await layer.new_channel()
        for channel in (sender, other):
            await layer.group_add("room", channel)
        await layer.group_send("room", {"n": 1}, exclude=sender)
        await layer.group_send("room", {"n": 2})
        assert await receive(layer, sender, 1) == [2]
        assert await receive(layer, other, 2) == [1, 2]
        assert len((await layer.history("room")).messages) == 2

    async def test_a_new_channel_begins_now(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        channel = await layer.new_channel()
        await layer.send(channel, {"n": 1})
        await layer.send(channel, {"n": 2})
        assert await receive(layer, channel, 2) == [1, 2]

    async def test_channels_do_not_mix(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        names = [f"jobs:{n}" for n in range(20)]
        receiving = [asyncio.create_task(layer.receive(name)) for name in names]
        for n, name in enumerate(names):
            await layer.send(name, {"n": n})
        async with asyncio.timeout(PATIENCE):
            assert [m["n"] for m in await asyncio.gather(*receiving)] == list(range(20))

    async def test_bad_channels_to_receive_from(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        for channel in BAD_CHANNELS:
            with pytest.raises(InvalidChannel):
                await layer.receive(channel, timeout=0)


@pytest.mark.asyncio
class CapacityTests:
    """``capacity``."""

    async def test_full(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(capacity=3), await make_layer(capacity=3)
        await layer.send("jobs", {"n": 0})
        assert await receive(other, "jobs", 1) == [0]
        await send_numbers(layer, "jobs", [1, 2, 3])
        with pytest.raises(ChannelFull) as raised:
            await other.send("jobs", {"n": 4})
        assert (raised.value.channel, raised.value.capacity) == ("jobs", 3)
        assert await receive(layer, "jobs", 1) == [1]
        await other.send("jobs", {"n": 5})
        assert await receive(layer, "jobs", 3) == [2, 3, 5]

    async def test_nobody_has_received(self, make_layer: MakeLayer) -> None:
        layer = await make_layer(capacity=1)
        await send_numbers(layer, "room", range(5))

    async def test_a_connection_that_is_only_read_is_never_full(
        self, make_layer: MakeLayer
    ) -> None:
        layer = await make_layer(capacity=2)
        channel = await layer.new_channel()
        await send_numbers(layer, channel, range(5))
        assert await receive(layer, channel, 5) == list(range(5))
        await send_numbers(layer, channel, [5, 6])
        with pytest.raises(ChannelFull):
            await layer.send(channel, {"n": 7})

    async def test_a_deleted_channel_ends_the_waiting(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        channel = await layer.new_channel()
        waiting = asyncio.create_task(layer.receive(channel))
        with pytest.raises(TimeoutError):
            await layer.receive(channel, timeout=0.1)  # so that the other waits, too
        await layer.delete_channel(channel)
        with pytest.raises(InvalidChannel):
            await waiting

    async def test_a_channel_that_is_deleted_just_as_it_is_sent_to(
        self, make_layer: MakeLayer
    ) -> None:
        layer = await make_layer()
        channel = await layer.new_channel()
        waiting = asyncio.create_task(layer.receive(channel))
        with pytest.raises(TimeoutError):
            await layer.receive(channel, timeout=0.1)  # so that the other waits, too
        await layer.send(channel, {"n": 1})
        await layer.delete_channel(channel)
        async with asyncio.timeout(PATIENCE):
            (result,) = await asyncio.gather(waiting, return_exceptions=True)
        assert isinstance(result, (InvalidChannel, Message))  # the message may have come in time

    async def test_the_messages_of_groups_do_not_count(self, make_layer: MakeLayer) -> None:
        layer = await make_layer(capacity=1)
        channel = await layer.new_channel()
        await layer.group_add("room", channel)
        with pytest.raises(TimeoutError):
            await layer.receive(channel, timeout=0)
        await send_numbers(layer, "room", range(5))
        await layer.send_to([channel], {"n": 5})
        await layer.send_to([channel], {"n": 6})
        await layer.send(channel, {"n": 7})
        assert await receive(layer, channel, 8) == list(range(8))

    async def test_what_has_expired_does_not_count(self, make_layer: MakeLayer) -> None:
        layer = await make_layer(capacity=1)
        with pytest.raises(TimeoutError):
            await layer.receive("jobs", timeout=0)
        await layer.send("jobs", {"n": 1}, ttl=0.5)

        async def sent() -> bool:
            try:
                await layer.send("jobs", {"n": 2})
            except ChannelFull:
                return False
            return True

        await until(sent)
        assert await receive(layer, "jobs", 1) == [2]

    async def test_none(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        with pytest.raises(TimeoutError):
            await layer.receive("jobs", timeout=0)
        await send_numbers(layer, "jobs", range(20))
