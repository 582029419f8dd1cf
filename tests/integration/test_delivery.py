"""Messages as consumers and their clients see them, through a real server, on both layers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Annotated, Any, ClassVar

import pytest
from fastapi import Depends, FastAPI, HTTPException, WebSocket
from starlette.exceptions import WebSocketException
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

import pgchannels.web.connection
from pgchannels import ChannelLayer, DatabaseUnavailable, MemoryLayer, Message
from pgchannels.web import (
    AuthenticationError,
    AuthorizationError,
    BytesConsumer,
    ConnectionManager,
    ConnectionState,
    JsonConsumer,
    WebSocketConsumer,
    handles,
    outbound,
)
from pgchannels.web.errors import UnexpectedMessage
from tests.support.eventually import eventually
from tests.support.sockets import answer, closed, serve


def application(
    consumer: type[WebSocketConsumer], layer: ChannelLayer | ConnectionManager
) -> FastAPI:
    app = FastAPI()
    app.add_api_websocket_route("/ws", consumer.as_endpoint(layer))
    return app


class Board(JsonConsumer):
    """Each client is in the group when it has had "ready"."""

    async def connect(self, admin: bool = False) -> None:
        self.admin = admin
        await self.accept()
        await self.group_add("board")
        await self.send_json("ready")


async def open_sockets(stack: AsyncExitStack, address: str, *paths: str) -> list[ClientConnection]:
    sockets = [
        await stack.enter_async_context(connect(f"ws://{address}/ws{path}")) for path in paths
    ]
    assert [await answer(socket) for socket in sockets] == ["ready"] * len(sockets)
    return sockets


async def answers(
    consumer: type[WebSocketConsumer],
    layer: ChannelLayer,
    message: dict[str, Any],
    connections: ConnectionManager | None = None,
) -> list[Any]:
    """The answers to *message* that a user and an admin of one node get."""
    async with (
        layer,
        serve(application(consumer, connections or layer)) as address,
        AsyncExitStack() as stack,
    ):
        sockets = await open_sockets(stack, address, "", "", "?admin=true")
        await layer.group_send("board", message)
        return [await answer(socket) for socket in sockets]


class TestAMessageOfOnesOwn:
    """Changing a message in one socket changes it for no other one."""

    ORDER: ClassVar[dict[str, Any]] = {"type": "order.placed", "order": {"id": 1, "margin": 0.4}}

    async def test_a_dict_that_a_handler_takes_a_part_from(self, make_layer: Any) -> None:
        class Redacting(Board):
            @handles("order.placed")
            async def order_placed(self, event: dict[str, Any]) -> None:
                if not self.admin:
                    del event["order"]["margin"]
                await self.send_json(event["order"])

        user, another, admin = await answers(Redacting, make_layer(), self.ORDER)
        assert user == another == {"id": 1}
        assert admin == {"id": 1, "margin": 0.4}

    async def test_a_handler_that_takes_the_type_out_is_found_for_the_next_socket(
        self, make_layer: Any
    ) -> None:
        class Popping(Board):
            async def order_placed(self, event: Message) -> None:
                event.data.pop("type")
                assert event.type == "order.placed"
                del event["order"]["margin"]
                await self.send_json(event.data)

        assert await answers(Popping, make_layer(), self.ORDER) == [{"order": {"id": 1}}] * 3

    async def test_a_forward_that_takes_a_part_out(self, make_layer: Any) -> None:
        class Forwarding(Board):
            async def forward(self, message: Message) -> None:
                if not self.admin:
                    del message["order"]["margin"]
                await self.send_json(message["order"])

        user, another, admin = await answers(Forwarding, make_layer(), self.ORDER)
        assert user == another == {"id": 1}
        assert admin == {"id": 1, "margin": 0.4}

    async def test_middleware_that_changes_what_it_sees(self, make_layer: Any) -> None:
        @outbound
        async def redacted(connection: Any, message: Message) -> Message:
            message.data.clear()
            return message

        class Handling(Board):
            @handles("order.placed")
            async def order_placed(self, event: Message) -> None:
                await self.send_json(event["order"])

        layer = make_layer()
        connections = ConnectionManager(layer, middleware=redacted)
        expected = [self.ORDER["order"]] * 3
        assert await answers(Handling, layer, self.ORDER, connections) == expected


class Talk(Board):
    """What it does is asked for by the messages themselves."""

    async def connect(self, admin: bool = False, after: str | None = None) -> None:
        self.admin = admin
        await self.accept()
        await self.group_add("board", after=after)
        await self.send_json("ready")

    async def receive_json(self, content: Any) -> None:
        await self.layer.group_send("board", content)

    @handles("handled")
    async def handled(self, message: Message) -> None: ...

    @handles("closed")
    async def closed(self, message: Message) -> None:
        await self.close(4000, "it is closed")

    @handles("bad")
    async def bad(self, message: Message) -> None:
        raise ValueError("this one cannot be handled")

    @handles("away")
    async def away(self, message: Message) -> None:
        raise DatabaseUnavailable("the database is away")

    @handles("forwarded")
    async def forwarded(self, message: Message) -> None:
        await self.forward(message)


class Talker:
    """A client that keeps the position of each frame that has one."""

    def __init__(self, address: str) -> None:
        self._address = address
        self.position: str | None = None
        self.code: int | None = None

    async def until_closed(self, *sent: dict[str, Any]) -> list[Any]:
        """What it gets from one socket until that is closed; it sends some messages first."""
        after = "" if self.position is None else f"?after={self.position}"
        got = []
        async with connect(f"ws://{self._address}/ws{after}") as socket:
            assert await answer(socket) == "ready"
            for each in sent:
                await socket.send(json.dumps(each))
            try:
                while True:
                    frame = await answer(socket)
                    self.position = frame.get("position", self.position)
                    got.append(frame["type"] if "type" in frame else frame["data"]["type"])
            except ConnectionClosed:
                self.code = socket.close_code
        return got


@asynccontextmanager
async def talking(
    layer: ChannelLayer, consumer: type[WebSocketConsumer] = Talk, **options: Any
) -> AsyncIterator[Talker]:
    async with layer:
        app = application(consumer, ConnectionManager(layer, **options))
        async with serve(app) as address:
            yield Talker(address)


CHAT, HANDLED, CLOSED = {"type": "chat"}, {"type": "handled"}, {"type": "closed"}


class TestPositions:
    """A client resumes also after messages that it was not sent."""

    async def test_a_handler_that_closes_the_socket_does_so_once(self, make_layer: Any) -> None:
        async with talking(make_layer()) as client:
            assert await client.until_closed(CHAT, CLOSED) == ["chat", "position"]
            assert client.code == 4000
            assert await client.until_closed(CHAT, CLOSED) == ["chat", "position"]

    async def test_a_handler_that_raises_does_so_once(
        self, make_layer: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with talking(make_layer()) as client:
            assert await client.until_closed(CHAT, {"type": "bad"}) == ["chat", "error", "position"]
            assert client.code == 1011
            # Where it was, is in the log: nobody gets this message any more.
            note = f"The message was {client.position} of 'board'."
            await eventually(lambda: note in caplog.text)
            assert await client.until_closed(CHAT, CLOSED) == ["chat", "position"]
            assert client.code == 4000

    async def test_after_an_outage_the_handler_gets_the_message_again(
        self, make_layer: Any
    ) -> None:
        async with talking(make_layer()) as client:
            for sent in ([CHAT, {"type": "away"}], []):
                got = await client.until_closed(*sent)
                assert got == [*(each["type"] for each in sent[:1]), "error"]
                assert client.code == 1013

    async def test_a_client_that_has_given_a_position_is_told(self, make_layer: Any) -> None:
        async with talking(make_layer()) as client:
            client.position = "0"
            assert await client.until_closed(HANDLED, CLOSED) == ["position"]

    async def test_a_client_without_a_position_is_told_none(self, make_layer: Any) -> None:
        async with talking(make_layer()) as client:
            assert await client.until_closed(HANDLED, CLOSED) == []

    async def test_it_is_told_while_the_socket_is_open_once_for_many(
        self, make_layer: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pgchannels.web.connection, "POSITION_DELAY", 0.2)
        async with talking(make_layer()) as client:
            sent = [CHAT, *[HANDLED] * 20]
            async with connect(f"ws://{client._address}/ws") as socket:
                assert await answer(socket) == "ready"
                for each in sent:
                    await socket.send(json.dumps(each))
                first = await answer(socket)
                told: list[Any] = []
                while not told or told[-1]["position"] != f"1-{first['id'] + 20}":
                    told.append(await answer(socket))
            assert {(each["type"], each["channel"]) for each in told} == {("position", "board")}
            assert len(told) < 20

    async def test_an_envelope_tells_it_too(
        self, make_layer: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pgchannels.web.connection, "POSITION_DELAY", 0)
        async with talking(make_layer()) as client:
            got = await client.until_closed(CHAT, {"type": "forwarded"}, HANDLED, CHAT, CLOSED)
            assert [each for each in got if each != "position"] == ["chat", "forwarded", "chat"]
            assert got[-1] == "position"

    async def test_what_is_not_forwarded_or_dropped_by_middleware(self, make_layer: Any) -> None:
        class Choosy(Talk):
            async def forward(self, message: Message) -> None:
                if "secret" not in message:
                    await super().forward(message)

        @outbound
        async def dropping(connection: Any, message: Message) -> Message | None:
            return None if "muted" in message else message

        for what in ("secret", "muted"):
            async with talking(make_layer(), Choosy, middleware=dropping) as client:
                got = await client.until_closed(CHAT, {"type": "chat", what: True}, CLOSED)
                assert got == ["chat", "position"]

    async def test_a_consumer_of_bytes(self, make_layer: Any) -> None:
        class Bytes(BytesConsumer):
            async def connect(self, after: str | None = None) -> None:
                await self.accept()
                await self.join("board", after=after)

            @handles("closed")
            async def closed(self, message: Message) -> None:
                await self.close(4000)

        async with make_layer() as layer, serve(application(Bytes, layer)) as address:
            await layer.send("board", CLOSED)
            async with connect(f"ws://{address}/ws?after=0") as socket:
                frame = await answer(socket)
                told = {"type": "position", "channel": "board", "position": "1-1", "data": {}}
                assert frame == told

    async def test_what_is_read_again_is_not_told_before(self, make_layer: Any) -> None:
        class Again(Talk):
            @handles("again")
            async def again(self, message: Message) -> None:
                if self.state is ConnectionState.OPEN and not self.admin:
                    self.admin = True
                    await self.group_add("board", after="0")
                    await self.close(4001)

        async with talking(make_layer(), Again) as client:
            assert await client.until_closed(CHAT, HANDLED, {"type": "again"}) == ["chat"]
            assert client.code == 4001


class Transaction:
    """Stands for a session that a dependency commits when the endpoint has succeeded."""

    def __init__(self) -> None:
        self.ends: list[Any] = []

    async def __call__(self) -> AsyncIterator[None]:
        try:
            yield
        except Exception as error:
            self.ends.append(error.__cause__ if isinstance(error, WebSocketException) else error)
            raise
        else:
            self.ends.append("committed")


async def opened(socket: connect) -> int | None:
    """The code that a socket is closed with, or the status of the answer to its handshake."""
    try:
        async with socket as client:
            with suppress(ConnectionClosed):
                await client.send(json.dumps("go on"))
            return await closed(client)
    except InvalidStatus as refused:
        return refused.response.status_code


class TestFailures:
    """A dependency with `yield` knows whether its consumer has failed."""

    @pytest.mark.parametrize("route_level", [False, True])
    @pytest.mark.parametrize(
        ("early", "error", "code"),
        [
            (False, LookupError("a bug"), 1011),
            (False, AuthorizationError(), 3003),
            (False, UnexpectedMessage(), 1008),
            (False, DatabaseUnavailable("away"), 1013),
            (False, AuthenticationError(), 3000),
            (False, WebSocketException(4001, "enough"), 4001),
            (True, AuthorizationError(), 403),
            (True, LookupError("a bug"), 500),
            (True, HTTPException(410, "gone"), 410),
        ],
    )
    async def test_an_error_in_connect(
        self,
        memory: MemoryLayer,
        errors: Any,
        early: bool,
        error: Exception,
        code: int,
        route_level: bool,
    ) -> None:
        transaction = Transaction()
        dependency: Any = Depends(transaction)

        class Failing(JsonConsumer):
            async def connect(self, value: Any = None if route_level else dependency) -> None:
                if not early:
                    await self.accept()
                raise error

        app = FastAPI()
        app.add_api_websocket_route(
            "/ws", Failing.as_endpoint(memory), dependencies=[dependency] if route_level else None
        )
        async with serve(app) as address:
            assert await opened(connect(f"ws://{address}/ws")) == code
            await eventually(lambda: transaction.ends)
        assert transaction.ends == [error]
        if not isinstance(error, LookupError):
            assert errors() == []

    @pytest.mark.parametrize("what", ["receive", "handler", "task", "disconnect"])
    async def test_an_error_later(
        self, memory: MemoryLayer, caplog: pytest.LogCaptureFixture, what: str
    ) -> None:
        """ASGI middleware sees it, as it does an endpoint's, and the log has one traceback."""
        transaction, seen = Transaction(), []
        bug = LookupError("a bug")

        class Failing(JsonConsumer):
            async def connect(self, value: Annotated[None, Depends(transaction)]) -> None:
                await self.join("room")

            async def receive_json(self, content: Any) -> None:
                if what == "receive":
                    raise bug
                if what == "task":
                    self.spawn(self.fail())
                elif what == "disconnect":
                    await self.close()
                await self.layer.send("room", {"type": "note"})

            @handles("note")
            async def note(self, message: Message) -> None:
                if what == "handler":
                    raise bug

            async def fail(self) -> None:
                raise bug

            async def disconnect(self, code: int) -> None:
                if what == "disconnect":
                    raise bug

        inner = application(Failing, memory)

        async def middleware(scope: Any, receive: Any, send: Any) -> None:
            try:
                await inner(scope, receive, send)
            except Exception as error:
                seen.append(error)
                raise

        async with serve(middleware) as address:
            code = await opened(connect(f"ws://{address}/ws"))
            assert code == (1000 if what == "disconnect" else 1011)
            await eventually(lambda: seen)
        assert seen == transaction.ends == [bug]
        traced = [record for record in caplog.records if record.exc_info]
        assert [record.exc_info and record.exc_info[1] for record in traced] == [bug]
        if what != "disconnect":
            (own,) = (record for record in caplog.records if "Failing failed" in record.message)
            assert own.error_id in bug.__notes__[-1]  # type: ignore[attr-defined]

    @pytest.mark.parametrize(
        "error", [AuthorizationError(), DatabaseUnavailable("away"), LookupError("a bug")]
    )
    async def test_an_error_in_an_endpoint(self, memory: MemoryLayer, error: Exception) -> None:
        transaction, app = Transaction(), FastAPI()
        connections = ConnectionManager(memory)

        @app.websocket("/ws", dependencies=[Depends(transaction)])
        async def endpoint(websocket: WebSocket) -> None:
            async with connections.connect(websocket):
                raise error

        async with serve(app) as address:
            await opened(connect(f"ws://{address}/ws"))
            await eventually(lambda: transaction.ends)
        assert transaction.ends == [error]

    async def test_a_socket_that_ends_well(self, memory: MemoryLayer, errors: Any) -> None:
        transaction = Transaction()

        class Fine(JsonConsumer):
            async def connect(self, value: Annotated[None, Depends(transaction)]) -> None: ...

            async def receive_json(self, content: Any) -> None:
                await self.close()

        async with serve(application(Fine, memory)) as address:
            assert await opened(connect(f"ws://{address}/ws")) == 1000
            async with connect(f"ws://{address}/ws"):
                pass  # and the client leaves
            await eventually(lambda: len(transaction.ends) == 2)
        assert transaction.ends == ["committed", "committed"]
        assert errors() == []
