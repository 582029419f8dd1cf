"""The code in the README and in docs/: it compiles, it imports, and what is whole is run."""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from decimal import Decimal
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import psycopg
import pytest
from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import select
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncSession

from pgchannels import MemoryLayer
from pgchannels.telemetry import uninstrument
from pgchannels.web import JsonConsumer, SocketError, errors, lifespan

# Where an example is wrong, a client waits for what does not come.
pytestmark = pytest.mark.timeout(100)

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)#:]*)(?:#([^)]+))?\)")


class Block(NamedTuple):
    page: str
    line: int
    source: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks() -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            line = text.count("\n", 0, match.start(1)) + 1
            found.append(Block(page.name, line, match[1]))
    return found


def block(page: str, containing: str) -> str:
    """The only one of *page* with that text in it."""
    (found,) = (b.source for b in blocks() if b.page == page and containing in b.source)
    return found


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_with_code_is_looked_at() -> None:
    assert {"README.md", "consumers.md", "layer.md", "operations.md"} <= {b.page for b in blocks()}


@pytest.mark.parametrize("code", blocks(), ids=str)
def test_it_compiles(code: Block) -> None:
    compile(code.source, str(code), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)


@pytest.mark.parametrize("code", blocks(), ids=str)
def test_what_it_imports_of_ours_is_there(code: Block) -> None:
    for node in ast.walk(ast.parse(code.source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pgchannels"):
            module = import_module(node.module or "")
            missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            assert not missing, f"{code}: {node.module}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for path, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


# The chat room of docs/consumers.md


@pytest.fixture
def room() -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "app"}
    source = block("consumers.md", "def make_app")
    exec(compile(source, "docs/consumers.md", "exec", dont_inherit=True), names)
    return names


@pytest.fixture
def client(room: dict[str, Any]) -> Iterator[TestClient]:
    with TestClient(room["make_app"](MemoryLayer())) as client:
        yield client


def test_what_one_client_sends_another_one_receives(client: TestClient) -> None:
    with ExitStack() as stack:
        ada, bob = (
            stack.enter_context(client.websocket_connect(f"/rooms/tea?token={name}-token"))
            for name in ("ada", "bob")
        )
        for socket, names in ((ada, ["Ada", "Bob"]), (bob, ["Bob"])):
            joined = [socket.receive_json()["data"] for _ in names]
            assert [event["type"] for event in joined] == ["presence.joined"] * len(names)
            assert [event["metadata"]["name"] for event in joined] == names
        ada.send_json({"type": "chat.send", "text": "hello"})
        received = ada.receive_json()
        assert bob.receive_json() == received
        assert received["channel"] == "room:tea"
        assert received["data"] == {"type": "chat.message", "from": "Ada", "text": "hello"}

    with client.websocket_connect("/rooms/tea?token=bob-token&after=0") as bob:
        replayed = bob.receive_json()
        while replayed["channel"] != "room:tea":  # who was there before may come first
            replayed = bob.receive_json()
        assert replayed == received


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        ('{"type": "chat.send"}', "invalid_content"),
        ('{"type": "chat_send", "text": "hello"}', "unexpected_message"),
        ('{"type": "room.closed"}', "unexpected_message"),
        ("{", "invalid_json"),
    ],
)
def test_its_errors_are_those_of_the_table(client: TestClient, sent: str, code: str) -> None:
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    with client.websocket_connect("/rooms/tea?token=ada-token") as ada:
        assert ada.receive_json()["data"]["type"] == "presence.joined"
        ada.send_text(sent)
        error = ada.receive_json()
    assert (error["type"], error["code"]) == ("error", code)
    assert f"| `{code}` |" in text


def test_every_code_is_in_the_table() -> None:
    """Of our own errors, and of those that are described for clients; with their close codes."""
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    rows = {
        row[0]: row[1:]
        for row in re.findall(
            r"^\| `(\w+)` \| (\w+) \| ([\d, ]+) \| ([\w, –]+) \|", text, re.MULTILINE
        )
    }
    kinds, described = [SocketError], [problem for _, problem in errors._KNOWN]
    stay = {problem.code for problem in described if not problem.disconnects}
    for kind in kinds:
        kinds += kind.__subclasses__()
        if kind.__module__.startswith("pgchannels") and kind is not SocketError:
            described.append(kind.problem)
    assert len(described) > 20
    for problem in described:
        category, statuses, code = rows[problem.code]
        assert category == problem.category, problem
        assert str(problem.http_status) in statuses or problem.code == "invalid_message", problem
        ends = problem.disconnects and problem.code not in stay
        assert code in (str(problem.ws_code) if ends else "stays", "–"), problem
    assert {"too_many_connections", "internal_error", "other_user", "origin"} <= rows.keys()


