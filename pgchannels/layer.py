"""The channel layer: what an application opens, publishes through and reads from.

:class:`ChannelLayer` is the contract. What is said here holds for every layer, and the suite in
:mod:`pgchannels.testing` tests it. Arguments are checked here, so that all layers refuse the same
things with the same words; a layer implements what is abstract.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Mapping
from datetime import datetime, timedelta
from hashlib import sha256
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import orjson

from pgchannels.addresses import connections_address, group_address, user_address
from pgchannels.channels import (
    COMMANDS,
    EVERYONE,
    check_channel,
    check_user,
    presence_channel,
)
from pgchannels.control import COMMAND_LIFETIME, REVOKED, Command, CommandWatch, check_token_id
from pgchannels.envelopes import Envelope, websocket_bytes_message, websocket_json_message
from pgchannels.errors import (
    ConfigurationError,
    InvalidMessage,
    UnknownPosition,
)
from pgchannels.filters import Filter
from pgchannels.limits import Limits, check_limit
from pgchannels.messages import (
    ATTACHMENTS,
    BEGINNING,
    EXCEPT,
    FRAME,
    OWN_HEADERS,
    Message,
    Position,
    check_ttl,
    parse_start,
)
from pgchannels.payloads import DEFAULT, Serializer, encode_payload
from pgchannels.propagation import context_headers
from pgchannels.rates import Admission, Rate, TokenBucket, check_cost, check_rate
from pgchannels.records import (
    ConnectionInfo,
    FollowerStatus,
    Head,
    HistoryPage,
    LogPage,
    Outgoing,
    PresenceBy,
    Present,
    Receipt,
)
from pgchannels.settings import Settings
from pgchannels.stream import Source, Stream, filtered

if TYPE_CHECKING:
    from pgchannels.follower import Follower
    from pgchannels.overflow import Overflow

__all__ = ["MAX_HISTORY", "ChannelLayer", "outgoing"]

MAX_HISTORY = 1000
MAX_KEY_LENGTH = 200
MAX_HEADERS_SIZE = 8192
MAX_METADATA_SIZE = 8192
MAX_CONNECTIONS = 1000
MAX_RATE_KEY = 1000

_MAX_ID = 2**63 - 1
_MAX_KEEP = timedelta(days=3660)
# Bytes of a text that is stored as it is. An entry of an index has its bounds.
_MAX_STORED = 200
_DIGEST = "sha256:"
# Pages of the log that one call looks through for what a filter wants, or past expired messages.
_MAX_SPARSE_PAGES = 10


class ChannelLayer(ABC):
    """Send, receive, subscribe, groups. Nothing opens in the constructor.

    ::

        async with layer:
            await layer.send("jobs", {"type": "resize", "id": 7})
            message = await layer.receive("jobs", timeout=5)

    One layer serves one event loop, any number of tasks in it.

    Args:
        settings: :class:`~pgchannels.Settings`; from the environment if None.
        serializer: how payloads become JSON and objects again.
    """

    def __init__(
        self, settings: Settings | None = None, *, serializer: Serializer = DEFAULT
    ) -> None:
        self.settings = settings or Settings()
        self.serializer = serializer
        self._entered = 0

    async def __aenter__(self) -> Self:
        await self.open()
        self._entered += 1
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Entered again inside of a block, it is the outer one's to close.
        self._entered = max(0, self._entered - 1)
        if not self._entered:
            await self.close()

    @abstractmethod
    async def open(self) -> None:
        """Begin. Opening an open layer does nothing.

        Raises:
            ConfigurationError: it is open in another event loop.
        """

    @abstractmethod
    async def close(self) -> None:
        """Finish what is being published, end everything that waits here. Again: does nothing.

        Whoever waits gets :class:`~pgchannels.ChannelLayerClosed`, as does every later call.
        """

    # Sending

    async def send(
        self,
        channel: str,
        payload: Any,
        *,
        ttl: float | timedelta | None = None,
        headers: Mapping[str, str] | None = None,
        key: str | None = None,
    ) -> Receipt:
        """Publish a message; return when it is committed.

        It is ordered after everything that was committed before the call. It can be read some
        milliseconds later, when it has its place in the log: :meth:`history` right after this may
        not have it yet, while streams and :meth:`receive` wait for it. To publish in a transaction
        of your own, see :mod:`pgchannels.orm`.

        Args:
            channel: see :func:`pgchannels.channels.check_channel`.
            payload: a mapping or a pydantic model, bytes included; see
                :func:`pgchannels.payloads.encode_payload`.
            ttl: how long it can be read, in seconds; ``default_ttl`` if None.
            headers: texts by name, for who reads on a server. Sockets do not get them.
            key: an idempotency key, up to 200 characters. A second message with the same key on the
                same channel within ``key_lifetime`` is not published, and its receipt is the first
                one's. A concurrent one waits for the first to be committed.

        Raises:
            InvalidMessage: for a bad argument. Nothing was written.
            ChannelFull: ``capacity`` is set, and as many messages wait to be received from this
                channel. Nothing was written.
            DatabaseUnavailable: the message may or may not have been published. With a key, sending
                again is safe.
            ChannelLayerClosed: the layer is not open.
        """
        return await self._publish(
            self._outgoing(check_channel(channel), payload, ttl=ttl, headers=headers, key=key)
        )

    async def group_send(
        self,
        group: str,
        payload: Any,
        *,
        exclude: str | None = None,
        ttl: float | timedelta | None = None,
        headers: Mapping[str, str] | None = None,
        key: str | None = None,
    ) -> Receipt:
        """Publish to a group: one stored message, however many members receive it.

        As :meth:`send`, and:

        Args:
            group: a channel's name.
            exclude: the channel of a member that does not get it: the sender, say. Readers that are
                not members, and the history, still do; and so does the same client on a later
                connection, which has another channel, when it resumes from before the message.
        """
        channel, extra = group_address(group, exclude)
        return await self._publish(
            self._outgoing(channel, payload, ttl=ttl, headers=headers, key=key, extra=extra)
        )

    async def send_to(
        self,
        channels: Iterable[str],
        payload: Any,
        *,
        ttl: float | timedelta | None = None,
        headers: Mapping[str, str] | None = None,
        key: str | None = None,
    ) -> Receipt:
        """Publish one stored message to several connections: channels from :meth:`new_channel`.

        Each gets it as if it had been sent to it alone; in nobody's history it shows. As
        :meth:`send`, and:

        Args:
            channels: 1 to 1000 names.
        """
        channel, extra = connections_address(channels)
        return await self._publish(
            self._outgoing(channel, payload, ttl=ttl, headers=headers, key=key, extra=extra)
        )

    async def send_to_user(
        self,
        user_id: str,
        payload: Any,
        *,
        exclude: str | None = None,
        ttl: float | timedelta | None = None,
        headers: Mapping[str, str] | None = None,
        key: str | None = None,
    ) -> Receipt:
        """Publish one stored message to all connections of a user, on all nodes. As :meth:`send`.

        Connections are a user's by ``new_channel(user_id=…)`` or ``update_channel()``. The one
        whose channel is *exclude* does not get it.
        """
        channel, extra = user_address(user_id, exclude)
        return await self._publish(
            self._outgoing(channel, payload, ttl=ttl, headers=headers, key=key, extra=extra)
        )

    async def broadcast(
        self,
        payload: Any,
        *,
        exclude: str | None = None,
        ttl: float | timedelta | None = None,
        headers: Mapping[str, str] | None = None,
        key: str | None = None,
    ) -> Receipt:
        """Publish one stored message to every connection. As :meth:`group_send` to ``EVERYONE``."""
        return await self.group_send(
            EVERYONE, payload, exclude=exclude, ttl=ttl, headers=headers, key=key
        )

    async def send_ephemeral(
        self, channel: str, payload: Any, *, exclude: str | None = None
    ) -> None:
        """Tell who is there now, and nobody later: somebody is typing, a cursor has moved.

        It goes to those who subscribe to the channel or group and are live, on all nodes; at most
        once, in no order with stored messages. It is not in the history, not replayed, and neither
        ``receive()`` nor ``follow()`` gives it. A subscriber that is behind misses it.

        Args:
            channel: a channel or group.
            payload: see :meth:`send`.
            exclude: the channel of a member that does not get it.

        Raises:
            InvalidMessage, DatabaseUnavailable, ChannelLayerClosed: as :meth:`send`.
        """
        extra = {} if exclude is None else {EXCEPT: check_channel(exclude)}
        await self._publish_ephemeral(self._outgoing(check_channel(channel), payload, extra=extra))

    async def send_json_message(self, channel: str, body: Any, **extra: Any) -> Receipt:
        """Send what consumers pass on to their clients as it is: *body*, as a JSON text frame."""
        return await self.send(channel, websocket_json_message(body, **extra))

    async def send_bytes_message(self, channel: str, body: bytes, **extra: Any) -> Receipt:
        """Send what consumers pass on to their clients as it is: *body*, as a binary frame."""
        return await self.send(channel, websocket_bytes_message(body, **extra))

    # Reading

    @abstractmethod
    async def receive(self, channel: str, *, timeout: float | None = None) -> Message:
        """Take the next message: of the channel, or of its groups since it joined them.

        Each message goes to exactly one of all receivers of the channel, in any process: at most
        once. Cancelled, also by a timeout from outside, it loses nothing that it did not return.
        A channel's first receiver begins with the oldest message that is retained; a channel from
        :meth:`new_channel` with what is sent after that call. Each receiver takes the oldest that
        is left; what another one has handed back comes first.

        Args:
            channel: one channel.
            timeout: seconds; None to wait for ever, 0 or less for what is there now.

        Raises:
            TimeoutError: nothing came in time.
            ValueError: *timeout* is not a number (NaN).
            InvalidChannel: for a bad name, or when this layer deletes the channel.
            ChannelLayerClosed: before, or while waiting.
            DatabaseUnavailable: never; it waits until the database is back.
        """

    @abstractmethod
    def subscribe(
        self,
        *channels: str,
        after: Position | str | None = None,
        since: datetime | None = None,
        filter: str | None = None,
        member: str | None = None,
        overflow: Overflow | str | None = None,
    ) -> Stream:
        """Read channels: everything after a position, then live. See :class:`Stream`.

        Args:
            channels: any number; ``Stream.join`` adds more.
            after: a message's position; ``"0"`` for all that is retained; None for from now on.
            since: instead, a time with time zone: everything that came into the log then or later,
                by the database's clock. Nothing is missed that was published at that time or after
                it; what was published before it and committed later comes too, and so may what was
                published in the same second. A time that is still to come means from now on.
            filter: only messages whose payloads match, of all channels that are read, ephemeral
                ones too; see :class:`~pgchannels.filters.Filter`. The others are left out here, and
                take no place in the stream's buffer.
            member: a channel of this layer's :meth:`new_channel`, to be read as: the stream also
                has what is sent to it, alone or among others, to its user, to everyone, and to the
                groups that it is a member of, whoever has added it; and lacks what excludes it.
            overflow: what to do when the consumer is too slow, see :class:`~pgchannels.Overflow`;
                a policy's name alone for default bounds. By default nothing is lost: the stream
                goes back to reading the log.

        Raises:
            InvalidChannel, InvalidPosition, InvalidFilter: at once.
            ConfigurationError: at once, for an *overflow* that cannot be.
            ValueError: at once, for both *after* and *since*, or a time without time zone.
            UnknownPosition: on entering, for a position that this log has never reached.
            DatabaseUnavailable: on entering, if that, or what was when, cannot be looked up.
        """

    @abstractmethod
    def follow(self, *channels: str, name: str, after: Position | str | None = None) -> Follower:
        """Read channels as the durable reader *name*, in batches. See :class:`Follower`.

        Args:
            channels: one at least.
            name: who reads: its position is kept under this name, a valid channel's. One reads at a
                time; others wait, and the next one takes over from one that is gone.
            after: where a name that is new begins; None for from now on.
        """

    @abstractmethod
    async def followers(self) -> list[FollowerStatus]:
        """All durable readers, by name: how far each has come, and how far it lags behind."""

    @abstractmethod
    async def forget_follower(self, name: str) -> bool:
        """Remove a durable reader's position. The name is then new. False: there was none.

        Whoever reads for it now cannot acknowledge any more.
        """

    async def history(
        self,
        channel: str,
        *,
        after: Position | str | None = None,
        before: Position | str | None = None,
        since: datetime | None = None,
        filter: str | None = None,
        order: Literal["asc", "desc"] = "asc",
        limit: int = 50,
    ) -> HistoryPage:
        """Read a page of what a channel retains.

        For what a filter wants, one call looks through ten thousand messages at most, fewer if they
        are large (ten times ``page_bytes``). It returns what it has found by then, which may be
        nothing, and where to go on: there is no more only where ``next`` is None.

        Args:
            channel: one channel.
            after: messages after this position only.
            before: messages before this position only.
            since: a time with time zone instead of *after*, see :meth:`subscribe`. Oldest first,
                the next page is *after* what ``next`` says, instead; newest first it is *before*
                that, and *since* stays.
            filter: only messages whose payloads match, see :class:`~pgchannels.filters.Filter`.
            order: ``"asc"``, oldest first, or ``"desc"``, newest first.
            limit: 1 to 1000 messages; fewer come if they are very large, or behind thousands of
                others whose time is over and which have not been pruned yet.

        Raises:
            InvalidChannel, InvalidPosition, InvalidFilter, ValueError: for bad arguments.
            UnknownPosition: a position that this log has never reached.
        """
        check_channel(channel)
        if order not in ("asc", "desc"):
            raise ValueError(f"order must be 'asc' or 'desc', not {order!r}")
        if not 1 <= limit <= MAX_HISTORY:
            raise ValueError(f"limit must be 1 to {MAX_HISTORY}, not {limit}")
        start = parse_start(after, since)
        high = None if before is None else Position.parse(before)
        wanted = None if filter is None else Filter.parse(filter)
        if isinstance(start, datetime):
            start = await self._position_before(start)
        return await self._page(
            channel, start or BEGINNING, high, wanted, newest_first=order == "desc", limit=limit
        )

    async def _page(
        self,
        channel: str,
        low: Position,
        high: Position | None,
        wanted: Filter | None,
        *,
        newest_first: bool,
        limit: int,
    ) -> HistoryPage:
        """What is wanted between two positions, of a bounded number of pages of the log."""
        messages: list[Message] = []
        end: Position | None = None
        truncated = False
        pages = _MAX_SPARSE_PAGES
        size = limit + 1  # one more than asked for tells whether there is a next page
        while True:
            before = _MAX_ID if high is None else high.id
            page = await self._read_history(
                channel, after=low.id, before=before, newest_first=newest_first, limit=size
            )
            head = page.head
            for position in (low, high):
                _check_known(position, head)
            truncated = (
                truncated
                or (low != BEGINNING and low.id < head.floor)
                or (high not in (None, BEGINNING) and before <= head.floor)
            )
            if end is None or not newest_first:
                end = Position(head.epoch, head.id)  # what comes after it has not been looked at
            between = [message for message in page.messages if message.id < before]
            messages += between if wanted is None else await filtered(between, wanted)
            following = None
            if len(messages) > limit:
                following = messages[limit - 1].position
            elif page.full and page.end < before:
                following = Position(head.epoch, page.end)
            pages -= 1
            if (
                following is None
                or not pages
                or len(messages) >= limit
                or sum(message.size for message in messages) >= self.settings.page_bytes
            ):
                return HistoryPage(messages[:limit], following, end, truncated)
            low, high = (low, following) if newest_first else (following, high)
            size = MAX_HISTORY

    # Channels and groups

    @abstractmethod
    async def new_channel(
        self,
        prefix: str = "channel",
        *,
        user_id: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        limits: Limits | None = None,
    ) -> str:
        """Make a channel of this layer's own, and return its name.

        It lives until :meth:`delete_channel`, the layer's close, or, should the process die, until
        its lease has run out. With it go its memberships.

        Args:
            prefix: the beginning of the name, up to 150 characters.
            user_id: whose it is, for :meth:`send_to_user` and presence: any text of 1 to 1000
                characters and at most 1900 bytes as UTF-8, without NUL.
            metadata: a JSON object of up to 8 KiB that presence shows: a name, a colour.
            limits: then the channel is a connection: it counts for others' limits, and is listed
                by :meth:`connections`. It is made only if by then, on all nodes, there are fewer
                connections than each of the limits that are given.

        Should the process be held up for longer than its lease, its connections lose their places,
        and ask for them again when it is back. Streams that read as one that is refused then end
        with TooManyConnections, and the channel is no more.

        Raises:
            TooManyConnections: it was not made; the exception says for which limit.
            InvalidChannel, InvalidUser, InvalidMessage: for a bad argument.
            DatabaseUnavailable: with limits also while this node has no lease, for a few seconds
                after it was held up.
        """

    @abstractmethod
    async def update_channel(
        self,
        channel: str,
        *,
        user_id: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        limits: Limits | None = None,
    ) -> None:
        """Set user and metadata of a channel that this layer has made, both.

        Memberships keep what they were joined with.

        Args:
            channel: from :meth:`new_channel`.
            user_id: whose it is from now on.
            metadata: see :meth:`new_channel`.
            limits: change it only if there is a place for it; a channel that was no connection
                becomes one. None to change it in any case, and leave its limits as they were.

        Raises:
            TooManyConnections: nothing was changed. A connection has a place on its node and in
                all already; it may be the new user's connections that are too many.
            InvalidUser: *user_id* cannot be a user's id.
            InvalidChannel: it is not a channel of this layer's :meth:`new_channel`.
        """

    @abstractmethod
    async def delete_channel(self, channel: str) -> None:
        """Remove a channel that this layer has made, and its memberships. Again: does nothing."""

    async def group_add(
        self,
        group: str,
        channel: str,
        *,
        presence: PresenceBy | None = None,
        limit: int | None = None,
    ) -> None:
        """Make *channel* a member of *group*. Again: renews it.

        The channel may be this layer's, another's, or an ordinary one. That of a connection that is
        gone is left out. The membership lasts until it is discarded, the channel is deleted or its
        node is gone; that of an ordinary channel until neither the membership has been renewed nor
        the channel received from for ``group_expiry``.

        Args:
            group: a channel's name.
            channel: the member.
            presence: count it in :meth:`presence`, and publish ``presence.joined`` and
                ``presence.left`` on :func:`~pgchannels.channels.presence_channel`: ``"user"``, all
                connections of a user as one, or ``"connection"``, each by itself.
            limit: make it a member only if the group has fewer members than that, on all nodes. It
                is exact among those who are added with a limit; who is added without one is not
                held up, and counts from when it is committed. Who is a member already stays one.

        Raises:
            GroupFull: it is no member.
            InvalidChannel: for a bad name.
            InvalidUser: ``presence="user"`` for a channel without a user.
            ConfigurationError: *limit* is no integer of at least 1.
        """
        check_limit("limit", limit)
        if presence is not None:
            if presence not in ("user", "connection"):
                raise ValueError(f"presence must be 'user' or 'connection', not {presence!r}")
            presence_channel(group)
        await self._change_membership(
            check_channel(group),
            check_channel(channel),
            adding=True,
            presence=presence,
            limit=limit,
        )

    async def group_discard(self, group: str, channel: str) -> None:
        """End a membership. Not an error if there is none.

        Who was counted as a user leaves after ``presence_grace`` seconds, unless the user is back.
        """
        await self._change_membership(
            check_channel(group), check_channel(channel), adding=False, presence=None
        )

    @abstractmethod
    async def group_members(self, group: str) -> list[str]:
        """The channels that are members now, sorted."""

    @abstractmethod
    async def presence(self, group: str) -> list[Present]:
        """Who is in the group, of those who were added with ``presence=``; first come first."""

    # Connections

    async def connections(
        self, *, user_id: str | None = None, after: str | None = None, limit: int = MAX_CONNECTIONS
    ) -> list[ConnectionInfo]:
        """The connections on all nodes, by the names of their channels: a page of them.

        Those are the channels that were made with limits.

        Args:
            user_id: of this user only.
            after: those whose channels come after this one: the last one of the page before.
            limit: 1 to 1000.

        Raises:
            InvalidUser, InvalidChannel, ValueError: for bad arguments.
        """
        if not 1 <= limit <= MAX_CONNECTIONS:
            raise ValueError(f"limit must be 1 to {MAX_CONNECTIONS}, not {limit}")
        name = None if after is None else check_channel(after)
        return await self._connections(check_owner(user_id), name, limit)

    async def count_connections(self, *, user_id: str | None = None) -> int:
        """How many connections there are on all nodes: in all, or of a user."""
        return await self._count_connections(check_owner(user_id))

    async def revoke(
        self,
        *,
        user_id: str | None = None,
        token_id: str | None = None,
        keep: timedelta = timedelta(days=1),
    ) -> None:
        """Let tokens be no good any more: a user's that were issued until now, or one by its id.

        What time it is, the database says. All nodes are told, by a
        :class:`~pgchannels.Command` to ``reauthorize`` the connections of the user, or those that
        came with the token.

        Args:
            user_id: whose tokens.
            token_id: which token, 1 to 1000 characters.
            keep: how long that is remembered: at least as long as a token is good.

        Raises:
            InvalidUser, InvalidMessage, ValueError: for bad arguments, or for none.
        """
        commands = []
        if user_id is not None:
            commands.append(Command("reauthorize", user_id=user_id, reason=REVOKED))
        if token_id is not None:
            commands.append(Command("reauthorize", token_id=token_id, reason=REVOKED))
        if not commands:
            raise ValueError("revoke() takes a user_id, a token_id, or both")
        if not timedelta(0) < keep <= _MAX_KEEP:
            raise ValueError(f"keep must be above 0 and at most {_MAX_KEEP.days} days")
        await self._revoke(
            [*_revocable(user_id, token_id).items()],
            keep,
            [self._outgoing(COMMANDS, c.to_dict(), ttl=COMMAND_LIFETIME) for c in commands],
        )

    async def is_revoked(
        self,
        *,
        user_id: str | None = None,
        token_id: str | None = None,
        issued_at: datetime | None = None,
    ) -> bool:
        """Whether a token is no good any more: by its id, or as one of its user's.

        Args:
            user_id: whose it is.
            token_id: its id, if it has one.
            issued_at: when, with time zone. None if it does not say: then it is one of those that
                were issued before any revocation.

        Raises:
            InvalidUser, InvalidMessage, ValueError: for bad arguments, or for none.
        """
        check_owner(user_id)
        if token_id is not None:
            check_token_id(token_id)
        if user_id is None and token_id is None:
            raise ValueError("is_revoked() takes a user_id, a token_id, or both")
        if issued_at is not None and issued_at.tzinfo is None:
            raise ValueError("issued_at needs a time zone")
        return await self._is_revoked(_revocable(user_id, token_id), issued_at)

    async def command(self, command: Command) -> Receipt:
        """Tell all nodes, this one too, what to do with their connections, in order.

        Raises:
            DatabaseUnavailable: it may or may not have been told.
        """
        return await self._publish(
            self._outgoing(COMMANDS, command.to_dict(), ttl=COMMAND_LIFETIME)
        )

    def watch_commands(
        self, obey: Callable[[Command], None], missed: Callable[[], None]
    ) -> Callable[[], None]:
        """Be told what all nodes are told from now on. For what serves connections.

        Under its name the channel can be neither read nor written.

        Args:
            obey: is called with each command, in order. At once; what it raises is logged.
            missed: is called when commands may have been lost. Likewise.

        Returns:
            What ends it, also inside of *obey*. Calling it again does nothing.

        Raises:
            ChannelLayerClosed: the layer is not open.
        """
        watch = CommandWatch(obey, missed)
        source = self._source
        source.register(COMMANDS, watch)

        def stop() -> None:
            watch.stop()
            source.unregister(COMMANDS, watch)

        return stop

    async def take(self, key: str, rate: Rate, cost: int = 1) -> Admission:
        """Take from what a rate admits to a key, on all nodes together, if there is room.

        The time is the database's. After a crash of its server all keys begin anew.

        Args:
            key: what is limited, a user or an address: 1 to 1000 characters. A bucket and a window
                of the same key have nothing to do with each other.
            rate: what is admitted. It should be the same for a key each time; where it is changed,
                what was taken before may or may not count.
            cost: how much is taken, 1 to the rate's capacity.

        Raises:
            ConfigurationError: there is never room for *cost*.
            InvalidMessage: *key* is none.
            DatabaseUnavailable: it may or may not have been taken.
        """
        check_rate(rate)
        check_cost(rate, cost)
        kind = "bucket" if isinstance(rate, TokenBucket) else "window"
        return await self._take(f"{kind}:{_short(_check_rate_key(key))}", rate, cost)

    def wake(self) -> None:  # noqa: B027 - most layers have nothing to do here
        """Something was committed by other ways than this layer's. From any thread; never raises.

        A layer that finds out by itself does nothing.
        """

    # What a layer implements

    @property
    @abstractmethod
    def _source(self) -> Source:
        """Where streams read, while the layer is open."""

    @abstractmethod
    def _publish(self, message: Outgoing) -> Awaitable[Receipt]: ...

    @abstractmethod
    def _publish_ephemeral(self, message: Outgoing) -> Awaitable[None]: ...

    @abstractmethod
    async def _read_history(
        self, channel: str, *, after: int, before: int, newest_first: bool, limit: int
    ) -> LogPage:
        """Messages of *channel* with ids above *after* and below *before*."""

    @abstractmethod
    async def _position_before(self, time: datetime) -> Position:
        """How far the log had come before *time*, which is in UTC; id 0 if that is not known."""

    @abstractmethod
    async def _change_membership(
        self,
        group: str,
        channel: str,
        *,
        adding: bool,
        presence: PresenceBy | None,
        limit: int | None = None,
    ) -> None: ...

    @abstractmethod
    async def _connections(
        self, user_id: str | None, after: str | None, limit: int
    ) -> list[ConnectionInfo]: ...

    @abstractmethod
    async def _count_connections(self, user_id: str | None) -> int: ...

    @abstractmethod
    async def _revoke(
        self, revoked: list[tuple[str, str]], keep: timedelta, commands: list[Outgoing]
    ) -> None:
        """Remember kinds and values, and publish, both or nothing."""

    @abstractmethod
    async def _is_revoked(self, values: Mapping[str, str], issued_at: datetime | None) -> bool:
        """*values* by kind: ``"user"``, ``"token"``, or both."""

    @abstractmethod
    async def _take(self, key: str, rate: Rate, cost: int) -> Admission: ...

    def _outgoing(self, channel: str, payload: Any, **options: Any) -> Outgoing:
        return outgoing(channel, payload, self.settings, self.serializer, **options)


def outgoing(
    channel: str,
    payload: Any,
    settings: Settings,
    serializer: Serializer,
    *,
    ttl: float | timedelta | None = None,
    headers: Mapping[str, str] | None = None,
    key: str | None = None,
    extra: Mapping[str, str] | None = None,
) -> Outgoing:
    """Check and encode a message; *extra* are headers of our own."""
    encoded = encode_payload(payload, max_size=settings.max_message_size, serializer=serializer)
    if ttl is None:
        ttl = settings.default_ttl or None
    lifetime = None if ttl is None else check_ttl(ttl)
    own = dict(extra) if extra else {}
    if encoded.pointers:
        own[ATTACHMENTS] = orjson.dumps(encoded.pointers).decode()
    if isinstance(payload, Envelope):
        own[FRAME] = payload.mode
    if key is not None:
        _check_key(key)
    return Outgoing(
        channel,
        encoded.text,
        lifetime,
        _encode_headers(headers, own, context_headers()),
        encoded.attachments,
        key,
    )


def _encode_headers(
    headers: Mapping[str, str] | None, own: Mapping[str, str], context: Mapping[str, str]
) -> str | None:
    size = 0
    if headers:
        given: Mapping[Any, Any] = headers  # they may come from anywhere
        for name, value in given.items():
            if not isinstance(name, str) or not isinstance(value, str):
                raise InvalidMessage(f"headers must be texts by name, not {name!r}: {value!r}")
            if name.lower().startswith(OWN_HEADERS):
                raise InvalidMessage(f"headers named {OWN_HEADERS}… are reserved: {name!r}")
        try:
            encoded = orjson.dumps(dict(headers))
        except TypeError as error:
            raise InvalidMessage(f"the headers cannot be encoded: {error}") from error
        size = len(encoded)
        if size > MAX_HEADERS_SIZE:
            raise InvalidMessage(
                f"the headers have {size} bytes; at most {MAX_HEADERS_SIZE} are allowed"
            )
        if b"\\u" in encoded.replace(b"\\\\", b""):
            raise InvalidMessage("headers must not hold control characters")
    # What was asked for comes first: no message is refused for its context.
    if context and (
        size + len(orjson.dumps(context)) > MAX_HEADERS_SIZE
        or not context.keys().isdisjoint(headers or ())
    ):
        context = {}
    if headers or own or context:
        return orjson.dumps({**context, **(headers or {}), **own}).decode()
    return None


def _check_key(key: object) -> None:
    # PostgreSQL's text has no NUL, and nobody's has a lone surrogate.
    if not isinstance(key, str) or not 1 <= len(key) <= MAX_KEY_LENGTH or "\0" in key:
        raise InvalidMessage(f"a key must be a str of 1 to {MAX_KEY_LENGTH} characters")
    try:
        key.encode()
    except UnicodeEncodeError as error:
        raise InvalidMessage("a key must not hold a lone surrogate") from error


def encode_metadata(metadata: Mapping[str, Any] | None) -> str | None:
    """The text of a channel's metadata.

    Raises:
        InvalidPayload, MessageTooLarge: it is not a JSON object of at most 8 KiB.
    """
    if metadata is None:
        return None
    encoded = encode_payload(metadata, max_size=MAX_METADATA_SIZE)
    if encoded.attachments:
        raise InvalidMessage("metadata cannot hold bytes")
    return encoded.text


def check_timeout(timeout: float | None) -> float | None:
    """Return *timeout* if it is one.

    Raises:
        ValueError: it is NaN, which no time would ever be later than.
    """
    if timeout is not None and math.isnan(timeout):
        raise ValueError("timeout must be a number of seconds or None, not NaN")
    return timeout


def _revocable(user_id: str | None, token_id: str | None) -> dict[str, str]:
    given = {"user": user_id, "token": token_id}
    return {kind: _short(value) for kind, value in given.items() if value is not None}


def _short(text: str) -> str:
    """The text, or its digest if it is long; no two have the same."""
    encoded = text.encode()
    if len(encoded) <= _MAX_STORED and not text.startswith(_DIGEST):
        return text
    return _DIGEST + sha256(encoded).hexdigest()


def _check_rate_key(key: object) -> str:
    if not isinstance(key, str) or not 1 <= len(key) <= MAX_RATE_KEY or "\0" in key:
        raise InvalidMessage(f"the key of a rate is a str of 1 to {MAX_RATE_KEY} characters")
    try:
        key.encode()
    except UnicodeEncodeError as error:
        raise InvalidMessage("the key of a rate must not hold a lone surrogate") from error
    return key


def check_limits(limits: Limits | None) -> Limits | None:
    """Return *limits* if they are some, or None.

    Raises:
        ConfigurationError: it is something else.
    """
    given: object = limits
    if given is not None and not isinstance(given, Limits):
        raise ConfigurationError(f"limits must be Limits(…), not {given!r}")
    return limits


def check_owner(user_id: str | None) -> str | None:
    """Return whose a channel is to be, or None for nobody's.

    Raises:
        InvalidUser: it cannot be a user's id.
    """
    return None if user_id is None else check_user(user_id)


def _check_known(position: Position | None, head: Head) -> None:
    if position is None or position == BEGINNING:
        return
    if position.epoch != head.epoch or position.id > head.id:
        raise UnknownPosition(position)
