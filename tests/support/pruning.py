"""Pruning when a test says so, and not before."""

from __future__ import annotations

import psycopg

from pgchannels import Settings
from pgchannels.pruner import Pruner, PruneReport
from pgchannels.store import Session


def only_by_hand(database_url: str) -> None:
    """Keep the nodes of a database from pruning, which each would begin when it starts.

    They believe that another node does it: the lease for that is taken here, and never ends.
    """
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(
            "insert into pgchannels.leases (name, holder, expires_at)"
            " values ('pruner', gen_random_uuid(), 'infinity')"
        )


async def prune(settings: Settings, *, dry_run: bool = False) -> PruneReport:
    """Prune once, whoever has the lease; or only count."""
    session = Session(settings, "test")
    try:
        return await Pruner(settings, session).run_once(dry_run=dry_run)
    finally:
        await session.close()
