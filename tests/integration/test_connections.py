"""Connections by a manager, through a real server with a real client."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest
from fastapi import FastAPI
from starlette.exceptions import HTTPException, WebSocketException
from starlette.websockets import WebSocket, WebSocketDisconnect
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from pgchannels import (
    ChannelLayer,
    Command,
    ConfigurationError,
    DatabaseUnavailable,
    FixedWindow,
    InvalidMessage,
    InvalidPosition,
    MemoryLayer,
    Message,
)
from pgchannels.web import (
    Authentication,
    AuthenticationError,
    AuthorizationError,
    BytesConsumer,
    Capabilities,
    Connection,
    ConnectionManager,
    ConnectionState,
    CookieToken,
    FirstMessageToken,
    Frame,
    HeaderToken,
    Heartbeat,
    Identity,
    JsonConsumer,
    Limits,
    Middleware,
    Origins,
    RateLimit,
    Shutdown,
    SocketError,
    SubprotocolToken,
    TokenExpired,
    Validation,
    WebSocketConsumer,
    lifespan,
    receives,
)
from pgchannels.web.auth import KeysUnavailable
from pgchannels.web.errors import TooManyChannels
from tests.support.eventually import eventually
from tests.support.sockets import answer, ask, closed, serve


class Address(str):
    """Where the endpoint is served."""

    __slots__ = ()

    def __call__(self, query: str = "", **options: Any) -> connect:
        return connect(f"ws://{self}/ws?{query}", max_queue=None, **options)


Serve = Callable[[Connection], Awaitable[None]]


async def room(connection: Connection) -> None:
    """Reads ``?group=``, and does what the client says."""
    if group := connection.query_params.get("group"):
        await connection.group_add(group, after=connection.resume_position)
    await connection.send_json({"ready": connection.id})
    async for content in connection:
        await do(connection, content)


async def do(connection: Connection, content: Any) -> None:
    match content:
        case {"fail": str(text)}:
            raise RuntimeError(text)
        case {"join": str(group)}:
            await connection.join(group)
        case {"add": str(group)}:
            await connection.group_add(group)
        case {"publish": str(group)}:
            await connection.publish(group, {"n": 1}, except_self=True)
        case {"history": str(group)}:
            page = await connection.history(group)
            await connection.send_json([message.data for message in page.messages])
        case {"presence": str(group)}:
            await connection.send_json(len(await connection.presence(group)))
        case {"tell": str(text)}:
            await connection.tell(SocketError(text, code="told"))
        case {"close": int(code)}:
            await connection.close(code, "as you say")
        case _:
            await connection.send_json({"got": content})


@asynccontextmanager
async def serving(
    connections: ConnectionManager, serve_one: Serve = room, **options: Any
) -> AsyncIterator[Address]:
    app = FastAPI()

    @app.websocket("/ws")
    async def endpoint(websocket: WebSocket, user: str | None = None) -> None:
        async with connections.connect(websocket, user_id=user) as connection:
            await serve_one(connection)

    async with serve(app, **options) as address:
        yield Address(address)


async def ready(socket: ClientConnection) -> str:
    """The id of the connection, once it can be talked to."""
    return cast("str", (await answer(socket))["ready"])


async def refused(socket: connect) -> tuple[int, Any]:
    """The status that a handshake is refused with, and the error in the body."""
    with pytest.raises(InvalidStatus) as raised:
        async with socket:
            pass
    response = raised.value.response
    return response.status_code, json.loads(response.body)["detail"]


async def gone(connections: ConnectionManager) -> None:
    await eventually(lambda: len(connections) == 0)


class TestFunctions:
    async def test_messages_both_ways(
        self, layer: ChannelLayer, errors: Callable[[], list[str]]
    ) -> None:
        connections = ConnectionManager(layer)
        async with serving(connections) as address:
            async with address("group=room") as socket, address("group=room") as other:
                await ready(socket)
                await ready(other)
                assert await ask(socket, [1, "two"]) == {"got": [1, "two"]}
                await socket.send(json.dumps({"publish": "room"}))
                assert (await answer(other))["data"] == {"n": 1}
                assert await ask(socket, "not its own") == {"got": "not its own"}
            await gone(connections)
        assert errors() == []
        assert await layer.group_members("room") == []

    async def test_resume(self, layer: ChannelLayer) -> None:
        connections = ConnectionManager(layer)
        async with serving(connections) as address:
            async with address("group=room") as socket:
                await ready(socket)
                await layer.send("room", {"n": 0})
                position = (await answer(socket))["position"]
            await layer.send("room", {"n": 1})
            await layer.send("room", {"n": 2})
            async with address(f"group=room&after={position}") as socket:
                # What is replayed and what the endpoint says are not in any order.
                got = [await answer(socket) for _ in range(3)]
                assert [each["data"]["n"] for each in got if "data" in each] == [1, 2]

    @pytest.mark.parametrize(
        ("after", "code", "close"),
        [("1-99999", "unknown_position", 3010), ("zz", "invalid_position", 1008)],
    )
    async def test_a_position_that_is_no_good(
        self, layer: ChannelLayer, after: str, code: str, close: int
    ) -> None:
        async with (
            serving(ConnectionManager(layer)) as address,
            address(f"group=room&after={after}") as socket,
        ):
            assert (await answer(socket))["code"] == code
            assert await closed(socket) == close

    async def test_what_the_program_sends_wrongly_is_in_the_log(
        self, memory: MemoryLayer, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO)

        async def wrong(connection: Connection) -> None:
            await connection.publish("room", "no object")

        async with serving(ConnectionManager(memory), wrong) as address, address() as socket:
            assert (await answer(socket))["code"] == "invalid_message"
        assert "answers with an error" in caplog.text

    async def test_nobody_has_opened_the_layer(self, errors: Callable[[], list[str]]) -> None:
        async with serving(ConnectionManager(MemoryLayer())) as address:
            assert (await refused(address()))[0] == 503
        (error,) = errors()
        assert "not open" in error

    async def test_the_block_ends_with_the_client(self, memory: MemoryLayer) -> None:
        ended: list[str] = []

        async def waiting(connection: Connection) -> None:
            try:
                async for _ in connection:
                    pass
                ended.append("iteration")
            finally:
                ended.append(connection.state.value)

        connections = ConnectionManager(memory)
        async with serving(connections, waiting) as address:
            async with address():
                await eventually(lambda: len(connections))
            await gone(connections)
        assert ended == ["iteration", "closing"]
        assert connections.statistics().closed == {1000: 1}

    async def test_the_block_is_cancelled_by_what_fails_beside_it(
        self, memory: MemoryLayer, errors: Callable[[], list[str]]
    ) -> None:
        cancelled = asyncio.Event()

        async def fail() -> None:
            raise DatabaseUnavailable("away")

        async def busy(connection: Connection) -> None:
            connection.spawn(fail())
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.set()
                raise

        connections = ConnectionManager(memory)
        async with serving(connections, busy) as address, address() as socket:
            assert (await answer(socket))["code"] == "unavailable"
            assert await closed(socket) == 1013
            await gone(connections)
        assert cancelled.is_set()
        assert errors() == []

    async def test_an_unexpected_exception(
        self, memory: MemoryLayer, errors: Callable[[], list[str]]
    ) -> None:
        connections = ConnectionManager(memory)
        async with serving(connections) as address, address() as socket:
            await ready(socket)
            error = await ask(socket, {"fail": "secret"})
            assert error["code"] == "internal_error"
            assert "secret" not in json.dumps(error)
            assert await closed(socket) == 1011
            await gone(connections)
        # The server has it as well, for it was raised again.
        assert any(error["error_id"] in line for line in errors())
        assert any("Exception in ASGI application" in line for line in errors())
        assert connections.statistics().errors == {"internal_error": 1}

    @pytest.mark.parametrize(
        ("error", "code"),
        [
            (SocketError("you may not", code="no", disconnect=True), 1008),
            (AuthorizationError(), 3003),
            (WebSocketException(4001, "mine"), 4001),
        ],
    )
    async def test_an_exception_for_the_client(
        self, memory: MemoryLayer, errors: Callable[[], list[str]], error: Exception, code: int
    ) -> None:
        async def raising(_: Connection) -> None:
            raise error

        async with serving(ConnectionManager(memory), raising) as address, address() as socket:
            assert await closed(socket) == code
        assert errors() == []
        if isinstance(error, SocketError):
            assert error.connection is not None

    async def test_an_error_that_is_told(self, memory: MemoryLayer) -> None:
        connections = ConnectionManager(memory)
        async with serving(connections) as address, address() as socket:
            await ready(socket)
            error = await ask(socket, {"tell": "not so"})
            assert (error["code"], error["detail"]) == ("told", "not so")
            assert await ask(socket, 1) == {"got": 1}
        assert connections.statistics().errors == {"told": 1}

    async def test_closed_by_the_endpoint(self, memory: MemoryLayer) -> None:
        connections = ConnectionManager(memory)
        async with serving(connections) as address, address() as socket:
            await ready(socket)
            await socket.send('{"close": 4002}')
            assert await closed(socket) == 4002
            assert socket.close_reason == "as you say"
            await gone(connections)
        assert connections.statistics().closed == {4002: 1}

    async def test_the_end_of_the_block_closes(self, memory: MemoryLayer) -> None:
        async def short(connection: Connection) -> None:
            await connection.send_text("bye")

        async with serving(ConnectionManager(memory), short) as address, address() as socket:
            assert await socket.recv() == "bye"
            assert await closed(socket) == 1000

    async def test_frames_that_are_not_json(self, memory: MemoryLayer) -> None:
        async def echo(connection: Connection) -> None:
            async for frame in connection.frames():
                if isinstance(frame.raw, str):
                    await connection.send_text(frame.raw)
                else:
                    await connection.send_bytes(frame.raw)

        connections = ConnectionManager(memory, max_frame_size=10)
        async with serving(connections, echo) as address, address() as socket:
            for sent in ("{", b"\xff", "", "{}"):
                await socket.send(sent)
                assert await socket.recv() == sent
            assert (await ask_text(socket, "x" * 11))["code"] == "frame_too_large"

    async def test_a_subprotocol_and_headers(self, memory: MemoryLayer) -> None:
        connections = ConnectionManager(memory)
        app = FastAPI()

        @app.websocket("/ws")
        async def endpoint(websocket: WebSocket) -> None:
            options: Any = {"subprotocol": "chat", "headers": [(b"x-node", b"1")]}
            async with connections.connect(websocket, **options) as connection:
                await room(connection)

        async with serve(app) as address, Address(address)(subprotocols=["chat"]) as socket:
            await ready(socket)
            assert socket.subprotocol == "chat"
            assert socket.response is not None
            assert socket.response.headers["x-node"] == "1"

    @pytest.mark.parametrize("done", [True, False])
    async def test_a_group_that_was_being_joined_when_its_code_was_cancelled(
        self, *, done: bool
    ) -> None:
        """It is read if the connection has become a member in that moment, and only then."""

        class Cancelled(MemoryLayer):
            async def group_add(self, *args: Any, **options: Any) -> None:
                if done:
                    await super().group_add(*args, **options)
                raise asyncio.CancelledError

        read: list[frozenset[str]] = []

        async def endpoint(connection: Connection) -> None:
            with suppress(asyncio.CancelledError):
                await connection.group_add("room")
            read.append(connection.groups)
            await room(connection)

        async with (
            Cancelled() as layer,
            serving(ConnectionManager(layer), endpoint) as address,
            address() as socket,
        ):
            await ready(socket)
            assert bool(await layer.group_members("room")) is done
        assert read == [frozenset(["room"] if done else [])]

    async def test_what_it_says_of_itself(self, memory: MemoryLayer) -> None:
        found: list[Connection] = []

        async def note(connection: Connection) -> None:
            found.append(connection)
            await connection.identify("ada", {"name": "Ada"})
            await room(connection)

        connections = ConnectionManager(memory)
        async with serving(connections, note) as address, address("group=room") as socket:
            name = await ready(socket)
            await ask(socket, "é")
            (connection,) = connections
            assert connections.get(name) is connection is found[0]
            assert connections.get_user_connections("ada") == [connection]
            assert connections.get_user_connections("bob") == []
            assert connection.state is ConnectionState.OPEN
            assert 0 <= connection.idle_time < 60
            told = connection.to_dict()
            assert json.loads(json.dumps(told)) == told
            assert told["id"] == name
            assert told["user_id"] == "ada"
            assert told["metadata"] == {"name": "Ada"}
            assert told["groups"] == ["room"]
            assert (told["messages_in"], told["messages_out"]) == (1, 2)
            assert told["bytes_in"] == len('"\\u00e9"')
            (info,) = [info async for info in connections.everywhere()]
            assert (info.channel, info.user_id, info.metadata) == (name, "ada", {"name": "Ada"})
            assert await connections.count() == await connections.count(user_id="ada") == 1
        await gone(connections)
        assert found[0].state is ConnectionState.CLOSED
        assert found[0].close_code == 1000
        assert await connections.count() == 0


class TestTaking:
    """Frames are there for whoever takes the next one, whatever ends the waiting for them."""

    async def test_a_timeout_is_not_the_end(
        self, memory: MemoryLayer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of frames(), of iterating, and of connections of all nodes."""
        connections = ConnectionManager(memory)
        find = memory.connections

        async def slow(**options: Any) -> Any:
            await asyncio.sleep(0.05)
            return await find(**options)

        monkeypatch.setattr(memory, "connections", slow)

        async def endpoint(connection: Connection) -> None:
            for each in (connection, connection.frames()):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(anext(each), 0.01)
                await connection.send_json("now")
                got: Any = await anext(cast("AsyncIterator[Any]", each))
                await connection.send_json(got.raw if isinstance(got, Frame) else got)
            found = connections.everywhere()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(found), 0.01)
            await connection.send_json([info.channel async for info in found] == [connection.id])

        async with serving(connections, endpoint) as address, address() as socket:
            for _ in range(2):
                assert await answer(socket) == "now"
                assert await ask(socket, "x") in ("x", '"x"')
            assert await answer(socket) is True

    @pytest.mark.parametrize("kind", ["function", "json", "bytes"])
    async def test_a_timeout_while_middleware_waits(self, memory: MemoryLayer, kind: str) -> None:
        """Its work goes on, and is not done twice."""
        seen: list[Frame] = []
        timeouts = asyncio.Semaphore(0)

        class Slow(Middleware):
            async def inbound(self, connection: Connection, frame: Frame) -> Frame | None:
                seen.append(frame)
                await timeouts.acquire()
                return frame

        async def poll(connection: Any) -> None:
            for _ in range(3):
                got = None
                while got is None:
                    try:
                        got = await asyncio.wait_for(anext(connection), 0.01)
                    except TimeoutError:
                        if seen:
                            timeouts.release()
                await connection.send_text(got.decode() if isinstance(got, bytes) else str(got))

        class Json(JsonConsumer):
            serve = poll

        class Binary(BytesConsumer):
            serve = poll

        connections = ConnectionManager(memory, middleware=Slow())
        app = FastAPI()

        @app.websocket("/function")
        async def endpoint(websocket: WebSocket) -> None:
            async with connections.connect(websocket) as connection:
                await poll(connection)

        app.add_api_websocket_route("/json", Json.as_endpoint(connections))
        app.add_api_websocket_route("/bytes", Binary.as_endpoint(connections))
        async with serve(app) as served, connect(f"ws://{served}/{kind}") as socket:
            for n in range(3):
                await socket.send(str(n).encode() if kind == "bytes" else str(n))
            assert [await answer(socket) for _ in range(3)] == [0, 1, 2]
        assert len(seen) == 3

    async def test_a_timeout_while_an_answer_is_sent(self, memory: MemoryLayer) -> None:
        """To a ping, say: the client gets it."""
        frames, timeouts = asyncio.Event(), 0

        async def endpoint(connection: Connection) -> None:
            nonlocal timeouts
            send = connection.websocket.send

            async def slow(message: Any) -> None:
                frames.set()
                await asyncio.sleep(0.05)
                await send(message)

            connection.websocket.send = slow  # type: ignore[method-assign]
            while True:
                try:
                    await asyncio.wait_for(anext(connection), 0.01)
                except TimeoutError:
                    timeouts += frames.is_set()
                except StopAsyncIteration:
                    return

        connections = ConnectionManager(memory, max_frame_size=50)
        async with serving(connections, endpoint) as address, address() as socket:
            assert await ask(socket, {"type": "ping", "n": 1}) == {"type": "pong", "n": 1}
            assert (await ask(socket, "x" * 50))["code"] == "frame_too_large"
            assert (await ask_text(socket, "{"))["code"] == "invalid_json"
        assert timeouts

    async def test_by_two_tasks(self, memory: MemoryLayer) -> None:
        """Each frame is given to one of them; both learn of the end."""
        got: list[int] = []
        ended = 0

        async def endpoint(connection: Connection) -> None:
            async def take() -> None:
                nonlocal ended
                async for number in connection:
                    got.append(number)
                    await connection.send_json(number)
                ended += 1

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(take())
                tasks.create_task(take())

        connections = ConnectionManager(memory)
        async with serving(connections, endpoint) as address:
            async with address() as socket:
                for n in range(10):
                    await socket.send(str(n))
                assert sorted([await answer(socket) for _ in range(10)]) == list(range(10))
            await gone(connections)
        assert sorted(got) == list(range(10))
        assert ended == 2

    async def test_past_the_connection(
        self, memory: MemoryLayer, errors: Callable[[], list[str]]
    ) -> None:
        """By Starlette's own socket, which then misses nothing of what was read ahead."""

        async def endpoint(connection: Connection) -> None:
            await connection.send_json("now")
            await eventually(lambda: connection._inbox.ahead)
            while True:
                await connection.send_text(await connection.websocket.receive_text())

        connections = ConnectionManager(memory)
        async with serving(connections, endpoint) as address:
            async with address() as socket:
                assert await answer(socket) == "now"
                for n in range(3):
                    assert await ask(socket, n) == n
            await gone(connections)
        assert connections.statistics().closed == {1000: 1}
        assert errors() == []

    async def test_one_frame_is_read_ahead_and_no_more(self, memory: MemoryLayer) -> None:
        """Else a client could fill the memory of a server whose handlers are busy."""
        go_on = asyncio.Event()

        async def endpoint(connection: Connection) -> None:
            await connection.send_json("now")
            await go_on.wait()
            async for content in connection:
                await connection.send_json(content)

        connections = ConnectionManager(memory)
        async with serving(connections, endpoint) as address, address() as socket:
            assert await answer(socket) == "now"
            for n in range(10):
                await socket.send(str(n))
            (connection,) = connections
            await eventually(lambda: connection._inbox.ahead)
            assert connection.messages_in == 1
            go_on.set()
            assert [await answer(socket) for _ in range(10)] == list(range(10))


