"""What goes to clients: JSON text, and messages that become a frame of their own."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import orjson
import pytest
from pydantic import BaseModel

from pgchannels import InvalidPayload
from pgchannels.envelopes import websocket_bytes_message, websocket_json_message
from pgchannels.messages import ATTACHMENTS, FRAME, Message
from pgchannels.payloads import encode_payload
from pgchannels.web.frames import encode_json, unwrapped


class Point(BaseModel):
    x: int
    at: datetime


POINT = Point(x=1, at=datetime(2026, 1, 31, tzinfo=UTC))
DEEP: Any = orjson.loads("[" * 500 + "]" * 500)


def message(payload: Any, mode: str | None) -> Message:
    encoded = encode_payload(payload, max_size=10**6)
    headers = {} if mode is None else {FRAME: mode}
    if encoded.pointers:
        headers[ATTACHMENTS] = orjson.dumps(encoded.pointers).decode()
    return Message(
        1,
        "room",
        encoded.text,
        datetime.now(UTC),
        len(encoded.text),
        1,
        orjson.dumps(headers).decode() if headers else None,
        encoded.attachments,
    )


def test_models_are_encoded_wherever_they_are() -> None:
    point = '{"x":1,"at":"2026-01-31T00:00:00Z"}'
    assert encode_json(POINT) == point
    assert encode_json({"points": [POINT, POINT]}) == f'{{"points":[{point},{point}]}}'


def test_messages_are_encoded_as_their_data() -> None:
    sent = message({"n": 1}, None)
    assert encode_json(sent) == '{"n":1}'
    assert encode_json([sent]) == '[{"n":1}]'


def test_what_is_too_deep_is_the_datas_fault() -> None:
    with pytest.raises(InvalidPayload, match="nested too deep"):
        encode_json(DEEP)


@pytest.mark.parametrize("value", [float("nan"), [float("-inf")], 2**64])
def test_numbers_that_cannot_be_encoded_are_the_datas_fault(value: object) -> None:
    with pytest.raises(InvalidPayload):
        encode_json({"value": value})


@pytest.mark.parametrize("value", [object(), {1: 2}, b"bytes", iter([1])])
def test_what_cannot_be_encoded_is_the_codes_fault(value: object) -> None:
    with pytest.raises(TypeError):
        encode_json({"value": value})


def test_frames() -> None:
    assert unwrapped(message(websocket_json_message({"a": [1]}), "json")) == '{"a":[1]}'
    assert unwrapped(message(websocket_json_message({"a": b"\xff"}), "json")) == '{"a":"/w=="}'
    assert unwrapped(message(websocket_bytes_message(b"\xff"), "bytes")) == b"\xff"
    assert unwrapped(message(websocket_bytes_message(b""), "bytes")) == b""


def test_what_is_none() -> None:
    assert unwrapped(message(websocket_json_message(1), None)) is None


@pytest.mark.parametrize(
    ("payload", "mode"),
    [
        ({"mode": "json"}, "json"),
        ({"body": "text"}, "bytes"),
        ({"body": b"bytes"}, "other"),
    ],
)
def test_what_cannot_be_one_is_a_message_as_any_other(payload: Any, mode: str) -> None:
    assert unwrapped(message(payload, mode)) is None


def test_what_sql_has_published_too_deep(caplog: pytest.LogCaptureFixture) -> None:
    for depth in (500, 2000):
        text = '{"body":' + "[" * depth + "]" * depth + "}"
        sent = Message(
            1, "room", text, datetime.now(UTC), len(text), 1, f'{{"{FRAME}":"json"}}', None
        )
        assert unwrapped(sent) is None
    assert caplog.text.count("cannot be made a frame") == 2
