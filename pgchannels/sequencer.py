"""Moves what has been committed to the outbox into the log, and tells the nodes.

Every node runs one. Each batch is exclusive by a lock inside ``seal()``, so any number of them may
be at it. A node's sequencer works when its own process has published; the one that holds the lease
also looks often, and when it is asked to, for publishers that are no nodes (psql, Celery, another
language).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from pgchannels.backoff import Backoff
from pgchannels.errors import DatabaseError, DatabaseUnavailable
from pgchannels.sealer import Sealer
from pgchannels.waiting import set_within

if TYPE_CHECKING:
    from pgchannels.leases import Lease
    from pgchannels.settings import Settings
    from pgchannels.store import Session

__all__ = ["Sequencer"]

logger = logging.getLogger("pgchannels.sequencer")

# Seconds to rest after having been asked to look, in vain.
_AFTER_VAIN_LOOK = 0.05


class Sequencer:
    """``run()`` is its whole life; cancelling it ends it, between or in the middle of batches.

    Args:
        settings: how much at a time, how often to look.
        session: a connection of its own.
        lease: whoever holds it polls.
        sealed: called with the new head of the log after each batch; this node need not wait for
            its own notification.
    """

    def __init__(
        self,
        settings: Settings,
        session: Session,
        lease: Lease,
        *,
        sealed: Callable[[int], None],
    ) -> None:
        self._settings = settings
        self._session = session
        self._sealer = Sealer(settings, session, sealed=sealed)
        self._lease = lease
        self._wakeup = asyncio.Event()
        self._polls = False
        self._asked = False
        # While it looks, and rests after a look in vain, whoever asks must wait.
        self._resting = False

    async def open(self) -> None:
        """Try the connection, so that a URL which nothing can come of is found at the start."""
        try:
            await self._session.head()
        except DatabaseUnavailable as error:
            logger.warning("nothing is sequenced until this works: %s", error)

    def wake(self) -> None:
        """Something was published. From the event loop's thread only."""
        self._wakeup.set()

    def asked(self) -> None:
        """Somebody says that something was published. From the event loop's thread only.

        Anyone can say so. Only the one that polls looks, and after a look in vain it first rests:
        a flood of this costs no more than polling every 50 ms does.
        """
        if self._polls:
            self._asked = True
            if not self._resting:
                self._wakeup.set()

    async def run(self) -> None:
        """Seal whenever woken, and by the clock."""
        backoff = Backoff()
        while True:
            try:
                self._polls = await self._lease.held()
                # The others look now and then, lest all wait for a lease to run out whose holder
                # has died.
                settings = self._settings
                await self._woken_within(
                    settings.outbox_poll_interval if self._polls else settings.poll_interval
                )
                self._wakeup.clear()
                asked, self._asked = self._asked, False
                self._resting = True
                moved = await self.run_once()
                self._resting = asked and not moved
                backoff.reset()
            except DatabaseError as error:
                delay = backoff.next()
                logger.log(error.level, "cannot sequence, retry in %.1f s: %s", delay, error)
                await asyncio.sleep(delay)
                self._wakeup.set()

    async def _woken_within(self, seconds: float) -> None:
        """Wait for a reason to look, or for so many seconds."""
        if self._resting:
            # What is asked meanwhile is not lost, only late. What this process publishes is not.
            rest = min(_AFTER_VAIN_LOOK, seconds)
            await set_within(self._wakeup, rest)
            self._resting = False
            seconds -= rest
        if not self._asked:
            await set_within(self._wakeup, seconds)

    async def run_once(self) -> int:
        """Seal until the outbox has been emptied; return how many messages were moved."""
        return await self._sealer.drain()

    async def close(self) -> None:
        """Let another node poll."""
        await self._lease.release()
        await self._session.close()
