"""The web parts: history over HTTP, and sockets through a real server with a real client."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from urllib.parse import quote, urljoin

import httpx2
import psycopg
import pytest
from fastapi import FastAPI, HTTPException, Request
from starlette.websockets import WebSocket
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from pgchannels import ConfigurationError, Message, PostgresLayer, Settings
from pgchannels.channels import MEMBERS
from pgchannels.web import JsonConsumer, channels_router, lifespan
from tests.support.eventually import eventually
from tests.support.sockets import REFUSED, answer, ask, closed, serve
from tests.support.tcp_proxy import TcpProxy

ODD_NAMES = [
    "a/b/c",
    "a/messages",
    "日本語/é",
    "100%",
    "%2F",
    "?a=b&c",
    "semi;colon",
    "<>",
    "\\\"'",
]


@pytest.fixture
async def layer(database_url: str) -> AsyncIterator[PostgresLayer]:
    async with PostgresLayer(database_url) as layer:
        yield layer


def allow() -> bool:
    return True


def api(layer: PostgresLayer, authorize: Callable[..., Any] = allow) -> httpx2.AsyncClient:
    """A client of an application with the router alone."""
    app = FastAPI()
    app.include_router(channels_router(layer, authorize=authorize), prefix="/channels")
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test")


def path(channel: str) -> str:
    return f"/channels/{quote(channel, safe='')}/messages"


async def fill(layer: PostgresLayer, channel: str, count: int) -> list[Message]:
    async with layer.subscribe(channel) as stream, asyncio.timeout(10):
        await asyncio.gather(*(layer.send(channel, {"n": n}) for n in range(count)))
        return [await anext(stream) for _ in range(count)]


class TestLifespan:
    async def test_opens_and_closes_the_layer(self, database_url: str) -> None:
        layer = PostgresLayer(database_url)
        app = FastAPI(lifespan=lifespan(layer))

        @app.get("/")
        async def send(request: Request) -> bool:
            await request.state.layer.send("room", {"n": 1})
            return request.state.layer is layer

        async with serve(app) as address:
            async with httpx2.AsyncClient() as client:
                assert (await client.get(f"http://{address}/")).json() is True
            await eventually(lambda: layer.is_listening)
        assert not layer.is_listening


class TestHistory:
    async def test_a_page(self, layer: PostgresLayer) -> None:
        messages = await fill(layer, "room", 3)
        async with api(layer) as client:
            response = await client.get(path("room"))
        assert response.status_code == 200
        assert response.headers["content-type"] == "application/json"
        assert response.headers["cache-control"] == "no-store"
        assert "link" not in response.headers
        assert response.json() == {
            "messages": [json.loads(message.envelope) for message in messages],
            "next": None,
            "position": str(messages[-1].position),
            "truncated": False,
        }

    async def test_nothing(self, layer: PostgresLayer) -> None:
        async with api(layer) as client:
            response = await client.get(path("room"))
        assert response.json() == {
            "messages": [],
            "next": None,
            "position": "1-0",
            "truncated": False,
        }

    @pytest.mark.parametrize("order", ["asc", "desc"])
    @pytest.mark.parametrize("channel", ["room", *ODD_NAMES])
    async def test_links_lead_through_the_whole(
        self, layer: PostgresLayer, channel: str, order: str
    ) -> None:
        await fill(layer, channel, 10)
        await fill(layer, "other", 3)
        found: list[int] = []
        async with api(layer) as client:
            url: str | None = f"{path(channel)}?order={order}&limit=3"
            while url is not None:
                response = await client.get(url)
                assert response.status_code == 200, response.text
                found += [message["data"]["n"] for message in response.json()["messages"]]
                link = response.links.get("next")
                assert (link is None) == (response.json()["next"] is None)
                url = None if link is None else urljoin(str(response.url), link["url"])
        assert found == (list(range(10)) if order == "asc" else list(range(9, -1, -1)))

    async def test_between(self, layer: PostgresLayer) -> None:
        messages = await fill(layer, "room", 10)
        query = {"after": str(messages[2].position), "before": str(messages[6].position)}
        async with api(layer) as client:
            response = await client.get(path("room"), params=query)
        assert [m["data"]["n"] for m in response.json()["messages"]] == [3, 4, 5]

    @pytest.mark.parametrize("order", ["asc", "desc"])
    async def test_since_a_time(self, layer: PostgresLayer, order: str) -> None:
        messages = [(await fill(layer, "room", 1))[0] for _ in range(8)]
        since = messages[3].created_at.isoformat()
        found: list[int] = []
        pages = 0
        async with api(layer) as client:
            url: str | None = f"{path('room')}?order={order}&limit=2&since={quote(since)}"
            while url is not None:
                response = await client.get(url)
                assert response.status_code == 200, response.text
                found += [message["id"] for message in response.json()["messages"]]
                pages += 1
                link = response.links.get("next")
                url = None if link is None else urljoin(str(response.url), link["url"])
                if link is not None:
                    # Never both: after it, and instead of the time; or before it, down to the time.
                    query = httpx2.URL(link["url"]).params
                    assert ("after" in query, "since" in query) == (
                        (True, False) if order == "asc" else (False, True)
                    )
        assert pages == 3
        expected = [message.id for message in messages[3:]]
        assert found == (expected if order == "asc" else expected[::-1])

    async def test_since_long_ago_and_later(self, layer: PostgresLayer) -> None:
        await fill(layer, "room", 3)
        async with api(layer) as client:
            for since, count in (
                ("2000-01-01T00:00:00Z", 3),
                ("2000-01-01T00:00:00+05:30", 3),
                ("9999-12-31T23:59:59Z", 0),
            ):
                response = await client.get(path("room"), params={"since": since})
                assert len(response.json()["messages"]) == count
                assert response.json()["truncated"] is False

    async def test_links_lead_through_what_matches(
        self, layer: PostgresLayer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await fill(layer, "room", 40)
        found: list[list[int]] = []
        # So that a page ends before it has found anything.
        monkeypatch.setattr("pgchannels.layer._MAX_SPARSE_PAGES", 1)
        async with api(layer) as client:
            text = quote("$.n == 7 || $.n >= 20 && !($['n'] != 30)")
            url: str | None = f"{path('room')}?limit=4&filter={text}"
            while url is not None:
                response = await client.get(url)
                assert response.status_code == 200, response.text
                found.append([message["data"]["n"] for message in response.json()["messages"]])
                link = response.links.get("next")
                assert (link is None) == (response.json()["next"] is None)
                url = None if link is None else urljoin(str(response.url), link["url"])
        assert [n for page in found for n in page] == [7, 30]
        assert [] in found

    async def test_payloads_pass_to_the_letter(
        self, layer: PostgresLayer, database_url: str
    ) -> None:
        odd = ' {"a" :\n1.0e2 , "a":"\\u00e9\\/", "big":123456789012345678901234567890 } '
        with psycopg.connect(database_url, autocommit=True) as connection:
            connection.execute("select pgchannels.publish('room', %s)", [odd])
            connection.execute("select pgchannels.seal()")
        async with api(layer) as client:
            response = await client.get(path("room"))
        assert f'"data":{odd}' in response.text
        assert response.json()["messages"][0]["data"]["a"] == "é/"

    async def test_truncated(self, layer: PostgresLayer, database_url: str) -> None:
        messages = await fill(layer, "room", 5)
        with psycopg.connect(database_url, autocommit=True) as connection:
            connection.execute("update pgchannels.log set floor = 3")
        async with api(layer) as client:
            response = await client.get(path("room"), params={"after": str(messages[0].position)})
        assert response.json()["truncated"] is True
        assert [m["id"] for m in response.json()["messages"]] == [4, 5]

    @pytest.mark.parametrize(
        ("query", "location"),
        [
            ("after=x", ["query", "after"]),
            ("after=", ["query", "after"]),
            ("before=x", ["query", "before"]),
            ("since=x", ["query", "since"]),
            ("since=", ["query", "since"]),
            ("since=2026-11-20T12:00:00", ["query", "since"]),
            ("since=0001-01-01T00:00:00%2B01:00", ["query", "since"]),
            ("after=0&since=2026-11-20T12:00:00Z", ["query", "since"]),
            ("after=1-99&since=2026-11-20T12:00:00Z", ["query", "since"]),
            ("filter=", ["query", "filter"]),
            ("filter=x", ["query", "filter"]),
            ("filter=$.a%20==", ["query", "filter"]),
            ("filter=" + "$.a" * 200, ["query", "filter"]),
            ("order=up", ["query", "order"]),
            ("limit=0", ["query", "limit"]),
            ("limit=1001", ["query", "limit"]),
            ("limit=many", ["query", "limit"]),
        ],
    )
    async def test_unprocessable(
        self, layer: PostgresLayer, query: str, location: list[str]
    ) -> None:
        await fill(layer, "room", 2)
        async with api(layer) as client:
            response = await client.get(f"{path('room')}?{query}")
        assert response.status_code == 422
        (detail,) = response.json()["detail"]
        assert detail["loc"] == location
        assert detail["msg"]

    @pytest.mark.parametrize(
        "query",
        [
            "after=1-99",
            "after=7-1",
            "before=1-99",
            "after=1-1&before=1-99",
            "after=1-99&before=1-1",
            "before=1-99&since=2026-11-20T12:00:00Z",
        ],
    )
    async def test_unknown_positions(self, layer: PostgresLayer, query: str) -> None:
        """As sockets say it, so that a client can tell that from a mistake of its own."""
        await fill(layer, "room", 2)
        async with api(layer) as client:
            response = await client.get(f"{path('room')}?{query}")
        assert response.status_code == 410
        assert response.json()["detail"]["code"] == "unknown_position"

    @pytest.mark.parametrize("channel", ["a b", "a*", "x" * 201, "\u200b"])
    async def test_bad_channels(self, layer: PostgresLayer, channel: str) -> None:
        async with api(layer) as client:
            response = await client.get(path(channel))
        assert response.status_code == 422
        assert response.json()["detail"][0]["loc"] == ["path", "channel"]

    @pytest.mark.parametrize("answer", [None, False, 0, ""])
    async def test_refused(self, layer: PostgresLayer, answer: object) -> None:
        async with api(layer, lambda: answer) as client:
            for channel in ("room", "not valid"):
                assert (await client.get(path(channel))).status_code == 403

    @pytest.mark.parametrize("value", [1, "ada", {"id": 7}])
    async def test_nothing_but_true_allows(
        self, layer: PostgresLayer, caplog: pytest.LogCaptureFixture, value: object
    ) -> None:
        """A dependency that gives the user who has signed in lets no user read all channels."""
        async with api(layer, lambda: value) as client:
            assert (await client.get(path("room"))).status_code == 403
        assert "only True allows" in caplog.text

    async def test_authorize_is_a_dependency(self, layer: PostgresLayer) -> None:
        def authorize(channel: str, request: Request, token: str = "") -> bool:
            if not token:
                raise HTTPException(401)
            return channel == "a/b" and request.method == "GET"

        async with api(layer, authorize) as client:
            assert (await client.get(path("a/b"))).status_code == 401
            assert (await client.get(path("a/b") + "?token=x")).status_code == 200
            assert (await client.get(path("b") + "?token=x")).status_code == 403

    def test_without_authorize(self) -> None:
        layer = PostgresLayer("postgresql://")
        with pytest.raises(TypeError, match="authorize"):
            channels_router(layer)  # type: ignore[call-arg]
        with pytest.raises(ConfigurationError, match="authorize"):
            channels_router(layer, authorize=None)  # type: ignore[arg-type]

    def test_openapi(self) -> None:
        app = FastAPI()
        router = channels_router(PostgresLayer("postgresql://"), authorize=allow, tags=["mine"])
        app.include_router(router, prefix="/channels")
        schema = app.openapi()
        operation = schema["paths"]["/channels/{channel}/messages"]["get"]
        assert operation["tags"] == ["mine"]
        assert {parameter["name"] for parameter in operation["parameters"]} == {
            "channel",
            "after",
            "before",
            "since",
            "filter",
            "order",
            "limit",
        }
        (since,) = (p for p in operation["parameters"] if p["name"] == "since")
        assert since["schema"]["anyOf"][0] == {"type": "string", "format": "date-time"}
        assert since["required"] is False
        answer = operation["responses"]["200"]["content"]["application/json"]["schema"]
        assert answer == {"$ref": "#/components/schemas/History"}
        # Every reference leads somewhere, and the example fits what is sent.
        for name in re.findall(r"#/components/schemas/(\w+)", json.dumps(schema)):
            assert name in schema["components"]["schemas"]
        assert set(schema["components"]["schemas"]["Envelope"]["properties"]) == {
            "id",
            "position",
            "channel",
            "created_at",
            "data",
            "attachments",
        }

    async def test_while_the_database_is_away(self, database_url: str) -> None:
        async with (
            TcpProxy(database_url) as proxy,
            PostgresLayer(proxy.url) as layer,
            api(layer) as client,
        ):
            assert (await client.get(path("room"))).status_code == 200
            await proxy.cut(refuse=True)
            response = await client.get(path("room"))
            assert response.status_code == 503
            assert response.headers["retry-after"] == "1"
            assert response.json()["detail"]["code"] == "unavailable"
            assert "127.0.0.1" not in response.text
            proxy.resume()
            assert (await client.get(path("room"))).status_code == 200

    async def test_while_the_layer_is_closed(self, layer: PostgresLayer) -> None:
        await layer.close()
        async with api(layer) as client:
            response = await client.get(path("room"))
            assert response.status_code == 503
            assert response.headers["retry-after"] == "1"
            assert response.json()["detail"]["code"] == "draining"
            assert (await client.get(path("room"), params={"after": "x"})).status_code == 422


class Recorder(JsonConsumer):
    """A consumer of one room that does as it is told, and notes what happens to it."""

    codes: list[int]
    sockets: list[Recorder]

    async def connect(self) -> None:
        self.sockets.append(self)
        query = self.query_params
        match query.get("connect"):
            case "refuse":
                await self.close()
                return
            case "close":
                await self.accept()
                await self.close(4000, "no")
                return
            case "fail":
                raise RuntimeError("connect failed")
        if "early" in query:
            await self.accept()
        if "room" in query:
            await self.join(query["room"], after=query.get("after"))

    async def receive_json(self, content: Any) -> None:
        match content:
            case {"fail": text}:
                raise RuntimeError(text)
            case {"join": group, "after": after}:
                await self.join(group, after)
            case {"join": group}:
                await self.join(group)
            case {"leave": group}:
                await self.leave(group)
            case {"send": payload}:
                await self.layer.send("room", payload)
            case {"close": code}:
                await self.close(code)
        await self.send_json({"done": content})

    async def disconnect(self, code: int) -> None:
        self.codes.append(code)


class Room:
    """A served application, its consumers' records, and sockets to it."""

    def __init__(self, address: str, consumer: type[Recorder]) -> None:
        self.address = address
        self.consumer = consumer

    def socket(self, query: str = "") -> connect:
        # Without a bound, so that the client goes on reading while it waits to be closed.
        return connect(f"ws://{self.address}/ws?{query}", max_queue=None)


