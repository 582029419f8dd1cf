"""What memory layers share: the messages, and who has had which.

All of it happens at once, in the one event loop of the layers, so that nothing needs a lock. Time
passes when somebody looks: what is over by then is removed before anything else.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from heapq import heappop, heappush, merge
from itertools import count
from operator import itemgetter
from typing import Literal, Protocol
from uuid import UUID

from pgchannels.channels import DIRECT, is_connection
from pgchannels.errors import ChannelFull, GroupFull, TooManyConnections
from pgchannels.limits import Limits
from pgchannels.member import Member
from pgchannels.memory_members import Members
from pgchannels.messages import Message, Position
from pgchannels.payloads import DEFAULT, Serializer
from pgchannels.rates import Admission, Limiter, Rate
from pgchannels.records import Head, LogPage, Outgoing, PresenceBy, Receipt
from pgchannels.settings import Settings

__all__ = ["Channel", "MemoryLog", "Node", "Reader"]

EPOCH = 1
_MAX_ID = 2**63 - 1


class Node(Protocol):
    """An open layer, as the log knows it."""

    members: dict[str, Member]

    def hand_out(self, message: Message) -> None:
        """Offer a message to those who read here."""

    def reader_free(self, name: str) -> None:
        """The durable reader *name* has nobody who reads for it."""

    def watch_departures(self) -> None:
        """Somebody will have left in a moment."""


@dataclass
class Channel:
    """A channel that is received from, or that of a connection."""

    cursor: int
    """What receivers have taken, or passed by: ids up to here."""
    used_at: datetime
    node: UUID | None = None
    user_id: str | None = None
    metadata: str | None = None
    is_received: bool = False
    """Whether somebody has received from it; a connection's may only be read."""
    connected_at: datetime | None = None
    """When it was given its place; None if it is no connection."""


@dataclass
class Reader:
    """A durable reader."""

    channels: tuple[str, ...]
    position: int
    moved_at: datetime
    holder: object | None = None
    """Who has taken it over last."""
    node: UUID | None = None
    """By whose lease somebody reads now."""


@dataclass(order=True)
class _Due:
    at: datetime
    number: int
    action: Callable[[], object] = field(compare=False)


