"""The sessions that a layer has on the server: whose defaults count, and what a timeout leaves."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import psycopg
import pytest
from psycopg.rows import scalar_row

from pgchannels import DatabaseUnavailable, FixedWindow, Limits, PostgresLayer, Settings
from pgchannels.connections import connect
from pgchannels.store import Session, Store
from tests.support.eventually import eventually

ODD = {
    "default_transaction_isolation": "serializable",
    "default_transaction_read_only": "on",
    "statement_timeout": "2s",
    "lock_timeout": "1ms",
    "idle_session_timeout": "50ms",
    "idle_in_transaction_session_timeout": "50ms",
    "enable_indexscan": "on",
    "plan_cache_mode": "force_custom_plan",
}


def execute(url: str, *statements: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("set default_transaction_read_only = off")
        for statement in statements:
            connection.execute(statement.encode())


def set_defaults(url: str, defaults: dict[str, str]) -> None:
    with psycopg.connect(url) as connection:
        name = connection.info.dbname
    execute(url, *(f"alter database \"{name}\" set {k} = '{v}'" for k, v in defaults.items()))


def backends(url: str, what: str) -> int:
    """How many backends run a statement with *what* in it."""
    with psycopg.connect(url, row_factory=scalar_row) as connection:
        found = connection.execute(
            "select count(*) from pg_stat_activity where datname = current_database()"
            " and pid <> pg_backend_pid() and state = 'active' and query like %s",
            [f"%{what}%"],
        ).fetchone()
        return int(found or 0)


async def test_defaults_of_the_database_do_not_count(
    database_url: str, postgres_version: int
) -> None:
    odd = ODD | ({"transaction_timeout": "2s"} if postgres_version >= 17 else {})
    set_defaults(database_url, odd)
    connection = await connect(database_url, role="test", timeout=10, statement_time=30)
    rows: list[Any] = await connection.fetch(
        "select name, setting from pg_settings where name = any($1)", list(odd)
    )
    await connection.close()
    assert {row["name"]: row["setting"] for row in rows} == {
        "default_transaction_isolation": "read committed",
        "default_transaction_read_only": "off",
        "statement_timeout": "31000",
        "lock_timeout": "0",
        "idle_session_timeout": "0",
        "idle_in_transaction_session_timeout": "0",
        "enable_indexscan": "on",
        "plan_cache_mode": "force_generic_plan",
    } | ({"transaction_timeout": "0"} if postgres_version >= 17 else {})


async def test_a_layer_works_whatever_the_defaults_are(database_url: str) -> None:
    set_defaults(database_url, ODD)
    async with PostgresLayer(database_url) as layer:
        async with layer.subscribe("a") as messages:
            await layer.send("a", {"n": 1})
            async with asyncio.timeout(20):
                assert (await anext(messages))["n"] == 1
        await asyncio.gather(*(layer.take("k", FixedWindow(100, window=60)) for _ in range(20)))


@pytest.mark.parametrize(
    "defaults",
    [
        {},
        {"default_transaction_isolation": "serializable"},
        {"default_transaction_read_only": "on"},
        {
            "default_transaction_isolation": "repeatable read",
            "default_transaction_read_only": "on",
        },
    ],
    ids=str,
)
async def test_behind_a_pooler_neither(database_url: str, defaults: dict[str, str]) -> None:
    """Nothing can be set in the sessions of a pooler, so that its transactions have to say it."""
    set_defaults(database_url, defaults)
    # Another URL of the same server: the layer takes the first one for a pooler's.
    settings = Settings(
        database_url=f"{database_url}&target_session_attrs=any", listen_url=database_url
    )
    limits = Limits(per_user=1000)
    async with PostgresLayer(settings) as one, PostgresLayer(settings) as other:
        layers = [one, other]
        # At the same time, so that serializable transactions would fail.
        window = FixedWindow(1000, window=60)
        taken = await asyncio.gather(*(layers[n % 2].take("k", window) for n in range(40)))
        assert all(each.allowed for each in taken)
        channels = await asyncio.gather(
            *(layers[n % 2].new_channel("ws", user_id="u", limits=limits) for n in range(20))
        )
        await asyncio.gather(*(one.group_add("g", channel) for channel in channels))
        await asyncio.gather(
            *(layers[n % 2].send("a", {"n": n}, key=f"{n % 5}") for n in range(20))
        )
        assert len(await one.group_members("g")) == 20
        # Of twenty messages with five keys, five are published.
        async with other.subscribe("a", after="0") as messages, asyncio.timeout(20):
            assert {(await anext(messages))["n"] % 5 for _ in range(5)} == {0, 1, 2, 3, 4}


async def test_what_fails_behind_a_pooler_leaves_no_transaction_open(database_url: str) -> None:
    set_defaults(database_url, {"default_transaction_read_only": "on"})
    settings = Settings(
        database_url=f"{database_url}&target_session_attrs=any",
        listen_url=database_url,
        pool_size=1,
    )
    store = Store(settings)
    await store.open()
    with pytest.raises(Exception, match="division"):
        await store._fetch("select 1 / ($1::integer - 1)", [1])
    task = asyncio.create_task(store._fetch("select pg_sleep($1)", [30]))
    await eventually(lambda: backends(database_url, "pg_sleep($1)") == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await store._fetch("select 1", [])
    assert waiting(database_url) == []
    await store.close()


def waiting(url: str) -> list[str]:
    """The statements of transactions that were begun and not ended."""
    with psycopg.connect(url, row_factory=scalar_row) as connection:
        return connection.execute(
            "select query from pg_stat_activity where datname = current_database()"
            " and state like 'idle in transaction%%' and pid <> pg_backend_pid()"
        ).fetchall()


@pytest.mark.parametrize("kind", ["pool", "session"])
async def test_a_statement_that_takes_too_long_does_not_go_on_in_the_server(
    database_url: str, kind: str
) -> None:
    settings = Settings(database_url=database_url, command_timeout=0.5, pool_size=1)
    store: Store | Session
    if kind == "pool":
        store = Store(settings)
        await store.open()
    else:
        store = Session(settings, "test")
    for _ in range(3):
        with pytest.raises(DatabaseUnavailable, match=r"has not (answered|done it) in time"):
            await store._fetch("select pg_sleep($1)", [60])
    # Without a request to cancel, and a limit of the server's own, they would stay for a minute.
    await eventually(lambda: backends(database_url, "pg_sleep($1)") == 0)
    await store._fetch("select 1", [])
    await store.close()


async def test_the_server_gives_up_by_itself_where_the_client_is_gone(database_url: str) -> None:
    connection = await connect(database_url, role="test", timeout=10, statement_time=0.5)
    with pytest.raises(asyncpg.QueryCanceledError):
        await connection.fetch("select pg_sleep(60)")
    await connection.close()


async def test_retries_that_wait_for_a_lock_do_not_pile_up(database_url: str) -> None:
    settings = Settings(database_url=database_url, command_timeout=0.3, outbox_poll_interval=0.05)
    with psycopg.connect(database_url) as holder:
        holder.execute("lock table pgchannels.outbox in share mode")  # CREATE INDEX, say
        async with PostgresLayer(settings) as layer:
            for _ in range(8):
                with pytest.raises(DatabaseUnavailable):
                    await layer.send("a", {})
            # One of the sequencer, and one that sent; those that are being cancelled come on top.
            await eventually(lambda: backends(database_url, '"pgchannels".') <= 3)
            holder.rollback()
            async with layer.subscribe("a", after="0") as messages:
                await layer.send("a", {"n": "now"})
                async with asyncio.timeout(20):
                    while (await anext(messages)).get("n") != "now":
                        pass


async def test_readers_leave_room_to_publish_and_to_come_in(database_url: str) -> None:
    async with PostgresLayer(Settings(database_url=database_url, pool_size=3)) as layer:
        with psycopg.connect(database_url) as holder:
            holder.execute("lock table pgchannels.messages in access exclusive mode")
            reads = [asyncio.create_task(layer.history(f"a{n}")) for n in range(20)]
            await eventually(lambda: backends(database_url, "messages") >= 1)
            async with asyncio.timeout(20):
                await layer.send("a0", {})
                await layer.new_channel("ws", user_id="u", limits=Limits(per_user=1))
            assert not any(task.done() for task in reads)
            holder.rollback()
            await asyncio.gather(*reads)
