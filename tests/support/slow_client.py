"""A WebSocket client that reads what it is told to read, and not a byte more."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.http11 import Response
from websockets.uri import parse_uri

# As small as the kernel lets it be, so that little is on the way.
BUFFER = 4096


class SlowClient:
    """Connects when it is entered. What it does not read stays in the server's buffers."""

    def __init__(self, address: str, path: str) -> None:
        host, _, port = address.partition(":")
        self._address = (host, int(port))
        self._protocol = ClientProtocol(parse_uri(f"ws://{address}{path}"))
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        self._socket.setblocking(False)
        self.contents: list[Any] = []
        """What has been read: JSON."""
        self.at_end = False
        """The connection is closed, by the server."""

    async def __aenter__(self) -> Self:
        await asyncio.get_running_loop().sock_connect(self._socket, self._address)
        self._protocol.send_request(self._protocol.connect())
        await self._send()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._socket.close()

    @property
    def close_code(self) -> int | None:
        """1006 if there was none."""
        return self._protocol.close_code if self.at_end else None

    @property
    def position(self) -> str:
        """Of the last message."""
        position: str = [content["position"] for content in self.contents if "id" in content][-1]
        return position

    @property
    def numbers(self) -> list[int]:
        """Of all messages."""
        return [content["data"]["number"] for content in self.contents if "id" in content]

    def has(self, count: int) -> bool:
        """Whether it has so many messages."""
        return len(self.numbers) >= count

    async def read(self, size: int = 65536) -> None:
        """Read up to *size* bytes, one at least; not more than there are."""
        loop = asyncio.get_running_loop()
        try:
            data = await loop.sock_recv(self._socket, size)
        except ConnectionResetError:
            data = b""
        if data:
            self._protocol.receive_data(data)
        else:
            self.at_end = True
            self._protocol.receive_eof()
        for event in self._protocol.events_received():
            if isinstance(event, Response):
                assert event.status_code == 101, event
            elif isinstance(event, Frame) and event.opcode is Opcode.TEXT:
                self.contents.append(json.loads(bytes(event.data)))
        if not self.at_end:
            await self._send()

    async def read_until(self, condition: Callable[[], object]) -> None:
        """Read at full speed, until that is true or the server has closed."""
        while not condition() and not self.at_end:
            await self.read()

    async def _send(self) -> None:
        for data in self._protocol.data_to_send():
            try:
                await asyncio.get_running_loop().sock_sendall(self._socket, data)
            except (BrokenPipeError, ConnectionResetError):
                self.at_end = True
