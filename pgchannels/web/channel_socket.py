"""A socket with a channel of its own: sending to the client, and what is forwarded to it."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from starlette.websockets import WebSocket, WebSocketState

from pgchannels.errors import (
    ChannelFull,
    DatabaseUnavailable,
    InvalidMessage,
    InvalidPosition,
    InvalidUser,
    UnknownPosition,
)
from pgchannels.messages import Position
from pgchannels.web.frames import encode_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pgchannels.layer import ChannelLayer
    from pgchannels.records import PresenceBy
    from pgchannels.stream import Stream

__all__ = ["ChannelSocket"]

logger = logging.getLogger("pgchannels.web")

# Characters of a sentence about what a client sent, which may repeat some of it.
MAX_DETAIL = 500


class ChannelSocket:
    """What a consumer can do with its socket. It does nothing by itself."""

    # Which of our errors are the client's to hear of, and how they are called.
    _client_errors: ClassVar[dict[type[Exception], str]] = {
        UnknownPosition: "unknown_position",
        InvalidPosition: "invalid_position",
        InvalidMessage: "invalid_message",
        ChannelFull: "channel_full",
        DatabaseUnavailable: "unavailable",
    }

    def __init__(self, websocket: WebSocket, layer: ChannelLayer) -> None:
        self.websocket = websocket
        self.layer = layer
        self.channel_name = ""
        """The socket's own, from ``connect()`` on: what is sent to it reaches this client alone."""
        self._stream: Stream
        self._close_code: int | None = None

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

    async def send_text(self, text: str) -> None:
        await self.websocket.send_text(text)

    async def send_bytes(self, data: bytes) -> None:
        await self.websocket.send_bytes(data)

    async def send_json(self, content: Any) -> None:
        """Send *content*, which may be or hold pydantic models, as a text frame."""
        await self.send_text(encode_json(content))

    async def _send_frame(self, frame: str | bytes) -> None:
        if isinstance(frame, str):
            await self.send_text(frame)
        else:
            await self.send_bytes(frame)

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
        """
        position = Position.parse(after) if after else None
        await self.layer.update_channel(self.channel_name, user_id=user_id, metadata=metadata)
        if position is not None:
            await self._stream.resume(position)

    async def join(self, group: str, after: Position | str | None = None) -> None:
        """Forward the messages of *group*, without being a member of it.

        Args:
            group: a channel's name.
            after: the last position that the client has had: what came since then is forwarded
                first; ``"0"`` for all that is retained; None, or an empty text as browsers like to
                send it, for from now on.

        Raises:
            InvalidChannel, InvalidPosition: left to the caller's caller, it is told to the client.
        """
        await self._stream.join(group, after or None)

    async def leave(self, group: str) -> None:
        """Forward no more of *group*. A membership stays."""
        self._stream.leave(group)

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
        """
        known = self._stream.reads(group)
        # First, so that nothing that is sent to members can fall in between.
        await self._stream.join_group(group, after or None)
        try:
            await self.layer.group_add(group, self.channel_name, presence=presence)
        except BaseException:
            if not known:
                self._stream.leave(group)
            raise

    async def group_discard(self, group: str) -> None:
        """End the membership, and forward no more of *group*."""
        await self.layer.group_discard(group, self.channel_name)
        self._stream.leave(group)

    async def _guarded(self, handler: Awaitable[None]) -> Exception | None:
        """Tell the client of an error that is its own, and return it."""
        try:
            await handler
        except InvalidUser:
            raise  # no client can help that
        except tuple(self._client_errors) as error:
            if isinstance(error, InvalidMessage):
                # What is wrong with it may be what the client sent, or what was made of it here. No
                # warning: a client could fill the log with them.
                logger.info("%s answers with an error", type(self).__name__, exc_info=True)
            code = next(c for kind, c in self._client_errors.items() if isinstance(error, kind))
            # The server's address may stand in a driver's sentence; clients get one of our own.
            unavailable = isinstance(error, DatabaseUnavailable)
            await self._send_error(
                code, "the service is not available now" if unavailable else str(error)
            )
            return error
        return None

    async def _send_error(self, code: str, detail: str, **more: Any) -> None:
        if self.websocket.application_state is WebSocketState.CONNECTING:
            await self.accept()
        if self.websocket.application_state is WebSocketState.CONNECTED:
            detail = detail[:MAX_DETAIL]
            await self.send_json({"type": "error", "code": code, "detail": detail, **more})
