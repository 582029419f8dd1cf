"""This node's lease, the channels that live by it, and memberships.

A node renews one row; none of its connections has a heartbeat in the database. When a lease has run
out, any other node removes what lived by it, and tells who has left.

Joins and leaves of many connections go into set-based statements, in the order in which they were
asked for. Changes to memberships of another node's channels, and of ordinary ones, are published in
the log, by a message that names the channels: a node that has one of them looks at its groups.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar
from uuid import UUID, uuid4

import orjson

from pgchannels.backoff import Backoff
from pgchannels.channels import MEMBERS, new_name
from pgchannels.coalesce import Coalescer
from pgchannels.errors import (
    ChannelLayerClosed,
    DatabaseError,
    DatabaseUnavailable,
    GroupFull,
    InvalidChannel,
    InvalidUser,
    PGChannelsError,
    TooManyConnections,
)
from pgchannels.limits import Limits
from pgchannels.member import Member
from pgchannels.waiting import set_within

if TYPE_CHECKING:
    from pgchannels.hub import Hub
    from pgchannels.messages import Message
    from pgchannels.receivers import Receivers
    from pgchannels.records import PresenceBy
    from pgchannels.settings import Settings
    from pgchannels.store import Session, Store

__all__ = ["Members"]

logger = logging.getLogger("pgchannels.members")

T = TypeVar("T")

# Requests that one transaction serves, and channels that one removes.
_AT_A_TIME = 2000
# Seconds that close() leaves for taking leave.
_CLOSING_TIME = 2.0
# Seconds that an ephemeral message stays where nodes can read it.
_EPHEMERAL_TIME = timedelta(seconds=10)
# Each round of work looks at what has become due within this time; one in so many, at all.
_RECENT = timedelta(minutes=5)
_ROUNDS = 100
# The lease is renewed so many times before it runs out, or every heartbeat.
_RENEWALS = 5

# Bytes of a message that names channels: more than those of one transaction take.
_MAX_NEWS = 1 << 20

_CHECK_VIOLATION = "23514"


class _Add(NamedTuple):
    """A channel of this node, new or changed."""

    channel: str
    user_id: str | None
    metadata: str | None
    limits: Limits | None
    """Limits under which it gets its place; None to leave those of a known channel as they are."""
    is_connection: bool
    """Whether it needs a place."""


class _Restore(NamedTuple):
    """A channel of this node, as it is known here when its turn comes."""

    channel: str


class _Change(NamedTuple):
    """A membership to begin or to end."""

    group: str
    channel: str
    adding: bool
    presence: PresenceBy | None
    since: int
    """Messages after this are the member's at the latest: the database counts from a later one."""
    limit: int | None
    """How many members the group may have then."""


class _Remove(NamedTuple):
    """A channel of this node's that is no more."""

    channel: str


_Request: TypeAlias = _Add | _Restore | _Change | _Remove

# Why one of them was refused.
_Refusals: TypeAlias = dict[_Request, PGChannelsError]


