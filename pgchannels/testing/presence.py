"""Presence: who is there, and who has come and gone."""

from __future__ import annotations

import random
from typing import Any

import pytest

from pgchannels.channels import presence_channel
from pgchannels.errors import InvalidChannel, InvalidUser
from pgchannels.layer import ChannelLayer
from pgchannels.records import PresenceBy
from pgchannels.stream import Stream
from pgchannels.testing.support import MakeLayer, take, until

__all__ = ["PresenceTests"]


async def news(stream: Stream, count: int) -> list[tuple[str, str | None, int]]:
    """What the next messages tell: joined or left, who, and how many there are then."""
    return [
        (message["type"].removeprefix("presence."), message["user_id"], message["count"])
        for message in await take(stream, count)
    ]


async def users(layer: ChannelLayer, group: str = "room") -> dict[str | None, int]:
    """Who is present, each with how many connections."""
    return {each.user_id: each.connections for each in await layer.presence(group)}


@pytest.mark.asyncio
class PresenceTests:
    """``group_add(presence=…)`` and ``presence()``."""

    async def test_a_users_connections_count_as_one(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(presence_grace=0.2), await make_layer(presence_grace=0.2)
        first = await layer.new_channel(user_id="u", metadata={"name": "old"})
        second = await other.new_channel(user_id="u", metadata={"name": "new"})
        async with other.subscribe(presence_channel("room")) as stream:
            await layer.group_add("room", first, presence="user")
            await layer.group_add("room", second, presence="user")
            (present,) = await other.presence("room")
            assert (present.user_id, present.connection, present.connections) == ("u", None, 2)
            assert present.metadata == {"name": "new"}
            await layer.group_discard("room", second)
            assert await users(layer) == {"u": 1}
            await layer.group_discard("room", first)
            joined, left = await take(stream, 2)
        assert dict(joined) == {
            "type": "presence.joined",
            "group": "room",
            "user_id": "u",
            "connection": None,
            "metadata": {"name": "old"},
            "count": 1,
        }
        assert (left["type"], left["user_id"], left["count"]) == ("presence.left", "u", 0)
        assert set(left) == set(joined)
        assert await users(other) == {}

    async def test_connections_by_themselves(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(presence_grace=3600), await make_layer(presence_grace=3600)
        first = await layer.new_channel(user_id="u", metadata={"a": 1})
        second = await layer.new_channel(user_id="u")
        third = await other.new_channel()
        async with other.subscribe(presence_channel("room")) as stream:
            for channel in (first, second, third, first):
                await layer.group_add("room", channel, presence="connection")
            present = await layer.presence("room")
            assert [(p.connection, p.user_id, p.connections) for p in present] == [
                (first, "u", 1),
                (second, "u", 1),
                (third, None, 1),
            ]
            assert [p.metadata for p in present] == [{"a": 1}, None, None]
            assert sorted(p.joined_at for p in present) == [p.joined_at for p in present]
            await layer.group_discard("room", first)  # at once, without grace
            await other.delete_channel(third)
            events = await take(stream, 5)
        assert [(e["type"], e["connection"], e["count"]) for e in events] == [
            ("presence.joined", first, 1),
            ("presence.joined", second, 2),
            ("presence.joined", third, 3),
            ("presence.left", first, 2),
            ("presence.left", third, 1),
        ]
        assert events[3]["metadata"] == {"a": 1}
        assert [p.connection for p in await layer.presence("room")] == [second]

    async def test_a_short_absence_is_not_told(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(presence_grace=3600), await make_layer(presence_grace=3600)
        before = await layer.new_channel(user_id="u", metadata={"n": 1})
        async with other.subscribe(presence_channel("room")) as stream:
            await layer.group_add("room", before, presence="user")
            await layer.delete_channel(before)
            assert await users(other) == {"u": 0}
            assert await other.group_members("room") == []
            after = await other.new_channel(user_id="u", metadata={"n": 2})
            await other.group_add("room", after, presence="user")
            (present,) = await layer.presence("room")
            assert (present.connections, present.metadata) == (1, {"n": 2})
            await other.group_discard("room", after)
            await other.group_add("room", after, presence="user")
            witness = await layer.new_channel(user_id="w")
            await layer.group_add("room", witness, presence="user")
            assert await news(stream, 2) == [("joined", "u", 1), ("joined", "w", 2)]

    async def test_a_long_absence_is_told(self, make_layer: MakeLayer) -> None:
        layer = await make_layer(presence_grace=0.2)
        channel = await layer.new_channel(user_id="u")
        async with layer.subscribe(presence_channel("room")) as stream:
            for _ in range(2):
                await layer.group_add("room", channel, presence="user")
                await layer.group_discard("room", channel)
                assert await news(stream, 2) == [("joined", "u", 1), ("left", "u", 0)]

    async def test_without_grace(self, make_layer: MakeLayer) -> None:
        layer = await make_layer(presence_grace=0)
        channel = await layer.new_channel(user_id="u")
        await layer.group_add("room", channel, presence="user")
        await layer.group_discard("room", channel)
        assert await users(layer) == {}
        async with layer.subscribe(presence_channel("room"), after="0") as stream:
            assert await news(stream, 2) == [("joined", "u", 1), ("left", "u", 0)]

    async def test_counts(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(presence_grace=0), await make_layer(presence_grace=0)
        async with other.subscribe(presence_channel("room"), presence_channel("hall")) as stream:
            channels = {}
            for n, user in enumerate("uvw"):
                channels[user] = await (layer, other)[n % 2].new_channel(user_id=user)
                await layer.group_add("room", channels[user], presence="user")
            uncounted = await layer.new_channel(user_id="x")
            await layer.group_add("room", uncounted)
            assert await users(layer) == {"u": 1, "v": 1, "w": 1}
            assert [p.user_id for p in await layer.presence("room")] == ["u", "v", "w"]
            await layer.group_discard("room", uncounted)
            await layer.group_add("hall", channels["u"], presence="user")
            await layer.group_discard("room", channels["v"])
            assert await news(stream, 5) == [
                ("joined", "u", 1),
                ("joined", "v", 2),
                ("joined", "w", 3),
                ("joined", "u", 1),
                ("left", "v", 2),
            ]

    async def test_a_layer_that_closes(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(presence_grace=0.2), await make_layer(presence_grace=0.2)
        user = await layer.new_channel(user_id="u")
        single = await layer.new_channel(user_id="s")
        await layer.group_add("room", user, presence="user")
        await layer.group_add("room", single, presence="connection")
        async with other.subscribe(presence_channel("room"), after="0") as stream:
            assert await news(stream, 2) == [("joined", "u", 1), ("joined", "s", 2)]
            await layer.close()
            assert await news(stream, 2) == [("left", "s", 1), ("left", "u", 0)]

        async def gone() -> bool:
            return await users(other) == {}

        await until(gone)

    async def test_memberships_keep_what_they_were_joined_with(self, make_layer: MakeLayer) -> None:
        layer = await make_layer(presence_grace=0)
        channel = await layer.new_channel(user_id="u", metadata={"n": 1})
        await layer.group_add("room", channel, presence="user")
        await layer.update_channel(channel, user_id="v", metadata={"n": 2})
        (present,) = await layer.presence("room")
        assert (present.user_id, present.metadata) == ("u", {"n": 1})

    @pytest.mark.parametrize("presence", ["user", "connection"])
    async def test_metadata_of_any_kind(self, make_layer: MakeLayer, presence: PresenceBy) -> None:
        """A name that a client has chosen keeps nobody from leaving."""
        layer, other = await make_layer(presence_grace=0.2), await make_layer(presence_grace=0.2)
        metadata: dict[str, Any] = {"name": 'a\0b\\u0000"\N{PILE OF POO}', "null": None, "": [{}]}
        async with other.subscribe(presence_channel("room")) as stream:
            for deleted in (False, True):
                channel = await layer.new_channel(user_id="u", metadata=metadata)
                await layer.group_add("room", channel, presence=presence)
                (present,) = await other.presence("room")
                assert present.metadata == metadata
                if deleted:
                    await layer.delete_channel(channel)
                else:
                    await layer.group_discard("room", channel)
                joined, left = await take(stream, 2)
                assert (joined["type"], left["type"]) == ("presence.joined", "presence.left")
                assert joined["metadata"] == left["metadata"] == metadata

    async def test_renewed_as_somebody_else(self, make_layer: MakeLayer) -> None:
        layer = await make_layer(presence_grace=0)
        channel = await layer.new_channel(user_id="u")
        await layer.group_add("room", channel, presence="user")
        await layer.update_channel(channel, user_id="v", metadata={"n": 2})
        await layer.group_add("room", channel)
        (present,) = await layer.presence("room")
        assert (present.user_id, present.metadata) == ("v", {"n": 2})
        async with layer.subscribe(presence_channel("room"), after="0") as stream:
            assert await news(stream, 1) == [("joined", "u", 1)]
            changes = await news(stream, 2)
        assert {change[:2] for change in changes} == {("left", "u"), ("joined", "v")}
        assert changes[-1][2] == 1

    async def test_renewing_is_not_joining(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        channel = await layer.new_channel(user_id="u")
        await layer.group_add("room", channel, presence="user")
        (before,) = await layer.presence("room")
        await layer.group_add("room", channel, presence="user")
        await layer.group_add("room", channel)
        (after,) = await layer.presence("room")
        assert after == before

    async def test_bad_values(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        refused: list[Any] = ["", "users", True, 5]
        for presence in refused:
            with pytest.raises(ValueError, match="presence"):
                await layer.group_add("room", "jobs", presence=presence)
        assert await layer.group_members("room") == []

    async def test_users_need_one(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        nobody = await layer.new_channel()
        for channel in (nobody, "jobs"):
            with pytest.raises(InvalidUser):
                await layer.group_add("room", channel, presence="user")
        assert await layer.group_members("room") == []

    async def test_the_longest_names(self, make_layer: MakeLayer) -> None:
        """Letters at random, which no index can make shorter."""
        layer = await make_layer()
        letters = random.Random(1)

        def text(length: int, first: int, last: int) -> str:
            return "".join(chr(letters.randint(first, last)) for _ in range(length))

        for size, first, last in (
            (1000, 0x61, 0x7A),
            (633, 0x4E00, 0x9FFF),
            (475, 0x20000, 0x2A6DF),
        ):
            user, group = text(size, first, last), text(191, 0x20000, 0x2A6DF)
            channel = await layer.new_channel("漢" * 150, user_id=user)
            await layer.group_add(group, channel, presence="connection")
            await layer.group_add(group, channel, presence="user")
            assert await users(layer, group) == {user: 1}

    async def test_names_that_are_too_long(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        channel = await layer.new_channel(user_id="u")
        with pytest.raises(InvalidChannel):
            await layer.group_add("x" * 192, channel, presence="user")
        await layer.group_add("x" * 191, channel, presence="user")
        await layer.group_add("x" * 200, channel)
        assert await users(layer, "x" * 191) == {"u": 1}
