"""Executes the queries of ``sql/queries.sql``; nothing else does.

A :class:`Store` runs them on a pool, a :class:`Session` on one connection of its own, remade when
it breaks: the hub and the sequencer each have one, so that no crowd at the pool delays them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

import asyncpg

from pgchannels.backoff import Backoff
from pgchannels.connections import UNAVAILABLE, connect, create_pool, driver_errors
from pgchannels.errors import (
    ChannelLayerClosed,
    ConfigurationError,
    DatabaseError,
)
from pgchannels.messages import Message, Position
from pgchannels.payloads import DEFAULT, Serializer
from pgchannels.records import NOTHING_SEEN, Head, LogPage, Outgoing, Seen, flatten
from pgchannels.schema import REVISIONS, check_revision
from pgchannels.sql import load_queries

if TYPE_CHECKING:
    from asyncpg import Connection, Pool, Record

    from pgchannels.settings import Settings

__all__ = ["Batch", "Claim", "Claims", "Partition", "Session", "Store"]

logger = logging.getLogger("pgchannels.store")

# Seconds that a connection may take to say goodbye.
_CLOSING_TIME = 2.0

# How often the limit of messages is tried to be raised, and gives up its wait for the outbox.
_TRIES = 4
_LOCK_NOT_AVAILABLE = "55P03"

# Seconds that the server may take to confirm that it has cancelled a statement.
_CANCELLING_TIME = 1.0


class Partition(NamedTuple):
    """A partition of the log: ids from *first_id* up to, not including, *end_id*."""

    name: str
    detaching: bool
    first_id: int
    end_id: int


class Batch(NamedTuple):
    """What a batch of the sequencer moved."""

    sealed: int
    """How many messages."""
    head: int
    """The id of the newest message in the log."""
    stopped: bool
    """Whether it stopped at a limit, and left messages for the next batch."""


class Claim(NamedTuple):
    """The messages that a claim has taken for a channel, and the state of the channel."""

    is_known: bool
    """False: the channel has no row yet, so nothing can be claimed."""
    groups: list[str]
    """Those that it is a member of."""
    may_have_more: bool
    """The claim has not looked at all of the channel's messages: ask again."""
    passed_by: int
    """How many messages it has looked at that are for others."""
    messages: list[Message]


class Claims(NamedTuple):
    """What a claim gave."""

    channels: dict[str, Claim]
    may_claim: bool
    """False: whoever claims has no row yet."""
    incomplete: bool
    """Not all of the log could be looked at: ask again."""


