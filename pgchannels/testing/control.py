"""What nodes are told to do, what is revoked, and rates that they share."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from pgchannels.channels import COMMANDS
from pgchannels.control import Command
from pgchannels.errors import ConfigurationError, InvalidChannel, InvalidMessage, InvalidUser
from pgchannels.layer import ChannelLayer
from pgchannels.rates import FixedWindow, TokenBucket
from pgchannels.testing.support import PATIENCE, MakeLayer, listening, settle, take, until

__all__ = ["CommandTests", "RevocationTests", "SharedRateTests"]


async def told(heard: asyncio.Queue[Command], count: int) -> list[Command]:
    async with asyncio.timeout(PATIENCE):
        return [await heard.get() for _ in range(count)]


async def enter(context: Any) -> None:
    async with context:
        pass


async def join(layer: ChannelLayer) -> None:
    async with layer.subscribe("room") as stream:
        await stream.join(COMMANDS)


async def join_group(layer: ChannelLayer) -> None:
    async with layer.subscribe(member=await layer.new_channel()) as stream:
        await stream.join_group(COMMANDS)


# Whatever takes a channel's name.
ENTRIES: dict[str, Callable[[ChannelLayer], Awaitable[Any]]] = {
    "send": lambda layer: layer.send(COMMANDS, {}),
    "group_send": lambda layer: layer.group_send(COMMANDS, {}),
    "exclude": lambda layer: layer.group_send("room", {}, exclude=COMMANDS),
    "send_to": lambda layer: layer.send_to([COMMANDS], {}),
    "send_ephemeral": lambda layer: layer.send_ephemeral(COMMANDS, {}),
    "send_json_message": lambda layer: layer.send_json_message(COMMANDS, {}),
    "send_bytes_message": lambda layer: layer.send_bytes_message(COMMANDS, b""),
    "receive": lambda layer: layer.receive(COMMANDS, timeout=0),
    "subscribe": lambda layer: enter(layer.subscribe(COMMANDS)),
    "subscribe from the beginning": lambda layer: enter(layer.subscribe(COMMANDS, after="0")),
    "member": lambda layer: enter(layer.subscribe(member=COMMANDS)),
    "join": join,
    "join_group": join_group,
    "follow": lambda layer: enter(layer.follow(COMMANDS, name="reader")),
    "follow as": lambda layer: enter(layer.follow("room", name=COMMANDS)),
    "history": lambda layer: layer.history(COMMANDS),
    "new_channel": lambda layer: layer.new_channel(COMMANDS),
    "group_add": lambda layer: layer.group_add(COMMANDS, "jobs"),
    "group_add of it": lambda layer: layer.group_add("room", COMMANDS),
    "group_members": lambda layer: layer.group_members(COMMANDS),
    "presence": lambda layer: layer.presence(COMMANDS),
}


@pytest.mark.asyncio
class CommandTests:
    """``command()`` and ``watch_commands()``."""

    async def test_every_node_is_told_in_order(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(), await make_layer()
        commands = [
            Command("close", user_id="u", code=4001, reason="bye"),
            Command("reauthorize", token_id="t"),
            Command("close", channel="ws.1"),
            Command("close", group="room", code=1001),
            Command("reauthorize", everyone=True),
        ]
        with listening(layer) as mine, listening(other) as others:
            for command in commands:
                await layer.command(command)
            assert await told(mine, 5) == commands
            assert await told(others, 5) == commands

    async def test_who_fails_keeps_nothing_from_others(
        self, make_layer: MakeLayer, caplog: pytest.LogCaptureFixture
    ) -> None:
        layer = await make_layer()

        def fail(command: Command) -> None:
            raise RuntimeError("a bug of the application's")

        stop = layer.watch_commands(fail, lambda: None)
        with listening(layer) as heard:
            for user in ("u", "v"):
                await layer.command(Command("close", user_id=user))
            assert [command.user_id for command in await told(heard, 2)] == ["u", "v"]
        await settle(layer)
        stop()
        failures = [record for record in caplog.records if record.exc_info]
        assert len(failures) == 2
        assert all("a bug of the application's" in str(each.exc_info) for each in failures)

    async def test_who_obeys_may_end_watches(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        calls: list[str] = []

        def obey(command: Command) -> None:
            calls.append("first")
            stop_first()
            stop_second()

        stop_first = layer.watch_commands(obey, lambda: None)
        stop_second = layer.watch_commands(lambda _: calls.append("second"), lambda: None)
        with listening(layer) as heard:
            for user in ("u", "v"):
                await layer.command(Command("close", user_id=user))
            await told(heard, 2)
        assert calls == ["first"]

    async def test_live_only(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        await layer.command(Command("close", user_id="before"))
        await settle(layer)
        with listening(layer) as heard:
            await layer.command(Command("close", user_id="after"))
            assert [command.user_id for command in await told(heard, 1)] == ["after"]

    @pytest.mark.parametrize("entry", ENTRIES)
    async def test_nobody_else_reads_or_gives_them(self, make_layer: MakeLayer, entry: str) -> None:
        layer = await make_layer()
        with pytest.raises(InvalidChannel):
            await ENTRIES[entry](layer)

    async def test_a_member_does_not_read_them(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        channel = await layer.new_channel(user_id="u")
        async with layer.subscribe(member=channel, after="0") as stream:
            await layer.command(Command("close", user_id="u"))
            await layer.revoke(user_id="u")
            await layer.broadcast({"n": 1})
            assert [message["n"] for message in await take(stream, 1)] == [1]


@pytest.mark.asyncio
class RevocationTests:
    """``revoke()`` and ``is_revoked()``."""

    async def test_a_users_tokens(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(), await make_layer()
        assert not await layer.is_revoked(user_id="u")
        before = datetime.now(UTC)
        await layer.revoke(user_id="u")
        # It is the same machine's clock; a little later it is certainly later.
        after = datetime.now(UTC) + timedelta(minutes=1)
        for issued_at, expected in [(before - timedelta(minutes=1), True), (after, False)]:
            revoked = await other.is_revoked(user_id="u", token_id="t", issued_at=issued_at)
            assert revoked is expected
        assert await other.is_revoked(user_id="u")
        assert not await other.is_revoked(user_id="v", token_id="u")

    async def test_a_token(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(), await make_layer()
        later = datetime.now(UTC) + timedelta(hours=1)
        await layer.revoke(token_id="t")
        assert await other.is_revoked(token_id="t")
        # Whatever the clock of who has issued it says.
        assert await other.is_revoked(user_id="u", token_id="t", issued_at=later)
        assert not await other.is_revoked(user_id="t", token_id="other", issued_at=later)

    async def test_nodes_are_told(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(), await make_layer()
        with listening(other) as heard:
            await layer.revoke(user_id="u", token_id="t")
            found = await told(heard, 2)
            assert [(c.action, c.user_id, c.token_id) for c in found] == [
                ("reauthorize", "u", None),
                ("reauthorize", None, "t"),
            ]
            # What was told is there to be asked for.
            assert await other.is_revoked(user_id="u")
            assert await other.is_revoked(token_id="t")

    async def test_it_is_kept_for_as_long_as_was_said(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        await layer.revoke(user_id="u", keep=timedelta(milliseconds=50))
        await layer.revoke(user_id="v", keep=timedelta(hours=1))
        await layer.revoke(user_id="v", keep=timedelta(milliseconds=50))  # no earlier than before

        async def forgotten() -> bool:
            return not await layer.is_revoked(user_id="u")

        await until(forgotten)
        await asyncio.sleep(0.1)
        assert await layer.is_revoked(user_id="v")

    @pytest.mark.parametrize("text", ["t" * 1000, "\U0001f600" * 475, "sha256:" + "0" * 64])
    async def test_any_text(self, make_layer: MakeLayer, text: str) -> None:
        layer = await make_layer()
        await layer.revoke(user_id=text, token_id=text)
        assert await layer.is_revoked(user_id=text)
        assert await layer.is_revoked(token_id=text)
        assert not await layer.is_revoked(user_id=text[:-1], token_id=text[:-1])

    async def test_bad_revocations(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        for keep in (timedelta(0), timedelta(days=-1), timedelta(days=10_000)):
            with pytest.raises(ValueError, match="keep"):
                await layer.revoke(user_id="u", keep=keep)
        with pytest.raises(ValueError, match="user_id"):
            await layer.revoke()
        with pytest.raises(ValueError, match="user_id"):
            await layer.is_revoked()
        with pytest.raises(ValueError, match="time zone"):
            await layer.is_revoked(user_id="u", issued_at=datetime(2030, 1, 1))  # noqa: DTZ001
        for ask in (layer.revoke, layer.is_revoked):
            with pytest.raises(InvalidUser):
                await ask(user_id="")
            for token in ("", "x" * 1001, "\0", "\ud800"):
                with pytest.raises(InvalidMessage):
                    await ask(token_id=token)


@pytest.mark.asyncio
class SharedRateTests:
    """``take()``."""

    async def test_a_window(self, make_layer: MakeLayer) -> None:
        layers = [await make_layer(), await make_layer()]
        rate = FixedWindow(7, 3600)
        found = await asyncio.gather(*(layers[n % 2].take("k", rate) for n in range(20)))
        allowed = [each for each in found if each.allowed]
        assert sorted(each.remaining for each in allowed) == list(range(7))
        assert {each.retry_after for each in allowed} == {0.0}
        for refused in found:
            if not refused.allowed:
                assert refused.remaining == 0
                assert 3500 < refused.retry_after <= 3600

    async def test_the_next_window(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        rate = FixedWindow(2, 0.05)

        async def allowed() -> bool:
            return (await layer.take("k", rate, cost=2)).allowed

        for _ in range(3):
            await until(allowed)

    async def test_a_bucket(self, make_layer: MakeLayer) -> None:
        layers = [await make_layer(), await make_layer()]
        rate = TokenBucket(0.001, 5)
        found = await asyncio.gather(*(layers[n % 2].take("k", rate) for n in range(12)))
        assert sorted(each.remaining for each in found if each.allowed) == list(range(5))
        for refused in found:
            if not refused.allowed:
                assert refused.remaining == 0
                assert 900 < refused.retry_after <= 1000

    async def test_a_bucket_fills(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        rate = TokenBucket(50, 2)
        assert (await layer.take("k", rate, cost=2)).allowed

        async def allowed() -> bool:
            return (await layer.take("k", rate, cost=2)).allowed

        await until(allowed)

    async def test_costs_in_their_order(self, make_layer: MakeLayer) -> None:
        """What does not fit costs nothing, and leaves room for what does."""
        layer = await make_layer()
        for rate in (FixedWindow(10, 3600), TokenBucket(0.0001, 10)):
            taken = [layer.take("k", rate, cost) for cost in (4, 5, 6, 1, 1)]
            found = await asyncio.gather(*taken)
            assert [(each.allowed, each.remaining) for each in found] == [
                (True, 6),
                (True, 1),
                (False, 1),
                (True, 0),
                (False, 0),
            ]

    async def test_keys_have_nothing_to_do_with_each_other(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        keys = [
            "a",
            "b",
            "A",
            "é",
            "\U0001f600" * 1000,
            "\U0001f600" * 999 + "x",
            "z" * 1000,
            "a b",
        ]
        for rate in (FixedWindow(1, 3600), TokenBucket(0.0001, 1)):
            found = await asyncio.gather(*(layer.take(key, rate) for key in keys * 2))
            assert [each.allowed for each in found] == [True] * 8 + [False] * 8

    async def test_bad_takes(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        rate = FixedWindow(3, 1)
        for cost in (0, -1, 4, True, 1.5):
            with pytest.raises(ConfigurationError):
                await layer.take("k", rate, cost)  # type: ignore[arg-type]
        for key in ("", "k" * 1001, "\0", "\ud800", 7):
            with pytest.raises(InvalidMessage):
                await layer.take(key, rate)  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError):
            await layer.take("k", 5)  # type: ignore[arg-type]
