"""Attribute values as JSON has them, as in FastAPI's responses. Pure."""

from __future__ import annotations

from datetime import date, datetime
from enum import Enum
from typing import Any
from uuid import UUID

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

__all__ = ["plain"]

# What the default serialiser takes as it is, and bytes, which travel beside the text.
_AS_THEY_ARE = frozenset(
    {str, int, float, bool, type(None), datetime, date, UUID, bytes, bytearray, memoryview}
)


def plain(value: Any) -> Any:
    """*value* with nothing in it that the default serialiser does not know.

    Decimals become texts, for a float would lose digits; intervals are in ISO 8601; sets are lists
    in no order; addresses and ranges are what pydantic makes of them. Enums are their values.

    Raises:
        TypeError, ValueError: a type that nobody knows.
    """
    if type(value) in _AS_THEY_ARE:
        return value
    match value:
        case Enum():
            return plain(value.value)
        case dict():
            return {key: plain(item) for key, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [plain(item) for item in value]
        case BaseModel():
            return plain(value.model_dump())
        case _:
            return to_jsonable_python(value)