class Queries:
    """What can be asked, whatever it runs on."""

    def __init__(self, settings: Settings, serializer: Serializer = DEFAULT) -> None:
        self._settings = settings
        self._serializer = serializer
        self._sql = load_queries(settings.schema_name)
        # As an earlier answer has told: ids below this have had their partition since before now.
        self._partitioned_to = 0

    async def fetch(self, name: str, *arguments: Any) -> list[Record]:
        """Run the query *name*."""
        return await self._fetch(self._sql[name], arguments)

    async def _fetch(self, sql: str, arguments: Sequence[Any]) -> list[Record]:
        raise NotImplementedError

    async def head(self) -> Head:
        (row,) = await self.fetch("head")
        return Head(*row)

    async def head_after(self, seen: Seen) -> tuple[Head, int | None]:
        """The end of the log, and the newest batch's mark; None if the log lacks the one seen."""
        (row,) = await self.fetch("head_after", *seen)
        return Head(*row[:3]), row[3]

    async def insert(self, messages: Sequence[Outgoing]) -> list[datetime]:
        """Publish, in one transaction and in this order; return when each was published.

        For messages without attachments and keys.
        """
        channels, payloads, ttls, headers, _, _ = zip(*messages, strict=True)
        rows = await self.fetch("insert", channels, payloads, ttls, headers)
        return [row[0] for row in rows]

    async def insert_checked(
        self, messages: Sequence[Outgoing]
    ) -> list[tuple[datetime | None, bool]]:
        """Publish what may have attachments and keys, where the channel has room.

        Return for each when it was published, None if there is no room; and whether it is new.
        """
        channels, payloads, ttls, headers, _, keys = zip(*messages, strict=True)
        firsts, lasts, attachments = flatten(messages)
        settings = self._settings
        rows = await self.fetch(
            "insert_checked",
            *(channels, payloads, ttls, headers, firsts, lasts, attachments, keys),
            settings.key_lifetime,
            settings.capacity,
        )
        return [(row["created_at"], row["is_new"]) for row in rows]

    async def insert_ephemeral(self, messages: Sequence[Outgoing]) -> None:
        """Put messages where nodes read them at once, and tell the nodes."""
        channels, payloads, _, headers, _, _ = zip(*messages, strict=True)
        firsts, lasts, attachments = flatten(messages)
        schema = self._settings.schema_name
        await self.fetch(
            "insert_ephemeral", channels, payloads, headers, firsts, lasts, attachments, schema
        )

    async def read_ephemeral(
        self, first: int, last: int, limit: int, reached: Position
    ) -> list[tuple[int, Message]]:
        """The ephemeral messages with these ids, as having come after *reached*."""
        rows = await self.fetch("read_ephemeral", first, last, limit)
        return [(row[0], self._ephemeral(row, reached)) for row in rows]

    def _ephemeral(self, row: Record, reached: Position) -> Message:
        _, channel, payload, created_at, size, headers, attachments = row
        return Message(
            *(reached.id, channel, payload, created_at, size, reached.epoch, headers, attachments),
            serializer=self._serializer,
            ephemeral=True,
        )

    async def claim(
        self, wanted: dict[str, tuple[int, int]], *, claimant: UUID, token: int
    ) -> Claims:
        """Take up to so many messages for each channel.

        Args:
            wanted: by channel how many to take, one at least, and at how many to look for that.
                Nothing: only to learn what an earlier one with this number has taken.
            claimant: who asks.
            token: the number of this claim; one that was made before gives the same again, for
                the channels that were named then.
        """
        known = self._partitioned_to
        counts = [count for count, _ in wanted.values()]
        looking = [count for _, count in wanted.values()]
        rows = await self.fetch(
            "claim",
            *(list(wanted), counts, looking, claimant, token, known),
            self._settings.page_bytes,
        )
        if not rows:  # it asked for nothing, and had not been made before
            return Claims({}, may_claim=True, incomplete=False)
        messages: dict[int, Message] = {}
        for row in rows:
            epoch, id = row["epoch"], row["id"]
            if id is not None:
                channel, payload, created_at, size, headers, attachments = row[11:]
                messages[id] = Message(
                    *(id, channel, payload, created_at, size, epoch, headers, attachments),
                    serializer=self._serializer,
                )
        channels: dict[str, Claim] = {}
        for row in rows:
            name, is_known, groups, may_have_more, passed_by, ids = row[4:10]
            if name is not None:
                # Each receiver's own. One that is gone since was claimed before, and pruned.
                own = [messages[id].own() for id in ids if id in messages]
                channels[name] = Claim(is_known, groups, may_have_more, passed_by, own)
        head, _, partitioned_to, may_claim = rows[0][:4]
        self._partitioned_to = partitioned_to
        return Claims(channels, may_claim, head >= known)

    async def seal(self, max_messages: int, max_bytes: int) -> Batch:
        """Move one batch into the log, and notify the nodes.

        The notification has a transaction of its own. If it fails, this raises although the batch
        has been committed.
        """
        (row,) = await self.fetch("seal", max_messages, max_bytes, self._settings.schema_name)
        return Batch(*row)

    async def seal_only(self, max_messages: int, max_bytes: int) -> Batch:
        """Move one batch into the log, and notify nobody."""
        (row,) = await self.fetch("seal_only", max_messages, max_bytes)
        return Batch(*row)

    async def notify(self, channel: str, payload: str) -> None:
        await self.fetch("notify", channel, payload)

    async def read_channels(
        self,
        channels: Sequence[str],
        after: int,
        *,
        limit: int | None = None,
        size: int | None = None,
        seen: Seen = NOTHING_SEEN,
    ) -> LogPage:
        """The messages of *channels* with ids above *after*, oldest first.

        Up to *limit* messages, of *size* bytes or one more; the page's of the settings if None.
        """
        limit = limit or self._settings.page_size
        size = min(size or self._settings.page_bytes, self._settings.page_bytes)
        return await self._read("read_channels", channels, after, limit=limit, size=size, seen=seen)

    async def read_backwards(self, channel: str, before: int, after: int, limit: int) -> LogPage:
        """The messages of *channel* with ids between *after* and *before*, newest first."""
        size = self._settings.page_bytes
        return await self._read(
            "read_channel_backwards", channel, before, after, limit=limit, size=size
        )

    async def read_log(self, after: int, *, seen: Seen = NOTHING_SEEN) -> LogPage:
        """The messages of all channels with ids above *after*, oldest first."""
        limit, size = self._settings.page_size, self._settings.page_bytes
        return await self._read("read_log", after, limit=limit, size=size, seen=seen)

    async def _read(
        self, query: str, *arguments: Any, limit: int, size: int, seen: Seen = NOTHING_SEEN
    ) -> LogPage:
        while True:
            # A statement is planned before it takes its snapshot. If in between a partition is
            # attached and filled, the snapshot's head lies in a partition that the plan lacks, and
            # the page has a hole. So a head counts only if the partition that it lies in was known
            # of before the statement was sent; else, once more.
            known = self._partitioned_to
            rows = await self.fetch(query, *arguments, limit, size, *seen)
            head, epoch, floor, partitioned_to, mark = rows[0][:5]
            # Lower than before: the log has been rewritten, or an older answer came later.
            self._partitioned_to = partitioned_to
            if head < known:
                break
        messages = [
            Message(
                *(row[6], row[7], row[8], row[9], row[10], epoch, row[11], row[12]),
                serializer=self._serializer,
            )
            for row in rows
            if row[5]  # not if its time is over, or if there is no message at all
        ]
        last = rows[-1][6]
        found = 0 if last is None else len(rows)
        full = found == limit or (found > 0 and sum(row[10] for row in rows) >= size)
        return LogPage(messages, Head(head, epoch, floor), full, last, mark)


