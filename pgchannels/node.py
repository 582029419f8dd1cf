"""What a layer on PostgreSQL has while it is open: connections, services and their tasks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING
from uuid import uuid4

from pgchannels.backoff import Backoff
from pgchannels.ephemeral import Ephemeral
from pgchannels.errors import ChannelLayerClosed, UnknownPosition
from pgchannels.hub import Hub
from pgchannels.leases import Lease
from pgchannels.listener import Listener
from pgchannels.members import Members
from pgchannels.messages import Position
from pgchannels.postgres_follower import PostgresFollower
from pgchannels.pruner import Pruner
from pgchannels.publisher import Publisher
from pgchannels.receivers import Receivers
from pgchannels.sequencer import Sequencer
from pgchannels.shared_rates import SharedRates
from pgchannels.snapshots import Snapshots
from pgchannels.store import Session, Store
from pgchannels.stream import Stream

if TYPE_CHECKING:
    from pgchannels.payloads import Serializer
    from pgchannels.settings import Settings

__all__ = ["Node"]

logger = logging.getLogger("pgchannels")

# Seconds after which a service that fails had been running well.
_GOOD_TIME = 60.0


class Node:
    """Starts the services and ends them, and starts one again that fails unexpectedly.

    Args:
        settings: of the layer.
        serializer: of the layer.
    """

    def __init__(self, settings: Settings, serializer: Serializer) -> None:
        id = uuid4()
        self.loop = asyncio.get_running_loop()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.streams: set[Stream] = set()
        self.followers: set[PostgresFollower] = set()
        self.store = Store(settings, serializer)
        # Sessions on dsn, not by way of listen_url: when that is dead, these must go on.
        self.hub = Hub(
            settings,
            Session(settings, "hub", dsn=settings.dsn, serializer=serializer),
            self.store,
            on_rewritten=self._end_streams_after,
        )
        sequencing = Session(settings, "sequencer")
        self._sequencer = Sequencer(
            settings,
            sequencing,
            Lease(sequencing, "sequencer", id, settings.lease_time),
            sealed=self.hub.reached,
        )
        pruning = Session(settings, "pruner")
        # It works only now and then, and keeps the lease in between.
        pruning_time = max(settings.lease_time, 2 * settings.prune_interval)
        self._pruner = Pruner(settings, pruning, Lease(pruning, "pruner", id, pruning_time))
        self.snapshots = Snapshots(
            settings, Session(settings, "snapshots"), sealed=self.hub.reached
        )
        self.publisher = Publisher(settings, self.store, self._sequencer.wake)
        self.receivers = Receivers(
            settings,
            Session(settings, "receivers", dsn=settings.dsn, serializer=serializer),
            self.hub,
            self._sequencer.wake,
        )
        self.members = Members(
            settings,
            Session(settings, "members", dsn=settings.dsn),
            self.store,
            self.hub,
            self.receivers,
            self._sequencer.wake,
        )
        self.rates = SharedRates(self.store)
        self._ephemeral = Ephemeral(self.store, self.hub)
        self.listener = Listener(
            settings,
            self.store,
            on_hint=self._hint,
            on_connected=self.hub.connected,
            on_disconnected=self.hub.disconnected,
        )

    async def start(self) -> None:
        try:
            await self.store.open()
            await self.hub.open()
            await self._sequencer.open()
            await self.members.open()
        except BaseException:
            await self.stop()
            raise
        services: dict[str, Callable[[], Awaitable[None]]] = {
            "listener": self.listener.run,
            "hub": self.hub.run,
            "sequencer": self._sequencer.run,
            "members": self.members.run,
            "receivers": self.receivers.run,
            "ephemeral": self._ephemeral.run,
        }
        if self.store.is_maintainer:
            services["pruner"] = self._pruner.run
        for name, run in services.items():
            self._tasks[name] = asyncio.create_task(
                _supervise(name, run), name=f"pgchannels {name}"
            )

    async def stop(self) -> None:
        self.receivers.refuse()
        self.hub.refuse()
        # Publishers first: what they have committed, any node will sequence. What was received and
        # not taken goes back before the task is ended that does it.
        await asyncio.gather(
            self.publisher.close(),
            self.rates.close(),
            self.receivers.close(),
            *(follower.close() for follower in list(self.followers)),
        )
        await self._end("members")
        await self.members.close()
        await self._end(*self._tasks)
        for stream in list(self.streams):
            stream.close(ChannelLayerClosed("the channel layer has been closed"))
        await asyncio.gather(
            self._sequencer.close(),
            self._pruner.close(),
            self.receivers.disconnect(),
            self.snapshots.close(),
        )
        await self.store.close()
        await self.hub.close()

    async def _end(self, *services: str) -> None:
        tasks = [task for name in services if (task := self._tasks.pop(name, None)) is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def wake(self) -> None:
        """Something was committed to the outbox: sequence it. From any thread; never raises."""
        try:
            self.loop.call_soon_threadsafe(self._sequencer.wake)
        except RuntimeError:
            logger.debug("the event loop is closed; another node will sequence")

    def _hint(self, payload: str) -> None:
        if not payload:
            self._sequencer.asked()
        elif not self._ephemeral.hint(payload):
            self.hub.hint(payload)

    def _end_streams_after(self, reached: Position) -> None:
        for stream in list(self.streams):
            stream.close(UnknownPosition(reached))
        self.members.missed()


async def _supervise(name: str, run: Callable[[], Awaitable[None]]) -> None:
    """Run a service for ever. What it does not handle itself is logged, and it is started again."""
    backoff = Backoff(base=0.5, cap=30.0)
    loop = asyncio.get_running_loop()
    while True:
        started = loop.time()
        try:
            await run()
        except Exception:
            if loop.time() - started > _GOOD_TIME:
                backoff.reset()
            delay = backoff.next()
            logger.exception("the %s failed; it is started again in %.1f s", name, delay)
            await asyncio.sleep(delay)
