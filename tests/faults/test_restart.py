"""PostgreSQL restarts, or crashes and recovers, in mid-stream: nothing is lost or doubled."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from typing import Any

import asyncpg
import pytest

from pgchannels import DatabaseUnavailable, PostgresLayer, Settings, Stream
from pgchannels.embedded import EmbeddedPostgres
from tests.support.eventually import eventually

CHANNELS = ("a", "b", "c")
PUBLISHERS = 8
ROUNDS = 3


async def restart_fast(server: EmbeddedPostgres) -> None:
    await asyncio.to_thread(server.restart, "fast")


async def restart_immediate(server: EmbeddedPostgres) -> None:
    await asyncio.to_thread(server.restart, "immediate")


async def kill_a_backend(server: EmbeddedPostgres) -> None:
    """The postmaster ends all the others, and recovers from the WAL."""
    connection = await asyncpg.connect(server.url())
    try:
        pid = await connection.fetchval("select pg_backend_pid()")
        started = await connection.fetchval("select pg_postmaster_start_time()")
        os.kill(pid, signal.SIGKILL)
        with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
            await connection.execute("select pg_sleep(30)")
    finally:
        connection.terminate()

    async def recovered() -> Any:
        try:
            again = await asyncpg.connect(server.url(), timeout=5)
        except (asyncpg.PostgresError, OSError):
            return False
        try:
            # The same postmaster, so it was not restarted, and not the same shared memory.
            return bool(started == await again.fetchval("select pg_postmaster_start_time()"))
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
            return False  # made before the postmaster had seen what has happened, and ended by it
        finally:
            again.terminate()

    await eventually(recovered, timeout=30)


class Publishing:
    """Publishers that retry until it is certain that a message was committed."""

    def __init__(self, layers: list[PostgresLayer]) -> None:
        self._layers = layers
        self._stopped = False
        self.confirmed: list[str] = []
        self.attempted: set[str] = set()
        self.failures = 0

    async def run(self, publisher: int) -> None:
        layer = self._layers[publisher % len(self._layers)]
        number = attempt = 0
        while not self._stopped:
            key = f"{publisher}.{number}.{attempt}"
            self.attempted.add(key)
            try:
                await layer.send(CHANNELS[number % 3], {"key": key})
            except DatabaseUnavailable:
                # Perhaps it was committed, perhaps not; in any case at most once.
                self.failures += 1
                attempt += 1
                await asyncio.sleep(0.01)
            else:
                self.confirmed.append(key)
                number, attempt = number + 1, 0

    async def goes_on(self) -> None:
        before = len(self.confirmed)
        await eventually(lambda: len(self.confirmed) > before + 200, timeout=30)

    def stop(self) -> None:
        self._stopped = True


async def read_to_the_end(stream: Stream) -> list[tuple[int, str]]:
    got: list[tuple[int, str]] = []
    ends = 0
    async for message in stream:
        got.append((message.id, message["key"]))
        ends += message["key"].startswith("end")
        if ends == len(CHANNELS):
            return got
    raise AssertionError("the stream has ended by itself")


@pytest.mark.parametrize("failure", [restart_fast, restart_immediate, kill_a_backend])
async def test_streams_stay_open_and_miss_nothing(
    own_server: EmbeddedPostgres, failure: Callable[[EmbeddedPostgres], Awaitable[None]]
) -> None:
    settings = Settings.model_validate(
        {
            "database_url": own_server.url(),
            "poll_interval": 0.2,
            "heartbeat_interval": 0.5,
            "lease_time": 1.0,
        }
    )
    async with AsyncExitStack() as stack:
        layers = [await stack.enter_async_context(PostgresLayer(settings)) for _ in range(2)]
        # Live ones, and one that keeps having to replay.
        lagging = await stack.enter_async_context(
            PostgresLayer(settings.model_copy(update={"buffer_size": 3, "page_size": 7}))
        )
        streams = [
            await stack.enter_async_context(layer.subscribe(*CHANNELS, after="0"))
            for layer in (*layers, *layers, lagging)
        ]
        readings = [asyncio.create_task(read_to_the_end(stream)) for stream in streams]
        publishing = Publishing(layers)
        async with asyncio.timeout(90), asyncio.TaskGroup() as group:
            for number in range(PUBLISHERS):
                group.create_task(publishing.run(number))
            for _ in range(ROUNDS):
                await publishing.goes_on()
                await failure(own_server)
            await publishing.goes_on()
            publishing.stop()
        assert publishing.failures, "the failures went by unnoticed, so that this proves nothing"
        for channel in CHANNELS:
            await layers[0].send(channel, {"key": f"end {channel}"})

        async with asyncio.timeout(30):
            received = await asyncio.gather(*readings)
        connection = await asyncpg.connect(own_server.url())
        rows = await connection.fetch(
            "select id, payload->>'key' from pgchannels.messages order by id"
        )
        await connection.close(timeout=5)
        log = [(row[0], row[1]) for row in rows]
        assert [id for id, _ in log] == list(range(1, len(log) + 1)), "a hole in the log"
        keys = Counter(key for _, key in log)
        assert max(keys.values()) == 1, "something was published twice"
        assert set(publishing.confirmed) <= set(keys), "something committed was lost"
        assert {key for key in keys if not key.startswith("end")} <= publishing.attempted
        for got in received:
            assert got == log
        await eventually(lambda: all(a.is_listening for a in (*layers, lagging)), timeout=20)


async def test_ephemeral_messages_after_a_crash(own_server: EmbeddedPostgres) -> None:
    """Their table is empty then, and begins to count anew. They are not taken for the old ones."""
    settings = Settings(database_url=own_server.url(), heartbeat_interval=0.5)
    before = 1000
    async with (
        asyncio.timeout(90),
        PostgresLayer(settings) as layer,
        layer.subscribe("room") as stream,
    ):
        await eventually(lambda: layer.is_listening)
        for n in range(0, before, 50):
            await asyncio.gather(*(layer.send_ephemeral("room", {"n": n + i}) for i in range(50)))
            for _ in range(50):
                await anext(stream)
        await restart_immediate(own_server)
        await eventually(lambda: is_listened_to(own_server), timeout=30)
        await eventually(lambda: layer.is_listening, timeout=30)
        sent = 0

        async def has_come() -> Any:
            nonlocal sent
            sent += 1
            with suppress(DatabaseUnavailable):
                await layer.send_ephemeral("room", {"n": before})
            return stream.pending

        await eventually(has_come, timeout=30)
        assert sent < before, "those that were taken for old ones do not count"
        assert (await anext(stream))["n"] == before


async def is_listened_to(server: EmbeddedPostgres) -> Any:
    connection = await asyncpg.connect(server.url())
    try:
        return await connection.fetchval(
            "select exists (select from pg_stat_activity"
            " where application_name = 'pgchannels listener')"
        )
    finally:
        await connection.close(timeout=5)
