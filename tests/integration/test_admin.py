"""Administration, over two nodes, through a real server: who may, what it does, what is logged."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Annotated, Any, NamedTuple
from urllib.parse import quote

import httpx2
import pytest
from fastapi import FastAPI, Header, HTTPException
from starlette.websockets import WebSocket
from websockets.asyncio.client import ClientConnection, connect

from pgchannels import ChannelLayer, ConfigurationError, MemoryLayer, PostgresLayer, Settings
from pgchannels.memory import MemoryLog
from pgchannels.web import admin_router
from pgchannels.web.connections import ConnectionManager
from tests.support.eventually import eventually
from tests.support.sockets import answer, closed, serve
from tests.support.tcp_proxy import TcpProxy


@pytest.fixture(params=["memory", "postgres"])
def make_layer(request: pytest.FixtureRequest) -> Callable[[], ChannelLayer]:
    """Makes nodes of one log."""
    if request.param == "memory":
        log = MemoryLog()
        return lambda: MemoryLayer(log=log)
    url = request.getfixturevalue("database_url")
    return lambda: PostgresLayer(url)


def admin(authorization: Annotated[str, Header()] = "") -> bool:
    if authorization == "raise":
        raise HTTPException(401, "who are you?")
    return authorization == "admin"


def ada() -> str:
    return "ada"


def application(
    connections: ConnectionManager, app: FastAPI | None = None, **options: Any
) -> FastAPI:
    app = app or FastAPI()
    router = connections.admin_router(**{"authorize": admin, "who": ada, **options})
    app.include_router(router, prefix="/admin")

    @app.websocket("/ws")
    async def endpoint(socket: WebSocket, user: str | None = None, room: str = "lobby") -> None:
        about = None if user is None else {"name": user.title()}
        async with connections.connect(socket, user_id=user, metadata=about) as connection:
            await connection.group_add(room)
            await connection.send_json({"id": connection.id})
            async for content in connection:
                await connection.send_json(content)

    return app


class Node(NamedTuple):
    """One of two, as an operator and as clients have it."""

    connections: ConnectionManager
    address: str
    http: httpx2.AsyncClient
    sockets: AsyncExitStack

    async def socket(self, query: str = "") -> tuple[ClientConnection, str]:
        """A client, and its connection's id."""
        client = await self.sockets.enter_async_context(connect(f"ws://{self.address}/ws?{query}"))
        return client, (await answer(client))["id"]

    async def post(self, path: str, body: dict[str, Any], status: int) -> Any:
        response = await self.http.post(f"/admin/{path}", json=body)
        assert response.status_code == status, response.text
        return response.json()

    async def get(self, path: str, status: int = 200) -> Any:
        response = await self.http.get(f"/admin/{path}")
        assert response.status_code == status, response.text
        return response.json()


@pytest.fixture
async def nodes(make_layer: Callable[[], ChannelLayer]) -> AsyncIterator[tuple[Node, Node]]:
    async with AsyncExitStack() as stack:
        made = []
        for _ in range(2):
            connections = ConnectionManager(await stack.enter_async_context(make_layer()))
            address = await stack.enter_async_context(serve(application(connections)))
            http = await stack.enter_async_context(
                httpx2.AsyncClient(
                    base_url=f"http://{address}", headers={"authorization": "admin"}, timeout=30
                )
            )
            sockets = await stack.enter_async_context(AsyncExitStack())
            made.append(Node(connections, address, http, sockets))
        yield made[0], made[1]


@pytest.fixture
async def memory() -> AsyncIterator[ConnectionManager]:
    async with MemoryLayer() as layer:
        yield ConnectionManager(layer)


def client(app: FastAPI, authorization: str = "admin") -> httpx2.AsyncClient:
    return httpx2.AsyncClient(
        transport=httpx2.ASGITransport(app),
        base_url="http://test",
        headers={"authorization": authorization},
    )


HELLO = {"payload": {"type": "hello"}}
NOBODY = f"ws.{'0' * 32}.{'0' * 16}"

# Every endpoint there is: method, path, a body that it takes.
ENDPOINTS: list[tuple[str, str, dict[str, Any] | None]] = [
    ("POST", "announcements", HELLO),
    ("POST", "messages", {**HELLO, "group": "room:1"}),
    ("GET", "connections", None),
    ("GET", "connections/ws.1", None),
    ("POST", "disconnections", {"everyone": True}),
    ("POST", "revocations", {"user_id": "7"}),
]


