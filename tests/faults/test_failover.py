"""A server takes over that lacks the last messages, and on which others have published since.

Played with two copies of one cluster: what the readers read was written to the first, and when they
come back they find the second, which has other messages with the same ids.
"""

from __future__ import annotations

import asyncio
import subprocess
from functools import partial
from typing import Any

import psycopg
import pytest

from pgchannels import DatabaseUnavailable, Position, PostgresLayer, Settings, UnknownPosition
from pgchannels.embedded import EmbeddedPostgres
from tests.support.eventually import eventually

KEPT = list(range(5))
LOST = list(range(10, 16))
NEW = list(range(100, 112))


def publish(server: EmbeddedPostgres, numbers: list[int]) -> None:
    """As another process that is no node, and seal: one batch for each message."""
    with psycopg.connect(server.url(), autocommit=True) as connection:
        for n in numbers:
            connection.execute("select pgchannels.publish('room', json_build_object('n', %s))", [n])
            connection.execute("select pgchannels.seal()")


def prepare(server: EmbeddedPostgres) -> None:
    """Keep a copy of the cluster in which others have published."""
    cluster, first, second = (server.data_dir / name for name in ("pgdata", "first", "second"))
    server.stop()
    subprocess.run(["cp", "-a", cluster, first], check=True)
    server.start()
    publish(server, NEW)
    server.stop()
    cluster.rename(second)
    first.rename(cluster)
    server.start()


async def is_refused(layer: PostgresLayer, position: Position) -> Any:
    try:
        async with layer.subscribe("room", after=position):
            return False
    except DatabaseUnavailable:
        return False  # not connected again yet
    except UnknownPosition:
        return True


@pytest.mark.slow
async def test_readers_are_told_and_durable_ones_go_on(own_server: EmbeddedPostgres) -> None:
    server = own_server
    settings = Settings(
        database_url=server.url(), poll_interval=0.2, heartbeat_interval=0.5, lease_time=3
    )
    publish(server, KEPT)
    async with PostgresLayer(settings) as layer, layer.follow("room", name="f", after="0") as f:
        read: list[int] = []
        while len(read) < len(KEPT):
            batch = await anext(f)
            await batch.ack()
            read += [message["n"] for message in batch]

    cluster, first, second = (server.data_dir / name for name in ("pgdata", "first", "second"))
    await asyncio.to_thread(prepare, server)

    async with (
        PostgresLayer(settings) as one,
        PostgresLayer(settings) as two,
        one.subscribe("room", after="0") as on_one,
        two.subscribe("room", after="0") as on_two,
        one.follow("room", name="f") as follower,
        asyncio.timeout(60),
    ):
        publish(server, LOST)
        positions: list[Position] = []
        for stream in (on_one, on_two):
            messages = [await anext(stream) for _ in KEPT + LOST]
            assert [message["n"] for message in messages] == KEPT + LOST
            positions = [message.position for message in messages]
        assert (await anext(follower))[0]["n"] == LOST[0]  # and is not acknowledged

        await asyncio.to_thread(server.stop, "immediate")
        cluster.rename(first)
        second.rename(cluster)
        await asyncio.to_thread(server.start)

        for stream in (on_one, on_two):
            with pytest.raises(UnknownPosition):
                await anext(stream)
        for layer in (one, two):
            for position in positions:
                await eventually(partial(is_refused, layer, position))
            async with layer.subscribe("room", after="0") as stream:
                again = [await anext(stream) for _ in KEPT + NEW]
            assert [message["n"] for message in again] == KEPT + NEW
            assert {message.position.epoch for message in again} == {2}
        read = []
        while len(read) < len(NEW):
            batch = await anext(follower)
            await batch.ack()
            read += [message["n"] for message in batch]
        assert read == NEW
