"""A channel layer in one process: for tests, for trying out, for an application of one process.

It keeps the whole contract of :class:`~pgchannels.layer.ChannelLayer`, and nothing beyond the end
of the process. Layers that are given one :class:`MemoryLog` are as nodes on one database. It is
quicker than the contract: what has been sent can be read at once.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

from pgchannels.channels import check_channel, new_name
from pgchannels.errors import ChannelLayerClosed, InvalidChannel
from pgchannels.follower import Follower
from pgchannels.layer import (
    ChannelLayer,
    check_limits,
    check_owner,
    check_timeout,
    encode_metadata,
)
from pgchannels.limits import Limits
from pgchannels.member import Member
from pgchannels.memory_follower import MemoryFollower, statuses
from pgchannels.memory_log import Channel, MemoryLog
from pgchannels.messages import Message, Position
from pgchannels.overflow import Overflow
from pgchannels.payloads import DEFAULT, Serializer
from pgchannels.rates import Admission, Rate
from pgchannels.records import (
    ConnectionInfo,
    FollowerStatus,
    Head,
    LogPage,
    Outgoing,
    PresenceBy,
    Present,
    Receipt,
)
from pgchannels.settings import Settings
from pgchannels.stream import Source, Stream, Subscriber, offer_to
from pgchannels.waiting import belongs_here

__all__ = ["MemoryLayer", "MemoryLog"]

logger = logging.getLogger("pgchannels.layer")

# Seconds between two looks at a departure that should be due, and by the clock is not yet.
_MIN_DELAY = 0.01


class MemoryLayer(ChannelLayer):
    """A channel layer without a database.

    Args:
        settings: those that are about databases, connections and polling mean nothing here.
        serializer: layers that share a log should have the same.
        log: to be shared with other layers of the same event loop; None for one of its own.
        clock: tells the time to a log of its own; see :class:`MemoryLog`.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        serializer: Serializer = DEFAULT,
        log: MemoryLog | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        super().__init__(settings, serializer=serializer)
        self.log = log or MemoryLog(clock=clock)
        self._node: _Node | None = None

    async def open(self) -> None:
        self._check_loop()
        if self._node is None:
            self._node = _Node(self.log, self.settings)

    async def close(self) -> None:
        self._check_loop()
        self._entered = 0
        node, self._node = self._node, None
        if node is not None:
            node.close()

    def _check_loop(self) -> None:
        """Refuse another loop's node, and forget one whose loop has ended."""
        if self._node is not None and not belongs_here(self._node.loop):
            logger.warning("the layer was left open in an event loop that has ended")
            self._node.abandon()
            self._node = None
            self._entered = 0

    def kill(self) -> None:
        """Be gone as a killed process is: at once, and without a word to anyone.

        Its channels, memberships and durable readers stay until ``lease_time`` has passed by the
        log's clock, and :meth:`MemoryLog.prune` is called. For tests.
        """
        node, self._node = self._node, None
        if node is not None:
            node.kill()

    async def receive(self, channel: str, *, timeout: float | None = None) -> Message:
        name, timeout = check_channel(channel), check_timeout(timeout)
        node = self._opened
        # Nothing else here may wait, and a loop that polls must let others have their turn.
        await asyncio.sleep(0)
        if timeout is not None and timeout <= 0:
            message = node.take(name)
            if message is None:
                raise TimeoutError
            return message
        async with asyncio.timeout(timeout):
            # Nothing between a message's being taken and its being returned can be cancelled.
            while (message := node.take(name)) is None:
                await node.wait(name)
            return message

    def subscribe(
        self,
        *channels: str,
        after: Position | str | None = None,
        since: datetime | None = None,
        filter: str | None = None,
        member: str | None = None,
        overflow: Overflow | str | None = None,
    ) -> Stream:
        node = self._opened
        return Stream(
            channels,
            after,
            since=since,
            filter=filter,
            overflow=overflow,
            source=node,
            settings=self.settings,
            streams=node.streams,
            member=None if member is None else node.member(member),
        )

    def follow(self, *channels: str, name: str, after: Position | str | None = None) -> Follower:
        node = self._opened
        if not channels:
            raise InvalidChannel((), "follow() takes one channel at least")
        return MemoryFollower(
            tuple(dict.fromkeys(check_channel(channel) for channel in channels)),
            check_channel(name),
            None if after is None else Position.parse(after),
            log=self.log,
            source=node,
            node=node.id,
            settings=self.settings,
            followers=node.followers,
        )

    async def followers(self) -> list[FollowerStatus]:
        self._opened.check_open()
        return statuses(self.log)

    async def forget_follower(self, name: str) -> bool:
        self._opened.check_open()
        forgotten = self.log.readers.pop(check_channel(name), None) is not None
        self.log.release(name)
        return forgotten

    async def new_channel(
        self,
        prefix: str = "channel",
        *,
        user_id: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        limits: Limits | None = None,
    ) -> str:
        node = self._opened
        member = Member(new_name(prefix, node.id), check_owner(user_id), encode_metadata(metadata))
        self.log.add_channel(
            member.name,
            node.id,
            user_id=member.user_id,
            metadata=member.metadata,
            limits=check_limits(limits),
        )
        node.members[member.name] = member
        return member.name

    async def update_channel(
        self,
        channel: str,
        *,
        user_id: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        limits: Limits | None = None,
    ) -> None:
        member = self._opened.member(check_channel(channel))
        user, text = check_owner(user_id), encode_metadata(metadata)
        self.log.update_channel(channel, user, text, check_limits(limits))
        member.update(user, text)

    async def delete_channel(self, channel: str) -> None:
        node = self._opened
        if check_channel(channel) in node.members:
            self.log.remove_channel(channel, node.grace)
            del node.members[channel]
            node.end_receiving(channel)

    async def group_members(self, group: str) -> list[str]:
        self._opened.check_open()
        self.log.advance()
        return sorted(self.log.members.channels(check_channel(group)))

    async def presence(self, group: str) -> list[Present]:
        self._opened.check_open()
        self.log.advance()
        return self.log.members.present(check_channel(group))

    async def _publish(self, message: Outgoing) -> Receipt:
        node = self._opened
        # A loop that sends must let others have their turn.
        await asyncio.sleep(0)
        node.check_alive()
        return self.log.publish(message, self.settings, self.serializer)

    async def _publish_ephemeral(self, message: Outgoing) -> None:
        node = self._opened
        await asyncio.sleep(0)
        node.check_alive()
        self.log.tell_live(message, self.serializer)

    async def _read_history(
        self, channel: str, *, after: int, before: int, newest_first: bool, limit: int
    ) -> LogPage:
        self._opened.check_open()
        # A loop that reads must let others have their turn.
        await asyncio.sleep(0)
        return self.log.read(
            [channel],
            after,
            before=before,
            newest_first=newest_first,
            limit=limit,
            settings=self.settings,
        )

    async def _position_before(self, time: datetime) -> Position:
        return await self._opened.position_before(time)

    async def _change_membership(
        self,
        group: str,
        channel: str,
        *,
        adding: bool,
        presence: PresenceBy | None,
        limit: int | None = None,
    ) -> None:
        node = self._opened
        if adding:
            expiry = timedelta(seconds=self.settings.group_expiry)
            self.log.add(group, channel, presence=presence, limit=limit, expiry=expiry)
        else:
            self.log.discard(group, channel, node.grace)

    async def _connections(
        self, user_id: str | None, after: str | None, limit: int
    ) -> list[ConnectionInfo]:
        self._opened.check_open()
        found = self.log.connections(user_id)
        names = sorted(name for name in found if after is None or name > after)
        return [self._info(name, found[name]) for name in names[:limit]]

    def _info(self, name: str, channel: Channel) -> ConnectionInfo:
        assert channel.node is not None
        assert channel.connected_at is not None
        return ConnectionInfo(
            channel=name,
            node=channel.node,
            host=socket.gethostname(),
            user_id=channel.user_id,
            metadata=self.serializer.loads(channel.metadata) if channel.metadata else None,
            connected_at=channel.connected_at,
        )

    async def _count_connections(self, user_id: str | None) -> int:
        self._opened.check_open()
        return len(self.log.connections(user_id))

    async def _revoke(
        self, revoked: list[tuple[str, str]], keep: timedelta, commands: list[Outgoing]
    ) -> None:
        self._opened.check_open()
        for kind, value in revoked:
            self.log.revoke(kind, value, keep)
        for command in commands:
            await self._publish(command)

    async def _is_revoked(self, values: Mapping[str, str], issued_at: datetime | None) -> bool:
        self._opened.check_open()
        for kind, value in values.items():
            revoked_at = self.log.revoked_at(kind, value)
            if revoked_at is not None and (
                kind == "token" or issued_at is None or issued_at <= revoked_at
            ):
                return True
        return False

    async def _take(self, key: str, rate: Rate, cost: int) -> Admission:
        self._opened.check_open()
        # A loop that takes must let others have their turn.
        await asyncio.sleep(0)
        return self.log.take_rate(key, rate, cost)

    @property
    def _source(self) -> Source:
        return self._opened

    @property
    def _opened(self) -> _Node:
        if self._node is None:
            raise ChannelLayerClosed("the channel layer is not open: use 'async with layer:'")
        if not belongs_here(self._node.loop):
            raise ChannelLayerClosed("the channel layer is not open: use 'async with layer:'")
        return self._node


