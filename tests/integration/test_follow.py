"""Durable readers: positions that last, one reader at a time, effects exactly once."""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncpg
import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.pool import NullPool

from pgchannels import (
    BEGINNING,
    ConfigurationError,
    DatabaseUnavailable,
    FollowerLost,
    InvalidChannel,
    InvalidPayload,
    InvalidPosition,
    Position,
    PostgresLayer,
    Settings,
    UnknownPosition,
)
from pgchannels.follower import Batch, Follower
from pgchannels.records import FollowerStatus
from pgchannels.sql import load_queries
from tests.support.eventually import eventually
from tests.support.pruning import only_by_hand, prune

# Renewed thirty times as often: a disk or a machine that stalls for a second costs nobody a lease.
LEASE = 3.0


@pytest.fixture
def settings(database_url: str) -> Settings:
    only_by_hand(database_url)
    return Settings(
        database_url=database_url,
        poll_interval=0.1,
        heartbeat_interval=0.1,
        lease_time=LEASE,
        retention=timedelta(days=1),
    )


@pytest.fixture
async def layer(settings: Settings) -> AsyncIterator[PostgresLayer]:
    async with PostgresLayer(settings) as layer:
        yield layer


@pytest.fixture
async def other(settings: Settings) -> AsyncIterator[PostgresLayer]:
    """What another process would have."""
    async with PostgresLayer(settings) as layer:
        yield layer


@pytest.fixture
async def connection(database_url: str) -> AsyncIterator[Any]:
    connection = await asyncpg.connect(database_url)
    await connection.execute(
        "create table effects (id integer generated always as identity, n int)"
    )
    yield connection
    await connection.close(timeout=5)


@pytest.fixture
async def observer(database_url: str) -> AsyncIterator[Any]:
    """A connection that is in no transaction."""
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close(timeout=5)


async def fill(layer: PostgresLayer, channel: str, *numbers: int) -> None:
    """Publish, in this order; return when it is in the log."""
    for n in numbers:
        await layer.send(channel, {"n": n})

    async def sealed() -> Any:
        return bool((await layer.history(channel, order="desc", limit=1)).messages)

    await eventually(sealed)
    head = numbers[-1]

    async def newest() -> Any:
        page = await layer.history(channel, order="desc", limit=1)
        return bool(page.messages[0]["n"] == head)

    await eventually(newest)


async def following(follower: Follower) -> Batch:
    """The next batch."""
    async with asyncio.timeout(10):
        return await anext(follower)


@asynccontextmanager
async def active(layer: PostgresLayer) -> AsyncIterator[Follower]:
    """A follower that has the lease, so that whoever is entered after it waits."""
    async with layer.follow("a", name="f") as follower:
        await eventually(lambda: follower._term is not None)  # type: ignore[attr-defined]
        yield follower


async def take(follower: Follower, count: int) -> Batch:
    """The next batches up to one that ends with the *count*-th message from now; the last."""
    taken = 0
    while True:
        batch = await following(follower)
        taken += len(batch)
        assert taken <= count
        if taken == count:
            return batch


async def one_by_one(layer: PostgresLayer, follower: Follower, *numbers: int) -> list[Batch]:
    """Publish on "a" and take each as a batch of its own."""
    batches = []
    for n in numbers:
        await layer.send("a", {"n": n})
        batches.append(await following(follower))
        assert ns(batches[-1]) == [n]
    return batches


def ns(batch: Batch) -> list[int]:
    return [message["n"] for message in batch]


async def status(layer: PostgresLayer, name: str = "f") -> FollowerStatus:
    return next(each for each in await layer.followers() if each.name == name)


async def saved(layer: PostgresLayer) -> int:
    return (await status(layer)).position.id


async def effects(connection: Any) -> list[int]:
    return [row["n"] for row in await connection.fetch("select n from effects order by id")]


async def renewed(connection: Any, times: int = 2) -> None:
    """Wait until the lease has been renewed that often."""
    query = "select expires_at from pgchannels.leases where name = 'follower:f'"
    for _ in range(times):
        before = await connection.fetchval(query)

        async def later(before: Any = before) -> Any:
            return bool((await connection.fetchval(query)) != before)

        await eventually(later)


async def asked(connection: Any) -> None:
    """Wait until somebody has been refused the lease since now: its row shows who has locked it."""
    query = "select xmax::text from pgchannels.leases where name = 'follower:f'"
    before = await connection.fetchval(query)

    async def locked() -> Any:
        return bool((await connection.fetchval(query)) not in (before, "0"))

    await eventually(locked)


