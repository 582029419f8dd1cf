"""Class-based consumers: one object a socket, with methods for what can happen to it.

Two tasks serve a socket: one receives from the client, one forwards from the log. Each may wait for
the socket; neither makes anyone else wait. When one of them ends, so does the other, and the socket
is closed with a code: it is never left open and deaf.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import anyio
import orjson
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from pgchannels.errors import (
    ChannelLayerClosed,
    DatabaseUnavailable,
    InvalidMessage,
    InvalidPosition,
    UnknownPosition,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pgchannels.layer import PostgresLayer
    from pgchannels.messages import Message, Position

__all__ = ["JsonConsumer"]

logger = logging.getLogger("pgchannels.web")

# RFC 6455, section 7.4.1, and the registry that it founds. 1005 and 1006 may not be sent.
NORMAL = 1000
POLICY_VIOLATION = 1008
INTERNAL_ERROR = 1011
SERVICE_RESTART = 1012
TRY_AGAIN_LATER = 1013
ABNORMAL = 1006

OURS = frozenset({POLICY_VIOLATION, INTERNAL_ERROR, SERVICE_RESTART, TRY_AGAIN_LATER})

# Seconds that disconnect() may take.
DISCONNECT_TIME = 5.0


class JsonConsumer:
    """One socket that speaks JSON. Subclass it and override what you need::

        class Room(JsonConsumer):
            async def connect(self) -> None:
                await self.accept()
                await self.join("room:1", after=self.query_params.get("after"))

            async def receive_json(self, content: Any) -> None:
                await self.layer.send("room:1", content)

        app.add_api_websocket_route("/room", Room.as_endpoint(layer))

    The messages of the groups that it joined go to the client as they are in the log, as
    ``{"id", "position", "channel", "created_at", "data"}``, in one order over all groups that are
    live. A client that keeps the last position of each channel can resume anywhere with it.

    What was wrong about a client's message is answered by ``{"type": "error", "code", "detail"}``,
    and the socket stays open; if ``connect()`` failed by it, the socket is closed with 1008, or
    with 1013 where the database is away. An exception that nobody expected closes it with 1011.
    """

    # Which of our errors are the client's to hear of, and how they are called.
    _client_errors: ClassVar[dict[type[Exception], str]] = {
        UnknownPosition: "unknown_position",
        InvalidPosition: "invalid_position",
        InvalidMessage: "invalid_message",
        DatabaseUnavailable: "unavailable",
    }

    def __init__(self, websocket: WebSocket, layer: PostgresLayer) -> None:
        self.websocket = websocket
        self.layer = layer
        self._close_code: int | None = None

    @classmethod
    def as_endpoint(cls, layer: PostgresLayer) -> Callable[[WebSocket], Awaitable[None]]:
        """Make an endpoint for ``app.add_api_websocket_route(path, …)``."""

        async def endpoint(websocket: WebSocket) -> None:
            await cls(websocket, layer).run()

        endpoint.__name__ = cls.__name__
        endpoint.__doc__ = cls.__doc__
        return endpoint

    # To override

    async def connect(self) -> None:
        """A client asks for a socket. Accept it, or close it; accepted if this does neither."""

    async def receive_json(self, content: Any) -> None:
        """The client has sent *content*."""

    async def disconnect(self, code: int) -> None:
        """The socket is closed, by either side; *code* is 1006 if the connection just broke.

        Called exactly once, whatever happened; cut off after five seconds.
        """

    async def forward(self, message: Message) -> None:
        """A group that was joined has a message. Sends its envelope."""
        await self.websocket.send_text(message.envelope)

    async def truncated(self) -> None:
        """Messages that were to be replayed have been removed by retention. Tells the client so.

        It comes before what is left of them, as ``{"type": "truncated"}``. A client that keeps
        state should load it anew.
        """
        await self.send_json({"type": "truncated"})

    # To use

    @property
    def path_params(self) -> Mapping[str, Any]:
        return self.websocket.path_params

    @property
    def query_params(self) -> Mapping[str, str]:
        return self.websocket.query_params

    async def accept(
        self, subprotocol: str | None = None, headers: Iterable[tuple[bytes, bytes]] | None = None
    ) -> None:
        await self.websocket.accept(subprotocol, headers)

    async def close(self, code: int = 1000, reason: str | None = None) -> None:
        """Close the socket. Before it was accepted, this refuses it with HTTP 403."""
        if self.websocket.application_state is not WebSocketState.DISCONNECTED:
            self._close_code = code
            await self.websocket.close(code, reason)

    async def send_json(self, content: Any) -> None:
        await self.websocket.send_text(orjson.dumps(content).decode())

    async def join(self, group: str, after: Position | str | None = None) -> None:
        """Forward the messages of *group*: those after a position first, then live.

        Args:
            group: a channel's name.
            after: the last position that the client has had; ``"0"`` for all that is retained;
                None, or an empty text as browsers like to send it, for from now on.

        Raises:
            InvalidChannel, InvalidPosition: left to the caller's caller, it is told to the client.
        """
        await self._stream.join(group, after or None)

    async def leave(self, group: str) -> None:
        """Forward no more of *group*. Groups are left by themselves when the socket closes."""
        self._stream.leave(group)

    # Its life

    async def run(self) -> None:
        """Serve the socket until it is closed."""
        try:
            self._stream = self.layer.subscribe()
        except ChannelLayerClosed as error:
            logger.error("a socket is refused: %s", error)
            await self.close(SERVICE_RESTART)
            return
        code = ABNORMAL
        try:
            async with self._stream:
                code = await self._serve()
        except WebSocketDisconnect as gone:
            code = gone.code
        except (ChannelLayerClosed, UnknownPosition):
            code = SERVICE_RESTART  # from another node, or with a position that is still good
        except Exception:
            code = INTERNAL_ERROR
            logger.exception("%s failed; its socket is closed", type(self).__name__)
        finally:
            await self._finish(code)

    async def _serve(self) -> int:
        if (error := await self._guarded(self.connect())) is not None:
            # What it was opened for has not come about. Open, it would be deaf.
            return TRY_AGAIN_LATER if isinstance(error, DatabaseUnavailable) else POLICY_VIOLATION
        if self.websocket.application_state is WebSocketState.CONNECTING:
            await self.accept()
        if self.websocket.application_state is not WebSocketState.CONNECTED:
            return self._close_code or NORMAL  # refused, or closed again, by connect()
        # anyio's task group, because Starlette cancels by anyio's scopes, which repeat themselves
        # until they are obeyed: asyncio's own ways of waiting for a cancelled task do not stand it.
        ended: list[int | Exception] = []

        async def until_end(run: Callable[[], Awaitable[int]]) -> None:
            try:
                ended.append(await run())
            except Exception as error:  # noqa: BLE001 - raised again below
                # Once a handler has closed the socket, sending to it fails as it should.
                ended.append(error if self._close_code is None else self._close_code)
            tasks.cancel_scope.cancel()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(until_end, self._receive_all)
            tasks.start_soon(until_end, self._forward_all)
        if isinstance(ended[0], Exception):
            raise ended[0]
        return ended[0]

    async def _receive_all(self) -> int:
        while True:
            received = await self.websocket.receive()
            if received["type"] == "websocket.disconnect":
                return int(received.get("code") or ABNORMAL)
            text = received.get("text")
            try:
                content = orjson.loads(received.get("bytes") or b"" if text is None else text)
            except orjson.JSONDecodeError as error:
                await self._send_error("invalid_json", str(error))
            else:
                await self._guarded(self.receive_json(content))

    async def _forward_all(self) -> int:
        stream = self._stream
        while True:
            messages = await stream.batch()
            if stream.truncated:
                stream.truncated = False
                await self.truncated()
            for message in messages:
                if stream.reads(message.channel):  # it may have been left in the meantime
                    await self.forward(message)

    async def _guarded(self, handler: Awaitable[None]) -> Exception | None:
        """Tell the client of an error that is its own, and return it."""
        try:
            await handler
        except tuple(self._client_errors) as error:
            code = next(c for kind, c in self._client_errors.items() if isinstance(error, kind))
            # The server's address may stand in a driver's sentence; clients get one of our own.
            unavailable = isinstance(error, DatabaseUnavailable)
            await self._send_error(
                code, "the service is not available now" if unavailable else str(error)
            )
            return error
        return None

    async def _send_error(self, code: str, detail: str) -> None:
        if self.websocket.application_state is WebSocketState.CONNECTING:
            await self.accept()
        if self.websocket.application_state is WebSocketState.CONNECTED:
            await self.send_json({"type": "error", "code": code, "detail": detail})

    async def _finish(self, code: int) -> None:
        try:
            if code in OURS:
                await self.close(code)
        except (RuntimeError, WebSocketDisconnect):
            logger.debug("the socket was gone before it could be closed")
        finally:
            # Also when the server cancels: what disconnect() has to put in order must be.
            with anyio.move_on_after(DISCONNECT_TIME, shield=True):
                await self.disconnect(code)
