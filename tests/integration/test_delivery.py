"""Messages as consumers and their clients see them, through a real server, on both layers."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any, ClassVar

from fastapi import FastAPI
from websockets.asyncio.client import ClientConnection, connect

from pgchannels import ChannelLayer, Message
from pgchannels.web import (
    ConnectionManager,
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
