"""Class-based consumers: one object a socket, with methods for what can happen to it.

Two tasks serve a socket: one receives from the client, one forwards from the log. Each may wait for
the socket; neither makes anyone else wait. When one of them ends, or a task that was spawned beside
them fails, all end, and the socket is closed with a code: it is never left open and deaf.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from inspect import Parameter, iscoroutinefunction
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import anyio
from pydantic import ValidationError
from starlette.exceptions import WebSocketException
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from pgchannels.errors import (
    ChannelLayerClosed,
    ConfigurationError,
    DatabaseUnavailable,
    UnknownPosition,
)
from pgchannels.messages import FRAME
from pgchannels.web.annotations import defining_namespace, parameters
from pgchannels.web.channel_socket import ChannelSocket
from pgchannels.web.codes import (
    ABNORMAL,
    INTERNAL_ERROR,
    NORMAL,
    OURS,
    POLICY_VIOLATION,
    SERVICE_RESTART,
    TRY_AGAIN_LATER,
)
from pgchannels.web.endpoint import make_endpoint
from pgchannels.web.frames import unwrapped
from pgchannels.web.handlers import EventHandlers, Handler, find_events, find_receivers
from pgchannels.web.tasks import SocketTasks
from pgchannels.web.validation import problems

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pgchannels.layer import ChannelLayer
    from pgchannels.messages import Message

__all__ = ["WebSocketConsumer"]

logger = logging.getLogger("pgchannels.web")

# Seconds that disconnect() may take, and the removal of the channel.
DISCONNECT_TIME = 5.0


class _Connect(NamedTuple):
    function: Callable[..., Any] | None
    parameters: Sequence[Parameter]


class WebSocketConsumer(ChannelSocket):
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
    and the socket stays open; if ``connect()`` failed by it, the socket is closed with 1008, or
    with 1013 where the database is away. An exception that nobody expected closes it with 1011.
    """

    _events: ClassVar[EventHandlers] = EventHandlers({})
    _receivers: ClassVar[Mapping[str, Handler]] = {}
    _receives_types: ClassVar[bool] = False
    _connect: ClassVar[_Connect] = _Connect(None, ())

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        namespace = defining_namespace()
        cls._events = find_events(cls, namespace, cls._events.by_type.values())
        cls._receivers = find_receivers(cls, namespace, cls._receivers.values())
        if cls._receivers and not cls._receives_types:
            names = ", ".join(handler.name for handler in cls._receivers.values())
            raise ConfigurationError(f"{names}: only a JsonConsumer receives by type")
        if cls.connect is not cls._connect.function:
            if not iscoroutinefunction(cls.connect):
                raise ConfigurationError(f"{cls.connect.__qualname__} must be an async method")
            found = parameters(cls.connect, {**namespace, **vars(cls)})
            cls._connect = _Connect(cls.connect, found)

    def __init__(self, websocket: WebSocket, layer: ChannelLayer) -> None:
        super().__init__(websocket, layer)
        self._tasks = SocketTasks(self._ended_by)
        self._connecting = False
        self._gone: int | None = None

    @classmethod
    def as_endpoint(cls, layer: ChannelLayer | None = None) -> Callable[..., Awaitable[None]]:
        """Make an endpoint, for ``app.add_api_websocket_route(path, …)``.

        FastAPI gives ``connect()`` what its parameters ask for: of the path, the query, headers and
        cookies, and of dependencies. What is not valid is refused before the socket is accepted.

        Args:
            layer: if None, the one that the application's lifespan has opened.

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
        """The socket is closed, by either side; *code* is 1006 if the connection just broke.

        Called exactly once if ``connect()`` was, whatever happened; cut off after five seconds. The
        memberships of the socket's channel end after it.
        """

    async def serve(self) -> None:
        """Receive from the client, until it is gone. When this returns, the socket is closed.

        To override it, iterate over the consumer, and leave to ``dispatch()`` what is as usual.
        Messages are forwarded beside it. Who does not iterate does not learn that the client is
        gone before something is sent to it.
        """
        async for received in self:
            await self.dispatch(received)

    async def dispatch(self, received: Any) -> None:
        """Hand on what iterating gave, and tell the client of an error that is its own."""
        if isinstance(received, str):
            await self._guarded(self.receive(text=received))
        else:
            await self._guarded(self.receive(bytes=received))

    async def forward(self, message: Message) -> None:
        """There is a message for the client that no method handles. Sends its envelope.

        One that was sent to become a frame of its own is sent as that: see
        :meth:`~pgchannels.ChannelLayer.send_json_message`.
        """
        frame = unwrapped(message)
        await self._send_frame(message.envelope if frame is None else frame)

    async def truncated(self) -> None:
        """Messages that were to be replayed have been removed by retention. Tells the client so.

        It comes before what is left of them, as ``{"type": "truncated"}``. A client that keeps
        state should load it anew.
        """
        await self.send_json({"type": "truncated"})

    # To use, besides what every ChannelSocket has

    def spawn(self, coroutine: Coroutine[Any, Any, object]) -> None:
        """Run *coroutine* beside the socket, until it returns or the socket ends.

        If it raises, the socket is closed with 1011, or with 1013 where the database is away:
        something that it was open for is missing.

        Raises:
            RuntimeError: the socket is not open any more.
        """
        self._tasks.spawn(coroutine)

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        """What the client sends: a str for a text frame, bytes for a binary one."""
        return await self._receive_frame()

    # Its life

    async def run(self, **values: Any) -> None:
        """Serve the socket until it is closed; *values* are given to ``connect()``."""
        code = ABNORMAL
        try:
            code = await self._live(values)
        except WebSocketDisconnect as gone:
            code = gone.code
        except WebSocketException as error:
            code = error.code
            await self._close_if_open(code, error.reason)
        except (ChannelLayerClosed, UnknownPosition) as error:
            code = SERVICE_RESTART  # from another node, or with a position that is still good
            if not self.channel_name:
                logger.error("a socket is refused: %s", error)
        except DatabaseUnavailable as error:
            code = TRY_AGAIN_LATER
            logger.warning("%s failed; its socket is closed: %s", type(self).__name__, error)
        except Exception:
            code = INTERNAL_ERROR
            logger.exception("%s failed; its socket is closed", type(self).__name__)
        finally:
            await self._finish(code)

    async def _live(self, values: Mapping[str, Any]) -> int:
        if (error := await self._guarded(self._make_channel())) is not None:
            return _in_vain(error)
        async with self.layer.subscribe(member=self.channel_name) as self._stream:
            return await self._tasks.run(lambda: self._serve(values))

    async def _make_channel(self) -> None:
        self.channel_name = await self.layer.new_channel("ws")

    async def _serve(self, values: Mapping[str, Any]) -> int:
        self._connecting = True
        if (error := await self._guarded(self.connect(**values))) is not None:
            # What it was opened for has not come about. Open, it would be deaf.
            return _in_vain(error)
        if self.websocket.application_state is WebSocketState.CONNECTING:
            await self.accept()
        if self.websocket.application_state is not WebSocketState.CONNECTED:
            return self._close_code or NORMAL  # refused, or closed again, by connect()
        self._tasks.spawn(self._forward_all())
        if (error := await self._guarded(self.serve())) is not None:
            return _in_vain(error)
        if self._gone is None:
            await self.close(NORMAL)
        return self._gone or self._close_code or NORMAL

    async def _receive_frame(self) -> str | bytes:
        if self._gone is not None:
            raise StopAsyncIteration
        received = await self.websocket.receive()
        if received["type"] == "websocket.disconnect":
            self._gone = int(received.get("code") or ABNORMAL)
            raise StopAsyncIteration
        text: str | None = received.get("text")
        return received.get("bytes") or b"" if text is None else text

    async def _forward_all(self) -> None:
        stream = self._stream
        while True:
            messages = await stream.batch()
            if stream.truncated:
                stream.truncated = False
                await self.truncated()
            for message in messages:
                if not stream.reads(message.channel):
                    continue  # it has been left in the meantime
                handler = self._events.find(message)
                if handler is None or FRAME in message.headers:
                    await self.forward(message)
                else:
                    await self._handle(message, handler)

    async def _handle(self, message: Message, handler: Handler) -> None:
        try:
            argument = handler.convert(message)
        except ValidationError as error:
            logger.warning(
                "message %s of %r does not fit %s, and is dropped: %s",
                message.position,
                message.channel,
                handler.name,
                problems(error),
            )
        else:
            await handler.function(self, argument)

    def _ended_by(self, error: Exception) -> int | Exception:
        # Once a handler has closed the socket, sending to it fails as it should.
        return error if self._close_code is None else self._close_code

    async def _finish(self, code: int) -> None:
        try:
            if code in OURS:
                await self._close_if_open(code)
        finally:
            # Also when the server cancels: what disconnect() has to put in order must be.
            try:
                if self._connecting:
                    with anyio.move_on_after(DISCONNECT_TIME, shield=True):
                        await self.disconnect(code)
            finally:
                if self.channel_name:
                    await self._delete_channel()

    async def _close_if_open(self, code: int, reason: str | None = None) -> None:
        try:
            await self.close(code, reason)
        except (RuntimeError, WebSocketDisconnect):
            logger.debug("the socket was gone before it could be closed")

    async def _delete_channel(self) -> None:
        """Also ends the memberships. No error of this may hide another one."""
        with anyio.move_on_after(DISCONNECT_TIME, shield=True) as limit:
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


def _in_vain(error: Exception) -> int:
    return TRY_AGAIN_LATER if isinstance(error, DatabaseUnavailable) else POLICY_VIOLATION
