"""How many connections there may be, and how many members. Pure."""

from __future__ import annotations

from dataclasses import dataclass, fields

from pgchannels.errors import ConfigurationError

__all__ = ["MAX_LIMIT", "Limits", "check_limit"]

MAX_LIMIT = 2**31 - 1


@dataclass(frozen=True)
class Limits:
    """How many there may be of each; None for any number.

    The database counts, so that they hold over all nodes and processes. Only those connections
    count that were made with limits, be they empty: ``Limits()``.

    Args:
        per_user: connections of one user. Those without a user have no such limit.
        per_node: connections of one process.
        total: connections of all nodes together.
        group_members: members of one group.
        groups: groups that one connection is a member of. A layer does not look at it; sockets do.

    Raises:
        ConfigurationError: one is not an integer of 1 to 2**31 - 1.
    """

    per_user: int | None = None
    per_node: int | None = None
    total: int | None = None
    group_members: int | None = None
    groups: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            check_limit(field.name, getattr(self, field.name))


def check_limit(name: str, limit: object) -> None:
    """Refuse what is neither None nor a number that something can be limited to.

    Raises:
        ConfigurationError: it is not an integer of 1 to 2**31 - 1.
    """
    if limit is None:
        return
    if not isinstance(limit, int) or isinstance(limit, bool) or not 1 <= limit <= MAX_LIMIT:
        raise ConfigurationError(f"{name} must be an integer of 1 to {MAX_LIMIT}, not {limit!r}")
