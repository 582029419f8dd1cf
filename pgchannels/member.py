"""A channel of this process's own, and the streams that read as it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pgchannels.channels import DIRECT, EVERYONE, user_channel
from pgchannels.records import PresenceBy

if TYPE_CHECKING:
    from pgchannels.limits import Limits
    from pgchannels.stream import Stream

__all__ = ["Member"]


class Member:
    """What ``new_channel()`` has made, as the layer that made it knows it.

    Args:
        name: the channel.
        user_id: whose it is.
        metadata: the text of a JSON object.
        limits: under which it has its place; None if it is no connection, and needs none.
    """

    def __init__(
        self,
        name: str,
        user_id: str | None,
        metadata: str | None,
        limits: Limits | None = None,
    ) -> None:
        self.name = name
        self.user_id = user_id
        self.metadata = metadata
        self.limits = limits
        self.groups: dict[str, int] = {}
        """Since which id it is a member of each."""
        self.presences: dict[str, PresenceBy] = {}
        """As what it is counted, where it is."""
        self.capacities: dict[str, int] = {}
        """How many members the group may have, where that was limited."""
        self.ended: Exception | None = None
        """Why it is no more, if nobody here has asked for its end."""
        self.streams: set[Stream] = set()
        self.version = 0
        """Counts what has become known; what was read from the database before that is old."""

    @property
    def inherited(self) -> Iterator[str]:
        """Channels that it reads because of what it is, besides its groups."""
        yield self.name
        yield DIRECT
        yield from self.shared

    @property
    def shared(self) -> Iterator[str]:
        """Those of them that hold what is for others too: for everyone, and for its user."""
        yield EVERYONE
        if self.user_id is not None:
            yield user_channel(self.user_id)

    def joined(
        self, group: str, since: int, presence: PresenceBy | None, capacity: int | None = None
    ) -> None:
        """It has become a member, or was one all along."""
        self.version += 1
        if capacity is not None:
            self.capacities[group] = capacity
        if presence is not None:
            self.presences[group] = presence
        if group in self.groups:
            return  # a stream that has left it does not begin again where the member did
        self.groups[group] = since
        for stream in self.streams:
            stream.follow_group(group, since)

    def left(self, group: str) -> None:
        """It is no member any more."""
        self.version += 1
        self.presences.pop(group, None)
        self.capacities.pop(group, None)
        if self.groups.pop(group, None) is not None:
            for stream in self.streams:
                stream.unfollow_group(group)

    def end(self, error: Exception) -> None:
        """It is no more: what reads as it ends with *error*."""
        self.ended = error
        for stream in list(self.streams):
            stream.close(error)

    def update(self, user_id: str | None, metadata: str | None) -> None:
        """It belongs to this user from now on, with this metadata."""
        if (user_id, metadata) == (self.user_id, self.metadata):
            return
        self.version += 1
        before = set(self.inherited)
        self.user_id, self.metadata = user_id, metadata
        after = set(self.inherited)
        for stream in self.streams:
            for channel in before - after:
                stream.unfollow_group(channel)
            for channel in after - before:
                stream.follow_group(channel, None)
            stream.owner_changed(user_id, metadata)
