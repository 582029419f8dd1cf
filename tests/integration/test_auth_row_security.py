"""PostgreSQL decides by its policies who may see a channel."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any, cast
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from pgchannels import ConfigurationError
from pgchannels.web.auth import Action, Identity, RowSecurity, is_allowed

SUBSCRIBE = "select true from rooms where 'room:' || id = :channel"
QUERIES: dict[Action, str] = {
    "subscribe": SUBSCRIBE,
    "history": "select count(*) from rooms where 'room:' || id = :channel",
    "publish": "select id from rooms where 'room:' || id = :channel and writable",
}

TABLES = """
    create table rooms (id text primary key, owner text, public boolean, writable boolean);
    alter table rooms enable row level security;
    grant select, insert on rooms to {role};
    create policy own on rooms using (
        public or owner = current_setting('request.jwt.claims', true)::json ->> 'sub'
    );
    insert into rooms values
        ('tea', 'ada', false, true), ('news', null, true, false), ('x''; drop', 'ada', false, true);
    create table secrets (id int);
    insert into secrets values (1);
"""


def execute(url: str, statement: sql.Composed) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(statement)


@pytest.fixture
def role(database_url: str) -> Iterator[str]:
    # A name that only works if it is quoted, or not part of a statement at all.
    name = f"Web User's \"{uuid4().hex[:8]}"
    identifier = sql.Identifier(name)
    execute(database_url, sql.SQL("create role {}").format(identifier))
    execute(database_url, sql.SQL(TABLES).format(role=identifier))
    yield name
    execute(database_url, sql.SQL("drop owned by {}").format(identifier))
    execute(database_url, sql.SQL("drop role {}").format(identifier))


@pytest.fixture(params=["asyncpg", "psycopg"])
async def engine(request: pytest.FixtureRequest, database_url: str) -> AsyncIterator[AsyncEngine]:
    url = make_url(database_url).set(drivername=f"postgresql+{request.param}")
    engine = create_async_engine(url, pool_size=1, max_overflow=0)
    yield engine
    await engine.dispose()


@pytest.fixture
def authorize(engine: AsyncEngine, role: str) -> RowSecurity:
    return RowSecurity(engine, QUERIES, role=role, timeout=30)


ADA = Identity("ada", claims={"sub": "ada"})
EVE = Identity("eve")


async def test_by_the_policies(authorize: RowSecurity) -> None:
    for identity, action, channel, wanted in (
        (ADA, "subscribe", "room:tea", True),
        (EVE, "subscribe", "room:tea", False),
        (None, "subscribe", "room:tea", False),
        (EVE, "subscribe", "room:news", True),
        (None, "subscribe", "room:news", True),
        (ADA, "subscribe", "room:none", False),
        (ADA, "history", "room:tea", True),
        (EVE, "history", "room:tea", False),  # a row, with 0 in it
        (ADA, "publish", "room:tea", True),
        (ADA, "publish", "room:news", False),
        (ADA, "presence", "room:tea", False),  # there is no query
        (Identity("ada"), "subscribe", "room:tea", True),  # sub is the user's id
        (Identity("eve", claims={"sub": "ada"}), "subscribe", "room:tea", True),
    ):
        allowed = await is_allowed(authorize, identity, cast("Action", action), channel)
        assert allowed is wanted, (action, channel)


async def test_what_a_row_says(engine: AsyncEngine, role: str) -> None:
    for value, wanted in (
        ("true", True),
        ("1", True),
        ("'x'", True),
        ("false", False),
        ("null", False),
        ("0", False),
    ):
        query = f"select {value} where :channel = 'a'"
        authorize = RowSecurity(engine, {"subscribe": query}, role=role, timeout=30)
        assert await authorize(ADA, "subscribe", "a") is wanted, value
        assert await authorize(ADA, "subscribe", "b") is False


HOSTILE_USERS = [
    "ada' or '1'='1",
    'ada"}',
    "ada\\",
    "'; reset role; --",
    "\u2028",
    "a\x01",
    "x" * 1000,
    "ädä",
]


async def test_hostile_claims_are_data(authorize: RowSecurity) -> None:
    for user in HOSTILE_USERS:
        said = {"sub": user, "role": "postgres", user: [user, None, 1e300]}
        identity = Identity(user, claims=said)
        assert not await authorize(identity, "subscribe", "room:tea")
        assert await authorize(identity, "subscribe", "room:news"), user
    assert await authorize(ADA, "subscribe", "room:tea")


async def test_claims_that_cannot_be_text_allow_nothing_of_anyones(authorize: RowSecurity) -> None:
    hostile: list[dict[str, Any]] = [
        {"sub": "\0"},
        {"sub": "\ud800"},
        {"n": float("nan")},
        {"n": {1, 2}},
        {"n": b"x"},
    ]
    for claims in hostile:
        assert not await authorize(Identity("eve", claims=claims), "subscribe", "room:tea")
    assert await authorize(ADA, "subscribe", "room:tea")


HOSTILE_CHANNELS = [
    "room:tea'or'1'='1",
    "room:tea';reset/**/role;select/**/true--",
    ":channel",
    "$1",
    "%s",
    "%(channel)s",
    "room:\\",
    "room:té",
    # Not even channels.
    "",
    "room:\0",
    "room:\ud800",
    "room:tea\n",
    "pgchannels:members",
    "x" * 201,
]


async def test_hostile_channels_are_data(
    authorize: RowSecurity, caplog: pytest.LogCaptureFixture
) -> None:
    for channel in HOSTILE_CHANNELS:
        assert not await authorize(ADA, "subscribe", channel), ascii(channel)
    assert caplog.text == ""


async def test_an_odd_channel_may_still_be_one(engine: AsyncEngine, role: str) -> None:
    query = "select true from rooms where 'room:' || replace(id, ' ', '_') = :channel"
    authorize = RowSecurity(engine, {"subscribe": query}, role=role, timeout=30)
    assert await authorize(ADA, "subscribe", "room:x';_drop")


async def test_nothing_is_left_on_the_connection(
    authorize: RowSecurity, engine: AsyncEngine
) -> None:
    assert await authorize(ADA, "subscribe", "room:tea")
    async with engine.connect() as connection:
        row = (
            await connection.execute(
                text(
                    "select current_user = session_user,"
                    " coalesce(current_setting('request.jwt.claims', true), ''),"
                    " current_setting('transaction_read_only'),"
                    " current_setting('statement_timeout')"
                )
            )
        ).one()
    assert tuple(row) == (True, "", "off", "0")


FAILING = [
    "insert into rooms values (:channel, 'ada', true) returning true",  # read-only
    "select true from secrets where :channel = 'a'",  # not granted
    "select 1/0 where :channel = 'a'",
    "selec :channel",
    "select (:channel)::int = 1",
    "select true from nowhere where :channel = 'a'",
]


async def test_what_fails_is_denied_and_logged_without_claims(
    engine: AsyncEngine, role: str, caplog: pytest.LogCaptureFixture
) -> None:
    identity = Identity("ada-5f1c", claims={"note": "secret-claim"})
    for query in FAILING:
        caplog.clear()
        authorize = RowSecurity(engine, {"subscribe": query}, role=role, timeout=30)
        assert not await is_allowed(authorize, identity, "subscribe", "a"), query
        (record,) = [r for r in caplog.records if r.name == "pgchannels.web"]
        assert len(vars(record)["error_id"]) == 16
        assert vars(record)["sqlstate"]
        assert "secret-claim" not in caplog.text
        assert "ada-5f1c" not in caplog.text


async def test_it_does_not_wait_for_ever(
    engine: AsyncEngine, role: str, caplog: pytest.LogCaptureFixture
) -> None:
    query = "select case when pg_sleep(600) is not null then :channel = 'a' end"
    authorize = RowSecurity(engine, {"subscribe": query}, role=role, timeout=0.2)
    async with asyncio.timeout(60):
        assert not await authorize(ADA, "subscribe", "a")
    assert "error_id" in caplog.text
    good = RowSecurity(engine, QUERIES, role=role, timeout=30)
    assert await good(ADA, "subscribe", "room:tea")


async def test_an_engine_that_commits_by_itself(database_url: str, role: str) -> None:
    url = make_url(database_url).set(drivername="postgresql+asyncpg")
    engine = create_async_engine(url, isolation_level="AUTOCOMMIT")
    try:
        authorize = RowSecurity(engine, QUERIES, role=role, timeout=30)
        assert await authorize(ADA, "subscribe", "room:tea")
        assert not await authorize(EVE, "subscribe", "room:tea")
    finally:
        await engine.dispose()


async def test_a_role_that_sees_everything_or_nothing_is_not_asked(
    engine: AsyncEngine, database_url: str, role: str, caplog: pytest.LogCaptureFixture
) -> None:
    nobody = RowSecurity(engine, QUERIES, role="nobody", timeout=30)
    assert not await nobody(EVE, "subscribe", "room:news")
    assert "there is no role" in caplog.text
    for option in ("superuser", "nosuperuser bypassrls"):
        caplog.clear()
        statement = sql.SQL(cast("Any", f"alter role {{}} {option}"))
        execute(database_url, statement.format(sql.Identifier(role)))
        authorize = RowSecurity(engine, QUERIES, role=role, timeout=30)
        assert not await authorize(EVE, "subscribe", "room:news")
        assert "row-level security does not hold" in caplog.text


async def test_a_role_that_may_not_be_taken(
    database_url: str, role: str, caplog: pytest.LogCaptureFixture
) -> None:
    other = f"other_{uuid4().hex[:8]}"
    execute(database_url, sql.SQL("create role {} login").format(sql.Identifier(other)))
    url = make_url(database_url).set(drivername="postgresql+asyncpg", username=other)
    engine = create_async_engine(url)
    try:
        authorize = RowSecurity(engine, QUERIES, role=role, timeout=30)
        assert not await authorize(ADA, "subscribe", "room:tea")
        assert "42501" in caplog.text
    finally:
        await engine.dispose()
        execute(database_url, sql.SQL("drop role {}").format(sql.Identifier(other)))


async def test_a_database_that_is_away(role: str, caplog: pytest.LogCaptureFixture) -> None:
    engine = create_async_engine("postgresql+asyncpg://ada:geheim@127.0.0.1:1/x")
    try:
        authorize = RowSecurity(engine, QUERIES, role=role, timeout=30)
        assert not await authorize(ADA, "subscribe", "room:tea")
        assert "geheim" not in caplog.text
    finally:
        await engine.dispose()


async def test_many_decisions_take_turns(authorize: RowSecurity) -> None:
    """One connection is in the pool; none may leak, and none may see another one's claims."""
    answers = await asyncio.gather(
        *(authorize(identity, "subscribe", "room:tea") for identity in [ADA, EVE] * 20)
    )
    assert answers == [True, False] * 20


@pytest.mark.parametrize(
    ("queries", "options"),
    [
        (QUERIES, {"role": ""}),
        (QUERIES, {"role": "none"}),
        (QUERIES, {"role": "a\0"}),
        (QUERIES, {"role": "web", "timeout": 0}),
        (QUERIES, {"role": "web", "setting": "role"}),
        ({"subscribe": "select true"}, {"role": "web"}),
        ({"subscribe": "select :channel, :x"}, {"role": "web"}),
        ({"delete": SUBSCRIBE}, {"role": "web"}),
    ],
)
def test_configuration(queries: Any, options: dict[str, Any]) -> None:
    engine = create_async_engine("postgresql+asyncpg://localhost/nowhere")
    with pytest.raises(ConfigurationError):
        RowSecurity(engine, queries, **options)
