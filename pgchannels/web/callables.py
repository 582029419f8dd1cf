"""Whether what an application has given can be awaited when it is called."""

from __future__ import annotations

from functools import partial
from inspect import iscoroutinefunction

__all__ = ["is_async_callable"]


def is_async_callable(given: object) -> bool:
    """Whether it is an ``async def`` function or method, an object with such a call, or a partial.

    A class is none: what calling it gives is an object of it.
    """
    while isinstance(given, partial):
        given = given.func
    if isinstance(given, type):
        return False
    if iscoroutinefunction(given):
        return True
    return callable(given) and iscoroutinefunction(type(given).__call__)
