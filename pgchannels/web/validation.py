"""Pydantic's errors in a few words: nothing that was sent is repeated at length."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

__all__ = ["problems"]

MAX_PROBLEMS = 10
# Errors that are looked at. Pydantic describes all of them or none, each in microseconds, and a
# client can send a frame that has hundreds of thousands.
MAX_DESCRIBED = 1000
MAX_DEPTH = 10
MAX_TEXT = 200


def problems(error: ValidationError) -> list[dict[str, Any]]:
    """The first ten, as ``{"loc", "msg"}``; of more than a thousand, only how many there are."""
    count = error.error_count()
    if count > MAX_DESCRIBED:
        return [{"loc": [], "msg": f"{count} values are not as expected"}]
    found = error.errors(include_url=False, include_context=False, include_input=False)
    return [
        {"loc": [*map(_short, problem["loc"][:MAX_DEPTH])], "msg": _short(problem["msg"])}
        for problem in found[:MAX_PROBLEMS]
    ]


def _short(part: int | str) -> int | str:
    # Keys are the sender's, and some sentences repeat a value.
    return part[:MAX_TEXT] if isinstance(part, str) else part
