"""The log goes back: a backup is restored, or a standby promoted that lacked the end of the log."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from psycopg.rows import scalar_row

from pgchannels import (
    FollowerLost,
    Message,
    PostgresLayer,
    Settings,
    UnknownPosition,
)
from pgchannels.pruner import Pruner
from pgchannels.sql import load_queries
from pgchannels.store import Session
from tests.support.eventually import eventually
from tests.support.pruning import only_by_hand

Connection = psycopg.Connection[Any]
QUERIES = load_queries("pgchannels")
# Its batches were sealed in one second, long ago.
LONG_AGO = 1_600_000_000_000_000


@pytest.fixture
def settings(database_url: str) -> Settings:
    only_by_hand(database_url)
    return Settings(
        database_url=database_url, poll_interval=0.1, heartbeat_interval=0.1, lease_time=3.0
    )


@pytest.fixture
async def layer(settings: Settings) -> AsyncIterator[PostgresLayer]:
    async with PostgresLayer(settings) as layer:
        yield layer


@pytest.fixture
def connection(database_url: str) -> Iterator[Connection]:
    with psycopg.connect(database_url, autocommit=True, row_factory=scalar_row) as connection:
        yield connection


def value(connection: Connection, sql: str, *arguments: Any) -> Any:
    return connection.execute(sql.encode(), arguments).fetchone()


def overtake(connection: Connection, kept: int, *numbers: int) -> None:
    """Take away what came after an id, and put other messages there before anyone can look."""
    with connection.transaction():
        connection.execute("select pgchannels.lock_sequencer()")
        connection.execute("delete from pgchannels.messages where id > %s", [kept])
        connection.execute("delete from pgchannels.batches where last_id > %s", [kept])
        connection.execute("update pgchannels.followers set position = least(position, %s)", [kept])
        connection.execute(
            "select pgchannels.publish('room', json_build_object('n', n)) from unnest(%s) n",
            [list(numbers)],
        )
        connection.execute("select pgchannels.seal()")


async def send(layer: PostgresLayer, *numbers: int) -> list[Message]:
    """Publish one after the other, each in a batch of its own."""
    messages = []
    async with layer.subscribe("room") as stream, asyncio.timeout(20):
        for n in numbers:
            await layer.send("room", {"n": n})
            messages.append(await anext(stream))
    return messages


class TestOvertaken:
    """Others published before a node looked, so the log does not end before what was read."""

    async def test_nodes_that_notice_at_once_begin_one_epoch(
        self, settings: Settings, connection: Connection, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with AsyncExitStack() as stack, asyncio.timeout(30):
            layers = [await stack.enter_async_context(PostgresLayer(settings)) for _ in range(4)]
            streams = [
                await stack.enter_async_context(layer.subscribe("room", after="0"))
                for layer in layers
            ]
            sent = await send(layers[0], *range(10))
            for stream in streams:
                assert [(await anext(stream))["n"] for _ in sent] == list(range(10))
            overtake(connection, 5, *range(100, 110))
            for stream in streams:
                with pytest.raises(UnknownPosition):
                    await anext(stream)
            assert value(connection, "select epoch from pgchannels.bounds") == 2
            # Kept or lost, read before or not: none counts any more.
            for layer in layers:
                for message in (sent[2], sent[7]):
                    with pytest.raises(UnknownPosition):
                        async with layer.subscribe("room", after=message.position):
                            pass
                    with pytest.raises(UnknownPosition):
                        await layer.history("room", after=message.position)
            async with layers[1].subscribe("room", after="0") as stream:
                got = [(await anext(stream))["n"] for _ in range(15)]
            assert got == [*range(5), *range(100, 110)]
            await send(layers[2], 0)
        assert value(connection, "select epoch from pgchannels.bounds") == 2
        errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
        assert ["rewritten" in record.getMessage() for record in errors] == [True] * 4

    async def test_a_durable_reader_goes_on_from_its_position(
        self, layer: PostgresLayer, connection: Connection
    ) -> None:
        async with asyncio.timeout(30), layer.follow("room", name="f") as follower:
            await send(layer, 1, 2)
            read: list[int] = []
            while len(read) < 2:
                batch = await anext(follower)
                await batch.ack()
                read += [message["n"] for message in batch]
            await send(layer, 3, 4)
            lost = await anext(follower)
            overtake(connection, 2, *range(100, 105))
            await eventually(lambda: value(connection, "select epoch from pgchannels.bounds") == 2)
            # What was handed out of the old log moves no position in the new one.
            with pytest.raises(FollowerLost):
                await lost.ack()
            while read[-1] != 104:
                batch = await anext(follower)
                await batch.ack()
                read += [message["n"] for message in batch]
            assert read == [1, 2, *range(100, 105)]
            (status,) = await layer.followers()
            assert (status.position.epoch, status.position.id) == (2, 7)

    async def test_a_durable_reader_whose_row_was_locked_then(
        self, settings: Settings, connection: Connection, database_url: str
    ) -> None:
        async with PostgresLayer(settings) as layer:
            async with layer.follow("room", name="f", after="0"):
                pass
            with psycopg.connect(database_url) as holder:
                holder.execute("select from pgchannels.followers for update")
                assert value(connection, "select pgchannels.begin_epoch()") == 2
            assert value(connection, "select epoch from pgchannels.followers") == 1
            await layer.send("room", {"n": 1})
            async with layer.follow("room", name="f") as follower, asyncio.timeout(20):
                (message,) = await anext(follower)
                assert (message["n"], message.position.epoch) == (1, 2)


class TestThinned:
    """One batch a second is kept: that the others go is no rewriting."""

    @pytest.mark.parametrize("second", [0, 1])
    async def test_the_batch_that_was_seen_last_is_gone(
        self,
        settings: Settings,
        connection: Connection,
        caplog: pytest.LogCaptureFixture,
        second: int,
    ) -> None:
        """By thinning, if a later one of the same second is there; or else the log is another."""
        insert = (
            "insert into pgchannels.batches (last_id, snapshot, mark)"
            " values (%s, pg_current_snapshot(), %s)"
        )
        for id in (1, 2, 3):
            connection.execute(insert, [id, LONG_AGO + id])
        async with PostgresLayer(settings) as layer, layer.subscribe("room") as stream:
            with connection.transaction():
                connection.execute("select pgchannels.lock_sequencer()")
                connection.execute(insert, [4, LONG_AGO + 4 + second * 1_000_000])
                connection.execute(insert, [5, LONG_AGO + 5_000_000])
                connection.execute("delete from pgchannels.batches where last_id < 4")
            async with asyncio.timeout(20):
                if second:
                    with pytest.raises(UnknownPosition):
                        await anext(stream)
                else:
                    await layer.send("room", {"n": 1})
                    assert (await anext(stream)).position.epoch == 1
        errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
        assert len(errors) == second

    async def test_the_pruner_keeps_the_last_of_each_second(
        self, settings: Settings, connection: Connection, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pgchannels.pruner._CHUNK", 7)
        connection.execute(
            "insert into pgchannels.batches (last_id, snapshot, mark)"
            " select i, pg_current_snapshot(), %s + i * 100000 from generate_series(1, 95) i",
            [LONG_AGO],
        )
        session = Session(settings, "test")
        pruner = Pruner(settings.model_copy(update={"retention": timedelta(days=1)}), session)
        ids = "select array_agg(last_id order by last_id) from pgchannels.batches"
        try:
            await pruner.run_once()
            assert value(connection, ids) == [9, 19, 29, 39, 49, 59, 69, 79, 89, 95]
            # A minute has not passed for these; and what was the newest then need not stay.
            connection.execute(
                "insert into pgchannels.batches (last_id, snapshot, mark)"
                " values (96, pg_current_snapshot(), %s)",
                [LONG_AGO + 9_600_000],
            )
            connection.execute("select pgchannels.publish('room', '{}')")
            connection.execute("select pgchannels.seal()")
            connection.execute("select pgchannels.publish('room', '{}')")
            connection.execute("select pgchannels.seal()")
            await pruner.run_once()
            assert value(connection, ids) == [9, 19, 29, 39, 49, 59, 69, 79, 89, 96, 97, 98]
        finally:
            await session.close()


class TestNewEpoch:
    def test_of_several_callers_the_first_begins_it(self, connection: Connection) -> None:
        connection.execute("select pgchannels.publish('room', '{}')")
        connection.execute("select pgchannels.seal()")
        begin = "select pgchannels.begin_epoch(%s)"
        assert [value(connection, begin, 1) for _ in range(3)] == [2, 2, 2]
        assert [value(connection, begin, None) for _ in range(2)] == [3, 4]
        # The log has gone back before the epoch that a node knows of.
        assert value(connection, begin, 7) == 8
        connection.execute("select pgchannels.publish('room', '{}')")
        connection.execute("select pgchannels.seal()")
        assert value(connection, "select (head, epoch)::text from pgchannels.bounds") == "(2,8)"

    def test_in_an_empty_log(self, connection: Connection) -> None:
        assert value(connection, "select pgchannels.begin_epoch(1)") == 2
        assert value(connection, "select (head, epoch)::text from pgchannels.bounds") == "(0,2)"
        connection.execute("select pgchannels.publish('room', '{}')")
        connection.execute("select pgchannels.seal()")
        assert value(connection, "select (head, epoch)::text from pgchannels.bounds") == "(1,2)"
