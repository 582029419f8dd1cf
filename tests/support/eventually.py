"""Waiting for a condition, in place of sleeping and hoping."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

INTERVAL = 0.01


async def eventually(condition: Callable[[], T | Awaitable[T]], *, timeout: float = 10.0) -> T:
    """Poll ``condition`` until it returns something true, and return that.

    An AssertionError that it raises counts as false, so that it may be a block of assertions. On
    timeout the last value, or the last such error, is in the message. The time limit includes a
    condition that hangs.
    """
    last: object = "nothing yet: the first call has not returned"
    cause: AssertionError | None = None
    try:
        async with asyncio.timeout(timeout):
            while True:
                try:
                    value = condition()
                    if inspect.isawaitable(value):
                        value = await value
                except AssertionError as error:
                    last, cause = error, error
                else:
                    if value:
                        return value
                    last, cause = value, None
                await asyncio.sleep(INTERVAL)
    except TimeoutError as error:
        raise AssertionError(f"not within {timeout} s; the last value: {last!r}") from (
            cause or error
        )