class TestTheClientHasLeft:
    """Its place is free soon, whatever the code that serves it waits for."""

    @pytest.fixture(autouse=True)
    def quick(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("pgchannels.web.wire.LEAVING_TIME", 0.05)
        monkeypatch.setattr("pgchannels.web.wire.LOOK_EVERY", 0.05)

    async def push_only(self, connection: Connection) -> None:
        await asyncio.Event().wait()

    async def read_beside(self, connection: Connection) -> None:
        async def read() -> None:
            async for _ in connection:
                pass

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(read())
            tasks.create_task(asyncio.Event().wait())

    async def busy_handler(self, connection: Connection) -> None:
        async for _ in connection:
            await asyncio.Event().wait()

    @pytest.mark.parametrize("how", ["closes", "breaks"])
    @pytest.mark.parametrize("what", ["push_only", "read_beside", "busy_handler"])
    async def test_a_function(
        self, memory: MemoryLayer, errors: Callable[[], list[str]], what: str, how: str
    ) -> None:
        connections = ConnectionManager(memory, limits=Limits(per_user=1))
        async with serving(connections, getattr(self, what)) as address:
            for _ in range(2):
                async with address("user=ada") as socket:
                    await socket.send("1")
                    if how == "breaks":
                        socket.transport.abort()
                await gone(connections)
        assert errors() == []

    @pytest.mark.parametrize("what", ["connect", "receive_json", "serve", "spawned"])
    async def test_a_consumer(
        self, memory: MemoryLayer, errors: Callable[[], list[str]], what: str
    ) -> None:
        codes: list[int] = []

        class Waiting(JsonConsumer):
            async def connect(self) -> None:
                await self.accept()
                await self.wait_in("connect")

            async def receive_json(self, content: Any) -> None:
                await self.wait_in("receive_json")

            async def serve(self) -> None:
                if what == "spawned":
                    self.spawn(super().serve())
                    await asyncio.Event().wait()
                await self.wait_in("serve")
                await super().serve()

            async def disconnect(self, code: int) -> None:
                codes.append(code)

            async def wait_in(self, where: str) -> None:
                if where == what:
                    await asyncio.Event().wait()

        connections = ConnectionManager(memory)
        app = FastAPI()
        app.add_api_websocket_route("/ws", Waiting.as_endpoint(connections))
        async with serve(app) as served:
            async with Address(served)() as socket:
                await socket.send("1")
                (found,) = await eventually(lambda: list(connections))
                await eventually(lambda: found.messages_in)
                await socket.close(4001)
            await gone(connections)
        # Where its frame waits, it is known only that the connection is lost.
        assert codes == [1006 if what in ("connect", "serve") else 4001]
        assert errors() == []

    async def test_a_handler_may_come_to_its_end(
        self, memory: MemoryLayer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What was sent before the client left is handled."""
        monkeypatch.setattr("pgchannels.web.wire.LEAVING_TIME", 30.0)
        handled: list[int] = []

        async def endpoint(connection: Connection) -> None:
            async for content in connection:
                await asyncio.sleep(0.05)
                handled.append(content)

        connections = ConnectionManager(memory)
        async with serving(connections, endpoint) as address:
            async with address() as socket:
                for n in range(3):
                    await socket.send(str(n))
            await gone(connections)
        assert handled == [0, 1, 2]


class TestMistakesOfTheClient:
    async def test_not_json(self, memory: MemoryLayer) -> None:
        async with serving(ConnectionManager(memory)) as address, address() as socket:
            await ready(socket)
            for frame in ("{", b"\xff", "[" * 5000):
                await socket.send(frame)
                assert (await answer(socket))["code"] == "invalid_json"
            assert await ask(socket, 1) == {"got": 1}

    async def test_a_frame_that_is_too_large(self, memory: MemoryLayer) -> None:
        connections = ConnectionManager(memory, max_frame_size=1000)
        async with serving(connections) as address, address() as socket:
            await ready(socket)
            for text in ("x" * 998, "é" * 499):
                assert await ask_text(socket, json.dumps(text, ensure_ascii=False)) == {"got": text}
            for text in ("x" * 999, "é" * 500):
                error = await ask_text(socket, json.dumps(text, ensure_ascii=False))
                assert (error["code"], error["context"]) == ("frame_too_large", {"limit": 1000})
            assert await ask(socket, 1) == {"got": 1}

    async def test_compressed_frames_count_as_what_they_are(self, memory: MemoryLayer) -> None:
        connections = ConnectionManager(memory, max_frame_size=1000)
        async with serving(connections, **connections.server_options()) as address:
            async with address(compression="deflate") as socket:
                await ready(socket)
                assert (await ask(socket, "x" * 1500))["code"] == "frame_too_large"
                # More than the server takes: it is not even unpacked to its end.
                await socket.send(json.dumps("x" * 10_000_000))
                assert await closed(socket) == 1009
            await gone(connections)

    async def test_ping(self, memory: MemoryLayer) -> None:
        async with serving(ConnectionManager(memory)) as address, address() as socket:
            await ready(socket)
            assert await ask(socket, {"type": "ping", "n": 7}) == {"type": "pong", "n": 7}
            await socket.send('{"type": "pong"}')  # is not answered
            assert await ask(socket, 1) == {"got": 1}
            for depth in (260, 1000):
                deep = '{"type": "ping", "n": ' + "[" * depth + "]" * depth + "}"
                told = await ask_text(socket, deep)
                assert told["code"] == "invalid_message"
            assert await ask(socket, {"type": "ping"}) == {"type": "pong"}
            # Nobody has authenticated here, so this is the endpoint's.
            refresh = {"type": "auth.refresh", "token": "x"}
            assert await ask(socket, refresh) == {"got": refresh}


async def ask_text(socket: ClientConnection, text: str) -> Any:
    await socket.send(text)
    return await answer(socket)


class TestHostileClients:
    async def test_a_hundred_thousand_subscriptions(self, memory: MemoryLayer) -> None:
        async def endpoint(connection: Connection) -> None:
            refused = 0
            for n in range(100_000):
                try:
                    await connection.join(f"room:{n}")
                except SocketError:
                    refused += 1
            await connection.send_json({"refused": refused, "groups": len(connection.groups)})

        connections = ConnectionManager(memory)  # the limit is there by default
        async with serving(connections, endpoint) as address, address(open_timeout=60) as socket:
            async with asyncio.timeout(60):
                told = json.loads(await socket.recv())
            assert told == {"refused": 99_000, "groups": 1000}

    async def test_frames_after_close(
        self, memory: MemoryLayer, errors: Callable[[], list[str]]
    ) -> None:
        """RFC 6455, 5.5.1: after a close frame, nothing that comes is looked at."""
        heard: list[Any] = []

        async def endpoint(connection: Connection) -> None:
            await connection.send_json({"ready": connection.id})
            heard.extend([content async for content in connection])

        connections = ConnectionManager(memory)
        async with serving(connections, endpoint) as address, address() as socket:
            await ready(socket)
            # Masked with zeros: "1", a close with 1000, "2", in one packet.
            one, two = (bytes([0x81, 0x81, 0, 0, 0, 0]) + digit for digit in (b"1", b"2"))
            close = bytes([0x88, 0x82, 0, 0, 0, 0, 0x03, 0xE8])
            socket.transport.write(one + close + two)
            await gone(connections)
        assert heard in ([1], [])
        assert errors() == []

    async def test_a_handshake_that_does_not_end(self, memory: MemoryLayer) -> None:
        """It costs the server a connection, and nobody else anything; nothing is kept for it."""
        connections = ConnectionManager(memory)
        async with serving(connections) as address:
            host, port = address.split(":")
            writers = []
            for _ in range(50):
                _, writer = await asyncio.open_connection(host, int(port))
                writer.write(b"GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nX-Slow: ")
                writers.append(writer)
            async with address() as socket:
                await ready(socket)
                assert await ask(socket, 1) == {"got": 1}
                assert len(connections) == await connections.count() == 1
            for writer in writers:
                writer.close()
                await writer.wait_closed()


class TestLimits:
    async def test_of_a_user(self, layer: ChannelLayer) -> None:
        connections = ConnectionManager(layer, limits=Limits(per_user=2))
        async with serving(connections) as address:
            async with address("user=ada") as one, address("user=ada") as two:
                await ready(one)
                await ready(two)
                status, error = await refused(address("user=ada"))
                assert status == 429
                assert error["code"] == "too_many_connections"
                assert error["context"] == {"scope": "user", "limit": 2}
                async with address("user=bob") as other, address() as nobody:
                    await ready(other)
                    await ready(nobody)
            await gone(connections)
            async with address("user=ada") as socket:
                await ready(socket)
        assert connections.statistics().refused == {"too_many_connections": 1}

    @pytest.mark.parametrize("scope", ["node", "total"])
    async def test_of_all(self, layer: ChannelLayer, scope: str) -> None:
        limits = Limits(per_node=1) if scope == "node" else Limits(total=1)
        async with serving(ConnectionManager(layer, limits=limits)) as address, address() as socket:
            await ready(socket)
            status, error = await refused(address())
            assert (status, error["context"]["scope"]) == (503, scope)

    async def test_by_identify(self, layer: ChannelLayer) -> None:
        async def endpoint(connection: Connection) -> None:
            await connection.identify("ada")
            await room(connection)

        connections = ConnectionManager(layer, limits=Limits(per_user=1))
        async with serving(connections, endpoint) as address, address() as socket:
            await ready(socket)
            async with address() as other:
                assert (await answer(other))["code"] == "too_many_connections"
                assert await closed(other) == 1008
            assert await ask(socket, 1) == {"got": 1}

    async def test_of_consumers(self, layer: ChannelLayer) -> None:
        class Room(JsonConsumer):
            async def connect(self, user: str) -> None:
                await self.identify(user)

        connections = ConnectionManager(layer, limits=Limits(per_user=1))
        app = FastAPI()
        app.add_api_websocket_route("/ws", Room.as_endpoint(connections))
        async with serve(app) as address:
            open_socket = Address(address)
            async with open_socket("user=ada") as socket:
                await ask(socket, {"type": "ping"})
                assert (await refused(open_socket("user=ada")))[0] == 429
                assert [type(each) for each in connections] == [Room]

    async def test_of_a_group(self, layer: ChannelLayer) -> None:
        connections = ConnectionManager(layer, limits=Limits(group_members=1))
        async with serving(connections) as address, address() as one, address() as two:
            await ready(one)
            await ready(two)
            await one.send('{"add": "room"}')
            await ask(one, 1)
            async with address("group=room") as third:
                assert (await answer(third))["code"] == "group_full"
                assert await closed(third) == 1008

    async def test_of_channels_that_one_reads(self, memory: MemoryLayer) -> None:
        connections = ConnectionManager(memory, limits=Limits(groups=3))

        async def endpoint(connection: Connection) -> None:
            for n in range(3):
                await connection.join(f"room:{n}")
            await connection.join("room:0")  # once more is none more
            with pytest.raises(SocketError) as raised:
                await connection.join("room:3")
            assert raised.value.code == "too_many_channels"
            await connection.leave("room:0")
            with pytest.raises(ValueError, match="invalid channel"):
                await connection.join("no channel")
            await connection.group_add("room:3")
            assert connection.groups == {"room:1", "room:2", "room:3"}
            # All at once: none slips through while another one waits.
            await connection.leave("room:1")
            results = await asyncio.gather(
                *(connection.join(f"new:{n}") for n in range(10)), return_exceptions=True
            )
            assert [type(result) for result in results].count(type(None)) == 1
            await connection.send_text('"done"')

        async with serving(connections, endpoint) as address, address() as socket:
            assert await answer(socket) == "done"


async def verify(token: str) -> Identity:
    """``<user>`` or ``<user>:<seconds that it is good for>``."""
    user, _, seconds = token.partition(":")
    if user == "bad":
        raise AuthenticationError
    now = datetime.now(UTC)
    expires_at = now + timedelta(seconds=float(seconds)) if seconds else None
    if expires_at is not None and expires_at <= now:
        raise TokenExpired
    return Identity(user, token_id=token, issued_at=now, expires_at=expires_at)


def bearer(token: str) -> dict[str, Any]:
    return {"additional_headers": {"Authorization": f"Bearer {token}"}}


class TestWhatTheBlockRaises:
    async def ended_by(self, connections: ConnectionManager, serve_one: Serve) -> int:
        """The code that a client sees, which sends one frame and waits."""
        async with serving(connections, serve_one) as address, address("after=9-9") as socket:
            with suppress(ConnectionClosed):
                await socket.send("1")
            code = await closed(socket)
        await gone(connections)
        return code

    async def test_in_a_group(self, memory: MemoryLayer, errors: Callable[[], list[str]]) -> None:
        """Of asyncio's, as several tasks on one socket have it."""

        async def serve_one(connection: Connection) -> None:
            async def receive() -> None:
                await anext(connection)
                raise AuthorizationError

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(receive())

        assert await self.ended_by(ConnectionManager(memory), serve_one) == 3003
        assert errors() == []

    async def test_the_client_is_gone(
        self, memory: MemoryLayer, errors: Callable[[], list[str]]
    ) -> None:
        async def in_tasks(connection: Connection) -> None:
            async def receive() -> None:
                async for _ in connection:
                    pass
                raise WebSocketDisconnect(1000)

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(receive())
                tasks.create_task(asyncio.Event().wait())

        async def next_frame(connection: Connection) -> None:
            await anext(connection)

        for serve_one in (in_tasks, next_frame):
            connections = ConnectionManager(memory)
            async with serving(connections, serve_one) as address:
                async with address():
                    await eventually(lambda: len(connections))  # noqa: B023
                await gone(connections)
            assert connections.statistics().closed == {1000: 1}
        assert errors() == []

    async def test_a_group_that_nobody_expected(
        self, memory: MemoryLayer, errors: Callable[[], list[str]]
    ) -> None:
        async def serve_one(connection: Connection) -> None:
            raise ExceptionGroup("", [AuthorizationError(), ValueError("bug")])

        assert await self.ended_by(ConnectionManager(memory), serve_one) == 1011
        assert len(errors()) == 2  # ours, and the server's

    async def test_a_position_of_the_clients(
        self, memory: MemoryLayer, errors: Callable[[], list[str]]
    ) -> None:
        """Told that the server shuts down, it would come again with the same one, for ever."""

        async def serve_one(connection: Connection) -> None:
            await connection.join("room", after=connection.resume_position)

        connections = ConnectionManager(memory)
        assert await self.ended_by(connections, serve_one) == 3010
        assert connections.statistics().errors == {"unknown_position": 1}
        assert errors() == []

    async def test_a_bug_after_it_was_closed(
        self, memory: MemoryLayer, errors: Callable[[], list[str]]
    ) -> None:
        async def serve_one(connection: Connection) -> None:
            await connection.close(4000)
            raise ValueError("bug")

        connections = ConnectionManager(memory)
        assert await self.ended_by(connections, serve_one) == 4000
        assert connections.statistics().errors == {"internal_error": 1}
        assert len(errors()) == 2

    @pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, RecursionError])
    async def test_a_bug_after_it_was_closed_that_looks_like_sending(
        self, memory: MemoryLayer, errors: Callable[[], list[str]], error: type[Exception]
    ) -> None:
        async def serve_one(connection: Connection) -> None:
            await connection.close(4000)
            raise error("bug")

        connections = ConnectionManager(memory)
        assert await self.ended_by(connections, serve_one) == 4000
        assert connections.statistics().errors == {"internal_error": 1}
        assert len(errors()) == 2

    async def test_sending_after_it_was_closed(
        self, memory: MemoryLayer, errors: Callable[[], list[str]]
    ) -> None:
        async def serve_one(connection: Connection) -> None:
            await connection.close(4000)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(connection.send_text("late"))
                tasks.create_task(connection.send_text("later"))

        assert await self.ended_by(ConnectionManager(memory), serve_one) == 4000
        assert errors() == []

    async def test_cancelled(self, memory: MemoryLayer) -> None:
        """Where the endpoint goes on, the socket would stay open, and nobody would serve it."""
        connections, app = ConnectionManager(memory), FastAPI()
        go_on = asyncio.Event()

        @app.websocket("/ws")
        async def endpoint(websocket: WebSocket) -> None:
            try:
                async with asyncio.timeout(0.05), connections.connect(websocket):
                    await asyncio.Event().wait()
            except TimeoutError:
                await go_on.wait()

        async with serve(app) as address, Address(address)() as socket:
            assert await closed(socket) == 1012
            go_on.set()
        assert connections.statistics().closed == {1012: 1}

    async def test_an_error_that_cannot_be_said(self, memory: MemoryLayer) -> None:
        async def serve_one(connection: Connection) -> None:
            raise SocketError(context={"what": object()}, disconnect=True)

        assert await self.ended_by(ConnectionManager(memory), serve_one) == 1011


