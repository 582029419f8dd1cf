"""Rates that nodes share: exact over processes, by the database's clock, and cleared away."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

from pgchannels import FixedWindow, PostgresLayer, Settings, TokenBucket
from tests.support.eventually import eventually
from tests.support.processes import Processes
from tests.support.pruning import only_by_hand, prune

Connection = psycopg.Connection[dict[str, Any]]

PROCESSES = 4

# Takes for a while, once all are there; says in the end what it was given.
WORKER = """
import asyncio, json, os, sys
from pgchannels import FixedWindow, PostgresLayer, Settings, TokenBucket

rate = eval(os.environ["RATE"])
keys = json.loads(os.environ["KEYS"])

async def main():
    async with PostgresLayer(Settings(pool_size=2)) as layer:
        await layer.send("ready", {})
        # Nobody begins before all are there.
        async with layer.subscribe("go", after="0") as stream:
            await anext(stream)
        ends_at = asyncio.get_running_loop().time() + float(os.environ["SECONDS"])
        given = []

        async def take(key):
            while asyncio.get_running_loop().time() < ends_at:
                admission = await layer.take(key, rate)
                if admission.allowed:
                    given.append([key, admission.remaining])

        await asyncio.gather(*(take(key) for key in keys for _ in range(5)))
        print("given", json.dumps(given), flush=True)

