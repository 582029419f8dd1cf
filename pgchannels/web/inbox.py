"""Frames that a client has sent, and the code that takes them.

The end of a client is learned where its frames are read. Code that waits for a frame reads it
itself. Where no code does, a task of the socket reads one ahead: :meth:`Inbox.read_ahead`. One
frame waits at most, and until it is taken the server's own back-pressure holds up the client.

Whatever must be awaited between reading a frame and handing it out is awaited by that task, too.
Code that takes a frame and is cancelled meanwhile, by a timeout around it, loses nothing: the frame
is there for whoever is next.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeAlias

from pgchannels.web.incoming import Frame

__all__ = ["Begin", "Inbox", "Rest"]

# What is left to do about a frame; None comes out if it was dropped, refused or answered.
Rest: TypeAlias = Coroutine[Any, Any, Frame | None]
# Begins with a frame, at once: hands it out, or says what is left to do.
Begin: TypeAlias = Callable[[Frame], Frame | Rest]


class Inbox:
    """What has been read of a client's frames, and the code that waits for them.

    Args:
        read: reads the next frame; None when the client is gone.
        spawn: runs :meth:`_run` beside the socket.
    """

    def __init__(
        self,
        read: Callable[[], Awaitable[Frame | None]],
        spawn: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._read = read
        self._spawn = spawn
        self._is_read = False  # by the task, or by code that takes
        self._runs = False
        self._ahead: Frame | None = None
        # One of which more is to be awaited.
        self._in_hand: Frame | None = None
        self._rest: Rest | None = None
        self._waiting: deque[tuple[asyncio.Future[Frame], Begin]] = deque()
        # Of code that was cancelled when it had just been given this.
        self._given_back: deque[Frame | Exception] = deque()
        self._asked: asyncio.Future[None] | None = None
        self._has_ended = False

    @property
    def ahead(self) -> Frame | None:
        """The frame that has been read, and that no code has been given yet."""
        return self._ahead or self._in_hand

    @property
    def is_read(self) -> bool:
        """Whether the next frame, or the end of the client, would be noticed at once."""
        return self._is_read or (self._runs and self.ahead is None)

    def read_ahead(self) -> None:
        """Read one frame, unless that is being done, or one waits."""
        if not (self._is_read or self._runs or self._has_ended):
            self._start()

    async def take(self, begin: Begin) -> Frame:
        """The next frame. Ends as an iterator does when the client is gone.

        Raises:
            Exception: what the rest that *begin* has left has raised.
        """
        if self._given_back and not self._waiting:
            given = self._given_back.popleft()
            if isinstance(given, Exception):
                raise given
            return given
        frame = await self._read_or_taken()
        if frame is not None:
            begun = begin(frame)
            if isinstance(begun, Frame):
                self._ask()
                return begun
            self._in_hand, self._rest = frame, begun
            if not self._runs:
                self._start()
        if self._has_ended:
            raise StopAsyncIteration
        future: asyncio.Future[Frame] = asyncio.get_running_loop().create_future()
        self._waiting.append((future, begin))
        self._ask()
        try:
            return await future
        except asyncio.CancelledError:
            self._take_back(future, begin)
            raise

    async def _read_or_taken(self) -> Frame | None:
        """The frame that is ahead, or the next one; None if others are to give it."""
        if self._waiting or self._has_ended or self._rest is not None:
            return None
        if self._runs:
            frame, self._ahead = self._ahead, None
            return frame
        if self._is_read:
            return None
        self._is_read = True
        try:
            frame = await self._read()
        finally:
            self._is_read = False
            if self._waiting and not self._runs:
                self._start()
        if frame is None:
            self._end()
        return frame

    def _start(self) -> None:
        self._runs = True
        try:
            self._spawn(self._run())
        except RuntimeError:
            self._runs = False
            raise

    async def _run(self) -> None:
        """Read one frame, and go on as long as there is something to wait for about frames."""
        is_over = True
        try:
            while True:
                if self._rest is not None:
                    await self._finish(self._rest)
                    continue  # more of the kind are likely
                if self._ahead is None:
                    self._ahead = await self._read()
                    if self._ahead is None:
                        return
                elif self._waiting:
                    frame, self._ahead = self._ahead, None
                    begun = self._waiting[0][1](frame)
                    if isinstance(begun, Frame):
                        self._give(begun)
                    else:
                        self._in_hand, self._rest = frame, begun
                else:
                    await self._until_asked()
                if self._ahead is None and self._rest is None and not self._waiting:
                    # From here on, whoever takes frames reads them.
                    is_over = False
                    return
        finally:
            self._runs = False
            if is_over:
                self._end()

    async def _finish(self, rest: Rest) -> None:
        found: Frame | Exception | None
        try:
            found = await rest
        except Exception as error:  # noqa: BLE001 - raised where the frame is waited for
            found = error
        self._in_hand = self._rest = None
        if found is not None:
            self._give(found)

    def _give(self, found: Frame | Exception) -> None:
        while self._waiting:
            future, _ = self._waiting.popleft()
            if not future.done():
                if isinstance(found, Exception):
                    future.set_exception(found)
                else:
                    future.set_result(found)
                return
        self._given_back.append(found)

    def _take_back(self, future: asyncio.Future[Frame], begin: Begin) -> None:
        if future.cancelled():
            with suppress(ValueError):
                self._waiting.remove((future, begin))
            return
        # It was given something, and cancelled before it had its turn.
        error = future.exception()
        if error is None:
            self._give(future.result())
        elif isinstance(error, Exception) and not isinstance(error, StopAsyncIteration):
            self._give(error)

    async def _until_asked(self) -> None:
        self._asked = asyncio.get_running_loop().create_future()
        try:
            await self._asked
        finally:
            self._asked = None

    def _ask(self) -> None:
        if self._asked is not None and not self._asked.done():
            self._asked.set_result(None)

    def _end(self) -> None:
        """Nothing comes any more."""
        self._has_ended = True
        if self._rest is not None:
            self._rest.close()
            self._rest = None
        for future, _ in self._waiting:
            if not future.done():
                future.set_exception(StopAsyncIteration())
        self._waiting.clear()
