"""Messages, positions, channel names: what crosses every boundary here. Pure: no I/O, no clock.

A payload travels as the text of a JSON object. It is encoded once, by its publisher, checked here
before anything is written, and from then on passed through: :attr:`Message.envelope` splices that
text into what a socket gets, and only a reader that looks inside pays for parsing it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Any, NamedTuple

import orjson

from pgchannels.errors import (
    InvalidChannel,
    InvalidMessage,
    InvalidPayload,
    InvalidPosition,
    MessageTooLarge,
)

__all__ = [
    "BEGINNING",
    "MAX_CHANNEL_LENGTH",
    "Message",
    "Position",
    "check_channel",
    "check_ttl",
    "encode_payload",
]

MAX_CHANNEL_LENGTH = 200

# White space, control and invisible formatting characters, and the wildcards of MQTT. The SQL
# function is_channel() has the same class; a test compares the two over all code points.
_FORBIDDEN = re.compile(
    r"[\u0000-\u0020\u007f-\u00a0\u00ad\u061c\u1680\u180e\u2000-\u200f\u2028-\u202f\u205f-\u206f"
    r"\u3000\ud800-\udfff\ufeff\ufff9-\uffff\U000e0000-\U000e0fff+#*]"
)
_POSITION = re.compile(r"([1-9][0-9]{0,8})-(0|[1-9][0-9]{0,18})", re.ASCII)
_MAX_ID = 2**63 - 1
_MAX_TTL = timedelta(days=36525)


def check_channel(channel: object) -> str:
    """Return *channel* if it is a valid name.

    1 to 200 characters; no white space, no control or invisible formatting characters, none of
    ``+ # *`` (they are wildcards in topic filters).

    Raises:
        InvalidChannel: if it is not.
    """
    if not isinstance(channel, str):
        several = isinstance(channel, (list, tuple, set))
        hint = "; give several channels as several arguments" if several else ""
        raise InvalidChannel(channel, f"it must be a str{hint}")
    if not 1 <= len(channel) <= MAX_CHANNEL_LENGTH:
        raise InvalidChannel(channel, f"it must have 1 to {MAX_CHANNEL_LENGTH} characters")
    if match := _FORBIDDEN.search(channel):
        raise InvalidChannel(channel, f"it must not contain {match.group()!a}")
    return channel


def encode_payload(payload: object, *, max_size: int) -> str:
    """Encode a mapping with string keys as the text of a JSON object.

    Args:
        payload: a ``dict`` (or another mapping) of what `orjson
            <https://github.com/ijl/orjson#types>`_ encodes: besides the JSON types, dataclasses,
            ``datetime``, ``date``, ``time``, ``UUID`` and enums.
        max_size: bytes of UTF-8 that the text may have.

    Raises:
        InvalidPayload: not a mapping, a value that JSON lacks (NaN and the infinities too), a key
            that is no string, a lone surrogate, an integer beyond 64 bits.
        MessageTooLarge: more than *max_size* bytes.
    """
    if not isinstance(payload, dict):
        if not isinstance(payload, Mapping):
            hint = "; of a pydantic model, pass model_dump()" if _is_model(payload) else ""
            raise InvalidPayload(
                f"the payload must be a mapping, to become a JSON object, not "
                f"{type(payload).__name__}{hint}"
            )
        payload = dict(payload)
    try:
        encoded = orjson.dumps(payload)
    except orjson.JSONEncodeError as error:
        raise InvalidPayload(f"the payload cannot be encoded as JSON: {error}") from error
    # orjson writes NaN and the infinities as null. A quiet change of what was sent is worse than a
    # refusal, and only a payload with a null in its text can hide one.
    if b"null" in encoded and _has_nonfinite(payload):
        raise InvalidPayload("the payload holds NaN or an infinity, which JSON cannot express")
    if len(encoded) > max_size:
        raise MessageTooLarge(len(encoded), max_size)
    return encoded.decode()


def _is_model(value: object) -> bool:
    return hasattr(value, "model_dump")


def check_ttl(ttl: float | timedelta | None) -> timedelta | None:
    """Return a time to live as a ``timedelta``; numbers are seconds.

    Raises:
        InvalidMessage: if it is not positive, or longer than a century.
    """
    if ttl is None:
        return None
    given: object = ttl  # it may come from anywhere
    seconds = given.total_seconds() if isinstance(given, timedelta) else given
    if isinstance(seconds, (int, float)) and 0 < seconds <= _MAX_TTL.total_seconds():
        rounded = timedelta(seconds=seconds)
        if rounded:  # to microseconds, as PostgreSQL counts
            return rounded
    raise InvalidMessage(f"invalid ttl {ttl!r}: expected seconds, more than 0, at most 100 years")


def _has_nonfinite(value: object) -> bool:
    if isinstance(value, float):
        return not math.isfinite(value)
    if isinstance(value, dict):
        return any(map(_has_nonfinite, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_has_nonfinite, value))
    if isinstance(value, Enum):
        return _has_nonfinite(value.value)
    if is_dataclass(value):
        # As orjson does: attributes that are no fields too, but none with a leading underscore.
        names = {field.name for field in fields(value)}.union(getattr(value, "__dict__", ()))
        return any(
            _has_nonfinite(getattr(value, name, None)) for name in names if not name.startswith("_")
        )
    return False


class Position(NamedTuple):
    """A place in the log, opaque to clients: "everything after here" is a complete answer.

    ``str()`` gives ``"<epoch>-<id>"``; ``"0"`` (:data:`BEGINNING`) stands for the
    beginning of what is retained.
    """

    epoch: int
    id: int

    def __str__(self) -> str:
        return f"{self.epoch}-{self.id}" if self.epoch else "0"

    @classmethod
    def parse(cls, text: Position | str) -> Position:
        """Read what ``str()`` wrote.

        Raises:
            InvalidPosition: for anything else. Whether the log knows it shows when it is used.
        """
        given: object = text  # it may come from anywhere
        if isinstance(given, Position):
            return given
        if given == "0":
            return BEGINNING
        match = _POSITION.fullmatch(given) if isinstance(given, str) else None
        if match is None or int(match[2]) > _MAX_ID:
            raise InvalidPosition(given)
        return cls(int(match[1]), int(match[2]))


BEGINNING = Position(0, 0)


class Message(Mapping[str, Any]):
    """One message of the log: a read-only mapping over its payload.

    ``message["text"]`` is the payload's; ``message.id`` and the other attributes are its own.
    Compares and hashes by identity in the log (:attr:`position`), never by content.
    """

    __slots__ = ("_data", "_envelope", "channel", "created_at", "epoch", "id", "payload", "size")

    def __init__(
        self,
        id: int,
        channel: str,
        payload: str,
        created_at: datetime,
        size: int,
        epoch: int,
    ) -> None:
        self.id = id
        """Its place in the log: 1, 2, 3 … without holes."""
        self.channel = channel
        self.payload = payload
        """The text of a JSON object, to the letter as published."""
        self.created_at = created_at
        """When it was published, by the database's clock; with time zone."""
        self.size = size
        """Bytes of UTF-8 in :attr:`payload`."""
        self.epoch = epoch
        self._data: dict[str, Any] | None = None
        self._envelope: str | None = None

    @property
    def position(self) -> Position:
        """Resume after this message by giving this to ``after=``."""
        return Position(self.epoch, self.id)

    @property
    def data(self) -> dict[str, Any]:
        """The payload, parsed on first use and then shared: do not change it.

        Raises:
            InvalidPayload: if the text is valid for PostgreSQL but not for orjson (nested deeper
                than 1024 levels, a number such as 1e999); only SQL can have published it.
        """
        data = self._data
        if data is None:
            try:
                data = self._data = orjson.loads(self.payload)
            except orjson.JSONDecodeError as error:
                raise InvalidPayload(f"message {self.id} cannot be parsed: {error}") from error
        return data

    @property
    def envelope(self) -> str:
        """What a socket gets: ``{"id", "position", "channel", "created_at", "data"}`` as JSON.

        Made once, however many sockets it goes to; the payload's text is not parsed for it.
        """
        if self._envelope is None:
            created_at = self.created_at.astimezone(UTC).isoformat(timespec="microseconds")
            self._envelope = (
                f'{{"id":{self.id},"position":"{self.epoch}-{self.id}",'
                f'"channel":{orjson.dumps(self.channel).decode()},'
                f'"created_at":"{created_at}","data":{self.payload}}}'
            )
        return self._envelope

    def __getitem__(self, key: str) -> Any:
        return self.data[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.data)

    def __len__(self) -> int:
        return len(self.data)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Message) and self.id == other.id and self.epoch == other.epoch

    def __hash__(self) -> int:
        return hash((self.epoch, self.id))

    def __repr__(self) -> str:
        payload = self.payload if len(self.payload) <= 80 else self.payload[:77] + "..."
        return f"<Message {self.position} {self.channel!r} {payload}>"
