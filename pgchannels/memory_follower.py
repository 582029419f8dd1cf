"""Durable readers of a memory log."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, overload
from uuid import UUID

from pgchannels.errors import ConfigurationError, FollowerLost, UnknownPosition
from pgchannels.follower import Batch, Follower
from pgchannels.memory_log import EPOCH, MemoryLog, Reader
from pgchannels.messages import BEGINNING, Message, Position
from pgchannels.records import FollowerStatus
from pgchannels.stream import Source

if TYPE_CHECKING:
    from pgchannels.settings import Settings

__all__ = ["MemoryBatch", "MemoryFollower", "statuses"]

_MAX_LAG = 100_000


def statuses(log: MemoryLog) -> list[FollowerStatus]:
    """How far each durable reader has come."""
    log.advance()
    return [
        FollowerStatus(
            name,
            reader.channels,
            Position(EPOCH, reader.position),
            min(log.count(reader.channels, reader.position), _MAX_LAG),
            reader.node is not None,
            reader.moved_at,
        )
        for name, reader in sorted(log.readers.items())
    ]


@dataclass(eq=False)
class _Term:
    """From one takeover to the next."""

    reader: Reader
    read: int
    """The id that has been handed out."""


class MemoryBatch(Batch):
    """Messages for a durable reader, up to an id."""

    def __init__(self, messages: Sequence[Message], follower: MemoryFollower, term: _Term) -> None:
        self._messages = messages
        self._upto = term.read
        self._follower = follower
        self._term = term

    @overload
    def __getitem__(self, index: int) -> Message: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Message]: ...

    def __getitem__(self, index: int | slice) -> Message | Sequence[Message]:
        return self._messages[index]

    def __len__(self) -> int:
        return len(self._messages)

    @property
    def position(self) -> Position:
        return Position(EPOCH, self._upto)

    async def ack(self, transaction: Any = None) -> None:
        if transaction is not None:
            raise ConfigurationError("a memory layer has no transactions: call ack() without one")
        self._follower.done(self._term, self._upto)


class MemoryFollower(Follower):
    """A durable reader's place in the queue of those who would read for one name.

    Args:
        log: what is read.
        source: tells of new messages, and whether the layer is open.
        node: whose lease it lives by.
        followers: those of the layer; it is one of them while it is entered.
    """

    def __init__(
        self,
        channels: tuple[str, ...],
        name: str,
        after: Position | None,
        *,
        log: MemoryLog,
        source: Source,
        node: UUID,
        settings: Settings,
        followers: set[MemoryFollower],
    ) -> None:
        self.name = name
        self._channels = channels
        self._after = after
        self._log = log
        self._source = source
        self._node = node
        self._settings = settings
        self._followers = followers
        self._changed = asyncio.Event()
        self._entered = self._ended = False
        self._term: _Term | None = None
        # It has been handed all that there was for it, and acknowledged it.
        self._idle = False

    async def __aenter__(self) -> Self:
        self._source.check_open()
        self._log.advance()
        # Here and not later: whatever is sent once this has been entered is to be read.
        self._reader()
        self._entered = True
        self._followers.add(self)
        for channel in self._channels:
            self._source.register(channel, self)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._ended:
            return  # with the layer, which has let go of the name, or has died holding it
        self.end()
        if self._term is not None and self._holds(self._term):
            self._log.release(self.name)

    async def __anext__(self) -> Batch:
        if not self._entered:
            raise RuntimeError("enter the follower first: async with layer.follow(…) as batches")
        await asyncio.sleep(0)
        while not self._ended:
            self._changed.clear()
            batch = self._next()
            if batch is not None:
                return batch
            await self._changed.wait()
        raise StopAsyncIteration

    def end(self) -> None:
        """Read no more; whoever waits here gets the end of the iteration."""
        self._ended = True
        self._followers.discard(self)
        for channel in self._channels:
            self._source.unregister(channel, self)
        self.look()

    def look(self) -> None:
        """Something has changed for who reads under this name."""
        self._changed.set()

    def offer(self, message: Message) -> None:
        """For the source: there is a message."""
        if message.ephemeral:
            return
        if self._idle and self._term is not None:
            self._move_along(self._term, message.id - 1)
        self._idle = False
        self.look()

    def missed(self, floor: int) -> None:
        """For the source. That messages are gone shows when they are read."""

    def done(self, term: _Term, upto: int) -> None:
        """Save that everything up to an id is done."""
        self._source.check_open()
        if not self._holds(term):
            raise FollowerLost(self.name)
        if upto > term.reader.position:
            term.reader.position = upto
            term.reader.moved_at = self._log.clock()

    def _holds(self, term: _Term) -> bool:
        """Whether nobody has taken over since, and the name was not forgotten."""
        return self._log.readers.get(self.name) is term.reader and term.reader.holder is term

    def _reader(self) -> Reader:
        """The durable reader; a new one, if the name is new."""
        reader = self._log.readers.get(self.name)
        if reader is None:
            reader = Reader(self._channels, self._start(), self._log.clock())
            self._log.readers[self.name] = reader
        return reader

    def _start(self) -> int:
        after, head = self._after, self._log.head
        if after is None:
            return head.id
        if after == BEGINNING:
            return head.floor  # and nothing before it is missing
        if after.epoch != head.epoch or after.id > head.id:
            raise UnknownPosition(after)
        return after.id

    def _active(self) -> _Term | None:
        """What it has to read on from, if it is the one that reads; it becomes so if nobody is."""
        if self._term is not None and self._holds(self._term):
            return self._term
        reader = self._reader()
        if reader.node is not None:
            return None
        self._term = reader.holder = _Term(reader, reader.position)
        reader.node, reader.channels = self._node, self._channels
        return self._term

    def _next(self) -> MemoryBatch | None:
        term = self._active()
        if term is None:
            return None
        page = self._log.read(self._channels, term.read, settings=self._settings)
        gap = term.read < page.head.floor
        if gap:
            self.truncated = True
            term.read = page.head.floor
        if page.messages:
            term.read = page.messages[-1].id
        elif not gap:
            self._idle = term.reader.position == term.read
            if self._idle:
                self._move_along(term, page.head.id)
            return None
        return MemoryBatch(page.messages, self, term)

    def _move_along(self, term: _Term, upto: int) -> None:
        """Nothing up to here is left to do: what retention removes of it will not be missing."""
        if self._holds(term):
            term.reader.position = term.read = upto
