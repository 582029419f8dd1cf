"""Payloads as JSON text: serialisers, and the bytes that JSON cannot carry. Pure.

Bytes anywhere in a payload are lifted out. The text has ``null`` in their place; they travel beside
it as attachments, and a header lists where they belong as JSON pointers (RFC 6901). So no key in a
payload means anything to us, and whatever a user sends comes out as it went in.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, NamedTuple, Protocol, TypeGuard

import orjson
from pydantic_core import to_jsonable_python

from pgchannels.errors import InvalidPayload, MessageTooLarge

__all__ = [
    "JSONSerializer",
    "Payload",
    "Serializer",
    "attach",
    "encode",
    "encode_payload",
    "loads",
    "plain",
]

Bytes = (bytes, bytearray, memoryview)

# What becomes an array, besides the lists and tuples that orjson knows.
_COLLECTIONS = (set, frozenset, deque)

_SCALARS = frozenset({str, int, float, bool, type(None)})

# As deep as orjson goes. Deeper, or circular, and nothing could be encoded anyway.
_MAX_DEPTH = 254

# All digits as one, so that a long number can be found without a look at each byte in Python.
_ZEROS = bytes.maketrans(b"123456789", b"0" * 9)

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
    """The default: `orjson <https://github.com/ijl/orjson#types>`_, and pydantic for the rest.

    Besides the JSON types it encodes dataclasses, ``datetime``, ``date``, ``time``, ``UUID`` and
    enums; pydantic models, anywhere, as ``model_dump(mode="json")`` gives them; sets; and what
    pydantic knows, such as ``Decimal``, URLs and addresses, as texts. NaN and the infinities are
    refused, and so are integers beyond 64 bits. It reads integers of any size exactly.
    """

    def dumps(self, payload: Mapping[str, Any]) -> str:
        if _TUPLES_HAVE_NO_LIMIT:
            _check_depth(payload.values(), _MAX_DEPTH)
        return encode(payload)

    def loads(self, text: str) -> dict[str, Any]:
        loaded: dict[str, Any] = loads(text)
        return loaded


def plain(value: object) -> object:
    """Return *value*, of a type that orjson does not know, as one that it knows.

    Models are dumped, with bytes left in their places; collections become lists.

    Raises:
        TypeError, ValueError: for bytes, and for types that pydantic does not know either.
    """
    if isinstance(value, Bytes):
        raise TypeError("bytes have no place in JSON")
    if _is_model(value):
        return _dump(value)
    if isinstance(value, _COLLECTIONS):
        return list(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (Iterator, type)):
        raise TypeError(f"{value!r} cannot be encoded")  # reading an iterator would empty it
    return to_jsonable_python(value)


def encode(content: object, default: Callable[[Any], Any] = plain) -> str:
    """Return the JSON text of what a payload or a frame holds.

    Args:
        content: anything that orjson or *default* knows.
        default: called for values that orjson does not know.

    Raises:
        TypeError: for what cannot be encoded, an integer beyond 64 bits and nesting too deep.
        ValueError: for NaN and the infinities.
    """
    encoded = orjson.dumps(content, default)
    # orjson writes NaN and the infinities as null. A quiet change of what was sent is worse
    # than a refusal, and only a payload with a null in its text can hide one.
    if b"null" in encoded and _has_nonfinite(content):
        raise ValueError("it holds NaN or an infinity, which JSON cannot express")
    return encoded.decode()


def loads(text: str | bytes) -> Any:
    """Parse JSON, with integers of any size as they are: orjson would round those beyond 64 bits.

    Raises:
        ValueError: it is not JSON by RFC 8259, holds a number beyond the range of a double, or is
            nested deeper than 1024 levels, or with such an integer deeper than Python's recursion.
    """
    loaded = orjson.loads(text)
    digits = (text.encode() if isinstance(text, str) else text).translate(_ZEROS)
    # Beyond 64 bits, an integer has 20 digits, a negative one at least 19.
    if b"0" * 19 in digits and (b"0" * 20 in digits or b"-" + b"0" * 19 in digits):
        try:
            return json.loads(text)
        except RecursionError as error:
            raise ValueError("it is nested too deep") from error
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
    content = payload if isinstance(payload, dict) else _as_dict(payload, serializer)
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
    reason: object = error
    if isinstance(error, RecursionError):
        reason = "it is nested too deep"
    elif "64-bit" in str(error):
        reason = "it holds an integer beyond 64 bits; send it as a text"
    return InvalidPayload(f"the payload cannot be encoded as JSON: {reason}")


def _as_dict(payload: object, serializer: Serializer) -> dict[str, Any]:
    if isinstance(payload, Mapping):
        return dict(payload)
    if _is_model(payload):
        try:
            # A serialiser of the application's may know other types, and gets values as they are.
            dumped = _dump(payload) if serializer is DEFAULT else payload.model_dump()
        except _REFUSALS as error:
            raise _refused(error) from error
        if isinstance(dumped, dict):
            return dumped
    raise InvalidPayload(
        "the payload must be a mapping or a pydantic model, to become a JSON object, not "
        f"{type(payload).__name__}"
    )


class _Model(Protocol):
    def model_dump(self, *, mode: str = "python") -> Any: ...


def _is_model(value: object) -> TypeGuard[_Model]:
    # pydantic's, without a need to import it.
    return callable(getattr(value, "model_dump", None)) and not isinstance(value, type)


def _dump(model: _Model) -> Any:
    """A model as JSON has it, but with bytes, which become attachments, in their places."""
    values = model.model_dump()
    if not _has_bytes(values):
        return model.model_dump(mode="json")
    try:
        dumped = model.model_dump(mode="json")
    except UnicodeDecodeError:  # bytes are texts for pydantic, unless a model says otherwise
        dumped = to_jsonable_python(values, bytes_mode="base64")
    return _with_bytes(values, dumped)


def _has_bytes(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(_has_bytes, value.values()))
    if isinstance(value, (list, tuple, *_COLLECTIONS)):
        return any(map(_has_bytes, value))
    return isinstance(value, Bytes)


def _with_bytes(value: Any, dumped: Any) -> Any:
    """*dumped* with the bytes of *value*, the same thing before it was made JSON."""
    if isinstance(value, Bytes):
        return value
    if isinstance(value, dict) and isinstance(dumped, dict):
        pairs = zip(value.values(), dumped.items(), strict=True)
        return {key: _with_bytes(inner, item) for inner, (key, item) in pairs}
    if isinstance(value, (list, tuple, *_COLLECTIONS)) and isinstance(dumped, list):
        return [_with_bytes(*pair) for pair in zip(value, dumped, strict=True)]
    return dumped


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
    if _is_model(value):
        return _lift(_dump(value), pointer, attachments, pointers, depth)
    if isinstance(value, Mapping):
        return _lift(dict(value), pointer, attachments, pointers, depth)
    if isinstance(value, (list, tuple, *_COLLECTIONS)):
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
    if isinstance(value, (list, tuple, *_COLLECTIONS)):
        return any(map(_has_nonfinite, value))
    if isinstance(value, Mapping):
        return any(map(_has_nonfinite, value.values()))
    if _is_model(value):
        return _has_nonfinite(value.model_dump())  # mode="json" may have made it None
    if isinstance(value, Enum):
        return _has_nonfinite(value.value)
    if is_dataclass(value):
        # As orjson does: attributes that are no fields too, but none with a leading underscore.
        names = {field.name for field in fields(value)}.union(getattr(value, "__dict__", ()))
        return any(
            _has_nonfinite(getattr(value, name, None)) for name in names if not name.startswith("_")
        )
    return False
