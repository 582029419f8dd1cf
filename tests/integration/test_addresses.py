"""To whom a transaction may publish: users, everyone, some connections, a group but one; with keys.

The same for sessions, for SQL functions and for the layer itself, which says what is right.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from typing import Any, NamedTuple

import psycopg
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from psycopg.rows import scalar_row
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import NullPool

from pgchannels import (
    InvalidChannel,
    InvalidMessage,
    PostgresLayer,
    Settings,
)
from pgchannels.channels import check_user, user_channel
from pgchannels.errors import InvalidUser
from pgchannels.orm import install, publish
from pgchannels.stream import Stream
from pgchannels.testing.support import take
from tests.support.eventually import eventually

Connection = psycopg.Connection[Any]

USER = "ada:é%/ 7"


@pytest.fixture
def connection(database_url: str) -> Iterator[Connection]:
    with psycopg.connect(database_url, autocommit=True, row_factory=scalar_row) as connection:
        yield connection


@pytest.fixture
def make(database_url: str) -> Iterator[sessionmaker[Session]]:
    url = database_url.replace("postgresql:", "postgresql+psycopg:")
    engine = sa.create_engine(url, poolclass=NullPool)
    maker = sessionmaker(engine)
    install(maker, settings=Settings(database_url=database_url))
    yield maker
    engine.dispose()


def value(connection: Connection, sql: str, *arguments: object) -> Any:
    return connection.execute(sql.encode(), arguments or None).fetchone()


def waiting(connection: Connection) -> list[Any]:
    """The ``n`` of each message in the outbox."""
    return connection.execute(
        "select (payload ->> 'n')::int from pgchannels.outbox order by id"
    ).fetchall()


def is_waiting(connection: Connection) -> bool:
    """Whether a transaction of this database waits for another one."""
    found = value(
        connection,
        "select exists (select from pg_stat_activity where wait_event_type = 'Lock'"
        " and datname = current_database())",
    )
    return bool(found)


class World(NamedTuple):
    """Two connections of one user and one of another, all in a group, and what they read."""

    layer: PostgresLayer
    names: list[str]
    streams: list[Stream]


@pytest.fixture
async def world(database_url: str) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        layer = await stack.enter_async_context(PostgresLayer(database_url))
        names = [await layer.new_channel(user_id=user) for user in (USER, USER, "bob")]
        for name in names:
            await layer.group_add("room", name)
        streams = [await stack.enter_async_context(layer.subscribe(member=name)) for name in names]
        yield World(layer, names, streams)


class Target(NamedTuple):
    """An address as each way of publishing calls it, and which of the three get the message."""

    method: str
    options: Callable[[list[str]], dict[str, Any]]
    arguments: Callable[[list[str]], dict[str, Any]]
    reached: list[bool]


TARGETS = {
    "user": Target(
        "send_to_user",
        lambda names: {"user": USER},
        lambda names: {"user_id": USER},
        [True, True, False],
    ),
    "user's other devices": Target(
        "send_to_user",
        lambda names: {"user": USER, "exclude": names[0]},
        lambda names: {"user_id": USER, "exclude": names[0]},
        [False, True, False],
    ),
    "everyone": Target(
        "broadcast",
        lambda names: {"everyone": True},
        lambda names: {"everyone": True},
        [True, True, True],
    ),
    "everyone else": Target(
        "broadcast",
        lambda names: {"everyone": True, "exclude": names[2]},
        lambda names: {"everyone": True, "exclude": names[2]},
        [True, True, False],
    ),
    "connections": Target(
        "send_to",
        lambda names: {"to": [names[2], names[0], names[2]]},
        lambda names: {"recipients": [names[2], names[0], names[2]]},
        [True, False, True],
    ),
    "one connection": Target(
        "send",
        lambda names: {"channel": names[1]},
        lambda names: {"channel": names[1]},
        [False, True, False],
    ),
    "group but one": Target(
        "group_send",
        lambda names: {"channel": "room", "exclude": names[1]},
        lambda names: {"channel": "room", "exclude": names[1]},
        [True, False, True],
    ),
}

Way = Callable[[World, str, Target], Awaitable[None]]


async def by_layer(world: World, url: str, target: Target) -> None:
    options = target.options(world.names)
    positional = [options.pop(name) for name in ("channel", "user", "to") if name in options]
    options.pop("everyone", None)
    if target.method == "group_send" or positional:
        await getattr(world.layer, target.method)(*positional, {"n": 1}, **options)
    else:
        await world.layer.broadcast({"n": 1}, **options)


async def by_session(world: World, url: str, target: Target) -> None:
    engine = create_async_engine(url.replace("postgresql:", "postgresql+asyncpg:"))
    maker = async_sessionmaker(engine)
    install(maker, world.layer)
    options = target.options(world.names)
    try:
        async with maker.begin() as session:
            if "channel" in options:
                publish(session, options.pop("channel"), {"n": 1}, **options)
            else:
                publish(session, {"n": 1}, **options)
    finally:
        await engine.dispose()


async def by_sql(world: World, url: str, target: Target) -> None:
    arguments = target.arguments(world.names)
    named = "".join(f", {name} => %({name})s" for name in arguments)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            f"""select pgchannels.publish(payload => '{{"n": 1}}'{named})""".encode(), arguments
        )


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("way", [by_layer, by_session, by_sql])
async def test_reaches_whom_it_is_for(
    world: World, database_url: str, way: Way, target: Target
) -> None:
    await way(world, database_url, target)
    await world.layer.broadcast({"n": "end"})
    for stream, reached in zip(world.streams, target.reached, strict=True):
        expected = [1, "end"] if reached else ["end"]
        assert [message["n"] for message in await take(stream, len(expected))] == expected


class TestNamesOfUsers:
    # Characters that quote() keeps, that it encodes as one byte and as several, and long ids.
    @settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @example("%41")
    @example("a:b")
    @example("Z" * 184)
    @example("Z" * 185)
    @example("é" * 30 + "abcd")
    @example("é" * 30 + "abcde")
    @example("🚀" * 475)
    @given(user=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1))
    def test_sql_and_python_have_the_same(self, connection: Connection, user: str) -> None:
        assert value(connection, "select pgchannels.user_channel(%s)", user) == user_channel(user)

    def test_agrees_with_python_on_every_byte(self, connection: Connection) -> None:
        by_sql = value(
            connection,
            "select array_agg(pgchannels.user_channel(chr(c)) order by c)"
            " from generate_series(1, 255) c",
        )
        assert by_sql == [user_channel(chr(c)) for c in range(1, 256)]

    @pytest.mark.parametrize("user", ["", "x" * 1000, "x" * 1001, "日" * 633, "日" * 634])
    def test_refuses_the_same(self, connection: Connection, user: str) -> None:
        try:
            check_user(user)
        except InvalidUser:
            with pytest.raises(psycopg.errors.InvalidParameterValue, match="invalid user id"):
                value(connection, "select pgchannels.user_channel(%s)", user)
        else:
            assert value(connection, "select pgchannels.user_channel(%s)", user)


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "options", "complaint"),
        [
            (["room"], {}, "needs an address"),
            ([{"n": 1}], {}, "needs an address"),
            ([], {"user": "42"}, "needs a payload"),
            (["room", {}], {"user": "42"}, "one address, not channel and user"),
            ([{}], {"user": "42", "everyone": True}, "one address, not user and everyone"),
            ([{}], {"to": ["a"], "channel": "b"}, "one address, not channel and to"),
            ([{}], {"to": ["a"], "exclude": "a"}, "no exclude="),
            ([{}], {"to": []}, "1 to 1000 channels"),
            ([{}], {"to": "a"}, "as a list"),
            ([{}], {"user": 42}, "must be a str"),
            ([{}], {"user": ""}, "1 to 1000 characters"),
            ([{}], {"user": None}, "needs an address"),
            (["room", {}], {"exclude": "a b"}, "must not contain"),
            (["room", {}], {"key": ""}, "a key must be"),
            (["pgchannels:user:42", {}], {}, "reserved"),
            ([None, {}], {}, "must be a str"),
        ],
    )
    def test_by_session(
        self,
        make: sessionmaker[Session],
        arguments: list[Any],
        options: dict[str, Any],
        complaint: str,
    ) -> None:
        if options.get("channel"):
            options = dict(options)
            arguments = [options.pop("channel"), *arguments]
        with make() as session:
            with pytest.raises(InvalidMessage, match=complaint):
                publish(session, *arguments, **options)
            assert not session.new

    def test_a_channel_that_is_none_is_told_as_before(self, make: sessionmaker[Session]) -> None:
        with make() as session, pytest.raises(InvalidChannel):
            publish(session, None, {})  # type: ignore[call-overload]

    @pytest.mark.parametrize(
        ("call", "complaint"),
        [
            ("publish(payload => '{}')", "invalid channel name NULL"),
            ("publish('a', '{}', user_id => '42')", "one of channel, user_id"),
            ("publish(payload => '{}', everyone => true, user_id => '42')", "one of channel"),
            ("publish(payload => '{}', recipients => '{}')", "1 to 1000 recipients"),
            ("publish(payload => '{}', recipients => '{a,NULL}')", "NULL among recipients"),
            ("publish(payload => '{}', recipients => '{a,b c}')", "invalid channel name 'b c'"),
            (
                (
                    "publish(payload => '{}', recipients => (select array_agg(n::text)"
                    " from generate_series(1, 1001) n))"
                ),
                "1 to 1000 recipients",
            ),
            ("publish(payload => '{}', recipients => '{a}', exclude => 'a')", "no exclude"),
            ("publish(payload => '{}', user_id => '')", "invalid user id"),
            ("publish(payload => '[]', user_id => '42')", "invalid payload: it is a JSON array"),
            ("publish('a', '{}', exclude => 'a b')", "invalid channel name 'a b'"),
            ("publish('a', '{}', key => '')", "1 to 200 characters"),
            ("publish('a', '{}', key => 'k', key_lifetime => '0')", "invalid lifetime"),
            ("publish('pgchannels:user:42', '{}')", "reserved|invalid channel name"),
            (
                "publish_many('{a}', array['{}']::json[], user_ids => '{42}')",
                "channels or user_ids",
            ),
            (
                "publish_many(payloads => array['{}']::json[], user_ids => '{NULL}')",
                "invalid user id NULL at place 1",
            ),
            ("publish_many('{a}', array['{}']::json[], keys => '{k,l}')", "as many keys"),
        ],
    )
    def test_by_sql(self, connection: Connection, call: str, complaint: str) -> None:
        with pytest.raises(psycopg.errors.InvalidParameterValue, match=complaint):
            value(connection, f"select pgchannels.{call}")
        assert waiting(connection) == []


class TestKeys:
    """An idempotency key belongs to the transaction: a rollback gives it back."""

    def test_the_first_of_a_key_is_published(
        self, make: sessionmaker[Session], connection: Connection
    ) -> None:
        with make.begin() as session:
            publish(session, "a", {"n": 1}, key="k")
            publish(session, "a", {"n": 2}, key="k")
            publish(session, "a", {"n": 3})
            session.flush()
            publish(session, "a", {"n": 4}, key="k")
            publish(session, "b", {"n": 5}, key="k")
            publish(session, {"n": 6}, user="42", key="k")
        with make.begin() as session:
            publish(session, "a", {"n": 7}, key="k")
            publish(session, {"n": 8}, user="42", key="k")
        call = "select pgchannels.publish('a', '{\"n\": 9}', key => %s)"
        assert value(connection, call, "k") is False
        assert value(connection, call, "l") is True
        assert waiting(connection) == [1, 3, 5, 6, 9]

    def test_a_rollback_gives_it_back(
        self, make: sessionmaker[Session], connection: Connection
    ) -> None:
        with make() as session:
            publish(session, "a", {"n": 1}, key="k")
            session.flush()
            session.rollback()
            savepoint = session.begin_nested()
            publish(session, "a", {"n": 2}, key="k")
            session.flush()
            savepoint.rollback()
            publish(session, "a", {"n": 3}, key="k")
            with session.begin_nested():
                publish(session, "a", {"n": 4}, key="k")
            session.commit()
        assert waiting(connection) == [3]

    @pytest.mark.parametrize("commits", [True, False])
    async def test_another_transaction_waits_for_it(
        self, make: sessionmaker[Session], connection: Connection, commits: bool
    ) -> None:
        def second() -> None:
            with make.begin() as session:
                publish(session, "a", {"n": 2}, key="k")

        with make() as first, ThreadPoolExecutor(1) as pool:
            publish(first, "a", {"n": 1}, key="k")
            first.flush()
            other = pool.submit(second)
            try:
                await eventually(lambda: is_waiting(connection))
            finally:
                if commits:
                    first.commit()
                else:
                    first.rollback()
            other.result(20)
        assert waiting(connection) == [1] if commits else [2]

    def test_a_snapshot_that_does_not_show_it_is_a_serialization_failure(
        self, database_url: str, connection: Connection
    ) -> None:
        call = "select pgchannels.publish('a', '{\"n\": 1}', key => 'k')"
        with psycopg.connect(database_url) as other:
            other.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            other.execute("select 1")
            connection.execute(call)
            with pytest.raises(psycopg.errors.SerializationFailure):
                other.execute(call)
            other.rollback()
            assert other.execute(call).fetchone() == (False,)

    async def test_two_that_claim_keys_in_different_orders_are_a_deadlock(
        self, database_url: str, connection: Connection
    ) -> None:
        def claim(transaction: Connection, key: str) -> None:
            transaction.execute("select pgchannels.publish('a', '{}', key => %s)", [key])

        with (
            psycopg.connect(database_url) as one,
            psycopg.connect(database_url, options="-c deadlock_timeout=10ms") as two,
            ThreadPoolExecutor(1) as pool,
        ):
            claim(one, "a")
            claim(two, "b")
            waiting = pool.submit(claim, one, "b")
            await eventually(lambda: is_waiting(connection))
            with pytest.raises(psycopg.errors.DeadlockDetected):
                claim(two, "a")
            two.rollback()
            waiting.result(20)

    async def test_the_layer_knows_it(
        self, make: sessionmaker[Session], connection: Connection, database_url: str
    ) -> None:
        with make.begin() as session:
            publish(session, "a", {"n": 1}, key="k")
        async with PostgresLayer(database_url) as layer:
            receipt = await layer.send("a", {"n": 2}, key="k")
            assert receipt.repeated
            assert not (await layer.send("a", {"n": 3}, key="l")).repeated
            with make.begin() as session:
                publish(session, "a", {"n": 4}, key="l")
            page = await layer.history("a")
        assert [message["n"] for message in page.messages] == [1, 3]

    def test_it_is_forgotten_after_its_lifetime(
        self, make: sessionmaker[Session], connection: Connection
    ) -> None:
        for n in (1, 2):
            with make.begin() as session:
                publish(session, "a", {"n": n}, key="k")
            connection.execute("update pgchannels.keys set expires_at = clock_timestamp()")
        with make.begin() as session:
            publish(session, "a", {"n": 3}, key="k")
            session.flush()
            publish(session, "a", {"n": 4}, key="k")
        assert waiting(connection) == [1, 2, 3]

    def test_the_settings_say_how_long_it_is_remembered(
        self, make: sessionmaker[Session], connection: Connection, database_url: str
    ) -> None:
        install(make, settings=Settings(database_url=database_url, key_lifetime="P3D"))
        with make.begin() as session:
            publish(session, "a", {"n": 1}, key="k")
        value(connection, "select pgchannels.publish('b', '{}', key => 'k')")
        value(connection, "select pgchannels.publish('c', '{}', key => 'k', key_lifetime => '1 h')")
        lifetimes = connection.execute(
            "select extract(epoch from expires_at - created_at)::int from pgchannels.keys"
            " order by channel"
        )
        assert lifetimes.fetchall() == [259200, 86400, 3600]

    def test_many_by_sql(self, connection: Connection) -> None:
        call = """select pgchannels.publish_many(
            array['a', 'b', 'a', 'a'],
            array['{"n": 1}', '{"n": 2}', '{"n": 3}', '{"n": 4}']::json[],
            keys => array['k', 'k', 'k', null])"""
        assert value(connection, call) == 3
        assert value(connection, call) == 1
        assert waiting(connection) == [1, 2, 4, 4]

    def test_without_keys_nothing_more_is_asked(
        self, make: sessionmaker[Session], connection: Connection
    ) -> None:
        statements: list[str] = []
        sa.event.listen(
            make.kw["bind"], "before_cursor_execute", lambda *args: statements.append(args[2])
        )
        with make.begin() as session:
            publish(session, "a", {"n": 1})
            publish(session, {"n": 2}, user="42")
        assert len(statements) == 1
        with make.begin() as session:
            publish(session, "a", {"n": 3}, key="k")
            publish(session, "a", {"n": 4}, key="l")
        assert len(statements) == 3
        assert waiting(connection) == [1, 2, 3, 4]

    def test_a_repeated_one_alone_in_its_transaction(
        self, make: sessionmaker[Session], connection: Connection
    ) -> None:
        for _ in range(2):
            with make.begin() as session:
                publish(session, "a", {"n": 1, "bytes": b"\0"}, key="k")
        assert waiting(connection) == [1]


def test_many_users_at_once(connection: Connection) -> None:
    users = ["42", USER, "x" * 900]
    count = value(
        connection,
        "select pgchannels.publish_many(user_ids => %s::text[], payloads => %s::json[])",
        users,
        ["{}"] * 3,
    )
    assert count == 3
    channels = connection.execute("select channel from pgchannels.outbox order by id").fetchall()
    assert channels == [user_channel(user) for user in users]
