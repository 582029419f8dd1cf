"""Every error that pgchannels raises of its own accord.

::

    PGChannelsError
     ├─ ConfigurationError          a setting, a bind or a call that cannot work as given
     │   └─ SchemaError             the database is not at the revision that this code needs
     ├─ ChannelLayerClosed          the layer is not open (any more)
     ├─ ChannelFull                 as many messages wait to be received as the channel may hold
     ├─ TooManyConnections          of this user, on this node, or in all
     ├─ GroupFull                   as many connections are in the group as may be
     ├─ FollowerLost                another one reads as this durable reader now
     ├─ SlowConsumer                a stream's buffer was full, and that was to be its end
     ├─ InvalidFilter               not an expression that messages can be chosen by
     ├─ InvalidMessage              refused before anything was written
     │   ├─ InvalidChannel
     │   ├─ InvalidPayload
     │   ├─ InvalidUser
     │   └─ MessageTooLarge
     ├─ InvalidPosition             not the text of a position
     │   └─ UnknownPosition         well-formed, but no message of this log ever had it
     ├─ DatabaseError               PostgreSQL refused a statement of ours
     │   └─ DatabaseUnavailable     the server cannot be reached, or the connection broke
     └─ EmbeddedPostgresError       the server from the wheel cannot be started or stopped

What a caller may want to decide on is on attributes; the sentence is made in ``__str__``.
The causes (driver errors) are chained as ``__cause__``.
"""

from __future__ import annotations

import logging
from typing import ClassVar, Literal

__all__ = [
    "ChannelFull",
    "ChannelLayerClosed",
    "ConfigurationError",
    "DatabaseError",
    "DatabaseUnavailable",
    "EmbeddedPostgresError",
    "FollowerLost",
    "GroupFull",
    "InvalidChannel",
    "InvalidFilter",
    "InvalidMessage",
    "InvalidPayload",
    "InvalidPosition",
    "InvalidUser",
    "MessageTooLarge",
    "PGChannelsError",
    "SchemaError",
    "SlowConsumer",
    "TooManyConnections",
    "UnknownPosition",
]


class PGChannelsError(Exception):
    """Base class: ``except PGChannelsError`` catches whatever this library raises."""


class ConfigurationError(PGChannelsError):
    """Something was set up in a way that cannot work. Retrying does not help."""


class SchemaError(ConfigurationError):
    """The database's schema is missing, older or newer than this version of pgchannels.

    Attributes:
        schema: name of the PostgreSQL schema that was looked at.
        found: the revision in the database; None if there is no pgchannels schema at all.
        needed: the revision that this version of pgchannels works on.
        newer: the database's revision is not known here, so a later version has made it.
    """

    def __init__(self, schema: str, found: str | None, needed: str, *, newer: bool = False) -> None:
        self.schema = schema
        self.found = found
        self.needed = needed
        self.newer = newer
        super().__init__(schema, found, needed)

    def __str__(self) -> str:
        if self.newer:
            return (
                f"schema {self.schema!r} is at revision {self.found}, which this version of "
                f"pgchannels (revision {self.needed}) does not know: a newer version has migrated "
                "it. Run: pip install --upgrade pgchannels"
            )
        found = "has not been migrated" if self.found is None else f"is at revision {self.found}"
        option = "" if self.schema == "pgchannels" else f" --schema {self.schema}"
        return (
            f"schema {self.schema!r} {found}; revision {self.needed} is needed. "
            f"Run: pgchannels migrate{option}"
        )


class ChannelLayerClosed(PGChannelsError):
    """The layer was used before ``open()`` or after ``close()``."""

    def __str__(self) -> str:
        return self.args[0] if self.args else "the channel layer is not open"


class ChannelFull(PGChannelsError):
    """The message was not sent, for nobody receives as fast as is sent.

    Attributes:
        channel: where to.
        capacity: how many messages may wait there.
    """

    def __init__(self, channel: str, capacity: int) -> None:
        self.channel = channel
        self.capacity = capacity
        super().__init__(channel, capacity)

    def __str__(self) -> str:
        return f"channel {self.channel!r} is full: {self.capacity} messages wait to be received"


class TooManyConnections(PGChannelsError):
    """A connection was refused: as many are there as may be.

    Attributes:
        scope: ``"user"``, ``"node"`` or ``"total"``: of what there are too many.
        limit: how many may be there.
    """

    _WHERE: ClassVar = {"user": "of this user", "node": "on this server", "total": "in all"}

    def __init__(self, scope: Literal["user", "node", "total"], limit: int) -> None:
        self.scope = scope
        self.limit = limit
        super().__init__(scope, limit)

    def __str__(self) -> str:
        return f"too many connections: at most {self.limit} {self._WHERE[self.scope]} are allowed"