class Store(Queries):
    """Queries on a pool of connections."""

    def __init__(self, settings: Settings, serializer: Serializer = DEFAULT) -> None:
        super().__init__(settings, serializer)
        self._pool: Pool | None = None
        # Pages can take long, and any number of clients ask for them. They leave two connections to
        # those who publish and those who come in.
        self._readers = asyncio.Semaphore(max(1, settings.pool_size - 2))
        self.is_maintainer = False
        """Whether we may act as the schema's owner, and so drop partitions. Known when open."""

    async def open(self) -> None:
        """Connect, and look whether the schema is the one that this code works on.

        Raises:
            SchemaError: it is not.
            ConfigurationError: the role that we connect with may not act as the schema's owner.
            DatabaseUnavailable: no connection.
        """
        pool = create_pool(
            self._settings.dsn,
            size=self._settings.pool_size,
            connect_timeout=self._settings.connect_timeout,
            command_timeout=self._settings.command_timeout,
            pooled=self._settings.is_pooled,
        )
        with driver_errors():
            self._pool = await pool
        try:
            await self._check_schema()
        except BaseException:
            await self.close()
            raise

    async def _read(
        self, query: str, *arguments: Any, limit: int, size: int, seen: Seen = NOTHING_SEEN
    ) -> LogPage:
        async with self._readers:
            return await super()._read(query, *arguments, limit=limit, size=size, seen=seen)

    async def close(self) -> None:
        """Close the pool; what is still under way after a moment is cut off."""
        pool, self._pool = self._pool, None
        if pool is None:
            return
        try:
            async with asyncio.timeout(_CLOSING_TIME):
                await pool.close()
        except (TimeoutError, OSError, asyncpg.InterfaceError, asyncpg.PostgresError):
            pool.terminate()

    async def _check_schema(self) -> None:
        schema = self._settings.schema_name
        try:
            rows = await self.fetch("revision")
        except DatabaseError as error:
            # undefined_table, also where the schema is missing; invalid_schema_name
            if error.sqlstate in ("42P01", "3F000"):
                rows = []
            elif error.sqlstate == "42501":  # insufficient_privilege
                raise _no_node(schema) from error
            else:
                raise
        found = rows[0][0] if rows else None
        works_from = None
        if found is not None and found not in REVISIONS:
            works_from = await self._works_from()
        check_revision(schema, found, works_from)
        (row,) = await self.fetch("owner")
        if not row["is_node"]:
            raise _no_node(schema, row["we"], row["owner"])
        self.is_maintainer = row["is_ours"]
        if not self.is_maintainer:
            logger.info(
                "role %s is no maintainer of schema %s: this node does not prune", row["we"], schema
            )
        await self._raise_limit(row["owner"])

    async def _raise_limit(self, owner: str) -> None:
        """Let the database take messages that are as large as our settings allow.

        It is never lowered: another process may be set up for larger ones.
        """
        wanted = self._settings.max_message_size
        ((limit,),) = await self.fetch("max_message_size")
        if limit >= wanted:
            return
        statement = f"select {self._settings.schema_name}.limit_messages({wanted})"
        if not self.is_maintainer:
            raise ConfigurationError(
                f"max_message_size is {wanted}, but the database takes messages of up to {limit} "
                f"bytes. Role {owner!r}, who owns the schema, can raise that: {statement}"
            )
        backoff = Backoff(base=0.1, cap=1.0)
        for _ in range(_TRIES):
            try:
                await self.fetch("limit_messages", wanted)
            except DatabaseError as error:
                if error.sqlstate != _LOCK_NOT_AVAILABLE:
                    raise
                await asyncio.sleep(backoff.next())
            else:
                return
        logger.warning(
            "messages of more than %d bytes are refused until this has been run, for which now a "
            "transaction that has published is in the way: %s",
            limit,
            statement,
        )

    async def _works_from(self) -> str | None:
        try:
            (row,) = await self.fetch("works_from")
        except DatabaseError as error:
            if error.sqlstate == "42703":  # undefined_column
                return None
            raise
        value: str = row[0]
        return value

    async def _fetch(self, sql: str, arguments: Sequence[Any]) -> list[Record]:
        pool = self._pool
        if pool is None:
            raise ChannelLayerClosed
        with driver_errors():
            connection = await pool.acquire()
            # Released once in any case: who cancels again while it is must find it under way.
            try:
                rows: list[Record] = await connection.fetch(sql, *arguments)
            except (asyncio.CancelledError, TimeoutError):
                # asyncpg asks the server to cancel the statement. Terminating the connection at
                # once would stop it from asking, and the statement would go on; a server that has
                # gone silent must not hold us up.
                with suppress(TimeoutError, OSError, asyncpg.InterfaceError, asyncpg.PostgresError):
                    await pool.release(connection, timeout=_CANCELLING_TIME)
                raise
            except BaseException as error:
                if isinstance(error, UNAVAILABLE):
                    connection.terminate()  # or the pool would lend it out again
                await pool.release(connection)
                raise
            await pool.release(connection)
        return rows


