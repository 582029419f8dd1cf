"""seal() by itself: each batch takes what has become visible, once, at a cost that stays flat."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest

from tests.support.eventually import eventually
from tests.support.partitions import make_small

if TYPE_CHECKING:
    from asyncpg import Connection, Record

Connect = Callable[[], Awaitable["Connection[Record]"]]

PUBLISH = "select pgchannels.publish($1, json_build_object('key', $2::text))"
SEAL = "select sealed, head from pgchannels.seal($1)"


@pytest.fixture
async def connect(database_url: str) -> AsyncIterator[Connect]:
    async with AsyncExitStack() as stack:

        async def connect() -> Connection[Record]:
            connection = await asyncpg.connect(database_url)
            stack.push_async_callback(connection.close, timeout=5)
            return connection

        yield connect


async def seal(connection: Connection[Record], limit: int = 10_000) -> tuple[int, int]:
    row = await connection.fetchrow(SEAL, limit)
    assert row is not None
    return row["sealed"], row["head"]


async def seal_some(connection: Connection[Record], limit: int, size: int) -> tuple[int, int, bool]:
    """Seal one batch, bounded in messages and bytes; return also whether it stopped at one."""
    row = await connection.fetchrow("select * from pgchannels.seal($1, $2)", limit, size)
    assert row is not None
    return row["sealed"], row["head"], row["stopped"]


async def publish(connection: Connection[Record], *keys: str) -> None:
    for key in keys:
        await connection.execute(PUBLISH, "a", key)


async def keys(connection: Connection[Record]) -> list[str]:
    """The whole log, which has no holes."""
    rows = await connection.fetch(
        "select id, payload->>'key' as key from pgchannels.messages order by id"
    )
    first = rows[0]["id"] if rows else 1
    assert [row["id"] for row in rows] == list(range(first, first + len(rows)))
    return [row["key"] for row in rows]


@dataclass
class Transaction:
    """One that is under way, or has been. Each savepoint is where in *keys* a rollback goes to."""

    name: str
    began: int | None = None
    ended: int | None = None
    keys: list[str] = field(default_factory=list)
    savepoints: list[int] = field(default_factory=list)


class Interleaving:
    """A few connections, each in some transaction, taking random steps one after the other."""

    def __init__(self, seed: int, writers: list[Connection[Record]]) -> None:
        self._random = random.Random(seed)
        self._writers = writers
        self._open: dict[int, Transaction] = {}
        self._names = 0
        self._clock = 0
        self.steps: list[str] = []
        self.committed: list[Transaction] = []

    async def step(self) -> None:
        self._clock += 1
        number = self._random.randrange(len(self._writers))
        transaction = self._open.get(number)
        if transaction is None:
            self._names += 1
            self._open[number] = Transaction(f"t{self._names}")
            await self._run(number, "begin")
            return
        choices = ["publish"] * 6 + ["savepoint"] * 2 + ["commit"] * 2 + ["rollback"]
        choices += ["release", "rollback to"] * bool(transaction.savepoints)
        await getattr(self, f"_{self._random.choice(choices).replace(' ', '_')}")(number)

    async def end_all(self) -> None:
        for number in list(self._open):
            self._clock += 1
            await self._commit(number)

    async def _publish(self, number: int) -> None:
        transaction = self._open[number]
        # In one statement, so that its rows differ in nothing but their place in it.
        batch = [f"{transaction.name}.{self._clock}.{i}" for i in range(self._random.randint(1, 3))]
        transaction.keys += batch
        if transaction.began is None:
            transaction.began = self._clock
        values = ", ".join(f"""('a', '{{"key": "{key}"}}')""" for key in batch)
        await self._run(number, f"insert into pgchannels.outbox (channel, payload) values {values}")

    async def _savepoint(self, number: int) -> None:
        savepoints = self._open[number].savepoints
        savepoints.append(len(self._open[number].keys))
        await self._run(number, f"savepoint s{len(savepoints)}")

    async def _release(self, number: int) -> None:
        savepoints = self._open[number].savepoints
        await self._run(number, f"release savepoint s{len(savepoints)}")
        savepoints.pop()

    async def _rollback_to(self, number: int) -> None:
        transaction = self._open[number]
        at = self._random.randrange(len(transaction.savepoints))
        del transaction.keys[transaction.savepoints[at] :]
        del transaction.savepoints[at + 1 :]
        await self._run(number, f"rollback to savepoint s{at + 1}")

    async def _commit(self, number: int) -> None:
        transaction = self._open.pop(number)
        await self._run(number, "commit")
        transaction.ended = self._clock
        self.committed.append(transaction)

    async def _rollback(self, number: int) -> None:
        self._open.pop(number)
        await self._run(number, "rollback")

    async def _run(self, number: int, sql: str) -> None:
        self.steps.append(f"{number}: {sql}")
        await self._writers[number].execute(sql)


def check_log(log: list[str], committed: list[Transaction]) -> None:
    assert sorted(log) == sorted(key for transaction in committed for key in transaction.keys)
    ids = {key: id for id, key in enumerate(log)}
    spans: list[tuple[int, int, int, int]] = []
    for transaction in committed:
        if transaction.keys and transaction.began is not None and transaction.ended is not None:
            own = [ids[key] for key in transaction.keys]
            assert own == sorted(own), f"{transaction} is not in the order of publishing"
            spans.append((transaction.began, transaction.ended, own[0], own[-1]))
    for _, ended, _, last in spans:
        for began, _, first, _ in spans:
            assert ended > began or last < first, "committed before, yet behind, what began after"


@pytest.mark.parametrize("limit", [1, 2, 20])
@pytest.mark.parametrize("seed", range(8))
async def test_random_interleavings(connect: Connect, seed: int, limit: int) -> None:
    sealer = await connect()
    interleaving = Interleaving(seed, [await connect() for _ in range(6)])
    chance = random.Random(-seed - 1)
    seen: list[str] = []
    try:
        for _ in range(250):
            await interleaving.step()
            if chance.random() < 0.3:
                size = chance.choice([1, 40, 1 << 40])
                interleaving.steps.append(f"seal({limit}, {size})")
                sealed, head, stopped = await seal_some(sealer, limit, size)
                log = await keys(sealer)
                assert sealed <= limit
                assert len(log) == head == len(seen) + sealed
                assert log[: len(seen)] == seen, "what a reader may have seen has changed"
                seen = log
                left = await sealer.fetchval("select count(*) from pgchannels.outbox")
                assert stopped == (left > 0)
                if not stopped:
                    check_log(log, interleaving.committed)
        await interleaving.end_all()
        while (await seal(sealer, limit))[0]:
            pass
        check_log(await keys(sealer), interleaving.committed)
        assert await sealer.fetchval("select count(*) from pgchannels.outbox") == 0
        assert await sealer.fetchval("select pgchannels.requeue_stragglers()") == 0
    except AssertionError as error:
        error.add_note("\n".join(interleaving.steps))
        raise


async def test_a_batch_says_whether_it_stopped_at_its_number(connect: Connect) -> None:
    sealer = await connect()
    await publish(sealer, *"abcd")
    assert await seal_some(sealer, 3, 1 << 40) == (3, 3, True)
    assert await seal_some(sealer, 1, 1 << 40) == (1, 4, False), "there was exactly one"
    assert await seal_some(sealer, 1, 1 << 40) == (0, 4, False)


async def test_a_batch_stops_at_its_bytes_and_holds_one_message_at_least(connect: Connect) -> None:
    sealer = await connect()
    insert = "insert into pgchannels.outbox (channel, payload, attachments) values ('a', $1, $2)"
    size = (
        "select sum(pg_column_size(payload) + pg_column_size(attachments)) from pgchannels.outbox"
    )
    for number in range(4):
        # Which does not shrink when it is compressed.
        noise = random.Random(number).randbytes(100_000)
        await sealer.execute(insert, json.dumps({"key": str(number)}), [noise])
    all_of_it = await sealer.fetchval(size)
    assert all_of_it > 400_000
    assert await seal_some(sealer, 100, 1) == (1, 1, True)
    assert await seal_some(sealer, 100, all_of_it // 4 + 1) == (2, 3, True), "with the one across"
    assert await seal_some(sealer, 100, 0) == (1, 4, False)
    assert await keys(sealer) == list("0123")
    # What is stored is what counts; compressed, this is a tenth of it.
    for number in range(2):
        await publish(sealer, str(number) * 100_000)
    assert await seal_some(sealer, 100, 20_000) == (2, 6, False)


async def test_a_batch_says_that_it_stopped_where_the_log_had_no_room(
    connect: Connect, database_url: str
) -> None:
    make_small(database_url, 10)
    sealer = await connect()
    await publish(sealer, *"abcdefghijklmno")
    first = await seal_some(sealer, 100, 1 << 40)
    assert first == (10, 10, True), "a partition's end"
    while (await seal_some(sealer, 100, 1 << 40))[2]:
        pass
    assert await keys(sealer) == list("abcdefghijklmno")


@pytest.mark.parametrize("limit", [1, 2, 20])
async def test_who_commits_last_is_found_however_many_batches_later(
    connect: Connect, limit: int
) -> None:
    sealer, early, late, other = [await connect() for _ in range(4)]
    old = late.transaction()
    await old.start()
    await publish(late, "late 1", "late 2")
    older = early.transaction()
    await older.start()
    await early.fetchval("select pg_current_xact_id()")
    expected = []
    for round_ in range(6):
        await publish(other, *(f"{round_}.{i}" for i in range(3)))
        expected += [f"{round_}.{i}" for i in range(3)]
        # Now and then without emptying the outbox: the next one begins where this one ended.
        for _ in range(1 if round_ % 2 else 4):
            await seal(sealer, limit)
    while (await seal(sealer, limit))[0]:
        pass
    assert await keys(sealer) == expected

    await old.commit()
    await publish(other, "after")
    await publish(early, "last")  # written after much else, and of an older transaction than it
    while (await seal(sealer, limit))[0]:
        pass
    await older.commit()
    while (await seal(sealer, limit))[0]:
        pass
    assert await keys(sealer) == [*expected, "late 1", "late 2", "after", "last"]


@pytest.mark.parametrize("limit", [2, 10_000])
async def test_a_snapshot_from_the_future_is_another_clusters(connect: Connect, limit: int) -> None:
    """As after dump and restore into a new cluster: everything in the outbox is to be taken."""
    sealer, writer = await connect(), await connect()
    await publish(writer, *"abcde")
    await writer.execute(
        "insert into pgchannels.batches (last_id, snapshot) select 41, format('%s:%s:', x, x)"
        "::pg_snapshot from (select pg_snapshot_xmax(pg_current_snapshot())::text::bigint"
        " + 1000000 as x) s"
    )
    assert await sealer.fetchval("select pgchannels.requeue_stragglers()") == 0
    assert await seal(sealer, limit) == (min(limit, 5), 41 + min(limit, 5))
    while (await seal(sealer, limit))[0]:
        pass
    assert await keys(sealer) == list("abcde")
    assert await sealer.fetchval("select min(id) from pgchannels.messages") == 42
    # From here on the snapshots are this cluster's own.
    async with writer.transaction():
        await publish(writer, "f")
        await publish(sealer, "g")
        await seal(sealer, limit)
    await seal(sealer, limit)
    assert await keys(sealer) == list("abcdegf")


async def test_stragglers_are_published_anew(connect: Connect) -> None:
    sealer, writer, other = await connect(), await connect(), await connect()
    transaction = writer.transaction()
    await transaction.start()
    await publish(writer, "in flight")
    await publish(other, "first")
    await seal(sealer)
    await publish(other, "due")
    # Of a transaction that, by every snapshot, was dealt with long ago.
    await other.execute(
        "insert into pgchannels.outbox (xid, channel, payload) values ('3', 'a', $1)",
        '{"key": "straggler"}',
    )
    await transaction.commit()
    assert (await seal(sealer))[0] == 2
    assert (await seal(sealer))[0] == 0
    assert await sealer.fetchval("select pgchannels.requeue_stragglers()") == 1
    assert await sealer.fetchval("select pgchannels.requeue_stragglers()") == 0
    assert (await seal(sealer))[0] == 1
    assert await keys(sealer) == ["first", "in flight", "due", "straggler"]


async def test_what_is_due_or_in_flight_is_no_straggler(connect: Connect) -> None:
    sealer, writer, other = await connect(), await connect(), await connect()
    async with writer.transaction():
        await publish(writer, "in flight 1", "in flight 2")
        await publish(other, *"abcd")
        await seal(sealer, 3)
        assert await sealer.fetchval("select pgchannels.requeue_stragglers()") == 0
        await seal(sealer, 3)
    # Committed now, and in flight by the newest snapshot; of which a full batch takes one.
    assert await sealer.fetchval("select pgchannels.requeue_stragglers()") == 0
    await seal(sealer, 1)
    assert await sealer.fetchval("select pgchannels.requeue_stragglers()") == 0
    await seal(sealer)
    assert await keys(sealer) == [*"abcd", "in flight 1", "in flight 2"]


@pytest.mark.parametrize(
    ("level", "complaint"),
    [
        ("repeatable_read", "needs its lock to be held before the transaction begins"),
        ("serializable", "needs READ COMMITTED"),
    ],
)
async def test_it_refuses_to_work_on_an_old_snapshot(
    connect: Connect, level: Any, complaint: str
) -> None:
    sealer = await connect()
    await publish(sealer, "a")
    with pytest.raises(asyncpg.PostgresError, match=complaint) as caught:
        async with sealer.transaction(isolation=level):
            await seal(sealer)
    assert caught.value.sqlstate == "25000"
    assert (await seal(sealer))[0] == 1


@pytest.mark.parametrize(
    ("default", "effective"),
    [("off", "local"), ("local", "local"), ("on", "on"), ("remote_write", "remote_write")],
)
async def test_a_batch_survives_a_crash_whatever_the_default(
    connect: Connect, default: str, effective: str
) -> None:
    admin = await connect()
    database = await admin.fetchval("select current_database()")
    await admin.execute(f'alter database "{database}" set synchronous_commit = {default}')
    sealer = await connect()
    assert await sealer.fetchval("show synchronous_commit") == default
    async with sealer.transaction():
        await publish(sealer, "a")
        await seal(sealer)
        # What counts is what is in force when it commits.
        assert await sealer.fetchval("show synchronous_commit") == effective
    assert await sealer.fetchval("show synchronous_commit") == default


@pytest.mark.parametrize("first_one", ["commit", "rollback"])
async def test_two_at_once_take_turns(connect: Connect, first_one: str) -> None:
    one, two, writer = await connect(), await connect(), await connect()
    await publish(writer, "a", "b")
    await one.execute("begin")
    assert await seal(one) == (2, 2)
    waiting = asyncio.create_task(seal(two))
    pid = two.get_server_pid()
    await eventually(
        lambda: writer.fetchval(
            "select count(*) from pg_locks where pid = $1 and not granted"
            " and relation = 'pgchannels.sequencer_lock'::regclass",
            pid,
        )
    )
    # Committed while the second one waits: it must see this when it is its turn.
    await publish(writer, "c")
    assert not waiting.done()
    await one.execute(first_one)
    assert await asyncio.wait_for(waiting, 10) == ((1, 3) if first_one == "commit" else (3, 3))
    assert await keys(one) == ["a", "b", "c"]


FILL = """
insert into pgchannels.outbox (channel, payload)
select 'a', json_build_object('key', i) from generate_series(1, $1::integer) i
"""


async def seal_counting_buffers(sealer: Connection[Record], limit: int) -> int:
    return await buffers(sealer, f"select * from pgchannels.seal({limit})")


async def buffers(connection: Connection[Record], query: str) -> int:
    # What the statements inside of a function touch is in its caller's own count.
    plan = await connection.fetchval(f"explain (analyze, buffers, format json) {query}")
    usage = json.loads(plan)[0]["Plan"]
    return int(usage["Shared Hit Blocks"] + usage["Shared Read Blocks"])


@pytest.mark.parametrize("holder_has_written", [False, True])
async def test_dead_rows_cost_nothing(connect: Connect, holder_has_written: bool) -> None:
    """A transaction that stays open keeps vacuum from the outbox. Its dead rows are not walked."""
    sealer, writer, holder = await connect(), await connect(), await connect()

    async def buffers_of_a_batch() -> int:
        await publish(writer, *map(str, range(20)))
        buffers = await seal_counting_buffers(sealer, 50)
        assert await sealer.fetchval("select count(*) from pgchannels.outbox") == 0
        return buffers

    transaction = holder.transaction(isolation="repeatable_read")
    await transaction.start()
    await holder.fetchval("select count(*) from pgchannels.outbox")
    if holder_has_written:
        await publish(holder, "open")
    before = [await buffers_of_a_batch() for _ in range(12)][-1]  # plans and caches have settled
    for _ in range(3):
        await writer.execute(
            "insert into pgchannels.outbox (channel, payload)"
            " select 'a', json_build_object('key', i) from generate_series(1, 10000) i"
        )
        while (await seal(sealer, 9999))[0]:
            pass
    dead = await sealer.fetchval("select pg_relation_size('pgchannels.outbox') / 8192")
    after = [await buffers_of_a_batch() for _ in range(5)]
    assert dead > 200, "the dead rows have been cleared away, so that this proves nothing"
    # Twenty rows cost a few hundred buffers; the indexes of the log may have grown by a level.
    assert max(after) < before + 100, (before, after, dead)
    await transaction.commit()


async def test_a_backlog_is_drained_at_a_flat_cost(connect: Connect) -> None:
    """Full batches, one after the other, do not walk over what the ones before them have taken."""
    sealer, writer, holder = await connect(), await connect(), await connect()
    transaction = holder.transaction(isolation="repeatable_read")
    await transaction.start()
    await holder.fetchval("select count(*) from pgchannels.outbox")
    for _ in range(300):
        await writer.execute(
            "insert into pgchannels.outbox (channel, payload)"
            " select 'a', json_build_object('key', i) from generate_series(1, 100) i"
        )
    early = [await seal_counting_buffers(sealer, 20) for _ in range(10)]
    assert await seal(sealer, 25_000) == (25_000, 25_200)
    late = [await seal_counting_buffers(sealer, 20) for _ in range(10)]
    assert max(late) < 1.5 * max(early[1:]), (early, late)
    await transaction.commit()


async def test_a_long_transaction_leaves_no_rows_to_walk_over(connect: Connect) -> None:
    """It is sealed in parts, long after what began after it."""
    sealer, writer, old = await connect(), await connect(), await connect()
    await old.execute("begin")
    await publish(old, "old")
    for _ in range(3):
        await writer.execute(FILL, 10_000)
        while (await seal(sealer, 9999))[0]:
            pass
    await publish(writer, *map(str, range(12)))
    beside = [await seal_counting_buffers(sealer, 2) for _ in range(6)]
    assert await seal(sealer) == (0, 30_012)
    await publish(old, *map(str, range(50)))
    await old.execute("commit")
    after = [await seal_counting_buffers(sealer, 5) for _ in range(10)]
    assert await seal(sealer) == (1, 30_063)
    assert max(after) < max(beside) + 300, (beside, after)


async def test_looking_for_stragglers_walks_over_nothing_twice(connect: Connect) -> None:
    sealer, writer, old = await connect(), await connect(), await connect()
    await old.execute("begin")
    await publish(old, "old")
    before = await buffers(sealer, "select pgchannels.requeue_stragglers()")
    for _ in range(3):
        await writer.execute(FILL, 10_000)
        while (await seal(sealer, 9999))[0]:
            pass
    # Dead rows, which vacuum cannot take while the transaction is open.
    beside = await buffers(sealer, "select pgchannels.requeue_stragglers()")
    assert beside < before + 100
    await old.execute("commit")
    assert (await seal(sealer))[0] == 1
    through = await sealer.fetchval(
        "select pg_snapshot_xmin(snapshot)::text from pgchannels.batches order by last_id desc"
    )
    # Nor those that were there the last time.
    again = await buffers(sealer, f"select pgchannels.requeue_stragglers('{through}')")
    assert again < before + 100


@pytest.mark.parametrize("late", [0, 15])
async def test_a_batch_costs_the_same_however_much_waits(connect: Connect, late: int) -> None:
    """Also when the oldest transactions have published last."""
    sealer, writer = await connect(), await connect()
    early = [await connect() for _ in range(late)]
    for connection in early:
        await connection.execute("begin; select pg_current_xact_id()")

    async def wait(transactions: int) -> None:
        await writer.execute(
            f"do $$ begin for i in 1..{transactions} loop"
            " insert into pgchannels.outbox (channel, payload)"
            " select 'a', '{}' from generate_series(1, 10); commit; end loop; end $$"
        )

    await wait(1500)
    for connection in early:
        await publish(connection, *map(str, range(10)))
        await connection.execute("commit")
    some = [await seal_counting_buffers(sealer, 10) for _ in range(5)]
    await wait(6000)
    many = [await seal_counting_buffers(sealer, 10) for _ in range(5)]
    assert max(many) < 1.5 * max(some), (some, many)
    # A few index probes for each of the transactions that are looked at, not all of their rows.
    assert max(many) < 30_000
