"""Who is a member of which group in a :class:`~pgchannels.memory.MemoryLog`, and who is present."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import orjson

from pgchannels.channels import presence_channel
from pgchannels.errors import InvalidUser
from pgchannels.records import PresenceBy, Present

__all__ = ["Members", "Membership"]


@dataclass
class Membership:
    """A channel's place in a group."""

    group: str
    channel: str
    since: int
    """The end of the log when it joined: later messages of the group are the member's."""
    joined_at: datetime
    renewed_at: datetime
    presence: PresenceBy | None = None
    user_id: str | None = None
    metadata: str | None = None

    @property
    def identity(self) -> str | None:
        """As who the member is counted."""
        if self.presence is None:
            return None
        return f"user:{self.user_id}" if self.presence == "user" else f"connection:{self.channel}"


@dataclass
class _Presence:
    """Somebody who counts as present: by these members, or for a moment after the last of them."""

    latest: Membership
    members: dict[str, Membership] = field(default_factory=dict)
    gone: dict[str, tuple[datetime, Membership]] = field(default_factory=dict)
    """By which it was present, and until when it may come back."""

    @property
    def those(self) -> list[Membership]:
        """The members that it is present by; if there are none any more, those that have gone."""
        gone = [member for _, member in self.gone.values()]
        return list(self.members.values()) or gone or [self.latest]


class Members:
    """The memberships of a log.

    Args:
        clock: the log's.
        publish: puts a message into the log: channel and payload.
    """

    def __init__(self, clock: Callable[[], datetime], publish: Callable[[str, str], None]) -> None:
        self._clock = clock
        self._publish = publish
        self._groups: dict[str, dict[str, Membership]] = {}
        self._of: dict[str, dict[str, Membership]] = {}
        self._present: dict[str, dict[str, _Presence]] = {}
        self._leaving: dict[tuple[str, str], datetime] = {}

    def of(self, channel: str) -> Collection[Membership]:
        """The memberships of a channel."""
        return self._of.get(channel, {}).values()

    def channels(self, group: str) -> Collection[str]:
        """The members of a group."""
        return self._groups.get(group, {}).keys()

    def get(self, group: str, channel: str) -> Membership | None:
        return self._groups.get(group, {}).get(channel)

    def add(
        self,
        group: str,
        channel: str,
        since: int,
        *,
        presence: PresenceBy | None,
        user_id: str | None,
        metadata: str | None,
    ) -> Membership:
        """Make *channel* a member, or renew it; tell of it if somebody has come by that.

        Raises:
            InvalidUser: it is to be counted as a user, and has none.
        """
        now = self._clock()
        known = self.get(group, channel)
        joined_at = now
        if known is not None:
            since, joined_at = known.since, known.joined_at
            if presence is None and user_id is None:
                # Renewed after its channel has become nobody's, it stays what it was counted as.
                user_id, metadata = known.user_id, known.metadata
            presence = presence or known.presence
        if presence == "user" and user_id is None:
            raise InvalidUser(
                "presence='user' needs a channel with a user: new_channel(user_id=…), or "
                "identify() in a consumer"
            )
        member = Membership(group, channel, since, joined_at, now, presence, user_id, metadata)
        self._groups.setdefault(group, {})[channel] = member
        self._of.setdefault(channel, {})[group] = member
        self._arrive(member)
        if known is not None and known.identity != member.identity:
            self._depart(known, timedelta(0))
        self._forget_who_is_gone(member)
        return member

    def remove(self, group: str, channel: str, grace: timedelta) -> bool:
        """End a membership. Who counted as a user leaves after *grace*. False: there is none."""
        member = self._groups.get(group, {}).pop(channel, None)
        if member is None:
            return False
        del self._of[channel][group]
        for index, key in ((self._groups, group), (self._of, channel)):
            if not index[key]:
                del index[key]
        self._depart(member, grace)
        return True

    def present(self, group: str) -> list[Present]:
        """Who is present, first come first."""
        now = self._clock()
        present = [_as_present(presence, now) for presence in self._present.get(group, {}).values()]
        return sorted(present, key=lambda each: each.joined_at)

    @property
    def next_departure(self) -> datetime | None:
        """When :meth:`settle` will have something to do."""
        return min(self._leaving.values(), default=None)

    def settle(self) -> None:
        """End the presence of those whose time of grace is over."""
        now = self._clock()
        for (group, identity), leaves_at in list(self._leaving.items()):
            if leaves_at <= now:
                self._leave(group, identity)

    def _arrive(self, member: Membership) -> None:
        identity = member.identity
        if identity is None:
            return
        everybody = self._present.setdefault(member.group, {})
        arrived = identity not in everybody
        presence = everybody.setdefault(identity, _Presence(member))
        presence.members[member.channel] = member
        # Who has come back is no longer on the way out.
        presence.gone.clear()
        self._leaving.pop((member.group, identity), None)
        if arrived:
            self._tell("presence.joined", member)

    def _depart(self, member: Membership, grace: timedelta) -> None:
        identity = member.identity
        if identity is None:
            return
        presence = self._present[member.group][identity]
        del presence.members[member.channel]
        if grace and member.presence == "user":
            presence.gone[member.channel] = self._clock() + grace, member
        if presence.members:
            return
        presence.latest = member
        if presence.gone:
            until = max(until for until, _ in presence.gone.values())
            self._leaving[member.group, identity] = until
        else:
            self._leave(member.group, identity)

    def _forget_who_is_gone(self, member: Membership) -> None:
        """A channel that is back as somebody else is nobody's who may still come back by it."""
        now = self._clock()
        for group, identity in list(self._leaving):
            gone = self._present[group][identity].gone
            is_back = group == member.group and gone.pop(member.channel, None) is not None
            if is_back and all(until <= now for until, _ in gone.values()):
                self._leave(group, identity)

    def _leave(self, group: str, identity: str) -> None:
        self._leaving.pop((group, identity), None)
        presence = self._present[group].pop(identity)
        self._tell("presence.left", presence.latest)
        if not self._present[group]:
            del self._present[group]

    def _tell(self, what: str, member: Membership) -> None:
        payload = {
            "type": what,
            "group": member.group,
            "user_id": member.user_id,
            "connection": member.channel if member.presence == "connection" else None,
            "metadata": None if member.metadata is None else orjson.Fragment(member.metadata),
            "count": len(self._present[member.group]),
        }
        self._publish(presence_channel(member.group), orjson.dumps(payload).decode())


def _as_present(presence: _Presence, now: datetime) -> Present:
    latest = max(presence.those, key=lambda member: member.joined_at)
    is_user = latest.presence == "user"
    gone = [member for until, member in presence.gone.values() if until > now]
    return Present(
        user_id=latest.user_id,
        connection=None if is_user else latest.channel,
        connections=len(presence.members),
        metadata=None if latest.metadata is None else orjson.loads(latest.metadata),
        joined_at=min(member.joined_at for member in (*presence.those, *gone)),
    )
