"""What ``layer.subscribe()`` gives: a subscription with its reads, its waiting and its end."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Hashable, Iterable, Sequence
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from pgchannels.backoff import Backoff
from pgchannels.channels import check_channel
from pgchannels.errors import (
    ChannelLayerClosed,
    DatabaseUnavailable,
    SlowConsumer,
    UnknownPosition,
)
from pgchannels.filters import Filter
from pgchannels.messages import BEGINNING, Message, Position, parse_start
from pgchannels.overflow import Overflow
from pgchannels.records import Head, LogPage
from pgchannels.subscription import Read, State, Subscription

if TYPE_CHECKING:
    from pgchannels.budget import Held
    from pgchannels.member import Member
    from pgchannels.settings import Settings

__all__ = ["Source", "Stream", "Subscriber", "filtered", "offer_to"]

logger = logging.getLogger("pgchannels.stream")


class Subscriber(Protocol):
    """Who can be registered. ``offer`` must return at once; what it raises is logged, no more."""

    def offer(self, message: Message) -> None: ...

    def missed(self, floor: int) -> None:
        """Retention has removed messages, up to this id, before they could be offered."""


def offer_to(subscribers: Iterable[Subscriber], message: Message) -> int:
    """Offer a message to each, also if some raise or unregister themselves; to how many it was."""
    # A copy, for an offer may end what is registered. All of them come from one iterator, so that
    # after an error the loop goes on with the next, and needs nothing for each of a thousand.
    each = tuple(subscribers)
    remaining = iter(each)
    while True:
        try:
            for subscriber in remaining:
                subscriber.offer(message)
        except Exception:  # a source has other subscribers, and other messages
            logger.exception(
                "a subscriber to %r failed at message %s; it goes on with the others",
                message.channel,
                message.position,
            )
        else:
            return len(each)


class Source(Protocol):
    """Where streams read: messages above the cursor are offered, the others are in the log."""

    cursor: int

    def check_open(self) -> None:
        """Raise :class:`ChannelLayerClosed` if nobody may be registered any more."""

    def register(self, channel: str, subscriber: Subscriber) -> None:
        """From now on, offer the channel's messages above :attr:`cursor`, in order."""

    def unregister(self, channel: str, subscriber: Subscriber) -> None: ...

    async def head(self) -> Head: ...

    async def position_before(self, time: datetime) -> Position:
        """How far the log had come before *time*, by its own clock; id 0 if that is not known."""
        ...

    async def replay(self, channels: tuple[str, ...], after: int) -> LogPage:
        """A page of the log: messages of *channels* with ids above *after*, oldest first."""
        ...


# Ephemeral messages that may wait; more are dropped.
_MAX_EPHEMERAL = 100
# Messages that are filtered before the event loop gets a turn: a fraction of a millisecond, if they
# are small. Many streams may be reading a long backlog at once.
_FILTERED_AT_A_TIME = 100


