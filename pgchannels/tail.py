"""Reads channels in a process that is not a node: no lease of its own there, no members, no pruner.

What it needs, it has in common with a node: a hub, a listener, a stream. A role that may only read
will do. If it may more, then it also sequences, for perhaps no node is running: once at the
beginning, and while it follows, as a node would.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from datetime import datetime
from heapq import nlargest
from types import TracebackType
from typing import TYPE_CHECKING, Self
from uuid import uuid4

from pgchannels.channels import check_channel
from pgchannels.errors import DatabaseError, UnknownPosition
from pgchannels.hub import Hub
from pgchannels.leases import Lease
from pgchannels.listener import Listener
from pgchannels.messages import BEGINNING, Position
from pgchannels.sequencer import Sequencer
from pgchannels.store import Session, Store
from pgchannels.stream import Stream

if TYPE_CHECKING:
    from pgchannels.messages import Message
    from pgchannels.settings import Settings

__all__ = ["Tail"]

_INSUFFICIENT_PRIVILEGE = "42501"


class Tail:
    """The messages of some channels: the newest, those after a position or time, those to come.

    An async context manager. Ephemeral messages are not among them.

    Args:
        settings: where the log is.
        channels: of which; at least one.

    Raises:
        InvalidChannel: at once.
        DatabaseUnavailable, DatabaseError: on entering, or while reading what is there. Following
            survives an outage of the database.
    """

    def __init__(self, settings: Settings, channels: Sequence[str]) -> None:
        self._settings = settings
        self._channels = tuple(dict.fromkeys(check_channel(channel) for channel in channels))
        self._store = _ReadingStore(settings)
        self._hub = Hub(
            settings,
            Session(settings, "tail", dsn=settings.dsn),
            self._store,
            on_rewritten=self._end_streams_after,
        )
        sequencing = Session(settings, "sequencer")
        self._sequencer = Sequencer(
            settings,
            sequencing,
            Lease(sequencing, "sequencer", uuid4(), settings.lease_time),
            sealed=self._hub.reached,
        )
        self._may_sequence = True
        self._listener = Listener(
            settings,
            self._store,
            on_hint=self._hint,
            on_connected=self._hub.connected,
            on_disconnected=self._hub.disconnected,
        )
        self._streams: set[Stream] = set()
        self.truncated = False
        """Retention may have removed messages that were asked for. Known once it has been read."""

    async def __aenter__(self) -> Self:
        try:
            await self._store.open()
            await self._hub.open()
            try:
                await self._sequencer.run_once()
            except DatabaseError as error:
                if error.sqlstate != _INSUFFICIENT_PRIVILEGE:
                    raise
                self._may_sequence = False
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._close()

    async def newest(self, count: int) -> tuple[list[Message], Position]:
        """The newest so many of all channels together, oldest first; and where the log ends."""
        head = await self._store.head()
        found: list[Message] = []
        for channel in self._channels:
            found += await self._newest_of(channel, head.id, count)
        newest = nlargest(count, found, key=lambda message: message.id)
        return newest[::-1], Position(head.epoch, head.id)

    async def stored(
        self, after: Position | None = None, since: datetime | None = None
    ) -> AsyncGenerator[list[Message], None]:
        """What the log holds now after a position, or from a time on: page by page, oldest first.

        Raises:
            UnknownPosition: the log has never reached it.
        """
        head = await self._store.head()
        if since is not None:
            after = await self._hub.position_before(since)
        elif after is None:
            after = BEGINNING
        elif after != BEGINNING and (after.epoch != head.epoch or after.id > head.id):
            raise UnknownPosition(after)
        self.truncated = after != BEGINNING and after.id < head.floor
        reached = after.id
        while reached < head.id:
            page = await self._store.read_channels(self._channels, reached)
            reached = page.upto
            messages = (message for message in page.messages if message.id <= head.id)
            yield [message for message in messages if message.is_for(None)]

    async def follow(
        self, after: Position | None = None, since: datetime | None = None
    ) -> AsyncGenerator[list[Message], None]:
        """As :meth:`stored`, and then what comes, for ever."""
        stream = Stream(
            self._channels,
            after,
            since=since,
            source=self._hub,
            settings=self._settings,
            streams=self._streams,
        )
        services = [self._listener.run, self._hub.run]
        if self._may_sequence:
            services.append(self._sequencer.run)
        tasks = [asyncio.create_task(run()) for run in services]
        try:
            async with stream:
                for task in tasks:
                    task.add_done_callback(lambda task: stream.close(_reason(task)))
                while True:
                    messages = await stream.batch()
                    self.truncated = self.truncated or stream.truncated
                    yield messages
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _newest_of(self, channel: str, head: int, count: int) -> list[Message]:
        found: list[Message] = []
        before, limit = head + 1, count
        while len(found) < count:
            page = await self._store.read_backwards(channel, before, 0, limit)
            found += [message for message in page.messages if message.is_for(None)]
            if not page.full:
                break
            before = page.end
            limit = max(count, self._settings.page_size)  # many are not for us, or expired
        return found[:count]

    def _hint(self, payload: str) -> None:
        if payload:
            self._hub.hint(payload)
        else:
            self._sequencer.asked()

    def _end_streams_after(self, reached: Position) -> None:
        for stream in list(self._streams):
            stream.close(UnknownPosition(reached))

    async def _close(self) -> None:
        await self._sequencer.close()
        await self._store.close()
        await self._hub.close()


class _ReadingStore(Store):
    """A store for whoever may read, which needs not be a role that may be a node."""

    async def _check_schema(self) -> None:
        """Is up to who opens this."""


def _reason(task: asyncio.Task[None]) -> BaseException | None:
    return None if task.cancelled() else task.exception()
