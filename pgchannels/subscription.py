"""The state of one reader of the log: what it has had, what it needs next. Pure.

No I/O, no clock, no tasks: :class:`~pgchannels.stream.Stream` acts on what is decided here.

::

    REPLAYING ── page reaches the hub's cursor ──▶ LIVE
    LIVE ── what waits outgrows its bound ──▶ REPLAYING from just before what waited
                                               (or: LIVE without the oldest; ENDED)

What comes of what outgrows its bound is the reader's choice, see :mod:`pgchannels.overflow`. By
default, resuming after a reconnect and falling behind are one thing: what cannot be kept is read
again from the log. The hub promises to offer every message with an id above its cursor; the log
holds every message at or below it. So a reader that has read up to the hub's cursor is live, and
has missed nothing and had nothing twice.

A channel may join a reader that is under way, with a position of its own. It is then read alone
(*joining*) until it has come as far as the others, and merged.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from enum import Enum
from typing import NamedTuple

from pgchannels.messages import Message
from pgchannels.overflow import Policy

__all__ = ["Read", "State", "Subscription"]


class State(Enum):
    REPLAYING = "replaying"
    LIVE = "live"
    ENDED = "ended"
    """By the policy "disconnect": it gives nothing any more, and takes nothing."""


class Read(NamedTuple):
    """A page to be read from the log: *channels*, ids above *after*, oldest first."""

    channels: tuple[str, ...]
    after: int
    round: int
    """Which time it is that the subscription has begun; a page from before means nothing now."""


class Subscription:
    """One reader of some channels. At most one :class:`Read` may be under way at a time.

    Args:
        max_messages: messages that may wait while live.
        max_bytes: bytes of payload that may. A message that waits alone may have more, if the
            policy is not ``"replay"``.
        policy: what to do when there are more.
        key: of a message, for ``"latest_by_key"``; None for one that is not to be replaced. Must
            not raise.

    Ids given as *after* are exclusive; -1 means from the beginning of what is retained, so that
    nothing before it can count as missed.
    """

    def __init__(
        self,
        *,
        max_messages: int,
        max_bytes: int,
        policy: Policy = "replay",
        key: Callable[[Message], Hashable] | None = None,
    ) -> None:
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._policy = policy
        self._key = key
        self.state = State.LIVE
        self.truncated = False
        """Retention has removed messages that this reader had still to get. Sticks until reset."""
        self.dropped = 0
        """Messages that are lost, for they were too many."""
        self.replaced = 0
        """Messages that a later one with the same key has taken the place of."""
        self._channels: set[str] = set()
        self._joining: dict[str, int] = {}
        # While replaying: everything up to here, of the merged channels, has been paged in. While
        # live: the last message offered, or the end of the page that led here.
        self._cursor = 0
        self._round = 0
        # Merged channels that have been read further than _cursor, by themselves.
        self._ahead: dict[str, int] = {}
        self._page: list[Message] = []
        # By id or key, in the order of their ids. A plain dict is faster, but to take many from its
        # front one by one is quadratic.
        self._waiting: dict[Hashable, Message] = (
            OrderedDict() if policy in ("drop_oldest", "latest_by_key") else {}
        )
        self._waiting_bytes = 0

    @property
    def channels(self) -> frozenset[str]:
        return frozenset(self._channels).union(self._joining)

    def __contains__(self, channel: str) -> bool:
        return channel in self._channels or channel in self._joining

    def __len__(self) -> int:
        """Messages held, waiting to be taken."""
        return len(self._page) + len(self._waiting)

    def add(self, channel: str, after: int | None, hub_cursor: int) -> None:
        """Begin to read *channel* after an id; from now on if None.

        From before this call on, the hub must offer the channel's messages above *hub_cursor*.
        """
        if self.state is State.ENDED:
            return
        start = hub_cursor if after is None else after
        self.discard(channel)
        if not self._channels and not self._joining:
            self._channels.add(channel)
            self._cursor = start
            self._round += 1
            self.state = State.LIVE if start >= hub_cursor else State.REPLAYING
        else:
            self._merge_or_join(channel, start, hub_cursor)

    def discard(self, channel: str) -> None:
        """Stop reading *channel*; what waits of it is dropped."""
        if channel not in self:
            return
        self._channels.discard(channel)
        self._joining.pop(channel, None)
        self._ahead.pop(channel, None)
        self._page = [message for message in self._page if message.channel != channel]
        for place in [p for p, m in self._waiting.items() if m.channel == channel]:
            self._waiting_bytes -= self._waiting.pop(place).size

    def offer(self, message: Message) -> bool:
        """Take a message from the hub; say whether there is now something to do."""
        if (
            self.state is not State.LIVE
            or message.id <= self._cursor
            or message.channel not in self._channels
            or message.id <= self._ahead.get(message.channel, -1)
        ):
            return False  # it has been read from the log, or it will be
        place: Hashable = message.id
        if self._key is not None and (key := self._key(message)) is not None:
            place = message.channel, key
            if (earlier := self._waiting.pop(place, None)) is not None:
                self._waiting_bytes -= earlier.size
                self.replaced += 1
        self._waiting[place] = message
        self._waiting_bytes += message.size
        self._cursor = message.id
        if len(self._waiting) > self._max_messages or self._waiting_bytes > self._max_bytes:
            self._overflow()
        return True

    def missed(self, floor: int) -> None:
        """The hub could not offer all up to *floor*. Who replays sees that by itself."""
        if self.state is State.LIVE and any(
            max(self._cursor, self._ahead.get(channel, -1)) < floor for channel in self._channels
        ):
            self.truncated = True

    def next_read(self) -> Read | None:
        """The page that is needed now; None while one is still to be taken, or if live."""
        if self._page or self.state is State.ENDED:
            return None
        if self._joining:
            channel, after = next(iter(self._joining.items()))
            return Read((channel,), after, self._round)
        if self.state is State.REPLAYING and self._channels:
            return Read(tuple(sorted(self._channels)), self._cursor, self._round)
        return None

    def page(
        self, read: Read, messages: Sequence[Message], *, upto: int, floor: int, hub_cursor: int
    ) -> None:
        """Take in the answer to *read*.

        Args:
            read: as :meth:`next_read` gave it.
            messages: of its channels, in order; all there are with ids from *read.after* to *upto*.
            upto: the id that the page reaches.
            floor: the last id that retention may have removed, when the page was read.
            hub_cursor: the hub's cursor now.
        """
        if self.state is State.ENDED or read.round != self._round:
            return
        # A page of several channels was asked for before any of them left to join again.
        joining = len(read.channels) == 1 and self._joining.get(read.channels[0]) == read.after
        if not joining and (self.state is State.LIVE or self._cursor != read.after):
            return  # what was to be read has been discarded in the meantime
        # Each by its own start: one that reads from the beginning has missed nothing, but another
        # that is read along with it may have.
        starts = (
            [read.after]
            if joining
            else [
                max(read.after, self._ahead.get(c, -1))
                for c in self._channels
                if c in read.channels
            ]
        )
        if any(0 <= start < floor for start in starts):
            self.truncated = True
        if joining:
            (channel,) = read.channels
            self._page = list(messages)
            del self._joining[channel]
            self._merge_or_join(channel, upto, hub_cursor)
            return
        self._page = [
            message
            for message in messages
            if message.channel in self._channels
            and message.id > self._ahead.get(message.channel, -1)
        ]
        # Channels that were merged while this page was being read are not in it.
        for channel in self._channels.difference(read.channels):
            self._channels.discard(channel)
            self._joining[channel] = max(self._ahead.pop(channel, -1), read.after)
        self._cursor = max(self._cursor, upto)
        if self._cursor >= hub_cursor:
            self.state = State.LIVE

    def take(self) -> list[Message]:
        """Everything that is held, in order; empty if nothing is."""
        taken = self._page
        if self._waiting:
            taken = [*taken, *self._waiting.values()]
            self._clear()
        self._page = []
        if self._ahead:
            cursor = self._cursor
            self._ahead = {name: id for name, id in self._ahead.items() if id > cursor}
        return taken

    def _overflow(self) -> None:
        if self._policy == "replay":
            # Everything before the first that waits has been handed on, so go back to there.
            self._cursor = next(iter(self._waiting.values())).id - 1
            self._clear()
            self.state = State.REPLAYING
        elif len(self._waiting) == 1:
            pass  # larger than all that may wait; no consumer is too slow for that
        elif self._policy == "disconnect":
            self.dropped += len(self)
            self._page = []
            self._clear()
            self.state = State.ENDED
        else:
            while len(self._waiting) > self._max_messages or (
                self._waiting_bytes > self._max_bytes and len(self._waiting) > 1
            ):
                oldest = self._waiting.pop(next(iter(self._waiting)))
                self._waiting_bytes -= oldest.size
                self.dropped += 1

    def _clear(self) -> None:
        self._waiting.clear()
        self._waiting_bytes = 0

    def _merge_or_join(self, channel: str, start: int, hub_cursor: int) -> None:
        reached = max(self._cursor, hub_cursor) if self.state is State.LIVE else self._cursor
        if start >= reached:
            self._channels.add(channel)
            self._ahead[channel] = start
        else:
            self._joining[channel] = start