def fresh(base: type[Recorder] = Recorder) -> type[Recorder]:
    """A class whose records are of one test alone."""

    class Fresh(base):  # type: ignore[valid-type, misc]
        codes: list[int] = []  # noqa: RUF012
        sockets: list[Recorder] = []  # noqa: RUF012

    return Fresh


@asynccontextmanager
async def open_room(layer: PostgresLayer, base: type[Recorder] = Recorder) -> AsyncIterator[Room]:
    consumer = fresh(base)
    app = FastAPI()
    app.add_api_websocket_route("/ws", consumer.as_endpoint(layer))
    async with serve(app) as address:
        yield Room(address, consumer)


@pytest.fixture
async def room(layer: PostgresLayer) -> AsyncIterator[Room]:
    async with open_room(layer) as room:
        yield room


@pytest.fixture
def errors(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What has been logged as an error, by anyone."""
    caplog.set_level(logging.WARNING)
    return lambda: [
        record.getMessage()
        for record in caplog.records
        if record.levelno >= logging.ERROR and record.getMessage() != REFUSED
    ]


class LeavesAtOnce(Recorder):
    """It has enough of the room after the first message."""

    async def forward(self, message: Message) -> None:
        await super().forward(message)
        await self.leave("room")


class ClosesWhileForwarding(Recorder):
    """Whatever the client says closes the socket, between two messages of one batch."""

    def __init__(self, websocket: WebSocket, layer: PostgresLayer) -> None:
        super().__init__(websocket, layer)
        self.closing = asyncio.Event()

    async def receive_json(self, content: Any) -> None:
        await self.close(4001, "enough")
        self.closing.set()
        # It has still something to do, so that the next message's failure comes first.
        await asyncio.Event().wait()

    async def forward(self, message: Message) -> None:
        await super().forward(message)
        await self.closing.wait()


class TestConsumer:
    async def test_replay_then_live(self, layer: PostgresLayer, room: Room) -> None:
        messages = await fill(layer, "room", 5)
        async with room.socket(f"room=room&after={messages[1].position}") as socket:
            for message in messages[2:]:
                async with asyncio.timeout(10):
                    assert await socket.recv() == message.envelope
            await layer.send("room", {"text": "live é🚀"})
            assert (await answer(socket))["data"] == {"text": "live é🚀"}
            assert await ask(socket, {"join": "other"}) == {"done": {"join": "other"}}
            await layer.send("other", {})
            assert (await answer(socket))["channel"] == "other"

    async def test_leave(self, layer: PostgresLayer, room: Room) -> None:
        async with room.socket("room=room") as socket:
            await ask(socket, {"join": "other"})
            await ask(socket, {"leave": "room"})
            await layer.send("room", {"n": 1})
            await layer.send("other", {"n": 2})
            assert (await answer(socket))["data"] == {"n": 2}

    async def test_leaving_with_a_batch_in_hand(self, layer: PostgresLayer) -> None:
        await fill(layer, "room", 5)
        async with open_room(layer, LeavesAtOnce) as room, room.socket() as socket:
            await ask(socket, {"join": "other"})
            await socket.send('{"join": "room", "after": "0"}')
            # The five are one batch; that it is joined may be said before or after the first.
            first = [await answer(socket) for _ in range(2)]
            assert [m["data"]["n"] for m in first if "data" in m] == [0]
            await layer.send("other", {"n": 100})
            assert (await answer(socket))["data"] == {"n": 100}

    async def test_the_layer_forgets_closed_sockets(self, layer: PostgresLayer, room: Room) -> None:
        async with room.socket("room=room") as socket:
            await ask(socket, {})
        await eventually(lambda: room.consumer.codes)
        assert layer._node is not None
        await eventually(lambda: layer._node is not None and not layer._node.streams)
        await eventually(lambda: layer._node is not None and not layer._node.members._members)
        await eventually(lambda: layer._node and [*layer._node.hub._index] == [MEMBERS])

    @pytest.mark.parametrize(
        "frame", ["", "{", "nothing", b"\xff\xfe", b"", b"{", '{"a": NaN}', "[" * 5000]
    )
    async def test_invalid_json(self, room: Room, frame: str | bytes) -> None:
        async with room.socket() as socket:
            await socket.send(frame)
            error = await answer(socket)
            assert (error["type"], error["code"]) == ("error", "invalid_json")
            assert await ask(socket, [1]) == {"done": [1]}

    async def test_binary_frames(self, room: Room) -> None:
        async with room.socket() as socket:
            await socket.send(b'{"a": 1}')
            assert await answer(socket) == {"done": {"a": 1}}

    @pytest.mark.parametrize(
        ("content", "code"),
        [
            ({"join": "no channel"}, "invalid_message"),
            ({"join": 5}, "invalid_message"),
            ({"join": "room", "after": "x"}, "invalid_position"),
            ({"join": "room", "after": "1-99"}, "unknown_position"),
            ({"send": [1]}, "invalid_message"),
            ({"send": {"text": "x" * 65536}}, "frame_too_large"),
        ],
    )
    async def test_a_clients_mistakes(self, room: Room, content: Any, code: str) -> None:
        async with room.socket() as socket:
            error = await ask(socket, content)
            assert (error["type"], error["code"]) == ("error", code)
            assert error["detail"]
            assert await ask(socket, 1) == {"done": 1}

    async def test_a_handler_that_fails(self, room: Room, caplog: pytest.LogCaptureFixture) -> None:
        async with room.socket() as socket:
            await socket.send('{"fail": "secret"}')
            assert await closed(socket) == 1011
            assert "secret" not in (socket.close_reason or "")
        await eventually(lambda: room.consumer.codes == [1011])
        assert "Fresh failed" in caplog.text

    @pytest.mark.parametrize("early", ["", "&early=1"])
    @pytest.mark.parametrize(
        ("query", "code"),
        [
            ("room=room&after=1-99", "unknown_position"),
            ("room=room&after=x", "invalid_position"),
            ("room=no%20channel", "invalid_message"),
        ],
    )
    async def test_connecting_in_vain(self, room: Room, query: str, code: str, early: str) -> None:
        async with room.socket(query + early) as socket:
            error = await answer(socket)
            assert (error["type"], error["code"]) == ("error", code)
            # It would be deaf.
            expected = 3010 if code == "unknown_position" else 1008
            assert await closed(socket) == expected
        await eventually(lambda: room.consumer.codes == [expected])

    async def test_refused(self, room: Room, errors: Callable[[], list[str]]) -> None:
        with pytest.raises(InvalidStatus) as raised:
            async with room.socket("connect=refuse"):
                pass
        assert raised.value.response.status_code == 403
        await eventually(lambda: len(room.consumer.codes) == 1)
        assert errors() == []

    async def test_closed_by_connect(self, room: Room, errors: Callable[[], list[str]]) -> None:
        async with room.socket("connect=close") as socket:
            assert await closed(socket) == 4000
        await eventually(lambda: len(room.consumer.codes) == 1)
        assert errors() == []

    async def test_connect_fails(self, room: Room, caplog: pytest.LogCaptureFixture) -> None:
        with pytest.raises((InvalidStatus, ConnectionClosed)):
            async with room.socket("connect=fail") as socket:
                await socket.recv()
        await eventually(lambda: room.consumer.codes == [1011])
        assert "connect failed" in caplog.text

    @pytest.mark.parametrize("code", [1000, 1001, 3000, 4999])
    async def test_closed_by_the_client(
        self, room: Room, code: int, errors: Callable[[], list[str]]
    ) -> None:
        async with room.socket("room=room") as socket:
            await ask(socket, {})
            await socket.close(code)
        await eventually(lambda: room.consumer.codes == [code])
        assert errors() == []

    async def test_gone_without_a_word(self, room: Room, errors: Callable[[], list[str]]) -> None:
        async with room.socket("room=room") as socket:
            await ask(socket, {})
            socket.transport.abort()
            await eventually(lambda: room.consumer.codes)
        assert room.consumer.codes in ([1006], [1005])
        assert errors() == []

    async def test_closed_by_its_handler(self, room: Room, errors: Callable[[], list[str]]) -> None:
        async with room.socket() as socket:
            await socket.send('{"close": 4001}')
            assert await closed(socket) == 4001
        await eventually(lambda: len(room.consumer.codes) == 1)

    async def test_closed_by_its_handler_while_messages_are_forwarded(
        self, layer: PostgresLayer, errors: Callable[[], list[str]]
    ) -> None:
        await fill(layer, "room", 5)
        async with open_room(layer, ClosesWhileForwarding) as room:
            async with room.socket("room=room&after=0") as socket:
                assert (await answer(socket))["data"] == {"n": 0}
                await socket.send("1")
                assert await closed(socket) == 4001
                assert socket.close_reason == "enough"
            await eventually(lambda: room.consumer.codes == [4001])
        assert errors() == []

    async def test_gone_while_messages_are_forwarded(
        self, layer: PostgresLayer, room: Room, errors: Callable[[], list[str]]
    ) -> None:
        sending = True

        async def send() -> None:
            while sending:
                await asyncio.gather(*(layer.send("room", {"text": "x" * 1000}) for _ in range(50)))

        task = asyncio.create_task(send())
        for n in range(10):
            async with room.socket("room=room") as socket:
                for _ in range(20):
                    await answer(socket)
                if n % 2:
                    socket.transport.abort()
            await eventually(lambda n=n: len(room.consumer.codes) == n + 1)  # type: ignore[misc]
        sending = False
        await task
        assert errors() == []

    async def test_truncated(self, layer: PostgresLayer, room: Room, database_url: str) -> None:
        messages = await fill(layer, "room", 5)
        with psycopg.connect(database_url, autocommit=True) as connection:
            connection.execute("update pgchannels.log set floor = 3")
        async with room.socket(f"room=room&after={messages[0].position}") as socket:
            assert await answer(socket) == {"type": "truncated"}
            assert [(await answer(socket))["id"] for _ in range(2)] == [4, 5]
            await layer.send("room", {})
            assert (await answer(socket))["id"] == 6

    async def test_truncated_with_nothing_left_to_read(
        self, layer: PostgresLayer, room: Room, database_url: str
    ) -> None:
        messages = await fill(layer, "room", 5)
        with psycopg.connect(database_url, autocommit=True) as connection:
            connection.execute("update pgchannels.log set floor = 5")
            connection.execute("delete from pgchannels.messages")
        async with room.socket(f"room=room&after={messages[0].position}") as socket:
            assert await answer(socket) == {"type": "truncated"}
            assert await ask(socket, 1) == {"done": 1}  # and it is told once
            await layer.send("room", {})
            assert (await answer(socket))["id"] == 6

    async def test_the_log_is_rewritten(self, database_url: str) -> None:
        settings = Settings(database_url=database_url, poll_interval=0.2)
        async with PostgresLayer(settings) as layer, open_room(layer) as room:
            await fill(layer, "room", 2)
            async with room.socket("room=room&after=0") as socket:
                assert [(await answer(socket))["id"] for _ in range(2)] == [1, 2]
                with psycopg.connect(database_url, autocommit=True) as connection:
                    connection.execute("delete from pgchannels.messages")
                    connection.execute("delete from pgchannels.batches")
                assert await closed(socket) == 1012
            await eventually(lambda: room.consumer.codes == [1012])
            async with room.socket("room=room&after=1-2") as socket:
                assert (await answer(socket))["code"] == "unknown_position"
            async with room.socket("room=room") as socket:
                await ask(socket, {})
                await layer.send("room", {"n": 1})
                assert (await answer(socket))["position"] == "2-1"

    async def test_nobody_has_opened_the_layer(
        self, database_url: str, errors: Callable[[], list[str]]
    ) -> None:
        async with open_room(PostgresLayer(database_url)) as room:
            with pytest.raises(InvalidStatus) as raised:
                async with room.socket():
                    pass
            assert raised.value.response.status_code == 503
            assert room.consumer.sockets == []
        (error,) = errors()
        assert "not open" in error
        assert "lifespan" in error

    async def test_cancelled_while_it_is_being_closed(self, layer: PostgresLayer) -> None:
        """As by a server that does not wait for the client to answer the close."""
        consumer, closing = fresh(), asyncio.Event()

        async def receive() -> Any:
            return {"type": "websocket.connect"}

        async def send(message: Any) -> None:
            if message["type"] == "websocket.close":
                closing.set()
                await asyncio.Event().wait()

        query = b"room=no%20channel"
        scope = {"type": "websocket", "path": "/", "headers": [], "query_string": query}
        endpoint = consumer.as_endpoint(layer)
        serving = asyncio.ensure_future(endpoint(WebSocket(scope, receive, send)))
        await asyncio.wait_for(closing.wait(), 10)
        assert consumer.codes == []
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await serving
        assert consumer.codes == [1008]

    async def test_the_layer_closes(self, layer: PostgresLayer, room: Room) -> None:
        async with room.socket("room=room") as first, room.socket() as second:
            await ask(first, {})
            await ask(second, {})
            await layer.close()
            assert await closed(first) == 1012
            assert await closed(second) == 1012
        await eventually(lambda: room.consumer.codes == [1012, 1012])

    async def test_sockets_hear_each_other(self, room: Room) -> None:
        async with room.socket("room=room") as first, room.socket("room=room") as second:
            await ask(second, {})
            await first.send('{"send": {"text": "hello"}}')
            assert (await answer(second))["data"] == {"text": "hello"}

    async def test_the_server_shuts_down(self, database_url: str) -> None:
        layer = PostgresLayer(database_url)

        consumer = fresh()
        app = FastAPI(lifespan=lifespan(layer))
        app.add_api_websocket_route("/ws", consumer.as_endpoint(layer))
        async with AsyncExitStack() as stack:
            async with serve(app) as address:
                socket = await stack.enter_async_context(connect(f"ws://{address}/ws?room=room"))
                await ask(socket, {})
            assert await closed(socket) == 1012
        assert consumer.codes == [1012]
