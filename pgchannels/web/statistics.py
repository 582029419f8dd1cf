"""What a manager counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pgchannels.web.connection import Connection

__all__ = ["Counts", "Statistics"]

_TRAFFIC = ("messages_in", "bytes_in", "messages_out", "bytes_out")


@dataclass(frozen=True)
class Statistics:
    """Of the connections of one process: how many there are, and what there has been.

    Attributes:
        connections: that there are.
        users: that they belong to.
        pending: messages that wait to be sent.
        is_draining: whether new ones are refused, because the server shuts down.
        opened: connections that were admitted, since the process began.
        closed: how many were closed, by code.
        refused: how many were not accepted, by the error's code.
        errors: what clients were told of, by the error's code; those that closed a socket, too.
        messages_in, bytes_in, messages_out, bytes_out: what went through, frames of either kind.
    """

    connections: int
    users: int
    pending: int
    is_draining: bool
    opened: int
    closed: dict[int, int]
    refused: dict[str, int]
    errors: dict[str, int]
    messages_in: int
    bytes_in: int
    messages_out: int
    bytes_out: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Counts:
    """What is added up; what goes through open connections is added when they are asked for."""

    opened: int = 0
    closed: Counter[int] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    traffic: Counter[str] = field(default_factory=Counter)

    def add_traffic(self, connection: Connection) -> None:
        """Of a connection that is gone."""
        for name in _TRAFFIC:
            self.traffic[name] += getattr(connection, name)

    def statistics(self, connections: Iterable[Connection], *, is_draining: bool) -> Statistics:
        now = list(connections)
        return Statistics(
            connections=len(now),
            users=len({each.user_id for each in now} - {None}),
            pending=sum(each.pending for each in now),
            is_draining=is_draining,
            opened=self.opened,
            closed=dict(self.closed),
            refused=dict(self.refused),
            errors=dict(self.errors),
            **{
                name: self.traffic[name] + sum(getattr(each, name) for each in now)
                for name in _TRAFFIC
            },
        )