class TestWhoMay:
    def test_there_is_no_default(self, memory: ConnectionManager) -> None:
        with pytest.raises(TypeError):
            memory.admin_router()  # type: ignore[call-arg]
        with pytest.raises(ConfigurationError, match="authorize="):
            admin_router(memory, authorize=None)  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match="who="):
            admin_router(memory, authorize=admin, who="ada")  # type: ignore[arg-type]

    def test_these_are_all(self, memory: ConnectionManager) -> None:
        found = {
            (method, route.path)  # type: ignore[attr-defined]
            for route in admin_router(memory, authorize=admin).routes
            for method in route.methods  # type: ignore[attr-defined]
        }
        tested = {(m, "/" + p.replace("ws.1", "{id:path}")) for m, p, _ in ENDPOINTS}
        assert found == tested

    @pytest.mark.parametrize(("authorization", "status"), [("", 403), ("raise", 401)])
    @pytest.mark.parametrize(("method", "path", "body"), ENDPOINTS)
    async def test_nobody_by_default(
        self,
        memory: ConnectionManager,
        method: str,
        path: str,
        body: Any,
        authorization: str,
        status: int,
    ) -> None:
        async with client(application(memory), authorization) as http:
            response = await http.request(method, f"/admin/{path}", json=body)
            assert response.status_code == status
            # What is wrong about a request is nobody's business who may not make it.
            response = await http.request(method, f"/admin/{path}", json={"nonsense": 1})
            assert response.status_code == status
        assert not (await memory.layer.history("room:1")).messages

    @pytest.mark.parametrize("value", [False, None, 0, "", 1, "ada", {"id": 7, "is_admin": False}])
    @pytest.mark.parametrize(("method", "path", "body"), ENDPOINTS)
    async def test_nothing_but_true_allows(
        self,
        memory: ConnectionManager,
        caplog: pytest.LogCaptureFixture,
        value: object,
        method: str,
        path: str,
        body: Any,
    ) -> None:
        """A dependency that gives the user who has signed in lets no user administer."""
        async with client(application(memory, authorize=lambda: value)) as http:
            response = await http.request(method, f"/admin/{path}", json=body)
            assert response.status_code == 403
        assert "only True allows" in caplog.text
        assert "7" not in caplog.text  # nor who it was

    @pytest.mark.parametrize(
        ("path", "body"), [(path, body) for method, path, body in ENDPOINTS if method == "POST"]
    )
    @pytest.mark.parametrize("strict", [True, False])
    @pytest.mark.parametrize("content_type", [None, "text/plain", "text/plain;application/json"])
    async def test_a_form_of_another_site_does_nothing(
        self,
        memory: ConnectionManager,
        caplog: pytest.LogCaptureFixture,
        path: str,
        body: Any,
        content_type: str | None,
        strict: bool,
    ) -> None:
        """A page may send such requests anywhere, with the cookies of the administrator."""
        caplog.set_level(logging.INFO, "pgchannels.web.admin")
        headers = {} if content_type is None else {"content-type": content_type}
        app = FastAPI(strict_content_type=strict)
        async with client(application(memory, app)) as http:
            content = json.dumps(body).encode()
            response = await http.post(f"/admin/{path}", content=content, headers=headers)
            assert response.status_code == 422
            assert "pgchannels.web.admin" not in {record.name for record in caplog.records}
            assert (await http.post(f"/admin/{path}", json=body)).is_success


class TestSending:
    async def test_an_announcement_reaches_everyone(self, nodes: tuple[Node, Node]) -> None:
        here, there = nodes
        clients = [(await node.socket("user=7"))[0] for node in (here, there, there)]
        sent = await here.post("announcements", {**HELLO, "ttl": 60}, 201)
        for socket in clients:
            received = await answer(socket)
            assert received["data"] == HELLO["payload"]
            assert sent.keys() == {"created_at"}

    @pytest.mark.parametrize("kind", ["group", "room", "user_id", "connection"])
    async def test_a_message_reaches_whom_it_is_for(
        self, nodes: tuple[Node, Node], kind: str
    ) -> None:
        here, there = nodes
        meant, id = await there.socket("user=7&room=tea")
        other, other_id = await there.socket("user=8&room=coffee")
        target = {"group": "tea", "room": "tea", "user_id": "7", "connection": id}[kind]
        await here.post("messages", {**HELLO, kind: target}, 201)
        assert (await answer(meant))["data"] == HELLO["payload"]
        await here.post("messages", {"payload": {"n": 2}, "connection": other_id}, 201)
        assert (await answer(other))["data"] == {"n": 2}  # and nothing before that

    async def test_ttl_and_headers_are_passed_on(self, memory: ConnectionManager) -> None:
        body = {**HELLO, "group": "tea", "headers": {"by": "ada"}, "ttl": 0.001}
        async with memory.layer.subscribe("tea") as stream:
            async with client(application(memory)) as http:
                assert (await http.post("/admin/messages", json=body)).status_code == 201
            async with asyncio.timeout(10):
                message = await anext(stream)
        assert message.headers == {"by": "ada"}

        async def is_gone() -> Any:
            return not (await memory.layer.history("tea")).messages

        await eventually(is_gone)


