"""A TCP proxy in front of a PostgreSQL server, through which the network can be made to fail."""

import asyncio
from contextlib import suppress
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs, unquote, urlsplit

CHUNK = 65536


class TcpProxy:
    """Forwards 127.0.0.1:`port` to the server of a database URL, over a Unix socket or TCP.

    `stall` is a network that swallows packets: connections stay open, and nothing passes. `cut` is
    one that resets them. `resume` undoes both.
    """

    def __init__(self, database_url: str) -> None:
        parts = urlsplit(database_url)
        query = parse_qs(parts.query)
        self._host = unquote(query["host"][0]) if "host" in query else parts.hostname or "localhost"
        self._port = int(query["port"][0]) if "port" in query else parts.port or 5432
        self._user = parts.username or "postgres"
        self._database = parts.path
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._refusing = False
        self.accepted = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._server is not None
        # asyncpg's requests to cancel are connections too, and nobody waits for them. A few turns
        # of the loop: for them to be accepted, and to begin.
        await self._turns()
        self._server.close()
        await self._turns()
        await self.cut()
        await self._server.wait_closed()

    @staticmethod
    async def _turns() -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    @property
    def port(self) -> int:
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    @property
    def url(self) -> str:
        """The database URL that goes through the proxy."""
        return f"postgresql://{self._user}@127.0.0.1:{self.port}{self._database}"

    @property
    def active(self) -> int:
        """Connections open now; `accepted` counts all that there have been."""
        return len(self._connections)

    def stall(self) -> None:
        """Stop forwarding, in both directions, on connections of now and of later."""
        self._flowing.clear()

    def resume(self) -> None:
        """Forward again, what has waited first; accept again."""
        self._refusing = False
        self._flowing.set()

    async def cut(self, *, refuse: bool = False) -> None:
        """Reset every connection; with ``refuse``, each new one too, until `resume`."""
        self._refusing = refuse
        connections = list(self._connections)
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refusing:
            writer.transport.abort()
            return
        task = asyncio.current_task()
        assert task is not None
        self.accepted += 1
        self._connections.add(task)
        upstream: asyncio.StreamWriter | None = None
        try:
            upstream_reader, upstream = await self._connect()
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, upstream))
                group.create_task(self._pump(upstream_reader, writer))
        except* OSError:
            # Either side has gone; so does the other.
            pass
        finally:
            self._connections.discard(task)
            writer.transport.abort()
            if upstream is not None:
                upstream.transport.abort()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._host.startswith("/"):
            return await asyncio.open_unix_connection(f"{self._host}/.s.PGSQL.{self._port}")
        return await asyncio.open_connection(self._host, self._port)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(CHUNK):
            await self._flowing.wait()
            sink.write(data)
            await sink.drain()
        # Wait while stalled: a close is a packet like any other.
        await self._flowing.wait()
        with suppress(OSError):
            sink.write_eof()
