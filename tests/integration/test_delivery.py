"""Messages as consumers and their clients see them, through a real server, on both layers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, ClassVar

import pytest
from fastapi import FastAPI
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

import pgchannels.web.connection
from pgchannels import ChannelLayer, DatabaseUnavailable, Message
from pgchannels.web import (
    BytesConsumer,
    ConnectionManager,
    ConnectionState,
    JsonConsumer,
    WebSocketConsumer,
    handles,
    outbound,
)
from tests.support.sockets import answer, serve


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
            assert f"The message was {client.position} of 'board'." in caplog.text
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
                assert frame == {"type": "position", "channel": "board", "position": "1-1"}

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
