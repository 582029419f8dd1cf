"""Sockets that speak JSON."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import ValidationError

from pgchannels.web.consumer import WebSocketConsumer
from pgchannels.web.errors import UnexpectedMessage, ValidationFailed
from pgchannels.web.validation import problems

__all__ = ["JsonConsumer"]


class JsonConsumer(WebSocketConsumer):
    """A :class:`WebSocketConsumer` whose client sends JSON, in text or binary frames::

        class Room(JsonConsumer):
            async def connect(self, room: str, after: str | None = None) -> None:
                await self.accept()
                await self.group_add(f"room:{room}", after=after)

            @receives("chat.send")
            async def on_send(self, content: ChatSend) -> None:
                await self.layer.group_send(…)

    What is not JSON is answered by the error ``invalid_json``, what does not fit the model of
    the method that :func:`~pgchannels.web.receives` it by ``invalid_content``.
    """

    _receives_types: ClassVar[bool] = True

    async def receive_json(self, content: Any) -> None:
        """The client has sent *content*, and no method is declared to receive it.

        By default it is told so, by the error ``unexpected_message``.
        """
        await self.tell(UnexpectedMessage())

    async def dispatch(self, received: Any) -> None:
        await self._guarded(self._route(received))

    async def __anext__(self) -> Any:
        """What the client sends, parsed."""
        return await self._receive_content()

    def answers_itself(self, kind: str | None) -> bool:
        # What a class declares is its own, be it called as ours.
        return kind not in self._receivers and super().answers_itself(kind)

    async def _route(self, content: Any) -> None:
        kind = content.get("type") if isinstance(content, dict) else None
        handler = self._receivers.get(kind) if isinstance(kind, str) else None
        if handler is None:
            await self.receive_json(content)
            return
        try:
            argument = handler.convert(content)
        except ValidationError as error:
            detail = f"not a valid {kind!r}"
            await self.tell(ValidationFailed(detail, errors=problems(error)))
        else:
            await handler.function(self, argument)