class TestAnotherSocketHasEnded:
    """What a socket meets at another one is not its own end."""

    @asynccontextmanager
    async def leaving(
        self, connections: ConnectionManager, with_bob: Callable[[Connection], Awaitable[None]]
    ) -> AsyncIterator[ClientConnection]:
        """Ada's socket. Whatever she sends, *with_bob* is done; he has left and is still there."""
        go_on = asyncio.Event()

        class Chat(JsonConsumer):
            async def connect(self, who: str) -> None:
                await self.identify(who)

            async def receive_json(self, content: Any) -> None:
                (bob,) = connections.get_user_connections("bob")
                await with_bob(bob)
                await self.send_json({"got": content})

            async def disconnect(self, code: int) -> None:
                if self.user_id == "bob":
                    await go_on.wait()

        app = FastAPI()
        app.add_api_websocket_route("/ws", Chat.as_endpoint(connections))
        async with serve(app) as served, Address(served)("who=ada") as ada:
            async with Address(served)("who=bob") as bob:
                await eventually(lambda: connections.get_user_connections("bob"))
                bob.transport.abort()
            (found,) = connections.get_user_connections("bob")
            await eventually(lambda: found.state is ConnectionState.CLOSED)
            try:
                yield ada
            finally:
                go_on.set()
        await gone(connections)

    async def send(self, bob: Connection) -> None:
        await bob.send_json("hello")
        await bob.send_bytes(b"hello")
        await bob.tell(SocketError("not so"))

    async def join(self, bob: Connection) -> None:
        await bob.join("room")
        await bob.group_add("room")
        await bob.leave("room")
        await bob.group_discard("room")

    async def close(self, bob: Connection) -> None:
        await bob.close(4000)
        bob.close_soon(4000)

    @pytest.mark.parametrize("what", ["send", "join", "close"])
    async def test_does_nothing(
        self, memory: MemoryLayer, errors: Callable[[], list[str]], what: str
    ) -> None:
        connections = ConnectionManager(memory)
        async with self.leaving(connections, getattr(self, what)) as ada:
            for n in range(2):
                assert await ask(ada, n) == {"got": n}
        assert errors() == []
        assert connections.statistics().errors.get("unavailable") is None
        assert await memory.group_members("room") == []

    async def test_its_exceptions_are_no_sign_of_ones_own_end(
        self, memory: MemoryLayer, errors: Callable[[], list[str]]
    ) -> None:
        """Past the connection, Starlette's own socket still raises them."""

        async def starlettes(bob: Connection) -> None:
            await bob.websocket.send_text("hello")

        connections = ConnectionManager(memory)
        async with self.leaving(connections, starlettes) as ada:
            assert (await ask(ada, 1))["code"] == "internal_error"
            assert await closed(ada) == 1011
        assert "Chat failed" in errors()[0]

    async def test_a_departure_in_a_group_with_ones_own_error(self, memory: MemoryLayer) -> None:
        async def serve_one(connection: Connection) -> None:
            raise ExceptionGroup("", [WebSocketDisconnect(1001), AuthorizationError()])

        connections = ConnectionManager(memory)
        async with serving(connections, serve_one) as address, address() as socket:
            assert await closed(socket) == 1011


