"""The chain of docs/middleware.md, in front of real sockets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from starlette.testclient import WebSocketTestSession

from pgchannels import MemoryLayer
from pgchannels.web import Chain, Frame, ValidationFailed
from tests.acceptance.test_docs import ROOT, block

pytestmark = pytest.mark.timeout(30)

PAGE = "middleware.md"


def names_of(containing: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "app"}
    source = block(PAGE, containing)
    exec(compile(source, f"docs/{PAGE}", "exec", dont_inherit=True), names)
    return names


@pytest.fixture
def socket() -> Iterator[WebSocketTestSession]:
    app = names_of("def make_app")["make_app"](MemoryLayer())
    with TestClient(app) as client, client.websocket_connect("/rooms/tea") as socket:
        yield socket


def test_what_is_valid_reaches_the_room(socket: WebSocketTestSession) -> None:
    sent = {"type": "chat.send", "text": "hello"}
    socket.send_json(sent)
    assert socket.receive_json()["data"] == sent


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        ("{", "invalid_json"),
        ('{"type": "chat.send"}', "invalid_content"),
        ('{"type": "chat.send", "text": "x", "more": [[[[]]]]}', "invalid_content"),
        ('{"type": "other"}', "unexpected_message"),
        ('"' + "x" * 4096 + '"', "frame_too_large"),
    ],
)
def test_what_is_not_is_answered_by_the_error_of_the_table(
    socket: WebSocketTestSession, sent: str, code: str
) -> None:
    socket.send_text(sent)
    error = socket.receive_json()
    assert (error["type"], error["code"]) == ("error", code)
    assert f"`{code}`" in (ROOT / "docs" / PAGE).read_text(encoding="utf-8")
    # It is still open.
    socket.send_json({"type": "chat.send", "text": "hello"})
    assert socket.receive_json()["data"]["text"] == "hello"


def test_too_much_is_refused_and_pings_are_not(socket: WebSocketTestSession) -> None:
    # More than comes back in the time that a slow machine takes for them.
    refused = None
    for _ in range(1100):
        socket.send_json({"type": "chat.send", "text": "hello"})
        received = socket.receive_json()
        if received.get("type") == "error":
            refused = received
            break
    assert refused is not None
    assert (refused["code"], refused["category"]) == ("rate_limited", "rate_limit")
    assert refused["retry_after"] > 0
    socket.send_json({"type": "ping"})
    assert socket.receive_json()["type"] == "pong"


class Connection:
    def __init__(self, id: str) -> None:
        self.id = id
        self.metadata = {"muted": ["bob"]}


async def test_the_middleware_of_the_page() -> None:
    chain: Chain = names_of("class Seats")["chain"]
    ada, bob, eve = (Connection(name) for name in ("ada", "bob", "eve"))
    frame = await chain.inbound(ada, Frame('{"text": "  hello "}'))  # type: ignore[arg-type]
    assert frame == Frame('{"text":"hello"}')
    await chain.inbound(bob, Frame("1"))  # type: ignore[arg-type]
    with pytest.raises(ValidationFailed) as caught:
        await chain.inbound(eve, Frame("1"))  # type: ignore[arg-type]
    assert caught.value.code == "no_seat"
    chain.closed(bob)  # type: ignore[arg-type]
    await chain.inbound(eve, Frame("1"))  # type: ignore[arg-type]
    for said_by, passes in (("bob", False), ("ada", True)):
        message: Any = {"from": said_by}
        assert await chain.outbound(ada, message) is (message if passes else None)  # type: ignore[arg-type]
