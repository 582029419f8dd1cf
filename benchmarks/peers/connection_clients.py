"""Many WebSocket clients in one process: most read at once, and note when; some hardly read."""

from __future__ import annotations

import asyncio
import re
import socket
from array import array
from typing import cast

from benchmarks.arrivals import now
from benchmarks.figures import percentile
from benchmarks.loop import run
from benchmarks.peers.protocol import serve

_HANDSHAKE = (
    b"GET %s HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Authorization: Bearer ada\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)
_SENT_AT = re.compile(rb'"at": ?([0-9.]+)[,}]')
_AT_A_TIME = 50
_RECEIVE_BUFFER = 4096


class Client(asyncio.Protocol):
    """Notes how long each message has been under way: it says when it was sent."""

    def __init__(self, path: str, delays: array[float]) -> None:
        self._path = path
        self._delays = delays
        self._rest = b""
        self.opened = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are none of asyncio's classes.
        cast("asyncio.Transport", transport).write(_HANDSHAKE % self._path.encode())

    def data_received(self, data: bytes) -> None:
        at = now()
        data = self._rest + data
        if not self.opened.done():
            head, end, data = data.partition(b"\r\n\r\n")
            if not end:
                self._rest = head
                return
            if b" 101 " not in head:
                self.opened.set_exception(RuntimeError(f"refused: {head!r}"))
                return
            self.opened.set_result(None)
        last = 0
        for match in _SENT_AT.finditer(data):
            self._delays.append(at - float(match[1]))
            last = match.end()
        self._rest = data[last:]


class Clients:
    def __init__(self) -> None:
        self._delays = array("d")
        self._transports: list[asyncio.BaseTransport] = []
        self._slow: list[socket.socket] = []
        self._trickles: list[asyncio.Task[None]] = []

    async def connect(self, port: int, path: str, clients: int) -> None:
        loop = asyncio.get_running_loop()
        at_a_time = asyncio.Semaphore(_AT_A_TIME)

        async def one() -> None:
            async with at_a_time:
                transport, client = await loop.create_connection(
                    lambda: Client(path, self._delays), "127.0.0.1", port
                )
                self._transports.append(transport)
                await client.opened

        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(one())

    async def connect_slow(self, port: int, path: str, *, trickles: bool) -> None:
        """One that reads nothing, or a byte a second."""
        loop = asyncio.get_running_loop()
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        client.setblocking(False)
        await loop.sock_connect(client, ("127.0.0.1", port))
        await loop.sock_sendall(client, _HANDSHAKE % path.encode())
        self._slow.append(client)
        if trickles:
            self._trickles.append(asyncio.create_task(self._trickle(client)))

    async def _trickle(self, client: socket.socket) -> None:
        while True:
            await asyncio.get_running_loop().sock_recv(client, 1)
            await asyncio.sleep(1)

    async def close_slow(self) -> None:
        for task in self._trickles:
            task.cancel()
        await asyncio.gather(*self._trickles, return_exceptions=True)
        for client in self._slow:
            client.close()
        self._trickles.clear()
        self._slow.clear()

    def received(self) -> int:
        return len(self._delays)

    def delays(self) -> dict[str, float]:
        """Milliseconds that messages were under way, since this was last asked."""
        taken = [1000 * delay for delay in self._delays]
        del self._delays[:]
        return {"p50": percentile(taken, 50), "p99": percentile(taken, 99)}

    def close(self) -> None:
        for transport in self._transports:
            transport.close()


async def main() -> None:
    clients = Clients()
    await serve(
        {
            "connect": clients.connect,
            "connect_slow": clients.connect_slow,
            "close_slow": clients.close_slow,
            "received": clients.received,
            "delays": clients.delays,
        }
    )
    await clients.close_slow()
    clients.close()


if __name__ == "__main__":
    run(main())