class _Node:
    """What a layer has while it is open, and where its streams read."""

    def __init__(self, log: MemoryLog, settings: Settings) -> None:
        self.id = uuid4()
        self.loop = asyncio.get_running_loop()
        self.grace = timedelta(seconds=settings.presence_grace)
        self.cursor = log.head_id
        self.members: dict[str, Member] = {}
        self.streams: set[Stream] = set()
        self.followers: set[MemoryFollower] = set()
        self._log = log
        self._settings = settings
        self._index: dict[str, dict[Subscriber, None]] = {}
        # Who waits for which channel; for none any more, if that has been deleted.
        self._receiving: dict[asyncio.Future[None], str | None] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._closed = self._dead = False
        log.nodes[self.id] = self
        log.retention = settings.retention
        self.watch_departures()

    def close(self) -> None:
        self._end()
        for name in self.members:
            self._log.remove_channel(name, self.grace)
        for name, reader in self._log.readers.items():
            if reader.node == self.id:
                self._log.release(name)
        self._stop_timer()
        del self._log.nodes[self.id]

    def abandon(self) -> None:
        """Leave the log as a killed process does; nothing that waited is there any more."""
        self._dead = self._closed = True
        self._log.died(self.id, timedelta(seconds=self._settings.lease_time))

    def kill(self) -> None:
        self._dead = True
        self._stop_timer()
        self._log.died(self.id, timedelta(seconds=self._settings.lease_time))
        self._end()

    def _end(self) -> None:
        self._closed = True
        for stream in list(self.streams):
            stream.close(_closed())
        for follower in list(self.followers):
            follower.end()
        woken = [name for future, name in self._receiving.items() if name and future.done()]
        for future in self._receiving:
            if not future.done():
                future.set_result(None)
        for name in woken:
            self._log.wake(name)  # what it was woken for is another node's to take

    def check_open(self) -> None:
        if self._closed:
            raise _closed()

    def check_alive(self) -> None:
        """What was begun before the layer was closed is finished; but not by the dead."""
        if self._dead:
            raise _closed()

    def member(self, name: str) -> Member:
        """A channel that this layer has made."""
        member = self.members.get(name)
        if member is None:
            raise InvalidChannel(name, "it is not a channel that this layer has made")
        return member

    # Receiving

    def take(self, name: str) -> Message | None:
        self.check_open()
        return self._log.take(name)

    async def wait(self, name: str) -> None:
        """Wait until it is worth trying to take something."""
        future = self.loop.create_future()
        self._receiving[future] = name
        self._log.wait(name, future)
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self._log.wake(name)  # what it was woken for is another's to take
            raise
        finally:
            waited_for = self._receiving.pop(future)
            self._log.stop_waiting(name, future)
        if waited_for is None:
            raise InvalidChannel(name, "it has been deleted")

    def end_receiving(self, name: str) -> None:
        """The channel has been deleted: who waits for it here waits in vain."""
        for future, waited_for in self._receiving.items():
            if waited_for == name:
                self._receiving[future] = None
                # Or it has been woken already, for a message that is gone with the channel.
                if not future.done():
                    future.set_result(None)

    # For streams

    def register(self, channel: str, subscriber: Subscriber) -> None:
        self.check_open()
        self._index.setdefault(channel, {})[subscriber] = None

    def unregister(self, channel: str, subscriber: Subscriber) -> None:
        with suppress(KeyError):
            del self._index[channel][subscriber]
            if not self._index[channel]:
                del self._index[channel]

    async def head(self) -> Head:
        return self._log.head

    async def position_before(self, time: datetime) -> Position:
        return self._log.position_before(time)

    async def replay(self, channels: tuple[str, ...], after: int) -> LogPage:
        # Who reads a long backlog must let others have their turn.
        await asyncio.sleep(0)
        return self._log.read(channels, after, settings=self._settings)

    # For the log

    def hand_out(self, message: Message) -> None:
        recipients = message.recipients
        for name in (message.channel,) if recipients is None else recipients:
            offer_to(self._index.get(name, ()), message)
        self.cursor = message.id

    def reader_free(self, name: str) -> None:
        for follower in self.followers:
            if follower.name == name:
                follower.look()

    def watch_departures(self) -> None:
        due = self._log.members.next_departure
        if due is not None and self._timer is None:
            delay = (due - self._log.clock()).total_seconds()
            self._timer = self.loop.call_later(max(delay, _MIN_DELAY), self._settle)

    def _settle(self) -> None:
        self._timer = None
        self._log.advance()
        self.watch_departures()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _closed() -> ChannelLayerClosed:
    return ChannelLayerClosed("the channel layer has been closed")
