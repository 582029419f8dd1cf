"""Messages as lines of text: what the command line reads and writes."""

from __future__ import annotations

import os
import re
import select
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from pgchannels.errors import InvalidPayload, PGChannelsError
from pgchannels.payloads import loads

if TYPE_CHECKING:
    from pgchannels.messages import Message

__all__ = [
    "KeptText",
    "Line",
    "batches",
    "discard_output",
    "envelope_line",
    "message_line",
    "parse_payload",
]

# Of one batch: lines, and about so many bytes.
_MAX_LINES = 1000
_MAX_BYTES = 8 * 1024 * 1024
# Seconds without input after which what has come is not held back any longer.
_PAUSE = 0.1

_LINE_BREAK = re.compile(r"[\r\n]+")
# JSON lets these stand, and a terminal obeys them or hides what they do: C1 controls, marks that
# turn the direction of text, characters of no width, line separators, tags. A JSON string may have
# each as an escape instead.
_CONTROL = re.compile(
    "[\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e0fff]"
)


class Line(NamedTuple):
    """A line that is not blank."""

    number: int
    """From 1."""
    content: bytes


class KeptText:
    """A serialiser that keeps the text of a payload: not every number would survive its parsing."""

    def __init__(self, text: str) -> None:
        self._text = text

    def dumps(self, payload: Mapping[str, Any]) -> str:
        return self._text

    def loads(self, text: str) -> dict[str, Any]:
        loaded: dict[str, Any] = loads(text)
        return loaded


def parse_payload(text: str | bytes) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InvalidPayload: if it is not one.
    """
    try:
        payload = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        place = f"at character {error.pos + 1}"
        raise InvalidPayload(f"the payload is not JSON: {error.msg} {place}") from error
    if not isinstance(payload, dict):
        raise InvalidPayload(f"the payload must be a JSON object, not {_KINDS[type(payload)]}")
    return payload


_KINDS = {
    list: "an array",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def batches(descriptor: int, *, max_line: int) -> Iterator[list[Line]]:
    """Up to 1000 lines of a file at a time; fewer at its end, if they are long, or when it pauses.

    Raises:
        PGChannelsError: a line has more than *max_line* bytes.
    """
    lines: list[Line] = []
    size = number = 0
    rest = b""
    ended = False
    while not ended:
        if lines and not _is_ready(descriptor):
            yield lines
            lines, size = [], 0
        chunk = os.read(descriptor, _MAX_BYTES)
        ended = not chunk
        *whole, rest = (rest + chunk).split(b"\n")
        if ended:
            whole.append(rest)
        for content in whole:
            number += 1
            if content.strip():
                lines.append(Line(number, content))
                size += len(content)
            if len(lines) == _MAX_LINES or size >= _MAX_BYTES:
                yield lines
                lines, size = [], 0
        if len(rest) > max_line:
            raise PGChannelsError(f"line {number + 1} has more than {max_line} bytes")
    if lines:
        yield lines


def discard_output() -> None:
    """Let standard output lead nowhere: what is still to be flushed cannot be written."""
    with suppress(OSError):  # it may be no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_ready(descriptor: int) -> bool:
    try:
        return bool(select.select([descriptor], [], [], _PAUSE)[0])
    except OSError:
        return True  # on Windows, where only sockets can be waited for


def message_line(message: Message) -> str:
    """Time (UTC), position, channel and payload: for people."""
    created_at = message.created_at.astimezone(UTC).isoformat(timespec="milliseconds")
    payload = _one_line(message.payload)
    return f"{created_at[:-6]}Z  {message.position}  {message.channel}  {payload}"


def envelope_line(message: Message) -> str:
    """The JSON that clients get, as one line."""
    return _one_line(message.envelope)


def _one_line(json: str) -> str:
    """The same JSON, in one line that no terminal obeys."""
    # A line break stands between tokens: in a string, it is written as an escape.
    return _CONTROL.sub(_escape, _LINE_BREAK.sub(" ", json))


def _escape(match: re.Match[str]) -> str:
    units = match[0].encode("utf-16-be")
    return "".join(f"\\u{units[place : place + 2].hex()}" for place in range(0, len(units), 2))
