"""Messages that consumers pass on to their clients as they are. Pure.

The payload is ``{"type": "websocket.send", "mode": "json" or "bytes", "body": …}``. What makes a
consumer unwrap it is a header, which only publishers on a server can set: no client can have frames
sent to others by choosing a ``type``.
"""

from __future__ import annotations

from typing import Any, Literal

from pgchannels.errors import InvalidPayload

__all__ = ["Envelope", "websocket_bytes_message", "websocket_json_message"]


class Envelope(dict[str, Any]):
    """A payload that says of itself what frame it is to become."""

    def __init__(self, mode: Literal["json", "bytes"], body: Any, extra: dict[str, Any]) -> None:
        super().__init__({**extra, "type": "websocket.send", "mode": mode, "body": body})
        self.mode = mode


def websocket_json_message(body: Any, **extra: Any) -> Envelope:
    """A payload that reaches clients as a text frame: *body* as JSON."""
    return Envelope("json", body, extra)


def websocket_bytes_message(body: bytes, **extra: Any) -> Envelope:
    """A payload that reaches clients as a binary frame: *body*.

    Raises:
        InvalidPayload: *body* is not bytes.
    """
    given: object = body  # it may come from anywhere
    if not isinstance(given, (bytes, bytearray, memoryview)):
        raise InvalidPayload(f"the body must be bytes, not {type(given).__name__}")
    return Envelope("bytes", bytes(given), extra)
