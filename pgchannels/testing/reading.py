"""Streams and history: from anywhere in the log, nothing missing and nothing twice."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import pytest

from pgchannels.errors import InvalidChannel, InvalidPosition, UnknownPosition
from pgchannels.messages import BEGINNING, Message, Position
from pgchannels.testing.sending import BAD_CHANNELS
from pgchannels.testing.support import MakeLayer, numbers, send_numbers, settle, take

__all__ = ["HistoryTests", "StreamTests"]

ORDERS: list[Literal["asc", "desc"]] = ["asc", "desc"]

BAD_POSITIONS: list[Any] = ["", "1", "-1", "1-", "01-1", "x", "1-1 ", 5, b"1-1"]


@pytest.mark.asyncio
class StreamTests:
    """``subscribe()``."""

    async def test_streams_begin_now(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        await layer.send("room", {"n": 1})
        await settle(layer)
        async with layer.subscribe("room") as stream:
            await layer.send("room", {"n": 2})
            assert numbers(await take(stream, 1)) == [2]

    async def test_resume_from_anywhere_on_any_node(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(), await make_layer()
        sent = await send_numbers(layer, "room", range(8))
        await send_numbers(layer, "other", range(3))
        for node in (layer, other):
            for n, message in enumerate(sent):
                for after in (message.position, str(message.position)):
                    async with node.subscribe("room", after=after) as stream:
                        assert await take(stream, 7 - n) == sent[n + 1 :]
                        assert not stream.truncated
            for beginning in ("0", BEGINNING):
                async with node.subscribe("room", after=beginning) as stream:
                    assert await take(stream, 8) == sent

    async def test_a_reader_may_change_what_it_has_read(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        await layer.send("room", {"n": [1]}, headers={"h": "1"})
        await settle(layer)
        for live in (False, True):
            async with (
                layer.subscribe("room", after=None if live else "0") as first,
                layer.subscribe("room", after=None if live else "0") as second,
            ):
                if live:
                    await layer.send("room", {"n": [1]}, headers={"h": "1"})
                for read in (await take(first, 1), await second.batch()):
                    (message,) = read
                    assert message.data == {"n": [1]}
                    message["n"].append(2)
                    del message.data["n"]
                    with pytest.raises(TypeError):
                        message.headers["h"] = "2"  # type: ignore[index]
        for _ in range(2):
            page = await layer.history("room")
            for message in page.messages:
                assert message.data == {"n": [1]}
                message.data.clear()
        async with layer.follow("room", name="reader", after="0") as batches:
            assert [message.data for message in await anext(batches)] == [{"n": [1]}] * 2

    async def test_the_seam_between_replay_and_live(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(page_size=7), await make_layer()
        await send_numbers(layer, "room", range(50))

        async def go_on() -> None:
            for n in range(50, 150):
                await other.send("room", {"n": n})

        sending = asyncio.create_task(go_on())
        async with layer.subscribe("room", after="0") as stream:
            assert numbers(await take(stream, 150)) == list(range(150))
        await sending

    async def test_a_slow_reader_loses_nothing(self, make_layer: MakeLayer) -> None:
        layer = await make_layer(buffer_size=5, page_size=10)
        async with layer.subscribe("room") as slow:
            await send_numbers(layer, "room", range(60))
            assert slow.pending <= 15
            assert numbers(await take(slow, 60)) == list(range(60))
            await layer.send("room", {"n": 60})
            assert numbers(await take(slow, 1)) == [60]

    async def test_join_and_leave(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        await send_numbers(layer, "b", range(5))
        async with layer.subscribe("a") as stream:
            await stream.join("b", after="0")
            assert stream.reads("b")
            assert numbers(await take(stream, 5)) == [0, 1, 2, 3, 4]
            await layer.send("b", {"n": 5})
            await layer.send("a", {"n": 6})
            assert numbers(await take(stream, 2)) == [5, 6]
            stream.leave("b")
            await layer.send("b", {"n": 7})
            await layer.send("a", {"n": 8})
            assert numbers(await take(stream, 1)) == [8]
            await stream.join("c")
            await layer.send("c", {"n": 9})
            assert numbers(await take(stream, 1)) == [9]

    async def test_bad_channels_to_read(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        async with layer.subscribe("room") as stream:
            for channel in BAD_CHANNELS:
                with pytest.raises(InvalidChannel):
                    layer.subscribe(channel)
                with pytest.raises(InvalidChannel):
                    await stream.join(channel)
                with pytest.raises(InvalidChannel):
                    await layer.history(channel)

    async def test_bad_positions(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        async with layer.subscribe("room") as stream:
            for position in BAD_POSITIONS:
                with pytest.raises(InvalidPosition):
                    layer.subscribe("room", after=position)
                with pytest.raises(InvalidPosition):
                    await stream.join("other", after=position)
                with pytest.raises(InvalidPosition):
                    await layer.history("room", after=position)
                with pytest.raises(InvalidPosition):
                    await layer.history("room", before=position)

    async def test_positions_that_never_were(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        head = (await settle(layer)).position
        for position in (Position(head.epoch, head.id + 1), Position(head.epoch + 1, 0)):
            stream = layer.subscribe("room", after=position)
            with pytest.raises(UnknownPosition):
                await stream.__aenter__()
            async with layer.subscribe("room") as stream:
                with pytest.raises(UnknownPosition):
                    await stream.join("other", after=position)
            with pytest.raises(UnknownPosition):
                await layer.history("room", after=position)
            with pytest.raises(UnknownPosition):
                await layer.history("room", before=position)


@pytest.mark.asyncio
class HistoryTests:
    """``history()``."""

    async def test_an_empty_one(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        page = await layer.history("room")
        assert page.messages == []
        assert page.next is None
        assert not page.truncated

    @pytest.mark.parametrize("order", ORDERS)
    async def test_pages_of_history(
        self, make_layer: MakeLayer, order: Literal["asc", "desc"]
    ) -> None:
        layer, other = await make_layer(), await make_layer()
        for n in range(10):
            await layer.send("room", {"n": n})
            await other.send("other", {"n": n})
        await settle(layer)
        for limit in (1, 3, 10, 11, 1000):
            read: list[Message] = []
            pages = 0
            start: Position | None = None
            while start is not None or not pages:
                edge: dict[str, Any] = {"after" if order == "asc" else "before": start}
                page = await other.history("room", order=order, limit=limit, **edge)
                assert not page.truncated
                read += page.messages
                start = page.next
                assert len(page.messages) == limit or start is None
                pages += 1
            assert numbers(read) == (list(range(10)) if order == "asc" else list(range(9, -1, -1)))
            assert pages == -(-10 // limit)

    @pytest.mark.parametrize("order", ORDERS)
    async def test_between(self, make_layer: MakeLayer, order: Literal["asc", "desc"]) -> None:
        layer = await make_layer()
        sent = await send_numbers(layer, "room", range(10))
        for low in (0, 4, 9):
            for high in (0, 5, 9):
                page = await layer.history(
                    "room", after=sent[low].position, before=str(sent[high].position), order=order
                )
                between = list(range(low + 1, high))
                assert numbers(page.messages) == (between if order == "asc" else between[::-1])
                assert page.next is None

    async def test_going_on_live(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        await send_numbers(layer, "room", range(5))
        page = await layer.history("room", order="desc", limit=2)
        await layer.send("room", {"n": 5})
        async with layer.subscribe("room", after=page.position) as stream:
            assert numbers(await take(stream, 1)) == [5]

    async def test_bad_pages(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        for limit in (0, -1, 1001):
            with pytest.raises(ValueError, match="limit"):
                await layer.history("room", limit=limit)
        with pytest.raises(ValueError, match="order"):
            await layer.history("room", order="newest")  # type: ignore[arg-type]

    async def test_what_is_not_the_channels_own(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        channel = await layer.new_channel(user_id="u")
        await layer.group_add("room", channel)
        await layer.send_to([channel], {"n": 1})
        await layer.send_to_user("u", {"n": 2})
        await layer.broadcast({"n": 3})
        await layer.group_send("room", {"n": 4})
        await layer.send(channel, {"n": 5})
        await settle(layer)
        assert numbers((await layer.history(channel)).messages) == [5]
        assert numbers((await layer.history("room")).messages) == [4]
