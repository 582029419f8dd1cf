"""Channels of a layer's own, groups, and streams that read as members."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pgchannels.errors import InvalidChannel, InvalidMessage, InvalidUser, MessageTooLarge
from pgchannels.testing.sending import BAD_CHANNELS
from pgchannels.testing.support import MakeLayer, numbers, settle, take, until

__all__ = ["GroupTests"]


@pytest.mark.asyncio
class GroupTests:
    """``new_channel()``, ``group_add()`` and ``subscribe(member=…)``."""

    async def test_names_are_new(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(), await make_layer()
        names = await asyncio.gather(
            *(node.new_channel(prefix) for node in (layer, other) for prefix in ("ws", "ws", "x:1"))
        )
        assert len(set(names)) == 6
        assert [name.split(".")[0] for name in names] == ["ws", "ws", "x:1"] * 2
        assert (await layer.new_channel()).startswith("channel.")
        assert len(await layer.new_channel("x" * 150)) <= 200

    async def test_bad_prefixes(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        for prefix in (*BAD_CHANNELS, "x" * 151):
            with pytest.raises(InvalidChannel):
                await layer.new_channel(prefix)

    async def test_bad_users_and_metadata(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        channel = await layer.new_channel()
        for user in ("", 5, "a\0", "\ud800", "x" * 1001, "\U0001f600" * 476):
            with pytest.raises(InvalidUser):
                await layer.new_channel(user_id=user)  # type: ignore[arg-type]
            with pytest.raises(InvalidUser):
                await layer.update_channel(channel, user_id=user)  # type: ignore[arg-type]
        refused: list[Any] = [[], {"a": object()}, {"a": b"bytes"}, {"a": float("nan")}]
        for metadata in refused:
            with pytest.raises(InvalidMessage):
                await layer.new_channel(metadata=metadata)
            with pytest.raises(InvalidMessage):
                await layer.update_channel(channel, metadata=metadata)
        with pytest.raises(MessageTooLarge):
            await layer.new_channel(metadata={"a": "x" * 8192})

    async def test_members(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(), await make_layer()
        mine, theirs = await layer.new_channel(), await other.new_channel()
        assert await layer.group_members("room") == []
        for name in (mine, theirs, "jobs", mine):
            await layer.group_add("room", name)
        for node in (layer, other):
            assert await node.group_members("room") == sorted([mine, theirs, "jobs"])
        await other.group_discard("room", mine)
        await other.group_discard("room", mine)
        await layer.group_discard("nowhere", "jobs")
        assert await layer.group_members("room") == sorted([theirs, "jobs"])
        await layer.group_discard("room", "jobs")
        assert await other.group_members("room") == [theirs]

    async def test_many_at_once(self, make_layer: MakeLayer) -> None:
        nodes = [await make_layer(), await make_layer()]
        names = await asyncio.gather(*(nodes[n % 2].new_channel() for n in range(60)))
        await asyncio.gather(*(nodes[0].group_add(f"room:{n % 3}", c) for n, c in enumerate(names)))
        for n in range(3):
            assert await nodes[1].group_members(f"room:{n}") == sorted(names[n::3])
        await asyncio.gather(
            *(nodes[0].group_discard(f"room:{n % 3}", c) for n, c in enumerate(names))
        )
        assert await nodes[1].group_members("room:1") == []

    async def test_deleted_channels(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(), await make_layer()
        channel = await layer.new_channel()
        await layer.group_add("a", channel)
        await other.group_add("b", channel)
        await layer.delete_channel(channel)
        await layer.delete_channel(channel)
        assert await layer.group_members("a") == await layer.group_members("b") == []
        await other.group_add("a", channel)
        assert await other.group_members("a") == []  # a connection that is gone

    async def test_a_layer_that_closes_takes_its_channels_along(
        self, make_layer: MakeLayer
    ) -> None:
        layer, other = await make_layer(), await make_layer()
        mine, theirs = await layer.new_channel(), await other.new_channel()
        for name in (mine, theirs, "jobs"):
            await layer.group_add("room", name)
        await layer.close()

        async def left() -> bool:
            return await other.group_members("room") == sorted([theirs, "jobs"])

        await until(left)

    async def test_memberships_of_ordinary_channels_expire(self, make_layer: MakeLayer) -> None:
        layer = await make_layer(group_expiry=2.0, prune_interval=0.1)
        channel = await layer.new_channel()
        await layer.group_add("room", "jobs")
        await layer.group_add("room", channel)
        assert await layer.group_members("room") == sorted(["jobs", channel])

        async def expired() -> bool:
            return await layer.group_members("room") == [channel]

        await until(expired)

    async def test_bad_groups_and_members(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        for channel in BAD_CHANNELS:
            for change in (layer.group_add, layer.group_discard):
                with pytest.raises(InvalidChannel):
                    await change(channel, "jobs")
                with pytest.raises(InvalidChannel):
                    await change("room", channel)
            for look in (layer.group_members, layer.presence):
                with pytest.raises(InvalidChannel):
                    await look(channel)

    async def test_other_peoples_channels(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(), await make_layer()
        theirs = await other.new_channel()
        for channel in (theirs, "jobs"):
            with pytest.raises(InvalidChannel):
                layer.subscribe("room", member=channel)
            with pytest.raises(InvalidChannel):
                await layer.update_channel(channel, user_id="u")

    async def test_a_member_reads_all_that_is_for_it(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(), await make_layer()
        channel, another = (
            await layer.new_channel(user_id="u"),
            await layer.new_channel(user_id="v"),
        )
        await layer.group_add("before", channel)
        async with layer.subscribe("extra", member=channel) as stream:
            await layer.group_add("during", channel)
            await other.send(channel, {"n": 1})
            await other.send_to([another, channel], {"n": 2})
            await other.send_to([another], {"n": -1})
            await other.send_to_user("u", {"n": 3})
            await other.send_to_user("v", {"n": -1})
            await other.broadcast({"n": 4})
            await other.group_send("before", {"n": 5})
            await other.group_send("during", {"n": 6})
            await other.group_send("neither", {"n": -1})
            await other.send("extra", {"n": 7})
            await other.send(another, {"n": -1})
            await other.send(channel, {"n": 8})
            assert numbers(await take(stream, 8)) == list(range(1, 9))

    async def test_who_is_excluded_does_not_read(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(), await make_layer()
        sender, reader = await layer.new_channel(), await other.new_channel()
        await layer.group_add("room", sender)
        await layer.group_add("room", reader)
        async with (
            layer.subscribe(member=sender) as mine,
            other.subscribe(member=reader) as theirs,
            other.subscribe("room") as plain,
        ):
            await layer.group_send("room", {"n": 1}, exclude=sender)
            await layer.group_send("room", {"n": 2})
            assert numbers(await take(theirs, 2)) == [1, 2]
            assert numbers(await take(plain, 2)) == [1, 2]
            assert numbers(await take(mine, 1)) == [2]
        async with other.subscribe("room", after="0") as plain:
            assert numbers(await take(plain, 2)) == [1, 2]

    async def test_what_is_sent_to_others_is_not_read(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        channel = await layer.new_channel()
        async with layer.subscribe(channel) as plain:
            await layer.send_to([channel], {"n": 1})
            await layer.send(channel, {"n": 2})
            assert numbers(await take(plain, 1)) == [2]  # to be read as a member only

    async def test_added_and_removed_by_another_node(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(), await make_layer()
        channel = await layer.new_channel()
        async with layer.subscribe(member=channel) as stream:
            await other.group_add("room", channel)
            await other.group_send("room", {"n": 1})
            assert numbers(await take(stream, 1)) == [1]
            await other.group_discard("room", channel)

            async def removed() -> bool:
                await other.group_send("room", {"n": 2})
                await settle(layer)
                await other.send(channel, {"n": 3})
                first = (await take(stream, 1))[0]
                return first["n"] == 3 or not await take(stream, 1)

            await until(removed)

    async def test_a_member_has_its_groups_since_it_joined(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(), await make_layer()
        channel = await layer.new_channel()
        await other.group_send("room", {"n": 0})
        await settle(layer, other)
        await other.group_add("room", channel)
        await other.group_send("room", {"n": 1})
        await settle(layer, other)
        await other.group_add("room", channel)
        await other.group_send("room", {"n": 2})
        async with layer.subscribe(member=channel) as stream:
            assert numbers(await take(stream, 2)) == [1, 2]

    async def test_a_member_resumes(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(), await make_layer()
        start = (await settle(layer, other)).position
        await other.send_to_user("u", {"n": 1})
        await other.broadcast({"n": 2})
        await other.send("room", {"n": 3})
        await settle(layer)
        channel = await layer.new_channel(user_id="u")
        async with layer.subscribe("room", member=channel, after=start) as stream:
            assert sorted(numbers(await take(stream, 3))) == [1, 2, 3]
            await layer.broadcast({"n": 4})
            assert numbers(await take(stream, 1)) == [4]

    async def test_a_users_other_devices_and_everyone_else(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(), await make_layer()
        here = await layer.new_channel(user_id="u")
        there = await other.new_channel(user_id="u")
        async with layer.subscribe(member=here) as mine, other.subscribe(member=there) as theirs:
            await layer.send_to_user("u", {"n": 1}, exclude=here)
            await layer.broadcast({"n": 2}, exclude=here)
            await layer.broadcast({"n": 3})
            assert numbers(await take(theirs, 3)) == [1, 2, 3]
            assert numbers(await take(mine, 1)) == [3]

    async def test_another_user(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        channel = await layer.new_channel(user_id="u")
        async with layer.subscribe(member=channel) as stream:
            await layer.update_channel(channel, user_id="v")
            await layer.send_to_user("u", {"n": 1})
            await layer.send_to_user("v", {"n": 2})
            assert numbers(await take(stream, 1)) == [2]
            await layer.update_channel(channel)
            await layer.send_to_user("v", {"n": 3})
            await layer.send(channel, {"n": 4})
            assert numbers(await take(stream, 1)) == [4]
