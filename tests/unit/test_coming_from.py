"""What docs/coming-from.md says of ours exists, and can be called as it stands there."""

from __future__ import annotations

import ast
import inspect
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from starlette.websockets import WebSocket

import pgchannels
from pgchannels import configuration, memory, orm, web
from pgchannels.memory import MemoryLayer
from pgchannels.messages import Message
from pgchannels.settings import Settings

TEXT = (Path(__file__).parents[2] / "docs" / "coming-from.md").read_text()
ROW = re.compile(r"^\| (.+?) \| (.+?) \| (.*?) ?\|$")
CODE = re.compile(r"`([^`]+)`")
HEADINGS = ["Django Channels", "fastapi-channels", "fastapi-websockets", "broadcaster"]
HEADINGS.append("python-socketio")


def rows() -> list[tuple[str, str, str]]:
    found = [match.groups() for line in TEXT.splitlines() if (match := ROW.match(line))]
    return [(theirs, ours, more) for theirs, ours, more in found if ours != "pgchannels"]


def snippets() -> list[str]:
    said = {code for _, ours, _ in rows() for code in CODE.findall(ours)}
    # The remarks name theirs as well.
    remarks = {code for _, _, more in rows() for code in CODE.findall(more)}
    return sorted(said | {code for code in remarks if code.startswith(("layer.", "self."))})


async def nothing(*_: Any) -> Any:
    raise AssertionError("nothing is called")


def names() -> dict[str, Any]:
    layer = MemoryLayer()
    scope = {"type": "websocket", "query_string": b"", "headers": [], "path": "/"}
    websocket = WebSocket(scope, nothing, nothing)
    connections = web.ConnectionManager(layer)
    return {
        name: getattr(module, name)
        for module in (configuration, memory, orm, web, pgchannels)
        for name in module.__all__
    } | {
        "layer": layer,
        "connections": connections,
        "connection": web.Connection(websocket, connections),
        "self": web.JsonConsumer(websocket, connections),
        "message": Message(1, "a", "{}", datetime.now(UTC), 2, 1),
    }


def check(node: ast.expr, known: dict[str, Any]) -> Any:
    """Look up what *node* names; of a call, also that its arguments fit."""
    match node:
        case ast.Name(id=name):
            if name in Settings.model_fields:
                return name
            return known[name]
        case ast.Attribute(value=value, attr=name):
            return getattr(check(value, known), name)
        case ast.Call(func=function, args=arguments, keywords=keywords):
            called = check(function, known)
            inspect.signature(called).bind(
                *arguments, **{keyword.arg: 0 for keyword in keywords if keyword.arg}
            )
            return None
    raise AssertionError(f"neither a name nor a call: {ast.unparse(node)}")


@pytest.mark.parametrize("snippet", snippets())
async def test_it_exists(snippet: str) -> None:
    check(ast.parse(snippet, mode="eval").body, names())


@pytest.mark.parametrize(
    "wrong",
    [
        "layer.sent(channel, message)",
        "layer.send(channel)",
        "layer.send(channel, message, timeout=5)",
        "self.absent",
        "PostgreLayer(url)",
        "default_tll",
    ],
)
async def test_what_does_not_exist_is_found(wrong: str) -> None:
    with pytest.raises((AttributeError, KeyError, TypeError)):
        check(ast.parse(wrong, mode="eval").body, names())


def test_every_library_has_a_table() -> None:
    parts = re.split(r"^## (.+)$", TEXT, flags=re.MULTILINE)[1:]
    tables = dict(zip(parts[::2], parts[1::2], strict=True))
    assert list(tables) == HEADINGS
    for table in tables.values():
        lines = [line for line in table.splitlines() if line.startswith("|")]
        assert len(lines) > 10
        # Each row is of three cells, and no row is missed by the pattern above.
        assert all(ROW.match(line) for line in lines if not line.startswith("|---"))


def test_each_row_says_something_of_ours() -> None:
    for theirs, ours, more in rows():
        assert CODE.search(ours) or (ours == "–" and more), theirs