class TestListing:
    async def test_all_of_them_in_pages(self, nodes: tuple[Node, Node]) -> None:
        here, there = nodes
        ids = {(await node.socket(f"user={n}"))[1] for n, node in enumerate((here, there) * 3)}
        found, path = [], "connections?limit=2"
        while True:
            page = await here.get(path)
            found += page["connections"]
            assert len(page["connections"]) <= 2
            if page["next"] is None:
                break
            path = f"connections?limit=2&after={quote(page['next'])}"
        assert [each["id"] for each in found] == sorted(ids)
        assert all(each["local"] is None for each in found)
        assert len({each["node"] for each in found}) == 2

    async def test_those_of_a_user(self, nodes: tuple[Node, Node]) -> None:
        here, there = nodes
        ids = {(await node.socket("user=a/b%20c"))[1] for node in nodes}
        await there.socket("user=8")
        page = await here.get("connections?user_id=a/b%20c")
        assert {each["id"] for each in page["connections"]} == ids
        assert {each["user_id"] for each in page["connections"]} == {"a/b c"}
        assert (await here.get("connections?user_id=nobody"))["connections"] == []

    async def test_one(self, nodes: tuple[Node, Node]) -> None:
        here, there = nodes
        for n in range(5):  # others, whose names begin alike
            await here.socket(f"user={n}")
        _, id = await here.socket("user=ada&room=tea")
        found = await here.get(f"connections/{quote(id, safe='')}")
        assert (found["id"], found["user_id"], found["metadata"]) == (id, "ada", {"name": "Ada"})
        assert found["local"]["groups"] == ["tea"]
        assert found["local"]["state"] == "open"
        assert found["local"]["messages_out"] == 1
        elsewhere = await there.get(f"connections/{id}")
        assert elsewhere == {**found, "local": None}

    @pytest.mark.parametrize(
        "id", ["ws.nothing", "a/b", "x", "~~~~", NOBODY, "pgchannels:everyone"]
    )
    async def test_none(self, nodes: tuple[Node, Node], id: str) -> None:
        await nodes[0].socket()
        await nodes[0].get(f"connections/{id}", 404)

    async def test_names_that_are_ours(self, memory: ConnectionManager) -> None:
        async with client(application(memory)) as http:
            response = await http.get(f"/admin/connections/pgchannels:{NOBODY}")
        assert response.status_code == 422
        assert f"'pgchannels:{NOBODY}'" in response.text


class TestDisconnecting:
    @pytest.mark.parametrize("asked", [0, 1])
    async def test_one(self, nodes: tuple[Node, Node], asked: int) -> None:
        socket, id = await nodes[0].socket("user=7")
        other, _ = await nodes[0].socket("user=7")
        body = {"connection": id, "code": 4001, "reason": "ä" * 61}
        await nodes[asked].post("disconnections", body, 202)
        assert (await closed(socket), socket.close_reason) == (4001, "ä" * 61)
        await other.send("[1]")
        assert await answer(other) == [1]

    @pytest.mark.parametrize("selector", [{"user_id": "7"}, {"group": "tea"}])
    async def test_those_of_somebody(
        self, nodes: tuple[Node, Node], selector: dict[str, str]
    ) -> None:
        here, there = nodes
        meant = [(await node.socket("user=7&room=tea"))[0] for node in nodes]
        other, _ = await there.socket("user=8&room=coffee")
        await here.post("disconnections", {**selector, "code": 1008}, 202)
        assert [await closed(socket) for socket in meant] == [1008, 1008]
        await other.send("[1]")
        assert await answer(other) == [1]

    async def test_everyone(self, nodes: tuple[Node, Node]) -> None:
        sockets = [(await node.socket())[0] for node in nodes]
        await nodes[0].post("disconnections", {"everyone": True}, 202)
        assert [await closed(socket) for socket in sockets] == [1000, 1000]
        await eventually(lambda: not any(len(node.connections) for node in nodes))

    async def test_nobody(self, nodes: tuple[Node, Node]) -> None:
        await nodes[0].post("disconnections", {"connection": NOBODY}, 202)


