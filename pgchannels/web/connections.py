"""All connections of one process: how they are admitted, found, written to, counted, sent away.

A manager has no task of its own, and opens nothing: connections bring their tasks with them, and
what it must hear from other nodes (a revocation, an order to close) comes to it by the layer.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from math import ceil, inf
from typing import TYPE_CHECKING, Any

from pgchannels.control import REVOKED, Command
from pgchannels.errors import ChannelLayerClosed, ConfigurationError, InvalidMessage
from pgchannels.layer import ChannelLayer
from pgchannels.limits import Limits
from pgchannels.overflow import Overflow
from pgchannels.web.auth import Authentication, Origins, is_allowed
from pgchannels.web.callables import is_async_callable
from pgchannels.web.codes import NORMAL, SERVICE_RESTART
from pgchannels.web.connection import Connection
from pgchannels.web.errors import (
    AuthenticationError,
    Draining,
    Problem,
    Severity,
    SocketError,
    describe,
)
from pgchannels.web.life import Refused, Unserved
from pgchannels.web.liveness import Heartbeat
from pgchannels.web.middleware import Chain, Middleware
from pgchannels.web.refusal import closed_by, ending, refusal
from pgchannels.web.statistics import Counts, Statistics
from pgchannels.web.wire import ConnectionState

if TYPE_CHECKING:
    from fastapi import APIRouter
    from starlette.websockets import WebSocket

    from pgchannels.records import ConnectionInfo, Receipt
    from pgchannels.web.auth import Action, Authorize, Identity

__all__ = ["ConnectionManager", "Shutdown", "check_layer"]

logger = logging.getLogger("pgchannels.web")

DEFAULT_LIMITS = Limits(per_user=1000, groups=1000)
MAX_FRAME_SIZE = 64 * 1024


@dataclass(frozen=True)
class Shutdown:
    """How a server says goodbye. Durations are seconds.

    Args:
        reconnect_within: each client is told, by ``{"type": "reconnect", "reconnect_in": …}``, when
            to connect again; these times are spread evenly over so long. Not infinite.
        timeout: what saying so to all of them may take; :data:`math.inf` for as long as it takes.

    Raises:
        ConfigurationError: one is negative or no number, or there is no time to connect again.
    """

    reconnect_within: float = 10.0
    timeout: float = 10.0

    def __post_init__(self) -> None:
        for name in ("reconnect_within", "timeout"):
            given: object = getattr(self, name)
            if not isinstance(given, (int, float)) or not given >= 0:
                raise ConfigurationError(f"{name} must be 0 seconds or more, not {given!r}")
        if self.reconnect_within == inf:
            # Clients would be told null, which is no time.
            raise ConfigurationError("reconnect_within must be finite")


class ConnectionManager:
    """Admits connections by the same rules, and knows them. One or several in a process.

    ::

        connections = ConnectionManager(layer, limits=Limits(per_user=5))
        app = FastAPI(lifespan=lifespan(connections))

        @app.websocket("/ws/{room}")
        async def chat(socket: WebSocket, room: str, user: CurrentUser) -> None:
            async with connections.connect(socket, user_id=user.id) as connection:
                await connection.join(f"room:{room}", after=connection.resume_position)
                async for content in connection:
                    await connection.publish(f"room:{room}", {"content": content})

    Consumers are admitted by it with ``Room.as_endpoint(connections)``.

    Args:
        layer: the channel layer.
        limits: how many connections there may be, and of what; by default, 1000 of a user, and
            1000 channels that one connection reads.
        heartbeat: how it is found out that a client is gone.
        overflow: what becomes of messages for a client that does not keep up; by default it goes
            back to the log, and reads on at its own pace.
        send_timeout: seconds that a client may take nothing of what is sent to it, or less than
            2 KiB a second, before the socket is closed with 1013; None for no limit.
        max_frame_size: bytes of a frame that a client sends, 64 KiB by default; a longer one is
            answered by ``frame_too_large``, unread. The work that a frame may cause grows with its
            size. The server has a limit of its own, see :meth:`server_options`.
        origins: from which sites' pages browsers may connect; if None, those of *authentication*,
            or else only the server's own. ``Origins("*")`` is for all sites.
        authentication: who connects; without, that is the endpoint's to find out.
        authorize: what they may do with which channel; without, that is the endpoint's to say.
        middleware: what frames and messages pass through.
        shutdown: how a server says goodbye.

    Raises:
        ConfigurationError: *layer* is no channel layer, a number is out of its range, or tokens
            come in cookies and any origin would do.
    """

    def __init__(
        self,
        layer: ChannelLayer,
        *,
        limits: Limits = DEFAULT_LIMITS,
        heartbeat: Heartbeat = Heartbeat(),  # noqa: B008 - frozen
        overflow: Overflow | str | None = None,
        send_timeout: float | None = 30.0,
        max_frame_size: int = MAX_FRAME_SIZE,
        origins: Origins | None = None,
        authentication: Authentication | None = None,
        authorize: Authorize | None = None,
        middleware: Middleware | None = None,
        shutdown: Shutdown = Shutdown(),
    ) -> None:
        check_layer(layer)
        if send_timeout is not None:
            _check_number("send_timeout", send_timeout, (int, float))
        _check_number("max_frame_size", max_frame_size, int)
        _check("limits", limits, Limits)
        _check("heartbeat", heartbeat, Heartbeat)
        _check("shutdown", shutdown, Shutdown)
        _check("origins", origins, Origins, None)
        _check("authentication", authentication, Authentication, None)
        _check("middleware", middleware, Middleware, None)
        if authorize is not None and not is_async_callable(authorize):
            raise ConfigurationError(
                f"authorize is an async callable, of identity, action and channel: {authorize!r}"
            )
        if origins is not None and origins.any and _has_cookies(authentication):
            raise ConfigurationError("with cookies, any site could act for its visitors: list them")
        self.layer = layer
        self.limits = limits
        self.heartbeat = heartbeat
        self.overflow = Overflow.parse(overflow)
        self.send_timeout = send_timeout
        self.max_frame_size = max_frame_size
        self.origins = _origins(origins, authentication)
        self.authentication = authentication
        self.authorize = authorize
        self.middleware = None if middleware is None else Chain(middleware)
        self.shutdown = shutdown
        self.is_draining = False
        """Whether this server shuts down, and admits nobody any more."""
        self.revocations = 0
        """How often somebody's rights may have changed since there was a connection."""
        self._known: set[Connection] = set()  # and those that have been admitted
        self._connections: dict[str, Connection] = {}
        self._counts = Counts()
        self._empty = asyncio.Event()
        self._empty.set()
        self._unwatch: Callable[[], None] | None = None

    @asynccontextmanager
    async def connect(
        self,
        websocket: WebSocket,
        *,
        identity: Identity | None = None,
        user_id: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        subprotocol: str | None = None,
        headers: Iterable[tuple[bytes, bytes]] | None = None,
    ) -> AsyncIterator[Connection]:
        """Admit a socket, accept it, and serve it in this block; close it after.

        When something that serves the socket fails, the block is cancelled; when the client is
        gone, it has three seconds to end by itself, as ``async for content in connection`` does.

        An exception about the client's request that is raised in the block is told to the client
        and closes the socket; any other exception does that with 1011, and is raised again.

        Args:
            websocket: of the endpoint, not accepted yet.
            identity: who it is, as a dependency has found out; else ``authentication`` does.
            user_id: whose it is, any text; that of the identity if None.
            metadata: a JSON object of up to 8 KiB that presence shows.
            subprotocol: to accept the socket with; if None, the one that its token came with.
            headers: to accept it with, besides.

        Raises:
            HTTPException: the socket is refused; the application answers it with that status. On a
                server that cannot do so, a ``WebSocketException``.
            WebSocketException: the socket was at its end before the block could begin, after it had
                been accepted; the application closes it by that. Or an error that is known has
                ended it, and is the cause: dependencies see it, and nothing more is done.
        """
        connection = Connection(websocket, self)
        connection.accept_with(subprotocol, headers)
        try:
            async with connection.life(identity, user_id, metadata, starts=True):
                yield connection
        except Refused as refused:
            raise refusal(websocket, refused.problem) from refused
        except Unserved as unserved:
            raise ending(websocket, unserved.code, unserved.reason) from None
        if connection.failed_with is not None:
            raise closed_by(websocket, connection.close_code) from connection.failed_with

    async def disconnect(
        self, connection: Connection | str, code: int = NORMAL, reason: str = ""
    ) -> None:
        """Close a connection, of any node. Not an error if there is none.

        Args:
            connection: itself, or its id.
            code: 1000 to 4999, but 1005 and 1006.
            reason: up to 123 bytes.

        Raises:
            InvalidMessage: the code or the reason cannot be sent.
        """
        command = Command("close", channel=_id_of(connection), code=code, reason=reason)
        local = self._connections.get(_id_of(connection))
        if local is not None:
            local.close_soon(code, reason)
        else:
            await self.layer.command(command)

    # Send: what is stored in the log, and reaches whoever is concerned on any node

    async def send_personal(
        self, connection: Connection | str, payload: Any, **options: Any
    ) -> Receipt:
        """Send to one connection, of any node. The *options* are those of ``layer.send()``."""
        return await self.layer.send(_id_of(connection), payload, **options)

    async def send_group(self, group: str, payload: Any, **options: Any) -> Receipt:
        """Send to a group: see ``layer.group_send()``."""
        return await self.layer.group_send(group, payload, **options)

    async def send_group_except(
        self, group: str, payload: Any, connection: Connection | str, **options: Any
    ) -> Receipt:
        """Send to a group, but not to this member."""
        exclude = _id_of(connection)
        return await self.layer.group_send(group, payload, exclude=exclude, **options)

    async def send_to_user(self, user_id: str, payload: Any, **options: Any) -> Receipt:
        """Send to all connections of a user, on all nodes."""
        return await self.layer.send_to_user(user_id, payload, **options)

    async def broadcast(self, payload: Any, **options: Any) -> Receipt:
        """Send to every connection, on all nodes."""
        return await self.layer.broadcast(payload, **options)

    async def join_group(self, connection: Connection | str, group: str) -> None:
        """Make a connection, of any node, a member of a group.

        ``authorize`` is not asked now, and ``limits.groups`` does not count: that is for what
        clients want. When the connection is authorized anew, this group is asked about as any.

        Raises:
            GroupFull: it has as many members as the limits allow.
        """
        limit = self.limits.group_members
        await self.layer.group_add(group, _id_of(connection), limit=limit)

    async def leave_group(self, connection: Connection | str, group: str) -> None:
        """End a connection's membership. Not an error if there is none.

        What the connection has joined without being a member, it reads on.
        """
        await self.layer.group_discard(group, _id_of(connection))

    # Find

    def get(self, connection_id: str) -> Connection | None:
        """The connection of this process that has this id."""
        return self._connections.get(connection_id)

    def __iter__(self) -> Iterator[Connection]:
        """Those of this process, the oldest first; it may change meanwhile."""
        return iter(list(self._connections.values()))

    def __len__(self) -> int:
        return len(self._connections)

    def __bool__(self) -> bool:
        return True  # one without connections is still a manager

    def get_user_connections(self, user_id: str) -> list[Connection]:
        """Those of a user in this process; :meth:`everywhere` has those of all nodes."""
        return [each for each in self if each.user_id == user_id]

    def everywhere(self, *, user_id: str | None = None) -> AsyncIterator[ConnectionInfo]:
        """All connections of all nodes, or those of a user, by their ids; read in pages."""
        return _Everywhere(self.layer, user_id)

    async def count(self, *, user_id: str | None = None) -> int:
        """How many there are on all nodes, or of a user."""
        return await self.layer.count_connections(user_id=user_id)

    def statistics(self) -> Statistics:
        """What this process has counted."""
        return self._counts.statistics(self._connections.values(), is_draining=self.is_draining)

    # Send away

    async def revoke(
        self, *, user_id: str | None = None, token_id: str | None = None, **options: Any
    ) -> None:
        """Make tokens that have been issued until now worthless, and close what came with them.

        As ``layer.revoke()``, whose *options* these are. On all nodes; the code is 3000.
        """
        await self.layer.revoke(user_id=user_id, token_id=token_id, **options)

    async def drain(self) -> None:
        """Admit nobody any more, and tell everybody when to connect again, to another server.

        Every client gets ``{"type": "reconnect", "reconnect_in": seconds}`` and the close code
        1012. Returns when all are gone, or after ``shutdown.timeout``; once more does it again.
        """
        self.is_draining = True
        leaving = list(self)
        # One in each slot, so that they are spread over the time whatever the dice say.
        slots = random.sample(range(len(leaving)), len(leaving))
        for slot, connection in zip(slots, leaving, strict=True):
            slice_ = self.shutdown.reconnect_within / len(leaving)
            wait = round((slot + random.random()) * slice_, 3)
            connection.close_soon(
                SERVICE_RESTART,
                f"reconnect in {wait:g} s",
                farewell={"type": "reconnect", "reconnect_in": wait},
            )
        try:
            async with asyncio.timeout(self.shutdown.timeout):
                await self._empty.wait()
        except TimeoutError:
            logger.warning("%d connections did not close in time", len(self._connections))

    def server_options(self) -> dict[str, Any]:
        """What uvicorn is to be given: for the heartbeat, the size of frames, and its own end.

        ::

            uvicorn.run(app, **connections.server_options())

        When all have been told to go, the server waits once more for ``shutdown.timeout``, for
        requests as well as for sockets of other endpoints; without that option it waits for ever.
        """
        patience = self.shutdown.timeout
        return {
            **self.heartbeat.server_options(),
            # A little more, so that who is just above it gets an answer.
            "ws_max_size": 2 * self.max_frame_size,
            "timeout_graceful_shutdown": None if patience == inf else max(1, ceil(patience)),
        }

    # Routers

    def status_router(self, **options: Any) -> APIRouter:
        """``GET /status`` and health: see :func:`pgchannels.web.status_router`."""
        from pgchannels.web.status import status_router

        return status_router(self, **options)

    def admin_router(self, *, authorize: Callable[..., Any], **options: Any) -> APIRouter:
        """For operators: see :func:`pgchannels.web.admin_router`."""
        from pgchannels.web.admin import admin_router

        return admin_router(self, authorize=authorize, **options)

    def metrics_router(self, **options: Any) -> APIRouter:
        """``GET /metrics``: see :func:`pgchannels.web.metrics.metrics_router`."""
        try:
            from pgchannels.web.metrics import metrics_router
        except ModuleNotFoundError as error:
            raise ConfigurationError(str(error)) from error

        return metrics_router(self, **options)

    # For connections

    def check_admissible(self, websocket: WebSocket) -> None:
        """Refuse what needs no look at the database.

        Raises:
            Draining: this server shuts down.
            ConnectionRefused: the page is of a site that may not connect.
        """
        if self.is_draining:
            raise Draining
        self.origins.check(websocket)

    async def check_not_revoked(self, identity: Identity) -> None:
        """Ask whether the token is still worth something.

        Raises:
            AuthenticationError: it has been revoked.
        """
        if await self.layer.is_revoked(
            user_id=identity.user_id, token_id=identity.token_id, issued_at=identity.issued_at
        ):
            raise AuthenticationError("the token has been revoked", code="token_revoked")

    async def allows(self, identity: Identity | None, action: Action, channel: str) -> bool:
        """Whether ``authorize`` says so; without one, everything is the endpoint's to decide."""
        return self.authorize is None or await is_allowed(self.authorize, identity, action, channel)

    def arrive(self, connection: Connection) -> int:
        """A connection is about to be admitted. How many revocations there have been.

        Raises:
            ChannelLayerClosed: the layer is not open.
        """
        if self._unwatch is None:
            self._unwatch = self.layer.watch_commands(self._obey, self._missed)
        self._known.add(connection)
        return self.revocations

    def enter(self, connection: Connection) -> None:
        """A connection has been admitted."""
        if not self._connections:
            # Another one: an application may be started again, in another loop.
            self._empty = asyncio.Event()
        self._connections[connection.id] = connection
        self._counts.opened += 1
        if self.is_draining:  # it was on its way
            connection.close_soon(SERVICE_RESTART, "shutting down")

    def exit(self, connection: Connection) -> None:
        """Nothing is left of a connection, be it that it was never admitted."""
        if self._connections.pop(connection.id, None) is not None:
            self._counts.add_traffic(connection)
            self._counts.closed[connection.close_code or 0] += 1
            if not self._connections:
                self._empty.set()
        self._known.discard(connection)
        if not self._known and self._unwatch is not None:
            self._unwatch()
            self._unwatch = None
        if self.middleware is not None:
            self.middleware.closed(connection)

    def note(
        self,
        error: Exception,
        connection: Connection,
        *,
        raised: bool = False,
        refuses: bool = False,
    ) -> Problem:
        """Count an error, log what is not the client's own, and say what the client may hear.

        An unexpected error is logged with its traceback, unless it is *raised* again: servers log
        what reaches them, and a traceback belongs in the log once. It then has the id as a note.
        A socket that an error *refuses*, before it was accepted, has a line in the log.
        """
        if isinstance(error, SocketError) and error.connection is None:
            error.connection = connection
        problem = describe(error)
        # Once it is admitted, it may be told and go on.
        ends = problem.disconnects or not connection.id
        is_refused = ends and connection.state is ConnectionState.CONNECTING
        (self._counts.refused if is_refused else self._counts.errors)[problem.code] += 1
        if problem.error_id is not None:
            if raised:
                error.add_note(f"error {problem.error_id}")
            logger.error(
                "%s failed; error %s: %r",
                type(connection).__name__,
                problem.error_id,
                error,
                exc_info=None if raised else error,
                extra={"error_id": problem.error_id, "connection": connection.id},
            )
        elif (is_refused or refuses) and isinstance(error, SocketError):
            _log_refusal(connection, problem)
        elif isinstance(error, InvalidMessage):
            # What is wrong with it may be what the client sent, or what was made of it here. No
            # warning, nor a traceback: a client could fill the log with them.
            logger.info("%s answers with an error: %r", type(connection).__name__, error)
        elif isinstance(error, ChannelLayerClosed) and not connection.id:
            logger.error("a socket is refused: %s", error)
        elif problem.severity is not Severity.INFO:
            logger.warning("%s: %s", type(connection).__name__, error)
        elif is_refused or refuses:
            _log_refusal(connection, problem)
        return problem

    # What other nodes say

    def _obey(self, command: Command) -> None:
        if command.action == "reauthorize":
            self.revocations += 1
        for connection in self:
            if not connection.is_meant_by(command):
                continue
            if command.action == "close":
                connection.close_soon(command.code, command.reason)
            else:
                is_revoked = command.reason == REVOKED
                connection.reauthorize_soon(command.user_id if is_revoked else None)

    def _missed(self) -> None:
        """Commands may have been lost: find out whom they would have concerned."""
        self.revocations += 1
        for connection in self:
            connection.reauthorize_soon()


