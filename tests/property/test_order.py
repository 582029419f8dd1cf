"""Of two transactions that changed a row, the one that waited comes second, over any cut."""

from __future__ import annotations

import asyncio
import json
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import asyncpg
import pytest

from tests.support.eventually import eventually

if TYPE_CHECKING:
    from asyncpg import Connection, Record

Connect = Callable[[], Awaitable["Connection[Record]"]]

ROWS = 6
WORKERS = 8

# Each change of a row has the next number of that row, so the log shows the order of the changes.
CHANGE = """
with changed as (update items set n = n + 1 where id = $1 returning id, n)
insert into pgchannels.outbox (channel, payload)
select 'items', json_build_object('id', id, 'n', n) from changed
"""
FILL = """
insert into pgchannels.outbox (channel, payload)
select 'other', json_build_object('text', repeat('.', 100)) from generate_series(1, $1::integer)
"""
# Transactions of one message each.
SINGLES = """
do $$ begin
    for i in 1..{} loop
        insert into pgchannels.outbox (channel, payload) values ('other', '{{}}');
        commit;
    end loop;
end $$
"""


@pytest.fixture
async def connect(database_url: str) -> AsyncIterator[Connect]:
    async with AsyncExitStack() as stack:

        async def connect() -> Connection[Record]:
            connection = await asyncpg.connect(database_url)
            stack.push_async_callback(connection.close, timeout=5)
            return connection

        setup = await connect()
        await setup.execute("create table items (id integer primary key, n bigint not null)")
        await setup.execute(f"insert into items select i, 0 from generate_series(1, {ROWS}) i")
        yield connect


async def seal(connection: Connection[Record], limit: int, max_bytes: int = 1 << 40) -> int:
    sealed: int = await connection.fetchval(
        "select sealed from pgchannels.seal($1, $2)", limit, max_bytes
    )
    return sealed


async def drain(connection: Connection[Record], limit: int, max_bytes: int = 1 << 40) -> int:
    """Seal until nothing is left; return in how many batches."""
    batches = 0
    while await seal(connection, limit, max_bytes):
        batches += 1
    return batches


async def has_begun(connection: Connection[Record]) -> None:
    """Begin a transaction that has its id."""
    await connection.execute("begin; select pg_current_xact_id()")


async def is_waiting(connection: Connection[Record], beside: Connection[Record]) -> None:
    pid = connection.get_server_pid()
    await eventually(lambda: beside.fetchval("select cardinality(pg_blocking_pids($1)) > 0", pid))


async def check(connection: Connection[Record]) -> int:
    """Check that each row's changes are all in the log, in their order; return how many."""
    log = await connection.fetch("select id, payload from pgchannels.messages order by id")
    assert [row["id"] for row in log] == list(range(1, len(log) + 1))
    told = defaultdict(list)
    for row in log:
        change = json.loads(row["payload"])
        if "id" in change:
            told[change["id"]].append(change["n"])
    state = dict(await connection.fetch("select id, n from items"))
    assert {id: list(range(1, n + 1)) for id, n in state.items() if n} == told
    assert await connection.fetchval("select count(*) from pgchannels.outbox") == 0
    assert await connection.fetchval("select pgchannels.requeue_stragglers()") == 0
    return sum(state.values())


async def change_at_random(
    connection: Connection[Record], chance: random.Random, name: str
) -> None:
    """A transaction, short or long, with savepoints; some are prepared, some rolled back."""
    await connection.execute("begin")
    if chance.random() < 0.5:
        await connection.fetchval("select pg_current_xact_id()")
        await asyncio.sleep(chance.choice([0, 0, 0.005, 0.02]))
    # In one order, so that no two wait for each other.
    for item in sorted(chance.sample(range(1, ROWS + 1), chance.choice([1, 1, 2, 3]))):
        if chance.random() < 0.2:
            await connection.execute(FILL.replace("$1", str(chance.choice([1, 5, 40]))))
        await connection.execute("savepoint s")
        await connection.execute(CHANGE.replace("$1", str(item)))
        await connection.execute(
            "rollback to savepoint s" if chance.random() < 0.1 else "release savepoint s"
        )
        await asyncio.sleep(0)
    end = chance.random()
    if end < 0.1:
        await connection.execute("rollback")
    elif end < 0.2:
        await connection.execute(f"prepare transaction '{name}'")
        await asyncio.sleep(0.005)
        await connection.execute(f"commit prepared '{name}'")
    else:
        await connection.execute("commit")