class TestRevoking:
    async def test_tokens_are_no_good_any_more(self, nodes: tuple[Node, Node]) -> None:
        here, there = nodes
        await here.post("revocations", {"user_id": "7", "token_id": "t-1", "keep": 3600}, 202)
        assert await there.connections.layer.is_revoked(user_id="7")
        assert await there.connections.layer.is_revoked(token_id="t-1")
        assert not await there.connections.layer.is_revoked(user_id="8", token_id="t-2")


class TestWhatIsWrong:
    @pytest.mark.parametrize(
        ("path", "body", "where"),
        [
            ("announcements", {}, "payload"),
            ("announcements", {"payload": [1]}, "payload"),
            ("announcements", {**HELLO, "ttl": 0}, "ttl"),
            ("announcements", {**HELLO, "group": "tea"}, "group"),
            ("messages", HELLO, "exactly one of"),
            ("messages", {**HELLO, "group": "tea", "user_id": "7"}, "exactly one of"),
            ("messages", {**HELLO, "group": "a b"}, "group"),
            ("messages", {**HELLO, "group": "pgchannels:commands"}, "group"),
            ("messages", {**HELLO, "connection": "pgchannels:everyone"}, "connection"),
            ("messages", {**HELLO, "connection": "tea"}, "connection"),
            ("messages", {**HELLO, "usr_id": "7"}, "usr_id"),
            ("disconnections", {}, "exactly one of"),
            ("disconnections", {"everyone": False}, "everyone"),
            ("disconnections", {"connection": "pgchannels:everyone"}, "connection"),
            ("disconnections", {"everyone": True, "user_id": "7"}, "exactly one of"),
            ("disconnections", {"everyone": True, "code": 1006}, "code"),
            ("disconnections", {"everyone": True, "code": 1005}, "code"),
            ("disconnections", {"everyone": True, "code": 5000}, "code"),
            ("disconnections", {"everyone": True, "code": 999}, "code"),
            ("disconnections", {"everyone": True, "reason": "x" * 124}, "123 bytes"),
            ("disconnections", {"everyone": True, "reason": "ä" * 62}, "123 bytes"),
            ("revocations", {}, "user_id, token_id"),
            ("revocations", {"user_id": "7", "keep": 0}, "keep"),
            ("revocations", {"user_id": "7", "keep": 1e12}, "keep"),
            ("revocations", {"user_id": "7", "keep": 1e-12}, "keep"),
            ("revocations", {"token_id": ""}, "token_id"),
        ],
    )
    async def test_is_said(
        self, memory: ConnectionManager, path: str, body: dict[str, Any], where: str
    ) -> None:
        async with client(application(memory)) as http:
            response = await http.post(f"/admin/{path}", json=body)
        assert response.status_code == 422
        assert where in response.text

    @pytest.mark.parametrize(
        ("path", "body", "where"),
        [
            ("announcements", r'{"payload": {}, "headers": {"\ud800": 1}}', "headers"),
            ("announcements", r'{"payload": {}, "\ud800": 1}', "body"),
            ("announcements", '{"payload": NaN}', "payload"),
            ("announcements", '{"payload": ' + "[" * 900 + "]" * 900 + "}", "payload"),
            ("messages", r'{"payload": {"a": "\ud800"}}', "exactly one of"),
            ("messages", r'{"payload": {}, "user_id": "\ud800"}', "user_id"),
            ("messages", r'{"payload": {}, "group": "\ud800"}', "group"),
            ("disconnections", r'{"connection": "\ud800"}', "connection"),
            ("disconnections", r'{"everyone": true, "reason": "\ud800"}', "reason"),
            ("revocations", r'{"user_id": "\ud800"}', "user_id"),
            ("revocations", r'{"token_id": "\ud800"}', "token_id"),
        ],
    )
    async def test_though_no_answer_could_repeat_it(
        self, memory: ConnectionManager, path: str, body: str, where: str
    ) -> None:
        async with client(application(memory)) as http:
            response = await http.post(
                f"/admin/{path}", content=body, headers={"content-type": "application/json"}
            )
        assert response.status_code == 422
        (problem,) = response.json()["detail"]
        assert problem.keys() == {"type", "loc", "msg"}
        assert where in f"{problem['loc']} {problem['msg']}"

    async def test_a_strangers_body_is_not_read_to_its_end(self) -> None:
        """FastAPI reads and parses a body before it asks who sends it."""
        sent = 0

        async def endless() -> AsyncIterator[bytes]:
            nonlocal sent
            yield b'{"payload": {"a": "'
            while sent < 100:
                sent += 1
                yield b"x" * 10_000

        connections = ConnectionManager(MemoryLayer(Settings(max_message_size=10_000)))
        async with client(application(connections), "nobody") as http:
            headers = {"content-type": "application/json"}
            response = await http.post("/admin/announcements", content=endless(), headers=headers)
        assert response.status_code == 413
        assert sent < 100

    async def test_the_least_that_can_be_kept(self, memory: ConnectionManager) -> None:
        async with client(application(memory)) as http:
            body = {"user_id": "7", "keep": 1e-6}
            assert (await http.post("/admin/revocations", json=body)).status_code == 202

    @pytest.mark.parametrize(
        ("body", "status", "code"),
        [
            ({"payload": {"n": 2**70}, "group": "tea"}, 422, "invalid_message"),
            ({"payload": {"text": "x" * 3000}, "group": "tea"}, 413, "invalid_message"),
            ({**HELLO, "group": "tea", "headers": {"pgchannels-x": "1"}}, 422, "invalid_message"),
            ({**HELLO, "group": "tea", "ttl": 1e12}, 422, "invalid_message"),
        ],
    )
    async def test_of_a_message_too(self, body: dict[str, Any], status: int, code: str) -> None:
        async with (
            MemoryLayer(Settings(max_message_size=2000)) as layer,
            client(application(ConnectionManager(layer))) as http,
        ):
            response = await http.post("/admin/messages", json=body)
        assert response.status_code == status
        assert response.json()["detail"]["code"] == code

    async def test_the_database_is_away(self, database_url: str) -> None:
        async with (
            TcpProxy(database_url) as proxy,
            PostgresLayer(proxy.url) as layer,
            client(application(ConnectionManager(layer))) as http,
        ):
            await proxy.cut(refuse=True)
            response = await http.get("/admin/connections")
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert response.json()["detail"]["code"] == "unavailable"
        assert "127.0.0.1" not in response.text


