"""Small values that cross boundaries between modules, and some that users get. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal, NamedTuple, TypeAlias
from uuid import UUID

from pgchannels.budget import Held
from pgchannels.messages import Message, Position

__all__ = [
    "NOTHING_SEEN",
    "ConnectionInfo",
    "FollowerStatus",
    "Head",
    "HistoryPage",
    "LogPage",
    "Move",
    "Moved",
    "Outgoing",
    "PresenceBy",
    "Present",
    "Receipt",
    "Seen",
    "flatten",
]

PresenceBy: TypeAlias = Literal["user", "connection"]
"""As what a member is counted: all connections of one user as one, or each by itself."""


class Outgoing(NamedTuple):
    """A message on its way, checked and encoded."""

    channel: str
    payload: str
    ttl: timedelta | None = None
    headers: str | None = None
    attachments: Sequence[bytes] = ()
    key: str | None = None


class Head(NamedTuple):
    """The end of the log, and its beginning: messages up to *floor* may be gone."""

    id: int
    epoch: int
    floor: int


class Seen(NamedTuple):
    """A batch that has been seen as the newest one."""

    id: int
    """Its last message; 0 if none has been seen."""
    mark: int
    """What tells it from another one that ends there."""


NOTHING_SEEN = Seen(0, 0)


class LogPage(NamedTuple):
    """Messages in order, and the bounds of the log when they were read.

    *full* says that the page ended at its limit, rather than at the end of the log.
    """

    messages: list[Message]
    head: Head
    full: bool
    last: int | None = None
    """The last id that was looked at, if that is not the last message's: its time was over."""
    mark: int | None = None
    """The newest batch's; None if the log is empty, or lacks the batch that the reader has seen."""
    held: Held | None = None
    """To be kept for as long as the messages are."""

    @property
    def end(self) -> int:
        """The id at which a full page ended."""
        return self.messages[-1].id if self.last is None else self.last

    @property
    def upto(self) -> int:
        """The id that an oldest-first page reaches: everything up to it is in."""
        return self.end if self.full else self.head.id


class Receipt(NamedTuple):
    """What became of a message that was sent."""

    created_at: datetime
    """When it was published, by the database's clock."""
    repeated: bool = False
    """A message with this idempotency key had been published before; the receipt is that one's."""


@dataclass(frozen=True)
class HistoryPage:
    """A part of a channel's history, in the order that was asked for."""

    messages: list[Message]
    next: Position | None
    """Where more begins: ``after=`` it, or ``before=`` it if newest first. None: no more. With a
    filter there may be more though this page is empty."""
    position: Position
    """The end of the log when this was read. To go on live from the newest page without a gap or a
    repeat, subscribe after this."""
    truncated: bool
    """Retention may have removed messages that were asked for."""


@dataclass(frozen=True)
class Present:
    """Somebody who is in a group: a user with all connections, or one connection."""

    user_id: str | None
    connection: str | None
    """The channel, of who is counted by connection; None for a user."""
    connections: int
    """How many there are; 0 for a user who has just gone and may be back in a moment."""
    metadata: Mapping[str, Any] | None
    """As given with the channel; of a user with several, that of the newest."""
    joined_at: datetime
    """When the first of the connections joined, by the database's clock."""


@dataclass(frozen=True)
class ConnectionInfo:
    """A connection that is there, on whatever node."""

    channel: str
    node: UUID
    """By whose lease it lives; a node that has lost its lease gets a new id."""
    host: str | None
    """The name of the machine that the node runs on; None while it is being cleared away."""
    user_id: str | None
    metadata: Mapping[str, Any] | None
    connected_at: datetime
    """When it was given its place, by the database's clock."""


class Move(NamedTuple):
    """A position that is to move, and on which conditions: parameters of ``save_follower``."""

    name: str
    holder: UUID
    epoch: int
    before: list[int]
    """Where it must be now, …"""
    after: int
    transaction: str | None = None
    """… unless this very transaction has moved it there already, or further."""


class Moved(NamedTuple):
    """A follower's position that has been moved."""

    position: int
    transaction: str
    """The id of the transaction that the move is a part of; the same in its savepoints."""


@dataclass(frozen=True)
class FollowerStatus:
    """How far a durable reader has come."""

    name: str
    channels: tuple[str, ...]
    position: Position
    """The last message whose effects are done."""
    lag: int
    """Messages of its channels that it has still to get done; counted up to 100 000."""
    active: bool
    """Whether somebody reads for it now."""
    moved_at: datetime
    """When the position last moved, by the database's clock."""


def flatten(messages: Sequence[Outgoing]) -> tuple[list[int], list[int], list[bytes]]:
    """All attachments in one list, and the places in it, from 1, of each message's first and last.

    PostgreSQL has no arrays of arrays of different lengths.
    """
    firsts, lasts, attachments = [], [], list[bytes]()
    for message in messages:
        firsts.append(len(attachments) + 1)
        attachments += message.attachments
        lasts.append(len(attachments))
    return firsts, lasts, attachments