def _no_node(schema: str, role: str = "ROLE", owner: str = "its owner") -> ConfigurationError:
    option = "" if schema == "pgchannels" else f" --schema {schema}"
    return ConfigurationError(
        f"the role that we connect as may not be a node on schema {schema!r}. As {owner}, run: "
        f"pgchannels grant node {role}{option}"
    )


class Session(Queries):
    """Queries on one connection of its own, one at a time. It connects when first needed.

    Args:
        settings: of the layer.
        role: shows in ``pg_stat_activity.application_name``.
        dsn: where to connect; by ``listen_url``, where that is set, if None.
        serializer: reads the payloads of the messages that it gives.
    """

    def __init__(
        self,
        settings: Settings,
        role: str,
        *,
        dsn: str | None = None,
        serializer: Serializer = DEFAULT,
    ) -> None:
        super().__init__(settings, serializer)
        self._role = role
        self._dsn = dsn
        self._connection: Connection | None = None

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                await connection.close(timeout=_CLOSING_TIME)
            except (OSError, asyncpg.InterfaceError, asyncpg.PostgresError):
                connection.terminate()

    def abort(self) -> None:
        """Cut the connection, and short what is under way on it. The next use makes a new one."""
        if self._connection is not None:
            self._connection.terminate()

    async def partitions(self) -> list[Partition]:
        return [Partition(*row) for row in await self.fetch("partitions")]

    async def execute(self, sql: str) -> None:
        """Run a statement that has no parameters, such as DDL, by the simple protocol."""
        with driver_errors():
            connection = await self._connected()
            try:
                await connection.execute(sql, timeout=self._settings.command_timeout)
            except UNAVAILABLE as error:
                await _part_with(connection, error)
                raise

    async def _fetch(self, sql: str, arguments: Sequence[Any]) -> list[Record]:
        with driver_errors():
            connection = await self._connected()
            try:
                rows: list[Record] = await connection.fetch(
                    sql, *arguments, timeout=self._settings.command_timeout
                )
            except UNAVAILABLE as error:
                await _part_with(connection, error)
                raise
        return rows

    async def _connected(self) -> Connection:
        if self._connection is None or self._connection.is_closed():
            settings = self._settings
            dsn = self._dsn or settings.listen_dsn
            pooled = settings.is_pooled and dsn == settings.dsn
            self._connection = await connect(
                dsn,
                role=self._role,
                timeout=settings.connect_timeout,
                statement_time=settings.command_timeout,
                pooled=pooled,
            )
        return self._connection


async def _part_with(connection: Connection, error: BaseException) -> None:
    """Close a connection on which a statement has failed by *error*."""
    if isinstance(error, TimeoutError):
        # It waits until the server has been asked to cancel the statement.
        with suppress(TimeoutError, OSError, asyncpg.InterfaceError, asyncpg.PostgresError):
            await connection.close(timeout=_CANCELLING_TIME)
    connection.terminate()
