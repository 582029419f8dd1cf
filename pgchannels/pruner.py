"""Removes what is past its time. Runs in every node, active in one; also as ``pgchannels prune``.

What is older than the retention disappears at once and for every reader, because the floor of the
log is raised before anything is removed. Then partitions that lie wholly below the floor are
detached and dropped, which costs the same for a thousand messages as for a million. A partition
that fills slowly would keep its oldest messages on disk for long; once they are a tenth over the
retention, they are deleted one by one. Readers and publishers never wait for any of this.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

from pgchannels.errors import DatabaseError, DatabaseUnavailable
from pgchannels.sql import in_schema

if TYPE_CHECKING:
    from pgchannels.leases import Lease
    from pgchannels.settings import Settings
    from pgchannels.store import Session

__all__ = ["PruneReport", "Pruner"]

logger = logging.getLogger("pgchannels.pruner")

# How long a channel is remembered at least that nobody receives from any more.
_IDLE_TIME = timedelta(days=1)
# Rows that one transaction deletes.
_CHUNK = 5000
# How much longer than the retention a message may stay on disk, waiting for its partition.
_SLACK = 1.1
# DETACH CONCURRENTLY waits for the transactions that use the log at that moment. It holds nobody up
# while it does, but a pruner that hangs prunes nothing else.
_LOCK_TIMEOUT = "5s"


@dataclass
class PruneReport:
    """What was done, or in a dry run what would be."""

    floor: int = 0
    """Messages with ids up to here can no longer be read."""
    partitions_dropped: list[str] = field(default_factory=list)
    partitions_added: int = 0
    """How many times ``log.partition_size`` ids; in a large log, partitions are wider than that."""
    messages_deleted: int = 0
    """Past the retention, deleted one by one."""
    expired_deleted: int = 0
    """Past their own time to live."""
    batches_deleted: int = 0
    keys_deleted: int = 0
    """Idempotency keys past their lifetime."""
    revocations_deleted: int = 0
    """Of tokens that have expired by themselves."""
    memberships_ended: int = 0
    """Of ordinary channels that were not used for long."""
    receivers_deleted: int = 0
    """What was remembered of channels that nobody receives from any more."""
    stragglers: int = 0
    """Rows of the outbox that no batch would have taken; there must be none. Published again."""
    problems: list[str] = field(default_factory=list)
    """What could not be done this time; it is tried again the next."""


class Pruner:
    """``run()`` prunes by the clock until cancelled, while the lease is held.

    Args:
        settings: retention, and how often.
        session: a connection of its own.
        lease: whoever holds it prunes; None for a single ``run_once()``.
    """

    def __init__(self, settings: Settings, session: Session, lease: Lease | None = None) -> None:
        self._settings = settings
        self._session = session
        self._lease = lease
        # Batches before this one have been thinned out.
        self._thinned_to = 0
        # For stragglers, in those with lower ids of transactions.
        self._looked_below = "0"

    @property
    def _group_expiry(self) -> timedelta | None:
        expiry = self._settings.group_expiry
        return timedelta(seconds=expiry) if expiry else None

    async def run(self) -> None:
        while True:
            try:
                if self._lease is None or await self._lease.held():
                    await self.run_once()
            except DatabaseError as error:
                logger.log(error.level, "cannot prune, will try again: %s", error)
            await asyncio.sleep(self._settings.prune_interval)

    async def close(self) -> None:
        """Let another node prune."""
        if self._lease is not None:
            await self._lease.release()
        await self._session.close()

    async def run_once(self, *, dry_run: bool = False) -> PruneReport:
        """Prune, or only count."""
        report = PruneReport()
        if not dry_run:
            # Ahead of time and first of all: without room in the log, nothing can be published.
            report.partitions_added = await self._value("add_partitions_ahead")
            report.stragglers = await self._requeue_stragglers()
        await self._prune(report, dry_run=dry_run)
        if report.stragglers:
            logger.error("%d stragglers found in the outbox and published again", report.stragglers)
        if not dry_run:
            logger.debug("pruned: %s", report)
        return report

    async def _requeue_stragglers(self) -> int:
        """Publish again what no batch would take; each transaction is looked at once."""
        (row,) = await self._session.fetch("requeue_stragglers", self._looked_below)
        self._looked_below = row["through"]
        requeued: int = row["requeued"]
        return requeued

    async def _prune(self, report: PruneReport, *, dry_run: bool) -> None:
        floor = (await self._session.head()).floor
        overdue = 0
        if self._settings.retention is not None:
            floor = max(floor, await self._value("aged_through", self._settings.retention))
            overdue = await self._value("aged_through", self._settings.retention * _SLACK)
            overdue = min(overdue, floor)  # a little later, with a retention of next to nothing
        report.floor = floor
        doomed = [p for p in await self._session.partitions() if p.end_id <= floor + 1]
        if dry_run:
            leftovers = await self._session.fetch("leftovers")
            report.partitions_dropped = [partition.name for partition in doomed]
            report.partitions_dropped += [row["name"] for row in leftovers]
            dropped_to = max((partition.end_id - 1 for partition in doomed), default=0)
            gone = max(overdue, dropped_to)
            report.messages_deleted = await self._value("count_aged", overdue, dropped_to)
            report.expired_deleted = await self._value("count_expired", gone)
            report.batches_deleted = await self._value("count_batches", overdue)
            report.keys_deleted = await self._value("count_expired_keys")
            report.revocations_deleted = await self._value("count_expired_revocations")
            if self._group_expiry is not None:
                report.memberships_ended = await self._value(
                    "count_stale_memberships", self._group_expiry
                )
            report.receivers_deleted = await self._value("count_stale_receivers", _IDLE_TIME)
            return
        # Before anything goes: whoever still has it to read must be told that it has gone.
        await self._session.fetch("raise_floor", floor)
        for partition in doomed:
            await self._drop(partition.name, report, attached=True, detaching=partition.detaching)
        for row in await self._session.fetch("leftovers"):
            await self._drop(row["name"], report, attached=False)
        report.messages_deleted = await self._in_chunks("delete_aged", overdue)
        report.expired_deleted = await self._in_chunks("delete_expired")
        # Not up to the floor: when a batch was sealed says when its messages will be overdue.
        report.batches_deleted = await self._in_chunks("delete_batches", overdue)
        await self._thin_batches()
        report.keys_deleted = await self._in_chunks("delete_expired_keys")
        report.revocations_deleted = await self._in_chunks("delete_expired_revocations")
        await self._in_chunks("delete_due_rates")
        if self._group_expiry is not None:
            report.memberships_ended = await self._in_chunks(
                "end_stale_memberships", self._group_expiry
            )
        report.receivers_deleted = await self._in_chunks("delete_stale_receivers", _IDLE_TIME)
        await self._in_chunks("delete_old_claims")
        await self._in_chunks("remove_orphans")

    async def _drop(
        self, name: str, report: PruneReport, *, attached: bool, detaching: bool = False
    ) -> None:
        table = in_schema(f"pgchannels.{name}", self._settings.schema_name)
        log = in_schema("pgchannels.messages", self._settings.schema_name)
        # A detach that was interrupted can only be finished (manual, ALTER TABLE).
        how = "finalize" if detaching else "concurrently"
        try:
            await self._session.execute(f"set lock_timeout = '{_LOCK_TIMEOUT}'")
            if attached:
                await self._session.execute(f"alter table {log} detach partition {table} {how}")
            await self._session.execute(f"drop table {table}")
        except DatabaseUnavailable:
            raise
        except DatabaseError as error:
            report.problems.append(f"{name}: {error}")
            logger.warning("partition %s not dropped this time: %s", name, error)
        else:
            report.partitions_dropped.append(name)

    async def _thin_batches(self) -> None:
        """Of batches that are a minute old, keep one a second: that is enough for ``since=``."""
        while True:
            begin = self._thinned_to
            ((self._thinned_to, count),) = await self._session.fetch("thin_batches", begin, _CHUNK)
            logger.debug("%d batches thinned out, up to id %d", count, self._thinned_to)
            if self._thinned_to == begin:
                return

    async def _value(self, query: str, *arguments: object) -> int:
        (row,) = await self._session.fetch(query, *arguments)
        value: int = row[0]
        return value

    async def _in_chunks(self, query: str, *arguments: object) -> int:
        total = 0
        while count := await self._value(query, *arguments, _CHUNK):
            total += count
        return total
