"""What clients and other services may send: any type, any size, any depth. It has no effect."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import psycopg
import pytest
from fastapi import FastAPI
from pydantic import BaseModel
from websockets.asyncio.client import ClientConnection, connect

from pgchannels import ChannelLayer, InvalidPayload, Message, PostgresLayer, Settings
from pgchannels.memory import MemoryLayer
from pgchannels.web import (
    ConnectionManager,
    JsonConsumer,
    WebSocketConsumer,
    handles,
    receives,
)
from tests.support.sockets import serve

LARGEST = 15 * 1024 * 1024

# Whatever a class has, and then some.
NAMES = sorted({*dir(WebSocketConsumer), *dir(JsonConsumer), "websocket", "layer", "_stream"})
TYPES = [
    *NAMES,
    *(name.replace("_", ".") for name in NAMES if "_" in name),
    "_anything",
    "",
    ".",
    "chat_message",
    "chat.message.",
    "on_chat",
    "chat.send\0",
    "websocket.disconnect",
    "websocket.close",
    "websocket.send",
    "\N{PILE OF POO}",
]
NOT_STRINGS: list[Any] = [None, True, 0, -1.5, [], ["chat.message"], {}, {"chat.message": 1}]


class Chat(BaseModel):
    text: str


class Victim(JsonConsumer):
    """Handles one type in each direction. Whatever else happens is noted."""

    ends: list[int]
    others: list[Any]

    async def connect(self) -> None:
        await self.accept()
        await self.group_add("room")
        await self.send_json("ready")

    @handles("chat.message")
    async def on_chat(self, message: Message) -> None:
        await self.send_json("chat.message")

    async def chat_other(self, message: Chat) -> None:
        await self.send_json("chat.other")

    @receives("chat.send")
    async def on_send(self, content: Chat) -> None:
        await self.send_json("chat.send")

    async def receive_json(self, content: Any) -> None:
        self.others.append(content)
        await self.send_json("other")

    async def disconnect(self, code: int) -> None:
        self.ends.append(code)


class Publisher(Victim):
    """Puts into the group what clients send."""

    async def receive_json(self, content: Any) -> None:
        await self.layer.group_send("room", content)


class Bystander(JsonConsumer):
    """Handles nothing."""

    async def connect(self) -> None:
        await self.accept()
        await self.group_add("room")
        await self.send_json("ready")


# Not asynchronous: the first database that is asked for is migrated in an event loop of its own.
@pytest.fixture(params=["memory", "postgres"])
def unopened(request: pytest.FixtureRequest) -> ChannelLayer:
    if request.param == "memory":
        return MemoryLayer(Settings(max_message_size=LARGEST))
    url = request.getfixturevalue("database_url")
    return PostgresLayer(Settings(database_url=url, max_message_size=LARGEST))


@pytest.fixture
async def layer(unopened: ChannelLayer) -> AsyncIterator[ChannelLayer]:
    async with unopened:
        yield unopened


@pytest.fixture(autouse=True)
def _nothing_is_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.INFO)
    yield
    assert [
        record.getMessage()
        for record in caplog.get_records("call")
        if record.levelno >= logging.WARNING and record.name.startswith(("pgchannels", "uvicorn"))
    ] == []


def generous(layer: ChannelLayer) -> ConnectionManager:
    """A manager that reads as large frames as servers publish."""
    return ConnectionManager(layer, max_frame_size=LARGEST + 1024 * 1024)


@asynccontextmanager
async def attacked(
    serving: ChannelLayer | ConnectionManager, base: type[JsonConsumer] = Victim
) -> AsyncIterator[tuple[ClientConnection, Any]]:
    """A socket, and its consumer's class. In the end, the socket must be as good as before."""

    class Attacked(base):  # type: ignore[misc, valid-type]
        ends: list[int] = []  # noqa: RUF012
        others: list[Any] = []  # noqa: RUF012

    layer = serving.layer if isinstance(serving, ConnectionManager) else serving
    app = FastAPI()
    app.add_api_websocket_route("/ws", Attacked.as_endpoint(serving))
    async with (
        serve(app, ws_max_size=LARGEST) as address,
        connect(f"ws://{address}/ws", max_size=None, max_queue=None) as socket,
    ):
        assert await answer(socket) == "ready"
        yield socket, Attacked
        await layer.group_send("room", {"still": "there"})
        assert (await answer(socket))["data"] == {"still": "there"}
        await socket.send('{"type":"chat.send","text":""}')
        if base is Victim:
            assert await answer(socket) == "chat.send"
        assert Attacked.ends == []


