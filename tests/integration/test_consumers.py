"""Consumers through a real server with a real client, on both layers."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import datetime
from typing import Annotated, Any, ClassVar

import pytest
from fastapi import Cookie, Depends, FastAPI, Header, Query, WebSocketException
from fastapi.routing import APIRouter
from pydantic import BaseModel, ConfigDict, PositiveInt
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from pgchannels import (
    ChannelFull,
    ChannelLayerClosed,
    ConfigurationError,
    DatabaseUnavailable,
    Message,
    PostgresLayer,
)
from pgchannels.envelopes import websocket_json_message
from pgchannels.layer import ChannelLayer
from pgchannels.memory import MemoryLayer
from pgchannels.web import (
    BytesConsumer,
    JsonConsumer,
    SocketError,
    WebSocketConsumer,
    exception_handlers,
    handles,
    lifespan,
    receives,
)
from tests.support.eventually import eventually
from tests.support.sockets import answer, ask, closed, serve
from tests.support.tcp_proxy import TcpProxy


class Address(str):
    """Where a consumer is served."""

    __slots__ = ()

    def __call__(self, path: str = "/ws", **options: Any) -> connect:
        return connect(f"ws://{self}{path}", max_queue=None, **options)


@asynccontextmanager
async def serving(
    consumer: type[WebSocketConsumer], layer: ChannelLayer, path: str = "/ws", **options: Any
) -> AsyncIterator[Address]:
    app = FastAPI()
    app.add_api_websocket_route(path, consumer.as_endpoint(layer))
    async with serve(app, **options) as address:
        yield Address(address)


async def text(socket: ClientConnection) -> str | bytes:
    async with asyncio.timeout(10):
        return await socket.recv()


async def refused(socket: connect) -> int:
    """The HTTP status that a handshake is refused with."""
    with pytest.raises(InvalidStatus) as raised:
        async with socket:
            pass
    return raised.value.response.status_code


class Noted(JsonConsumer):
    """Notes its objects and their ends; a subclass has lists of its own."""

    sockets: ClassVar[list[Noted]] = []
    codes: ClassVar[list[int]] = []

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.sockets, cls.codes = [], []

    def __init__(self, websocket: WebSocket, layer: ChannelLayer) -> None:
        super().__init__(websocket, layer)
        self.sockets.append(self)

    async def receive_json(self, content: Any) -> None:
        await self.send_json({"echo": content})

    async def disconnect(self, code: int) -> None:
        self.codes.append(code)


class User(BaseModel):
    name: str


closings: list[str] = []


async def current_user(token: Annotated[str, Query()], request: WebSocket) -> AsyncIterator[User]:
    if token == "bad":
        raise WebSocketException(4401, "who are you?")
    try:
        yield User(name=f"{token} of {request.url.path}")
    finally:
        closings.append(token)


CurrentUser = Annotated[User, Depends(current_user)]


class Typed(Noted):
    async def connect(
        self,
        room: str,
        number: PositiveInt,
        user: CurrentUser,
        *,
        limit: Annotated[int, Query(le=10)] = 5,
        agent: Annotated[str, Header(alias="x-agent")] = "nobody",
        session: Annotated[str | None, Cookie()] = None,
    ) -> None:
        await self.accept()
        await self.send_json([room, number, user, limit, agent, session])
        if limit == 9:
            raise RuntimeError("nine")


class TestParameters:
    async def test_are_resolved(self, memory: MemoryLayer) -> None:
        closings.clear()
        headers = {"x-agent": "me", "cookie": "session=s"}
        async with serving(Typed, memory, "/rooms/{room}/{number}") as open_socket:
            async with open_socket("/rooms/a%20b/7?token=t", additional_headers=headers) as socket:
                user = {"name": "t of /rooms/a b/7"}
                assert await answer(socket) == ["a b", 7, user, 5, "me", "s"]
                assert closings == []
                assert await ask(socket, 1) == {"echo": 1}
            await eventually(lambda: closings == ["t"])
            async with open_socket("/rooms/a/7?token=t&limit=2") as socket:
                assert (await answer(socket))[3:] == [2, "nobody", None]

    async def test_dependencies_are_torn_down_when_connect_fails(self, memory: MemoryLayer) -> None:
        closings.clear()
        async with (
            serving(Typed, memory, "/{room}/{number}") as open_socket,
            open_socket("/a/7?token=u&limit=9") as socket,
        ):
            assert await closed(socket) == 1011
            await eventually(lambda: closings == ["u"])

    @pytest.mark.parametrize(
        "path", ["/a/0?token=t", "/a/x?token=t", "/a/1", "/a/1?token=t&limit=11", "/a/1?token=bad"]
    )
    async def test_what_is_not_valid_is_refused(self, memory: MemoryLayer, path: str) -> None:
        Typed.sockets.clear()
        async with serving(Typed, memory, "/{room}/{number}") as open_socket:
            assert await refused(open_socket(path)) == 403
        assert Typed.sockets == []

    async def test_as_a_decorated_endpoint_and_with_a_layer_from_the_state(self) -> None:
        class Room(JsonConsumer):
            async def connect(self, room: int) -> None:
                await self.accept()
                await self.send_json([room, self.layer is own])

        own = MemoryLayer()
        app = FastAPI(lifespan=lifespan(own))
        app.websocket("/app/{room}")(Room.as_endpoint())
        router = APIRouter(prefix="/router")
        router.websocket("/{room}")(Room.as_endpoint())
        app.include_router(router)
        async with serve(app) as address:
            for path in ("/app/1", "/router/1"):
                async with Address(address)(path) as socket:
                    assert await answer(socket) == [1, True]

    async def test_no_layer_in_the_state(self, caplog: pytest.LogCaptureFixture) -> None:
        app = FastAPI()
        app.add_api_websocket_route("/ws", Noted.as_endpoint())
        async with serve(app) as address:
            assert await refused(Address(address)()) == 500
        assert any(
            record.exc_info and isinstance(record.exc_info[1], ConfigurationError)
            for record in caplog.records
        )

    async def test_in_plain_starlette(self, memory: MemoryLayer) -> None:
        class Room(JsonConsumer):
            async def connect(self) -> None:
                await self.accept()
                await self.send_json(self.path_params)

        app = Starlette(routes=[WebSocketRoute("/{room}", Room.as_endpoint(memory))])
        async with serve(app) as address, Address(address)("/a") as socket:
            assert await answer(socket) == {"room": "a"}

    async def test_a_parameter_for_the_socket_itself(self, memory: MemoryLayer) -> None:
        class Room(JsonConsumer):
            async def connect(self, it: WebSocket, number: int = 5) -> None:
                await self.accept()
                await self.send_json([it is self.websocket, number])

        async with serving(Room, memory) as open_socket, open_socket() as socket:
            assert await answer(socket) == [True, 5]

    async def test_an_endpoint_of_ones_own(self, memory: MemoryLayer) -> None:
        app = FastAPI()

        @app.websocket("/{room}")
        async def endpoint(websocket: WebSocket, room: str, user: CurrentUser) -> None:
            await Typed(websocket, memory).run(room=room, number=1, user=user)

        async with serve(app) as address, Address(address)("/a?token=t") as socket:
            assert (await answer(socket))[:2] == ["a", 1]

    async def test_what_is_defined_inside_of_a_function(self, memory: MemoryLayer) -> None:
        class Page(BaseModel):
            after: int
            size: int = 10

        def double(size: int) -> int:
            return 2 * size

        class Room(JsonConsumer):
            async def connect(
                self, page: Annotated[Page, Query()], doubled: Annotated[int, Depends(double)]
            ) -> None:
                await self.accept()
                await self.send_json([page, doubled])

        async with (
            serving(Room, memory) as open_socket,
            open_socket("/ws?after=1&size=3") as socket,
        ):
            assert await answer(socket) == [{"after": 1, "size": 3}, 6]


class Connected(Noted):
    """Says its name, and does what it is asked to."""

    async def connect(self, user: str | None = None) -> None:
        await self.accept()
        if user is not None:
            await self.identify(user, {"name": user.title()})
        await self.send_json(self.channel_name)

    async def receive_json(self, content: Any) -> None:
        match content:
            case {"add": group, "presence": presence}:
                await self.group_add(group, presence=presence)
            case {"add": group, "after": after}:
                await self.group_add(group, after=after)
            case {"add": group}:
                await self.group_add(group)
            case {"discard": group}:
                await self.group_discard(group)
            case {"join": group}:
                await self.join(group)
            case {"leave": group}:
                await self.leave(group)
            case {"say": text, "to": group}:
                await self.layer.group_send(group, {"text": text}, exclude=self.channel_name)
            case {"identify": user, "after": after}:
                await self.identify(user, after=after)
        await self.send_json({"done": content})


async def arrived(socket: ClientConnection) -> Any:
    """The payload of the next message."""
    return (await answer(socket))["data"]


class TestChannel:
    async def test_what_reaches_a_socket(self, layer: ChannelLayer) -> None:
        async with serving(Connected, layer) as open_socket, AsyncExitStack() as stack:
            one = await stack.enter_async_context(open_socket("/ws?user=ann"))
            two = await stack.enter_async_context(open_socket("/ws?user=ann"))
            three = await stack.enter_async_context(open_socket("/ws?user=bob"))
            four = await stack.enter_async_context(open_socket())
            sockets = [one, two, three, four]
            names = [await answer(socket) for socket in sockets]
            assert len({*names}) == 4
            assert all(name.startswith("ws.") for name in names)
            await layer.send(names[0], {"to": "one"})
            await layer.send_to([names[0], names[3]], {"to": "one and four"})
            await layer.send_to_user("ann", {"to": "ann"})
            await layer.broadcast({"to": "all"})
            assert [await arrived(one) for _ in range(4)] == [
                {"to": to} for to in ("one", "one and four", "ann", "all")
            ]
            assert [await arrived(two) for _ in range(2)] == [{"to": "ann"}, {"to": "all"}]
            assert await arrived(three) == {"to": "all"}
            assert [await arrived(four) for _ in range(2)] == [
                {"to": "one and four"},
                {"to": "all"},
            ]

    async def test_identified_anew_with_what_was_missed(self, layer: ChannelLayer) -> None:
        async with serving(Connected, layer) as open_socket:
            async with open_socket("/ws?user=ann") as socket:
                await answer(socket)
                await layer.broadcast({"n": 1})
                position = (await answer(socket))["position"]
            await layer.send_to_user("ann", {"n": 2})
            await layer.send_to_user("bob", {"n": 3})
            await layer.broadcast({"n": 4})
            async with open_socket() as socket:
                await answer(socket)
                await socket.send(json.dumps({"identify": "ann", "after": position}))
                # Each channel in its own order, as it is read; and what had reached the socket
                # before it was identified may come again.
                replies: list[Any] = []
                while [n for n in (1, 2, 3, 4) if n in replies] != [2, 4] or "done" not in replies:
                    reply = await answer(socket)
                    replies.append(reply["data"]["n"] if "data" in reply else "done")
                await socket.send(json.dumps({"identify": "ann", "after": "x"}))
                while "code" not in (reply := await answer(socket)):
                    assert reply["data"]["n"] in replies
                assert reply["code"] == "invalid_position"
                await socket.send(json.dumps({"identify": "", "after": None}))
                with suppress(ConnectionClosed):
                    async for _ in socket:
                        pass  # what may still have been under way
                assert socket.close_code == 1011

    async def test_groups(self, layer: ChannelLayer) -> None:
        async with serving(Connected, layer) as open_socket, AsyncExitStack() as stack:
            one = await stack.enter_async_context(open_socket())
            two = await stack.enter_async_context(open_socket())
            names = [await answer(one), await answer(two)]
            await ask(one, {"add": "room"})
            await ask(two, {"add": "room"})
            assert await layer.group_members("room") == sorted(names)
            # Not to the one who says it.
            assert "done" in await ask(one, {"say": "hello", "to": "room"})
            assert await arrived(two) == {"text": "hello"}
            await ask(one, {"discard": "room"})
            assert await layer.group_members("room") == [names[1]]
            await layer.group_send("room", {"n": 1})
            await layer.broadcast({"n": 2})
            assert await arrived(one) == {"n": 2}
            assert [await arrived(two) for _ in range(2)] == [{"n": 1}, {"n": 2}]
            await two.close()

            async def nobody_is_left() -> Any:
                return await layer.group_members("room") == []

            assert await eventually(nobody_is_left)

    async def test_joining_makes_no_member(self, layer: ChannelLayer) -> None:
        async with serving(Connected, layer) as open_socket, open_socket() as socket:
            await answer(socket)
            await ask(socket, {"join": "room"})
            assert await layer.group_members("room") == []
            await layer.send("room", {"n": 1})
            assert await arrived(socket) == {"n": 1}

    async def test_a_group_from_a_position(self, layer: ChannelLayer) -> None:
        await layer.send("room", {"n": 1})
        await layer.send("room", {"n": 2})
        async with serving(Connected, layer) as open_socket, open_socket() as socket:
            await answer(socket)
            await socket.send('{"add": "room", "after": "0"}')
            found = [await answer(socket) for _ in range(3)]
            assert [m["data"]["n"] for m in found if "data" in m] == [1, 2]
            await layer.send("room", {"n": 3})
            assert await arrived(socket) == {"n": 3}

    async def test_added_by_another_node(
        self, layer: ChannelLayer, make_layer: Callable[[], ChannelLayer]
    ) -> None:
        async with (
            make_layer() as other,
            serving(Connected, layer) as open_socket,
            open_socket() as socket,
        ):
            name = await answer(socket)
            await other.group_add("room", name)
            await other.group_send("room", {"n": 1})
            assert await arrived(socket) == {"n": 1}
            await other.group_discard("room", name)

            async def has_left() -> Any:
                return not Connected.sockets[-1]._stream.reads("room")

            assert await eventually(has_left)

    async def test_presence(self, layer: ChannelLayer) -> None:
        async with serving(Connected, layer) as open_socket, AsyncExitStack() as stack:
            watching = await stack.enter_async_context(open_socket())
            await answer(watching)
            await ask(watching, {"join": "presence:room"})
            sockets = {}
            for user in ("ann", "bob"):
                socket = await stack.enter_async_context(open_socket(f"/ws?user={user}"))
                sockets[user] = socket
                await answer(socket)
                await ask(socket, {"add": "room", "presence": "user"})
                joined = await arrived(watching)
                assert (joined["type"], joined["user_id"]) == ("presence.joined", user)
            present = await layer.presence("room")
            assert [(p.user_id, p.metadata) for p in present] == [
                ("ann", {"name": "Ann"}),
                ("bob", {"name": "Bob"}),
            ]
            await sockets["bob"].close()
            left = await arrived(watching)
            assert (left["type"], left["user_id"], left["count"]) == ("presence.left", "bob", 1)

    async def test_presence_of_nobody(self, layer: ChannelLayer) -> None:
        async with serving(Connected, layer) as open_socket, open_socket() as socket:
            await answer(socket)
            error = await ask(socket, {"add": "room", "presence": "user"})
            assert error["code"] == "internal_error"  # the application's mistake, and no client's
            assert await closed(socket) == 1011
            assert await layer.group_members("room") == []

    async def test_ephemeral_messages(self, layer: ChannelLayer) -> None:
        async with serving(Connected, layer) as open_socket, open_socket() as socket:
            await answer(socket)
            await ask(socket, {"add": "room"})
            if isinstance(layer, PostgresLayer):
                await eventually(lambda: layer.is_listening)
            await layer.send_ephemeral("room", {"typing": True})
            assert await arrived(socket) == {"typing": True}

    async def test_farewells_are_sent_while_it_is_still_a_member(self, layer: ChannelLayer) -> None:
        class Room(Noted):
            async def connect(self) -> None:
                await self.group_add("room")

            async def disconnect(self, code: int) -> None:
                members = await self.layer.group_members("room")
                await self.layer.group_send("room", {"left": members == [self.channel_name]})

        async with layer.subscribe("room") as messages:
            async with serving(Room, layer) as open_socket, open_socket() as socket:
                await ask(socket, 1)
            async with asyncio.timeout(10):
                assert (await anext(messages)).data == {"left": True}


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: str = "chat.message"
    text: str
    at: datetime | None = None
    blob: bytes | None = None


class ChatSend(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: str
    text: str
    at: datetime | None = None


class Chat(Noted):
    async def connect(self) -> None:
        await self.accept()
        await self.group_add("room")

    @handles("chat.message")
    async def on_chat(self, message: ChatMessage) -> None:
        blob = None if message.blob is None else message.blob.hex()
        await self.send_json({"chat": message.text, "at": message.at, "blob": blob})

    async def room_renamed(self, event: Message) -> None:
        await self.send_json({"renamed": event["name"], "position": str(event.position)})

    async def fail_now(self, event: Message) -> None:
        raise RuntimeError("secret")

    async def fail_unavailable(self, event: Message) -> None:
        raise DatabaseUnavailable("no route to 10.0.0.1")

    @receives("chat.send")
    async def on_send(self, content: ChatSend) -> None:
        await self.layer.send("room", ChatMessage(text=content.text, at=content.at, blob=b"\0\xff"))

    @receives("raw", "cooked")
    async def on_raw(self, content: dict[str, Any]) -> None:
        await self.send_json({"raw": content})

    @receives("fail")
    async def on_fail(self, content: Any) -> None:
        raise RuntimeError("secret")

    @receives("full")
    async def on_full(self, content: Any) -> None:
        raise ChannelFull("room", 5)


class TestHandlers:
    async def test_in_both_directions(self, layer: ChannelLayer) -> None:
        async with serving(Chat, layer) as open_socket, open_socket() as socket:
            await socket.send('{"type":"chat.send","text":"hello","at":"2026-01-31T12:00:00Z"}')
            assert await answer(socket) == {
                "chat": "hello",
                "at": "2026-01-31T12:00:00+00:00",
                "blob": "00ff",
            }
            await layer.send("room", {"type": "room.renamed", "name": "é"})
            assert (await answer(socket))["renamed"] == "é"
            await layer.send("room", {"type": "other"})
            assert await arrived(socket) == {"type": "other"}
            assert await ask(socket, {"type": "raw", "a": 1}) == {"raw": {"type": "raw", "a": 1}}
            assert await ask(socket, {"type": "cooked"}) == {"raw": {"type": "cooked"}}
            # The two directions have nothing to do with each other.
            for kind in ("chat.message", "room.renamed", "room_renamed"):
                assert await ask(socket, {"type": kind}) == {"echo": {"type": kind}}
            await layer.send("room", {"type": "chat.send"})
            assert await arrived(socket) == {"type": "chat.send"}

    async def test_a_message_that_does_not_fit_is_dropped(
        self, layer: ChannelLayer, caplog: pytest.LogCaptureFixture
    ) -> None:
        """It stands in the log once, though several sockets receive it."""
        async with (
            serving(Chat, layer) as open_socket,
            open_socket() as socket,
            open_socket() as other,
        ):
            for each in (socket, other):
                await ask(each, 1)
            await layer.send("room", {"type": "chat.message", "txt": "x" * 5000})
            await layer.send("room", {"type": "chat.message", "text": "good"})
            for each in (socket, other):
                assert (await answer(each))["chat"] == "good"
        (record,) = [r for r in caplog.records if "does not fit" in r.getMessage()]
        assert record.levelno == logging.WARNING
        assert "Chat.on_chat" in record.getMessage()
        assert len(record.getMessage()) < 1000

    async def test_content_that_does_not_fit(self, memory: MemoryLayer) -> None:
        async with serving(Chat, memory) as open_socket, open_socket() as socket:
            error = await ask(socket, {"type": "chat.send", "text": 5, "k" * 5000: "v" * 5000})
            assert (error["type"], error["code"]) == ("error", "invalid_content")
            assert error["detail"] == "not a valid 'chat.send'"
            assert [problem["loc"] for problem in error["errors"]] == [["text"], ["k" * 200]]
            assert all(set(problem) == {"loc", "msg"} for problem in error["errors"])
            assert len(json.dumps(error)) < 1000
            many = {"type": "chat.send", "text": "", **{f"key{n}": n for n in range(900)}}
            assert len((await ask(socket, many))["errors"]) == 10
            assert await ask(socket, 1) == {"echo": 1}

    async def test_an_error_that_is_the_clients(self, memory: MemoryLayer) -> None:
        async with serving(Chat, memory) as open_socket, open_socket() as socket:
            error = await ask(socket, {"type": "full"})
            assert error["code"] == "channel_full"
            assert await ask(socket, 1) == {"echo": 1}

    @pytest.mark.parametrize("side", ["event", "content"])
    async def test_one_that_fails(
        self, layer: ChannelLayer, side: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with serving(Chat, layer) as open_socket, open_socket() as socket:
            await ask(socket, 1)
            assert len(await layer.group_members("room")) == 1
            if side == "event":
                await layer.send("room", {"type": "fail.now"})
            else:
                await socket.send('{"type":"fail"}')
            assert await closed(socket) == 1011
            assert socket.close_reason == "internal_error"
            await eventually(lambda: Chat.codes and Chat.codes[-1] == 1011)

            async def nobody_is_left() -> Any:
                return await layer.group_members("room") == []

            assert await eventually(nobody_is_left)
        assert "Chat failed" in caplog.text

    async def test_one_that_needs_the_database(self, memory: MemoryLayer) -> None:
        """The client comes back for the message, which it has not had."""
        async with serving(Chat, memory) as open_socket, open_socket() as socket:
            await ask(socket, 1)
            await memory.send("room", {"type": "fail.unavailable"})
            assert await closed(socket) == 1013
            assert "10.0.0.1" not in (socket.close_reason or "")


class TestFrames:
    async def test_unwrapped(self, layer: ChannelLayer) -> None:
        class Room(JsonConsumer):
            async def connect(self) -> None:
                await self.group_add("room")

            async def receive_json(self, content: Any) -> None:
                await self.layer.send("room", content)

            @handles("websocket.send")
            async def never(self, message: Message) -> None:
                await self.send_text("never")

        forged = {"type": "websocket.send", "mode": "json", "body": {"admin": True}}
        async with serving(Room, layer) as open_socket, open_socket() as socket:
            await socket.send('{"ready": true}')
            await arrived(socket)
            await layer.send_json_message("room", {"a": [1, "é"]}, more=1)
            assert await text(socket) == '{"a":[1,"é"]}'
            await layer.send_bytes_message("room", b"\0\xff")
            assert await text(socket) == b"\0\xff"
            await layer.send_bytes_message("room", b"")
            assert await text(socket) == b""
            await layer.send("room", websocket_json_message(None))
            assert await text(socket) == "null"
            await layer.send_json_message("room", {"inner": b"\0\xff"})
            assert await answer(socket) == {"inner": "AP8="}
            await socket.send(json.dumps(forged))
            assert await text(socket) == "never"  # it is a type as any other

    async def test_forged_ones_are_not(self, layer: ChannelLayer) -> None:
        forged = {"type": "websocket.send", "mode": "json", "body": {"admin": True}}

        class Room(Connected):
            async def receive_json(self, content: Any) -> None:
                await self.layer.send(self.channel_name, content)

        async with serving(Room, layer) as open_socket, open_socket() as socket:
            await answer(socket)
            await socket.send(json.dumps(forged))
            assert await arrived(socket) == forged


class TestBytes:
    async def test_both_ways(self, layer: ChannelLayer) -> None:
        class Blobs(BytesConsumer):
            async def connect(self) -> None:
                await self.group_add("room")

            async def receive_bytes(self, data: bytes) -> None:
                await self.layer.send("room", {"data": data})

            @handles("bye")
            async def on_bye(self, message: Message) -> None:
                await self.send_bytes(b"bye")

        async with serving(Blobs, layer) as open_socket, open_socket() as socket:
            await socket.send(b"\0\xff")
            frame = await text(socket)
            assert isinstance(frame, bytes)
            assert json.loads(frame)["attachments"] == {"/data": "AP8="}
            await socket.send("text")
            assert (await answer(socket))["code"] == "invalid_frame"
            await layer.send_bytes_message("room", b"raw")
            assert await text(socket) == b"raw"
            await layer.send_json_message("room", [1])
            assert await text(socket) == "[1]"
            await layer.send("room", {"type": "bye"})
            assert await text(socket) == b"bye"
            await socket.send(b"")
            assert json.loads(await text(socket))["attachments"] == {"/data": ""}


class TestGeneric:
    async def test_both_kinds_of_frames(self, memory: MemoryLayer) -> None:
        class Echo(WebSocketConsumer):
            async def receive(self, text: str | None = None, bytes: bytes | None = None) -> None:
                if text is not None:
                    await self.send_text(text)
                elif bytes is not None:
                    await self.send_bytes(bytes)

        async with serving(Echo, memory) as open_socket, open_socket() as socket:
            for frame in ("text", "", b"bytes", b"", "é" * 30_000):
                await socket.send(frame)
                assert await text(socket) == frame

    async def test_what_the_base_class_does(self, memory: MemoryLayer) -> None:
        """It accepts, and forwards what is sent to it."""
        for consumer in (WebSocketConsumer, JsonConsumer, BytesConsumer):
            async with serving(consumer, memory) as open_socket, open_socket() as socket:
                await socket.send(b"1")
                await eventually(lambda: bool(memory._node and memory._node.streams))
                await memory.broadcast({"n": 1})
                assert json.loads(await text(socket))["data"] == {"n": 1}

    async def test_subprotocol_and_headers(self, memory: MemoryLayer) -> None:
        class Room(WebSocketConsumer):
            async def connect(self) -> None:
                await self.accept("chat", [(b"x-room", b"1")])

        async with (
            serving(Room, memory) as open_socket,
            open_socket(subprotocols=["chat", "other"]) as socket,
        ):
            assert socket.subprotocol == "chat"
            assert socket.response is not None
            assert socket.response.headers["x-room"] == "1"

    async def test_a_close_that_fastapi_would_do(self, memory: MemoryLayer) -> None:
        class Room(Noted):
            async def receive_json(self, content: Any) -> None:
                raise WebSocketException(4403, "no")

        async with serving(Room, memory) as open_socket, open_socket() as socket:
            await socket.send("1")
            assert await closed(socket) == 4403
            assert socket.close_reason == "no"
            await eventually(lambda: Room.codes == [4403])


class TestIterating:
    async def test_a_loop_of_ones_own(self, memory: MemoryLayer) -> None:
        class Room(Noted):
            async def serve(self) -> None:
                seen = []
                async for content in self:
                    if content == "stop":
                        break
                    seen.append(content)
                    await self.dispatch(content)
                await self.send_json({"seen": seen})

            @receives("x")
            async def on_x(self, content: Any) -> None:
                await self.send_json("x")

        async with serving(Room, memory) as open_socket:
            async with open_socket() as socket:
                assert await ask(socket, 1) == {"echo": 1}
                await socket.send("{")
                assert (await answer(socket))["code"] == "invalid_json"
                assert await ask(socket, {"type": "x"}) == "x"
                assert await ask(socket, "stop") == {"seen": [1, {"type": "x"}]}
                # It has returned, and the socket is not left open.
                assert await closed(socket) == 1000
            await eventually(lambda: Room.codes == [1000])

    async def test_the_loop_ends_with_the_client(self, memory: MemoryLayer) -> None:
        ended = []

        class Room(Noted):
            async def serve(self) -> None:
                async for content in self:
                    await self.send_json(content)
                ended.append([content async for content in self])

        async with serving(Room, memory) as open_socket:
            async with open_socket() as socket:
                await ask(socket, 1)
                await socket.close(4000)
            await eventually(lambda: Room.codes == [4000])
        assert ended == [[]]

    async def test_messages_are_forwarded_beside_it(self, layer: ChannelLayer) -> None:
        class Room(Noted):
            async def serve(self) -> None:
                await self.group_add("room")
                await self.send_json("ready")
                await asyncio.Event().wait()

        async with serving(Room, layer) as open_socket, open_socket() as socket:
            assert await answer(socket) == "ready"
            await layer.send("room", {"n": 1})
            assert await arrived(socket) == {"n": 1}
            # Nobody reads what the client sends, and it can be closed all the same.
            await layer.close()
            assert await closed(socket) == 1012

    @pytest.mark.parametrize(
        ("consumer", "frames"),
        [(WebSocketConsumer, ["a", b"b"]), (BytesConsumer, [b"a", b"b"]), (JsonConsumer, [[1], 2])],
    )
    async def test_what_iterating_gives(
        self, memory: MemoryLayer, consumer: type[WebSocketConsumer], frames: list[Any]
    ) -> None:
        got: list[Any] = []

        class Room(consumer):  # type: ignore[misc, valid-type]
            async def serve(self) -> None:
                async for frame in self:
                    got.append(frame)  # noqa: PERF401 - one by one

        async with serving(Room, memory) as open_socket:
            async with open_socket() as socket:
                for frame in frames:
                    await socket.send(json.dumps(frame) if consumer is JsonConsumer else frame)
            await eventually(lambda: got == frames)

    async def test_an_error_of_the_clients_ends_a_loop_of_ones_own(
        self, memory: MemoryLayer
    ) -> None:
        class Room(Noted):
            async def serve(self) -> None:
                async for content in self:
                    await self.join(content)

        async with serving(Room, memory) as open_socket, open_socket() as socket:
            error = await ask(socket, "no channel")
            assert error["code"] == "invalid_message"
            assert await closed(socket) == 1008


class TestSpawn:
    async def test_beside_the_socket(
        self, memory: MemoryLayer, errors: Callable[[], list[str]]
    ) -> None:
        cancelled: list[bool] = []

        class Room(Noted):
            async def connect(self) -> None:
                await self.accept()
                self.spawn(self.tick())
                self.spawn(asyncio.sleep(0))  # one that returns ends nothing

            async def tick(self) -> None:
                await self.send_json("tick")
                try:
                    await asyncio.Event().wait()
                finally:
                    cancelled.append(True)

        async with serving(Room, memory) as open_socket:
            async with open_socket() as socket:
                assert await answer(socket) == "tick"
                assert await ask(socket, 1) == {"echo": 1}
                assert cancelled == []
            await eventually(lambda: cancelled == [True])
            await eventually(lambda: Room.codes == [1000])
        assert errors() == []

    @pytest.mark.parametrize("when", ["connect", "later"])
    async def test_one_that_fails(
        self, memory: MemoryLayer, when: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Room(Noted):
            async def connect(self) -> None:
                await self.accept()
                if when == "connect":
                    self.spawn(self.fail())
                    await asyncio.Event().wait()

            async def fail(self) -> None:
                raise RuntimeError("secret")

            async def receive_json(self, content: Any) -> None:
                self.spawn(self.fail())
                await asyncio.Event().wait()

        async with serving(Room, memory) as open_socket, open_socket() as socket:
            await socket.send("1")
            assert await closed(socket) == 1011
            await eventually(lambda: Room.codes == [1011])
        assert "Room failed" in caplog.text

    async def test_an_error_in_a_group(
        self, memory: MemoryLayer, errors: Callable[[], list[str]]
    ) -> None:
        """Of asyncio's TaskGroup in a handler: told as without it, and the socket goes on."""

        class Room(Noted):
            async def receive_json(self, content: Any) -> None:
                async def refuse() -> None:
                    raise SocketError("not that")

                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(refuse())

        async with serving(Room, memory) as open_socket, open_socket() as socket:
            for _ in range(2):
                assert (await ask(socket, 1))["detail"] == "not that"
            (consumer,) = Room.sockets
            consumer.close_soon(4000)
            assert await closed(socket) == 4000
        assert errors() == []

    @pytest.mark.parametrize("where", ["spawned", "handler", "event"])
    async def test_what_is_waited_for_is_cancelled(
        self, memory: MemoryLayer, where: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Not the socket's own task, which would be the server's wish."""

        class Room(Noted):
            async def wait(self) -> None:
                task = asyncio.create_task(asyncio.sleep(100))
                task.cancel()
                await task

            async def receive_json(self, content: Any) -> None:
                if where == "spawned":
                    self.spawn(self.wait())
                elif where == "handler":
                    await self.wait()
                else:
                    await self.layer.send(self.channel_name, {"type": "wait.now"})

            async def wait_now(self, event: Message) -> None:
                await self.wait()

        async with serving(Room, memory) as open_socket, open_socket() as socket:
            await socket.send("1")
            assert await closed(socket) == 1011
            await eventually(lambda: Room.codes == [1011])
        assert "has been cancelled" in caplog.text

    async def test_one_for_a_socket_that_is_refused(
        self, memory: MemoryLayer, errors: Callable[[], list[str]]
    ) -> None:
        class Room(Noted):
            async def connect(self) -> None:
                self.spawn(asyncio.sleep(0))
                await self.close()

        async with serving(Room, memory) as open_socket:
            assert await refused(open_socket()) == 403
            await eventually(lambda: Room.codes)
        assert errors() == []

    async def test_before_and_after(self, memory: MemoryLayer) -> None:
        class Room(Noted):
            def __init__(self, websocket: WebSocket, layer: ChannelLayer) -> None:
                super().__init__(websocket, layer)
                with pytest.raises(RuntimeError, match="while their socket is served"):
                    self.spawn(asyncio.sleep(0))

            async def disconnect(self, code: int) -> None:
                with pytest.raises(RuntimeError, match="while their socket is served"):
                    self.spawn(asyncio.sleep(0))
                await super().disconnect(code)

        async with serving(Room, memory) as open_socket:
            async with open_socket() as socket:
                await ask(socket, 1)
            await eventually(lambda: Room.codes == [1000])


class TestEnds:
    async def test_the_database_is_away_at_the_start(self, database_url: str) -> None:
        class Room(Noted):
            pass

        async with (
            TcpProxy(database_url) as proxy,
            PostgresLayer(proxy.url) as layer,
            serving(Room, layer) as open_socket,
        ):
            await proxy.cut(refuse=True)
            assert await refused(open_socket()) == 503
            proxy.resume()

            async def is_back() -> Any:
                async with open_socket() as socket:
                    return bool(await ask(socket, 1) == {"echo": 1})

            assert await eventually(is_back)
        # Who has not been asked to connect() has nothing to put in order.
        assert Room.codes == [1000]

    async def test_the_database_is_away_at_the_end(
        self, database_url: str, errors: Callable[[], list[str]]
    ) -> None:
        async with (
            TcpProxy(database_url) as proxy,
            PostgresLayer(proxy.url) as layer,
            PostgresLayer(database_url) as other,
            serving(Connected, layer) as open_socket,
        ):
            Connected.codes.clear()
            async with open_socket() as socket:
                await answer(socket)
                await ask(socket, {"add": "room"})
                await proxy.cut(refuse=True)
            await eventually(lambda: Connected.codes == [1000])
            assert len(await other.group_members("room")) == 1
            proxy.resume()

            async def nobody_is_left() -> Any:
                return await other.group_members("room") == []

            assert await eventually(nobody_is_left, timeout=20)
        assert errors() == []

    async def test_a_removal_that_fails_hides_nothing(
        self, memory: MemoryLayer, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Broken(MemoryLayer):
            async def delete_channel(self, channel: str) -> None:
                raise ZeroDivisionError

        class Room(Noted):
            async def disconnect(self, code: int) -> None:
                raise LookupError("disconnect failed")

        async with (
            Broken() as layer,
            serving(Room, layer) as open_socket,
            open_socket() as socket,
        ):
            await socket.send("1")
            await answer(socket)
        raised = [r.exc_info[1] for r in caplog.records if r.exc_info]
        assert {type(error) for error in raised} == {ZeroDivisionError, LookupError}

    async def test_a_goodbye_that_fails_is_logged(
        self, memory: MemoryLayer, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Also where the application answers our errors: the socket is closed by then."""

        class Room(Noted):
            async def disconnect(self, code: int) -> None:
                raise DatabaseUnavailable("the goodbye was not stored")

        app = FastAPI(exception_handlers=exception_handlers())  # type: ignore[arg-type]
        app.add_api_websocket_route("/ws", Room.as_endpoint(memory))
        async with serve(app) as address, connect(f"ws://{address}/ws") as socket:
            await socket.send("1")
            await answer(socket)
        assert "the goodbye was not stored" in caplog.text

    async def test_a_removal_takes_a_limited_time(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Stuck(MemoryLayer):
            async def delete_channel(self, channel: str) -> None:
                await asyncio.Event().wait()

        monkeypatch.setattr("pgchannels.web.connection.CLOSING_TIME", 0.05)
        async with Stuck() as layer, serving(Noted, layer) as open_socket:
            async with open_socket() as socket:
                await ask(socket, 1)
            await eventually(lambda: "in time" in caplog.text)

    async def test_the_layer_closes_while_a_channel_is_made(self) -> None:
        class Closing(MemoryLayer):
            async def new_channel(self, *args: Any, **options: Any) -> str:
                raise ChannelLayerClosed

        async with Closing() as layer, serving(Noted, layer) as open_socket:
            assert await refused(open_socket()) == 503

    async def test_something_else_is_wrong_at_the_start(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Broken(MemoryLayer):
            async def new_channel(self, *args: Any, **options: Any) -> str:
                raise ZeroDivisionError

        async with Broken() as layer, serving(Noted, layer) as open_socket:
            assert await refused(open_socket()) == 500
        assert "Noted failed" in caplog.text
