"""The channel layer: what an application opens, publishes through and reads from.

It owns the tasks of a node (listener, hub, sequencer, pruner), starts them, ends them, and starts
one again that fails in a way nobody thought of.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, Literal, Self
from uuid import uuid4

from pgchannels.backoff import Backoff
from pgchannels.errors import ChannelLayerClosed, ConfigurationError, UnknownPosition
from pgchannels.hub import Hub
from pgchannels.leases import Lease
from pgchannels.listener import Listener
from pgchannels.messages import (
    BEGINNING,
    Message,
    Position,
    check_channel,
    check_ttl,
    encode_payload,
)
from pgchannels.pruner import Pruner
from pgchannels.publisher import Publisher
from pgchannels.sequencer import Sequencer
from pgchannels.settings import Settings
from pgchannels.store import Head, Outgoing, Session, Store
from pgchannels.stream import Stream

__all__ = ["HistoryPage", "PostgresLayer"]

logger = logging.getLogger("pgchannels")

MAX_HISTORY = 1000

_NOT_OPEN = (
    "the channel layer is not open: use 'async with layer:', or FastAPI(lifespan=lifespan(layer))"
)


@dataclass(frozen=True)
class HistoryPage:
    """A part of a channel's history, in the order that was asked for."""

    messages: list[Message]
    next: Position | None
    """Where more begins: ``after=`` it, or ``before=`` it if newest first. None: no more."""
    position: Position
    """The end of the log when this was read. To go on live from the newest page without a gap or a
    repeat, subscribe after this."""
    truncated: bool
    """Retention may have removed messages that were asked for."""


class PostgresLayer:
    """A channel layer on PostgreSQL. Nothing opens in the constructor.

    ::

        layer = PostgresLayer("postgresql://…")
        async with layer:
            await layer.send("jobs", {"type": "resize", "id": 7})

    One layer serves one event loop, any number of tasks in it. Create it where you like and open it
    where the loop runs.

    Args:
        settings: a database URL, or :class:`~pgchannels.Settings`; from the environment if None.
    """

    def __init__(self, settings: Settings | str | None = None) -> None:
        if isinstance(settings, str):
            settings = Settings(database_url=settings)
        self.settings = settings or Settings()
        self._node: _Node | None = None
        self._changing = asyncio.Lock()
        self._stopping: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def open(self) -> None:
        """Connect and start the node's tasks. Opening an open layer does nothing.

        Raises:
            SchemaError: the database has not been migrated, or by a newer version.
            DatabaseUnavailable: the server cannot be reached.
        """
        async with self._changing:
            await self._stopped()
            if self._node is None:
                node = _Node(self.settings)
                await node.start()
                self._node = node

    async def close(self) -> None:
        """Finish what is being published, end every stream and task. Again: does nothing.

        Takes a few seconds at most, also while the database is away. Cancelled, it goes on by
        itself, and the next call waits for it.
        """
        async with self._changing:
            node, self._node = self._node, None
            if node is not None:
                self._stopping = asyncio.create_task(node.stop(), name="pgchannels close")
            await self._stopped()

    async def _stopped(self) -> None:
        stopping = self._stopping
        if stopping is None:
            return
        try:
            if not stopping.done():
                await asyncio.shield(stopping)
        finally:
            if stopping.done():
                self._stopping = None

    @property
    def is_listening(self) -> bool:
        """Whether notifications come in. While they do not, messages are found by polling."""
        return self._node is not None and self._node.listener.healthy

    async def send(
        self, channel: str, payload: Any, *, ttl: float | timedelta | None = None
    ) -> None:
        """Publish a message; return when it is committed.

        It is ordered after everything that was committed before the call. To publish in a
        transaction of your own, see :mod:`pgchannels.orm`.

        Args:
            channel: see :func:`pgchannels.messages.check_channel`.
            payload: a mapping, see :func:`pgchannels.messages.encode_payload`.
            ttl: how long it can be read, in seconds; by default as long as it is retained.

        Raises:
            InvalidMessage: for a bad channel, payload or ttl. Nothing was written.
            DatabaseUnavailable: the message may or may not have been published.
            ChannelLayerClosed: the layer is not open.
        """
        message = Outgoing(
            check_channel(channel),
            encode_payload(payload, max_size=self.settings.max_message_size),
            check_ttl(ttl),
        )
        await self._opened.publisher.publish(message)

    async def group_send(
        self, group: str, payload: Any, *, ttl: float | timedelta | None = None
    ) -> None:
        """Publish to a group: one stored message, whoever many receive it. The same as ``send``."""
        await self.send(group, payload, ttl=ttl)

    def subscribe(self, *channels: str, after: Position | str | None = None) -> Stream:
        """Read channels: everything after a position, then live. See :class:`Stream`.

        Args:
            channels: any number; ``Stream.join`` adds more.
            after: a message's position; ``"0"`` for all that is retained; None for from now on.

        Raises:
            InvalidChannel, InvalidPosition: at once.
            UnknownPosition: on entering, for a position that this log has never reached.
        """
        node = self._opened
        return Stream(
            channels,
            after,
            hub=node.hub,
            store=node.store,
            settings=self.settings,
            streams=node.streams,
        )

    async def history(
        self,
        channel: str,
        *,
        after: Position | str | None = None,
        before: Position | str | None = None,
        order: Literal["asc", "desc"] = "asc",
        limit: int = 50,
    ) -> HistoryPage:
        """Read a page of what a channel retains.

        Args:
            channel: one channel.
            after: messages after this position only.
            before: messages before this position only.
            order: ``"asc"``, oldest first, or ``"desc"``, newest first.
            limit: 1 to 1000 messages; fewer come if they are very large.

        Raises:
            InvalidChannel, InvalidPosition, ValueError: for bad arguments.
            UnknownPosition: a position that this log has never reached.
        """
        check_channel(channel)
        if order not in ("asc", "desc"):
            raise ValueError(f"order must be 'asc' or 'desc', not {order!r}")
        if not 1 <= limit <= MAX_HISTORY:
            raise ValueError(f"limit must be 1 to {MAX_HISTORY}, not {limit}")
        low = BEGINNING if after is None else Position.parse(after)
        high = None if before is None else Position.parse(before)
        store = self._opened.store
        end = 2**63 - 1 if high is None else high.id
        # One more than asked for tells whether there is a next page.
        if order == "asc":
            page = await store.read_channels([channel], low.id, limit=limit + 1)
        else:
            page = await store.read_backwards(channel, end, low.id, limit + 1)
        for position in (low, high):
            _check_known(position, page.head)
        messages = [message for message in page.messages if message.id < end]
        more = page.full and len(messages) == len(page.messages)
        messages = messages[:limit]
        return HistoryPage(
            messages=messages,
            next=messages[-1].position if more and messages else None,
            position=Position(page.head.epoch, page.head.id),
            truncated=(low != BEGINNING and low.id < page.head.floor)
            or (high not in (None, BEGINNING) and end <= page.head.floor),
        )

    def wake(self) -> None:
        """Something was committed to the outbox: sequence it. From any thread; never raises."""
        node = self._node
        if node is not None:
            node.wake()

    @property
    def _opened(self) -> _Node:
        if self._node is None:
            raise ChannelLayerClosed(_NOT_OPEN)
        if self._node.loop is not asyncio.get_running_loop():
            raise ConfigurationError(
                "this layer was opened in another event loop; each loop needs a layer of its own"
            )
        return self._node


