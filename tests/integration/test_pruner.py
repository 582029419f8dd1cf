"""Pruning: what goes, what stays, who is told, and that nobody waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg.rows import scalar_row

from pgchannels import BEGINNING, Position, PostgresLayer, Settings, Stream, pruner
from pgchannels.leases import Lease
from pgchannels.pruner import Pruner, PruneReport
from pgchannels.store import Session, Store
from tests.support.eventually import eventually
from tests.support.partitions import make_small
from tests.support.pruning import only_by_hand

Connection = psycopg.Connection[Any]
DAY = timedelta(days=1)


@pytest.fixture
def connection(database_url: str) -> Iterator[Connection]:
    """A database whose partitions hold ten ids each."""
    make_small(database_url, 10)
    with psycopg.connect(database_url, autocommit=True, row_factory=scalar_row) as connection:
        yield connection


@pytest.fixture
def settings(database_url: str) -> Settings:
    only_by_hand(database_url)
    return Settings(database_url=database_url, retention=DAY, batch_size=10)


@pytest.fixture
async def session(settings: Settings) -> AsyncIterator[Session]:
    session = Session(settings, "test")
    yield session
    await session.close()


@pytest.fixture
def subject(settings: Settings, session: Session) -> Pruner:
    return Pruner(settings, session)


def value(connection: Connection, sql: str) -> Any:
    return connection.execute(sql).fetchone()


def fill(connection: Connection, count: int, *, ttl: str | None = None) -> None:
    """Put messages into the log, in batches of ten."""
    connection.execute(
        "select pgchannels.publish('room', json_build_object('n', i), %s)"
        "  from generate_series(1, %s) i",
        [ttl, count],
    )
    while value(connection, "select sealed from pgchannels.seal(10)"):
        pass


def age(connection: Connection, through: int, by: str = "25 hours") -> None:
    """Let everything up to an id have been published that long ago."""
    connection.execute(
        "update pgchannels.batches set sealed_at = clock_timestamp() - %s::interval"
        " where last_id <= %s",
        [by, through],
    )


def partitions(connection: Connection) -> list[int]:
    """The first ids of what partitions there are, attached or not."""
    tables = connection.execute(
        "select relname from pg_class where relname ~ '^messages_[0-9]+$' and relkind = 'r'"
        " and relnamespace = 'pgchannels'::regnamespace"
    ).fetchall()
    return sorted(int(table.removeprefix("messages_")) for table in tables)


def ids(connection: Connection) -> list[int]:
    return connection.execute("select id from pgchannels.messages order by id").fetchall()


def floor(connection: Connection) -> int:
    return int(value(connection, "select floor from pgchannels.log"))


def everything(connection: Connection) -> list[Any]:
    """What a dry run must not change."""
    return [
        partitions(connection),
        ids(connection),
        floor(connection),
        connection.execute("select last_id from pgchannels.batches order by 1").fetchall(),
        connection.execute("select id from pgchannels.outbox order by 1").fetchall(),
        connection.execute("select partitioned_to, attached_to from pgchannels.log").fetchall(),
    ]


class TestRetention:
    async def test_whole_partitions_go(self, connection: Connection, subject: Pruner) -> None:
        fill(connection, 45)
        age(connection, through=30)
        report = await subject.run_once()
        assert report.partitions_dropped == ["messages_1", "messages_11", "messages_21"]
        assert report.floor == floor(connection) == 30
        assert report.problems == []
        assert ids(connection) == list(range(31, 46))
        assert partitions(connection)[0] == 31

    async def test_where_backslashes_in_literals_are_escapes(
        self, database_url: str, connection: Connection, settings: Settings
    ) -> None:
        name = value(connection, "select quote_ident(current_database())")
        connection.execute(f"alter database {name} set standard_conforming_strings = off".encode())
        fill(connection, 25)
        age(connection, through=20)
        async with PostgresLayer(settings) as layer:
            channel = await layer.new_channel()
            await layer.group_add("room", channel)
            # One that is a connection's, and gone.
            await layer.group_add("room", f"gone.{'0' * 32}.{'0' * 16}")
            assert await layer.group_members("room") == [channel]
        session = Session(settings, "test")
        report = await Pruner(settings, session).run_once()
        await session.close()
        assert report.partitions_dropped == ["messages_1", "messages_11"]
        with psycopg.connect(database_url, autocommit=True, row_factory=scalar_row) as watching:
            assert value(watching, "show standard_conforming_strings") == "off"
            watching.execute("create table orders (id int primary key, customer text)")
            watching.execute("select pgchannels.watch('orders', '{{orders}}:{customer}')")
            watching.execute("insert into orders values (1, 'c')")
            assert value(watching, "select channel from pgchannels.outbox") == "{orders}:c"

    async def test_nothing_is_old(self, connection: Connection, subject: Pruner) -> None:
        fill(connection, 45)
        report = await subject.run_once()
        assert (report.floor, report.partitions_dropped, report.batches_deleted) == (0, [], 0)
        assert ids(connection) == list(range(1, 46))

    async def test_a_partition_in_part_below_the_floor_stays(
        self, connection: Connection, subject: Pruner
    ) -> None:
        fill(connection, 15)
        fill(connection, 15)
        # Batches end at 10, 15, 25 and 30.
        age(connection, through=15)
        report = await subject.run_once()
        assert report.floor == 15
        assert report.partitions_dropped == ["messages_1"]
        assert ids(connection) == list(range(11, 31))  # but 11 to 15 cannot be read any more
        store = Store(subject._settings)
        await store.open()
        try:
            page = await store.read_channels(["room"], -1)
            assert [message.id for message in page.messages] == list(range(16, 31))
            assert [m.id for m in (await store.read_log(-1)).messages] == list(range(16, 31))
            back = await store.read_backwards("room", 2**63 - 1, 0, 100)
            assert [message.id for message in back.messages] == list(range(30, 15, -1))
        finally:
            await store.close()

    async def test_a_partition_that_fills_slowly_is_emptied_row_by_row(
        self, connection: Connection, subject: Pruner
    ) -> None:
        fill(connection, 3)
        fill(connection, 3)
        age(connection, through=3, by="26 hours")
        assert (await subject.run_once()).messages_deleted == 0  # not a tenth over it yet
        assert floor(connection) == 3
        age(connection, through=3, by="27 hours")
        assert (await subject.run_once()).messages_deleted == 3
        assert ids(connection) == [4, 5, 6]

    async def test_everything_is_old(self, connection: Connection, subject: Pruner) -> None:
        fill(connection, 30)
        age(connection, through=30, by="100 days")
        report = await subject.run_once()
        assert len(report.partitions_dropped) == 3
        assert ids(connection) == []
        # The newest batch carries the id and the snapshot that the next one goes on from.
        assert connection.execute("select last_id from pgchannels.batches").fetchall() == [30]
        fill(connection, 1)
        assert ids(connection) == [31]
        assert (await subject.run_once()).floor == 30

    async def test_for_ever(
        self, connection: Connection, settings: Settings, session: Session
    ) -> None:
        fill(connection, 30)
        age(connection, through=30, by="1000 years")
        report = await Pruner(settings.model_copy(update={"retention": None}), session).run_once()
        assert (report.floor, report.partitions_dropped) == (0, [])
        assert len(ids(connection)) == 30

    async def test_batches_go_with_their_messages(
        self, connection: Connection, subject: Pruner
    ) -> None:
        fill(connection, 45)
        age(connection, through=30, by="3 days")
        assert (await subject.run_once()).batches_deleted == 3
        assert connection.execute(
            "select last_id from pgchannels.batches order by 1"
        ).fetchall() == [40, 45]

    async def test_the_floor_never_sinks(self, connection: Connection, subject: Pruner) -> None:
        fill(connection, 45)
        connection.execute("update pgchannels.log set floor = 33")
        age(connection, through=10)
        report = await subject.run_once()
        assert report.floor == floor(connection) == 33
        assert ids(connection)[0] == 31

    async def test_many_more_than_one_chunk(
        self, connection: Connection, subject: Pruner, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pruner, "_CHUNK", 2)
        fill(connection, 9)
        fill(connection, 1, ttl="1 us")
        fill(connection, 5, ttl="1 us")
        age(connection, through=9, by="2 days")
        report = await subject.run_once()
        assert (report.messages_deleted, report.expired_deleted) == (9, 6)
        assert ids(connection) == []


class TestReaders:
    async def test_are_told(
        self, connection: Connection, settings: Settings, subject: Pruner
    ) -> None:
        fill(connection, 45)
        age(connection, through=30)
        async with PostgresLayer(settings) as layer:
            await subject.run_once()
            for after, truncated in ((5, True), (29, True), (30, False)):
                async with layer.subscribe("room", after=Position(1, after)) as stream:
                    async with asyncio.timeout(10):
                        assert (await anext(stream)).id == 31
                    assert stream.truncated is truncated

    async def test_the_floor_is_raised_before_anything_goes(
        self, connection: Connection, database_url: str, subject: Pruner
    ) -> None:
        fill(connection, 25)
        age(connection, through=20)
        with psycopg.connect(database_url) as holder:
            holder.execute("select * from pgchannels.messages where id = 15")
            pruning = asyncio.create_task(subject.run_once())
            await eventually(lambda: floor(connection) == 20)
            assert not pruning.done()
            holder.rollback()
        assert (await pruning).partitions_dropped == ["messages_1", "messages_11"]

    async def test_a_long_transaction_delays_the_drop_and_nobody_else(
        self,
        connection: Connection,
        database_url: str,
        settings: Settings,
        subject: Pruner,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(pruner, "_LOCK_TIMEOUT", "300ms")
        fill(connection, 45)
        age(connection, through=30)
        with psycopg.connect(database_url) as holder:
            holder.execute("select * from pgchannels.messages")
            pruning = asyncio.create_task(subject.run_once())
            await eventually(lambda: floor(connection) == 30)
            # Reading and publishing go on while the pruner waits.
            async with PostgresLayer(settings) as layer:
                page = await layer.history("room", limit=3)
                assert [message.id for message in page.messages] == [31, 32, 33]
                async with layer.subscribe("room") as stream, asyncio.timeout(10):
                    await layer.send("room", {})
                    assert (await anext(stream)).id == 46
            report = await pruning
            assert report.partitions_dropped == []
            assert len(report.problems) == 3
            assert "messages_1:" in report.problems[0]
            # What was begun cannot be undone, only finished; not while the reader is there.
            assert (await subject.run_once()).partitions_dropped == []
        report = await subject.run_once()
        assert report.partitions_dropped == ["messages_1", "messages_11", "messages_21"]
        assert report.problems == []
        assert partitions(connection)[0] == 31

    async def test_what_a_crash_left_detached_is_dropped(
        self, connection: Connection, subject: Pruner
    ) -> None:
        fill(connection, 25)
        connection.execute("alter table pgchannels.messages detach partition pgchannels.messages_1")
        connection.execute("create table pgchannels.messages_of_theirs ()")
        connection.execute("update pgchannels.log set floor = 10")
        report = await subject.run_once()
        assert report.partitions_dropped == ["messages_1"]
        assert partitions(connection)[0] == 11
        assert value(connection, "select to_regclass('pgchannels.messages_of_theirs')")

    async def test_reading_on_while_pruning_goes_on(
        self, connection: Connection, settings: Settings, subject: Pruner
    ) -> None:
        seen: list[int] = []
        sent = 0
        async with PostgresLayer(settings) as layer, asyncio.timeout(100):

            async def publish() -> None:
                nonlocal sent
                while sent < 200 or floor(connection) < 50:
                    await layer.send("room", {"n": sent})
                    sent += 1

            async def prune() -> None:
                while not publishing.done():
                    # Retention at the reader's heels.
                    if seen:
                        age(connection, through=seen[-1])
                    await subject.run_once()

            async def read(stream: Stream) -> None:
                async for message in stream:
                    seen.append(message.id)  # noqa: PERF401 - one by one, for others look at it

            async with layer.subscribe("room", after=BEGINNING) as stream:
                reading = asyncio.create_task(read(stream))
                publishing = asyncio.create_task(publish())
                await asyncio.gather(publishing, prune())
                await eventually(lambda: seen == list(range(1, sent + 1)), timeout=30)
            await reading


class TestExpiry:
    async def test_expired_messages_go_wherever_they_are(
        self, connection: Connection, subject: Pruner
    ) -> None:
        fill(connection, 5)
        fill(connection, 2, ttl="1 us")
        fill(connection, 2, ttl="1 hour")
        fill(connection, 5)
        report = await subject.run_once()
        assert report.expired_deleted == 2
        assert ids(connection) == [1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13, 14]
        assert report.floor == 0  # nobody has missed anything: they were to go


class TestDryRun:
    @pytest.fixture
    def state(self, connection: Connection, request: pytest.FixtureRequest) -> Connection:
        fill(connection, 8)
        fill(connection, 4, ttl="1 us")
        fill(connection, 8)
        fill(connection, 3, ttl="1 us")
        fill(connection, 2)
        fill(connection, 2, ttl="1 us")
        fill(connection, 20)
        return connection

    @pytest.mark.parametrize(
        ("overdue", "aged"), [(0, 0), (8, 8), (12, 20), (20, 25), (0, 25), (0, 100), (100, 100)]
    )
    async def test_changes_nothing_and_foretells_the_real_one(
        self, state: Connection, subject: Pruner, overdue: int, aged: int
    ) -> None:
        age(state, through=aged)
        age(state, through=overdue, by="3 days")
        before = everything(state)
        foretold = await subject.run_once(dry_run=True)
        assert everything(state) == before
        done = await subject.run_once()
        done.partitions_added = foretold.partitions_added  # work that nobody needs to be asked for
        assert foretold == done

    async def test_of_leftovers(self, state: Connection, subject: Pruner) -> None:
        state.execute("alter table pgchannels.messages detach partition pgchannels.messages_1")
        before = everything(state)
        foretold = await subject.run_once(dry_run=True)
        assert everything(state) == before
        assert foretold.partitions_dropped == ["messages_1"]


class TestUpkeep:
    async def test_room_is_made_ahead(self, connection: Connection, subject: Pruner) -> None:
        fill(connection, 35)
        connection.execute("drop table pgchannels.messages_41, pgchannels.messages_51")
        connection.execute("update pgchannels.log set partitioned_to = 41, attached_to = 41")
        report = await subject.run_once()
        assert report.partitions_added == 1  # for 45: a partition beyond the one in use
        assert partitions(connection) == [1, 11, 21, 31, 41]
        assert (await subject.run_once()).partitions_added == 0

    async def test_stragglers_are_published_after_all(
        self, connection: Connection, subject: Pruner, caplog: pytest.LogCaptureFixture
    ) -> None:
        fill(connection, 1)
        connection.execute("select pgchannels.publish('room', '{\"n\": \"late\"}')")
        # As if a batch had been recorded that left it behind.
        connection.execute("update pgchannels.batches set snapshot = pg_current_snapshot()")
        assert value(connection, "select sealed from pgchannels.seal(10)") == 0
        report = await subject.run_once()
        assert report.stragglers == 1
        assert "1 stragglers" in caplog.text
        assert value(connection, "select sealed from pgchannels.seal(10)") == 1
        assert value(connection, "select payload->>'n' from pgchannels.messages where id = 2") == (
            "late"
        )
        assert (await subject.run_once()).stragglers == 0

    async def test_what_is_merely_waiting_is_no_straggler(
        self, connection: Connection, database_url: str, subject: Pruner
    ) -> None:
        with psycopg.connect(database_url) as open_transaction:
            open_transaction.execute("select pgchannels.publish('room', '{}')")
            fill(connection, 3)
            connection.execute("select pgchannels.publish('room', '{}')")
            assert (await subject.run_once()).stragglers == 0
            open_transaction.commit()
        assert (await subject.run_once()).stragglers == 0
        assert value(connection, "select sealed from pgchannels.seal(10)") == 2


class TestSeveral:
    async def test_two_at_once_do_no_harm(self, connection: Connection, settings: Settings) -> None:
        fill(connection, 60, ttl="1 us")
        fill(connection, 40)
        age(connection, through=50, by="3 days")
        sessions = [Session(settings, "test") for _ in range(3)]
        try:
            reports = await asyncio.gather(
                *(Pruner(settings, session).run_once() for session in sessions)
            )
        finally:
            for session in sessions:
                await session.close()
        assert {report.floor for report in reports} == {50}
        # What one of them could not do, because another was at it, is done by the next run.
        session = Session(settings, "test")
        try:
            assert (await Pruner(settings, session).run_once()).problems == []
        finally:
            await session.close()
        assert ids(connection) == list(range(61, 101))
        assert partitions(connection)[0] == 51

    async def test_one_prunes_by_lease(
        self, connection: Connection, database_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        quick = Settings(database_url=database_url, prune_interval=0.01)
        runs: list[Pruner] = []
        run_once = Pruner.run_once

        async def counted(self: Pruner, *, dry_run: bool = False) -> PruneReport:
            runs.append(self)
            return await run_once(self, dry_run=dry_run)

        monkeypatch.setattr(Pruner, "run_once", counted)
        pruners = []
        for _ in range(3):
            session = Session(quick, "test")
            pruners.append(Pruner(quick, session, Lease(session, "pruner", uuid4(), 60)))
        tasks = [asyncio.create_task(subject.run()) for subject in pruners]
        await eventually(lambda: len(runs) >= 5)
        (active,) = set(runs)
        # When it ends it lets go of the lease, and another one takes it when it asks again.
        index = pruners.index(active)
        tasks[index].cancel()
        await asyncio.gather(tasks[index], return_exceptions=True)
        await active.close()
        assert value(connection, "select count(*) from pgchannels.leases") == 0
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for subject in pruners:
            await subject.close()

    async def test_a_lease_runs_out(self, connection: Connection, database_url: str) -> None:
        session = Session(Settings(database_url=database_url), "test")
        first = Lease(session, "pruner", uuid4(), 60)
        second = Lease(session, "pruner", uuid4(), 0.03)
        assert await first.held()
        assert not await second.held()
        # The node has died; the database's clock is what counts.
        connection.execute("update pgchannels.leases set expires_at = clock_timestamp()")
        taken: bool = await eventually(second.held)
        assert taken
        await second.release()
        await session.close()
        assert value(connection, "select count(*) from pgchannels.leases") == 0
