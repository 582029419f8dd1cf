"""What the tests of layers wait with: nothing here sleeps for a time and hopes."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import Any, Protocol
from uuid import uuid4

from pgchannels.control import Command
from pgchannels.layer import ChannelLayer
from pgchannels.messages import Message
from pgchannels.stream import Stream

__all__ = [
    "PATIENCE",
    "MakeLayer",
    "listening",
    "numbers",
    "send_numbers",
    "settle",
    "take",
    "until",
]

PATIENCE = 20.0
"""Seconds that anything may take: a layer that works is never near it."""

_INTERVAL = 0.01


class MakeLayer(Protocol):
    """The fixture: opens one more layer on the test's storage, with these settings changed."""

    async def __call__(self, **settings: Any) -> ChannelLayer: ...


async def until(condition: Callable[[], object], *, timeout: float = PATIENCE) -> None:
    """Call *condition* again and again until it gives something true; it may be asynchronous.

    An AssertionError counts as false, so that it may be a block of assertions.
    """
    last: object = "nothing yet: the first call has not returned"
    try:
        async with asyncio.timeout(timeout):
            while True:
                try:
                    value = condition()
                    value = await value if inspect.isawaitable(value) else value
                    if value:
                        return
                    last = value
                except AssertionError as error:
                    last = error
                await asyncio.sleep(_INTERVAL)
    except TimeoutError as error:
        cause = last if isinstance(last, AssertionError) else error
        raise AssertionError(f"not within {timeout} s; the last value: {last!r}") from cause


async def take(stream: Stream, count: int) -> list[Message]:
    """The next *count* messages."""
    taken: list[Message] = []
    async with asyncio.timeout(PATIENCE):
        while len(taken) < count:
            taken.append(await anext(stream))
    return taken


@contextmanager
def listening(layer: ChannelLayer) -> Iterator[asyncio.Queue[Command]]:
    """The commands that a layer hears in this block."""
    heard: asyncio.Queue[Command] = asyncio.Queue()
    stop = layer.watch_commands(heard.put_nowait, lambda: None)
    try:
        yield heard
    finally:
        stop()


async def settle(*layers: ChannelLayer) -> Message:
    """Wait until what has been sent before is in the log, and these layers know of it.

    Returns a message that comes after all of it.
    """
    channel = f"settle:{uuid4().hex}"
    async with AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(layer.subscribe(channel)) for layer in layers]
        await layers[0].send(channel, {})
        return [(await take(stream, 1))[0] for stream in streams][-1]


async def send_numbers(layer: ChannelLayer, channel: str, values: Iterable[int]) -> list[Message]:
    """Send these one after the other; return the messages when they are in the log."""
    async with layer.subscribe(channel) as stream:
        count = 0
        for n in values:
            await layer.send(channel, {"n": n})
            count += 1
        return await take(stream, count)


def numbers(messages: Iterable[Message]) -> list[int]:
    """What ``{"n": …}`` held."""
    return [message["n"] for message in messages]