class _Everywhere:
    """What ``everywhere()`` gives. No generator: a timeout would be the end of that."""

    def __init__(self, layer: ChannelLayer, user_id: str | None) -> None:
        self._layer = layer
        self._user_id = user_id
        self._after: str | None = None
        self._page: deque[ConnectionInfo] = deque()

    def __aiter__(self) -> AsyncIterator[ConnectionInfo]:
        return self

    async def __anext__(self) -> ConnectionInfo:
        if not self._page:
            self._page.extend(
                await self._layer.connections(user_id=self._user_id, after=self._after)
            )
        if not self._page:
            raise StopAsyncIteration
        info = self._page.popleft()
        self._after = info.channel
        return info


def _log_refusal(connection: Connection, problem: Problem) -> None:
    """Not with what the error says: that may repeat what the client has sent."""
    logger.log(
        logging.INFO if problem.severity is Severity.INFO else logging.WARNING,
        "%s refuses a socket: %s",
        type(connection).__name__,
        problem.code,
        extra={"connection": connection.id, "code": problem.code},
    )


def _check(name: str, given: object, *kinds: type | None) -> None:
    if not any(given is None if kind is None else isinstance(given, kind) for kind in kinds):
        wanted = " or ".join("None" if kind is None else f"{kind.__name__}(…)" for kind in kinds)
        raise ConfigurationError(f"{name} must be {wanted}, not {given!r}")


def _check_number(name: str, given: object, kind: type | tuple[type, ...]) -> None:
    if not isinstance(given, kind) or isinstance(given, bool) or not given > 0:  # type: ignore[operator]
        raise ConfigurationError(f"{name} must be a positive number, not {given!r}")


def _origins(given: Origins | None, authentication: Authentication | None) -> Origins:
    # An application may read cookies of its own, of which nothing is known here.
    if given is not None:
        return given
    return Origins() if authentication is None else authentication.origins


def _has_cookies(authentication: Authentication | None) -> bool:
    return authentication is not None and authentication.needs_origin_check


def check_layer(layer: object) -> None:
    """Raise :class:`ConfigurationError` for anything that is not a layer."""
    if not isinstance(layer, ChannelLayer):
        raise ConfigurationError(f"expected a channel layer, not {layer!r}")


def _id_of(connection: Connection | str) -> str:
    return connection if isinstance(connection, str) else connection.id
