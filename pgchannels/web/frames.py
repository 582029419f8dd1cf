"""What goes to clients: JSON text, and messages that were sent to become a frame of their own."""

from __future__ import annotations

import logging
from base64 import b64encode
from functools import lru_cache
from typing import Any

import orjson
from pydantic import BaseModel

from pgchannels.errors import InvalidPayload
from pgchannels.messages import FRAME, Message

__all__ = ["encode_json", "unwrapped"]

logger = logging.getLogger("pgchannels.web")


def encode_json(content: Any) -> str:
    """Encode what orjson does, pydantic models and messages (their data), also inside of others.

    Raises:
        TypeError: for what cannot be encoded.
        InvalidPayload: it is nested too deep. It is data that is so, seldom code.
    """
    return _encode(content, with_bytes=False)


def unwrapped(message: Message) -> str | bytes | None:
    """The text or binary frame that *message* was sent to become; None for any other message.

    A header says so, which only publishers on a server can set, never the payload itself: no
    client can choose what others take for a frame.
    """
    mode = message.headers.get(FRAME)
    if mode is None:
        return None
    try:
        body = message["body"]
        if mode == "json":
            return _encode(body, with_bytes=True)
        if mode == "bytes" and isinstance(body, bytes):
            return body
    except (InvalidPayload, KeyError, TypeError) as error:
        _warn(str(message.position), message.channel, repr(error))
    return None


@lru_cache(maxsize=1000)
def _warn(position: str, channel: str, error: str) -> None:
    """Once a message, whatever the number of its receivers."""
    logger.warning("message %s of %r cannot be made a frame: %s", position, channel, error)


def _encode(content: Any, *, with_bytes: bool) -> str:
    try:
        return orjson.dumps(content, _plain_with_bytes if with_bytes else _plain).decode()
    except TypeError as error:
        if "ecursion" in str(error):
            raise InvalidPayload("it is nested too deep") from error
        raise


def _plain(value: object) -> object:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Message):
        return value.data
    raise TypeError


def _plain_with_bytes(value: object) -> object:
    # As in Message.envelope: JSON has no better way.
    return b64encode(value).decode() if isinstance(value, bytes) else _plain(value)
