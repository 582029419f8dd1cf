"""Leases: who does what only one node needs to do. A row each, ending by the database's clock.

A lease saves work, it does not protect: two nodes that both believe in holding one (a process was
paused, say) must do no harm. What needs to be exclusive takes a lock in the database.
"""

from __future__ import annotations

import asyncio
import logging
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import UUID

from pgchannels.errors import DatabaseError

if TYPE_CHECKING:
    from pgchannels.store import Queries

__all__ = ["Lease"]

logger = logging.getLogger("pgchannels.leases")

# Seconds that it may take to let go of one.
_RELEASE_TIME = 2.0


class Lease:
    """One node's claim to the lease *name*.

    Args:
        queries: where the row is.
        name: what is leased.
        holder: the node.
        seconds: for how long; renewed after a third of it.
    """

    def __init__(self, queries: Queries, name: str, holder: UUID, seconds: float) -> None:
        self._queries = queries
        self._name = name
        self._holder = holder
        self._time = timedelta(seconds=seconds)
        self.renewal = seconds / 3
        self._asked_at: float | None = None
        self._held = False

    async def held(self) -> bool:
        """Whether this node holds it; takes or renews it when it is time to ask again."""
        now = asyncio.get_running_loop().time()
        if self._asked_at is None or now - self._asked_at >= self.renewal:
            self._held = False
            rows = await self._queries.fetch("take_lease", self._name, self._holder, self._time)
            self._held = bool(rows)
            self._asked_at = now
        return self._held

    async def release(self) -> None:
        """Let another node have it at once, or if that cannot be said, when it has run out."""
        if not self._held:
            return
        self._held = False
        try:
            async with asyncio.timeout(_RELEASE_TIME):
                await self._queries.fetch("drop_lease", self._name, self._holder)
        except (DatabaseError, TimeoutError) as error:
            logger.info("the lease %r was left to run out: %s", self._name, error)
