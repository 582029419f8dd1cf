"""Sending: order, payloads, headers, time to live, idempotency keys."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pytest

from pgchannels.channels import EVERYONE
from pgchannels.errors import (
    InvalidChannel,
    InvalidMessage,
    InvalidPayload,
    InvalidUser,
    MessageTooLarge,
)
from pgchannels.layer import ChannelLayer
from pgchannels.messages import FRAME, Message
from pgchannels.testing.support import MakeLayer, numbers, send_numbers, settle, take, until

__all__ = ["KeyTests", "SendingTests"]

NAN = float("nan")

BAD_CHANNELS: list[Any] = [
    "",
    "a b",
    "a\n",
    "a#",
    "a+",
    "a*",
    "x" * 201,
    "pgchannels:own",
    None,
    5,
    ["a"],
]

BAD_HEADERS: list[Any] = [
    {"pgchannels-only": "[]"},
    {"PGChannels-x": "y"},
    {"a": 1},
    {1: "a"},
    {"a": "\ud800"},
    {"a": "x" * 8193},
]

# Whatever a payload holds is the user's: nothing in it may be taken for a marker of ours.
BYTES: list[dict[str, Any]] = [
    {"file": b"\x00\xff"},
    {"": b"", "deep": [{"a/b~c": [b"1", "text", None, b"2"]}]},
    {"~0": {"~1": b"x"}, "0": [[b"y"]]},
    {"__bytes__": "aGk=", "body": {"$binary": "aGk=", "base64": True}},
    {"pgchannels-attachments": '["/file"]', "file": None, "blob": b"\x01"},
    {"attachments": {"/file": "aGk="}, "file": None},
]

SENDERS: list[Callable[..., Awaitable[Any]]] = [
    lambda layer, payload, **options: layer.send("room", payload, **options),
    lambda layer, payload, **options: layer.group_send("room", payload, **options),
    lambda layer, payload, **options: layer.send_to(["room"], payload, **options),
    lambda layer, payload, **options: layer.send_to_user("u", payload, **options),
    lambda layer, payload, **options: layer.broadcast(payload, **options),
]


async def everywhere(
    layer: ChannelLayer, other: ChannelLayer, channel: str, send: Callable[[], Awaitable[Any]]
) -> list[Message]:
    """One message as each way of reading gives it, on two nodes."""
    async with (
        layer.subscribe(channel) as here,
        other.subscribe(channel) as there,
        other.follow(channel, name="everywhere") as batches,
    ):
        await send()
        live = [*await take(here, 1), *await take(there, 1)]
        batch = await anext(batches)
    async with other.subscribe(channel, after="0") as again:
        replayed = await take(again, 1)
    history = (await layer.history(channel)).messages
    return [*live, *batch, *replayed, *history, await other.receive(channel, timeout=20)]


@pytest.mark.asyncio
class SendingTests:
    """What is sent arrives as it was sent, once, in one order."""

    async def test_every_way_of_reading_gives_the_same(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(), await make_layer()
        payload = {"type": "chat", "text": "ünï 🚀", "n": [1, 2.5, None, {"a": True}]}
        messages = await everywhere(layer, other, "room", lambda: layer.send("room", payload))
        assert len(messages) == 6
        for message in messages:
            assert dict(message) == payload
            assert message.type == "chat"
            assert message == messages[0]
            assert message.position == messages[0].position
            assert message.channel == "room"
            assert message.created_at == messages[0].created_at
            assert message.size == len(message.payload.encode())
            assert not message.ephemeral
            assert orjson.loads(message.envelope) == message.to_dict()

    @pytest.mark.parametrize("payload", BYTES)
    async def test_bytes_anywhere(self, make_layer: MakeLayer, payload: dict[str, Any]) -> None:
        layer, other = await make_layer(), await make_layer()
        messages = await everywhere(layer, other, "files", lambda: layer.send("files", payload))
        assert [dict(message) for message in messages] == [payload] * 6

    async def test_receipts(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        receipt = await layer.send("room", {"n": 1})
        assert not receipt.repeated
        assert abs(datetime.now(UTC) - receipt.created_at) < timedelta(minutes=5)
        async with layer.subscribe("room", after="0") as stream:
            (message,) = await take(stream, 1)
        assert message.created_at == receipt.created_at

    async def test_one_order_for_all(self, make_layer: MakeLayer) -> None:
        nodes = [await make_layer(), await make_layer()]
        async with nodes[0].subscribe("a", "b") as first, nodes[1].subscribe("b", "a") as second:
            await asyncio.gather(
                *(nodes[n % 2].send("ab"[n % 3 % 2], {"n": n}) for n in range(100))
            )
            seen = await take(first, 100)
            assert await take(second, 100) == seen
        assert sorted(numbers(seen)) == list(range(100))
        assert [message.id for message in seen] == list(range(seen[0].id, seen[0].id + 100))
        async with nodes[0].subscribe("a", "b", after="0") as again:
            assert await take(again, 100) == seen

    async def test_what_was_sent_before_comes_before(self, make_layer: MakeLayer) -> None:
        nodes = [await make_layer(), await make_layer()]
        async with nodes[1].subscribe("a", "b", "c") as stream:
            for n in range(30):
                await nodes[n % 2].send("abc"[n % 3], {"n": n})
            assert numbers(await take(stream, 30)) == list(range(30))

    async def test_a_group_is_a_channel(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        async with layer.subscribe("room") as stream:
            await layer.group_send("room", {"n": 1})
            await layer.send("room", {"n": 2})
            assert numbers(await take(stream, 2)) == [1, 2]
        assert numbers((await layer.history("room")).messages) == [1, 2]

    async def test_broadcasts_are_a_channel(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        async with layer.subscribe(EVERYONE) as stream:
            await layer.broadcast({"n": 1})
            await layer.send(EVERYONE, {"n": 2})
            assert numbers(await take(stream, 2)) == [1, 2]

    async def test_frames(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        async with layer.subscribe("room") as stream:
            await layer.send_json_message("room", {"a": [1]}, extra=1)
            await layer.send_bytes_message("room", b"\x00\x01")
            forged = {"type": "websocket.send", "mode": "json", "body": {}}
            await layer.send("room", forged)
            text, binary, plain = await take(stream, 3)
        assert dict(text) == {
            "type": "websocket.send",
            "mode": "json",
            "body": {"a": [1]},
            "extra": 1,
        }
        assert dict(binary) == {"type": "websocket.send", "mode": "bytes", "body": b"\x00\x01"}
        assert (text.headers[FRAME], binary.headers[FRAME]) == ("json", "bytes")
        assert dict(plain) == forged
        assert FRAME not in plain.headers

    async def test_headers(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(), await make_layer()
        headers = {"trace": "ä", "x": ""}
        messages = await everywhere(
            layer, other, "room", lambda: layer.send("room", {"secret": None}, headers=headers)
        )
        for message in messages:
            assert message.headers == headers
            assert "trace" not in message.envelope

    async def test_bad_channels_to_send_to(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        calls: list[Callable[[Any], Awaitable[Any]]] = [
            lambda channel: layer.send(channel, {}),
            lambda channel: layer.group_send(channel, {}),
            lambda channel: layer.group_send("room", {}, exclude=channel or ""),
            lambda channel: layer.send_to([channel], {}),
            lambda channel: layer.send_ephemeral(channel, {}),
            lambda channel: layer.send_ephemeral("room", {}, exclude=channel or ""),
            lambda channel: layer.send_json_message(channel, {}),
            lambda channel: layer.send_bytes_message(channel, b""),
        ]
        for call in calls:
            for channel in BAD_CHANNELS:
                with pytest.raises(InvalidChannel):
                    await call(channel)

    async def test_bad_recipients(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        with pytest.raises(InvalidMessage):
            await layer.send_to([], {})
        with pytest.raises(InvalidMessage):
            await layer.send_to([f"c{n}" for n in range(1001)], {})
        with pytest.raises(InvalidChannel):
            await layer.send_to("room", {})
        for user in ("", None, 5):
            with pytest.raises(InvalidUser):
                await layer.send_to_user(user, {})  # type: ignore[arg-type]

    @pytest.mark.parametrize("send", SENDERS)
    async def test_what_is_refused_is_not_written(
        self, make_layer: MakeLayer, send: Callable[..., Awaitable[Any]]
    ) -> None:
        layer = await make_layer(max_message_size=100)
        before = await settle(layer)
        nested: dict[str, Any] = {}
        for _ in range(1000):
            nested = {"a": nested}
        refused: list[Any] = [None, [], "text", {"a": object()}, {"a": NAN}, {1: 2}, nested]
        for payload in refused:
            with pytest.raises(InvalidPayload):
                await send(layer, payload)
        for content in ("x" * 100, b"x" * 100):
            with pytest.raises(MessageTooLarge):
                await send(layer, {"a": content})
        for headers in BAD_HEADERS:
            with pytest.raises(InvalidMessage):
                await send(layer, {}, headers=headers)
        for ttl in (0, -1, NAN, timedelta(0), "5"):
            with pytest.raises(InvalidMessage):
                await send(layer, {}, ttl=ttl)
        for key in ("", "x" * 201, "a\0", "\ud800", 5):
            with pytest.raises(InvalidMessage):
                await send(layer, {}, key=key)
        after = await settle(layer)
        assert after.id == before.id + 1

    async def test_ttl(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        async with layer.subscribe("room") as stream:
            await layer.send("room", {"n": 1}, ttl=2.5)
            await layer.send("room", {"n": 2}, ttl=timedelta(hours=1))
            await layer.send("room", {"n": 3})
            assert numbers(await take(stream, 3)) == [1, 2, 3]

        async def expired() -> bool:
            return numbers((await layer.history("room")).messages) == [2, 3]

        await until(expired)
        async with layer.subscribe("room", after="0") as stream:
            assert numbers(await take(stream, 2)) == [2, 3]
        async with layer.follow("room", name="late", after="0") as batches:
            assert numbers(await anext(batches)) == [2, 3]
        assert [(await layer.receive("room", timeout=20))["n"] for _ in range(2)] == [2, 3]

    async def test_default_ttl(self, make_layer: MakeLayer) -> None:
        layer = await make_layer(default_ttl=1.0)
        await layer.send("room", {"n": 1})
        await layer.send("room", {"n": 2}, ttl=3600)

        async def expired() -> bool:
            return numbers((await layer.history("room")).messages) == [2]

        await until(expired)

    async def test_messages_are_retained_for_a_time(self, make_layer: MakeLayer) -> None:
        layer = await make_layer(retention=timedelta(seconds=2), prune_interval=0.1)
        sent = await send_numbers(layer, "room", range(3))

        async def gone() -> bool:
            # What is newest may be kept for longer, so there has to be something newer.
            await layer.send("other", {})
            return not (await layer.history("room")).messages

        await until(gone)
        page = await layer.history("room", after=sent[0].position)
        assert page.truncated
        assert not (await layer.history("room")).truncated
        async with layer.subscribe("room", after=sent[0].position) as stream:
            assert await stream.batch() == []
            assert stream.truncated
        async with layer.subscribe("room", after="0") as stream:
            await layer.send("room", {"n": 9})
            assert numbers(await take(stream, 1)) == [9]
            assert not stream.truncated


@pytest.mark.asyncio
class KeyTests:
    """A key makes sending again safe."""

    async def test_a_repeat_gives_the_first_receipt(self, make_layer: MakeLayer) -> None:
        layer, other = await make_layer(), await make_layer()
        first = await layer.send("room", {"n": 1}, key="k")
        again = await other.send("room", {"n": 2}, key="k")
        assert (first.repeated, again.repeated) == (False, True)
        assert again.created_at == first.created_at
        await settle(layer)
        assert numbers((await layer.history("room")).messages) == [1]

    async def test_keys_are_a_channels_own(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        receipts = [
            await layer.send("a", {}, key="k"),
            await layer.send("b", {}, key="k"),
            await layer.send("a", {}, key="K"),
            await layer.send_to(["a"], {}, key="k"),
            await layer.send_to_user("a", {}, key="k"),
            await layer.broadcast({}, key="k"),
        ]
        assert not any(receipt.repeated for receipt in receipts)
        assert (await layer.group_send("a", {}, key="k")).repeated

    async def test_at_once(self, make_layer: MakeLayer) -> None:
        nodes = [await make_layer(), await make_layer()]
        receipts = await asyncio.gather(
            *(nodes[n % 2].send("room", {"n": n}, key="k") for n in range(20))
        )
        assert sum(not receipt.repeated for receipt in receipts) == 1
        assert len({receipt.created_at for receipt in receipts}) == 1
        await settle(nodes[0])
        assert len((await nodes[0].history("room")).messages) == 1

    async def test_without_keys_everything_is_new(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        await layer.send("room", {"n": 1})
        await layer.send("room", {"n": 1})
        await settle(layer)
        assert numbers((await layer.history("room")).messages) == [1, 1]

    async def test_keys_are_forgotten(self, make_layer: MakeLayer) -> None:
        layer = await make_layer(key_lifetime=timedelta(seconds=1))
        assert not (await layer.send("room", {}, key="k")).repeated

        async def new() -> bool:
            return not (await layer.send("room", {}, key="k")).repeated

        await until(new)

    async def test_what_is_refused_keeps_no_key(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        with pytest.raises(InvalidPayload):
            await layer.send("room", {"a": object()}, key="k")
        assert not (await layer.send("room", {}, key="k")).repeated
