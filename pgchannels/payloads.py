"""Payloads as JSON text: serialisers, and the bytes that JSON cannot carry. Pure.

Bytes anywhere in a payload are lifted out. The text has ``null`` in their place; they travel beside
it as attachments, and a header lists where they belong as JSON pointers (RFC 6901). So no key in a
payload means anything to us, and whatever a user sends comes out as it went in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, NamedTuple, Protocol

import orjson

from pgchannels.errors import InvalidPayload, MessageTooLarge

__all__ = ["JSONSerializer", "Payload", "Serializer", "attach", "encode_payload"]

Bytes = (bytes, bytearray, memoryview)

_SCALARS = frozenset({str, int, float, bool, type(None)})

# As deep as orjson goes. Deeper, or circular, and nothing could be encoded anyway.
_MAX_DEPTH = 254

# What a serialiser raises for what it cannot encode; its own recursion may end first.
_REFUSALS = (TypeError, ValueError, RecursionError)


def _tuples_have_no_limit() -> bool:
    nested: tuple[Any, ...] = ()
    for _ in range(2 * _MAX_DEPTH):
        nested = (nested,)
    try:
        orjson.dumps(nested)
    except TypeError:
        return False
    return True


# orjson 3.12 and 3.13 count no tuples: one that holds itself, by way of a list, ends the process.
_TUPLES_HAVE_NO_LIMIT = _tuples_have_no_limit()


class Serializer(Protocol):
    """How payloads become the text of a JSON object, and objects again.

    The text must be JSON, for SQL looks into it and sockets get it as it is. What a serialiser of
    one's own decides is how other types are written, and as what they are read.
    """

    def dumps(self, payload: Mapping[str, Any]) -> str:
        """Encode; raise ``TypeError`` or ``ValueError`` for what cannot be."""
        ...

    def loads(self, text: str) -> dict[str, Any]:
        """Decode what ``dumps`` made, and any other JSON object; raise ``ValueError``."""
        ...


class JSONSerializer:
    """The default: `orjson <https://github.com/ijl/orjson#types>`_.

    Besides the JSON types it encodes dataclasses, ``datetime``, ``date``, ``time``, ``UUID`` and
    enums. NaN and the infinities are refused.
    """

    def dumps(self, payload: Mapping[str, Any]) -> str:
        if _TUPLES_HAVE_NO_LIMIT:
            _check_depth(payload.values(), _MAX_DEPTH)
        encoded = orjson.dumps(payload)
        # orjson writes NaN and the infinities as null. A quiet change of what was sent is worse
        # than a refusal, and only a payload with a null in its text can hide one.
        if b"null" in encoded and _has_nonfinite(payload):
            raise ValueError("it holds NaN or an infinity, which JSON cannot express")
        return encoded.decode()

    def loads(self, text: str) -> dict[str, Any]:
        loaded: dict[str, Any] = orjson.loads(text)
        return loaded


DEFAULT = JSONSerializer()


class Payload(NamedTuple):
    """An encoded payload."""

    text: str
    attachments: tuple[bytes, ...] = ()
    pointers: tuple[str, ...] = ()
    """Where each attachment belongs: JSON pointers."""


def encode_payload(payload: object, *, max_size: int, serializer: Serializer = DEFAULT) -> Payload:
    """Encode a mapping with string keys, or a pydantic model, as a JSON object.

    Args:
        payload: of what *serializer* encodes, and of bytes inside of dicts, lists and tuples.
        max_size: bytes that the text (as UTF-8) and the attachments may have together.
        serializer: makes the text.

    Raises:
        InvalidPayload: not a mapping, a value that JSON lacks (NaN and the infinities too), a key
            that is no string, a lone surrogate, an integer beyond 64 bits.
        MessageTooLarge: more than *max_size* bytes.
    """
    content = payload if isinstance(payload, dict) else _as_dict(payload)
    attachments: list[bytes] = []
    pointers: list[str] = []
    try:
        text = serializer.dumps(content)
    except _REFUSALS as error:
        # Bytes are lifted out only now: most payloads have none, and looking costs.
        try:
            content = _lift(content, "", attachments, pointers, _MAX_DEPTH)
            if not attachments:
                raise
            text = serializer.dumps(content)
        except _REFUSALS as refusal:
            raise _refused(refusal) from error
    if serializer is not DEFAULT:
        _check_object(text)
    size = len(text) if text.isascii() else len(text.encode())
    if attachments:
        size += sum(map(len, attachments))
    if size > max_size:
        raise MessageTooLarge(size, max_size)
    return Payload(text, tuple(attachments), tuple(pointers)) if attachments else Payload(text)


def attach(data: dict[str, Any], pointers: Sequence[str], attachments: Sequence[bytes]) -> None:
    """Put attachments back where they belong.

    Raises:
        InvalidPayload: if a pointer leads nowhere; only SQL can have published it.
    """
    try:
        for pointer, attachment in zip(pointers, attachments, strict=True):
            *parents, last = (
                part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")[1:]
            )
            target: Any = data
            for part in parents:
                target = target[int(part) if isinstance(target, list) else part]
            target[int(last) if isinstance(target, list) else last] = attachment
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise InvalidPayload(f"an attachment has no place in the payload: {error!r}") from error


def _refused(error: BaseException) -> InvalidPayload:
    if isinstance(error, InvalidPayload):
        return error
    reason = "it is nested too deep" if isinstance(error, RecursionError) else error
    return InvalidPayload(f"the payload cannot be encoded as JSON: {reason}")


def _as_dict(payload: object) -> dict[str, Any]:
    if isinstance(payload, Mapping):
        return dict(payload)
    # pydantic's, without a need to import it.
    dump = getattr(payload, "model_dump", None)
    if callable(dump) and not isinstance(payload, type):
        try:
            dumped = dump()
        except _REFUSALS as error:
            raise _refused(error) from error
        if isinstance(dumped, dict):
            return dumped
    raise InvalidPayload(
        "the payload must be a mapping or a pydantic model, to become a JSON object, not "
        f"{type(payload).__name__}"
    )


def _lift(
    value: Any, pointer: str, attachments: list[bytes], pointers: list[str], depth: int
) -> Any:
    """Return *value* with None in place of bytes, which go to *attachments*."""
    if not depth:
        raise InvalidPayload("the payload cannot be encoded as JSON: it is nested too deep")
    if isinstance(value, Bytes):
        attachments.append(bytes(value))
        pointers.append(pointer)
        return None
    if isinstance(value, dict):
        return {
            key: _lift(
                item,
                f"{pointer}/{key.replace('~', '~0').replace('/', '~1')}",
                attachments,
                pointers,
                depth - 1,
            )
            if isinstance(key, str)
            else item
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [
            _lift(item, f"{pointer}/{place}", attachments, pointers, depth - 1)
            for place, item in enumerate(value)
        ]
    return value


def _check_depth(values: Iterable[Any], depth: int) -> None:
    if not depth:
        raise ValueError("it is nested too deep")
    for value in values:
        if type(value) in _SCALARS:
            continue  # nearly all are
        if isinstance(value, dict):
            _check_depth(value.values(), depth - 1)
        elif isinstance(value, (list, tuple)):
            _check_depth(value, depth - 1)


def _check_object(text: object) -> None:
    try:
        is_object = isinstance(text, str) and isinstance(orjson.loads(text), dict)
    except orjson.JSONDecodeError as error:
        raise InvalidPayload(f"the serialiser made something that is not JSON: {error}") from error
    if not is_object:
        raise InvalidPayload("the serialiser made something that is not a JSON object")


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
