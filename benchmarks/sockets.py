"""Messages to 500 real WebSockets under uvicorn: pgchannels beside a loop over ``send_text()``.

Three processes: the server, the clients (raw readers that do not parse), and this one, which
publishes. What counts is the server's CPU time per send: it is the limit of a server that has a
core to itself, and does not depend on what else the machine is doing. It is taken before a run and
after the clients have everything, so writing out what was buffered is in it, and for pgchannels
also hearing of the messages and reading them from the log.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from benchmarks.arrivals import now
from benchmarks.context import Benchmark, Context
from benchmarks.figures import Figure, ratio
from benchmarks.payloads import PAYLOAD
from benchmarks.peers.protocol import Peer
from benchmarks.sessions import publishing_sessions
from pgchannels import PostgresLayer
from pgchannels.orm import publish

__all__ = ["BENCHMARK"]

GROUP = "room:1"
SOCKETS = 500
FRAME_HEADER = 4  # RFC 6455, section 5.2: not masked, 126 to 65535 bytes
PATIENCE = 30.0
# Seconds between messages that are committed one after another, roughly.
COMMIT_TIME = 0.001


@dataclass(frozen=True)
class Scene:
    server: Peer
    clients: Peer
    messages: int

    @property
    def sends(self) -> int:
        return self.messages * SOCKETS

    async def connect(self) -> None:
        port = await self.server.ask("port")
        for path in ("/bare", "/consumer"):
            await self.clients.ask("connect", port=port, path=path, clients=SOCKETS)
        deadline = now() + PATIENCE
        while await self.server.ask("connected") != [SOCKETS, SOCKETS]:
            if now() > deadline:
                raise RuntimeError("the clients have not connected")
            await asyncio.sleep(0.05)

    async def by_consumers(self, publish_all: Callable[[], Awaitable[None]]) -> float:
        head = await self.server.ask("head")
        before = await self.server.ask("cpu")
        await publish_all()
        size = await self.server.ask("published", after=head, count=self.messages)
        return await self._finish("/consumer", before, size)

    async def by_loop(self, *, apart: float) -> float:
        before = await self.server.ask("cpu")
        size = await self.server.ask("loop", messages=self.messages, apart=apart)
        return await self._finish("/bare", before, size)

    async def _finish(self, path: str, before: float, size: int) -> float:
        total = SOCKETS * (size + self.messages * FRAME_HEADER)
        await self.clients.ask("received", path=path, size=total)
        return self.sends / float(await self.server.ask("cpu") - before)


async def measure(context: Context) -> list[Figure]:
    messages = context.pick(100, 40)
    async with (
        context.server.database() as url,
        PostgresLayer(url) as layer,
        publishing_sessions(url, layer, pool_size=1) as sessions,
        Peer("socket_server", url) as server,
        Peer("socket_clients") as clients,
    ):
        scene = Scene(server, clients, messages)
        await scene.connect()
        variants: dict[str, Callable[[], Awaitable[float]]] = {
            "consumers, burst": partial(
                scene.by_consumers, partial(_in_one_commit, sessions, messages)
            ),
            "loop": partial(scene.by_loop, apart=0.0),
            "consumers, one by one": partial(
                scene.by_consumers, partial(_one_by_one, layer, messages)
            ),
            "loop, one by one": partial(scene.by_loop, apart=COMMIT_TIME),
        }
        for variant in variants.values():
            await variant()
        results = await context.interleave(variants)
    names = {
        "consumers, burst": f"JsonConsumer, {messages} messages in one commit",
        "loop": "loop over send_text()",
        "consumers, one by one": f"JsonConsumer, {messages} commits one by one",
        "loop, one by one": "loop over send_text(), a millisecond apart",
    }
    rates = {key: Figure(name, "sends/s", tuple(results[key])) for key, name in names.items()}
    return [
        *rates.values(),
        *(
            ratio(
                f"JsonConsumer / loop, {how}",
                rates[f"consumers, {how}"],
                rates[loop],
                at_least=0.6,
            )
            for how, loop in (("burst", "loop"), ("one by one", "loop, one by one"))
        ),
    ]


async def _in_one_commit(sessions: async_sessionmaker[AsyncSession], messages: int) -> None:
    async with sessions() as session:
        for _ in range(messages):
            publish(session, GROUP, PAYLOAD)
        await session.commit()


async def _one_by_one(layer: PostgresLayer, messages: int) -> None:
    for _ in range(messages):
        await layer.send(GROUP, PAYLOAD)


BENCHMARK = Benchmark("sockets", f"{SOCKETS} WebSockets under uvicorn", measure)