def test_what_is_to_be_awaited_says_so() -> None:
    text = (ROOT / "docs" / "consumers.md").read_text(encoding="utf-8")
    calls = re.findall(r"^\| `(await )?(\w+)\(", text[text.index("To call:") :], re.MULTILINE)
    assert len(calls) >= 9
    for awaited, name in calls:
        assert inspect.iscoroutinefunction(getattr(JsonConsumer, name)) is bool(awaited), name


def test_the_functions_of_connections() -> None:
    names: dict[str, Any] = {"__name__": "app"}
    source = block("connections.md", "def make_app")
    exec(compile(source, "docs/connections.md", "exec", dont_inherit=True), names)
    with TestClient(names["make_app"](MemoryLayer())) as client, ExitStack() as stack:
        ada, bob = (
            stack.enter_context(client.websocket_connect(f"/rooms/tea?token={name}-token"))
            for name in ("ada", "bob")
        )
        ada.send_json({"type": "ping"})  # so that both are members
        assert ada.receive_json() == {"type": "pong"}
        bob.send_json("hello")
        said = {"type": "chat.message", "from": "bob", "content": "hello"}
        assert [socket.receive_json()["data"] for socket in (ada, bob)] == [said, said]


def test_the_room_is_closed_by_a_message(room: dict[str, Any]) -> None:
    layer = MemoryLayer()
    app = room["make_app"](layer)

    async def close_room() -> None:
        await layer.group_send("room:tea", {"type": "room.closed"})

    app.add_api_route("/close", close_room, methods=["POST"])
    with (
        TestClient(app) as client,
        client.websocket_connect("/rooms/tea?token=ada-token") as ada,
    ):
        ada.receive_json()
        client.post("/close").raise_for_status()
        assert ada.receive_json()["type"] == "position"
        closed = ada.receive()
    assert (closed["code"], closed["reason"]) == (4000, "the room is closed")


