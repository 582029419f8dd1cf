"""Many WebSocket clients in one process that only count bytes, so that the server is the limit."""

from __future__ import annotations

import asyncio
from typing import cast

from benchmarks.loop import run
from benchmarks.peers.protocol import serve

_PATIENCE = 60.0
_HANDSHAKE = (
    b"GET %s HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)


class Count:
    """Bytes that the clients of one path have received since the handshakes."""

    def __init__(self) -> None:
        self.open = 0
        self.bytes = 0
        self._target = 0
        self._reached = asyncio.Event()

    def add(self, size: int) -> None:
        self.bytes += size
        if self.bytes >= self._target:
            self._reached.set()

    async def take(self, target: int) -> None:
        """Wait for *target* bytes, exactly, and begin anew."""
        self._target = target
        self._reached.clear()
        if self.bytes < target:
            try:
                async with asyncio.timeout(_PATIENCE):
                    await self._reached.wait()
            except TimeoutError:
                raise RuntimeError(f"{self.bytes} of {target} bytes have come") from None
        if self.bytes != target:
            raise RuntimeError(f"{self.bytes} bytes have come instead of {target}")
        self.bytes = 0


class Client(asyncio.BufferedProtocol):
    """Reads the answer to its handshake, then whatever comes, into a buffer that all share."""

    buffer = bytearray(256 * 1024)

    def __init__(self, path: str, count: Count) -> None:
        self._path = path
        self._count = count
        self._header: bytearray | None = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are none of asyncio's classes.
        cast("asyncio.Transport", transport).write(_HANDSHAKE % self._path.encode())

    def get_buffer(self, sizehint: int) -> bytearray:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._header is None:
            self._count.add(nbytes)
            return
        self._header += self.buffer[:nbytes]
        head, end, rest = bytes(self._header).partition(b"\r\n\r\n")
        if end:
            if b" 101 " not in head:
                raise RuntimeError(f"refused: {head!r}")
            self._header = None
            self._count.open += 1
            self._count.add(len(rest))


class Clients:
    def __init__(self) -> None:
        self._counts: dict[str, Count] = {}
        self._transports: list[asyncio.BaseTransport] = []

    async def connect(self, port: int, path: str, clients: int) -> None:
        loop = asyncio.get_running_loop()
        count = self._counts[path] = Count()
        for _ in range(clients):
            transport, _protocol = await loop.create_connection(
                lambda: Client(path, count), "127.0.0.1", port
            )
            self._transports.append(transport)

    async def received(self, path: str, size: int) -> None:
        """Wait until the clients of *path* have got *size* bytes of frames."""
        await self._counts[path].take(size)

    def opened(self, path: str) -> int:
        return self._counts[path].open

    def close(self) -> None:
        for transport in self._transports:
            transport.close()


async def main() -> None:
    clients = Clients()
    await serve(
        {"connect": clients.connect, "opened": clients.opened, "received": clients.received}
    )
    clients.close()


if __name__ == "__main__":
    run(main())
