"""An ASGI server of one socket, in this process: nothing lies between an application and the test.

It is as strict as servers are: what may not be sent over a WebSocket raises in the application.
"""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping, Sequence
from typing import Any

from pgchannels.web.codes import SENDABLE

__all__ = ["Socket"]

MAX_REASON = 123  # RFC 6455, section 5.5: 125 bytes, of which two are the code

Event = MutableMapping[str, Any]


class Socket:
    """A client's socket, and the server that has it.

    Attributes:
        accepted: it is open, or was.
        sent: text and binary frames that the application has sent.
        code: what the application has closed it with; None if it has not.
        status: of the HTTP response that it was refused with.
    """

    def __init__(
        self,
        path: str = "/",
        *,
        query: bytes = b"",
        headers: Sequence[tuple[bytes, bytes]] = (),
        subprotocols: Sequence[str] = (),
        has_responses: bool = True,
    ) -> None:
        self._scope = {
            "type": "websocket",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "scheme": "ws",
            "server": ("127.0.0.1", 80),
            "client": ("127.0.0.1", 10000),
            "root_path": "",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query,
            "headers": list(headers),
            "subprotocols": list(subprotocols),
            "state": {},
            "extensions": {"websocket.http.response": {}} if has_responses else {},
        }
        self._inbox: asyncio.Queue[Event] = asyncio.Queue()
        self._inbox.put_nowait({"type": "websocket.connect"})
        self._news = asyncio.Event()
        self.accepted = False
        self.subprotocol: str | None = None
        self.sent: list[str | bytes] = []
        self.code: int | None = None
        self.status: int | None = None
        self.is_gone = False

    async def serve(self, app: Any) -> None:
        """Have the application serve it. Raises what the application raises."""
        try:
            await app(self._scope, self._inbox.get, self._send)
        finally:
            self._news.set()

    @property
    def is_open(self) -> bool:
        return self.accepted and self.code is None and not self.is_gone

    def give(self, frame: str | bytes) -> None:
        """The client sends a frame."""
        kind = "text" if isinstance(frame, str) else "bytes"
        self._inbox.put_nowait({"type": "websocket.receive", kind: frame})

    def leave(self, code: int = 1001) -> None:
        """The client goes away."""
        self.is_gone = True
        self._inbox.put_nowait({"type": "websocket.disconnect", "code": code, "reason": ""})

    async def news(self) -> None:
        """Wait until the application has done something."""
        await self._news.wait()
        self._news.clear()

    async def _send(self, event: Event) -> None:
        # As under a server, others get their turn now and then.
        await asyncio.sleep(0)
        self._news.set()
        match event["type"]:
            case "websocket.accept" if not self.accepted and self.status is None:
                self.accepted = True
                self.subprotocol = event.get("subprotocol")
                if self.subprotocol is not None:
                    self.subprotocol.encode("ascii")
            case "websocket.http.response.start" if not self.accepted and self.status is None:
                assert self._scope["extensions"], "the server has no such extension"
                self.status = event["status"]
                for name, value in event.get("headers", ()):
                    assert b"\n" not in name + value
                    assert b"\r" not in name + value
            case "websocket.http.response.body" if self.status is not None:
                assert isinstance(event["body"], bytes)
            case "websocket.close" if self.code is None and self.status is None:
                self.code = event.get("code", 1000)
                assert self.code in SENDABLE, event
                assert len((event.get("reason") or "").encode()) <= MAX_REASON, event
                closing = {"type": "websocket.disconnect", "code": self.code, "reason": ""}
                self._inbox.put_nowait(closing)
            case "websocket.send" if self.accepted and self.code is None:
                if self.is_gone:
                    raise OSError("the client has gone")
                self.sent.append(self._frame(event))
            case _:
                raise RuntimeError(f"unexpected: {event}")

    @staticmethod
    def _frame(event: Event) -> str | bytes:
        data: bytes | None = event.get("bytes")
        if data is not None:
            return data
        text: str = event["text"]
        text.encode()  # raises for what is no UTF-8
        return text
