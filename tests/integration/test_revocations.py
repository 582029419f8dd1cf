"""Revocations and commands on PostgreSQL: kept, pruned, told in the same transaction, and ours."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from psycopg.rows import scalar_row
from sqlalchemy import create_engine
from sqlalchemy.orm import Session, sessionmaker

from pgchannels import Command, InvalidChannel, PostgresLayer, Settings
from pgchannels.channels import COMMANDS, MEMBERS
from pgchannels.orm import install, publish
from pgchannels.sql import load_queries
from pgchannels.testing.support import listening
from pgchannels.web import channels_router, lifespan
from tests.support.pruning import prune

Connection = psycopg.Connection[Any]


@pytest.fixture
def connection(database_url: str) -> Iterator[Connection]:
    with psycopg.connect(database_url, autocommit=True, row_factory=scalar_row) as connection:
        yield connection


async def test_by_the_databases_clock(database_url: str, connection: Connection) -> None:
    async with PostgresLayer(database_url) as layer:
        before = connection.execute("select clock_timestamp()").fetchone()
        await layer.revoke(user_id="u")
        after = connection.execute("select clock_timestamp()").fetchone()
        assert await layer.is_revoked(user_id="u", issued_at=before)
        assert not await layer.is_revoked(user_id="u", issued_at=after)
        at = connection.execute("select revoked_at from pgchannels.revocations").fetchone()
        assert isinstance(at, datetime)
        assert await layer.is_revoked(user_id="u", issued_at=at)
        assert not await layer.is_revoked(user_id="u", issued_at=at + timedelta(microseconds=1))
        # Again: what was issued meanwhile is no good either.
        await layer.revoke(user_id="u", keep=timedelta(seconds=1))
        assert await layer.is_revoked(user_id="u", issued_at=after)
        until = connection.execute("select expires_at from pgchannels.revocations").fetchone()
        assert isinstance(until, datetime)
        assert until > datetime.now(UTC) + timedelta(hours=23)


async def test_looked_up_by_primary_key(database_url: str, connection: Connection) -> None:
    connection.execute(
        "insert into pgchannels.revocations select k, md5(n::text), now(), now() + interval '1 d'"
        " from generate_series(1, 20000) n, unnest('{user,token}'::text[]) k"
    )
    connection.execute("analyze pgchannels.revocations")
    query = load_queries("pgchannels")["is_revoked"]
    connection.execute("set plan_cache_mode = force_generic_plan")
    connection.execute(f"prepare q (text, text, timestamptz) as {query}".encode())
    plan = "\n".join(connection.execute("explain (costs off) execute q('a', 'b', null)").fetchall())
    assert "revocations_pkey" in plan
    assert "Seq Scan" not in plan


async def test_pruned(database_url: str, connection: Connection) -> None:
    connection.execute(
        "insert into pgchannels.revocations"
        " select 'user', n::text, now(), now() + n * interval '1 hour'"
        "   from generate_series(-6, 5) n where n <> 0"
    )
    settings = Settings(database_url=database_url)
    assert (await prune(settings, dry_run=True)).revocations_deleted == 6
    assert (await prune(settings)).revocations_deleted == 6
    left = connection.execute("select count(*) from pgchannels.revocations").fetchone()
    assert left == 5


async def test_what_is_not_committed_was_not_told(
    database_url: str, connection: Connection
) -> None:
    """The revocation and the command are one."""
    async with PostgresLayer(database_url) as layer:
        with listening(layer) as heard:
            connection.execute(
                "alter table pgchannels.outbox add constraint c check (false) not valid"
            )
            with pytest.raises(Exception, match="constraint"):
                await layer.revoke(user_id="u")
            connection.execute("alter table pgchannels.outbox drop constraint c")
            assert not await layer.is_revoked(user_id="u")
            await layer.revoke(user_id="v")
            async with asyncio.timeout(20):
                command = await heard.get()
        assert command.user_id == "v"


async def test_commands_are_kept_for_a_day(database_url: str, connection: Connection) -> None:
    async with PostgresLayer(database_url) as layer:
        with listening(layer) as heard:
            await layer.command(Command("close", everyone=True, code=1012))
            await layer.revoke(token_id="t")
            async with asyncio.timeout(20):
                for _ in range(2):
                    await heard.get()
    kept = connection.execute(
        "select extract(epoch from expires_at - created_at)::float from pgchannels.messages"
    ).fetchall()
    assert kept == pytest.approx([86400, 86400], abs=0.1)


class TestNobodyElse:
    """What cannot be said by a client, a publisher or a session of the application."""

    @pytest.mark.parametrize(
        "call",
        [
            f"select pgchannels.publish('{COMMANDS}', '{{}}')",
            f"select pgchannels.publish_many('{{a,{COMMANDS}}}', array['{{}}', '{{}}']::json[])",
            f"select pgchannels.watch('things', '{COMMANDS}')",
            "select pgchannels.watch('things', 'pgchannels:{name}')",
            "select pgchannels.watch('things', '{name}')",
        ],
    )
    def test_sql(self, connection: Connection, call: str) -> None:
        connection.execute("create table things (id int primary key, name text)")
        with pytest.raises(psycopg.DatabaseError, match="invalid channel"):
            connection.execute(call.encode())
        assert connection.execute("select count(*) from pgchannels.outbox").fetchone() == 0

    def test_a_publisher_that_inserts_by_itself(
        self, database_url: str, connection: Connection
    ) -> None:
        """Neither commands nor news of memberships."""
        connection.execute("create role commanding login")
        try:
            connection.execute("select pgchannels.grant_access('publisher', 'commanding')")
            connection.execute("set role commanding")
            connection.execute(
                "insert into pgchannels.outbox (channel, payload) values ('a', '{}')"
            )
            for channel in (COMMANDS, MEMBERS):
                with pytest.raises(psycopg.errors.CheckViolation, match="reserved_are_granted"):
                    connection.execute(
                        "insert into pgchannels.outbox (channel, payload) values (%s, '{}')",
                        [channel],
                    )
            connection.execute("reset role")
            connection.execute("select pgchannels.grant_access('node', 'commanding')")
            connection.execute("set role commanding")
            for channel in (COMMANDS, MEMBERS):
                connection.execute(
                    "insert into pgchannels.outbox (channel, payload) values (%s, '{}')", [channel]
                )
        finally:
            connection.execute("reset role")
            connection.execute("drop owned by commanding")
            connection.execute("drop role commanding")

    def test_a_session(self, database_url: str) -> None:
        engine = create_engine(database_url.replace("postgresql:", "postgresql+psycopg:"))
        sessions: sessionmaker[Session] = sessionmaker(engine)
        install(sessions, settings=Settings(database_url=database_url))
        with sessions() as session, pytest.raises(InvalidChannel):
            publish(session, COMMANDS, {})
        engine.dispose()

    def test_rest(self, database_url: str) -> None:
        layer = PostgresLayer(database_url)
        app = FastAPI(lifespan=lifespan(layer))
        app.include_router(channels_router(layer, authorize=lambda: True, prefix="/channels"))
        with TestClient(app) as client:
            for path in (
                f"/channels/{COMMANDS}/messages",
                "/channels/pgchannels%3Acommands/messages",
            ):
                response = client.get(path)
                assert response.status_code == 422, response.text