asyncio.run(main())
"""


@pytest.fixture
def connection(database_url: str) -> Iterator[Connection]:
    with psycopg.connect(database_url, autocommit=True, row_factory=dict_row) as connection:
        yield connection


async def hammer(
    database_url: str, processes: Processes, rate: str, keys: list[str], seconds: float
) -> list[tuple[str, int]]:
    """What all processes together were given: of which key, and what remained then."""
    env = {
        "PGCHANNELS_DATABASE_URL": database_url,
        "RATE": rate,
        "KEYS": json.dumps(keys),
        "SECONDS": str(seconds),
    }
    started = [processes.start("-c", WORKER, env=env) for _ in range(PROCESSES)]
    async with PostgresLayer(database_url) as layer:
        async with asyncio.timeout(60), layer.subscribe("ready", after="0") as ready:
            for _ in started:
                await anext(ready)
        await layer.send("go", {})
    given: list[tuple[str, int]] = []
    for process in started:
        assert await asyncio.to_thread(process.wait, 60) == 0, processes.output(process)
        _, _, text = processes.output(process).partition("given ")
        given += [(key, remaining) for key, remaining in json.loads(text)]
    return given


async def test_a_window_admits_exactly_its_limit(database_url: str, processes: Processes) -> None:
    keys = [f"k{n}" for n in range(10)]
    given = await hammer(database_url, processes, "FixedWindow(37, 3600)", keys, 3)
    # Each of what remains once: nothing twice, nothing left out.
    assert Counter(given) == Counter((key, n) for key in keys for n in range(37))


@pytest.mark.slow
async def test_window_after_window(
    database_url: str, processes: Processes, connection: Connection
) -> None:
    given = Counter(
        remaining
        for _, remaining in await hammer(database_url, processes, "FixedWindow(20, 0.5)", ["k"], 6)
    )
    # A window begins with 19 remaining. All but the last one were taken from until nothing was
    # left.
    windows = given[19]
    assert windows > 1
    assert set(given) == set(range(20))
    assert all(windows - 1 <= count <= windows for count in given.values())


@pytest.mark.slow
async def test_a_bucket_admits_its_rate(
    database_url: str, processes: Processes, connection: Connection
) -> None:
    # Deep enough that it is not full again while a process waits for its turn.
    rate = TokenBucket(200, 600)
    async with PostgresLayer(database_url) as layer:
        assert (await layer.take("k", rate)).allowed
        # Full again, from then on it counts.
        (first,) = connection.execute("select at from pgchannels.rates").fetchall()
    given = await hammer(database_url, processes, "TokenBucket(200, 600)", ["k"], 8)
    (last,) = connection.execute("select at, tokens from pgchannels.rates").fetchall()
    time = connection.execute(
        "select extract(epoch from at - %s)::float as seconds from pgchannels.rates", [first["at"]]
    ).fetchone()
    assert time is not None
    assert len(given) + 1 <= 600 + 200 * time["seconds"] + 0.001
    # What came while the processes were starting was lost: the bucket was full.
    full = connection.execute("select created_at from pgchannels.messages where channel = 'go'")
    (go,) = full.fetchall()
    hammered = (last["at"] - go["created_at"]).total_seconds()
    expected = 600 + 200 * hammered
    assert len(given) <= expected
    assert len(given) + last["tokens"] >= 0.98 * expected


async def test_several_nodes_take_of_many_keys_in_no_circle(
    database_url: str, connection: Connection
) -> None:
    """Each locks many keys at once; the same ones, asked for in different orders."""
    settings = Settings(database_url=database_url)
    rate = FixedWindow(50, 3600)
    keys = [f"k{n}" for n in range(40)]
    async with (
        asyncio.timeout(60),
        PostgresLayer(settings) as first,
        PostgresLayer(settings) as second,
        PostgresLayer(settings) as third,
    ):
        attempts = [
            layer.take(key, rate)
            for n, layer in enumerate([first, second, third] * 8)
            for key in (keys if n % 2 else keys[::-1])
        ]
        found = await asyncio.gather(*attempts)
        assert all(admission.allowed for admission in found)
    taken = connection.execute("select distinct taken from pgchannels.rates").fetchall()
    assert taken == [{"taken": 24}]
    deadlocks = connection.execute(
        "select deadlocks from pg_stat_database where datname = current_database()"
    ).fetchone()
    assert deadlocks == {"deadlocks": 0}


async def test_rows_that_say_nothing_are_pruned(database_url: str, connection: Connection) -> None:
    only_by_hand(database_url)
    async with PostgresLayer(database_url) as layer:
        await asyncio.gather(*(layer.take(f"{n}", FixedWindow(5, 0.001)) for n in range(50)))
        await layer.take("window", FixedWindow(5, 3600), 5)
        await layer.take("bucket", TokenBucket(0.001, 5), 5)
        # The clock cannot be put forward, so the rows are put back.
        connection.execute("update pgchannels.rates set due_at = due_at - interval '3 minutes'")
        await prune(layer.settings)
        left = connection.execute("select key from pgchannels.rates order by key").fetchall()
        assert [row["key"] for row in left] == ["bucket:bucket", "window:window"]
        assert not (await layer.take("window", FixedWindow(5, 3600))).allowed
        assert not (await layer.take("bucket", TokenBucket(0.001, 5))).allowed


async def test_taking_beside_the_pruner(database_url: str, connection: Connection) -> None:
    """A row that goes between its being made and its being locked is made again."""
    stop = asyncio.Event()
    async with asyncio.timeout(60), PostgresLayer(database_url) as layer:

        async def remove_rows() -> None:
            while not stop.is_set():
                await asyncio.to_thread(connection.execute, "delete from pgchannels.rates")

        pruning = asyncio.create_task(remove_rows())
        for _ in range(50):
            found = await asyncio.gather(
                *(layer.take(f"{n}", TokenBucket(1, 100)) for n in range(30))
            )
            assert all(admission.allowed for admission in found)
        stop.set()
        await pruning


async def test_a_clock_that_is_set_back(database_url: str, connection: Connection) -> None:
    async with PostgresLayer(database_url) as layer:
        await layer.take("k", TokenBucket(1, 10), 10)
        connection.execute("update pgchannels.rates set at = at + interval '1 hour'")
        admission = await layer.take("k", TokenBucket(1, 10))
        assert not admission.allowed
        assert admission.retry_after == pytest.approx(1, abs=0.01)


async def test_a_crash_of_the_server_empties_them(
    database_url: str, connection: Connection
) -> None:
    (row,) = connection.execute(
        "select relpersistence::text from pg_class where oid = 'pgchannels.rates'::regclass"
    ).fetchall()
    assert row == {"relpersistence": "u"}


async def test_a_take_is_one_update_in_place(database_url: str, connection: Connection) -> None:
    """No index entry for each: the row moves within its page."""
    async with PostgresLayer(database_url) as layer:
        for _ in range(300):
            await layer.take("k", FixedWindow(1000, 3600))

    def updates() -> tuple[int, int]:
        (row,) = connection.execute(
            "select n_tup_upd, n_tup_hot_upd from pg_stat_user_tables where relname = 'rates'"
        ).fetchall()
        return row["n_tup_upd"], row["n_tup_hot_upd"]

    await eventually(lambda: updates()[0] >= 300)
    total, hot = updates()
    assert hot >= total - 30
