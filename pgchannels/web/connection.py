"""One socket as an endpoint or a consumer has it: what goes in and out, its token, its life."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from datetime import UTC, datetime
from math import inf
from typing import TYPE_CHECKING, Any, ClassVar

import anyio
import anyio.lowlevel
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from pgchannels.errors import (
    ChannelLayerClosed,
    ConfigurationError,
    DatabaseUnavailable,
    UnknownPosition,
)
from pgchannels.web.auth import Identity
from pgchannels.web.codes import ABNORMAL, NORMAL, SENDABLE
from pgchannels.web.errors import (
    AuthenticationError,
    AuthenticationTimeout,
    AuthorizationError,
    Category,
    FrameTooLarge,
    Problem,
    SocketError,
    describe,
)
from pgchannels.web.frames import unwrapped
from pgchannels.web.incoming import ANSWERED, Frame
from pgchannels.web.reader import Reader
from pgchannels.web.wire import CLOSING_TIME

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pgchannels.control import Command
    from pgchannels.messages import Message
    from pgchannels.web.auth import Authentication
    from pgchannels.web.connections import ConnectionManager
    from pgchannels.web.inbox import Rest
    from pgchannels.web.middleware import Chain

__all__ = ["REFRESHING_TIME", "Connection"]

# Seconds that a token is good for longer, if the client has sent another one in time.
REFRESHING_TIME = 15.0
# Seconds after which it is known whether it has, where a handler was busy.
_FINDING_TIME = 1.0

logger = logging.getLogger("pgchannels.web")

# Seconds after which a client is told the position of what it was not sent.
POSITION_DELAY = 5.0


class Connection(Reader):
    """One socket, as an endpoint has it inside of ``async with connections.connect(socket)``.

    Iterating gives what the client sends, parsed as JSON, until it is gone. What arrives for the
    connection meanwhile is forwarded to the client by a task of its own.

    Attributes:
        websocket: Starlette's.
        layer: the channel layer.
        connections: the manager that it belongs to.
        channel_name: the connection's own channel, once it has been admitted: what is sent to it
            reaches this client alone.
        identity: who was authenticated; None if nobody was asked to be.
        user_id: whose it is; None for nobody's.
        metadata: what presence shows of it.
        connected_at: when it came, by this server's clock.
        messages_in, bytes_in, messages_out, bytes_out: what went through, frames of either kind.
    """

    _is_selective: ClassVar[bool] = False
    """Whether a subclass may not send a message that there is for the client."""

    def __init__(self, websocket: WebSocket, connections: ConnectionManager) -> None:
        super().__init__(websocket, connections)
        self._forwarding: asyncio.Task[Any] | None = None
        self._subprotocol: str | None = None
        self._headers: Iterable[tuple[bytes, bytes]] | None = None
        self._accepted = False  # by us, with this subprotocol
        self._refreshing = 0
        self._extended = 0  # how often the time of its token was
        self._revocations = 0
        # Whether what is being received is parsed, and answered, here.
        self._answers = False
        # Whether messages can get by the client, and a task that tells it of them.
        self._counts_untold = False
        self._telling = False

    # What it is

    @property
    def id(self) -> str:
        """The same as :attr:`channel_name`."""
        return self.channel_name

    @property
    def resume_position(self) -> str | None:
        """The last position that the client has had, as it says: ``?after=`` of its URL."""
        return self.websocket.query_params.get("after") or None

    def to_dict(self) -> dict[str, Any]:
        """What there is to know of it, as JSON can have it."""
        return {
            "id": self.channel_name,
            "state": self.state.value,
            "user_id": self.user_id,
            "metadata": None if self.metadata is None else dict(self.metadata),
            "groups": sorted(self.groups),
            "connected_at": self.connected_at.isoformat(),
            "idle_time": round(self.idle_time, 3),
            "messages_in": self.messages_in,
            "bytes_in": self.bytes_in,
            "messages_out": self.messages_out,
            "bytes_out": self.bytes_out,
        }

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.channel_name or 'not admitted'}, {self.state.value}>"

    async def accept(
        self, subprotocol: str | None = None, headers: Iterable[tuple[bytes, bytes]] | None = None
    ) -> None:
        """Accept the socket, unless that has been done. ``connections.connect()`` does it.

        Raises:
            ConfigurationError: it has been accepted before, and not with this subprotocol. Where a
                token comes with the first message, that is before a consumer's ``connect()``: say
                :meth:`accept_with` in its ``__init__()``.
        """
        authentication = self.connections.authentication
        if self._accepted and subprotocol not in (None, self._subprotocol):
            other = "without one" if self._subprotocol is None else f"with {self._subprotocol!r}"
            raise ConfigurationError(
                f"accept({subprotocol!r}) comes too late: the socket was accepted before, {other}. "
                "If its token comes with the first message, that is before connect(): say "
                f"accept_with({subprotocol!r}) in __init__()"
            )
        if subprotocol is None:
            subprotocol = self._subprotocol
        if headers is None:
            headers = self._headers
        if subprotocol is None and authentication is not None:
            subprotocol = authentication.accept_subprotocol(self.websocket)
        if self.websocket.application_state is WebSocketState.CONNECTING:
            self._accepted, self._subprotocol = True, subprotocol
        await super().accept(subprotocol, headers)

    def accept_with(
        self,
        subprotocol: str | None = None,
        headers: Iterable[tuple[bytes, bytes]] | None = None,
    ) -> None:
        """Say what it is accepted with, if :meth:`accept` does not: it may be soon.

        For a consumer's ``__init__()``.
        """
        self._subprotocol, self._headers = subprotocol, headers

    async def close(self, code: int = NORMAL, reason: str | None = None) -> None:
        """Close the socket. Before it was accepted, this refuses it with HTTP 403.

        The client is told before how far it has come, also if a consumer's method closes the socket
        because of the message that it handles: it can resume after that one.

        Args:
            code: 1000 to 4999, but those that may not be sent, as 1005 and 1006.
            reason: up to 123 bytes; what is more is cut off.

        Raises:
            ValueError: the code may not be sent.
        """
        is_open = self.websocket.application_state is WebSocketState.CONNECTED
        if self._counts_untold and is_open and code in SENDABLE:
            if asyncio.current_task() is self._forwarding:
                self._untold.done()
            with suppress(WebSocketDisconnect):  # closing finds that out, too
                await self._tell_positions()
        await super().close(code, reason)

    # Its token

    async def refresh(self, token: str) -> None:
        """Go on with a new token, of the same user; ask again whether it may read what it reads.

        A client asks for this by ``{"type": "auth.refresh", "token": …}``. Where frames are not
        parsed here (:meth:`answers_itself`), that is the application's to read, and to call this.

        Raises:
            AuthenticationError: the token is no good, or another user's.
        """
        authentication = self.connections.authentication
        if authentication is None or self.identity is None:
            raise AuthenticationError("there is nothing to refresh", disconnect=False)
        self._refreshing += 1
        try:
            identity = await authentication.refresh(token, self.identity)
        finally:
            self._refreshing -= 1
        revocations = self.connections.revocations
        await self.connections.check_not_revoked(identity)
        self._assume(identity)
        self._watch()
        if self.connections.revocations != revocations:
            self.reauthorize_soon()  # the new token may have been meant, and was not known yet
        try:
            await self.reauthorize()
        except Exception as error:
            # Told so, the client would go on with the new token, and read what the old one opened.
            self._tasks.end(error)
            await anyio.lowlevel.checkpoint_if_cancelled()
            raise

    async def reauthorize(self) -> None:
        """Ask ``authorize`` again for each channel that is read, and leave those that it denies."""
        self._reauthorizations += 1
        for group in sorted(self.groups):
            if not await self.connections.allows(self.identity, "subscribe", group):
                await self.group_discard(group)
                denied = {"action": "subscribe", "channel": group}
                await self.tell(AuthorizationError(context=denied))

    def reauthorize_soon(self, revoked: str | None = None) -> None:
        """Find out whether its token is still good, and what it may read. At once; never raises.

        Args:
            revoked: the user whose tokens have just been revoked, if that is why.
        """
        if self._tasks.ended is None:
            self._tasks.spawn(self._reauthorize(revoked))

    async def _reauthorize(self, revoked: str | None = None) -> None:
        identity = self.identity
        if identity is not None:
            await self.connections.check_not_revoked(identity)
        if self.user_id is not None and (identity is None or identity.user_id != self.user_id):
            # Who was found out by other means was so before we were told; else a clock has to say.
            since = None if revoked == self.user_id else self._identified_at
            await self.connections.check_not_revoked(Identity(self.user_id, issued_at=since))
        await self.reauthorize()

    def is_meant_by(self, command: Command) -> bool:
        """Whether a command to all nodes concerns this connection."""
        return (
            command.everyone
            or command.channel == self.channel_name
            or (command.user_id is not None and command.user_id in self._users)
            or (command.group is not None and self._stream.reads(command.group))
            or (
                command.token_id is not None
                and self.identity is not None
                and command.token_id == self.identity.token_id
            )
        )

    @property
    def _users(self) -> tuple[str | None, str | None]:
        """Whose it is, and whose token it came with: an endpoint may have told them apart."""
        return self.user_id, None if self.identity is None else self.identity.user_id

    def _extension(self) -> float:
        # A refresh that was sent in time may wait for a handler that is busy.
        if self._extended == 0 and not self._inbox.is_read:
            self._extended = 1
            self._inbox.read_ahead()
            return _FINDING_TIME
        frame = self._inbox.ahead
        is_sent = self._refreshing or (frame is not None and frame.type == "auth.refresh")
        if self._extended < 2 and is_sent:
            self._extended = 2
            return REFRESHING_TIME
        return 0.0

    def _assume(self, identity: Identity) -> None:
        self.identity = identity
        self._extended = 0
        when = inf
        if identity.expires_at is not None:
            left = identity.expires_at - datetime.now(UTC)
            when = self._loop.time() + left.total_seconds()
        self._liveness.expire_at(when)

    # What the client sends

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        """What the client sends, parsed."""
        return await self._receive_content()

    def frames(self) -> AsyncIterator[Frame]:
        """What the client sends, not parsed: for what is not JSON. None of it is answered here.

        A ``ping``, a ``pong`` and an ``auth.refresh`` are the application's, as all else is.
        """
        return _Frames(self._receive_frame)

    def answers_itself(self, kind: str | None) -> bool:
        """Whether a frame of this type goes no further than here. For middleware to ask of one.

        ``ping`` and ``pong`` are answered where iterating gives parsed JSON, unless a consumer
        declares them; so is ``auth.refresh``, of who was authenticated. Where it gives frames as
        they are, nothing is.
        """
        if not self._answers or kind not in ANSWERED:
            return False
        return kind != "auth.refresh" or self.identity is not None

    async def _receive_content(self) -> Any:
        """The next frame's JSON. What is meant for us is answered here."""
        return (await self._inbox.take(self._begin_content)).shared_json()

    async def _receive_frame(self) -> Frame:
        """The next frame that is not too large, and that the middleware lets pass."""
        return await self._inbox.take(self._begin_frame)

    def _begin_frame(self, frame: Frame) -> Frame | Rest:
        self._answers = False
        return self._begin_passing(frame)

    def _begin_content(self, frame: Frame) -> Frame | Rest:
        self._answers = True
        begun = self._begin_passing(frame)
        if isinstance(begun, Frame):
            return begun if self._is_for_the_application(begun) else self._answer(begun)
        return self._pass_or_answer(begun)

    def _is_for_the_application(self, frame: Frame) -> bool:
        """Whether it is JSON that is not answered here."""
        try:
            frame.shared_json()
        except SocketError:
            return False
        return not self.answers_itself(frame.type)

    async def _pass_or_answer(self, passing: Rest) -> Frame | None:
        frame = await passing
        if frame is None or self._is_for_the_application(frame):
            return frame
        await self._answer(frame)
        return None

    async def _answer(self, frame: Frame) -> None:
        await self._guarded(self._answer_by_type(frame))

    async def _answer_by_type(self, frame: Frame) -> None:
        content = frame.shared_json()
        if frame.type == "ping":
            # More levels can be read than written.
            await self.send_json({**content, "type": "pong"})
        elif frame.type == "auth.refresh":
            await self._refresh(content)
        # Of a pong, that it has come is all there is to it.

    async def _refresh(self, content: Mapping[str, Any]) -> None:
        token = content.get("token")
        try:
            await self.refresh(token if isinstance(token, str) else "")
        except SocketError as error:
            if error.category is Category.BACKEND:
                error.disconnects = False  # nothing is wrong with the token that it has
            raise
        expires_at = self.identity and self.identity.expires_at
        await self.send_json({"type": "auth.refreshed", "expires_at": expires_at})

    def _begin_passing(self, frame: Frame) -> Frame | Rest:
        """Let it pass, if it is not too large and the middleware has nothing against it."""
        connections = self.connections
        if frame.size > connections.max_frame_size:
            return self._refuse_large()
        middleware = connections.middleware
        if middleware is None:
            return frame
        if not middleware.is_immediate:
            return self._pass_middleware(middleware.inbound(self, frame))
        passing = middleware.inbound(self, frame)
        try:
            passing.send(None)
        except StopIteration as passed:
            return self._nothing() if passed.value is None else passed.value
        except Exception as error:  # noqa: BLE001 - what is not for the client is raised again
            return self._refuse(error)
        passing.close()
        raise RuntimeError(f"{middleware!r} is not immediate")

    async def _pass_middleware(self, passing: Awaitable[Frame | None]) -> Frame | None:
        try:
            return await passing
        except Exception as error:  # noqa: BLE001 - what is not for the client is raised again
            await self._refuse(error)
            return None

    async def _refuse(self, error: Exception) -> None:
        await self._tell_or_raise(error)

    async def _refuse_large(self) -> None:
        limit = self.connections.max_frame_size
        detail = f"a frame has at most {limit} bytes"
        await self.tell(FrameTooLarge(detail, context={"limit": limit}))

    async def _nothing(self) -> None:
        """It was dropped."""

    # What goes to the client

    async def forward(self, message: Message) -> None:
        """There is a message for the client. Sends its envelope.

        One that was sent to become a frame of its own is sent as that: see
        :meth:`~pgchannels.ChannelLayer.send_json_message`.
        """
        frame = unwrapped(message)
        if frame is None:
            frame = message.envelope
            if self._counts_untold:
                self._untold.sent(message)
        await self._send_frame(frame)

    async def truncated(self) -> None:
        """Messages that were to be replayed have been removed by retention. Tells the client so.

        It comes before what is left of them, as ``{"type": "truncated"}``. A client that keeps
        state should load it anew.
        """
        await self.send_json({"type": "truncated"})

    async def _start(self) -> None:
        """Accept the socket, unless that has been done, and forward what arrives from now on."""
        await self.accept()
        self._tasks.spawn(self._forward_all())

    async def _deliver(self, message: Message) -> None:
        """There is a message for the connection. Forwards it."""
        await self.forward(message)

    async def _forward_all(self) -> None:
        """Deliver what arrives, until the socket ends."""
        stream, chain = self._stream, self.connections.middleware
        if chain is not None and not chain.sees_outbound:
            chain = None
        self._forwarding = asyncio.current_task()
        self._counts_untold = chain is not None or self._is_selective
        while True:
            messages = await stream.shared_batch()
            if stream.truncated:
                stream.truncated = False
                await self.truncated()
            for message in messages:
                if not stream.reads(message.channel):
                    continue  # it has been left in the meantime
                if chain is None:
                    await self._deliver(message)
                else:
                    await self._account_for(message, self._deliver_through(chain, message))

    async def _account_for(self, message: Message, doing: Awaitable[None]) -> None:
        """Do what may not send *message*, and have the client told its position in that case.

        Also after an error that comes again with each attempt: otherwise, the client would be sent
        away by this message each time that it resumes.
        """
        self._untold.begin(message)
        try:
            await doing
        except Exception as error:
            if isinstance(error, WebSocketDisconnect) or describe(error).retry_after is not None:
                self._untold.again()
            elif self._untold.done():
                error.add_note(f"The message was {message.position} of {message.channel!r}.")
            raise
        except BaseException:
            self._untold.again()
            raise
        self._untold.done()
        if self._untold and not self._telling and self._tasks.ended is None:
            self._telling = True
            self._tasks.spawn(self._tell_positions_soon())

    async def _tell_positions_soon(self) -> None:
        await asyncio.sleep(POSITION_DELAY)
        self._telling = False
        await self._tell_positions()

    async def _tell_positions(self) -> None:
        # With empty data, so that a client which takes every frame with a position for an envelope
        # finds nothing in it.
        frame = {"type": "position", "data": {}}
        for channel, position in self._untold.take().items():
            await self.send_json(frame | {"channel": channel, "position": position})

    async def _deliver_through(self, chain: Chain, message: Message) -> None:
        passed = None
        try:
            passed = await chain.outbound(self, message.own())
        except Exception as error:  # noqa: BLE001 - what is not for the client is raised again
            await self._tell_or_raise(error)
        if passed is not None:
            with chain.delivering(self, passed):
                await self._deliver(passed)

    # Its life

    def life(
        self,
        identity: Identity | None = None,
        user_id: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        *,
        starts: bool = False,
    ) -> AbstractAsyncContextManager[None]:
        """Serve the socket in a block, and close it after. It is not accepted yet.

        Args:
            identity: who it is, if that is known already.
            user_id: whose it is; the identity's if None.
            metadata: what presence shows of it.
            starts: accept it, and forward to it, before the block. Whoever has the block then
                closes the socket in place of it when it does not begin.

        Raises:
            Refused: the socket was not accepted.
            Unserved: it was at its end before the block began.
            Exception: what nobody expected, as it is. The client and the log have its id.
        """
        admitting = self._admit(identity, user_id, metadata)
        return self._live(admitting, self._start if starts else None)

    def _stream_ended(self, error: BaseException) -> None:
        # The log may have been rewritten. That is not the client's doing, as an unknown position
        # that it gives is: it connects again, and is told then.
        if isinstance(error, UnknownPosition) or not isinstance(error, Exception):
            error = ChannelLayerClosed()
        self._tasks.end(error)

    async def _admit(
        self,
        identity: Identity | None,
        user_id: str | None,
        metadata: Mapping[str, Any] | None,
    ) -> None:
        connections = self.connections
        connections.check_admissible(self.websocket)
        if identity is None and connections.authentication is not None:
            identity = await connections.authentication.handshake(
                self.websocket, origin_checked=True
            )
            if identity is None:
                # The token comes with the first message. Before that, nothing is kept for it.
                await self.accept()
                identity = await self._introduction(connections.authentication)
        # In this order: what is revoked after it was asked about is told of.
        self._revocations = connections.arrive(self)
        if identity is not None:
            await connections.check_not_revoked(identity)
            self._assume(identity)
            user_id = identity.user_id if user_id is None else user_id
        self.user_id, self.metadata = user_id, metadata
        self.channel_name = await self.layer.new_channel(
            "ws", user_id=user_id, metadata=metadata, limits=connections.limits
        )

    async def _introduction(self, authentication: Authentication) -> Identity:
        try:
            async with asyncio.timeout(authentication.deadline):
                frame = await self._next_frame()
        except TimeoutError:
            raise AuthenticationTimeout from None
        if frame is None:
            raise WebSocketDisconnect(self._gone or ABNORMAL)
        if frame.size > self.connections.max_frame_size:
            raise FrameTooLarge(disconnect=True)
        return await authentication.first_message(frame.raw)

    @asynccontextmanager
    async def _reading(self) -> AsyncIterator[None]:
        overflow = self.connections.overflow
        async with self.layer.subscribe(member=self.channel_name, overflow=overflow) as stream:
            self._stream = stream
            # Also while whoever reads it is stuck in sending, and would not hear of it.
            stream.on_end(self._stream_ended)
            stream.on_owner(self._owned_by)
            self.connections.enter(self)
            yield

    def _tasks_run(self) -> None:
        if self.connections.revocations != self._revocations:
            self.reauthorize_soon()  # it may have been meant, and was not known yet

    @property
    def _is_admitted(self) -> bool:
        return bool(self.channel_name)

    def _note(self, error: Exception, *, raised: bool = False, refuses: bool = False) -> Problem:
        return self.connections.note(error, self, raised=raised, refuses=refuses)

    async def _let_go(self) -> None:
        try:
            if self.channel_name:
                await self._delete_channel()
        finally:
            self.connections.exit(self)

    async def _delete_channel(self) -> None:
        """Also ends the memberships. No error of this may hide another one."""
        with anyio.move_on_after(CLOSING_TIME, shield=True) as limit:
            try:
                await self.layer.delete_channel(self.channel_name)
            except ChannelLayerClosed:
                logger.debug("the layer has been closed, and %s with it", self.channel_name)
            except DatabaseUnavailable as error:
                logger.warning("%s could not be removed: %s", self.channel_name, error)
            except Exception:
                logger.exception("%s could not be removed", self.channel_name)
        if limit.cancelled_caught:
            logger.warning("%s could not be removed in time", self.channel_name)


class _Frames:
    """What :meth:`Connection.frames` gives. No generator: a timeout would be the end of that."""

    def __init__(self, receive: Callable[[], Awaitable[Frame]]) -> None:
        self._receive = receive

    def __aiter__(self) -> AsyncIterator[Frame]:
        return self

    async def __anext__(self) -> Frame:
        return await self._receive()
