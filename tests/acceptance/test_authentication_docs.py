"""The application and the policies of docs/authentication.md do what the page says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from fastapi.testclient import TestClient
from psycopg import sql
from sqlalchemy.engine import make_url
from starlette.testclient import WebSocketDenialResponse

from pgchannels import MemoryLayer
from pgchannels.web.auth import Identity
from tests.acceptance.test_docs import ROOT, block
from tests.support.tokens import SECRET

pytestmark = pytest.mark.timeout(60)

PAGE = "authentication.md"


def run(source: str, **names: Any) -> dict[str, Any]:
    found = {"__name__": "rooms", **names}
    exec(compile(source, f"docs/{PAGE}", "exec", dont_inherit=True), found)
    return found


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    monkeypatch.setenv("JWT_SECRET", SECRET)
    rooms = run(block(PAGE, "def make_app"))
    with TestClient(rooms["make_app"](MemoryLayer())) as client:
        yield client


@pytest.fixture
def token() -> str:
    made: str = run(block(PAGE, "jwt.encode("), secret=SECRET)["token"]
    return made


def test_with_the_token_of_the_page(client: TestClient, token: str) -> None:
    headers = {"Authorization": f"Bearer {token}"}
    with (
        client.websocket_connect("/rooms/tea", headers=headers) as ada,
        client.websocket_connect("/rooms/tea", subprotocols=["bearer", token]) as browser,
    ):
        accepted: Any = browser.accepted_subprotocol
        assert accepted == "bearer"
        ada.send_json({"type": "say", "text": "hello"})
        received = browser.receive_json()
        assert received["data"] == {"type": "said", "by": "ada", "text": "hello"}
    with client.websocket_connect("/rooms/other", headers=headers) as ada:
        ada.send_json({"type": "say", "text": "hello"})
        assert ada.receive_json()["code"] == "forbidden"
    response = client.get("/channels/room:tea/messages", headers=headers)
    assert [message["data"]["text"] for message in response.json()["messages"]] == ["hello"]


def test_without_it(client: TestClient, token: str) -> None:
    with pytest.raises(WebSocketDenialResponse) as caught:
        client.websocket_connect("/rooms/tea").__enter__()
    assert caught.value.status_code == 401
    assert caught.value.headers["WWW-Authenticate"] == "Bearer"
    assert client.get("/channels/room:tea/messages").status_code == 401
    headers = {"Authorization": f"Bearer {token}"}
    assert client.get("/channels/secret/messages", headers=headers).status_code == 403


def test_the_codes_are_those_of_the_table() -> None:
    text = (ROOT / "docs" / PAGE).read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `(\w+)` \| \d{3} ", text, re.MULTILINE))
    package = ROOT / "pgchannels" / "web"
    sources = [*(package / "auth").glob("*.py"), package / "errors.py"]
    used = {
        code
        for source in sources
        for code in re.findall(r'\bcode="(\w+)"', source.read_text(encoding="utf-8"))
    }
    assert {
        "invalid_token",
        "token_expired",
        "token_revoked",
        "other_user",
        "origin",
    } <= used & listed


async def test_the_policies_decide(database_url: str) -> None:
    text = (ROOT / "docs" / PAGE).read_text(encoding="utf-8")
    (script,) = re.findall(r"^```sql\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    url = make_url(database_url).set(drivername="postgresql+asyncpg")
    source = block(PAGE, "RowSecurity(engine").replace(
        "postgresql+asyncpg://localhost/shop", url.render_as_string(hide_password=False)
    )
    role = f"web_user_{url.database}"  # roles are the server's, not the database's
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(script.replace("web_user", role).encode())
        connection.execute("insert into rooms values ('tea', 'ada', false), ('news', 'bob', true)")
        names = run(source.replace("web_user", role))
        try:
            authorize = names["authorize"]
            assert await authorize(Identity("ada"), "subscribe", "room:tea")
            assert await authorize(Identity("eve"), "history", "room:news")
            assert not await authorize(Identity("eve"), "subscribe", "room:tea")
            assert not await authorize(Identity("ada"), "publish", "room:tea")
        finally:
            await names["engine"].dispose()
            identifier = sql.Identifier(role)
            connection.execute(sql.SQL("drop owned by {}").format(identifier))
            connection.execute(sql.SQL("drop role {}").format(identifier))