@pytest.mark.parametrize("seed", range(6))
async def test_random_changes_and_cuts(connect: Connect, seed: int) -> None:
    working = WORKERS

    async def work(number: int, connection: Connection[Record]) -> None:
        nonlocal working
        chance = random.Random(f"{seed} {number}")
        database = await connection.fetchval("select current_database()")
        for count in range(25):
            await change_at_random(connection, chance, f"{database} {number} {count}")
        working -= 1

    async def seal_at_random(number: int, connection: Connection[Record]) -> None:
        chance = random.Random(f"{seed} sealer {number}")
        # A backlog first, so that there is much to cut.
        await asyncio.sleep(0.05 * chance.random())
        while working:
            limit, max_bytes = chance.choice([1, 2, 3, 7, 20]), chance.choice([1, 500, 1 << 40])
            await connection.execute("begin")
            await seal(connection, limit, max_bytes)
            await connection.execute("rollback" if chance.random() < 0.1 else "commit")
            await asyncio.sleep(chance.choice([0, 0.01, 0.05]))

    async with asyncio.TaskGroup() as group:
        for number in range(WORKERS):
            group.create_task(work(number, await connect()))
        for number in range(2):
            group.create_task(seal_at_random(number, await connect()))
    sealer = await connect()
    await drain(sealer, 3)
    assert await check(sealer) > 100


LIMITS = pytest.mark.parametrize(
    ("limit", "max_bytes"), [(1, 1 << 40), (7, 1 << 40), (10_000, 1), (10_000, 700)]
)


@LIMITS
async def test_one_that_waited_for_a_large_change(
    connect: Connect, limit: int, max_bytes: int
) -> None:
    small, large, sealer = await connect(), await connect(), await connect()
    await has_begun(small)  # so it has the lower id
    await has_begun(large)
    await large.execute(CHANGE, 1)
    await large.execute(FILL, 40)
    await large.execute(CHANGE, 2)
    waiting = asyncio.create_task(small.execute(CHANGE, 2))
    await is_waiting(small, sealer)
    await large.execute("commit")
    await waiting
    await small.execute(CHANGE, 1)
    await small.execute("commit")
    assert await drain(sealer, limit, max_bytes) > 1
    assert await check(sealer) == 4


@LIMITS
async def test_a_large_change_of_what_a_later_one_had_changed(
    connect: Connect, limit: int, max_bytes: int
) -> None:
    small, large, sealer = await connect(), await connect(), await connect()
    await has_begun(large)  # so it has the lower id
    await large.execute(FILL, 20)
    await small.execute(CHANGE, 1)
    await large.execute(CHANGE, 1)
    await large.execute(FILL, 20)
    await large.execute("commit")
    assert await drain(sealer, limit, max_bytes) > 1
    assert await check(sealer) == 2


@LIMITS
async def test_a_backlog_of_small_changes(connect: Connect, limit: int, max_bytes: int) -> None:
    """Wherever a batch ends, it ends between no two of them the wrong way round."""
    early, late, sealer = await connect(), await connect(), await connect()
    for item in (1, 2, 3):
        await has_begun(early)
        for _ in range(3):
            await late.execute(FILL, 1)
            await late.execute(CHANGE, item)
        await early.execute(CHANGE, item)
        await early.execute("commit")
        await late.execute(CHANGE, item)
    assert await drain(sealer, limit, max_bytes) > 1
    assert await check(sealer) == 15


@pytest.mark.parametrize("waiting", [1, 15])
async def test_however_many_transactions_lie_between(connect: Connect, waiting: int) -> None:
    """More than a batch looks at, and more than it can note as left."""
    late, sealer = await connect(), await connect()
    early = [await connect() for _ in range(waiting)]
    for connection in early:
        await has_begun(connection)
    await late.execute(SINGLES.format(2000))
    await late.execute(CHANGE, 1)
    await late.execute(SINGLES.format(500))
    for connection in early:
        await connection.execute(CHANGE, 1)
        await connection.execute("commit")
    await late.execute(CHANGE, 1)
    for limit in (10, 10, 700, 10):
        assert await seal(sealer, limit) == limit
        # What becomes visible between batches takes part in the next ones.
        await late.execute(CHANGE, 2)
    await drain(sealer, 400)
    assert await check(sealer) == 2 + waiting + 4
