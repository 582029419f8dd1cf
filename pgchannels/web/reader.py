"""A socket with a channel of its own: whose it is, what it reads, what it may do with channels."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import orjson

from pgchannels.channels import check_channel
from pgchannels.errors import ChannelLayerClosed, InvalidChannel
from pgchannels.messages import Position
from pgchannels.web.errors import AuthorizationError, TooManyChannels
from pgchannels.web.life import Life
from pgchannels.web.untold import Untold

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.websockets import WebSocket

    from pgchannels.records import HistoryPage, PresenceBy, Present, Receipt
    from pgchannels.stream import Stream
    from pgchannels.web.auth import Action, Identity
    from pgchannels.web.connections import ConnectionManager

__all__ = ["Reader"]

logger = logging.getLogger("pgchannels.web")


class Reader(Life):
    """A socket that reads channels, and does with them what ``authorize`` allows its client.

    Args:
        websocket: Starlette's, not accepted yet.
        connections: the manager, whose rules it goes by.
    """

    def __init__(self, websocket: WebSocket, connections: ConnectionManager) -> None:
        super().__init__(websocket, connections.heartbeat, connections.send_timeout)
        self.connected_at = self._identified_at = datetime.now(UTC)
        self.connections = connections
        self.layer = connections.layer
        self.channel_name = ""
        self.identity: Identity | None = None
        self.user_id: str | None = None
        self.metadata: Mapping[str, Any] | None = None
        self._stream: Stream
        self._untold = Untold()
        # The channels that are being joined; one several times, if several do.
        self._joining: list[str] = []
        # How often the channels have been asked about again.
        self._reauthorizations = 0

    @property
    def groups(self) -> frozenset[str]:
        """The channels and groups that it reads, whoever has made it do so.

        All but its own, its user's and everyone's.
        """
        stream = getattr(self, "_stream", None)  # None until it has been admitted
        return frozenset() if stream is None else stream.joined

    @property
    def pending(self) -> int:
        """Messages that wait to be sent to the client."""
        return self._stream.pending

    async def identify(
        self,
        user_id: str | None,
        metadata: Mapping[str, Any] | None = None,
        after: Position | str | None = None,
    ) -> None:
        """Say whose socket it is: what is sent to that user reaches it, from now on.

        Args:
            user_id: any text; None for nobody's.
            metadata: what presence shows of it, see ``new_channel()``.
            after: a position, to have replayed what was sent to the user and to everyone since.

        Raises:
            TooManyConnections: the user has as many as the limits allow.
        """
        position = Position.parse(after) if after else None
        before = datetime.now(UTC)
        limits = self.connections.limits
        try:
            await self.layer.update_channel(
                self.channel_name, user_id=user_id, metadata=metadata, limits=limits
            )
        except InvalidChannel:
            if not self._has_ended_for_others:
                raise
            logger.debug("%r has ended, and is identified no more", self)
            return
        # User and metadata have changed already, when the layer knew: see _owned_by().
        self._identified_at = before
        if position is not None:
            await self._stream.resume(position)
            self._resumed()

    def _owned_by(self, user_id: str | None, metadata: str | None) -> None:
        self.user_id = user_id
        self.metadata = None if metadata is None else orjson.loads(metadata)

    async def join(self, group: str, after: Position | str | None = None) -> None:
        """Forward the messages of *group*, without being a member of it.

        Args:
            group: a channel's name.
            after: the last position that the client has had: what came since then is forwarded
                first; ``"0"`` for all that is retained; None, or an empty text as browsers like to
                send it, for from now on.

        Raises:
            InvalidChannel, InvalidPosition: left to the caller's caller, it is told to the client.
            AuthorizationError: the manager's ``authorize`` says no; likewise.
            TooManyChannels: it reads as many as the limits allow; likewise.
        """
        async with self._allowed_to_read(group):
            await self._stream.join(group, after or None)
            if after:
                self._resumed(group)

    async def leave(self, group: str) -> None:
        """Forward no more of *group*. A membership stays.

        Raises:
            InvalidChannel: it may come from the client, who is told.
        """
        self._stream.leave(check_channel(group))
        self._untold.forget(group)

    async def group_add(
        self,
        group: str,
        *,
        after: Position | str | None = None,
        presence: PresenceBy | None = None,
    ) -> None:
        """Become a member of *group*, and forward its messages. It ends with the socket.

        Args:
            group: a channel's name.
            after: as for :meth:`join`.
            presence: count it in the group's presence, see ``layer.group_add()``.

        Raises:
            GroupFull: it has as many members as the limits allow. And as :meth:`join`.
        """
        limit = self.connections.limits.group_members
        async with self._allowed_to_read(group):
            known = self._stream.reads(group)
            # First, so that nothing that is sent to members can fall in between.
            await self._stream.join_group(group, after or None)
            if after:
                self._resumed(group)
            try:
                await self.layer.group_add(group, self.channel_name, presence=presence, limit=limit)
            except BaseException:
                if not known:
                    # It may have become a member in the moment in which this was cancelled.
                    self._stream.leave_unless_member(group)
                raise

    async def group_discard(self, group: str) -> None:
        """End the membership, and forward no more of *group*."""
        # First: where the database is away, it is not read on.
        await self.leave(group)
        await self.layer.group_discard(group, self.channel_name)

    def _resumed(self, channel: str | None = None) -> None:
        """The client has given a position, of *channel* or of all that it reads without joining."""
        self._untold.wanted = True
        self._untold.forget(channel)

    @asynccontextmanager
    async def _allowed_to_read(self, group: str) -> AsyncIterator[None]:
        """Ask before *group* is joined, and again if the answer may have changed meanwhile."""
        asked = self._reauthorizations
        await self._check_allowed("subscribe", group)
        try:
            with self._counting(group):
                yield
        except ChannelLayerClosed:
            if not self._has_ended_for_others:
                raise
            # Told to whoever has asked, it would be taken for the end of the socket that is theirs.
            logger.debug("%r has ended, and joins nothing", self)
            return
        if self._reauthorizations == asked:
            return
        try:
            await self._check_allowed("subscribe", group)
        except BaseException:
            await self.group_discard(group)
            raise

    @property
    def _has_ended_for_others(self) -> bool:
        """Whether the socket has ended, and the running code serves another one, or none."""
        return self._tasks.ended is not None and not self._tasks.is_current

    @contextmanager
    def _counting(self, group: str) -> Iterator[None]:
        """Count *group* in before anything is waited for, so that none slips through."""
        limit = self.connections.limits.groups
        read = self.groups.union(self._joining)
        if limit is not None and group not in read and len(read) >= limit:
            raise TooManyChannels(
                f"one connection reads at most {limit} channels", context={"limit": limit}
            )
        self._joining.append(group)
        try:
            yield
        finally:
            self._joining.remove(group)

    # On behalf of the client, if it is allowed

    async def publish(
        self, channel: str, payload: Any, *, except_self: bool = False, **options: Any
    ) -> Receipt:
        """Publish for the client, if ``authorize`` lets it: to a channel or group.

        Args:
            channel: where to.
            payload: see ``layer.send()``, as the *options*.
            except_self: whether this connection, as a member of the group, does not get it. The
                client gets it on a later connection, when it resumes from before it.

        Raises:
            AuthorizationError: it may not. And as ``layer.send()``.
        """
        await self._check_allowed("publish", channel)
        exclude = self.channel_name if except_self else None
        return await self.layer.group_send(channel, payload, exclude=exclude, **options)

    async def history(self, channel: str, **options: Any) -> HistoryPage:
        """Read history for the client, if ``authorize`` lets it. As ``layer.history()``."""
        await self._check_allowed("history", channel)
        return await self.layer.history(channel, **options)

    async def presence(self, group: str) -> list[Present]:
        """Who is present, if ``authorize`` lets the client know. As ``layer.presence()``."""
        await self._check_allowed("presence", group)
        return await self.layer.presence(group)

    async def _check_allowed(self, action: Action, channel: str) -> None:
        check_channel(channel)  # before anybody else has to deal with it: it may be the client's
        if not await self.connections.allows(self.identity, action, channel):
            raise AuthorizationError(context={"action": action, "channel": channel})
