"""What goes to clients: JSON text, and messages that were sent to become a frame of their own."""

from __future__ import annotations

import logging
from base64 import b64encode
from functools import lru_cache
from typing import Any

from pydantic import BaseModel

from pgchannels.errors import InvalidPayload
from pgchannels.messages import FRAME, Message
from pgchannels.payloads import encode, plain

__all__ = ["encode_json", "unwrapped"]

logger = logging.getLogger("pgchannels.web")


def encode_json(content: Any) -> str:
    """Encode what a payload may hold, but for bytes; messages as their data. Also inside of others.

    Raises:
        TypeError: for what cannot be encoded.
        InvalidPayload: it is nested too deep, holds NaN or an infinity, or an integer beyond 64
            bits. It is data that is so, seldom code.
    """
    try:
        return encode(content, _plain)
    except (TypeError, ValueError) as error:
        refusal = _of_the_data(error)
        if refusal is None:
            raise
        raise refusal from error


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
            return encode(body, _plain_with_bytes)
        if mode == "bytes" and isinstance(body, bytes):
            return body
    except (InvalidPayload, KeyError, TypeError, ValueError) as error:
        _warn(str(message.position), message.channel, repr(error))
    return None


@lru_cache(maxsize=1000)
def _warn(position: str, channel: str, error: str) -> None:
    """Once a message, whatever the number of its receivers."""
    logger.warning("message %s of %r cannot be made a frame: %s", position, channel, error)


def _of_the_data(error: TypeError | ValueError) -> InvalidPayload | None:
    """What to raise if not the code is wrong, but what it was given to encode."""
    if isinstance(error, ValueError):
        return InvalidPayload(str(error))
    if "ecursion" in str(error):
        return InvalidPayload("it is nested too deep")
    if "64-bit" in str(error):
        return InvalidPayload("it holds an integer beyond 64 bits; send it as a text")
    return None


def _plain(value: object) -> object:
    # A frame has no attachments: bytes in a model are what the model says.
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else plain(value)


def _plain_with_bytes(value: object) -> object:
    # As in Message.envelope: JSON has no better way.
    return b64encode(value).decode() if isinstance(value, bytes) else _plain(value)
