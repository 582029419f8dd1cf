"""Class-based consumers: one object a socket, with methods for what can happen to it.

Two tasks serve a socket: one receives from the client, one forwards from the log. Each may wait for
the socket; neither makes anyone else wait. When one of them ends, or a task that was spawned beside
them fails, all end, and the socket is closed with a code: it is never left open and deaf.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from functools import lru_cache
from inspect import Parameter, iscoroutinefunction
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import anyio
from pydantic import ValidationError
from starlette.websockets import WebSocket

from pgchannels.errors import ConfigurationError, PGChannelsError
from pgchannels.messages import FRAME
from pgchannels.web.annotations import defining_namespace, parameters
from pgchannels.web.connection import Connection
from pgchannels.web.connections import ConnectionManager
from pgchannels.web.endpoint import make_endpoint
from pgchannels.web.handlers import (
    EventHandlers,
    Handler,
    find_events,
    find_receivers,
    is_overridden,
)
from pgchannels.web.life import Refused, Unserved
from pgchannels.web.overriding import check_overrides
from pgchannels.web.refusal import closed_by, refuse
from pgchannels.web.validation import problems
from pgchannels.web.wire import CLOSING_TIME

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pgchannels.layer import ChannelLayer
    from pgchannels.messages import Message

__all__ = ["WebSocketConsumer"]

logger = logging.getLogger("pgchannels.web")


@lru_cache(maxsize=1000)
def _warn(message: str, created_at: datetime, handler: str, found: str) -> None:
    """Log it once a message and handler, however many sockets receive the message.

    Args:
        message: its position and channel, which messages of two logs may have in common.
        created_at: so that these are told apart.
        handler: its name.
        found: why the message does not fit.
    """
    logger.warning("%s does not fit %s, and is dropped: %s", message, handler, found)


class _Connect(NamedTuple):
    function: Callable[..., Any] | None
    parameters: Sequence[Parameter]


class WebSocketConsumer(Connection):
    """One socket. Subclass it and override what you need::

        class Room(WebSocketConsumer):
            async def connect(self, room: str, user: CurrentUser) -> None:
                await self.accept()
                await self.identify(user.id)
                await self.group_add(f"room:{room}", after=self.query_params.get("after"))

            async def receive(self, text: str | None = None, bytes: bytes | None = None) -> None:
                await self.layer.group_send(…)

        CurrentUser = Annotated[User, Depends(current_user)]
        app.add_api_websocket_route("/rooms/{room}", Room.as_endpoint(layer))

    ``connect()`` may have any parameters that an endpoint of FastAPI may.

    The socket has a channel of its own, :attr:`channel_name`. What is sent to that, to its user, to
    everyone, to the groups that it was added to or has joined goes to the client as it is in the
    log, as ``{"id", "position", "channel", "created_at", "data"}``, in one order over all that
    is live, unless a method handles it (:func:`~pgchannels.web.handles`). A client that keeps the
    last position of each channel can resume anywhere with it.

    What was wrong about a client's message is answered by ``{"type": "error", "code", "detail"}``,
    and the socket stays open; if ``connect()`` failed by it, the socket is closed with 1008,
    with 3010 because of a position that is not known, or with 1013 where the database is away. An
    exception that nobody expected closes it with 1011.
    """

    _events: ClassVar[EventHandlers] = EventHandlers({})
    _forwards_itself: ClassVar[bool] = False
    _receivers: ClassVar[Mapping[str, Handler]] = {}
    _receives_types: ClassVar[bool] = False
    _connect: ClassVar[_Connect] = _Connect(None, ())

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        namespace = defining_namespace()
        check_overrides(cls)
        cls._events = find_events(cls, namespace, cls._events.by_type.values())
        cls._forwards_itself = is_overridden(cls, "forward")
        cls._is_selective = cls._forwards_itself or bool(cls._events.by_type)
        cls._receivers = find_receivers(cls, namespace, cls._receivers.values())
        if cls._receivers and not cls._receives_types:
            names = ", ".join(handler.name for handler in cls._receivers.values())
            raise ConfigurationError(f"{names}: only a JsonConsumer receives by type")
        if cls.connect is not cls._connect.function:
            if not iscoroutinefunction(cls.connect):
                raise ConfigurationError(f"{cls.connect.__qualname__} must be an async method")
            found = parameters(cls.connect, {**namespace, **vars(cls)})
            cls._connect = _Connect(cls.connect, found)

    def __init__(self, websocket: WebSocket, connections: ConnectionManager | ChannelLayer) -> None:
        if not isinstance(connections, ConnectionManager):
            connections = ConnectionManager(connections)
        super().__init__(websocket, connections)
        self._connecting = False

    @classmethod
    def as_endpoint(
        cls, layer: ChannelLayer | ConnectionManager | None = None
    ) -> Callable[..., Awaitable[None]]:
        """Make an endpoint, for ``app.add_api_websocket_route(path, …)``.

        FastAPI gives ``connect()`` what its parameters ask for: of the path, the query, headers and
        cookies, and of dependencies. What is not valid is refused before the socket is accepted.

        Args:
            layer: a channel layer, or a :class:`~pgchannels.web.ConnectionManager` by whose rules
                sockets are admitted; if None, what the application's lifespan has opened.

        Raises:
            ConfigurationError: a parameter that cannot be given.
        """
        return make_endpoint(cls, layer, cls.connect, cls._connect.parameters)

    # To override

    async def connect(self, *args: Any, **kwargs: Any) -> None:
        """A client asks for a socket. Accept it, or close it; accepted if this does neither.

        Declare the parameters that you need; they are given by name.
        """

    async def receive(self, text: str | None = None, bytes: bytes | None = None) -> None:
        """The client has sent a frame: one of the two is not None."""

    async def disconnect(self, code: int) -> None:
        """The socket is closed, by either side.

        If the connection just broke, *code* is 1006, or 1005: the server says which, and uvicorn's
        default, ``websockets-sansio``, says 1005.

        Called exactly once if ``connect()`` was, whatever happened; cut off after five seconds. The
        memberships of the socket's channel end after it.
        """

    async def serve(self) -> None:
        """Receive from the client, until it is gone. When this returns, the socket is closed.

        To override it, iterate over the consumer, and leave to ``dispatch()`` what is as usual.
        Messages are forwarded beside it. When the client is gone, iterating ends; a method that
        waits for something else is cancelled three seconds later.
        """
        async for received in self:
            await self.dispatch(received)

    async def dispatch(self, received: Any) -> None:
        """Hand on what iterating gave, and tell the client of an error that is its own."""
        if isinstance(received, str):
            await self._guarded(self.receive(text=received))
        else:
            await self._guarded(self.receive(bytes=received))

    async def __anext__(self) -> Any:
        """What the client sends: a str for a text frame, bytes for a binary one."""
        return (await self._receive_frame()).raw

    # Its life

    async def run(self, **values: Any) -> None:
        """Serve the socket until it is closed; *values* are given to ``connect()``.

        Raises:
            WebSocketException: an error of the client's, or one that it has been told to come back
                after, has ended the socket, or refused it; that is the cause. Dependencies see it.
                Starlette and FastAPI do nothing more about it.
            Exception: one that nobody expected has ended it. The client and the log have its id.
        """
        try:
            async with self.life():
                await self._serve(values)
        except Refused as refused:
            await refuse(self.websocket, refused.problem)
            raise closed_by(self.websocket, refused.problem.ws_code) from refused.__cause__
        except Unserved as unserved:
            raise closed_by(self.websocket, unserved.code) from self.failed_with
        if self.failed_with is not None:
            raise closed_by(self.websocket, self.close_code) from self.failed_with

    async def _serve(self, values: Mapping[str, Any]) -> None:
        self._connecting = True
        if not await self._essential(self.connect(**values)):
            return
        if self._asked_to_close is not None:
            return  # refused, or closed again, by connect()
        await self._start()
        await self._essential(self.serve())

    async def _essential(self, doing: Awaitable[None]) -> bool:
        """Do what the socket was opened for. If that fails, the socket is closed.

        Open, it would be deaf.
        """
        try:
            await doing
        except Exception as error:  # noqa: BLE001 - what is not for the client is raised again
            problem = await self._tell_or_raise(error)
            self.failed_with = error
            self.close_soon(problem.ws_code, problem.code)
            return False
        return True

    async def _deliver(self, message: Message) -> None:
        handler = self._events.find(message)
        # Other sockets have the same message. A subclass gets one that it may change.
        if handler is not None and FRAME not in message.headers:
            await self._account_for(message, self._handle(message.own(), handler))
        elif self._forwards_itself:
            await self._account_for(message, self.forward(message.own()))
        else:
            await self.forward(message)

    async def _handle(self, message: Message, handler: Handler) -> None:
        try:
            argument = handler.convert(message)
        except ValidationError as error:
            where = f"message {message.position} of {message.channel!r}"
            _warn(where, message.created_at, handler.name, str(problems(error)))
        else:
            await handler.function(self, argument)

    async def _left(self, code: int) -> None:
        # Also when the server cancels: what disconnect() has to put in order must be.
        if self._connecting:
            with anyio.move_on_after(CLOSING_TIME, shield=True):
                try:
                    await self.disconnect(code)
                except PGChannelsError as error:
                    # For nobody but the log: where an application answers these, it is the end.
                    self._note(error, raised=True)
                    raise
