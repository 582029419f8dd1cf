"""Limits: how many connections there may be, and how many members; and who is connected."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any

import pytest

from pgchannels.errors import (
    ConfigurationError,
    GroupFull,
    InvalidChannel,
    InvalidUser,
    TooManyConnections,
)
from pgchannels.layer import ChannelLayer
from pgchannels.limits import Limits
from pgchannels.testing.support import MakeLayer, settle, take

__all__ = ["LimitTests"]


async def admitted(attempts: Sequence[Awaitable[Any]]) -> tuple[int, list[Exception]]:
    """How many of these concurrent attempts succeeded, and why the others did not."""
    results = await asyncio.gather(*attempts, return_exceptions=True)
    errors = [result for result in results if isinstance(result, Exception)]
    return len(results) - len(errors), errors


async def connect(layer: ChannelLayer, user_id: str | None = None, **limits: int) -> str:
    return await layer.new_channel(user_id=user_id, limits=Limits(**limits))


@pytest.mark.asyncio
class LimitTests:
    """``new_channel(limits=…)``, ``group_add(limit=…)``, ``connections()``."""

    async def test_a_user_has_so_many_connections(self, make_layer: MakeLayer) -> None:
        layers = [await make_layer(), await make_layer()]
        attempts = [connect(layers[n % 2], "u", per_user=5) for n in range(16)]
        won, errors = await admitted(attempts)
        assert won == 5
        for error in errors:
            assert isinstance(error, TooManyConnections)
            assert (error.scope, error.limit) == ("user", 5)
        assert await layers[0].count_connections(user_id="u") == 5
        # Others are others.
        await connect(layers[0], "v", per_user=1)
        await connect(layers[0], None, per_user=1)
        await connect(layers[1], None, per_user=1)

    async def test_a_refused_one_does_not_take_others_with_it(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        users = ["a", "b", "a", "c", "a", "b"]
        results = await asyncio.gather(
            *(connect(layer, user, per_user=1) for user in users), return_exceptions=True
        )
        won = [user for user, result in zip(users, results, strict=True) if isinstance(result, str)]
        assert sorted(won) == ["a", "b", "c"]
        assert await layer.count_connections() == 3

    async def test_a_place_becomes_free(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(), await make_layer()
        first = await connect(layer, "u", per_user=1)
        with pytest.raises(TooManyConnections):
            await connect(other, "u", per_user=1)
        await layer.delete_channel(first)
        second = await connect(other, "u", per_user=1)
        assert [c.channel for c in await layer.connections(user_id="u")] == [second]
        await other.close()
        await connect(layer, "u", per_user=1)

    async def test_a_node_and_all_nodes_have_so_many(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(), await make_layer()
        won, errors = await admitted([connect(layer, per_node=3) for _ in range(5)])
        assert won == 3
        assert {(e.scope, e.limit) for e in errors if isinstance(e, TooManyConnections)} == {
            ("node", 3)
        }
        attempts = [connect(node, per_node=3, total=5) for node in (layer, other) for _ in range(4)]
        won, errors = await admitted(attempts)
        assert won == 2
        assert {e.scope for e in errors if isinstance(e, TooManyConnections)} == {"node", "total"}
        assert await other.count_connections() == 5

    async def test_ordinary_channels_do_not_count(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        for _ in range(3):
            await layer.new_channel(user_id="u")
        assert await layer.count_connections() == 0
        assert await layer.connections() == []
        await connect(layer, "u", per_user=1, per_node=1, total=1)
        await layer.new_channel(user_id="u")
        assert await layer.count_connections(user_id="u") == 1

    async def test_becoming_somebody_elses(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(), await make_layer()
        await connect(other, "u", per_user=1)
        channel = await connect(layer, None, per_user=1, per_node=1, total=2)
        with pytest.raises(TooManyConnections) as raised:
            await layer.update_channel(channel, user_id="u", limits=Limits(per_user=1))
        assert (raised.value.scope, raised.value.limit) == ("user", 1)
        assert await layer.count_connections(user_id="u") == 1
        # It has its place on the node and in all, and nobody's place twice.
        limits = Limits(per_user=1, per_node=1, total=2)
        for _ in range(2):
            await layer.update_channel(channel, user_id="v", metadata={"n": 1}, limits=limits)
        (info,) = await other.connections(user_id="v")
        assert (info.channel, info.metadata) == (channel, {"n": 1})
        assert await layer.count_connections() == 2
        # Without limits it is changed in any case.
        await layer.update_channel(channel, user_id="u")
        assert await layer.count_connections(user_id="u") == 2

    async def test_a_channel_becomes_a_connection(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        channel = await layer.new_channel(user_id="u")
        await layer.update_channel(channel, user_id="u", limits=Limits(per_user=1, total=1))
        assert await layer.count_connections(user_id="u") == 1
        another = await layer.new_channel()
        with pytest.raises(TooManyConnections):
            await layer.update_channel(another, limits=Limits(total=1))
        await layer.delete_channel(channel)
        await layer.update_channel(another, limits=Limits(total=1))

    async def test_who_is_refused_is_not_there(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        channel = await connect(layer, "u", per_user=1)
        with pytest.raises(TooManyConnections):
            await connect(layer, "u", per_user=1)
        async with layer.subscribe(member=channel) as stream:
            await layer.send_to_user("u", {"n": 1})
            assert [message["n"] for message in await take(stream, 1)] == [1]
        assert [info.channel for info in await layer.connections()] == [channel]

    async def test_the_registry_by_pages(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(), await make_layer()
        names = await asyncio.gather(
            *(
                node.new_channel(
                    f"p{n % 3}", user_id=f"u{n % 2}", metadata={"n": n}, limits=Limits()
                )
                for n, node in enumerate([layer, other] * 5)
            )
        )
        found = []
        after = None
        while page := await layer.connections(after=after, limit=3):
            assert len(page) <= 3
            found += page
            after = page[-1].channel
        assert [info.channel for info in found] == sorted(names)
        assert {info.channel: (info.user_id, info.metadata) for info in found} == {
            name: (f"u{n % 2}", {"n": n}) for n, name in enumerate(names)
        }
        assert len({info.node for info in found}) == 2
        assert all(info.host and info.connected_at.tzinfo for info in found)
        mine = await other.connections(user_id="u1", after=sorted(names)[0], limit=1000)
        wanted = sorted(name for n, name in enumerate(names) if n % 2)
        assert [info.channel for info in mine] == [n for n in wanted if n > sorted(names)[0]]
        assert await other.connections(user_id="nobody") == []
        assert await layer.count_connections() == 10

    @pytest.mark.parametrize("user", ["u" * 1000, "\U0001f600" * 475, "sha256:" + "0" * 64, "é'"])
    async def test_any_users_id(self, make_layer: MakeLayer, user: str) -> None:
        layer = await make_layer()
        await connect(layer, user, per_user=1)
        with pytest.raises(TooManyConnections):
            await connect(layer, user, per_user=1)
        (info,) = await layer.connections(user_id=user)
        assert info.user_id == user

    async def test_bad_limits(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        wrong: Any = {"per_user": 5}
        with pytest.raises(ConfigurationError):
            await layer.new_channel(limits=wrong)
        channel = await layer.new_channel()
        with pytest.raises(ConfigurationError):
            await layer.update_channel(channel, limits=wrong)
        for limit in (0, -1, True, 1.5, 2**31):
            with pytest.raises(ConfigurationError):
                await layer.group_add("room", channel, limit=limit)  # type: ignore[arg-type]
        for number in (0, 1001):
            with pytest.raises(ValueError, match="limit"):
                await layer.connections(limit=number)
        with pytest.raises(InvalidChannel):
            await layer.connections(after="a b")
        with pytest.raises(InvalidUser):
            await layer.connections(user_id="")
        with pytest.raises(InvalidUser):
            await layer.count_connections(user_id="")
        assert await layer.connections() == []

    async def test_a_group_has_so_many_members(self, make_layer: MakeLayer) -> None:
        layers = [await make_layer(), await make_layer()]
        names = [await layers[n % 2].new_channel() for n in range(10)]
        won, errors = await admitted(
            [layers[n % 2].group_add("room", name, limit=4) for n, name in enumerate(names)]
        )
        assert won == 4
        for error in errors:
            assert isinstance(error, GroupFull)
            assert (error.group, error.limit) == ("room", 4)
        members = await layers[0].group_members("room")
        assert len(members) == 4
        # Who is in stays in; who is out may go elsewhere.
        for name in members:
            await layers[names.index(name) % 2].group_add("room", name, limit=1)
        outside = next(name for name in names if name not in members)
        await layers[0].group_add("hall", outside, limit=1)
        # A place that becomes free is given once.
        await layers[0].group_discard("room", members[0])
        won, _ = await admitted(
            [layers[n % 2].group_add("room", name, limit=4) for n, name in enumerate(names)]
        )
        assert won == 3 + 1
        assert len(await layers[1].group_members("room")) == 4

    async def test_members_with_presence_and_a_limit(self, make_layer: MakeLayer) -> None:
        layer = await make_layer(presence_grace=3600)
        first = await layer.new_channel(user_id="u")
        second = await layer.new_channel(user_id="v")
        await layer.group_add("room", first, presence="user", limit=1)
        with pytest.raises(GroupFull):
            await layer.group_add("room", second, presence="user", limit=1)
        assert [p.user_id for p in await layer.presence("room")] == ["u"]
        nobody = await layer.new_channel()
        with pytest.raises(InvalidUser):
            await layer.group_add("hall", nobody, presence="user", limit=1)
        # Who has left counts as present for a moment, and as a member no more.
        await layer.group_discard("room", first)
        await layer.group_add("room", second, presence="user", limit=1)
        assert await layer.group_members("room") == [second]

    async def test_who_is_refused_does_not_read_the_group(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        first, second = [await layer.new_channel() for _ in range(2)]
        await layer.group_add("room", first, limit=1)
        async with layer.subscribe(member=first) as inside, layer.subscribe(member=second) as out:
            with pytest.raises(GroupFull):
                await layer.group_add("room", second, limit=1)
            await layer.group_send("room", {"n": 1})
            await settle(layer)
            await layer.send(second, {"n": 2})
            assert [message["n"] for message in await take(inside, 1)] == [1]
            assert [message["n"] for message in await take(out, 1)] == [2]