class Members:
    """``run()`` renews the lease and removes what lived by others'; cancelling it ends it.

    Args:
        settings: how long a lease is, how often it is renewed.
        session: for the lease, on a connection of its own.
        store: for memberships.
        hub: tells of changes made elsewhere.
        receivers: are told that they should look.
        wake: something was published; sequence it.
    """

    def __init__(
        self,
        settings: Settings,
        session: Session,
        store: Store,
        hub: Hub,
        receivers: Receivers,
        wake: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._session = session
        self._store = store
        self._hub = hub
        self._receivers = receivers
        self._wake_sequencer = wake
        self._name = uuid4()  # in the names of channels
        self._id = self._name  # of the lease; another one after it was lost
        self._members: dict[str, Member] = {}
        self._changes = Coalescer[_Request, None](self._change, max_items=_AT_A_TIME)
        self._to_look_at: set[str] = set()
        self._to_remove: set[str] = set()
        self._wakeup = asyncio.Event()
        self._is_alive = True
        self._to_restore = False
        self._is_registered = False
        self._rounds = 0

    def __getitem__(self, channel: str) -> Member:
        """The member that ``new_channel()`` has made.

        Raises:
            InvalidChannel: this layer has none of that name.
        """
        member = self._members.get(channel)
        if member is None:
            raise InvalidChannel(channel, "it is not a channel that this layer has made")
        return member

    async def open(self) -> None:
        """Register the node."""
        self._hub.register(MEMBERS, self)
        self._is_registered = True
        await self._register(self._name)

    async def close(self) -> None:
        """Take leave: everything that lives by this node ends now, or if that cannot be said, when
        the lease has run out. ``run()`` must have ended."""
        await self._changes.close()
        if self._is_registered:
            try:
                async with asyncio.timeout(_CLOSING_TIME):
                    await self._take_leave()
            except (DatabaseError, TimeoutError) as error:
                logger.info("the node was left to its lease: %s", error)
        await self._session.close()

    async def _take_leave(self) -> None:
        for some in _in_parts([*self._members, *self._to_remove]):
            await self._remove(some)
        # What is not known of: a request that was cancelled, an answer that was lost.
        while rows := await self._store.fetch("channels_of", self._id, _AT_A_TIME):
            await self._remove([row["name"] for row in rows])
        await self._store.fetch("remove_node", self._id)

    async def new_channel(
        self, prefix: str, user_id: str | None, metadata: str | None, limits: Limits | None
    ) -> str:
        name = new_name(prefix, self._name)
        try:
            await self._changes.submit(_Add(name, user_id, metadata, limits, limits is not None))
        except TooManyConnections:
            raise
        except BaseException:
            self._to_remove.add(name)  # it may have been made
            raise
        self._members[name] = Member(name, user_id, metadata, limits)
        return name

    async def update_channel(
        self, name: str, user_id: str | None, metadata: str | None, limits: Limits | None
    ) -> None:
        # Without new limits it is changed in any case, and a connection goes on being one.
        is_connection = limits is not None or self[name].limits is not None
        await self._changes.submit(_Add(name, user_id, metadata, limits, is_connection))

    async def delete_channel(self, name: str) -> None:
        member = self._members.pop(name, None)
        if member is None:
            return
        for group in list(member.groups):
            member.left(group)
        self._receivers.end(name)
        try:
            await self._changes.submit(_Remove(name))
        except asyncio.CancelledError:
            self._to_remove.add(name)
            raise
        except (DatabaseError, ChannelLayerClosed):
            # Nothing that the caller could do about it; it is done when the database is back.
            self._to_remove.add(name)

    async def change_membership(
        self,
        group: str,
        channel: str,
        *,
        adding: bool,
        presence: PresenceBy | None,
        limit: int | None,
    ) -> None:
        change = _Change(group, channel, adding, presence, self._hub.cursor, limit)
        try:
            await self._changes.submit(change)
        except DatabaseError as error:
            if error.sqlstate == _CHECK_VIOLATION and presence == "user":
                raise InvalidUser(
                    "presence='user' needs a channel with a user: new_channel(user_id=…), or "
                    "identify() in a consumer"
                ) from error
            raise

    # For the hub

    def offer(self, message: Message) -> None:
        """A node says that memberships have changed; it is a reason to look."""
        if message.size > _MAX_NEWS:
            # Parsing it would keep the event loop for longer than looking at all does.
            self.missed()
            return
        # It is the library's own, whatever the layer's serialiser makes of it.
        names = (message.document or {}).get("channels")
        if isinstance(names, list):
            known = [name for name in names if isinstance(name, str)]
            self._receivers.look(known)
            for name in known:
                self._look(name)

    def missed(self, floor: int = 0) -> None:
        """Such news may have been lost."""
        self._receivers.look()
        for name in self._members:
            self._look(name)

    # The node's life

    async def run(self) -> None:
        # Apart, lest anything that takes its time delay the renewal.
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._again_and_again(self._keep_lease))
            tasks.create_task(self._again_and_again(self._work))

    async def _again_and_again(self, do: Callable[[], Awaitable[None]]) -> None:
        backoff = Backoff()
        while True:
            try:
                await do()
                backoff.reset()
            except DatabaseError as error:
                delay = min(backoff.next(), self._renewal)
                logger.log(error.level, "memberships wait, retry in %.1f s: %s", delay, error)
                await asyncio.sleep(delay)

    @property
    def _renewal(self) -> float:
        return min(self._settings.heartbeat_interval, self._settings.lease_time / _RENEWALS)

    async def _keep_lease(self) -> None:
        # A gap that others can have had too, with time left for each of them to come back in.
        gap = timedelta(seconds=self._settings.lease_time - 3 * self._renewal)
        try:
            # A connection that has stalled must be given up while there is time for another try.
            async with asyncio.timeout(self._renewal):
                rows = await self._session.fetch("renew_node", self._id, gap)
        except TimeoutError as error:
            self._session.abort()
            raise DatabaseUnavailable("no answer in time") from error
        if not rows:
            # What lived by the old lease has been removed; nothing of it lies about any more.
            logger.warning("this node had been declared dead; it registers anew")
            self._to_restore = True
            await self._register(uuid4())
        elif not rows[0]["is_alive"]:
            logger.warning("this node was declared dead; it comes back when that is settled")
            self._to_restore = True
        self._is_alive = not rows or rows[0]["is_alive"]
        await asyncio.sleep(self._renewal)

    async def _register(self, id: UUID) -> None:
        info = orjson.dumps({"host": socket.gethostname(), "pid": os.getpid()}).decode()
        await self._session.fetch("register_node", id, info)
        self._id = id

    async def _work(self) -> None:
        if self._is_alive and self._to_restore:
            await self._restore()
        if self._to_look_at and not self._to_restore:
            await self._look_at_memberships()
        if self._to_remove:
            # In line, behind what may still be making them.
            names = list(self._to_remove)
            await asyncio.gather(*(self._changes.submit(_Remove(name)) for name in names))
            self._to_remove.difference_update(names)
        grace = timedelta(seconds=self._settings.presence_grace)
        # Seldom at all: behind a held snapshot, what was removed before is walked over each time.
        within = _RECENT if self._rounds % _ROUNDS else None
        # And at all again when this has failed, for however long.
        rounds, self._rounds = self._rounds, 0
        (row,) = await self._store.fetch("settle_departures", grace, _AT_A_TIME, within)
        if row[0]:
            self._wake_sequencer()
        await self._store.fetch("sweep_ephemeral", _EPHEMERAL_TIME, within)
        self._rounds = rounds + 1
        if not await self._reap():
            await set_within(self._wakeup, min(self._settings.poll_interval, self._renewal))
            self._wakeup.clear()

    async def _restore(self) -> None:
        """Bring back what lived by the lease that was lost, but for what there is no place left."""
        self._to_restore = False
        try:
            # In line with what is asked for now: what has been ended meanwhile stays ended.
            members = list(self._members.values())
            restored = [_Restore(member.name) for member in members]
            for member, error in zip(members, await self._submitted(restored), strict=True):
                if error is not None:
                    self._end(member, error)
            memberships = [
                self._membership(member, group)
                for member in self._members.values()
                for group in member.groups
            ]
            for change, error in zip(memberships, await self._submitted(memberships), strict=True):
                lost = self._members.get(change.channel)
                if error is not None and lost is not None:
                    logger.warning("a membership was lost with the lease: %s", error)
                    lost.left(change.group)
        except BaseException:
            self._to_restore = True
            raise

    async def _submitted(self, requests: Sequence[_Request]) -> list[PGChannelsError | None]:
        """Do what is asked for; for each, why it was refused, if that is because of a limit."""
        results = await asyncio.gather(*map(self._changes.submit, requests), return_exceptions=True)
        refused: list[PGChannelsError | None] = []
        for result in results:
            if result is None or isinstance(result, (TooManyConnections, GroupFull)):
                refused.append(result)
            else:
                raise result
        return refused

    def _end(self, member: Member, error: PGChannelsError) -> None:
        """Nobody here has asked for it: the channel has lost its place."""
        if self._members.get(member.name) is not member:
            return  # somebody has, meanwhile
        logger.warning("a connection was lost with the lease: %s", error)
        del self._members[member.name]
        self._to_remove.add(member.name)
        member.end(error)
        self._receivers.end(member.name)

    def _membership(self, member: Member, group: str) -> _Change:
        presence = member.presences.get(group)
        if presence == "user" and member.user_id is None:
            presence = None  # it has become nobody's since
        return _Change(
            group,
            member.name,
            adding=True,
            presence=presence,
            since=member.groups[group],
            limit=member.capacities.get(group),
        )

    async def _reap(self) -> bool:
        """Remove some of what lived by leases that have run out; say whether there may be more."""
        lease = timedelta(seconds=self._settings.lease_time)
        (row,) = await self._store.fetch("reap", self._id, lease, _AT_A_TIME)
        if row["published"]:
            self._wake_sequencer()
        return bool(row["more"])

    def _look(self, channel: str) -> None:
        if channel in self._members:
            self._to_look_at.add(channel)
            self._wakeup.set()

    async def _look_at_memberships(self) -> None:
        names = list(self._to_look_at)[:_AT_A_TIME]
        self._to_look_at.difference_update(names)
        if self._to_look_at:
            self._wakeup.set()
        versions = {name: m.version for name in names if (m := self._members.get(name))}
        try:
            rows = await self._store.fetch("memberships_of", names, self._id)
        except DatabaseError:
            self._to_look_at.update(names)
            raise
        if not rows[0]["is_alive"]:
            self._to_look_at.update(names)
            return
        current: dict[str, dict[str, Any]] = {name: {} for name in names}
        owners: dict[str, tuple[str | None, str | None]] = {}
        for row in rows:
            if row["is_known"]:
                owners[row["channel"]] = row["user_id"], row["metadata"]
            if row["group_name"] is not None:
                current[row["channel"]][row["group_name"]] = row
        for name, groups in current.items():
            member = self._members.get(name)
            if member is None:
                continue
            if member.version != versions.get(name):
                self._look(name)  # what was read may be older than what is known
                continue
            if name in owners:
                member.update(*owners[name])
            for group, row in groups.items():
                member.joined(group, row["since"], row["presence"])
            for group in member.groups.keys() - groups.keys():
                member.left(group)

    # What is asked for, together

    async def _change(self, requests: Sequence[_Request]) -> Sequence[PGChannelsError | None]:
        try:
            return await self._change_all(requests)
        except BaseException:
            # It may have been done all the same, and must then be known here. Not in the calls that
            # asked for it: they may have been cancelled.
            for request in requests:
                self._look(request.channel)
            raise

    async def _change_all(self, requests: Sequence[_Request]) -> Sequence[PGChannelsError | None]:
        # Whatever fails half done may be done again as a whole. The later of two about one thing
        # counts; and a channel that goes, goes last.
        added = {r.channel: r for r in requests if isinstance(r, _Add)}
        for request in requests:
            member = self._members.get(request.channel)
            if isinstance(request, _Restore) and member is not None:
                added.setdefault(member.name, _as_known(member))
        changed = {(r.group, r.channel): r for r in requests if isinstance(r, _Change)}
        removed = {r.channel for r in requests if isinstance(r, _Remove)}
        refused: _Refusals = {}
        if plain := [add for add in added.values() if not add.is_connection]:
            names, users, metadata, _, _ = zip(*plain, strict=True)
            await self._store.fetch("add_channels", names, self._id, users, metadata)
        if connections := [add for add in added.values() if add.is_connection]:
            refused |= await self._admit(connections)
        for add in added.values():
            known = self._members.get(add.channel)
            if known is not None and add not in refused:
                known.update(add.user_id, add.metadata)
                known.limits = add.limits or known.limits
        # Apart, for each has an order in which it locks rows.
        for adding in (False, True):
            some = [change for change in changed.values() if change.adding is adding]
            if unlimited := [change for change in some if change.limit is None]:
                await self._change_memberships(unlimited)
            if limited := [change for change in some if change.limit is not None]:
                refused |= await self._join(limited)
        if removed:
            await self._remove(removed)
        for request in requests:
            # What counted in the place of an earlier one answers for it.
            counted = added.get(request.channel)
            if isinstance(request, (_Add, _Restore)) and counted is not None and counted in refused:
                refused[request] = refused[counted]
        return [refused.get(request) for request in requests]

    async def _admit(self, requests: Sequence[_Add]) -> _Refusals:
        names, users, metadata, _, _ = zip(*requests, strict=True)
        given = [add.limits or Limits() for add in requests]
        rows = await self._store.fetch(
            "admit",
            self._id,
            names,
            users,
            metadata,
            [limits.per_user for limits in given],
            [limits.per_node for limits in given],
            [limits.total for limits in given],
        )
        errors = {row["channel"]: _refusal(row["scope"], row["allowed"]) for row in rows}
        return {r: errors[r.channel] for r in requests if r.channel in errors}

    async def _join(self, changes: Sequence[_Change]) -> _Refusals:
        groups, names, _, presences, _, limits = zip(*changes, strict=True)
        grace = timedelta(seconds=self._settings.presence_grace)
        (row,) = await self._store.fetch(
            "join_groups", groups, names, presences, limits, grace, self._id
        )
        refused = {changes[place - 1] for place in row["refused"]}
        self._changed([change for change in changes if change not in refused], row["published"])
        return {change: GroupFull(change.group, change.limit or 0) for change in refused}

    async def _change_memberships(self, changes: Sequence[_Change]) -> None:
        groups, names, adding, presences, _, _ = zip(*changes, strict=True)
        grace = timedelta(seconds=self._settings.presence_grace)
        (row,) = await self._store.fetch(
            "change_memberships", groups, names, adding, presences, grace, self._id
        )
        self._changed(changes, row[0])

    def _changed(self, changes: Sequence[_Change], published: int) -> None:
        if published:
            self._wake_sequencer()
        # Here, and not where it was asked for: whoever did may have been cancelled.
        for change in changes:
            member = self._members.get(change.channel)
            if member is not None and change.adding:
                member.joined(change.group, change.since, change.presence, change.limit)
            elif member is not None:
                member.left(change.group)
        self._receivers.look([change.channel for change in changes])

    async def _remove(self, names: Iterable[str]) -> None:
        grace = timedelta(seconds=self._settings.presence_grace)
        (row,) = await self._store.fetch("remove_channels", list(names), grace, self._id)
        if row[0]:
            self._wake_sequencer()


def _as_known(member: Member) -> _Add:
    is_connection = member.limits is not None
    return _Add(member.name, member.user_id, member.metadata, member.limits, is_connection)


def _refusal(scope: str, limit: int) -> PGChannelsError:
    match scope:
        case "user" | "node" | "total":
            return TooManyConnections(scope, limit)
        case _:
            return DatabaseUnavailable("this node has lost its lease, and registers anew")


def _in_parts(items: Sequence[T]) -> Iterable[Sequence[T]]:
    return (items[start : start + _AT_A_TIME] for start in range(0, len(items), _AT_A_TIME))