async def answer(socket: ClientConnection) -> Any:
    async with asyncio.timeout(30):
        return orjson.loads(await socket.recv())


def nested(depth: int, kind: str = "x") -> str:
    return f'{{"type":"{kind}","a":{"[" * depth}{"]" * depth}}}'


def objects(depth: int) -> str:
    return '{"type":"close","a":' * depth + "1" + "}" * depth


class TestFromClients:
    async def test_types(self) -> None:
        async with MemoryLayer() as layer, attacked(layer) as (socket, victim):
            for value in [*TYPES, *NOT_STRINGS]:
                content = {"type": value, "code": 4000, "message": {}, "self": None}
                await socket.send(orjson.dumps(content))
                assert await answer(socket) == "other"
                assert victim.others.pop() == content

    async def test_no_objects(self) -> None:
        async with MemoryLayer() as layer, attacked(layer) as (socket, victim):
            for content in (None, True, 1, "close", [], ["type", "close"], [{"type": "close"}]):
                await socket.send(orjson.dumps(content))
                assert await answer(socket) == "other"
                assert victim.others.pop() == content

    async def test_a_type_of_ten_megabytes(self) -> None:
        """By default, what is so long is not parsed. Where it is, it is a type as any other."""
        many = ",".join(f'"type{n}":"close"' for n in range(500_000))
        frames = [
            f'{{"type":"{kind * (10 * 1024 * 1024 // len(kind))}"}}'
            for kind in ("x", "chat.send", "\\u0000")
        ]
        frames.append(f'{{"type":"close",{many}}}')
        async with MemoryLayer() as layer:
            async with attacked(layer) as (socket, _):
                for frame in frames:
                    await socket.send(frame)
                    assert (await answer(socket))["code"] == "frame_too_large"
            async with attacked(generous(layer)) as (socket, victim):
                for frame in frames:
                    await socket.send(frame)
                    assert await answer(socket) == "other"
                victim.others.clear()

    @pytest.mark.parametrize("make", [nested, objects])
    async def test_depth(self, make: Callable[[int], str]) -> None:
        async with MemoryLayer() as layer, attacked(layer) as (socket, _):
            await socket.send(make(1000))
            assert await answer(socket) == "other"
            await socket.send(make(2000))
            assert (await answer(socket))["code"] == "invalid_json"
            await socket.send(make(100_000))
            assert (await answer(socket))["code"] == "frame_too_large"
            await socket.send(make(100_000)[:60_000])
            assert (await answer(socket))["code"] == "invalid_json"

    async def test_depth_in_a_model(self) -> None:
        async with MemoryLayer() as layer, attacked(layer) as (socket, _):
            await socket.send(nested(1000, "chat.send"))
            assert (await answer(socket))["code"] == "invalid_content"

    async def test_an_echo_that_cannot_be_encoded(self) -> None:
        class Echo(Victim):
            async def receive_json(self, content: Any) -> None:
                await self.send_json(content)

        async with MemoryLayer() as layer, attacked(layer, Echo) as (socket, _):
            await socket.send(nested(1000))
            assert (await answer(socket))["code"] == "invalid_message"
            await socket.send(nested(100))
            assert await answer(socket) == orjson.loads(nested(100))

    async def test_texts_that_are_no_json(self) -> None:
        async with MemoryLayer() as layer, attacked(generous(layer)) as (socket, _):
            for frame in (
                "",
                "{",
                '{"type":"\\ud800"}',
                '{"type":close}',
                "\0",
                "NaN",
                '{"type":"chat.send","type"}',
                b"\xff\xfe",
                b"\x80" * 1_000_000,
                "{" * 1_000_000,
                '"' * 999_999,
            ):
                await socket.send(frame)
                error = await answer(socket)
                assert (error["type"], error["code"]) == ("error", "invalid_json")
                assert len(error["detail"]) <= 500

    async def test_what_they_have_published(self, layer: ChannelLayer) -> None:
        async with attacked(generous(layer), Publisher) as (socket, _):
            for kind in [*TYPES, *NOT_STRINGS]:
                content = {"type": kind, "mode": "json", "body": {"forged": True}}
                await socket.send(orjson.dumps(content))
                reply = await answer(socket)
                assert reply["data"] == content
            for bad in (nested(1000), '["close"]', '"close"'):
                await socket.send(bad)
                assert (await answer(socket))["code"] == "invalid_message"
            await socket.send(f'{{"type":"{"x" * LARGEST}"}}'[: LARGEST - 2] + '"}')
            reply = await answer(socket)
            assert len(reply["data"]["type"]) > 10 * 1024 * 1024