class GroupFull(PGChannelsError):
    """A channel did not become a member: as many connections are in the group as may be.

    Attributes:
        group: which.
        limit: how many may be there.
    """

    def __init__(self, group: str, limit: int) -> None:
        self.group = group
        self.limit = limit
        super().__init__(group, limit)

    def __str__(self) -> str:
        return f"group {self.group!r} is full: it has {self.limit} members"


class SlowConsumer(PGChannelsError):
    """A stream with ``overflow="disconnect"`` has ended: its consumer did not keep up.

    Attributes:
        pending: messages that were waiting, and are dropped; the log still has those it stores.
    """

    def __init__(self, pending: int) -> None:
        self.pending = pending
        super().__init__(pending)

    def __str__(self) -> str:
        return f"the consumer did not keep up: {self.pending} messages were waiting"


class FollowerLost(PGChannelsError):
    """What was to be acknowledged is another reader's by now. Roll the transaction back.

    The lease had run out (a process was paused, or the database away), or somebody has moved or
    removed the position.

    Attributes:
        name: of the durable reader.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(name)

    def __str__(self) -> str:
        return f"{self.name!r} is read by another follower by now, or its position has moved"


class InvalidFilter(PGChannelsError, ValueError):
    """A text that is not a filter, or one that could take too long.

    Attributes:
        filter: what was given, whatever its type.
        offset: of the mistake, in characters from the beginning, 0.
    """

    def __init__(self, filter: object, offset: int, reason: str) -> None:
        self.filter = filter
        self.offset = offset
        self.reason = reason
        super().__init__(filter, offset, reason)

    def __str__(self) -> str:
        shown = "the end"
        if not isinstance(self.filter, str):
            shown = type(self.filter).__name__
        elif self.offset < len(self.filter):
            rest = self.filter[self.offset :]
            shown = repr(rest if len(rest) <= 20 else f"{rest[:19]}…")
        return f"invalid filter: {self.reason}, at offset {self.offset}: {shown}"


class InvalidMessage(PGChannelsError, ValueError):
    """A message was refused. Nothing was written."""


class InvalidChannel(InvalidMessage):
    """A channel name outside the rules of :func:`pgchannels.channels.check_channel`.

    Attributes:
        channel: what was given, whatever its type.
    """

    def __init__(self, channel: object, reason: str) -> None:
        self.channel = channel
        self.reason = reason
        super().__init__(channel, reason)

    def __str__(self) -> str:
        shown = repr(self.channel)
        if len(shown) > 80:
            shown = shown[:77] + "..."
        return f"invalid channel name {shown}: {self.reason}"


class InvalidPayload(InvalidMessage):
    """A payload that is not a JSON object, or that JSON cannot carry."""


class InvalidUser(InvalidMessage):
    """A user's id that cannot be one, or none where one is needed. The application's mistake."""


class MessageTooLarge(InvalidMessage):
    """A payload whose JSON text is longer than ``max_message_size``.

    Attributes:
        size: bytes of the encoded payload.
        limit: bytes allowed.
    """

    def __init__(self, size: int, limit: int) -> None:
        self.size = size
        self.limit = limit
        super().__init__(size, limit)

    def __str__(self) -> str:
        return f"the payload has {self.size} bytes as JSON; at most {self.limit} are allowed"


class InvalidPosition(PGChannelsError, ValueError):
    """A text that is not a position.

    Attributes:
        position: what was given.
    """

    def __init__(self, position: object) -> None:
        self.position = position
        super().__init__(position)

    def __str__(self) -> str:
        shown = repr(self.position)
        if len(shown) > 60:
            shown = shown[:57] + "..."
        return f"invalid position {shown}: expected '0' or '<epoch>-<id>' as in a message"


class UnknownPosition(InvalidPosition):
    """A position of another log: of another epoch, or past the newest message."""

    def __str__(self) -> str:
        return f"unknown position {str(self.position)!r}: this log has never reached it"


class DatabaseError(PGChannelsError):
    """PostgreSQL refused a statement. ``__cause__`` is the driver's error.

    Attributes:
        sqlstate: the five-character code of the PostgreSQL manual, appendix A, or None.
        level: how the node's own tasks log it, which try again in any case.
    """

    level = logging.ERROR

    def __init__(self, message: str, sqlstate: str | None = None) -> None:
        self.sqlstate = sqlstate
        super().__init__(message)


class DatabaseUnavailable(DatabaseError):
    """No answer from the server. The statement may or may not have taken effect."""

    level = logging.WARNING


class EmbeddedPostgresError(PGChannelsError):
    """The embedded server could not be started, stopped or used."""
