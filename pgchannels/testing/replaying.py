"""Replay from a point in time, and filters: on streams and in history, the same."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, Literal

import pytest

from pgchannels.errors import InvalidFilter
from pgchannels.layer import ChannelLayer
from pgchannels.messages import Message
from pgchannels.testing.support import (
    PATIENCE,
    MakeLayer,
    numbers,
    send_numbers,
    settle,
    take,
    until,
)

__all__ = ["FilterTests", "SinceTests"]

Order = Literal["asc", "desc"]
ORDERS: list[Order] = ["asc", "desc"]

LONG_AGO = [datetime(1970, 1, 1, tzinfo=UTC), datetime.min.replace(tzinfo=UTC)]
A_TIME_TO_COME = [
    datetime.now(UTC) + timedelta(days=1),
    datetime.max.replace(tzinfo=UTC),
]
BAD_TIMES: list[Any] = [
    datetime(2026, 1, 1),  # noqa: DTZ001
    datetime.max.replace(tzinfo=timezone(-timedelta(hours=1))),
    "2026-01-01T00:00:00Z",
    1767225600,
]
BAD_FILTERS: list[Any] = ["", "$.a =", "@.a", "$..a", "true", "$.a " * 500, 5]


async def read_all(
    layer: ChannelLayer, channel: str, *, order: Order = "asc", limit: int = 50, **options: Any
) -> list[Message]:
    """All pages of a history."""
    read: list[Message] = []
    where = options
    async with asyncio.timeout(PATIENCE):
        while True:
            page = await layer.history(channel, order=order, limit=limit, **where)
            assert len(page.messages) <= limit
            assert not page.truncated
            read += page.messages
            if page.next is None:
                return read
            if order == "desc":
                where = {**where, "before": page.next}
            else:
                where = {**where, "after": page.next}
                where.pop("since", None)


async def send_one_by_one(layer: ChannelLayer, channel: str, count: int) -> list[Message]:
    """Each is in the log before the next one is sent."""
    return [(await send_numbers(layer, channel, [n]))[0] for n in range(count)]


@pytest.mark.asyncio
class SinceTests:
    """``subscribe(since=…)`` and ``history(since=…)``."""

    @pytest.mark.parametrize("order", ORDERS)
    async def test_history_since_a_time(self, make_layer: MakeLayer, order: Order) -> None:
        layer, other = await make_layer(), await make_layer()
        sent = await send_one_by_one(layer, "room", 7)
        await settle(other)
        for n, message in enumerate(sent):
            expected = sent[n:] if order == "asc" else sent[n:][::-1]
            for zone in (UTC, timezone(timedelta(hours=5, minutes=30))):
                since = message.created_at.astimezone(zone)
                for limit in (1, 3, 50):
                    read = await read_all(other, "room", order=order, limit=limit, since=since)
                    assert read == expected
            page = await other.history(
                "room", since=message.created_at, before=sent[5].position, order=order
            )
            between = sent[n:5] if order == "asc" else sent[n:5][::-1]
            assert (page.messages, page.next) == (between, None)

    async def test_streams_since_a_time(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(), await make_layer()
        sent = await send_one_by_one(layer, "room", 4)
        await send_one_by_one(layer, "other", 2)
        for n in range(4):
            for node in (layer, other):
                async with node.subscribe("room", since=sent[n].created_at) as stream:
                    assert await take(stream, len(sent) - n) == sent[n:]
                    sent += await send_one_by_one(layer, "room", 1)
                    assert await take(stream, 1) == sent[-1:]
                    assert not stream.truncated

    async def test_before_and_after_everything(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        for since in (*LONG_AGO, *A_TIME_TO_COME):
            assert await read_all(layer, "room", since=since) == []
        sent = await send_one_by_one(layer, "room", 3)
        for since in LONG_AGO:
            assert await read_all(layer, "room", since=since) == sent
            async with layer.subscribe("room", since=since) as stream:
                assert await take(stream, 3) == sent
                assert not stream.truncated
        for since in A_TIME_TO_COME:
            assert await read_all(layer, "room", since=since) == []
            assert await read_all(layer, "room", since=since, order="desc") == []
            async with layer.subscribe("room", since=since) as stream:
                sent = await send_one_by_one(layer, "room", 1)
                assert await take(stream, 1) == sent

    async def test_nothing_is_missed_since_a_time(self, make_layer: MakeLayer) -> None:
        nodes = [await make_layer(), await make_layer()]

        async def send(node: ChannelLayer) -> None:
            for n in range(40):
                await node.send("room", {"n": n})

        async with nodes[0].subscribe("room") as stream:
            await asyncio.gather(*(send(node) for node in nodes for _ in range(2)))
            sent = await take(stream, 160)
        for message in sent[::7]:
            since = message.created_at
            expected = {m for m in sent if m.created_at >= since}
            read = await read_all(nodes[1], "room", since=since, limit=1000)
            assert expected <= set(read)
            assert read == sent[-len(read) :]

    async def test_since_a_time_that_is_pruned(self, make_layer: MakeLayer) -> None:
        layer = await make_layer(retention=timedelta(seconds=1), prune_interval=0.1)
        since = (await layer.send("room", {"n": 1})).created_at
        for order in ORDERS:

            async def truncated(order: Order = order) -> bool:
                page = await layer.history("room", since=since, order=order)
                return page.truncated and not page.messages

            await until(truncated)
        async with layer.subscribe("room", since=since) as stream, asyncio.timeout(PATIENCE):
            assert await stream.batch() == []
            assert stream.truncated

    async def test_bad_times(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        for since in BAD_TIMES:
            with pytest.raises(ValueError, match="since"):
                layer.subscribe("room", since=since)
            with pytest.raises(ValueError, match="since"):
                await layer.history("room", since=since)
        for after in ("0", (await settle(layer)).position):
            with pytest.raises(ValueError, match="not both"):
                layer.subscribe("room", after=after, since=LONG_AGO[0])
            with pytest.raises(ValueError, match="not both"):
                await layer.history("room", after=after, since=LONG_AGO[0])


FILTERS: list[tuple[str, set[int]]] = [
    ("$.n >= 3 && $.n < 5", {3, 4}),
    ('$.of == "even" && !($.n == 2)', {0, 4, 6, 8}),
    ("!$.of", {1, 3, 5, 7, 9}),
    ("$.list[-1].n == $.n && $.n > 6 || $['n'] == 0.0", {0, 7, 8, 9}),
    ("$.n == '3' || $.n == true || $.nothing == null", set()),
    ("$.nothing == $.neither", set(range(10))),
    ("$.bytes == null && $.n == 1", {1}),
]


def payload(n: int) -> dict[str, Any]:
    extra = {"of": "even"} if n % 2 == 0 else {"bytes": b"\x00"}
    return {"n": n, "list": [{}, {"n": n}], **extra}


async def send_payloads(layer: ChannelLayer, channel: str, values: Iterable[int]) -> None:
    for n in values:
        await layer.send(channel, payload(n))
    await settle(layer)


@pytest.mark.asyncio
class FilterTests:
    """``subscribe(filter=…)`` and ``history(filter=…)``."""

    @pytest.mark.parametrize("order", ORDERS)
    async def test_history_that_matches(self, make_layer: MakeLayer, order: Order) -> None:
        layer = await make_layer()
        await send_payloads(layer, "room", range(10))
        for text, wanted in FILTERS:
            expected = sorted(wanted, reverse=order == "desc")
            for limit in (1, 2, len(wanted) or 3, 1000):
                read = await read_all(layer, "room", order=order, limit=limit, filter=text)
                assert numbers(read) == expected, text

    async def test_where_a_filtered_page_ends(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        await send_payloads(layer, "room", range(10))
        pages: list[tuple[int, Order, list[int], bool]] = [
            (1, "asc", [2], False),
            (2, "asc", [2, 7], True),
            (3, "asc", [2, 7], True),
            (1, "desc", [7], False),
            (2, "desc", [7, 2], True),
        ]
        for limit, order, found, is_last in pages:
            page = await layer.history(
                "room", filter="$.n == 2 || $.n == 7", limit=limit, order=order
            )
            assert numbers(page.messages) == found
            assert (page.next is None) == is_last
            async with layer.subscribe("room", after=page.position) as stream:
                sent = await send_numbers(layer, "room", [99])
                assert await take(stream, 1) == sent

    async def test_streams_that_match(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(page_size=3), await make_layer()
        for place, (text, wanted) in enumerate(FILTERS):
            room = f"room:{place}"
            await send_payloads(layer, room, range(5))
            await settle(other)
            marked = f"{text} || $.end"
            async with (
                layer.subscribe(room, after="0", filter=marked) as replayed,
                other.subscribe(room, filter=marked) as live,
            ):
                await send_payloads(other, room, range(5, 10))
                await other.send(room, {"n": 99, "end": True})
                expected = [*sorted(wanted), 99]
                assert numbers(await take(replayed, len(expected))) == expected
                expected = [*(n for n in sorted(wanted) if n >= 5), 99]
                assert numbers(await take(live, len(expected))) == expected
                assert not replayed.truncated
                assert not live.truncated

    async def test_members_with_a_filter(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(), await make_layer()
        channel = await layer.new_channel(user_id="u")
        await layer.group_add("room", channel)
        async with layer.subscribe("extra", member=channel, filter="$.n >= 0") as stream:
            for n in (-1, 1):
                await other.send("extra", {"n": n})
                await other.send(channel, {"n": 2 * n})
                await other.send_to([channel], {"n": 3 * n})
                await other.send_to_user("u", {"n": 4 * n})
                await other.broadcast({"n": 5 * n})
                await other.group_send("room", {"n": 6 * n})
                await other.group_send("room", {"n": 7 * n}, exclude=channel)
            await stream.join("late")
            await other.send("late", {"n": -8})
            await other.send("late", {"n": 8})
            assert numbers(await take(stream, 7)) == [1, 2, 3, 4, 5, 6, 8]

    async def test_ephemeral_messages_that_match(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        async with (
            layer.subscribe("room", filter="$.n > 0") as some,
            layer.subscribe("room") as everything,
        ):

            async def tell() -> None:
                while True:  # each is delivered at most once, and may not be
                    await layer.send_ephemeral("room", {"n": -1})
                    await layer.send_ephemeral("room", {"n": 1})
                    await asyncio.sleep(0.02)

            telling = asyncio.create_task(tell())
            try:
                found = await take(everything, 10)
                assert {-1, 1} == set(numbers(found))
                assert set(numbers(await take(some, 3))) == {1}
            finally:
                telling.cancel()
                await asyncio.wait({telling})

    async def test_a_slow_reader_with_a_filter(self, make_layer: MakeLayer) -> None:
        layer = await make_layer(buffer_size=5, page_size=10)
        async with layer.subscribe("room", filter="$.n >= 20 && !($.n == 50)") as slow:
            await send_numbers(layer, "room", range(80))
            assert slow.pending <= 15
            expected = [n for n in range(20, 80) if n != 50]
            assert numbers(await take(slow, len(expected))) == expected

    async def test_a_long_backlog_in_which_nothing_matches(self, make_layer: MakeLayer) -> None:
        layer = await make_layer(page_size=500)
        async with layer.subscribe("room") as stream:
            await asyncio.gather(*(layer.send("room", {"n": n}) for n in range(3000)))
            await take(stream, 3000)
        turns = 0
        async with layer.subscribe("room", after="0", filter="$.n == -1") as stream:
            waiting = asyncio.create_task(take(stream, 1))
            async with asyncio.timeout(PATIENCE):
                while stream.caught_up is None:
                    turns += 1
                    assert stream.pending == 0
                    await asyncio.sleep(0)
            # Whoever else has something to do gets to it many times a page.
            assert turns >= 20
            assert not waiting.done()
            await layer.send("room", {"n": -1})
            assert numbers(await waiting) == [-1]

    async def test_since_a_time_with_a_filter(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        sent = await send_one_by_one(layer, "room", 8)
        since = sent[3].created_at
        for limit in (1, 2, 50):
            for order in ORDERS:
                read = await read_all(
                    layer, "room", since=since, filter="$.n != 5", order=order, limit=limit
                )
                expected = [3, 4, 6, 7]
                assert numbers(read) == (expected if order == "asc" else expected[::-1])
        async with layer.subscribe("room", since=since, filter="$.n != 5") as stream:
            assert numbers(await take(stream, 4)) == [3, 4, 6, 7]

    async def test_bad_filters(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        for text in BAD_FILTERS:
            with pytest.raises(InvalidFilter):
                layer.subscribe("room", filter=text)
            with pytest.raises(InvalidFilter):
                await layer.history("room", filter=text)