class TestBeforeTheBlock:
    """What ends a socket before its block begins is no error of the server's."""

    async def test_a_first_message_that_is_no_good(
        self, memory: MemoryLayer, errors: Callable[[], list[str]]
    ) -> None:
        authentication = Authentication(verify, FirstMessageToken())
        connections = ConnectionManager(memory, authentication=authentication)
        async with serving(connections) as address:
            async with address() as socket:
                await socket.send('{"type": "auth", "token": "bad"}')
                assert (await answer(socket))["code"] == "unauthenticated"
                assert await closed(socket) == 3000
                assert socket.close_reason == "unauthenticated"
            async with address() as socket:
                pass
            async with address() as socket:
                socket.transport.abort()
        assert errors() == []

    async def test_the_database_is_away(
        self,
        memory: MemoryLayer,
        errors: Callable[[], list[str]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        async def away(*_: Any, **__: Any) -> str:
            raise DatabaseUnavailable("away")

        monkeypatch.setattr(memory, "new_channel", away)
        connections = ConnectionManager(memory)
        async with serving(connections) as address:
            status, error = await refused(address())
            assert (status, error["code"]) == (503, "unavailable")
        assert errors() == []
        assert connections.statistics().refused == {"unavailable": 1}

    async def test_the_database_is_away_once_it_is_accepted(
        self, memory: MemoryLayer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def away(*_: Any, **__: Any) -> str:
            raise DatabaseUnavailable("away")

        monkeypatch.setattr(memory, "new_channel", away)
        tokens = Authentication(verify, FirstMessageToken())
        connections = ConnectionManager(memory, authentication=tokens)
        async with serving(connections) as address, address() as socket:
            told = await ask(socket, {"type": "auth", "token": "ada:60"})
            assert (told["type"], told["code"]) == ("error", "unavailable")
            assert await closed(socket) == 1013
            assert socket.close_reason == "unavailable"

    async def test_closed(self, memory: MemoryLayer, errors: Callable[[], list[str]]) -> None:
        """As by a shutdown, for one that was on its way."""

        class Closing(ConnectionManager):
            def enter(self, connection: Connection) -> None:
                super().enter(connection)
                connection.close_soon(4009, "early", farewell={"bye": 1})

        connections = Closing(memory)
        async with serving(connections) as address, address() as socket:
            assert await answer(socket) == {"bye": 1}
            assert await closed(socket) == 4009
            assert socket.close_reason == "early"
        assert errors() == []
        assert connections.statistics().closed == {4009: 1}

    async def test_gone_while_it_is_admitted(
        self,
        memory: MemoryLayer,
        errors: Callable[[], list[str]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        admitting, go_on = asyncio.Event(), asyncio.Event()
        new_channel = memory.new_channel

        async def slow(*args: Any, **options: Any) -> str:
            admitting.set()
            await go_on.wait()
            return await new_channel(*args, **options)

        monkeypatch.setattr(memory, "new_channel", slow)
        connections = ConnectionManager(memory)
        async with serving(connections) as address:
            client = asyncio.create_task(address().__aenter__())
            await admitting.wait()
            client.cancel()
            await asyncio.wait([client])
            await asyncio.sleep(0.05)  # until the server has heard of it
            go_on.set()
            await eventually(lambda: connections.statistics().closed)
        assert errors() == []
        assert connections.statistics().closed == {1006: 1}

    async def test_cancelled_while_its_channel_is_removed(
        self, memory: MemoryLayer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nothing of it stays with the manager."""
        closed_for: list[Connection] = []

        class Noting(Middleware):
            def closed(self, connection: Connection) -> None:
                closed_for.append(connection)

        connections, app = ConnectionManager(memory, middleware=Noting()), FastAPI()
        delete_channel = memory.delete_channel

        async def cancelled(name: str) -> None:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await delete_channel(name)
            await asyncio.sleep(0)

        monkeypatch.setattr(memory, "delete_channel", cancelled)

        @app.websocket("/ws")
        async def endpoint(websocket: WebSocket) -> None:
            with suppress(asyncio.CancelledError):
                async with connections.connect(websocket) as connection:
                    await room(connection)

        async with serve(app) as address:
            async with Address(address)() as socket:
                await ready(socket)
            await gone(connections)
        assert len(closed_for) == 1

    async def test_what_it_is_accepted_with(self, memory: MemoryLayer) -> None:
        """Also where that comes before the first message."""
        authentication = Authentication(verify, FirstMessageToken())
        connections = ConnectionManager(memory, authentication=authentication)
        app = FastAPI()

        @app.websocket("/ws")
        async def endpoint(websocket: WebSocket) -> None:
            options: Any = {"subprotocol": "chat", "headers": [(b"x-node", b"1")]}
            async with connections.connect(websocket, **options) as connection:
                await room(connection)

        async with serve(app) as address, Address(address)(subprotocols=["chat"]) as socket:
            assert socket.subprotocol == "chat"
            assert socket.response is not None
            assert socket.response.headers["x-node"] == "1"

    async def test_a_subprotocol_that_comes_too_late(
        self,
        memory: MemoryLayer,
        errors: Callable[[], list[str]],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """In connect(), which is after the first message. A client with a header does not mind."""

        class Late(JsonConsumer):
            async def connect(self) -> None:
                await self.accept("chat.v1")
                await self.accept()
                await self.accept("chat.v1")
                await self.send_json({"ready": self.id})

        class InTime(Late):
            def __init__(self, websocket: WebSocket, connections: ConnectionManager) -> None:
                super().__init__(websocket, connections)
                self.accept_with("chat.v1")

        offer: Any = {"subprotocols": ["chat.v1"]}
        authentication = Authentication(verify, HeaderToken(), FirstMessageToken())
        for consumer in (InTime, Late):
            connections = ConnectionManager(memory, authentication=authentication)
            app = FastAPI()
            app.add_api_websocket_route("/ws", consumer.as_endpoint(connections))
            async with serve(app) as served:
                async with Address(served)(**offer, **bearer("ada")) as socket:
                    await ready(socket)
                    assert socket.subprotocol == "chat.v1"
                assert errors() == []
                async with Address(served)(**offer) as socket:
                    await socket.send('{"type": "auth", "token": "ada"}')
                    if consumer is InTime:
                        await ready(socket)
                        assert socket.subprotocol == "chat.v1"
                    else:
                        assert (await answer(socket))["code"] == "internal_error"
                        assert await closed(socket) == 1011
                        assert "Late failed" in errors()[0]
                        assert "say accept_with('chat.v1')" in caplog.text


class TestCloses:
    """What cannot be said in a close frame as it is given."""

    @pytest.mark.parametrize(
        ("error", "code", "reason"),
        [
            (WebSocketException(4001, "é" * 100), 4001, "é" * 61),
            (WebSocketException(1006, "r"), 1011, "r"),
            (SocketError("no", code="c" * 200, disconnect=True), 1008, "c" * 123),
        ],
    )
    async def test_raised(
        self,
        memory: MemoryLayer,
        errors: Callable[[], list[str]],
        error: Exception,
        code: int,
        reason: str,
    ) -> None:
        async def raising(_: Connection) -> None:
            raise error

        connections = ConnectionManager(memory)
        async with serving(connections, raising) as address, address() as socket:
            assert await closed(socket) == code
            assert socket.close_reason == reason
            await gone(connections)
        assert errors() == []

    async def test_soon(self, memory: MemoryLayer, errors: Callable[[], list[str]]) -> None:
        connections = ConnectionManager(memory)
        async with serving(connections) as address:
            for code, sent in ((1005, 1011), (4000, 4000)):
                async with address() as socket:
                    await ready(socket)
                    (connection,) = connections
                    connection.close_soon(code, "x" * 200)
                    assert await closed(socket) == sent
                    assert socket.close_reason == "x" * 123
                await gone(connections)
        assert errors() == []

    async def test_by_the_manager(self, memory: MemoryLayer) -> None:
        connections = ConnectionManager(memory)
        async with serving(connections) as address, address() as socket:
            for id in (await ready(socket), "ws.of.another.node"):
                for code, reason in ((1006, ""), (2000, ""), (4000, "x" * 124)):
                    with pytest.raises(InvalidMessage):
                        await connections.disconnect(id, code, reason)
            (connection,) = connections
            with pytest.raises(ValueError, match="1005"):
                await connection.close(1005)
            assert await ask(socket, 1) == {"got": 1}

    async def test_a_server_that_waits_for_the_clients_answer(
        self, memory: MemoryLayer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As uvicorn's older implementation does, for twenty seconds: the place is free before."""
        monkeypatch.setattr("pgchannels.web.wire.LEAVING_TIME", 60.0)
        monkeypatch.setattr("pgchannels.web.wire.CLOSING_TIME", 0.05)

        async def endpoint(connection: Connection) -> None:
            close = connection.websocket.close

            async def wait(code: int = 1000, reason: str | None = None) -> None:
                await close(code, reason)
                await asyncio.Event().wait()

            connection.websocket.close = wait  # type: ignore[method-assign]
            await connection.close(4000)

        connections = ConnectionManager(memory)
        async with serving(connections, endpoint) as address, address() as socket:
            assert await closed(socket) in (4000, 1006)
            await gone(connections)
        assert connections.statistics().closed == {4000: 1}

    @pytest.mark.parametrize("how", ["error", "http", "exception", "close"])
    async def test_a_refusal_by_connect_is_in_the_log(
        self, memory: MemoryLayer, caplog: pytest.LogCaptureFixture, how: str
    ) -> None:
        """Once, and nothing of what the client has sent."""
        caplog.set_level(logging.INFO, "pgchannels")

        class Room(JsonConsumer):
            async def connect(self, secret: str) -> None:
                match how:
                    case "error":
                        raise AuthorizationError(f"not with {secret}")
                    case "http":
                        raise HTTPException(403, secret)
                    case "exception":
                        raise WebSocketException(4003, secret)
                    case _:
                        await self.close(4003, secret)

        app = FastAPI()
        connections = ConnectionManager(memory)
        app.add_api_websocket_route("/ws", Room.as_endpoint(connections))
        async with serve(app) as served:
            with pytest.raises(InvalidStatus):
                async with Address(served)("secret=hidden"):
                    pass
            await gone(connections)
        lines = [each for each in caplog.records if "refuse" in each.getMessage()]
        assert len(lines) == 1
        code = {"error": "forbidden", "http": 403}.get(how, 4003)
        assert getattr(lines[0], "code", None) == code
        assert "hidden" not in lines[0].getMessage()


class TestAuthentication:
    async def test_with_the_handshake(
        self, layer: ChannelLayer, errors: Callable[[], list[str]]
    ) -> None:
        authentication = Authentication(verify, HeaderToken(), SubprotocolToken())
        connections = ConnectionManager(layer, authentication=authentication)
        async with serving(connections) as address:
            assert (await refused(address()))[0] == 401
            assert (await refused(address(**bearer("bad"))))[1]["code"] == "unauthenticated"
            status, error = await refused(address(**bearer("ada:-5")))
            assert (status, error["code"]) == (401, "token_expired")
            async with address(**bearer("ada")) as socket:
                await ready(socket)
                (connection,) = connections
                assert connection.user_id == "ada"
            async with address(subprotocols=["bearer", "bob"]) as socket:
                await ready(socket)
                assert socket.subprotocol == "bearer"
        assert errors() == []
        assert connections.statistics().refused == {"unauthenticated": 2, "token_expired": 1}

    async def test_with_the_first_message(
        self, memory: MemoryLayer, errors: Callable[[], list[str]]
    ) -> None:
        authentication = Authentication(verify, FirstMessageToken(deadline=30))
        connections = ConnectionManager(
            memory, authentication=authentication, limits=Limits(per_user=1)
        )
        async with serving(connections) as address:
            async with address() as socket:
                # Nothing is kept for who has not said who it is.
                assert await connections.count() == 0
                await socket.send('{"type": "auth", "token": "ada"}')
                await ready(socket)
                assert [each.user_id for each in connections] == ["ada"]
                async with address() as second:
                    await second.send('{"type": "auth", "token": "ada"}')
                    assert (await answer(second))["code"] == "too_many_connections"
                    assert await closed(second) == 1008
            for frame in ('{"type": "auth", "token": "bad"}', "{}", "[", b"\xff", '"auth"'):
                async with address() as socket:
                    await socket.send(frame)
                    assert (await answer(socket))["category"] == "authentication"
                    assert await closed(socket) == 3000
            async with address() as socket:
                await socket.close()
            await gone(connections)
        # None of that is anything to log: anybody could fill the log with it.
        assert errors() == []

    async def test_no_good_first_message_for_a_consumer(
        self, memory: MemoryLayer, errors: Callable[[], list[str]]
    ) -> None:
        authentication = Authentication(verify, FirstMessageToken(deadline=30))
        connections = ConnectionManager(memory, authentication=authentication)
        app = FastAPI()
        app.add_api_websocket_route("/ws", JsonConsumer.as_endpoint(connections))
        async with serve(app) as address:
            async with connect(f"ws://{address}/ws") as socket:
                await socket.send("{}")
                assert (await answer(socket))["category"] == "authentication"
                assert await closed(socket) == 3000
            async with connect(f"ws://{address}/ws") as socket:
                pass
            await gone(connections)
        assert errors() == []

    async def test_no_first_message(self, memory: MemoryLayer) -> None:
        authentication = Authentication(verify, FirstMessageToken(deadline=0.05))
        connections = ConnectionManager(memory, authentication=authentication)
        async with serving(connections) as address, address() as socket:
            assert (await answer(socket))["code"] == "authentication_timeout"
            assert await closed(socket) == 3008
        assert connections.statistics().opened == 0

    async def test_an_identity_that_a_dependency_has_found(self, memory: MemoryLayer) -> None:
        connections = ConnectionManager(memory)
        app = FastAPI()

        @app.websocket("/ws")
        async def endpoint(websocket: WebSocket) -> None:
            identity = Identity("ada")
            async with connections.connect(websocket, identity=identity) as connection:
                await room(connection)

        async with serve(app) as address, Address(address)() as socket:
            await ready(socket)
            assert [each.user_id for each in connections] == ["ada"]

    async def test_a_token_that_runs_out(self, memory: MemoryLayer) -> None:
        connections = ConnectionManager(
            memory, authentication=Authentication(verify, HeaderToken())
        )
        async with serving(connections) as address, address(**bearer("ada:0.3")) as socket:
            await ready(socket)
            assert (await answer(socket))["code"] == "token_expired"
            assert await closed(socket) == 3000

    @pytest.mark.parametrize("sent", ["refresh", "something else", "nothing"])
    async def test_a_token_that_runs_out_while_a_handler_is_busy(
        self, memory: MemoryLayer, sent: str
    ) -> None:
        """A refresh that was sent in time waits for the handler, and counts."""
        go_on, cancelled = asyncio.Event(), False

        async def endpoint(connection: Connection) -> None:
            nonlocal cancelled
            await connection.send_json({"ready": connection.id})
            try:
                async for content in connection:
                    await go_on.wait()
                    await connection.send_json({"got": content})
            except asyncio.CancelledError:
                cancelled = True
                raise

        authentication = Authentication(verify, HeaderToken())
        connections = ConnectionManager(memory, authentication=authentication)
        async with serving(connections, endpoint) as address:
            async with address(**bearer("ada:0.5")) as socket:
                await ready(socket)
                await socket.send("1")
                if sent == "refresh":
                    await socket.send('{"type": "auth.refresh", "token": "ada:60"}')
                    (connection,) = connections
                    await eventually(lambda: connection._extended == 2)
                    go_on.set()
                    assert await answer(socket) == {"got": 1}
                    assert (await answer(socket))["type"] == "auth.refreshed"
                    assert await ask(socket, 2) == {"got": 2}
                else:
                    if sent == "something else":
                        await socket.send("2")
                    assert (await answer(socket))["code"] == "token_expired"
                    assert await closed(socket) == 3000
            await gone(connections)
        assert cancelled == (sent != "refresh")

    async def test_a_client_without_a_token_that_does_not_answer_the_close(
        self, memory: MemoryLayer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Strangers cannot hold a connection for as long as the server would wait for that."""
        monkeypatch.setattr("pgchannels.web.wire.REFUSING_TIME", 0.05)
        authentication = Authentication(verify, FirstMessageToken(deadline=0.05))
        connections = ConnectionManager(memory, authentication=authentication)
        async with serving(connections) as address:
            host, port = address.split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(
                b"GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
            )
            async with asyncio.timeout(9):  # uvicorn waits for ten seconds
                with suppress(ConnectionResetError):
                    while await reader.read(1000):
                        pass
            writer.close()
            with suppress(ConnectionResetError):
                await writer.wait_closed()

    async def test_a_token_where_frames_are_not_parsed(self, memory: MemoryLayer) -> None:
        """The application reads what the client sends, and may call refresh()."""

        class Refreshing(BytesConsumer):
            async def receive_bytes(self, data: bytes) -> None:
                content = json.loads(data)
                if content.get("type") == "auth.refresh":
                    await self.refresh(content["token"])
                await self.send_json({"got": content["type"]})

        connections = ConnectionManager(
            memory, authentication=Authentication(verify, HeaderToken())
        )
        app = FastAPI()
        app.add_api_websocket_route("/ws", Refreshing.as_endpoint(connections))
        async with serve(app) as served:
            address = Address(served)
            async with address(**bearer("ada:60")) as socket:
                for kind in ("ping", "auth.refresh"):
                    await socket.send(json.dumps({"type": kind, "token": "ada:3600"}).encode())
                    assert await answer(socket) == {"got": kind}
                (connection,) = connections
                assert connection.identity is not None
                assert connection.identity.token_id == "ada:3600"
                await socket.send(b'{"type": "auth.refresh", "token": "bob"}')
                assert (await answer(socket))["code"] == "other_user"
                assert await closed(socket) == 3000
            async with address(**bearer("ada:0.3")) as socket:
                assert (await answer(socket))["code"] == "token_expired"
                assert await closed(socket) == 3000

    @pytest.mark.parametrize("token", ["bob", "bad", "", None, 5, "ada:-1", "x" * 10_000])
    async def test_a_refresh_that_is_refused(self, memory: MemoryLayer, token: object) -> None:
        """With another's token, a bad one or none."""
        connections = ConnectionManager(
            memory, authentication=Authentication(verify, HeaderToken())
        )
        async with serving(connections) as address, address(**bearer("ada:60")) as socket:
            await ready(socket)
            error = await ask(socket, {"type": "auth.refresh", "token": token})
            assert error["category"] == "authentication"
            assert await closed(socket) == 3000

    async def test_a_refresh_that_cannot_be_verified_now(self, memory: MemoryLayer) -> None:
        async def sometimes(token: str) -> Identity:
            if token == "later":
                raise KeysUnavailable
            return await verify(token)

        connections = ConnectionManager(
            memory, authentication=Authentication(sometimes, HeaderToken())
        )
        async with serving(connections) as address:
            status, error = await refused(address(**bearer("later")))
            assert (status, error["code"]) == (503, "unavailable")
            async with address(**bearer("ada")) as socket:
                await ready(socket)
                error = await ask(socket, {"type": "auth.refresh", "token": "later"})
                assert error["code"] == "unavailable"
                assert await ask(socket, 1) == {"got": 1}

    async def test_refresh_asks_again(self, memory: MemoryLayer) -> None:
        allowed = {"a", "b"}

        async def authorize(identity: Identity | None, action: str, channel: str) -> bool:
            return channel in allowed

        connections = ConnectionManager(
            memory, authentication=Authentication(verify, HeaderToken()), authorize=authorize
        )
        async with serving(connections) as address, address(**bearer("ada:60")) as socket:
            await ready(socket)
            await socket.send('{"join": "a"}')
            await socket.send('{"add": "b"}')
            await ask(socket, 1)
            allowed.discard("b")
            told = await ask(socket, {"type": "auth.refresh", "token": "ada:3600"})
            assert (told["code"], told["context"]["channel"]) == ("forbidden", "b")
            told = await answer(socket)
            assert told["type"] == "auth.refreshed"
            expires_at = datetime.fromisoformat(told["expires_at"])
            assert expires_at > datetime.now(UTC) + timedelta(seconds=600)
            assert [each.identity and each.identity.expires_at for each in connections] == [
                expires_at
            ]
            assert await memory.group_members("b") == []
            await memory.send("b", {"n": 1})
            await memory.send("a", {"n": 2})
            assert (await answer(socket))["data"] == {"n": 2}

    @pytest.mark.parametrize("by", ["user", "token"])
    async def test_revocation(self, make_layer: Callable[[], ChannelLayer], by: str) -> None:
        """In mid-stream, from another node; and the token is no good any more."""
        authentication = Authentication(verify, HeaderToken())
        async with make_layer() as layer, make_layer() as other:
            connections = ConnectionManager(layer, authentication=authentication)
            elsewhere = ConnectionManager(other, authentication=authentication)
            async with serving(connections) as address:
                async with address(**bearer("ada")) as socket, address(**bearer("bob")) as bob:
                    await ready(socket)
                    await ready(bob)
                    what = {"user_id": "ada"} if by == "user" else {"token_id": "ada"}
                    await elsewhere.revoke(**what)
                    assert (await answer(socket))["code"] == "token_revoked"
                    assert await closed(socket) == 3000
                    assert await ask(bob, 1) == {"got": 1}
                if by == "token":
                    status, error = await refused(address(**bearer("ada")))
                    assert (status, error["code"]) == (401, "token_revoked")

    async def test_revocation_while_it_is_admitted(
        self, layer: ChannelLayer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """After it was found that the token is good, before the connection is known."""
        authentication = Authentication(verify, HeaderToken())
        connections = ConnectionManager(layer, authentication=authentication)
        new_channel = layer.new_channel

        async def slow(*args: Any, **options: Any) -> str:
            name = await new_channel(*args, **options)
            await connections.revoke(user_id="ada")
            return name

        monkeypatch.setattr(layer, "new_channel", slow)
        async with serving(connections) as address, address(**bearer("ada")) as socket:
            async with asyncio.timeout(10):
                while (await answer(socket)).get("code") != "token_revoked":
                    pass
            assert await closed(socket) == 3000
            await gone(connections)

    async def test_revocation_while_it_is_refreshed(
        self, memory: MemoryLayer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        connections = ConnectionManager(
            memory, authentication=Authentication(verify, HeaderToken())
        )
        is_revoked = memory.is_revoked

        async def slow(**options: Any) -> bool:
            found = await is_revoked(**options)
            if options["token_id"] == "ada:60" and not found:
                await connections.revoke(token_id="ada:60")
            return found

        monkeypatch.setattr(memory, "is_revoked", slow)
        async with serving(connections) as address, address(**bearer("ada")) as socket:
            await ready(socket)
            await socket.send('{"type": "auth.refresh", "token": "ada:60"}')
            assert await closed(socket) == 3000

    @pytest.mark.parametrize("who", ["ada", "tablet"])
    async def test_revocation_where_user_and_identity_are_two(
        self, memory: MemoryLayer, who: str
    ) -> None:
        connections = ConnectionManager(memory)
        app = FastAPI()

        @app.websocket("/ws")
        async def endpoint(websocket: WebSocket) -> None:
            options: Any = {"identity": Identity("ada"), "user_id": "tablet"}
            async with connections.connect(websocket, **options) as connection:
                await room(connection)

        async with serve(app) as address, Address(address)() as socket:
            await ready(socket)
            await connections.revoke(user_id=who)
            assert (await answer(socket))["code"] == "token_revoked"
            assert await closed(socket) == 3000

    async def test_told_while_it_is_cancelled(
        self,
        memory: MemoryLayer,
        errors: Callable[[], list[str]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Those that tell must not hear of it."""
        connections, app = ConnectionManager(memory), FastAPI()
        delete_channel = memory.delete_channel

        async def told(name: str) -> None:
            (connection,) = connections
            connection.reauthorize_soon()
            await delete_channel(name)

        monkeypatch.setattr(memory, "delete_channel", told)

        @app.websocket("/ws")
        async def endpoint(websocket: WebSocket) -> None:
            with suppress(TimeoutError):
                async with asyncio.timeout(0.05), connections.connect(websocket):
                    await asyncio.Event().wait()

        async with serve(app) as address, Address(address)() as socket:
            assert await closed(socket) == 1012
            await gone(connections)
        assert errors() == []

    async def test_revocation_of_who_has_no_token(self, layer: ChannelLayer) -> None:
        """Found out by a dependency of the application's: the sockets that are there are closed."""
        connections = ConnectionManager(layer)
        async with serving(connections) as address:
            async with address("user=ada") as socket, address("user=bob") as bob:
                await ready(socket)
                await ready(bob)
                await connections.revoke(user_id="ada")
                assert (await answer(socket))["code"] == "token_revoked"
                assert await closed(socket) == 3000
                assert await ask(bob, 1) == {"got": 1}
            async with address("user=ada") as socket:
                await ready(socket)

    async def test_revocation_of_who_has_no_token_goes_by_no_clock_of_ours(
        self, layer: ChannelLayer
    ) -> None:
        connections = ConnectionManager(layer)
        async with serving(connections) as address, address("user=ada") as socket:
            connection = connections.get(await ready(socket))
            assert connection is not None
            connection._identified_at += timedelta(hours=1)
            await connections.revoke(user_id="ada")
            assert await closed(socket) == 3000

    async def test_identified_after_a_revocation(self, layer: ChannelLayer) -> None:
        """Who has logged in again on the same socket is not sent away for what was before."""
        connections = ConnectionManager(layer)

        async def serve_one(connection: Connection) -> None:
            async for name in connection:
                await connection.identify(name)
                await connection.send_json({"is": name})

        async with (
            serving(connections, serve_one) as address,
            address() as socket,
            address() as before,
        ):
            assert await ask(socket, "bob") == {"is": "bob"}
            assert await ask(before, "ada") == {"is": "ada"}
            await connections.revoke(user_id="ada")
            # The node has heard of it then. Until it has, it takes who is ada for revoked.
            assert await closed(before) == 3000
            await eventually(lambda: len(connections) == 1)
            while True:  # a clock that is coarse
                assert await ask(socket, "ada") == {"is": "ada"}
                (connection,) = connections
                if not await layer.is_revoked(user_id="ada", issued_at=connection._identified_at):
                    break
            await layer.command(Command("reauthorize", user_id="ada"))
            await layer.command(Command("close", user_id="ada", code=4000))
            assert await closed(socket) == 4000

    async def test_origins(self, memory: MemoryLayer) -> None:
        connections = ConnectionManager(memory, origins=Origins("https://shop.example"))
        async with serving(connections) as address:
            async with address(origin="https://shop.example") as socket:
                await ready(socket)
            for origin in ("https://evil.example", "null", "http://shop.example"):
                status, error = await refused(address(origin=origin))
                assert (status, error["code"]) == (403, "origin")


class TestGroups:
    """They are what the connection reads, whoever has seen to it."""

    async def test_made_and_ended_by_another_node(
        self, make_layer: Callable[[], ChannelLayer]
    ) -> None:
        async with make_layer() as layer, make_layer() as other:
            here = ConnectionManager(layer, limits=Limits(groups=2))
            there = ConnectionManager(other)
            async with serving(here) as address, address() as socket:
                connection = here.get(await ready(socket))
                assert connection is not None
                for n in range(4):  # each makes room for the next
                    await connection.group_add(f"room:{n}")
                    await there.join_group(connection, "theirs")
                    await eventually(lambda: "theirs" in connection.groups)
                    assert connection.groups == {f"room:{n}", "theirs"}
                    with pytest.raises(TooManyChannels):
                        await connection.join("another")
                    await there.leave_group(connection, f"room:{n}")
                    await there.leave_group(connection, "theirs")
                    await eventually(lambda: not connection.groups)

    async def test_the_manager_does_on_its_own_node_what_it_does_on_others(
        self, make_layer: Callable[[], ChannelLayer]
    ) -> None:
        """Clients are asked about, the application is not; what a client has joined stays."""

        async def authorize(identity: Identity | None, action: str, channel: str) -> bool:
            return channel.startswith("open")

        async with make_layer() as layer, make_layer() as other:
            here = ConnectionManager(layer, authorize=authorize)
            there = ConnectionManager(other, authorize=authorize)
            async with serving(here) as address, address() as socket:
                connection = here.get(await ready(socket))
                assert connection is not None
                for manager in (here, there):
                    await connection.join("open")
                    await manager.join_group(connection, "open")
                    await manager.join_group(connection, "closed")
                    await eventually(lambda: connection.groups == {"open", "closed"})
                    await manager.leave_group(connection, "open")
                    assert await layer.group_members("open") == []
                    await connection.reauthorize()
                    assert (await answer(socket))["code"] == "forbidden"
                    assert connection.groups == {"open"}
                    assert await layer.group_members("closed") == []

    async def test_a_join_that_failed_is_forgotten(self, layer: ChannelLayer) -> None:
        """A membership that comes and goes afterwards takes the group with it."""
        connections = ConnectionManager(layer)
        async with serving(connections) as address, address() as socket:
            connection = connections.get(await ready(socket))
            assert connection is not None
            with pytest.raises(InvalidPosition):
                await connection.group_add("room", after="99-1")
            await connection.group_add("room")
            await layer.group_discard("room", connection.id)
            assert connection.groups == frozenset()

    async def test_none_before_it_is_admitted(self, memory: MemoryLayer) -> None:
        connections = ConnectionManager(memory)
        groups: list[frozenset[str]] = []

        class Looking(JsonConsumer):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args)
                groups.append(self.groups)

        app = FastAPI()
        app.add_api_websocket_route("/ws", Looking.as_endpoint(connections))
        async with serve(app) as address, Address(address)():
            await eventually(lambda: groups == [frozenset()])


class TestAuthorization:
    @pytest.mark.parametrize("how", ["join", "group_add"])
    async def test_asked_again_while_it_joins(self, memory: MemoryLayer, how: str) -> None:
        """By a command, before the channel is among those that are asked about."""
        answers = iter((True, False, False))

        async def authorize(identity: Identity | None, action: str, channel: str) -> bool:
            answer = next(answers)
            if answer:
                (connection,) = connections
                await connection.reauthorize()
            return answer

        async def serve_one(connection: Connection) -> None:
            with pytest.raises(AuthorizationError):
                await getattr(connection, how)("secret")
            assert connection.groups == frozenset()
            await connection.send_json({"ready": connection.id})
            await anext(connection)

        connections = ConnectionManager(memory, authorize=cast("Any", authorize))
        async with serving(connections, serve_one) as address, address() as socket:
            id = await ready(socket)
            assert await memory.group_members("secret") == []
            await memory.send("secret", {"n": 1})
            await memory.send(id, {"n": 2})
            assert (await answer(socket))["data"] == {"n": 2}

    async def test_asked_again_while_it_becomes_a_member(
        self, memory: MemoryLayer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        allowed, group_add = {"secret"}, memory.group_add

        async def authorize(identity: Identity | None, action: str, channel: str) -> bool:
            return channel in allowed

        async def slow(*args: Any, **options: Any) -> None:
            allowed.clear()
            (connection,) = connections
            await connection.reauthorize()
            await group_add(*args, **options)

        monkeypatch.setattr(memory, "group_add", slow)
        connections = ConnectionManager(memory, authorize=cast("Any", authorize))
        async with serving(connections) as address, address() as socket:
            await ready(socket)
            await socket.send('{"add": "secret"}')
            assert (await answer(socket))["code"] == "forbidden"
            assert (await answer(socket))["code"] == "forbidden"
            assert await closed(socket) == 3003
            assert await memory.group_members("secret") == []

    async def test_a_refresh_while_nobody_knows(self, memory: MemoryLayer) -> None:
        """It must not go on reading what the new token may not open."""
        is_away = False

        async def authorize(identity: Identity | None, action: str, channel: str) -> bool:
            if is_away:
                raise DatabaseUnavailable("away")
            return True

        connections = ConnectionManager(
            memory,
            authentication=Authentication(verify, HeaderToken()),
            authorize=cast("Any", authorize),
        )
        async with serving(connections) as address, address(**bearer("ada")) as socket:
            await ready(socket)
            await socket.send('{"join": "room"}')
            await ask(socket, 1)
            is_away = True
            told = await ask(socket, {"type": "auth.refresh", "token": "ada:60"})
            assert told["code"] == "unavailable"
            assert await closed(socket) == 1013

    async def test_denied_while_memberships_cannot_be_ended(
        self, memory: MemoryLayer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def away(*_: Any) -> None:
            raise DatabaseUnavailable("away")

        async def serve_one(connection: Connection) -> None:
            await connection.group_add("room")
            monkeypatch.setattr(memory, "group_discard", away)
            with pytest.raises(DatabaseUnavailable):
                await connection.group_discard("room")
            await memory.send("room", {"n": 1})
            await memory.send(connection.id, {"n": 2})
            await anext(connection)

        async with (
            serving(ConnectionManager(memory), serve_one) as address,
            address() as socket,
        ):
            assert (await answer(socket))["data"] == {"n": 2}

    async def test_each_action(self, layer: ChannelLayer) -> None:
        asked: list[tuple[str | None, str, str]] = []

        async def authorize(identity: Identity | None, action: str, channel: str) -> bool:
            asked.append((None if identity is None else identity.user_id, action, channel))
            return channel == f"may {action}".replace(" ", ":")

        connections = ConnectionManager(
            layer,
            authentication=Authentication(verify, HeaderToken()),
            authorize=cast("Any", authorize),
        )
        async with serving(connections) as address, address(**bearer("ada")) as socket:
            await ready(socket)
            for verb, action in (
                ("join", "subscribe"),
                ("add", "subscribe"),
                ("publish", "publish"),
                ("history", "history"),
                ("presence", "presence"),
            ):
                async with address(**bearer("ada")) as other:
                    await ready(other)
                    error = await ask(other, {verb: "secret"})
                    assert error["code"] == "forbidden"
                    assert error["context"] == {"action": action, "channel": "secret"}
                    assert await closed(other) == 3003
                assert asked[-1] == ("ada", action, "secret")
                await socket.send(json.dumps({verb: f"may:{action}"}))
                if verb in ("history", "presence"):
                    assert await answer(socket) in ([{"n": 1}], [], 0)
            assert await ask(socket, 1) == {"got": 1}

    async def test_by_a_position(self, memory: MemoryLayer) -> None:
        """A position does not open what its channel's name does not."""

        async def authorize(identity: Identity | None, action: str, channel: str) -> bool:
            return channel == "mine"

        await memory.send("secret", {"n": 1})
        connections = ConnectionManager(memory, authorize=cast("Any", authorize))
        async with serving(connections) as address, address("group=secret&after=0") as socket:
            assert (await answer(socket))["code"] == "forbidden"
            assert await closed(socket) == 3003


class Shout(Middleware):
    """Upper-case in, nothing that is called secret out."""

    def __init__(self) -> None:
        self.gone: list[str] = []

    async def inbound(self, connection: Connection, frame: Frame) -> Frame | None:
        content = frame.json()
        if content == "drop":
            return None
        if content == "refuse":
            raise SocketError("no", code="refused_here")
        if content == "away":
            raise SocketError("no more", code="away", disconnect=True)
        return frame.replace(content=content.upper()) if isinstance(content, str) else frame

    async def outbound(self, connection: Connection, message: Message) -> Message | None:
        if message.type == "odd":
            raise SocketError("not for you", code="odd_one")
        return None if message.type == "secret" else message

    def closed(self, connection: Connection) -> None:
        self.gone.append(connection.id)


class TestMiddleware:
    async def test_frames_and_messages_pass_through_it(self, memory: MemoryLayer) -> None:
        shout = Shout()
        connections = ConnectionManager(memory, middleware=shout)
        async with serving(connections) as address, address("group=room") as socket:
            name = await ready(socket)
            assert await ask(socket, "hello") == {"got": "HELLO"}
            await socket.send('"drop"')
            assert (await ask(socket, "refuse"))["code"] == "refused_here"
            await memory.send("room", {"type": "odd"})
            assert (await answer(socket))["code"] == "odd_one"
            await memory.send("room", {"type": "secret"})
            await memory.send("room", {"type": "open"})
            assert (await answer(socket))["data"] == {"type": "open"}
            assert (await ask(socket, "away"))["code"] == "away"
            assert await closed(socket) == 1008
            await gone(connections)
        assert shout.gone == [name]

    async def test_consumers_too(self, memory: MemoryLayer) -> None:
        class Room(JsonConsumer):
            @receives("Ping")
            async def on_ping(self, content: Any) -> None:
                await self.send_json("mine")

            async def receive_json(self, content: Any) -> None:
                await self.send_json({"got": content})

        app = FastAPI()
        connections = ConnectionManager(memory, middleware=Shout())
        app.add_api_websocket_route("/ws", Room.as_endpoint(connections))
        async with serve(app) as address, Address(address)() as socket:
            assert await ask(socket, "hello") == {"got": "HELLO"}
            assert await ask(socket, {"type": "Ping"}) == "mine"
            assert await ask(socket, {"type": "ping"}) == {"type": "pong"}

    @pytest.mark.parametrize("kind", ["bytes", "frames", "text", "declared"])
    async def test_a_ping_that_is_not_answered_counts(self, memory: MemoryLayer, kind: str) -> None:
        """By its name alone, as much as a client likes would get past the rate."""
        connections = ConnectionManager(memory, middleware=RateLimit(FixedWindow(1, 3600)))
        async with raw(connections, kind) as address, address() as socket:
            ping = '{"type": "ping", "spam": "pills"}'
            await socket.send(ping.encode() if kind == "bytes" else ping)
            assert await answer(socket) == {"size": len(ping)}
            for type_ in ("ping", "pong", "auth.refresh"):
                again = json.dumps({"type": type_})
                await socket.send(again.encode() if kind == "bytes" else again)
                if (kind, type_) != ("declared", "pong"):  # which it has not declared
                    assert (await answer(socket))["code"] == "rate_limited"

    async def test_pings_that_are_answered_do_not_count(self, memory: MemoryLayer) -> None:
        connections = ConnectionManager(memory, middleware=RateLimit(FixedWindow(1, 3600)))
        async with serving(connections) as address, address() as socket:
            await ready(socket)
            assert await ask(socket, 1) == {"got": 1}
            for _ in range(3):
                assert await ask(socket, {"type": "ping"}) == {"type": "pong"}
            assert (await ask(socket, 2))["code"] == "rate_limited"

    async def test_an_unknown_type_is_refused_where_it_is_not_answered(
        self, memory: MemoryLayer
    ) -> None:
        refresh = {"type": "auth.refresh", "token": "ada"}
        validation = Validation(unknown="refuse")
        async with (
            serving(ConnectionManager(memory, middleware=validation)) as address,
            address() as socket,
        ):
            await ready(socket)
            assert await ask(socket, {"type": "ping"}) == {"type": "pong"}
            # There is no authentication, and so no token.
            assert (await ask(socket, refresh))["code"] == "unexpected_message"
        connections = ConnectionManager(
            memory,
            authentication=Authentication(verify, HeaderToken()),
            middleware=validation,
        )
        async with serving(connections) as address, address(**bearer("ada")) as socket:
            await ready(socket)
            assert (await ask(socket, refresh))["type"] == "auth.refreshed"
        async with raw(connections, "text") as address, address(**bearer("ada")) as socket:
            for content in (refresh, {"type": "ping"}):
                assert (await ask(socket, content))["code"] == "unexpected_message"


class Bytes(BytesConsumer):
    async def receive_bytes(self, data: bytes) -> None:
        await self.send_json({"size": len(data)})


class Text(WebSocketConsumer):
    async def receive(self, text: str | None = None, bytes: bytes | None = None) -> None:
        await self.send_json({"size": len(text or bytes or "")})


class Declared(JsonConsumer):
    """Parsed, but some of what would be answered is its own."""

    @receives("ping", "auth.refresh")
    async def on_ping(self, content: Any) -> None:
        await self.send_json({"size": len(json.dumps(content))})


@asynccontextmanager
async def raw(connections: ConnectionManager, kind: str) -> AsyncIterator[Address]:
    """Answers each frame that reaches it by its size."""

    async def frames(connection: Connection) -> None:
        async for frame in connection.frames():
            await connection.send_json({"size": frame.size})

    if kind == "frames":
        async with serving(connections, frames) as address:
            yield address
        return
    consumer = {"bytes": Bytes, "text": Text, "declared": Declared}[kind]
    app = FastAPI()
    app.add_api_websocket_route("/ws", consumer.as_endpoint(connections))
    async with serve(app) as served:
        yield Address(served)


class TestHeartbeat:
    async def test_the_server_is_busy(self, memory: MemoryLayer) -> None:
        """Whoever has answered, and was not listened to, is not gone."""

        class Busy(JsonConsumer):
            async def connect(self) -> None:
                await asyncio.sleep(0.5)

            async def receive_json(self, content: Any) -> None:
                await asyncio.sleep(0.5)
                await self.send_json({"got": content})

        heartbeat = Heartbeat(0.1, 0.3, by="json")
        app = FastAPI()
        connections = ConnectionManager(memory, heartbeat=heartbeat)
        app.add_api_websocket_route("/ws", Busy.as_endpoint(connections))
        async with serve(app) as address, Address(address)() as socket:
            await socket.send("1")
            while (told := await answer(socket)) == {"type": "ping"}:
                await socket.send('{"type": "pong"}')
            assert told == {"got": 1}

    async def test_who_does_not_answer_is_closed(self, memory: MemoryLayer) -> None:
        heartbeat = Heartbeat(0.05, 30, missed=2, by="json")
        connections = ConnectionManager(memory, heartbeat=heartbeat)
        async with serving(connections) as address, address() as socket:
            await ready(socket)
            assert [await answer(socket) for _ in range(2)] == [{"type": "ping"}] * 2
            assert await closed(socket) == 1011

    async def test_who_answers_stays(self, memory: MemoryLayer) -> None:
        heartbeat = Heartbeat(0.1, 60, missed=100, by="json")
        connections = ConnectionManager(memory, heartbeat=heartbeat)
        async with serving(connections) as address, address() as socket:
            await ready(socket)
            for _ in range(5):
                assert await answer(socket) == {"type": "ping"}
                await socket.send('{"type": "pong"}')

    async def test_the_servers_own(self, memory: MemoryLayer) -> None:
        """With protocol pings, a client that is stopped is noticed by the server."""
        connections = ConnectionManager(memory, heartbeat=Heartbeat(0.5, 2.5))
        async with (
            serving(connections, **connections.server_options()) as address,
            address() as socket,
        ):
            await ready(socket)
            socket.transport.pause_reading()
            # Older versions of uvicorn then wait for the client's answer to the close, too.
            await eventually(lambda: len(connections) == 0, timeout=60)
            socket.transport.resume_reading()


class TestSendingAway:
    @pytest.mark.parametrize("by", ["user_id", "group", "everyone"])
    async def test_commands(self, make_layer: Callable[[], ChannelLayer], by: str) -> None:
        """From a node without connections. A member by another's doing is one, too."""
        async with make_layer() as layer, make_layer() as other:
            connections = ConnectionManager(layer)
            async with (
                serving(connections) as address,
                address("user=ada") as socket,
                address("user=bob&group=hall") as bob,
            ):
                name = await ready(socket)
                await ready(bob)
                await other.group_add("room", name)
                await other.group_send("room", {"n": 1})
                assert (await answer(socket))["data"] == {"n": 1}
                whom = {"user_id": "ada", "group": "room", "everyone": True}[by]
                await other.command(Command("close", code=4000, **{by: whom}))  # type: ignore[arg-type]
                assert await closed(socket) == 4000
                if by == "everyone":
                    assert await closed(bob) == 4000
                else:
                    assert await ask(bob, 1) == {"got": 1}

    @pytest.mark.parametrize("how", ["itself", "its id", "another node"])
    async def test_disconnect(self, make_layer: Callable[[], ChannelLayer], how: str) -> None:
        async with make_layer() as layer, make_layer() as other:
            connections, elsewhere = ConnectionManager(layer), ConnectionManager(other)
            async with serving(connections) as address, address() as socket:
                name = await ready(socket)
                if how == "itself":
                    await connections.disconnect(next(iter(connections)), 4000, "go")
                else:
                    manager = connections if how == "its id" else elsewhere
                    await manager.disconnect(name, 4000, "go")
                assert await closed(socket) == 4000
                assert socket.close_reason == "go"

    async def test_drain(self, layer: ChannelLayer) -> None:
        connections = ConnectionManager(layer, shutdown=Shutdown(reconnect_within=8))
        async with serving(connections) as address:
            sockets = [await address("group=room") for _ in range(4)]
            for socket in sockets:
                await ready(socket)
            await connections.drain()
            waits = []
            for socket in sockets:
                told = await answer(socket)
                assert told["type"] == "reconnect"
                waits.append(told["reconnect_in"])
                assert await closed(socket) == 1012
            # One in each quarter.
            assert sorted(int(wait // 2) for wait in waits) == [0, 1, 2, 3]
            status, error = await refused(address())
            assert (status, error["code"]) == (503, "draining")
            assert len(connections) == 0
        assert await layer.group_members("room") == []
        assert await layer.count_connections() == 0

    async def test_the_end_of_the_lifespan_drains(self, memory: MemoryLayer) -> None:
        layer = MemoryLayer()
        connections = ConnectionManager(layer)
        app = FastAPI(lifespan=lifespan(connections))

        @app.websocket("/ws")
        async def endpoint(websocket: WebSocket) -> None:
            assert websocket.state.connections is connections
            async with connections.connect(websocket) as connection:
                await room(connection)

        async with lifespan(connections)(app) as state:
            assert state["layer"] is layer
        assert connections.is_draining
        async with serve(app) as address, Address(address)() as socket:
            await ready(socket)
            assert not connections.is_draining

    async def test_a_slow_goodbye_is_cut_short(
        self, memory: MemoryLayer, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Slow(JsonConsumer):
            async def disconnect(self, code: int) -> None:
                await release.wait()

        release = asyncio.Event()
        connections = ConnectionManager(memory, shutdown=Shutdown(timeout=0.05))
        app = FastAPI()
        app.add_api_websocket_route("/ws", Slow.as_endpoint(connections))
        async with serve(app) as address, Address(address)() as socket:
            await ask(socket, {"type": "ping"})
            await connections.drain()
            assert "1 connections did not close in time" in caplog.text
            release.set()

    def test_in_one_event_loop_after_the_other(self) -> None:
        layer = MemoryLayer()
        connections = ConnectionManager(layer)

        async def once() -> None:
            connections.is_draining = False
            async with layer, serving(connections) as address, address() as socket:
                await ready(socket)
                draining = asyncio.create_task(connections.drain())
                assert await closed(socket) == 1012
                await draining
                assert len(connections) == 0

        asyncio.run(once())
        asyncio.run(once())


class TestSending:
    async def test_to_all_kinds_of_receivers(self, make_layer: Callable[[], ChannelLayer]) -> None:
        async with make_layer() as layer, make_layer() as other:
            connections, elsewhere = ConnectionManager(layer), ConnectionManager(other)
            async with (
                serving(connections) as address,
                serving(elsewhere) as second,
                address("user=ada") as one,
                second("user=ada") as two,
                second("user=bob") as three,
            ):
                names = [await ready(socket) for socket in (one, two, three)]
                for name in names:
                    await connections.join_group(name, "room")
                await elsewhere.send_personal(names[0], {"n": 1})
                await connections.send_group("room", {"n": 2})
                await connections.send_group_except("room", {"n": 3}, names[0])
                await connections.send_to_user("ada", {"n": 4})
                # What another node has done is known of a moment later.
                assert sorted(await numbers(one, 1, 2, 4)) == [1, 2, 4]
                assert sorted(await numbers(two, 2, 3, 4)) == [2, 3, 4]
                assert await numbers(three, 2, 3) == [2, 3]
                await elsewhere.leave_group(names[2], "room")
                await connections.leave_group(names[0], "room")
                await connections.send_group("room", {"n": 5})
                await elsewhere.broadcast({"n": 6})
                assert await numbers(one, 6) == [6]
                assert await numbers(two, 5, 6) == [5, 6]
                assert await numbers(three, 6) == [6]


async def numbers(socket: ClientConnection, *awaited: int) -> list[int]:
    """What has come when all of these have."""
    got: list[int] = []
    while not set(awaited) <= set(got):
        got.append((await answer(socket))["data"]["n"])
    return got


class TestConfiguration:
    @pytest.mark.parametrize(
        "options",
        [
            {"send_timeout": 0},
            {"send_timeout": -1},
            {"send_timeout": "30"},
            {"max_frame_size": 0},
            {"max_frame_size": 1.5},
            {"max_frame_size": None},
            {"limits": 5},
            {"limits": None},
            {"heartbeat": 30},
            {"shutdown": 10},
            {"origins": "https://shop.example"},
            {"origins": ["https://shop.example"]},
            {"authentication": verify},
            {"authentication": Authentication},
            {"authorize": True},
            {"authorize": Capabilities},
            {"authorize": lambda identity, action, channel: True},
            {"overflow": "dropoldest"},
            {"middleware": Shout},
            {"middleware": [Shout()]},
        ],
    )
    def test_what_cannot_be(self, options: dict[str, Any]) -> None:
        with pytest.raises(ConfigurationError):
            ConnectionManager(MemoryLayer(), **options)

    @pytest.mark.parametrize(
        "options",
        [
            {"interval": 0},
            {"interval": "30"},
            {"interval": 60, "timeout": 60},
            {"timeout": float("inf")},
            {"missed": 0},
            {"missed": float("nan")},
            {"by": "smoke"},
        ],
    )
    def test_heartbeats(self, options: dict[str, Any]) -> None:
        with pytest.raises(ConfigurationError):
            Heartbeat(**options)

    @pytest.mark.parametrize(
        "options",
        [
            {"reconnect_within": -1},
            {"reconnect_within": float("inf")},
            {"reconnect_within": float("nan")},
            {"timeout": -0.1},
            {"timeout": float("nan")},
            {"timeout": "5"},
        ],
    )
    def test_shutdown(self, options: dict[str, Any]) -> None:
        with pytest.raises(ConfigurationError):
            Shutdown(**options)

    def test_cookies_from_anywhere(self) -> None:
        with pytest.raises(ConfigurationError, match="cookies"):
            ConnectionManager(
                MemoryLayer(),
                authentication=Authentication(verify, CookieToken("token")),
                origins=Origins("*"),
            )

    def test_not_a_layer(self) -> None:
        with pytest.raises(ConfigurationError, match="channel layer"):
            ConnectionManager(cast("Any", "postgresql://"))

    def test_server_options(self) -> None:
        layer = MemoryLayer()
        protocol = ConnectionManager(layer, heartbeat=Heartbeat(20, 50)).server_options()
        assert (protocol["ws_ping_interval"], protocol["ws_ping_timeout"]) == (20, 30)
        off = ConnectionManager(layer, heartbeat=Heartbeat(by="off")).server_options()
        assert (off["ws_ping_interval"], off["ws_ping_timeout"]) == (None, None)
        assert ConnectionManager(layer, max_frame_size=500).server_options()["ws_max_size"] == 1000

    def test_clients_send_less_than_servers_publish(self) -> None:
        """What a frame makes a server do grows with its size."""
        connections = ConnectionManager(MemoryLayer())
        assert connections.max_frame_size == 65536 < connections.layer.settings.max_message_size
        assert connections.server_options()["ws_max_size"] == 131072

    @pytest.mark.parametrize(("timeout", "expected"), [(0, 1), (2.5, 3), (float("inf"), None)])
    def test_the_servers_own_patience(self, timeout: float, expected: int | None) -> None:
        connections = ConnectionManager(MemoryLayer(), shutdown=Shutdown(timeout=timeout))
        assert connections.server_options()["timeout_graceful_shutdown"] == expected

    async def test_an_http_exception_of_a_consumer(self, memory: MemoryLayer) -> None:
        class Room(JsonConsumer):
            async def connect(self) -> None:
                raise HTTPException(418, "a teapot")

        app = FastAPI()
        app.add_api_websocket_route("/ws", Room.as_endpoint(memory))
        async with serve(app) as address:
            assert await refused(Address(address)()) == (418, "a teapot")