class MemoryLog:
    """The storage of memory layers: those that share one are as nodes on one database.

    Args:
        clock: tells the time, with time zone. Everything that lasts, lasts by this clock, but the
            waiting of ``receive(timeout=…)``.
    """

    def __init__(self, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self.clock = clock
        self.nodes: dict[UUID, Node] = {}
        self.readers: dict[str, Reader] = {}
        self.members = Members(clock, self._tell)
        self.retention: timedelta | None = None
        """That of the layer that was opened last."""
        self.head_id = 0
        self._floor = 0
        self._floor_at: datetime | None = None
        self._messages: dict[int, Message] = {}
        self._ages: deque[tuple[datetime, int]] = deque()
        self._ids: dict[str, list[int]] = {}
        self._keys: dict[tuple[str, str], Receipt] = {}
        self._channels: dict[str, Channel] = {}
        self._waiting: dict[str, dict[asyncio.Future[None], None]] = {}
        self._dead: dict[UUID, datetime] = {}
        self._revoked: dict[tuple[str, str], tuple[datetime, datetime]] = {}
        self._rates: dict[Rate, Limiter] = {}
        self._agenda: list[_Due] = []
        self._number = count()

    @property
    def head(self) -> Head:
        return Head(self.head_id, EPOCH, self._floor)

    # Time

    def prune(self) -> None:
        """Remove now what is over by the clock, killed layers too whose leases have run out."""
        now = self.advance()
        self._revoked = {of: times for of, times in self._revoked.items() if times[1] > now}
        for node in [node for node, due in self._dead.items() if due <= now]:
            del self._dead[node]
            for name in [name for name, each in self._channels.items() if each.node == node]:
                # The lease was time enough to come back in.
                self.remove_channel(name, timedelta(0))
            for name, reader in self.readers.items():
                if reader.node == node:
                    self.release(name)

    def advance(self) -> datetime:
        """Let happen what is due by now, but for what takes a node's death."""
        now = self.clock()
        while self._agenda and self._agenda[0].at <= now:
            heappop(self._agenda).action()
        while (
            self._ages and self.retention is not None and now - self._ages[0][0] >= self.retention
        ):
            self._floor_at, self._floor = self._ages.popleft()
            self._drop(self._floor)
        self.members.settle()
        return now

    def died(self, node: UUID, lease: timedelta) -> None:
        """A node is no more, and has not said so."""
        self.nodes.pop(node, None)
        self._dead[node] = self.clock() + lease

    def _later(self, delay: timedelta, action: Callable[[], object]) -> None:
        heappush(self._agenda, _Due(self.clock() + delay, next(self._number), action))

    # Messages

    def publish(
        self, outgoing: Outgoing, settings: Settings, serializer: Serializer = DEFAULT
    ) -> Receipt:
        """Add a message.

        Raises:
            ChannelFull: too many wait already.
        """
        self.advance()
        key = None if outgoing.key is None else (outgoing.channel, outgoing.key)
        if key is not None and key in self._keys:
            return self._keys[key]._replace(repeated=True)
        self._check_capacity(outgoing.channel, settings.capacity)
        receipt = Receipt(self._append(outgoing, serializer).created_at)
        if key is not None:
            self._keys[key] = receipt
            self._later(settings.key_lifetime, lambda: self._keys.pop(key, None))
        return receipt

    def tell_live(self, outgoing: Outgoing, serializer: Serializer) -> None:
        """Hand a message to those who are there, and keep nothing of it."""
        message = self._message(self.head_id, outgoing, serializer, ephemeral=True)
        for node in list(self.nodes.values()):
            node.hand_out(message)

    def read(
        self,
        channels: Iterable[str],
        after: int,
        *,
        settings: Settings,
        before: int = _MAX_ID,
        newest_first: bool = False,
        limit: int | None = None,
    ) -> LogPage:
        """The messages of some channels between two ids, as many as fit a page."""
        self.advance()
        limit = settings.page_size if limit is None else limit
        found: list[Message] = []
        size = 0
        for id in self._between(set(channels), after, before, newest_first, limit):
            if len(found) == limit or size >= settings.page_bytes:
                return LogPage(found, self.head, full=True)
            found.append(self._messages[id].own())
            size += found[-1].size
        return LogPage(found, self.head, full=len(found) == limit)

    def position_before(self, time: datetime) -> Position:
        """The last message from before *time*; id 0 if none is known."""
        self.advance()
        place = bisect_left(self._ages, time, key=itemgetter(0))
        if place:
            return Position(EPOCH, self._ages[place - 1][1])
        is_known = self._floor_at is not None and self._floor_at < time
        return Position(EPOCH, self._floor if is_known else 0)

    def count(self, channels: Iterable[str], after: int) -> int:
        """How many messages there are of some channels after an id."""
        ids = (self._ids.get(channel, []) for channel in channels)
        return sum(len(each) - bisect_right(each, after) for each in ids)

    def _between(
        self, channels: set[str], after: int, before: int, newest_first: bool, limit: int
    ) -> Iterable[int]:
        pages = []
        for ids in (self._ids[channel] for channel in channels if channel in self._ids):
            low, high = bisect_right(ids, after), bisect_right(ids, before - 1)
            if newest_first:
                pages.append(ids[max(low, high - limit) : high][::-1])
            else:
                pages.append(ids[low : min(high, low + limit)])
        return merge(*pages, reverse=newest_first)

    def _append(self, outgoing: Outgoing, serializer: Serializer = DEFAULT) -> Message:
        self.head_id += 1
        message = self._message(self.head_id, outgoing, serializer)
        self._messages[message.id] = message
        self._ages.append((message.created_at, message.id))
        self._ids.setdefault(message.channel, []).append(message.id)
        if outgoing.ttl is not None:
            self._later(outgoing.ttl, lambda: self._drop(message.id))
        for node in list(self.nodes.values()):
            node.hand_out(message)
        everybody = (message.channel, *self.members.channels(message.channel))
        recipients = message.recipients
        for name in everybody if recipients is None else recipients:
            self.wake(name)
        return message

    def _message(
        self, id: int, outgoing: Outgoing, serializer: Serializer, *, ephemeral: bool = False
    ) -> Message:
        return Message(
            id,
            outgoing.channel,
            outgoing.payload,
            self.clock(),
            _size(outgoing),
            EPOCH,
            outgoing.headers,
            outgoing.attachments,
            serializer=serializer,
            ephemeral=ephemeral,
        )

    def _drop(self, id: int) -> None:
        message = self._messages.pop(id, None)
        if message is None:
            return
        ids = self._ids[message.channel]
        del ids[bisect_right(ids, id) - 1]
        if not ids:
            del self._ids[message.channel]

    def _tell(self, channel: str, payload: str) -> None:
        self._append(Outgoing(channel, payload))

    # Receivers

    def take(self, name: str) -> Message | None:
        """The next message for the receivers of a channel, which is then no other's."""
        now = self.advance()
        # A connection's channel that is gone is not made again: it would begin anew.
        channel = self._channels.get(name)
        if channel is None:
            if is_connection(name):
                return None
            channel = self._channels[name] = Channel(0, now)
        channel.used_at = now
        channel.is_received = True
        starts = {
            member.group: max(channel.cursor, member.since) for member in self.members.of(name)
        }
        starts[name] = channel.cursor
        if is_connection(name):
            starts[DIRECT] = channel.cursor
        pages = (_after(self._ids.get(each, []), start) for each, start in starts.items())
        for id in merge(*pages):
            channel.cursor = id
            if self._messages[id].is_for(name):
                return self._messages[id].own()
        channel.cursor = self.head_id
        return None

    def wait(self, name: str, future: asyncio.Future[None]) -> None:
        """Resolve *future* when :meth:`take` may give something."""
        self._waiting.setdefault(name, {})[future] = None

    def wake(self, name: str) -> None:
        """Let one of those who wait try again."""
        for future in self._waiting.get(name, ()):
            if not future.done():
                future.set_result(None)
                return

    def stop_waiting(self, name: str, future: asyncio.Future[None]) -> None:
        waiting = self._waiting[name]
        del waiting[future]
        if not waiting:
            del self._waiting[name]

    def _check_capacity(self, name: str, capacity: int | None) -> None:
        channel = self._channels.get(name)
        if capacity is None or channel is None or not channel.is_received:
            return
        if self.count([name], channel.cursor) >= capacity:
            raise ChannelFull(name, capacity)

    # Channels and groups

    def add_channel(
        self,
        name: str,
        node: UUID,
        *,
        user_id: str | None,
        metadata: str | None,
        limits: Limits | None,
    ) -> None:
        """Make a channel of a node's. Its receivers begin with what is sent from now on.

        Raises:
            TooManyConnections: there is no place for it.
        """
        channel = Channel(self.head_id, self.advance(), node, user_id, metadata)
        self._admit(channel, user_id, limits)
        self._channels[name] = channel

    def update_channel(
        self, name: str, user_id: str | None, metadata: str | None, limits: Limits | None
    ) -> None:
        """Set whose it is.

        Raises:
            TooManyConnections: the user has too many.
        """
        channel = self._channels[name]
        self._admit(channel, user_id, limits)
        channel.user_id, channel.metadata = user_id, metadata

    def connections(self, user_id: str | None) -> dict[str, Channel]:
        """The channels that are connections, or those of a user."""
        self.advance()
        return {
            name: channel
            for name, channel in self._channels.items()
            if channel.connected_at is not None and user_id in (None, channel.user_id)
        }

    def _admit(self, channel: Channel, user_id: str | None, limits: Limits | None) -> None:
        """Give a channel its place as a user's connection."""
        if limits is None:
            return
        has_place = channel.connected_at is not None
        is_users_already = user_id is None or (has_place and channel.user_id == user_id)
        if not is_users_already:
            self._check_room("user", limits.per_user, lambda other: other.user_id == user_id)
        if has_place:
            return
        self._check_room("node", limits.per_node, lambda other: other.node == channel.node)
        self._check_room("total", limits.total, lambda other: True)
        channel.connected_at = self.clock()

    def _check_room(
        self,
        scope: Literal["user", "node", "total"],
        limit: int | None,
        counts: Callable[[Channel], bool],
    ) -> None:
        # Not counted where there is no limit: each connection would be a walk over all.
        if limit is not None:
            others = (c for c in self._channels.values() if c.connected_at is not None)
            if sum(map(counts, others)) >= limit:
                raise TooManyConnections(scope, limit)

    def remove_channel(self, name: str, grace: timedelta) -> None:
        """Remove a channel and its memberships."""
        for member in list(self.members.of(name)):
            self.discard(member.group, name, grace)
        self._channels.pop(name, None)

    def add(
        self,
        group: str,
        name: str,
        *,
        presence: PresenceBy | None,
        limit: int | None,
        expiry: timedelta,
    ) -> None:
        """Make a channel a member of a group; that of a connection that is gone is left out.

        Raises:
            GroupFull: it has as many members as it may have.
        """
        now = self.advance()
        channel = self._channels.get(name)
        if channel is None and is_connection(name):
            return
        channel = channel or Channel(0, now)
        is_new = self.members.get(group, name) is None
        if is_new and limit is not None and len(self.members.channels(group)) >= limit:
            raise GroupFull(group, limit)
        member = self.members.add(
            group,
            name,
            self.head_id,
            presence=presence,
            user_id=channel.user_id,
            metadata=channel.metadata,
        )
        known = self._member(name)
        if known is not None:
            known.joined(group, member.since, member.presence)
        elif is_new and expiry and channel.node is None:
            self._later(expiry, lambda: self._expire(group, name, expiry))

    def discard(self, group: str, name: str, grace: timedelta) -> None:
        """End a membership. Who was counted as a user leaves after *grace*."""
        self.advance()
        known = self._member(name)
        if self.members.remove(group, name, grace) and known is not None:
            known.left(group)
        if self.members.next_departure is not None:
            for node in self.nodes.values():
                node.watch_departures()

    # Revocations and rates

    def revoke(self, kind: str, value: str, keep: timedelta) -> None:
        """Remember that the tokens of a user, or a token, are no good that were issued by now."""
        now = self.advance()
        _, kept = self._revoked.get((kind, value), (now, now))
        self._revoked[kind, value] = now, max(kept, now + keep)

    def revoked_at(self, kind: str, value: str) -> datetime | None:
        """When that was, if it is remembered."""
        revoked_at, until = self._revoked.get((kind, value), (None, self.advance()))
        return revoked_at if until > self.clock() else None

    def take_rate(self, key: str, rate: Rate, cost: int) -> Admission:
        """Take from what a rate admits to a key."""
        now = self.clock()
        if rate not in self._rates:
            self._rates[rate] = Limiter(rate)
        return self._rates[rate].take(key, round(now.timestamp() * 1e9), cost)

    def _member(self, name: str) -> Member | None:
        channel = self._channels.get(name)
        if channel is None or channel.node is None or channel.node not in self.nodes:
            return None
        return self.nodes[channel.node].members.get(name)

    def _expire(self, group: str, name: str, expiry: timedelta) -> None:
        """End the membership of an ordinary channel that is not in use; look again if it is."""
        member = self.members.get(group, name)
        if member is None:
            return
        now = self.clock()
        channel = self._channels.get(name)
        used_at = max(member.renewed_at, channel.used_at if channel else member.renewed_at)
        if name in self._waiting:
            used_at = now
        if used_at + expiry <= now:
            self.members.remove(group, name, timedelta(0))
        else:
            self._later(used_at + expiry - now, lambda: self._expire(group, name, expiry))

    # Durable readers

    def release(self, name: str) -> None:
        """Nobody reads for *name* any more; one of those who wait may."""
        reader = self.readers.get(name)
        if reader is not None:
            reader.node = None
        for node in list(self.nodes.values()):
            node.reader_free(name)


def _after(ids: list[int], start: int) -> Iterator[int]:
    """Those above *start*, one by one: there may be many, and mostly only the first counts."""
    for place in range(bisect_right(ids, start), len(ids)):
        yield ids[place]


def _size(outgoing: Outgoing) -> int:
    size = len(outgoing.payload.encode()) + sum(map(len, outgoing.attachments))
    return size if outgoing.headers is None else size + len(outgoing.headers.encode())
