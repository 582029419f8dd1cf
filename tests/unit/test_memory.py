"""What the memory layer has beyond the contract: a clock to be set, layers to be killed."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pytest

from pgchannels.channels import presence_channel
from pgchannels.errors import (
    ChannelFull,
    ChannelLayerClosed,
    ConfigurationError,
    FollowerLost,
)
from pgchannels.layer import ChannelLayer
from pgchannels.memory import MemoryLayer, MemoryLog
from pgchannels.messages import Message
from pgchannels.records import Outgoing
from pgchannels.settings import Settings
from pgchannels.stream import Stream
from tests.support.eventually import eventually


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def move(self, **duration: float) -> None:
        self.now += timedelta(**duration)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log(clock: Clock) -> MemoryLog:
    return MemoryLog(clock=clock)


MakeLayer = Callable[..., Awaitable[MemoryLayer]]


@pytest.fixture
async def make_layer(log: MemoryLog) -> AsyncIterator[MakeLayer]:
    layers: list[MemoryLayer] = []

    async def make(**settings: Any) -> MemoryLayer:
        layer = MemoryLayer(Settings(**settings), log=log)
        await layer.open()
        layers.append(layer)
        return layer

    yield make
    for layer in layers:
        await layer.close()


async def numbers(layer: ChannelLayer, channel: str = "room") -> list[int]:
    """What the history of a channel holds."""
    return [message["n"] for message in (await layer.history(channel, limit=1000)).messages]


async def events(stream: Stream, count: int) -> list[tuple[str, str | None, int]]:
    async with asyncio.timeout(10):
        found = [await anext(stream) for _ in range(count)]
    return [(m["type"].removeprefix("presence."), m["user_id"], m["count"]) for m in found]


async def waiting(task: asyncio.Task[Any]) -> None:
    """Let a task come to where it waits."""
    for _ in range(20):
        await asyncio.sleep(0)
    assert not task.done()


class TestAlone:
    async def test_no_database_is_needed(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
    ) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.delenv("PGCHANNELS_DATABASE_URL", raising=False)
        async with MemoryLayer() as layer:
            await layer.send("room", {"n": 1})
            assert await numbers(layer) == [1]

    async def test_layers_share_nothing_unless_told(self) -> None:
        async with MemoryLayer() as layer, MemoryLayer() as other:
            await layer.send("room", {"n": 1})
            assert await numbers(other) == []

    async def test_what_was_sent_outlives_the_layer(self) -> None:
        layer = MemoryLayer()
        async with layer:
            await layer.send("room", {"n": 1})
        async with layer:
            assert await numbers(layer) == [1]

    async def test_a_serializer_of_ones_own(self) -> None:
        class Shouting:
            def dumps(self, payload: Any) -> str:
                return orjson.dumps(payload, default=str).decode().upper()

            def loads(self, text: str) -> dict[str, Any]:
                return {key.lower(): value for key, value in orjson.loads(text).items()}

        async with MemoryLayer(serializer=Shouting()) as layer:
            await layer.send("room", {"a": 1j})
            assert dict(await layer.receive("room")) == {"a": "1J"}

    async def test_loops_that_never_wait_leave_others_their_turn(self) -> None:
        async with MemoryLayer() as layer:
            turns = 0

            async def count() -> None:
                nonlocal turns
                while True:
                    turns += 1
                    await asyncio.sleep(0)

            counting = asyncio.create_task(count())
            for n in range(100):
                await layer.send("room", {"n": n})
            assert turns >= 100
            for _ in range(100):
                await layer.receive("room", timeout=0)
            assert turns >= 200
            for _ in range(100):
                with pytest.raises(TimeoutError):
                    await layer.receive("room", timeout=0)
            assert turns >= 300
            counting.cancel()


class TestTime:
    async def test_the_clock_is_the_logs(self, make_layer: MakeLayer, clock: Clock) -> None:
        layer = await make_layer()
        receipt = await layer.send("room", {})
        assert receipt.created_at == clock.now
        assert (await layer.receive("room")).created_at == clock.now

    async def test_ttl(self, make_layer: MakeLayer, clock: Clock) -> None:
        layer = await make_layer(default_ttl=60)
        await layer.send("room", {"n": 1}, ttl=10)
        await layer.send("room", {"n": 2})
        await layer.send("room", {"n": 3}, ttl=timedelta(days=36525))
        clock.move(seconds=9.999999)
        assert await numbers(layer) == [1, 2, 3]
        clock.move(microseconds=1)
        assert await numbers(layer) == [2, 3]
        clock.move(seconds=50)
        assert await numbers(layer) == [3]
        assert (await layer.receive("room"))["n"] == 3

    async def test_retention(self, make_layer: MakeLayer, clock: Clock) -> None:
        layer = await make_layer(retention=timedelta(hours=1))
        await layer.send("room", {"n": 1})
        clock.move(minutes=1)
        await layer.send("room", {"n": 2})
        (first, second) = (await layer.history("room")).messages
        clock.move(minutes=59)
        page = await layer.history("room", after=first.position)
        assert page.messages == [second]
        assert not page.truncated  # all that came after the first is there
        assert await numbers(layer) == [2]
        clock.move(minutes=1)
        page = await layer.history("room", after=first.position)
        assert page.messages == []
        assert page.truncated
        await layer.send("room", {"n": 3})
        assert (await layer.receive("room")).id == 3  # ids go on

    async def test_what_has_expired_takes_no_memory(
        self, make_layer: MakeLayer, clock: Clock, log: MemoryLog
    ) -> None:
        layer = await make_layer(
            retention=timedelta(hours=1), key_lifetime=timedelta(hours=1), group_expiry=3600
        )
        gc.collect()
        before = len(gc.get_objects())
        for n in range(500):
            await layer.send(f"room:{n}", {"n": n}, key=str(n), ttl=None if n % 2 else 60)
            await layer.group_add(f"group:{n}", "jobs", presence="connection")
        assert len(gc.get_objects()) > before + 1000
        clock.move(hours=1)
        log.prune()
        clock.move(hours=1)  # who left when the memberships expired
        log.prune()
        gc.collect()
        assert len(gc.get_objects()) < before + 200

    async def test_retention_for_ever(self, make_layer: MakeLayer, clock: Clock) -> None:
        layer = await make_layer(retention=None)
        await layer.send("room", {"n": 1})
        clock.move(days=100_000)
        assert await numbers(layer) == [1]

    async def test_keys(self, make_layer: MakeLayer, clock: Clock) -> None:
        layer = await make_layer(key_lifetime=timedelta(hours=1))
        first = await layer.send("room", {"n": 1}, key="k")
        clock.move(minutes=59)
        again = await layer.send("room", {"n": 2}, key="k")
        assert (again.repeated, again.created_at) == (True, first.created_at)
        clock.move(minutes=1)  # from the first, not from the repeat
        assert not (await layer.send("room", {"n": 3}, key="k")).repeated
        assert await numbers(layer) == [1, 3]

    async def test_capacity(self, make_layer: MakeLayer, clock: Clock) -> None:
        layer = await make_layer(capacity=2)
        channel = await layer.new_channel()
        with pytest.raises(TimeoutError):
            await layer.receive(channel, timeout=0)
        await layer.send(channel, {"n": 1}, ttl=10)
        await layer.send(channel, {"n": 2}, key="k")
        with pytest.raises(ChannelFull):
            await layer.send(channel, {"n": 3})
        assert (await layer.send(channel, {"n": 2}, key="k")).repeated
        clock.move(seconds=10)
        await layer.send(channel, {"n": 4})
        with pytest.raises(ChannelFull):
            await layer.send(channel, {"n": 5}, key="refused")
        assert [(await layer.receive(channel))["n"] for _ in range(2)] == [2, 4]
        assert not (await layer.send(channel, {"n": 5}, key="refused")).repeated


class TestMemberships:
    async def test_unused_ones_expire(self, make_layer: MakeLayer, clock: Clock) -> None:
        layer = await make_layer(group_expiry=100)
        connection = await layer.new_channel()
        for channel in ("idle", "renewed", "received", connection):
            await layer.group_add("room", channel)
        clock.move(seconds=99)
        await layer.group_add("room", "renewed")
        with pytest.raises(TimeoutError):
            await layer.receive("received", timeout=0)
        clock.move(seconds=1)
        expected = sorted(["renewed", "received", connection])
        assert await layer.group_members("room") == expected
        clock.move(seconds=98)
        assert await layer.group_members("room") == expected
        clock.move(seconds=1)
        assert await layer.group_members("room") == [connection]

    async def test_one_that_is_waited_for_is_in_use(
        self, make_layer: MakeLayer, clock: Clock
    ) -> None:
        layer = await make_layer(group_expiry=100)
        await layer.group_add("room", "jobs")
        receiving = asyncio.create_task(layer.receive("jobs"))
        await waiting(receiving)
        for _ in range(5):
            clock.move(seconds=100)
            assert await layer.group_members("room") == ["jobs"]
        receiving.cancel()
        await asyncio.wait({receiving})
        clock.move(seconds=100)
        assert await layer.group_members("room") == []

    async def test_no_expiry(self, make_layer: MakeLayer, clock: Clock) -> None:
        layer = await make_layer(group_expiry=0)
        await layer.group_add("room", "jobs")
        clock.move(days=10_000)
        assert await layer.group_members("room") == ["jobs"]

    async def test_who_was_counted_has_left_then(self, make_layer: MakeLayer, clock: Clock) -> None:
        layer = await make_layer(group_expiry=100)
        async with layer.subscribe(presence_channel("room")) as stream:
            await layer.group_add("room", "jobs", presence="connection")
            clock.move(seconds=100)
            assert await layer.presence("room") == []
            assert await events(stream, 2) == [("joined", None, 1), ("left", None, 0)]


class TestGrace:
    async def test_it_is_by_the_clock(
        self, make_layer: MakeLayer, clock: Clock, log: MemoryLog
    ) -> None:
        layer = await make_layer(presence_grace=5)
        channel = await layer.new_channel(user_id="u")
        async with layer.subscribe(presence_channel("room")) as stream:
            await layer.group_add("room", channel, presence="user")
            (before,) = await layer.presence("room")
            clock.move(seconds=1)
            await layer.group_discard("room", channel)
            clock.move(seconds=4.9)
            (away,) = await layer.presence("room")
            assert (away.connections, away.joined_at) == (0, before.joined_at)
            clock.move(seconds=0.1)
            log.prune()
            assert await events(stream, 2) == [("joined", "u", 1), ("left", "u", 0)]
        assert await layer.presence("room") == []

    async def test_each_absence_has_its_own(self, make_layer: MakeLayer, clock: Clock) -> None:
        layer = await make_layer(presence_grace=5)
        channel = await layer.new_channel(user_id="u")
        async with layer.subscribe(presence_channel("room")) as stream:
            for _ in range(3):
                await layer.group_add("room", channel, presence="user")
                clock.move(seconds=4)
                await layer.group_discard("room", channel)
                clock.move(seconds=4)
            clock.move(seconds=1)
            assert await layer.presence("room") == []
            assert await events(stream, 2) == [("joined", "u", 1), ("left", "u", 0)]

    async def test_it_is_told_without_anybody_looking(self) -> None:
        settings = Settings(presence_grace=0.05)
        async with MemoryLayer(settings) as layer:
            channel = await layer.new_channel(user_id="u")
            async with layer.subscribe(presence_channel("room")) as stream:
                await layer.group_add("room", channel, presence="user")
                await layer.delete_channel(channel)
                assert await events(stream, 2) == [("joined", "u", 1), ("left", "u", 0)]

    async def test_another_layer_tells_it(self) -> None:
        log = MemoryLog()
        settings = Settings(presence_grace=0.05)
        async with MemoryLayer(settings, log=log) as other:
            async with MemoryLayer(settings, log=log) as layer:
                channel = await layer.new_channel(user_id="u")
                await layer.group_add("room", channel, presence="user")
            async with other.subscribe(presence_channel("room"), after="0") as stream:
                assert await events(stream, 2) == [("joined", "u", 1), ("left", "u", 0)]

    async def test_a_layer_that_opens_later_tells_it(self) -> None:
        layer = MemoryLayer(Settings(presence_grace=0.05))
        async with layer:
            channel = await layer.new_channel(user_id="u")
            await layer.group_add("room", channel, presence="user")
        async with layer, layer.subscribe(presence_channel("room"), after="0") as stream:
            assert await events(stream, 2) == [("joined", "u", 1), ("left", "u", 0)]

    async def test_closing_leaves_no_timer(
        self, make_layer: MakeLayer, log: MemoryLog, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        layer = await make_layer(presence_grace=0.02)
        channel = await layer.new_channel(user_id="u")
        await layer.group_add("room", channel, presence="user")
        await layer.close()
        looked: list[datetime] = []

        def advance() -> datetime:
            looked.append(log.clock())
            return looked[-1]

        monkeypatch.setattr(log, "advance", advance)
        await asyncio.sleep(0.1)  # several times the grace: nothing may happen
        assert looked == []


class TestKilled:
    async def test_its_members_stay_for_as_long_as_its_lease(
        self, make_layer: MakeLayer, clock: Clock, log: MemoryLog
    ) -> None:
        layer, other = await make_layer(lease_time=15), await make_layer()
        user = await layer.new_channel(user_id="u")
        single = await layer.new_channel(user_id="s")
        theirs = await other.new_channel(user_id="o")
        await layer.group_add("room", user, presence="user")
        await layer.group_add("room", single, presence="connection")
        await other.group_add("room", theirs, presence="user")
        layer.kill()
        clock.move(seconds=14.9)
        log.prune()
        assert await other.group_members("room") == sorted([user, single, theirs])
        assert [p.connections for p in await other.presence("room")] == [1, 1, 1]
        async with other.subscribe(presence_channel("room")) as stream:
            clock.move(seconds=0.1)
            assert len(await other.group_members("room")) == 3  # until somebody prunes
            log.prune()
            log.prune()
            assert await events(stream, 2) == [("left", "u", 2), ("left", "s", 1)]
        assert await other.group_members("room") == [theirs]
        assert [p.user_id for p in await other.presence("room")] == ["o"]

    async def test_who_has_come_back_elsewhere_has_not_left(
        self, make_layer: MakeLayer, clock: Clock, log: MemoryLog
    ) -> None:
        layer, other = await make_layer(), await make_layer()
        before = await layer.new_channel(user_id="u")
        await layer.group_add("room", before, presence="user")
        layer.kill()
        after = await other.new_channel(user_id="u")
        async with other.subscribe(presence_channel("room")) as stream:
            await other.group_add("room", after, presence="user")
            clock.move(hours=1)
            log.prune()
            witness = await other.new_channel(user_id="w")
            await other.group_add("room", witness, presence="user")
            assert await events(stream, 1) == [("joined", "w", 2)]
        assert await other.group_members("room") == sorted([after, witness])

    async def test_who_waits_there_is_told(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(), await make_layer()
        receiving = asyncio.create_task(layer.receive("jobs"))
        async with layer.subscribe("room") as stream:
            batching = asyncio.create_task(stream.batch())
            await waiting(receiving)
            sending = asyncio.create_task(layer.send("room", {"n": 1}))
            await asyncio.sleep(0)  # it has begun
            layer.kill()
            for task in (receiving, batching, sending):
                with pytest.raises(ChannelLayerClosed):
                    await task
        with pytest.raises(ChannelLayerClosed):
            await layer.send("room", {})
        assert await numbers(other) == []

    async def test_others_receive_what_it_can_no_more(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(), await make_layer()
        receiving = asyncio.create_task(layer.receive("jobs"))
        await waiting(receiving)
        await other.send("jobs", {"n": 1})
        layer.kill()
        with pytest.raises(ChannelLayerClosed):
            await receiving
        async with asyncio.timeout(5):
            assert (await other.receive("jobs"))["n"] == 1

    async def test_its_durable_reader_is_taken_over(
        self, make_layer: MakeLayer, clock: Clock, log: MemoryLog
    ) -> None:
        layer, other = await make_layer(lease_time=15), await make_layer()
        await other.send("orders", {"n": 1})
        async with layer.follow("orders", name="billing", after="0") as active:
            lost = await anext(active)
            layer.kill()
        async with other.follow("orders", name="billing") as standby:
            taking_over = asyncio.create_task(anext(standby))
            clock.move(seconds=14.9)
            log.prune()
            await waiting(taking_over)
            clock.move(seconds=0.1)
            log.prune()
            batch = await taking_over
            assert [message["n"] for message in batch] == [1]
            with pytest.raises(ChannelLayerClosed):
                await lost.ack()
            await batch.ack()

    async def test_it_can_be_opened_again(
        self, make_layer: MakeLayer, clock: Clock, log: MemoryLog
    ) -> None:
        layer = await make_layer()
        before = await layer.new_channel()
        await layer.group_add("room", before)
        layer.kill()
        layer.kill()
        await layer.open()
        after = await layer.new_channel()
        await layer.group_add("room", after)
        clock.move(hours=1)
        log.prune()
        assert await layer.group_members("room") == [after]


class TestFollowing:
    async def test_there_are_no_transactions(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        await layer.send("orders", {"n": 1})
        async with layer.follow("orders", name="billing", after="0") as batches:
            batch = await anext(batches)
            with pytest.raises(ConfigurationError, match="memory layer has no transactions"):
                await batch.ack(object())
            assert (await layer.followers())[0].lag == 1

    async def test_outside_of_its_context(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        follower = layer.follow("orders", name="billing")
        with pytest.raises(RuntimeError, match="async with"):
            await anext(follower)

    async def test_after_leaving_until_another_takes_over(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        await layer.send("orders", {"n": 1})
        await layer.send("orders", {"n": 2})
        async with layer.follow("orders", name="billing", after="0") as batches:
            batch = await anext(batches)
        await batch.ack()
        assert (await layer.followers())[0].lag == 0
        async with layer.follow("orders", name="billing") as batches:
            taking_over = asyncio.create_task(anext(batches))
            await waiting(taking_over)
            with pytest.raises(FollowerLost):
                await batch.ack()
            taking_over.cancel()
            await asyncio.wait({taking_over})

    async def test_a_quiet_channel_is_never_behind(
        self, make_layer: MakeLayer, clock: Clock
    ) -> None:
        layer = await make_layer(retention=timedelta(hours=1))
        async with layer.follow("quiet", name="reader") as batches:
            reading = asyncio.create_task(anext(batches))
            await waiting(reading)
            for _ in range(3):
                await layer.send("busy", {})
                clock.move(hours=1)
                await layer.send("quiet", {"n": 1})
                batch = await reading
                await batch.ack()
                reading = asyncio.create_task(anext(batches))
                await waiting(reading)
            assert not batches.truncated
            reading.cancel()
            await asyncio.wait({reading})

    async def test_what_was_removed_before_it_was_read(
        self, make_layer: MakeLayer, clock: Clock
    ) -> None:
        layer = await make_layer(retention=timedelta(hours=1))
        await layer.send("orders", {"n": 1})
        async with layer.follow("orders", name="billing", after="0") as batches:
            clock.move(hours=1)
            empty = await anext(batches)
            assert len(empty) == 0
            assert batches.truncated
            batches.truncated = False
            await empty.ack()
            await layer.send("orders", {"n": 2})
            assert [message["n"] for message in await anext(batches)] == [2]
            assert not batches.truncated


class TestReceiving:
    async def test_a_wakeup_is_handed_on(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        first, second = (asyncio.create_task(layer.receive("jobs")) for _ in range(2))
        await waiting(second)
        # Woken by this, and cancelled before it could run.
        layer.log.publish(Outgoing("jobs", '{"n": 1}'), layer.settings)
        first.cancel()
        await asyncio.wait({first})
        assert first.cancelled()
        async with asyncio.timeout(5):
            assert (await second)["n"] == 1

    @pytest.mark.parametrize("end", ["close", "kill"])
    async def test_a_wakeup_of_a_layer_that_ends_is_handed_on(
        self, make_layer: MakeLayer, end: str
    ) -> None:
        layer, other = await make_layer(), await make_layer()
        first, second = (asyncio.create_task(each.receive("jobs")) for each in (layer, other))
        await waiting(second)
        # Woken by this, and told that it is over before it could run.
        layer.log.publish(Outgoing("jobs", '{"n": 1}'), layer.settings)
        layer.kill() if end == "kill" else await layer.close()
        with pytest.raises(ChannelLayerClosed):
            await first
        async with asyncio.timeout(5):
            assert (await second)["n"] == 1

    async def test_ten_thousand_wait(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        receiving = [asyncio.create_task(layer.receive(f"jobs:{n}")) for n in range(10_000)]
        await asyncio.sleep(0)
        for n in range(10_000):
            await layer.send(f"jobs:{n}", {"n": n})
        async with asyncio.timeout(30):
            received = await asyncio.gather(*receiving)
        assert [message["n"] for message in received] == list(range(10_000))

    async def test_a_long_backlog(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        for n in range(20_000):
            await layer.send("jobs", {"n": n})
        async with asyncio.timeout(30):
            received = [(await layer.receive("jobs", timeout=0))["n"] for _ in range(20_000)]
        assert received == list(range(20_000))

    async def test_waiting_leaves_nothing_behind(
        self, make_layer: MakeLayer, log: MemoryLog
    ) -> None:
        layer = await make_layer()
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await layer.receive("jobs", timeout=0.001)
        assert log._waiting == {}


class TestPresenceUsers:
    async def test_a_renewal_cannot_lose_the_user(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        channel = await layer.new_channel(user_id="u")
        await layer.group_add("room", channel, presence="user")
        await layer.update_channel(channel)
        await layer.group_add("room", channel)  # it stays what it was counted as
        (present,) = await layer.presence("room")
        assert present.user_id == "u"

    async def test_from_user_to_connection(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        channel = await layer.new_channel(user_id="u")
        async with layer.subscribe(presence_channel("room")) as stream:
            await layer.group_add("room", channel, presence="user")
            await layer.group_add("room", channel, presence="connection")
            assert await events(stream, 3) == [
                ("joined", "u", 1),
                ("joined", "u", 2),
                ("left", "u", 1),
            ]
        (present,) = await layer.presence("room")
        assert present.connection == channel


async def test_slow_readers_hold_no_messages(make_layer: MakeLayer) -> None:
    layer = await make_layer(buffer_size=10, page_size=10)
    async with layer.subscribe("room") as slow, layer.subscribe("room") as fast:
        seen: list[Message] = []

        async def read() -> None:
            async for message in fast:
                seen.append(message)  # noqa: PERF401  # it is looked at meanwhile

        reading = asyncio.create_task(read())
        for n in range(100):
            await layer.send("room", {"n": n})
            assert slow.pending <= 10
        await eventually(lambda: len(seen) == 100)
        reading.cancel()
        await asyncio.wait({reading})
        assert [(await anext(slow))["n"] for _ in range(100)] == list(range(100))


async def test_pages_are_bounded_by_bytes_too(make_layer: MakeLayer) -> None:
    layer = await make_layer(page_bytes=1024)
    for n in range(10):
        await layer.send("room", {"n": n, "text": "x" * 500})
    page = await layer.history("room")
    assert len(page.messages) == 2 or len(page.messages) == 3
    read = [message["n"] for message in page.messages]
    while page.next is not None:
        page = await layer.history("room", after=page.next)
        read += [message["n"] for message in page.messages]
    assert read == list(range(10))