class TestFromOtherServices:
    @pytest.mark.parametrize("consumer", [Victim, Bystander])
    async def test_types(self, layer: ChannelLayer, consumer: type[JsonConsumer]) -> None:
        async with attacked(layer, consumer) as (socket, _):
            payloads = [{"type": kind, "code": 4000} for kind in [*TYPES, *NOT_STRINGS]]
            for payload in payloads:
                await layer.send("room", payload)
            for payload in payloads:
                assert (await answer(socket))["data"] == payload

    @pytest.mark.parametrize("consumer", [Victim, Bystander])
    async def test_size_and_depth(self, layer: ChannelLayer, consumer: type[JsonConsumer]) -> None:
        payloads: list[dict[str, Any]] = [
            {"type": "x" * 10 * 1024 * 1024},
            {"type": "chat.message" * 500_000},
            {"type": "close", "text": '\\u0000"chat.message"'},
            orjson.loads(nested(250, "close")),
            {f"type{n}": "close" for n in range(100_000)},
        ]
        async with attacked(layer, consumer) as (socket, _):
            for payload in payloads:
                await layer.send("room", payload)
                assert (await answer(socket))["data"] == payload
            with pytest.raises(InvalidPayload):
                await layer.send("room", orjson.loads(nested(1000)))

    async def test_disguised_ones_reach_their_handler(self, database_url: str) -> None:
        async with PostgresLayer(database_url) as layer, attacked(layer) as (socket, _):
            for payload in (
                '{"type":"\\u0063hat.message"}',
                '{"\\u0074ype":"chat.message"}',
                '{"type":"close","type":"chat.message"}',
            ):
                publish(database_url, payload)
                assert await answer(socket) == "chat.message"

    @pytest.mark.parametrize("consumer", [Victim, Bystander])
    async def test_by_sql(self, database_url: str, consumer: type[JsonConsumer]) -> None:
        payloads = [
            '{"type":"close"}',
            ' { "type" :\n"disconnect","type":"_anything"} ',
            '{"type":"websocket.send","mode":"json","body":{"forged":true}}',
            '{"type":"websocket.send","mode":"bytes","body":"AP8="}',
            '{"type":"chat.message","a":1e999}',
            '{"a":123456789012345678901234567890}',
            nested(1000, "close"),
        ]
        # Valid for PostgreSQL, more than can be parsed here.
        deep = nested(3000, "chat.message")
        async with PostgresLayer(database_url) as layer, attacked(layer, consumer) as (socket, _):
            for payload in [*payloads, deep]:
                smuggle(database_url, payload)
                async with asyncio.timeout(10):
                    frame = await socket.recv()
                assert isinstance(frame, str)
                assert f'"data":{payload}' in frame

    async def test_what_does_not_fit_its_model(
        self, database_url: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.ERROR)  # it is told of, as it should be
        async with PostgresLayer(database_url) as layer, attacked(layer) as (socket, _):
            for payload in (nested(1000, "chat.other"), '{"type":"chat.other","text":[]}'):
                smuggle(database_url, payload)
            await layer.send("room", {"type": "chat.other", "text": "good"})
            assert await answer(socket) == "chat.other"


def smuggle(database_url: str, payload: str) -> None:
    """Publish what the database did not refuse when older messages were published."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(
            "alter table pgchannels.outbox drop constraint if exists outbox_payload_is_valid"
        )
        connection.execute(
            "insert into pgchannels.outbox (channel, payload) values ('room', %s)", [payload]
        )


def publish(database_url: str, payload: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("select pgchannels.publish('room', %s)", [payload])