class TestReading:
    async def test_batches_come_in_order_and_what_was_acknowledged_does_not_come_again(
        self, layer: PostgresLayer, other: PostgresLayer
    ) -> None:
        async with layer.follow("a", name="f") as follower:
            await fill(layer, "a", 1, 2, 3)
            batch = await take(follower, 3)
            await batch.ack()
            assert await saved(layer) == batch.position.id == batch[-1].id == 3
        async with other.follow("a", name="f") as follower:
            await fill(other, "a", 4)
            assert ns(await following(follower)) == [4]

    async def test_what_was_not_acknowledged_comes_again(self, layer: PostgresLayer) -> None:
        async with layer.follow("a", name="f") as follower:
            first, *_ = await one_by_one(layer, follower, 1, 2, 3)
            await first.ack()
        async with layer.follow("a", name="f") as follower:
            assert ns(await following(follower)) == [2, 3]
        async with layer.follow("a", name="f") as follower:
            assert ns(await following(follower)) == [2, 3]

    async def test_a_new_name_begins_when_it_is_entered(self, layer: PostgresLayer) -> None:
        await fill(layer, "a", 1)
        async with layer.follow("a", name="f"):
            await layer.send("a", {"n": 2})
        async with layer.follow("a", name="f") as follower:
            assert ns(await following(follower)) == [2]

    @pytest.mark.parametrize(
        ("after", "expected"), [("0", [1, 2, 3]), (BEGINNING, [1, 2, 3]), ("1-2", [3])]
    )
    async def test_a_new_name_begins_where_it_is_told_to(
        self, layer: PostgresLayer, after: Position | str, expected: list[int]
    ) -> None:
        await fill(layer, "a", 1, 2, 3)
        async with layer.follow("a", name="f", after=after) as follower:
            assert ns(await following(follower)) == expected
            assert not follower.truncated

    async def test_a_name_that_is_known_goes_on(self, layer: PostgresLayer) -> None:
        async with layer.follow("a", name="f", after="0") as follower:
            (batch,) = await one_by_one(layer, follower, 1)
            await batch.ack()
            await fill(layer, "a", 2)
        async with layer.follow("a", name="f", after="0") as follower:
            assert ns(await following(follower)) == [2]
        # Not even looked at: the log that a configured position was of may be gone.
        async with layer.follow("a", name="f", after="1-99") as follower:
            assert ns(await following(follower)) == [2]

    @pytest.mark.parametrize("after", ["1-2", "2-0"])
    async def test_a_new_name_after_a_position_that_never_was(
        self, layer: PostgresLayer, after: str
    ) -> None:
        await fill(layer, "a", 1)
        with pytest.raises(UnknownPosition):
            await layer.follow("a", name="f", after=after).__aenter__()
        assert await layer.followers() == []

    async def test_bad_arguments(self, layer: PostgresLayer) -> None:
        with pytest.raises(InvalidChannel):
            layer.follow("a b", name="f")
        with pytest.raises(InvalidChannel):
            layer.follow("a", name="f g")
        with pytest.raises(InvalidPosition):
            layer.follow("a", name="f", after="yesterday")
        with pytest.raises(ValueError, match="one channel"):
            layer.follow(name="f")

    async def test_several_channels_are_one_order(self, layer: PostgresLayer) -> None:
        async with layer.follow("a", "b", "a", name="f") as follower:
            for n in range(20):
                await layer.send("abc"[n % 3], {"n": n})
            batch = await take(follower, 14)
            await batch.ack()
            assert batch[-1]["n"] == 19
        assert (await status(layer)).channels == ("a", "b")

    async def test_channels_may_change(self, layer: PostgresLayer) -> None:
        async with layer.follow("a", name="f") as follower:
            (batch,) = await one_by_one(layer, follower, 1)
            await batch.ack()
        await fill(layer, "b", 2)
        async with layer.follow("b", name="f") as follower:
            assert ns(await following(follower)) == [2]
        assert (await status(layer)).channels == ("b",)

    async def test_ephemeral_messages_are_not_for_followers(self, layer: PostgresLayer) -> None:
        async with layer.follow("a", name="f") as follower, layer.subscribe("a") as stream:
            first = asyncio.create_task(following(follower))
            await eventually(lambda: len(layer._opened.hub._index["a"]) == 2)
            await eventually(lambda: layer.is_listening)
            await layer.send_ephemeral("a", {"n": 0})
            async with asyncio.timeout(10):
                assert (await anext(stream)).ephemeral
            await layer.send("a", {"n": 1})
            assert ns(await first) == [1]

    async def test_a_batch_is_a_sequence(self, layer: PostgresLayer) -> None:
        await fill(layer, "a", 1, 2, 3)
        async with layer.follow("a", name="f", after="0") as follower:
            batch = await following(follower)
            assert len(batch) == 3
            assert [m["n"] for m in batch[1:]] == [2, 3]
            assert batch[-1].position == batch.position == Position(1, 3)

    async def test_it_must_be_entered_once_and_has_one_reader(self, layer: PostgresLayer) -> None:
        follower = layer.follow("a", name="f")
        with pytest.raises(RuntimeError, match="enter"):
            await anext(follower)
        async with follower:
            with pytest.raises(RuntimeError, match="once"):
                await follower.__aenter__()
            reader = asyncio.create_task(following(follower))
            await eventually(lambda: "a" in layer._opened.hub._index)
            with pytest.raises(RuntimeError, match="another task"):
                await anext(follower)
            await layer.send("a", {"n": 1})
            assert ns(await reader) == [1]
        with pytest.raises(StopAsyncIteration):
            await anext(follower)

    async def test_cancelled_it_loses_nothing(self, layer: PostgresLayer) -> None:
        async with layer.follow("a", name="f") as follower:
            got: list[int] = []
            for n in range(50):
                reader = asyncio.create_task(anext(follower))
                await layer.send("a", {"n": n})
                for _ in range(n % 7):
                    await asyncio.sleep(0)
                reader.cancel()
                results = await asyncio.gather(reader, return_exceptions=True)
                if isinstance(results[0], Batch):
                    got += ns(results[0])
            while len(got) < 50:
                got += ns(await following(follower))
            assert got == list(range(50))