class TestLog:
    @pytest.mark.parametrize(("method", "path", "body"), ENDPOINTS)
    async def test_every_action_is_in_it(
        self,
        memory: ConnectionManager,
        caplog: pytest.LogCaptureFixture,
        method: str,
        path: str,
        body: Any,
    ) -> None:
        caplog.set_level(logging.INFO, "pgchannels.web.admin")
        async with client(application(memory)) as http:
            await http.request(method, f"/admin/{path}", json=body)
        (record,) = (r for r in caplog.records if r.name == "pgchannels.web.admin")
        assert record.admin == "ada"  # type: ignore[attr-defined]
        assert record.admin_action  # type: ignore[attr-defined]
        assert record.admin_target  # type: ignore[attr-defined]
        assert "hello" not in caplog.text  # what is said is nobody's business

    async def test_who_it_was_is_the_applications_to_say(
        self, memory: ConnectionManager, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, "pgchannels.web.admin")

        def name_of(authorization: Annotated[str, Header()]) -> str:
            return f"the {authorization}"

        for who in (None, name_of):
            async with client(application(memory, who=who)) as http:
                await http.post("/admin/announcements", json=HELLO)
        records = [r for r in caplog.records if r.name == "pgchannels.web.admin"]
        assert [r.admin for r in records] == [None, "the admin"]  # type: ignore[attr-defined]

    async def test_what_is_no_name_is_not_taken_for_one(self, memory: ConnectionManager) -> None:
        """The whole user, say, with a password in its repr()."""
        async with client(application(memory, who=lambda: {"id": 7})) as http:
            with pytest.raises(ConfigurationError, match="who= must give a str, not a dict"):
                await http.post("/admin/announcements", json=HELLO)

    async def test_failures_and_refusals_are_in_it(
        self, memory: ConnectionManager, caplog: pytest.LogCaptureFixture
    ) -> None:
        app = application(memory)
        async with client(app) as http:
            await http.post("/admin/announcements", json={"payload": {"n": 2**70}})
        assert "'ada': announce, 'everyone': has failed" in caplog.text
        async with client(app, "nobody") as http:
            await http.post("/admin/disconnections", json={"everyone": True})
        assert "refused: POST '/admin/disconnections'" in caplog.text

    async def test_a_target_takes_no_line_of_its_own(
        self, memory: ConnectionManager, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, "pgchannels.web.admin")
        body = {**HELLO, "user_id": "7\nERROR all is lost"}
        async with client(application(memory)) as http:
            await http.post("/admin/messages", json=body)
        (record,) = (r for r in caplog.records if r.name == "pgchannels.web.admin")
        assert "\n" not in record.getMessage()
