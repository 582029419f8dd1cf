"""Opening and closing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from pgchannels.control import Command
from pgchannels.errors import ChannelLayerClosed
from pgchannels.layer import ChannelLayer
from pgchannels.rates import FixedWindow
from pgchannels.testing.support import PATIENCE, MakeLayer, numbers, send_numbers, settle, take

__all__ = ["LifecycleTests"]


async def enter(context: Any) -> None:
    async with context:
        pass


async def watch(layer: ChannelLayer) -> None:
    layer.watch_commands(lambda _: None, lambda: None)


USES: list[Callable[[ChannelLayer], Awaitable[Any]]] = [
    lambda layer: layer.send("room", {}),
    lambda layer: layer.group_send("room", {}),
    lambda layer: layer.send_to(["room"], {}),
    lambda layer: layer.send_to_user("u", {}),
    lambda layer: layer.broadcast({}),
    lambda layer: layer.send_ephemeral("room", {}),
    lambda layer: layer.receive("room"),
    lambda layer: layer.receive("room", timeout=0),
    lambda layer: layer.history("room"),
    lambda layer: enter(layer.subscribe("room")),
    lambda layer: enter(layer.follow("room", name="reader")),
    lambda layer: layer.followers(),
    lambda layer: layer.forget_follower("reader"),
    lambda layer: layer.new_channel(),
    lambda layer: layer.group_add("room", "jobs"),
    lambda layer: layer.group_discard("room", "jobs"),
    lambda layer: layer.group_members("room"),
    lambda layer: layer.presence("room"),
    lambda layer: layer.connections(),
    lambda layer: layer.count_connections(),
    lambda layer: layer.command(Command("close", everyone=True)),
    watch,
    lambda layer: layer.revoke(user_id="u"),
    lambda layer: layer.is_revoked(user_id="u"),
    lambda layer: layer.take("key", FixedWindow(1, 1)),
]


@pytest.mark.asyncio
class LifecycleTests:
    """``open()`` and ``close()``."""

    async def test_use_after_close(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        await layer.close()
        for use in USES:
            with pytest.raises(ChannelLayerClosed):
                await use(layer)

    async def test_closing_again_does_nothing(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        await layer.open()
        await asyncio.gather(layer.close(), layer.close())
        await layer.close()
        layer.wake()

    async def test_opening_again(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        for n in range(3):
            await layer.send("room", {"n": n})
            await layer.close()
            await asyncio.gather(layer.open(), layer.open())
        async with layer.subscribe("room", after="0") as stream:
            assert numbers(await take(stream, 3)) == [0, 1, 2]

    async def test_a_context(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        await layer.close()
        async with layer as entered:
            assert entered is layer
            async with layer:
                await layer.send("room", {})
            await layer.send("room", {})  # it is the outer block's to close
        with pytest.raises(ChannelLayerClosed):
            await layer.send("room", {})

    async def test_who_waits_is_told(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        receiving = [asyncio.create_task(layer.receive(name)) for name in ("a", "a", "b")]
        receiving.append(asyncio.create_task(layer.receive("a", timeout=3600)))
        async with layer.subscribe("room") as first, layer.subscribe("room") as second:
            iterating = asyncio.create_task(anext(first))
            batching = asyncio.create_task(second.batch())
            await settle(layer)
            await layer.close()
            async with asyncio.timeout(PATIENCE):
                with pytest.raises(StopAsyncIteration):
                    await iterating
                with pytest.raises(ChannelLayerClosed):
                    await batching
                for task in receiving:
                    with pytest.raises(ChannelLayerClosed):
                        await task

    async def test_a_stream_of_a_closed_layer_joins_nothing(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        stream = layer.subscribe("room")
        await stream.__aenter__()
        await layer.close()
        for after in (None, "0", "1-999999"):
            with pytest.raises(ChannelLayerClosed):
                await stream.join("hall", after)

    async def test_iteration_ends(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        seen = []
        async with asyncio.timeout(PATIENCE), layer.subscribe("room") as stream:
            await layer.send("room", {"n": 1})
            async for message in stream:
                seen.append(message["n"])
                await layer.close()
        assert seen == [1]

    async def test_what_is_being_sent_is_finished(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(), await make_layer()
        sending = [asyncio.create_task(layer.send("room", {"n": n})) for n in range(20)]
        await asyncio.sleep(0)
        await layer.close()
        results = await asyncio.gather(*sending, return_exceptions=True)
        assert not any(isinstance(result, BaseException) for result in results)
        await settle(other)
        assert numbers((await other.history("room")).messages) == list(range(20))

    async def test_nodes_are_independent(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(), await make_layer()
        waiting = asyncio.create_task(other.receive("jobs"))
        async with other.subscribe("room") as stream:
            await layer.close()
            await other.send("room", {"n": 1})
            await other.send("jobs", {"n": 2})
            assert numbers(await take(stream, 1)) == [1]
        async with asyncio.timeout(PATIENCE):
            assert (await waiting)["n"] == 2

    async def test_waking(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        layer.wake()
        await asyncio.to_thread(layer.wake)
        assert numbers(await send_numbers(layer, "room", [1])) == [1]