def _check_known(position: Position | None, head: Head) -> None:
    if position is None or position == BEGINNING:
        return
    if position.epoch != head.epoch or position.id > head.id:
        raise UnknownPosition(position)


class _Node:
    """What a layer has while it is open."""

    def __init__(self, settings: Settings) -> None:
        id = uuid4()
        self.loop = asyncio.get_running_loop()
        self._tasks: list[asyncio.Task[None]] = []
        self.streams: set[Stream] = set()
        self.store = Store(settings)
        # Not by way of listen_url: when that is dead, polling must go on.
        self.hub = Hub(
            settings,
            Session(settings, "hub", dsn=settings.dsn),
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
        self.publisher = Publisher(self.store, self._sequencer.wake)
        self.listener = Listener(
            settings,
            self.store,
            on_hint=self.hub.hint,
            on_connected=self.hub.connected,
            on_disconnected=self.hub.disconnected,
        )

    async def start(self) -> None:
        try:
            await self.store.open()
            await self.hub.open()
            await self._sequencer.open()
        except BaseException:
            await self.stop()
            raise
        for name, run in (
            ("listener", self.listener.run),
            ("hub", self.hub.run),
            ("sequencer", self._sequencer.run),
            ("pruner", self._pruner.run),
        ):
            self._tasks.append(
                asyncio.create_task(_supervise(name, run), name=f"pgchannels {name}")
            )

    async def stop(self) -> None:
        self.hub.refuse()
        # Publishers first: what they have committed, any node will sequence.
        await self.publisher.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for stream in list(self.streams):
            stream.close(ChannelLayerClosed("the channel layer has been closed"))
        await asyncio.gather(self._sequencer.close(), self._pruner.close())
        await self.store.close()
        await self.hub.close()

    def _end_streams_after(self, reached: Position) -> None:
        for stream in list(self.streams):
            stream.close(UnknownPosition(reached))

    def wake(self) -> None:
        try:
            self.loop.call_soon_threadsafe(self._sequencer.wake)
        except RuntimeError:
            logger.debug("the event loop is closed; another node will sequence")


async def _supervise(name: str, run: Callable[[], Awaitable[None]]) -> None:
    """Run a service for ever. What it does not handle itself is logged, and it is started again."""
    backoff = Backoff(base=0.5, cap=30.0)
    while True:
        try:
            await run()
        except Exception:
            delay = backoff.next()
            logger.exception("the %s failed; it is started again in %.1f s", name, delay)
            await asyncio.sleep(delay)
