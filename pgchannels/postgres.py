"""The channel layer on PostgreSQL."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Mapping
from datetime import datetime, timedelta
from functools import partial
from typing import Any

import orjson

from pgchannels.channels import check_channel
from pgchannels.control import COMMAND_LIFETIME
from pgchannels.errors import ChannelLayerClosed
from pgchannels.follower import Follower
from pgchannels.layer import (
    ChannelLayer,
    check_limits,
    check_owner,
    check_timeout,
    encode_metadata,
)
from pgchannels.limits import Limits
from pgchannels.messages import Message, Position
from pgchannels.node import Node
from pgchannels.overflow import Overflow
from pgchannels.payloads import DEFAULT, Serializer
from pgchannels.postgres_follower import PostgresFollower, follower_statuses, forget_follower
from pgchannels.rates import Admission, Rate
from pgchannels.records import (
    ConnectionInfo,
    FollowerStatus,
    LogPage,
    Outgoing,
    PresenceBy,
    Present,
    Receipt,
)
from pgchannels.settings import Settings
from pgchannels.stream import Source, Stream
from pgchannels.waiting import LoopLock, belongs_here

__all__ = ["PostgresLayer"]

logger = logging.getLogger("pgchannels.layer")

_NOT_OPEN = (
    "the channel layer is not open: use 'async with layer:', or FastAPI(lifespan=lifespan(layer))"
)


class PostgresLayer(ChannelLayer):
    """A channel layer on PostgreSQL. Nothing opens in the constructor.

    ::

        layer = PostgresLayer("postgresql://…")
        async with layer:
            await layer.send("jobs", {"type": "resize", "id": 7})

    One layer serves one event loop, any number of tasks in it. Create it where you like and open it
    where the loop runs.

    Args:
        settings: a database URL, or :class:`~pgchannels.Settings`; from the environment if None.
        serializer: how payloads become JSON and objects again.
    """

    def __init__(
        self, settings: Settings | str | None = None, *, serializer: Serializer = DEFAULT
    ) -> None:
        if isinstance(settings, str):
            settings = Settings(database_url=settings)
        super().__init__(settings, serializer=serializer)
        self._node: Node | None = None
        self._changing = LoopLock()
        self._stopping: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Connect and start the node's tasks. Opening an open layer does nothing.

        One that was left open in an event loop that has ended is opened again.

        Raises:
            SchemaError: the database has not been migrated, or by a newer version.
            DatabaseUnavailable: the server cannot be reached.
            ConfigurationError: it is open in another event loop.
        """
        async with self._changing.here():
            self._check_loop()
            await self._stopped()
            if self._node is None:
                node = Node(self.settings, self.serializer)
                await node.start()
                self._node = node

    async def close(self) -> None:
        """Finish what is being published, end every stream and task. Again: does nothing.

        Takes a few seconds at most, also while the database is away. Cancelled, it goes on by
        itself, and the next call waits for it.

        Raises:
            ConfigurationError: it is open in another event loop, which has to close it.
        """
        async with self._changing.here():
            self._check_loop()
            self._entered = 0
            node, self._node = self._node, None
            if node is not None:
                self._stopping = asyncio.create_task(node.stop(), name="pgchannels close")
            await self._stopped()

    def _check_loop(self) -> None:
        """Refuse another loop's node, and forget one whose loop has ended."""
        if self._stopping is not None and self._stopping.get_loop().is_closed():
            self._stopping = None
        if self._node is not None and not belongs_here(self._node.loop):
            # Its connections are closed by being collected: nothing can be sent on them.
            logger.warning("the layer was left open in an event loop that has ended")
            self._node = None
            self._entered = 0

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

    async def receive(self, channel: str, *, timeout: float | None = None) -> Message:
        name, timeout = check_channel(channel), check_timeout(timeout)
        return await self._opened.receivers.receive(name, timeout)

    def subscribe(
        self,
        *channels: str,
        after: Position | str | None = None,
        since: datetime | None = None,
        filter: str | None = None,
        member: str | None = None,
        overflow: Overflow | str | None = None,
    ) -> Stream:
        node = self._opened
        return Stream(
            channels,
            after,
            since=since,
            filter=filter,
            overflow=overflow,
            source=node.hub,
            settings=self.settings,
            streams=node.streams,
            member=None if member is None else node.members[check_channel(member)],
        )

    def follow(self, *channels: str, name: str, after: Position | str | None = None) -> Follower:
        node = self._opened
        return PostgresFollower(
            channels=channels,
            name=name,
            after=after,
            store=node.store,
            make_stream=lambda position: Stream(
                channels,
                position,
                source=node.hub,
                settings=self.settings,
                streams=node.streams,
            ),
            settings=self.settings,
            followers=node.followers,
        )

    async def snapshot(self, transaction: Any) -> Position:
        """Let *transaction* see the database as of now, and return the position that fits.

        What it reads from then on is the state after every message up to the position, and before
        every later one. So who is given the state, and then what is published after the position,
        misses nothing and gets nothing twice. To a client, give ``str(position)``::

            async with sessions.begin() as session:
                position = await layer.snapshot(session)
                orders = (await session.scalars(select(Order))).all()
            async with layer.subscribe("orders", after=position) as messages: ...

        The transaction runs in REPEATABLE READ. That can be set before its first query only, so it
        must not have run one. A session that a dependency of the request has used already has: take
        another session for this, or ``await session.commit()`` before. Publishers are not held up;
        what they have committed reaches readers a few round trips later.

        Args:
            transaction: a SQLAlchemy ``AsyncSession``, ``AsyncConnection``, ``Session`` or
                ``Connection``, or an asyncpg connection in a transaction; of this layer's database.
                A synchronous one blocks the event loop for two statements.

        Raises:
            ConfigurationError: it is none of these, or has run a query. Then roll it back.
            DatabaseUnavailable, DatabaseError: roll the transaction back.
            ChannelLayerClosed: the layer is not open.
        """
        # SQLAlchemy's ORM, which a process without it need not load.
        from pgchannels.transactions import adopt_snapshot, begin_repeatable_read

        snapshots, schema = self._opened.snapshots, self.settings.schema_name
        # Connects and begins, so that nothing is held while that takes its time.
        await begin_repeatable_read(transaction, schema)
        return await snapshots.take(partial(adopt_snapshot, transaction, schema))

    async def followers(self) -> list[FollowerStatus]:
        return await follower_statuses(self._opened.store)

    async def forget_follower(self, name: str) -> bool:
        return await forget_follower(self._opened.store, check_channel(name))

    async def new_channel(
        self,
        prefix: str = "channel",
        *,
        user_id: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        limits: Limits | None = None,
    ) -> str:
        return await self._opened.members.new_channel(
            prefix, check_owner(user_id), encode_metadata(metadata), check_limits(limits)
        )

    async def update_channel(
        self,
        channel: str,
        *,
        user_id: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        limits: Limits | None = None,
    ) -> None:
        await self._opened.members.update_channel(
            check_channel(channel),
            check_owner(user_id),
            encode_metadata(metadata),
            check_limits(limits),
        )

    async def delete_channel(self, channel: str) -> None:
        await self._opened.members.delete_channel(check_channel(channel))

    async def group_members(self, group: str) -> list[str]:
        rows = await self._opened.store.fetch("group_members", check_channel(group))
        return [row["channel"] for row in rows]

    async def presence(self, group: str) -> list[Present]:
        rows = await self._opened.store.fetch("presence", check_channel(group))
        return [
            Present(
                user_id=row["user_id"],
                connection=row["channel"] if row["presence"] == "connection" else None,
                connections=row["connections"],
                # Not by the serializer: that is for payloads, and has not written this.
                metadata=orjson.loads(row["metadata"]) if row["metadata"] else None,
                joined_at=row["joined_at"],
            )
            for row in rows
        ]

    def wake(self) -> None:
        """Something was committed to the outbox: sequence it. From any thread; never raises."""
        node = self._node
        if node is not None:
            node.wake()

    def _publish(self, message: Outgoing) -> Awaitable[Receipt]:
        return self._opened.publisher.publish(message)

    def _publish_ephemeral(self, message: Outgoing) -> Awaitable[None]:
        return self._opened.publisher.publish_ephemeral(message)

    async def _read_history(
        self, channel: str, *, after: int, before: int, newest_first: bool, limit: int
    ) -> LogPage:
        store = self._opened.store
        if newest_first:
            return await store.read_backwards(channel, before, after, limit)
        return await store.read_channels([channel], after, limit=limit)

    async def _position_before(self, time: datetime) -> Position:
        return await self._opened.hub.position_before(time)

    async def _change_membership(
        self,
        group: str,
        channel: str,
        *,
        adding: bool,
        presence: PresenceBy | None,
        limit: int | None = None,
    ) -> None:
        await self._opened.members.change_membership(
            group, channel, adding=adding, presence=presence, limit=limit
        )

    async def _connections(
        self, user_id: str | None, after: str | None, limit: int
    ) -> list[ConnectionInfo]:
        store = self._opened.store
        if user_id is None:
            rows = await store.fetch("connections", after or "", limit)
        else:
            rows = await store.fetch("connections_of_user", after or "", limit, user_id)
        return [
            ConnectionInfo(
                channel=row["name"],
                node=row["node"],
                host=row["host"],
                user_id=row["user_id"],
                metadata=self.serializer.loads(row["metadata"]) if row["metadata"] else None,
                connected_at=row["created_at"],
            )
            for row in rows
        ]

    async def _count_connections(self, user_id: str | None) -> int:
        store = self._opened.store
        if user_id is None:
            (row,) = await store.fetch("count_connections")
        else:
            (row,) = await store.fetch("count_connections_of_user", user_id)
        count: int = row["count"]
        return count

    async def _revoke(
        self, revoked: list[tuple[str, str]], keep: timedelta, commands: list[Outgoing]
    ) -> None:
        node = self._opened
        kinds, values = zip(*revoked, strict=True)
        payloads = [command.payload for command in commands]
        await node.store.fetch("revoke", kinds, values, keep, payloads, COMMAND_LIFETIME)
        node.wake()

    async def _is_revoked(self, values: Mapping[str, str], issued_at: datetime | None) -> bool:
        (row,) = await self._opened.store.fetch(
            "is_revoked", values.get("token"), values.get("user"), issued_at
        )
        found: bool = row["is_revoked"]
        return found

    async def _take(self, key: str, rate: Rate, cost: int) -> Admission:
        return await self._opened.rates.take(key, rate, cost)

    @property
    def _source(self) -> Source:
        return self._opened.hub

    @property
    def _opened(self) -> Node:
        if self._node is None:
            raise ChannelLayerClosed(_NOT_OPEN)
        if not belongs_here(self._node.loop):
            raise ChannelLayerClosed(_NOT_OPEN)
        return self._node