class TestAck:
    async def test_it_covers_earlier_batches(self, layer: PostgresLayer) -> None:
        async with layer.follow("a", name="f") as follower:
            first, second, third = await one_by_one(layer, follower, 1, 2, 3)
            await second.ack()
            assert await saved(layer) == second.position.id
            await first.ack()
            await second.ack()
            assert await saved(layer) == second.position.id
            await third.ack()
            assert await saved(layer) == third.position.id

    async def test_several_at_once(self, layer: PostgresLayer) -> None:
        async with layer.follow("a", name="f") as follower:
            batches = await one_by_one(layer, follower, *range(10))
            order = [batches[i] for i in (3, 1, 9, 0, 5, 9, 2, 7, 8)]
            await asyncio.gather(*(batch.ack() for batch in order))
            assert await saved(layer) == batches[-1].position.id

    async def test_its_answer_is_lost(
        self, layer: PostgresLayer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = layer._opened.store
        fetch = store.fetch
        answers: list[Any] = []

        async def fetch_and_lose(name: str, *arguments: Any) -> Any:
            rows = await fetch(name, *arguments)
            if name == "save_follower":
                answers.append(rows)
                if len(answers) <= 2:
                    raise DatabaseUnavailable("the answer was lost")
            return rows

        monkeypatch.setattr(store, "fetch", fetch_and_lose)
        async with layer.follow("a", name="f") as follower:
            first, second = await one_by_one(layer, follower, 1, 2)
            await first.ack()
            assert len(answers) == 3
            await second.ack()
            assert await saved(layer) == second.position.id

    async def test_cancelled_it_is_saved_or_not_and_reading_goes_on(
        self, layer: PostgresLayer, connection: Any
    ) -> None:
        async with layer.follow("a", name="f") as follower:
            (batch,) = await one_by_one(layer, follower, 1)
            async with connection.transaction():
                await connection.execute("select from pgchannels.followers for update")
                ack = asyncio.create_task(batch.ack())
                await blocked(connection)
                ack.cancel()
                await asyncio.gather(ack, return_exceptions=True)
            # Whether it was saved is not known, so reading begins anew where it really is.
            again = await following(follower)
            assert ns(again) == [1]
            await again.ack()
            with pytest.raises(FollowerLost):
                await batch.ack()
            assert await saved(layer) == again.position.id


async def blocked(connection: Any) -> None:
    """Wait until somebody waits for a lock that this connection has."""
    query = "select exists (select from pg_locks where not granted)"
    await eventually(lambda: connection.fetchval(query))


@dataclass
class Way:
    """One of the ways to have a transaction."""

    transaction: Any
    begin: Callable[[], Any]
    execute: Callable[[str], Any]
    commit: Callable[[], Any]
    rollback: Callable[[], Any]


Opened = AbstractAsyncContextManager[Way]


def asyncpg_way(connection: Any) -> Way:
    open_now: list[Any] = []

    async def begin() -> None:
        open_now.append(connection.transaction())
        await open_now[-1].start()

    return Way(
        connection,
        begin,
        connection.execute,
        lambda: open_now.pop().commit(),
        lambda: open_now.pop().rollback(),
    )


def sqlalchemy_way(transaction: Any) -> Way:
    return Way(
        transaction,
        lambda: None,  # it begins by itself
        lambda sql: transaction.execute(sa.text(sql)),
        transaction.commit,
        transaction.rollback,
    )


@asynccontextmanager
async def asyncpg_connection(url: str) -> AsyncIterator[Way]:
    connection = await asyncpg.connect(url)
    yield asyncpg_way(connection)
    await connection.close(timeout=5)


@asynccontextmanager
async def asyncpg_pool(url: str) -> AsyncIterator[Way]:
    async with asyncpg.create_pool(url, min_size=1) as pool, pool.acquire() as connection:
        yield asyncpg_way(connection)


@asynccontextmanager
async def async_session(url: str) -> AsyncIterator[Way]:
    engine = create_async_engine(url.replace(":", "+asyncpg:", 1), poolclass=NullPool)
    async with AsyncSession(engine) as session:
        yield sqlalchemy_way(session)


@asynccontextmanager
async def async_scoped(url: str) -> AsyncIterator[Way]:
    engine = create_async_engine(url.replace(":", "+psycopg:", 1), poolclass=NullPool)
    registry = async_scoped_session(async_sessionmaker(engine), scopefunc=lambda: 1)
    yield sqlalchemy_way(registry)
    await registry.remove()


@asynccontextmanager
async def async_connection(url: str) -> AsyncIterator[Way]:
    engine = create_async_engine(url.replace(":", "+asyncpg:", 1), poolclass=NullPool)
    async with engine.connect() as connection:
        yield sqlalchemy_way(connection)


@asynccontextmanager
async def sync_session(url: str) -> AsyncIterator[Way]:
    engine = sa.create_engine(url.replace(":", "+psycopg:", 1), poolclass=NullPool)
    with Session(engine) as session:
        yield sqlalchemy_way(session)


@asynccontextmanager
async def sync_scoped(url: str) -> AsyncIterator[Way]:
    engine = sa.create_engine(url.replace(":", "+psycopg:", 1), poolclass=NullPool)
    registry = scoped_session(sessionmaker(engine))
    yield sqlalchemy_way(registry)
    registry.remove()


@asynccontextmanager
async def sync_connection(url: str) -> AsyncIterator[Way]:
    engine = sa.create_engine(url.replace(":", "+psycopg:", 1), poolclass=NullPool)
    with engine.connect() as connection:
        yield sqlalchemy_way(connection)


WAYS: list[Callable[[str], Opened]] = [
    asyncpg_connection,
    asyncpg_pool,
    async_session,
    async_scoped,
    async_connection,
    sync_session,
    sync_scoped,
    sync_connection,
]


@pytest.fixture(params=WAYS, ids=lambda way: str(way.__name__))
async def way(
    request: pytest.FixtureRequest, database_url: str, connection: Any
) -> AsyncIterator[Way]:
    async with request.param(database_url) as way:
        yield way


@pytest.fixture
async def quick_way(database_url: str, connection: Any) -> AsyncIterator[Way]:
    """One of them, for what does not depend on which."""
    async with asyncpg_connection(database_url) as way:
        yield way


async def _now(value: Awaitable[Any] | Any) -> Any:
    return await value if inspect.isawaitable(value) else value


async def work(way: Way, *batches: Batch) -> None:
    """Begin, do what the batches ask for and acknowledge each. Not the end."""
    await _now(way.begin())
    for batch in batches:
        for n in ns(batch):
            await _now(way.execute(f"insert into effects (n) values ({n})"))
        await batch.ack(way.transaction)


async def commit(way: Way) -> None:
    await _now(way.commit())


async def rollback(way: Way) -> None:
    await _now(way.rollback())


@asynccontextmanager
async def rolled_back(way: Way) -> AsyncIterator[None]:
    try:
        yield
    finally:
        await rollback(way)


class TestInATransaction:
    async def test_position_and_effects_commit_together(
        self, layer: PostgresLayer, connection: Any, way: Way
    ) -> None:
        async with layer.follow("a", name="f") as follower:
            for n in (1, 2):
                (batch,) = await one_by_one(layer, follower, n)
                before = await saved(layer)
                await work(way, batch)
                assert await saved(layer) == before
                await commit(way)
                assert await saved(layer) == batch.position.id
        assert await effects(connection) == [1, 2]

    async def test_the_same_batch_again_after_a_rollback(
        self, layer: PostgresLayer, connection: Any, way: Way
    ) -> None:
        async with layer.follow("a", name="f") as follower:
            first, second = await one_by_one(layer, follower, 1, 2)
            for _ in range(2):
                await work(way, first)
                await rollback(way)
            await work(way, first)
            await commit(way)
            await work(way, second)
            await commit(way)
            assert await saved(layer) == second.position.id
        assert await effects(connection) == [1, 2]

    async def test_the_next_batch_after_a_rollback(
        self, layer: PostgresLayer, connection: Any, way: Way
    ) -> None:
        """It would cover the one that was rolled back, whose effects would never be."""
        async with layer.follow("a", name="f") as follower:
            first, second = await one_by_one(layer, follower, 1, 2)
            await work(way, first)
            await rollback(way)
            async with rolled_back(way):
                with pytest.raises(FollowerLost) as raised:
                    await work(way, second)
            assert raised.value.name == "f"
            again = await following(follower)
            assert ns(again) == [1, 2]
            await work(way, again)
            await commit(way)
        assert await effects(connection) == [1, 2]

    async def test_a_commit_whose_answer_was_lost_is_not_repeated(
        self, layer: PostgresLayer, connection: Any, quick_way: Way
    ) -> None:
        async with layer.follow("a", name="f") as follower:
            (batch,) = await one_by_one(layer, follower, 1)
            await work(quick_way, batch)
            await commit(quick_way)
            async with rolled_back(quick_way):
                with pytest.raises(FollowerLost):
                    await work(quick_way, batch)
            (batch,) = await one_by_one(layer, follower, 2)
            await work(quick_way, batch)
            await commit(quick_way)
        assert await effects(connection) == [1, 2]

    async def test_several_batches_in_one_and_one_of_them_twice(
        self, layer: PostgresLayer, connection: Any, way: Way
    ) -> None:
        async with layer.follow("a", name="f") as follower:
            first, second, third, fourth = await one_by_one(layer, follower, 1, 2, 3, 4)
            await work(way, first, second)
            await second.ack(way.transaction)
            await first.ack(way.transaction)
            await rollback(way)
            await work(way, first, second, third)
            await commit(way)
            assert await saved(layer) == third.position.id
            await work(way, fourth)
            await commit(way)
            assert await saved(layer) == fourth.position.id
        assert await effects(connection) == [1, 2, 3, 4]

    async def test_only_the_second_of_two_again_after_a_rollback(
        self, layer: PostgresLayer, quick_way: Way
    ) -> None:
        async with layer.follow("a", name="f") as follower:
            first, second = await one_by_one(layer, follower, 1, 2)
            await work(quick_way, first, second)
            await rollback(quick_way)
            async with rolled_back(quick_way):
                with pytest.raises(FollowerLost):
                    await work(quick_way, second)

    async def test_two_that_are_open_at_once(
        self, layer: PostgresLayer, connection: Any, database_url: str, quick_way: Way
    ) -> None:
        """The second cannot know what will become of the first."""
        async with layer.follow("a", name="f") as follower:
            first, second = await one_by_one(layer, follower, 1, 2)
            await work(quick_way, first)
            async with async_session(database_url) as another, rolled_back(another):
                with pytest.raises(FollowerLost):
                    await work(another, second)
            reader = asyncio.create_task(following(follower))
            await renewed(connection)
            assert not reader.done()
            await commit(quick_way)
            again = await reader
            assert ns(again) == [2]
            await work(quick_way, again)
            await commit(quick_way)
        assert await effects(connection) == [1, 2]

    async def test_a_savepoint_that_is_rolled_back(
        self, layer: PostgresLayer, connection: Any, quick_way: Way
    ) -> None:
        async with layer.follow("a", name="f") as follower:
            first, second, third = await one_by_one(layer, follower, 1, 2, 3)
            await work(quick_way, first)
            await work(quick_way, second)  # a savepoint, in this driver
            await rollback(quick_way)
            await work(quick_way, second)
            await commit(quick_way)
            await work(quick_way, third)
            await commit(quick_way)
            await commit(quick_way)
            assert await saved(layer) == third.position.id
        assert await effects(connection) == [1, 2, 3]

    async def test_an_earlier_batch_in_a_transaction_of_its_own_is_refused(
        self, layer: PostgresLayer, quick_way: Way
    ) -> None:
        """The later one has said that it was done."""
        async with layer.follow("a", name="f") as follower:
            first, second = await one_by_one(layer, follower, 1, 2)
            await work(quick_way, second)
            await commit(quick_way)
            async with rolled_back(quick_way):
                with pytest.raises(FollowerLost):
                    await work(quick_way, first)

    async def test_with_and_without_in_turns(
        self, layer: PostgresLayer, connection: Any, quick_way: Way
    ) -> None:
        async with layer.follow("a", name="f") as follower:
            zeroth, first, second, third, fourth = await one_by_one(layer, follower, *range(5))
            await work(quick_way, zeroth, first)
            await commit(quick_way)
            # Nothing to be done, and no error: they are covered.
            await first.ack()
            await zeroth.ack()
            assert await saved(layer) == first.position.id
            await second.ack()
            await work(quick_way, third)
            await rollback(quick_way)
            with pytest.raises(FollowerLost):
                await fourth.ack()
            assert ns(await following(follower)) == [3, 4]

    async def test_one_that_was_rolled_back_comes_again_to_who_waits(
        self, layer: PostgresLayer, quick_way: Way
    ) -> None:
        """The channel is quiet, and no ack will tell."""
        async with layer.follow("a", name="f") as follower:
            (batch,) = await one_by_one(layer, follower, 1)
            await work(quick_way, batch)
            await rollback(quick_way)
            assert ns(await following(follower)) == [1]

    async def test_one_that_takes_longer_than_the_lease(
        self, layer: PostgresLayer, other: PostgresLayer, connection: Any, quick_way: Way
    ) -> None:
        """It is renewed all the same, before the ack and after it."""
        async with active(layer) as follower, other.follow("a", name="f") as waiting:
            second_reader = asyncio.create_task(following(waiting))
            (batch,) = await one_by_one(layer, follower, 1)
            await work(quick_way, batch)
            await renewed(connection, times=int(LEASE / 0.1) + 2)
            await commit(quick_way)
            (batch,) = await one_by_one(layer, follower, 2)
            await work(quick_way, batch)
            await commit(quick_way)
            assert not second_reader.done()
            second_reader.cancel()
            await asyncio.gather(second_reader, return_exceptions=True)
        assert await effects(connection) == [1, 2]

    @pytest.mark.parametrize("level", ["repeatable_read", "serializable"])
    async def test_renewing_the_lease_is_no_conflict(
        self, layer: PostgresLayer, connection: Any, observer: Any, level: str
    ) -> None:
        async with layer.follow("a", name="f") as follower:
            (batch,) = await one_by_one(layer, follower, 1)
            async with connection.transaction(isolation=level):
                await connection.execute("insert into effects (n) values (1)")
                await renewed(observer)
                await batch.ack(connection)
            assert await saved(layer) == batch.position.id

    async def test_who_takes_over_waits_for_a_transaction_that_is_open(
        self, layer: PostgresLayer, other: PostgresLayer, connection: Any, quick_way: Way
    ) -> None:
        async with layer.follow("a", name="f") as follower:
            (batch,) = await one_by_one(layer, follower, 1)
            await work(quick_way, batch)
        # The reader has left, and what it has acknowledged has not been committed yet.
        async with other.follow("a", name="f") as follower:
            reader = asyncio.create_task(following(follower))
            await renewed(connection)
            assert not reader.done()
            await commit(quick_way)
            await other.send("a", {"n": 2})
            assert ns(await reader) == [2]
        assert await effects(connection) == [1]

    async def test_a_batch_can_be_acknowledged_after_leaving(
        self, layer: PostgresLayer, connection: Any, quick_way: Way
    ) -> None:
        async with layer.follow("a", name="f") as follower:
            first, second, third = await one_by_one(layer, follower, 1, 2, 3)
        await work(quick_way, first)
        await commit(quick_way)
        await second.ack()
        async with layer.follow("a", name="f") as follower:
            assert ns(await following(follower)) == [3]
            async with rolled_back(quick_way):
                with pytest.raises(FollowerLost):
                    await work(quick_way, third)
        assert await effects(connection) == [1]


class TestRefusals:
    @pytest.fixture
    async def batch(self, layer: PostgresLayer) -> AsyncIterator[Batch]:
        async with layer.follow("a", name="f") as follower:
            (batch,) = await one_by_one(layer, follower, 1)
            yield batch
            # It was the call that was wrong, not the reader.
            await batch.ack()
            assert await saved(layer) == batch.position.id

    async def test_an_asyncpg_connection_without_a_transaction(
        self, batch: Batch, connection: Any
    ) -> None:
        with pytest.raises(ConfigurationError, match="in no transaction"):
            await batch.ack(connection)

    async def test_autocommit(self, batch: Batch, database_url: str) -> None:
        url = database_url.replace(":", "+asyncpg:", 1)
        engine = create_async_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        async with AsyncSession(engine) as session:
            with pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
                await batch.ack(session)
        async with engine.connect() as connection:
            assert isinstance(connection, AsyncConnection)
            with pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
                await batch.ack(connection)

    async def test_another_database(self, batch: Batch) -> None:
        engine = sa.create_engine("sqlite://")
        with Session(engine) as session, pytest.raises(ConfigurationError, match="sqlite"):
            await batch.ack(session)

    async def test_a_session_without_an_engine(self, batch: Batch) -> None:
        with Session() as session, pytest.raises(ConfigurationError, match="no engine"):
            await batch.ack(session)

    async def test_something_else(self, batch: Batch, database_url: str) -> None:
        with psycopg.connect(database_url) as connection:
            for wrong in (connection, "session", object()):
                with pytest.raises(ConfigurationError, match="expected an asyncpg connection"):
                    await batch.ack(wrong)


class TestTakeover:
    async def test_one_reads_and_the_next_takes_over_at_once(
        self, settings: Settings, connection: Any
    ) -> None:
        # Whoever had to wait for the lease to run out would wait for too long.
        patient = settings.model_copy(update={"lease_time": 3600.0})
        async with PostgresLayer(patient) as layer, PostgresLayer(patient) as other:
            another_name = other.follow("a", name="g")
            async with another_name, layer.follow("a", name="f") as follower:
                first, _ = await one_by_one(layer, follower, 1, 2)
                await first.ack()
                waiting = other.follow("a", name="f")
                async with waiting:
                    reader = asyncio.create_task(following(waiting))
                    await asked(connection)
                    assert not reader.done()
                    await follower.__aexit__(None, None, None)
                    assert ns(await reader) == [2]

    @pytest.mark.parametrize("way", [asyncpg_connection, async_session], indirect=True)
    async def test_who_was_thought_dead_can_save_nothing(
        self, layer: PostgresLayer, other: PostgresLayer, connection: Any, way: Way
    ) -> None:
        async with layer.follow("a", name="f") as follower:
            first, second = await one_by_one(layer, follower, 1, 2)
            await first.ack()
            async with paused(follower), other.follow("a", name="f") as waiting:
                await connection.execute(
                    "update pgchannels.leases set expires_at = clock_timestamp()"
                )
                taken_over = await following(waiting)
                assert ns(taken_over) == [2]
                async with rolled_back(way):
                    with pytest.raises(FollowerLost):
                        await work(way, second)
                with pytest.raises(FollowerLost):
                    await second.ack()
                await work(way, taken_over)
                await commit(way)
            await layer.send("a", {"n": 3})
            assert ns(await following(follower)) == [3]
        assert await effects(connection) == [2]

    async def test_nothing_is_handed_out_when_the_lease_may_have_run_out(
        self, layer: PostgresLayer, other: PostgresLayer, connection: Any
    ) -> None:
        async with layer.follow("a", name="f") as follower:
            (batch,) = await one_by_one(layer, follower, 1)
            await batch.ack()
            async with paused(follower):
                await connection.execute(
                    "update pgchannels.leases set expires_at = clock_timestamp()"
                )
                async with other.follow("a", name="f") as waiting:
                    await eventually(lambda: waiting._term is not None)  # type: ignore[attr-defined]
                    # As after a pause; it does not know yet that somebody else has taken over.
                    follower._active_until = asyncio.get_running_loop().time()  # type: ignore[attr-defined]
                    reader = asyncio.create_task(following(follower))
                    await layer.send("a", {"n": 2})
                    taken_over = await following(waiting)
                    assert ns(taken_over) == [2]
                    assert not reader.done()
                    await taken_over.ack()
                    await layer.send("a", {"n": 3})
                    await (await following(waiting)).ack()
            await layer.send("a", {"n": 4})
            assert ns(await reader) == [4]

    async def test_a_position_of_another_log(self, layer: PostgresLayer, connection: Any) -> None:
        await fill(layer, "a", 1)
        async with layer.follow("a", name="f", after="0"):
            pass
        for change in ("epoch = 7", "epoch = 1, position = 99"):
            await connection.execute(f"update pgchannels.followers set {change}")
            async with layer.follow("a", name="f") as follower:
                for _ in range(2):
                    with pytest.raises(UnknownPosition):
                        await following(follower)
        async with layer.follow("a", name="f", after="0") as follower:
            with pytest.raises(UnknownPosition):
                await following(follower)
            assert await layer.forget_follower("f")

            # The name is new then, also for who reads for it.
            async def begun_anew() -> Any:
                try:
                    return await following(follower)
                except UnknownPosition:
                    return None

            assert ns(await eventually(begun_anew)) == [1]

    async def test_a_new_epoch_after_a_restore(self, settings: Settings, connection: Any) -> None:
        """By the documented SQL, durable readers go on from where the backup has them."""
        page = Path(__file__).parents[2] / "docs" / "how-it-works.md"
        (new_epoch,) = (
            block
            for block in re.findall(r"```sql\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
            if "epoch" in block
        )
        async with PostgresLayer(settings) as layer:
            await fill(layer, "a", 1)
            for name in ("f", "beyond"):
                async with layer.follow("a", name=name, after="0") as follower:
                    await (await following(follower)).ack()
            await fill(layer, "a", 2)
            await fill(layer, "b", 1)  # and so the other one is in the log, too
        await connection.execute(
            "update pgchannels.followers set position = position + 99 where name = 'beyond'"
        )
        await connection.execute(new_epoch)
        async with PostgresLayer(settings) as layer:
            await layer.send("a", {"n": 3})
            for name, expected in (("f", [2, 3]), ("beyond", [3])):
                read: list[int] = []
                async with layer.follow("a", name=name) as follower:
                    while len(read) < len(expected):
                        batch = await following(follower)
                        await batch.ack()
                        read += ns(batch)
                assert read == expected
            assert {each.position.epoch for each in await layer.followers()} == {2}


@asynccontextmanager
async def paused(follower: Follower) -> AsyncIterator[None]:
    """Let nobody renew its lease, as if the process were stopped."""
    renew = follower._renew  # type: ignore[attr-defined]
    resumed = asyncio.Event()

    async def wait() -> None:
        await resumed.wait()
        await renew()

    follower._renew = wait  # type: ignore[attr-defined]
    try:
        yield
    finally:
        resumed.set()
        follower._renew = renew  # type: ignore[attr-defined]


class TestStatus:
    async def test_position_lag_and_activity(self, layer: PostgresLayer, connection: Any) -> None:
        assert await layer.followers() == []
        async with layer.follow("a", "b", name="f") as follower:
            await eventually(lambda: following_now(layer))
            (first,) = await one_by_one(layer, follower, 1)
            await fill(layer, "b", 2, 3)
            await fill(layer, "c", 4)
            at = await connection.fetchval("select clock_timestamp()")
            found = await status(layer)
            assert (found.channels, found.position, found.lag) == (("a", "b"), Position(1, 0), 3)
            assert found.active
            assert found.moved_at < at
            await first.ack()
            found = await status(layer)
            assert (found.position, found.lag) == (Position(1, 1), 2)
            assert found.moved_at > at
        assert not (await status(layer)).active
        async with layer.follow("c", name="e", after="0"):
            assert [(each.name, each.lag) for each in await layer.followers()] == [
                ("e", 1),
                ("f", 2),
            ]

    async def test_what_cannot_be_read_is_no_lag(
        self, layer: PostgresLayer, connection: Any
    ) -> None:
        async with layer.follow("a", name="f"):
            pass
        await fill(layer, "a", 1, 2, 3)
        assert (await status(layer)).lag == 3
        await connection.execute(
            "update pgchannels.messages set expires_at = clock_timestamp() where id = 3"
        )
        assert (await status(layer)).lag == 2
        await connection.execute("update pgchannels.log set floor = 1")
        assert (await status(layer)).lag == 1

    async def test_the_lag_is_counted_on_the_index(
        self, layer: PostgresLayer, connection: Any
    ) -> None:
        """Few messages of its own among many others, and what lies behind is not read."""
        async with layer.follow("a", name="f"):
            pass
        await connection.execute(
            "select pgchannels.publish(case when i % 1000 = 0 then 'a' else 'b' end, '{}')"
            "  from generate_series(1, 20000) i"
        )
        layer.wake()

        async def counted() -> Any:
            return (await status(layer)).lag == 20

        await eventually(counted)
        plan = await explained(connection, load_queries("pgchannels")["followers"])
        assert "channel" in plan
        assert "Seq Scan on messages" not in plan
        assert "messages_1_pkey" not in plan

    async def test_a_name_is_forgotten(self, layer: PostgresLayer) -> None:
        assert not await layer.forget_follower("f")
        async with layer.follow("a", name="f") as follower:
            (batch,) = await one_by_one(layer, follower, 1)
            await batch.ack()
        assert await layer.forget_follower("f")
        assert await layer.followers() == []
        assert not await layer.forget_follower("f")
        async with layer.follow("a", name="f", after="0") as follower:
            assert ns(await following(follower)) == [1]
        with pytest.raises(InvalidChannel):
            await layer.forget_follower("f g")

    async def test_a_name_is_forgotten_while_somebody_reads(
        self, layer: PostgresLayer, connection: Any, quick_way: Way
    ) -> None:
        async with layer.follow("a", name="f", after="0") as follower:
            first, second = await one_by_one(layer, follower, 1, 2)
            await first.ack()
            async with paused(follower):
                assert await layer.forget_follower("f")
                async with rolled_back(quick_way):
                    with pytest.raises(FollowerLost):
                        await work(quick_way, second)
                with pytest.raises(FollowerLost):
                    await second.ack()
            # It goes on as a reader whose name is new.
            assert ns(await following(follower)) == [1, 2]
        assert await effects(connection) == []


async def following_now(layer: PostgresLayer) -> Any:
    return (await status(layer)).active


async def explained(connection: Any, query: str) -> str:
    async with connection.transaction():
        for name in ("seqscan", "bitmapscan"):
            await connection.execute(f"set local enable_{name} = off")
        rows = await connection.fetch(f"explain {query.replace('$1', '100000')}")
    return "\n".join(row[0] for row in rows)


class TestQuietness:
    async def test_the_position_moves_along_with_others(
        self, layer: PostgresLayer, connection: Any
    ) -> None:
        async with layer.follow("a", name="f") as follower:
            reader = asyncio.create_task(following(follower))
            await fill(layer, "b", 1, 2, 3)

            async def moved() -> Any:
                return await saved(layer) == 3

            await eventually(moved)
            await layer.send("a", {"n": 4})
            batch = await reader
            await fill(layer, "b", 5, 6)
            await renewed(connection)
            # Not now: the batch is not done.
            assert await saved(layer) == 3
            async with connection.transaction():
                await batch.ack(connection)

            async def moved_on() -> Any:
                return await saved(layer) == 6

            # Its user may be gone for long; it needs nobody who waits for the next.
            await eventually(moved_on)
            await fill(layer, "a", 7)
            batch = await following(follower)
            assert ns(batch) == [7]
            async with connection.transaction():
                await batch.ack(connection)
            assert (await status(layer)).lag == 0

    async def test_it_does_not_wait_for_a_transaction(
        self, layer: PostgresLayer, connection: Any, quick_way: Way
    ) -> None:
        """The transaction might have to wait for it, to acknowledge one more."""
        async with layer.follow("a", name="f") as follower, asyncio.timeout(10):
            (first,) = await one_by_one(layer, follower, 1)
            await work(quick_way, first)
            await fill(layer, "b", 2)
            await renewed(connection, times=3)
            (second,) = await one_by_one(layer, follower, 3)
            await second.ack(quick_way.transaction)
            await commit(quick_way)
            assert await saved(layer) == second.position.id

    async def test_it_stays_while_reading_has_not_begun(
        self, layer: PostgresLayer, connection: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await fill(layer, "a", 1, 2)
        hub = layer._opened.hub
        head = hub.head

        async def slow_head() -> Any:
            await renewed(connection)
            return await head()

        monkeypatch.setattr(hub, "head", slow_head)
        async with layer.follow("a", name="f", after="0") as follower:
            assert ns(await following(follower)) == [1, 2]
            assert await saved(layer) == 0

    async def test_it_does_not_race_with_acks(self, layer: PostgresLayer, connection: Any) -> None:
        """Messages of others all the time, so that each renewal has something to move."""

        async def others() -> None:
            while True:
                await layer.send("b", {})

        noise = asyncio.create_task(others())
        try:
            async with layer.follow("a", name="f") as follower:
                follower._settings = layer.settings.model_copy(  # type: ignore[attr-defined]
                    update={"heartbeat_interval": 0.001}
                )
                done = []
                for n in range(200):
                    await layer.send("a", {"n": n})
                    batch = await following(follower)
                    done += ns(batch)
                    if n % 2:
                        async with connection.transaction():
                            await batch.ack(connection)
                    else:
                        await batch.ack()
        finally:
            noise.cancel()
            await asyncio.gather(noise, return_exceptions=True)
        assert done == list(range(200))


class TestRetention:
    async def test_it_is_told_that_messages_are_gone(
        self, layer: PostgresLayer, settings: Settings, connection: Any
    ) -> None:
        async with layer.follow("a", name="f", after="0") as follower:
            (batch,) = await one_by_one(layer, follower, 1)
            await batch.ack()
            assert not follower.truncated
        await fill(layer, "a", 2, 3)
        await prune_all(settings, connection)
        async with layer.follow("a", name="f") as follower:
            batch = await following(follower)
            assert follower.truncated
            assert len(batch) == 0
            assert batch.position == Position(1, 1)
            async with connection.transaction():
                await batch.ack(connection)
            follower.truncated = False
            (batch,) = await one_by_one(layer, follower, 4)
            assert not follower.truncated
            await batch.ack()
            assert (await saved(layer), (await status(layer)).lag) == (batch.position.id, 0)

    async def test_a_new_name_from_the_beginning_has_missed_nothing(
        self, layer: PostgresLayer, settings: Settings, connection: Any
    ) -> None:
        await fill(layer, "a", 1, 2, 3)
        await eventually(lambda: layer._opened.hub.cursor == 3)
        await prune_all(settings, connection)
        await fill(layer, "a", 4)
        async with layer.follow("a", name="f", after="0") as follower:
            assert ns(await following(follower)) == [4]
            assert not follower.truncated


async def prune_all(settings: Settings, connection: Any) -> None:
    """Let everything in the log be old, and remove it."""
    await connection.execute(
        "update pgchannels.batches set sealed_at = sealed_at - interval '30 d'"
    )
    await prune(settings)


class TestClosing:
    async def test_the_layer_closes_while_it_reads_or_waits(
        self, layer: PostgresLayer, other: PostgresLayer, connection: Any
    ) -> None:
        async with active(layer) as follower, other.follow("a", name="f") as waiting:
            readers = [asyncio.create_task(everything(each)) for each in (follower, waiting)]
            await asked(connection)
            await other.close()
            async with asyncio.timeout(5):
                assert await readers[1] == []
            await layer.send("a", {"n": 1})
            await eventually(lambda: follower._term.handed_out == 1)  # type: ignore[attr-defined]
            await layer.close()
            async with asyncio.timeout(5):
                assert await readers[0] == [1]
        # The lease was given back while the database could still be asked.
        assert (
            await connection.fetchval(
                "select count(*) from pgchannels.leases l where l.name = 'follower:f'"
            )
            == 0
        )

    async def test_it_can_be_left_at_any_moment(self, layer: PostgresLayer) -> None:
        for turns in range(30):
            async with layer.follow("a", name=f"f{turns}") as follower:
                reader = asyncio.create_task(everything(follower))
                for _ in range(turns):
                    await asyncio.sleep(0)
            async with asyncio.timeout(5):
                assert await reader == []


async def everything(follower: Follower) -> list[int]:
    return [n async for batch in follower for n in ns(batch)]


async def test_a_message_that_cannot_be_parsed_holds_up_no_follower(
    layer: PostgresLayer, connection: Any
) -> None:
    # The rule was made after the rows.
    await connection.execute(
        "alter table pgchannels.outbox drop constraint outbox_payload_is_valid"
    )
    deep = "[" * 1100 + "]" * 1100
    await connection.executemany(
        "insert into pgchannels.outbox (channel, payload) values ('a', $1)",
        [('{"n": 1}',), ('{"n": 1e400}',), (f'{{"n": {deep}}}',), ('{"n": 2}',)],
    )
    seen: list[Any] = []
    async with layer.follow("a", name="f", after="0") as batches:
        async for batch in batches:
            for message in batch:
                try:
                    seen.append(message["n"])
                except InvalidPayload:
                    seen.append(len(message.payload))
            await batch.ack()
            if 2 in seen:
                break
    assert seen == [1, 12, 2207, 2]
    assert (await status(layer)).lag == 0
