"""Sockets that speak bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pgchannels.web.consumer import WebSocketConsumer
from pgchannels.web.errors import ValidationFailed
from pgchannels.web.frames import unwrapped
from pgchannels.web.incoming import Frame

if TYPE_CHECKING:
    from pgchannels.messages import Message
    from pgchannels.web.inbox import Rest

__all__ = ["BytesConsumer"]


class BytesConsumer(WebSocketConsumer):
    """A :class:`WebSocketConsumer` whose client sends binary frames.

    Messages are forwarded as binary frames too; text frames are what the consumer says of itself
    (errors, ``truncated``), and messages that were sent to become text. A text frame of the client
    is answered by the error ``invalid_frame``.
    """

    async def receive_bytes(self, data: bytes) -> None:
        """The client has sent *data*."""

    async def dispatch(self, received: Any) -> None:
        await self._guarded(self.receive_bytes(received))

    async def forward(self, message: Message) -> None:
        """There is a message for the client that no method handles. Sends its envelope."""
        frame = unwrapped(message)
        if frame is None:
            frame = message.envelope.encode()
            if self._counts_untold:
                self._untold.sent(message)
        await self._send_frame(frame)

    async def __anext__(self) -> bytes:
        """What the client sends."""
        raw = (await self._inbox.take(self._begin_bytes)).raw
        return raw if isinstance(raw, bytes) else raw.encode()

    def _begin_bytes(self, frame: Frame) -> Frame | Rest:
        begun = self._begin_frame(frame)
        if isinstance(begun, Frame):
            return self._refuse_text() if begun.is_text else begun
        return self._pass_bytes(begun)

    async def _pass_bytes(self, passing: Rest) -> Frame | None:
        frame = await passing
        if frame is not None and frame.is_text:
            await self._refuse_text()
            return None
        return frame

    async def _refuse_text(self) -> None:
        detail = "expected a binary frame, not text"
        await self.tell(ValidationFailed(detail, code="invalid_frame"))