class Stream:
    """The messages of some channels: first what was missed, then live.

    They come in the order of the log; a channel that joins later, with a position of its own, is
    first read by itself until it has come as far as the others.

    An async context manager and, inside it, an async iterator for one task::

        async with layer.subscribe("room:1", "room:2", after=position) as messages:
            async for message in messages:
                ...

    A consumer that is slow costs a bounded buffer: when it is full, the stream goes back to reading
    the log at the consumer's pace, and nothing is lost; or it does what ``overflow=`` says. What
    has been taken from the buffer is delivered in any case: a batch, and iteration takes a batch at
    a time. While the database is away it waits. Iteration ends when the layer is closed.
    """

    def __init__(
        self,
        channels: tuple[str, ...],
        after: Position | str | None,
        *,
        since: datetime | None = None,
        filter: str | None = None,
        overflow: Overflow | str | None = None,
        source: Source,
        settings: Settings,
        streams: set[Stream],
        member: Member | None = None,
    ) -> None:
        self._initial = tuple(check_channel(channel) for channel in channels)
        self._beginning = parse_start(after, since)
        self._filter = None if filter is None else Filter.parse(filter)
        self._source = source
        self._streams = streams
        self._member = member
        self._name = None if member is None else member.name
        # Channels that are read because somebody said so, and not because of a membership.
        self._asked_for = set(self._initial)
        self._overflow = overflow = Overflow.parse(overflow)
        self._subscription = Subscription(
            max_messages=overflow.max_messages or settings.buffer_size,
            max_bytes=overflow.max_bytes or settings.buffer_bytes,
            policy=overflow.policy,
            key=None if overflow.key is None else self._key_of,
        )
        self._told_key = False
        self._wakeup: asyncio.Future[None] | None = None
        self._ephemeral: list[Message] = []
        self._held: Held | None = None
        self._ready: deque[Message] = deque()
        self._told_truncated = False
        self._entered = False
        self._closed = False
        self._error: BaseException | None = None
        self._on_end: Callable[[BaseException], None] | None = None
        self._on_owner: Callable[[str | None, str | None], None] | None = None

    @property
    def truncated(self) -> bool:
        """Retention may have removed messages that were still to come.

        It is known that the log has lost some after the position, not whether they were of these
        channels. Stays true until set to false.
        """
        return self._subscription.truncated

    @truncated.setter
    def truncated(self, value: bool) -> None:
        self._subscription.truncated = value
        self._told_truncated = False

    @property
    def state(self) -> State:
        """LIVE, or REPLAYING while messages are being read from the log; ENDED by overflow."""
        return self._subscription.state

    @property
    def dropped(self) -> int:
        """Messages lost because the consumer was too slow, since the beginning of the stream.

        Not those of channels that were left, nor ephemeral ones.
        """
        return self._subscription.dropped

    @property
    def replaced(self) -> int:
        """Messages for which a later one with the same key was given, likewise."""
        return self._subscription.replaced

    @property
    def error(self) -> BaseException | None:
        """What the stream has ended with, as soon as it has; ``batch()`` raises it.

        For who watches a consumer that may be stuck, and does not come to take anything. See also
        :meth:`on_end`.
        """
        return self._error

    def on_end(self, call: Callable[[BaseException], None]) -> None:
        """Call this with :attr:`error`, once, when the stream ends by one; at once if it has.

        It is called wherever that is found out, and must neither raise nor call the stream.
        """
        self._on_end = call
        self._tell_end()

    def on_owner(self, call: Callable[[str | None, str | None], None]) -> None:
        """Call this with user and metadata (JSON) of the member, whenever they have changed.

        It is called as soon as the change is known, also when the caller of ``update_channel()``
        was cancelled. It must neither raise nor call the stream.
        """
        self._on_owner = call

    @property
    def pending(self) -> int:
        """Messages held in memory for this stream. Bounded, whatever the consumer does."""
        return len(self._subscription) + len(self._ready) + len(self._ephemeral)

    @property
    def caught_up(self) -> int | None:
        """The id up to which there is nothing more to be had from :meth:`batch`, if it is live."""
        subscription = self._subscription
        if self._closed or self.state is not State.LIVE:
            return None
        return None if subscription.next_read() or len(subscription) else self._source.cursor

    async def __aenter__(self) -> Self:
        self._source.check_open()
        self._entered = True
        self._streams.add(self)
        member = self._member
        try:
            start = await self._start(self._beginning)
            self._add(self._initial, start)
            if member is not None:
                if member.ended is not None:
                    raise member.ended
                member.streams.add(self)
                self._add(tuple(member.inherited), start)
                for group, since in member.groups.items():
                    self.follow_group(group, since)
        except BaseException:
            self.close()
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    async def join(self, channel: str, after: Position | str | None = None) -> None:
        """Read one more channel: from *after*, or from now on if that is None.

        A channel that is read already goes on as it was, or begins again after *after*.

        Raises:
            InvalidChannel: for a bad name.
            InvalidPosition: for a text that is none, or one that this log has never reached.
            DatabaseUnavailable: if the position cannot be checked now.
            RuntimeError: outside of ``async with``.
        """
        self._check_entered()
        check_channel(channel)
        if not (after is None and self.reads(channel)):
            self._add((channel,), await self._start(parse_start(after, None)))
        self._asked_for.add(channel)

    def reads(self, channel: str) -> bool:
        """Whether *channel* is one of those that are read."""
        return channel in self._subscription

    @property
    def joined(self) -> frozenset[str]:
        """The channels that are read, but for those that the member has by what it is."""
        inherited = () if self._member is None else self._member.inherited
        return frozenset(self._subscription.channels).difference(inherited)

    def leave(self, channel: str) -> None:
        """Stop reading *channel*. Not an error if it was not read."""
        self._asked_for.discard(channel)
        self._source.unregister(channel, self)
        self._subscription.discard(channel)
        self._ephemeral = [message for message in self._ephemeral if message.channel != channel]
        self._ready = deque(message for message in self._ready if message.channel != channel)

    def follow_group(self, channel: str, since: int | None) -> None:
        """For the member: read *channel* too, after an id, or from now on. At once."""
        if not self._closed and not self.reads(channel):
            try:
                self._start_reading(channel, since)
            except ChannelLayerClosed:
                logger.debug("too late to read %r", channel)

    def unfollow_group(self, channel: str) -> None:
        """For the member: it reads *channel* no more, unless it was asked for here."""
        if channel not in self._asked_for:
            self.leave(channel)

    def owner_changed(self, user_id: str | None, metadata: str | None) -> None:
        """For the member: it has another owner."""
        if self._on_owner is not None:
            self._on_owner(user_id, metadata)

    def leave_unless_member(self, group: str) -> None:
        """Stop reading *group*, unless the member is in it."""
        if self._member is None or group not in self._member.groups:
            self.leave(group)

    async def join_group(self, group: str, after: Position | str | None = None) -> None:
        """As ``join()``, for as long as the member is one of the group's: it is about to be."""
        asked_for = group in self._asked_for
        await self.join(group, after)
        if not asked_for:
            self._asked_for.discard(group)

    async def resume(self, after: Position | str) -> None:
        """Read again, after a position, what was sent to the member's user and to everyone.

        What was sent to the member itself goes on as it was: a channel that is new has missed
        nothing. Only for a stream with a member.

        Raises:
            InvalidPosition, DatabaseUnavailable: as ``join()``.
        """
        self._check_entered()
        if self._member is None:
            raise RuntimeError("only a stream that was subscribed with member= can resume")
        start = await self._start(Position.parse(after))
        # Not the channel of direct messages: all those of others would be read for nothing.
        self._add(tuple(self._member.shared), start)

    def close(self, error: BaseException | None = None) -> None:
        """Let go of everything. A task that waits here gets *error*, or the end."""
        self._closed = True
        self._held = None
        self._error = self._error or error
        self._streams.discard(self)
        if self._member is not None:
            self._member.streams.discard(self)
        for channel in self._subscription.channels:
            self._source.unregister(channel, self)
        self._wake()
        self._tell_end()

    def offer(self, message: Message) -> None:
        """For the source: here is a message of one of the channels."""
        if self._filter is not None and not self._filter.matches(message):
            return
        if message.is_plain:
            if self._subscription.offer(message):
                self._wake()
        elif message.is_for(self._name) and (
            self._offer_ephemeral(message)
            if message.ephemeral
            else self._subscription.offer(message)
        ):
            self._wake()

    def missed(self, floor: int) -> None:
        """For the source: messages up to *floor* are gone that it had still to offer."""
        self._subscription.missed(floor)
        self._wake()

    async def batch(self) -> list[Message]:
        """Wait for messages and take all that are there, in order.

        None are there only if there is something else to tell: look at :attr:`truncated`. They are
        this reader's own: no other one sees what is done to their data.

        Raises:
            ChannelLayerClosed: when the stream or its layer has been closed.
            SlowConsumer: the policy is "disconnect", and more messages were waiting than may. The
                last position is good to resume from.
            UnknownPosition: the log has been rewritten (a backup restored, say) and no longer
                holds what has been read. Load the state anew.
            TooManyConnections: the member that it reads as has lost its place: its node had been
                declared dead, and by the time that it was back others had taken the places.
            DatabaseError: the log cannot be read, for another reason than that it is away.
            RuntimeError: outside of ``async with``, or while another task waits here.
        """
        return [message.own() for message in await self.shared_batch()]

    async def shared_batch(self) -> list[Message]:
        """As :meth:`batch`, of messages that other readers of the process have too.

        For readers that pass them on as they are, or make :meth:`~pgchannels.Message.own` of them.
        """
        self._check_entered()
        if self._wakeup is not None:
            raise RuntimeError("another task is waiting on this stream; each needs one of its own")
        self._held = None  # it has come back for more
        subscription = self._subscription
        while not self._closed:
            read = subscription.next_read()
            if read is not None:
                await self._replay(read)
            messages = subscription.take()
            if self._ephemeral:
                messages += self._ephemeral
                self._ephemeral.clear()
            if messages or (subscription.truncated and not self._told_truncated):
                self._told_truncated = subscription.truncated
                return messages
            if subscription.next_read() is None and not self._closed:
                self._wakeup = asyncio.get_running_loop().create_future()
                try:
                    await self._wakeup
                finally:
                    self._wakeup = None
        raise self._error or ChannelLayerClosed("the stream has been closed")

    def __aiter__(self) -> AsyncIterator[Message]:
        return self

    async def __anext__(self) -> Message:
        while not self._ready:
            try:
                messages = await self.batch()
            except ChannelLayerClosed:
                raise StopAsyncIteration from None
            # Not before: leave() puts another deque there, also while this task waits.
            self._ready.extend(messages)
        return self._ready.popleft()

    def _check_entered(self) -> None:
        if not self._entered:
            raise RuntimeError("enter the stream first: async with layer.subscribe(…) as messages")

    def _check_open(self) -> None:
        if self._closed:
            raise ChannelLayerClosed("the stream has been closed")

    def _add(self, channels: tuple[str, ...], start: int | None) -> None:
        self._check_open()
        for channel in channels:
            self._start_reading(channel, start)

    def _start_reading(self, channel: str, after: int | None) -> None:
        # In this order: nothing may come between what the source offers and what the log holds.
        self._source.register(channel, self)
        self._subscription.add(channel, after, self._source.cursor)
        self._wake()

    def _key_of(self, message: Message) -> Hashable:
        """The key by which a later message replaces this one; None if nothing is to."""
        assert self._overflow.key is not None
        try:
            key = self._overflow.key(message)
            hash(key)
        except Exception:  # the source has other subscribers, too
            if not self._told_key:
                self._told_key = True
                logger.warning("no key for %r, which is not replaced", message, exc_info=True)
            return None
        return key

    def _offer_ephemeral(self, message: Message) -> bool:
        """Take what is for those who are there: live, and not behind."""
        if self.state is not State.LIVE or len(self._ephemeral) >= _MAX_EPHEMERAL:
            return False
        if not self.reads(message.channel):
            return False
        self._ephemeral.append(message)
        return True

    async def _start(self, beginning: Position | datetime | None) -> int | None:
        """The id after which to begin; None for from now on."""
        if beginning is None:
            return None
        # First, whether or not the source of a layer that is closed still answers.
        self._check_open()
        if isinstance(beginning, datetime):
            return (await self._source.position_before(beginning)).id
        if beginning == BEGINNING:
            return -1
        head = await self._source.head()
        if beginning.epoch != head.epoch or beginning.id > head.id:
            raise UnknownPosition(beginning)
        return beginning.id

    async def _replay(self, read: Read) -> None:
        backoff = Backoff()
        while True:
            try:
                page = await self._source.replay(read.channels, read.after)
            except (DatabaseUnavailable, ChannelLayerClosed) as error:
                if self._closed:
                    return
                delay = backoff.next()
                logger.info("cannot replay, retry in %.1f s: %s", delay, error)
                await asyncio.sleep(delay)
            else:
                messages = [message for message in page.messages if message.is_for(self._name)]
                if self._filter is not None:
                    messages = await filtered(messages, self._filter)
                self._held = page.held
                self._subscription.page(
                    read,
                    messages,
                    upto=page.upto,
                    floor=page.head.floor,
                    hub_cursor=self._source.cursor,
                )
                return

    def _wake(self) -> None:
        if self._subscription.state is State.ENDED and not self._closed:
            # Not close(): the source is going through its subscribers, and this is one of them.
            self._error = SlowConsumer(self._subscription.dropped + len(self._ephemeral))
            self._ephemeral.clear()
            self._closed = True
            self._tell_end()
        if self._wakeup is not None and not self._wakeup.done():
            self._wakeup.set_result(None)

    def _tell_end(self) -> None:
        if self._error is not None and self._on_end is not None:
            call, self._on_end = self._on_end, None
            call(self._error)


async def filtered(messages: Sequence[Message], wanted: Filter) -> list[Message]:
    """Those that are wanted of a page of the log. Others get their turn in between."""
    found: list[Message] = []
    for start in range(0, len(messages), _FILTERED_AT_A_TIME):
        if start:
            await asyncio.sleep(0)
        some = messages[start : start + _FILTERED_AT_A_TIME]
        found += [message for message in some if wanted.matches(message)]
    return found