def test_the_example_of_a_test_passes(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(block("consumers.md", "def make_app"), encoding="utf-8")
    (tmp_path / "test_app.py").write_text(block("layer.md", "def test_chat"), encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_app.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "1 passed" in run.stdout


# The shop of docs/publishing.md


@pytest.fixture
async def shop(database_url: str) -> AsyncIterator[dict[str, Any]]:
    """What the page defines, on a database of its own, with the layer open."""
    driver_url = make_url(database_url).set(drivername="postgresql+asyncpg")
    names: dict[str, Any] = {"__name__": "shop"}
    parts = ("install(Session, layer)", "class Order(Base)", "async def board", "take_snapshot")
    for part in parts:
        source = block("publishing.md", part)
        source = source.replace(
            "postgresql+asyncpg://localhost/shop", driver_url.render_as_string(hide_password=False)
        ).replace("postgresql://localhost/shop", database_url)
        exec(compile(source, "docs/publishing.md", "exec", dont_inherit=True), names)
    async with names["engine"].begin() as connection:
        await connection.run_sync(names["Base"].metadata.create_all)
    async with names["layer"]:
        yield names
    await names["engine"].dispose()


async def place_order(shop: dict[str, Any]) -> None:
    async with shop["Session"].begin() as session:
        session.add(shop["Order"](customer_id=42, status="new", total=Decimal("9.90")))


async def pay_order(shop: dict[str, Any]) -> None:
    async with shop["Session"].begin() as session:
        (await session.get_one(shop["Order"], 1)).status = "paid"


class EnoughError(Exception):
    """The client has seen what it wanted to see."""


class Browser:
    """A socket whose order is paid as soon as it has the state."""

    def __init__(self, shop: dict[str, Any]) -> None:
        self._shop = shop
        self.state: Any = None

    async def send_json(self, state: Any) -> None:
        self.state = state
        await pay_order(self._shop)

    async def send_text(self, envelope: str) -> None:
        self.message = json.loads(envelope)
        raise EnoughError


async def test_a_board_gets_the_state_and_what_follows_it(shop: dict[str, Any]) -> None:
    await place_order(shop)
    browser = Browser(shop)
    async with asyncio.timeout(20):
        with pytest.raises(EnoughError):
            await shop["board"](browser, 42)
    assert browser.state == {"orders": [{"id": 1, "status": "new"}]}
    assert browser.message["data"] == {
        "type": "orders.updated",
        "key": {"id": 1},
        "new": {"status": "paid"},
    }


async def test_an_endpoint_gets_a_snapshot_beside_the_session_of_the_request(
    shop: dict[str, Any],
) -> None:
    async def session_of_the_request() -> AsyncIterator[AsyncSession]:
        async with shop["Session"]() as session:
            yield session

    async def current_user(
        session: AsyncSession = Depends(session_of_the_request),  # noqa: B008
    ) -> Any:
        return await session.scalar(select(shop["Order"].customer_id))

    app = FastAPI(dependencies=[Depends(current_user)])
    app.include_router(shop["router"])
    await place_order(shop)
    transport = httpx2.ASGITransport(app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://shop") as client:
        answer = (await client.get("/customers/42/orders")).json()
    assert answer["orders"] == [1]
    await pay_order(shop)
    reading = shop["layer"].subscribe("orders:42", after=answer["position"])
    async with asyncio.timeout(20), reading as messages:
        assert (await anext(messages))["type"] == "orders.updated"


async def test_the_filter_of_the_page_finds_what_its_models_publish(shop: dict[str, Any]) -> None:
    tree = ast.parse(block("publishing.md", "filter="))
    (filter,) = (
        ast.literal_eval(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg == "filter"
    )
    await place_order(shop)
    await pay_order(shop)
    reading = shop["layer"].subscribe("orders:42", after="0", filter=filter)
    async with asyncio.timeout(20), reading as found:
        message = await anext(found)
    assert (message["type"], message["key"]) == ("orders.updated", {"id": 1})


@pytest.mark.usefixtures("shop")
def test_the_sql_of_the_page_fits_its_models(database_url: str) -> None:
    text = (ROOT / "docs" / "publishing.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"^```sql\n(begin;.*?)^```", text, re.DOTALL | re.MULTILINE)
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(script.encode())
        placed = connection.execute("select customer_id, status, total from orders").fetchall()
    assert placed == [(42, "new", Decimal("9.90"))]


# The observed application of docs/observing.md


@pytest.fixture
def observed() -> Iterator[TestClient]:
    names: dict[str, Any] = {"__name__": "observed"}
    source = block("observing.md", "def make_app")
    exec(compile(source, "docs/observing.md", "exec", dont_inherit=True), names)
    try:
        with TestClient(names["make_app"](MemoryLayer())) as client:
            yield client
    finally:
        uninstrument()


def test_operators_see_what_clients_do(observed: TestClient) -> None:
    operator = {"authorization": "Bearer ada-token"}
    with observed.websocket_connect("/rooms/tea") as socket:
        socket.send_json("hello")
        assert socket.receive_json()["data"]["text"] == "hello"
        status = observed.get("/status?cluster=true", headers=operator).json()
        assert (status["connections"], status["cluster"]["connections"]) == (1, 1)
        metrics = observed.get("/metrics", headers=operator).text
        assert "pgchannels_connections 1.0" in metrics.splitlines()
        (found,) = observed.get("/admin/connections", headers=operator).json()["connections"]
        one = observed.get(f"/admin/connections/{found['id']}", headers=operator).json()
        assert one["local"]["groups"] == ["room:tea"]
        body = {"everyone": True, "code": 4001}
        observed.post("/admin/disconnections", headers=operator, json=body).raise_for_status()
        assert socket.receive()["code"] == 4001


@pytest.mark.parametrize("path", ["/status", "/metrics", "/admin/connections"])
def test_nobody_else_does(observed: TestClient, path: str) -> None:
    assert observed.get(path).status_code == 401
    assert observed.get(path, headers={"authorization": "Bearer guessed"}).status_code == 401
    assert observed.get("/health/live").status_code == 200
    assert observed.get("/health/ready").json() == {"status": "ready", "problems": []}


def test_the_tables_of_the_page_name_what_there_is(observed: TestClient) -> None:
    text = (ROOT / "docs" / "observing.md").read_text(encoding="utf-8")
    operator = {"authorization": "Bearer ada-token"}
    scraped = observed.get("/metrics", headers=operator).text
    families = re.findall(r"^# TYPE (\S+) \w+$", scraped, re.MULTILINE)
    assert families
    assert [name for name in families if f"`{name}`" not in text] == []
    status = observed.get("/status", headers=operator).json()
    assert [name for name in status if f"`{name}`" not in text] == []
    paths = observed.get("/openapi.json").json()["paths"]
    assert [path for path in paths if f"{path.removeprefix('/admin')}`" not in text] == []


def test_an_order_is_refused_by_its_handler() -> None:
    names: dict[str, Any] = {"__name__": "orders"}
    source = block("observing.md", "class InvalidOrder")
    exec(compile(source, "docs/observing.md", "exec", dont_inherit=True), names)
    layer = MemoryLayer()
    app = FastAPI(lifespan=lifespan(layer))
    app.add_api_websocket_route("/ws", names["Orders"].as_endpoint(layer))
    with TestClient(app) as client, client.websocket_connect("/ws") as socket:
        socket.send_json({"type": "order.place", "article": "coffee"})
        assert socket.receive_json() == {"type": "order.refused", "why": "there is tea only"}
        socket.send_json({"type": "order.place", "article": "tea"})
        assert socket.receive_json() == {"type": "order.placed"}
