"""A channel of this process's own, and the streams that read as it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pgchannels.channels import DIRECT, EVERYONE, user_channel
from pgchannels.records import PresenceBy

if TYPE_CHECKING:
    from pgchannels.stream import Stream

__all__ = ["Member"]


class Member:
    """What ``new_channel()`` has made, as the layer that made it knows it.

    Args:
        name: the channel.
        user_id: whose it is.
        metadata: the text of a JSON object.
    """

    def __init__(self, name: str, user_id: str | None, metadata: str | None) -> None:
        self.name = name
        self.user_id = user_id
        self.metadata = metadata
        self.groups: dict[str, int] = {}
        """Since which id it is a member of each."""
        self.presences: dict[str, PresenceBy] = {}
        """As what it is counted, where it is."""
        self.streams: set[Stream] = set()
        self.version = 0
        """Counts what has become known; what was read from the database before that is old."""

    @property
    def inherited(self) -> Iterator[str]:
        """What it reads because of what it is, besides its groups."""
        yield self.name
        yield DIRECT
        yield EVERYONE
        if self.user_id is not None:
            yield user_channel(self.user_id)

    def joined(self, group: str, since: int, presence: PresenceBy | None) -> None:
        """It has become a member, or was one all along."""
        self.version += 1
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
        if self.groups.pop(group, None) is not None:
            for stream in self.streams:
                stream.unfollow_group(group)

    def update(self, user_id: str | None, metadata: str | None) -> None:
        """It is somebody else's, from now on."""
        before = set(self.inherited)
        self.user_id, self.metadata = user_id, metadata
        after = set(self.inherited)
        for stream in self.streams:
            for channel in before - after:
                stream.unfollow_group(channel)
            for channel in after - before:
                stream.follow_group(channel, None)
