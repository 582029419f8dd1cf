"""The database's limit for messages: it binds all that publish, and follows the nodes' settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from sqlalchemy.engine import make_url

from pgchannels import ConfigurationError, PostgresLayer, Settings, migrate, store

Connection = psycopg.Connection[Any]

MIB = 1024 * 1024
# {"a":"…"}
FRAME = 8


@pytest.fixture
def connection(database_url: str) -> Iterator[Connection]:
    with psycopg.connect(database_url, autocommit=True) as connection:
        yield connection


def insert(connection: Connection, size: int, attachments: str = "null") -> None:
    connection.execute(
        "insert into pgchannels.outbox (channel, payload, attachments)"
        f" values ('room', %s::json, {attachments})".encode(),
        ['{"a":"' + "x" * (size - FRAME) + '"}'],
    )


def limit(connection: Connection) -> int:
    row = connection.execute("select max_message_size from pgchannels.log").fetchone()
    assert row is not None
    size: int = row[0]
    return size


def test_any_publisher_is_bound(connection: Connection) -> None:
    insert(connection, MIB)
    insert(connection, MIB - 3, "array['ab', 'c']::bytea[]")
    for size, attachments in ((MIB + 1, "null"), (MIB - 2, "array['ab', 'c']::bytea[]")):
        with pytest.raises(psycopg.errors.CheckViolation, match="outbox_max_message_size"):
            insert(connection, size, attachments)
    with pytest.raises(psycopg.errors.CheckViolation, match="outbox_max_message_size"):
        connection.execute(
            "select pgchannels.publish('room', json_build_object('a', repeat('x', 1048576)))"
        )


def test_it_counts_what_the_row_is_and_not_how_it_was_stored(connection: Connection) -> None:
    connection.execute("create table large (payload json)")
    connection.execute("insert into large values (json_build_object('a', repeat('x', 1048576)))")
    with pytest.raises(psycopg.errors.CheckViolation, match="outbox_max_message_size"):
        connection.execute(
            "insert into pgchannels.outbox (channel, payload) select 'room', payload from large"
        )


def test_it_can_be_set(connection: Connection) -> None:
    connection.execute("select pgchannels.limit_messages(100)")
    insert(connection, 100)
    with pytest.raises(psycopg.errors.CheckViolation):
        insert(connection, 101)
    connection.execute("select pgchannels.limit_messages(16777216)")
    insert(connection, 101)
    connection.execute("select pgchannels.limit_messages(100)")
    (sealed,) = connection.execute("select sealed from pgchannels.seal()").fetchall()
    assert sealed == (2,)
    for wrong in ("null", "1", "16777217"):
        with pytest.raises(psycopg.errors.InvalidParameterValue):
            connection.execute(f"select pgchannels.limit_messages({wrong})".encode())


async def test_the_owners_node_raises_it(database_url: str, connection: Connection) -> None:
    large = Settings(database_url=database_url, max_message_size=2 * MIB)
    async with PostgresLayer(large) as layer:
        await layer.send("room", {"a": "x" * MIB})
        insert(connection, 2 * MIB)
    async with PostgresLayer(database_url):
        assert limit(connection) == 2 * MIB


def test_a_migration_raises_it(database_url: str, connection: Connection) -> None:
    migrate.upgrade(Settings(database_url=database_url, max_message_size=2 * MIB))
    assert limit(connection) == 2 * MIB
    migrate.upgrade(database_url)
    assert limit(connection) == 2 * MIB


async def test_another_roles_node_says_that_it_cannot(
    database_url: str, connection: Connection
) -> None:
    role = "sized_" + connection.info.dbname
    connection.execute(f"create role {role} login".encode())
    try:
        connection.execute("select pgchannels.grant_access('node', %s)", [role])
        url = make_url(database_url).set(username=role).render_as_string(hide_password=False)
        async with PostgresLayer(url):
            pass
        with pytest.raises(ConfigurationError, match=r"limit_messages\(2097152\)"):
            await PostgresLayer(Settings(database_url=url, max_message_size=2 * MIB)).open()
        with psycopg.connect(url) as node, pytest.raises(psycopg.errors.InsufficientPrivilege):
            node.execute("select pgchannels.limit_messages(100)")
    finally:
        connection.execute(f"drop owned by {role}".encode())
        connection.execute(f"drop role {role}".encode())


async def test_a_node_starts_although_a_publisher_is_in_the_way(
    database_url: str,
    connection: Connection,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(store, "_TRIES", 1)
    settings = Settings(database_url=database_url, max_message_size=2 * MIB)
    with connection.transaction():
        insert(connection, 100)
        async with PostgresLayer(settings):
            assert "select pgchannels.limit_messages(2097152)" in caplog.text
    async with PostgresLayer(settings):
        assert limit(connection) == 2 * MIB
