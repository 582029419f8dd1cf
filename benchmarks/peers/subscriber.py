"""A process with its own layer that reads a channel, or LISTENs, and notes when things come."""

from __future__ import annotations

import sys
from typing import Any

import asyncpg

from benchmarks.arrivals import Arrivals, Reader
from benchmarks.loop import run
from benchmarks.peers.protocol import serve
from pgchannels import PostgresLayer


class Subscriber:
    def __init__(self, layer: PostgresLayer, url: str) -> None:
        self._layer = layer
        self._url = url
        self._reader: Reader | None = None
        self._connection: Any = None
        self._arrivals = Arrivals()

    async def subscribe(self, channel: str, *, stamped: bool) -> None:
        """Read *channel* from now on, by the layer."""
        await self.stop()
        self._reader = await Reader(self._layer, channel, stamped=stamped).__aenter__()
        self._arrivals = self._reader.arrivals

    async def listen(self, channel: str) -> None:
        """LISTEN, without pgchannels."""
        await self.stop()
        arrivals = self._arrivals = Arrivals(stamped=True)
        self._connection = await asyncpg.connect(self._url)
        await self._connection.add_listener(channel, lambda *_: arrivals.add())

    async def reached(self, count: int) -> float:
        """When the message number *count* arrived."""
        return await self._arrivals.reached(count)

    async def times(self, count: int) -> list[float]:
        """When each of *count* messages arrived."""
        await self._arrivals.reached(count)
        return self._arrivals.times.tolist()

    async def stop(self) -> None:
        reader, self._reader = self._reader, None
        connection, self._connection = self._connection, None
        if reader is not None:
            await reader.__aexit__(None, None, None)
        if connection is not None:
            await connection.close()


async def main() -> None:
    url = sys.argv[1]
    async with PostgresLayer(url) as layer:
        subscriber = Subscriber(layer, url)
        await serve(
            {
                "subscribe": subscriber.subscribe,
                "listen": subscriber.listen,
                "reached": subscriber.reached,
                "times": subscriber.times,
            }
        )
        await subscriber.stop()


if __name__ == "__main__":
    run(main())
