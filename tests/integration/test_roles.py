"""What each role needs, as docs/operations.md says it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy import create_engine
from sqlalchemy.engine import make_url
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import NullPool

from pgchannels import ConfigurationError, PostgresLayer, Settings
from pgchannels.orm import install, publish

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"


@pytest.fixture
def role(database_url: str) -> Iterator[str]:
    """A role that may log in, and nothing else."""
    name = f"shop_{uuid4().hex[:12]}"
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(f"create role {name} login")
        yield name
        connection.execute(f"drop owned by {name}")
        connection.execute(f"drop role {name}")


def as_role(database_url: str, role: str) -> str:
    return make_url(database_url).set(username=role).render_as_string(hide_password=False)


@pytest.fixture
def publisher(database_url: str, role: str) -> str:
    """The URL of a role with the grants that the documentation gives a publisher."""
    match = re.search(r"```sql\n(grant .*?)```", OPERATIONS.read_text("utf-8"), re.DOTALL)
    assert match is not None
    with psycopg.connect(database_url) as connection:
        for grant in match[1].strip().split("\n"):
            connection.execute(grant.replace(" shop;", f" {role};").encode())
    return as_role(database_url, role)


async def test_a_publisher_needs_two_grants(database_url: str, publisher: str) -> None:
    url = make_url(publisher).set(drivername="postgresql+psycopg")
    sessions: sessionmaker[Session] = sessionmaker(create_engine(url, poolclass=NullPool))
    install(sessions, settings=Settings(database_url=publisher))
    async with (
        PostgresLayer(database_url) as layer,
        layer.subscribe("a", after="0") as messages,
    ):
        with psycopg.connect(publisher) as connection:
            connection.execute("""select pgchannels.publish('a', '{"by": "function"}', '1 hour')""")
        with sessions() as session:
            publish(session, "a", {"by": "session"}, ttl=3600)
            session.commit()
        received = [(await anext(messages))["by"] for _ in range(2)]
    assert received == ["function", "session"]


@pytest.mark.parametrize(
    "statement",
    [
        "select * from pgchannels.outbox",
        "select * from pgchannels.messages",
        "delete from pgchannels.outbox",
        "insert into pgchannels.outbox (xid, channel, payload) values ('1', 'a', '{}')",
        "select pgchannels.seal()",
        "select pgchannels.add_partitions(10)",
    ],
)
def test_a_publisher_may_do_nothing_else(publisher: str, statement: str) -> None:
    with (
        psycopg.connect(publisher) as connection,
        pytest.raises(psycopg.errors.InsufficientPrivilege),
    ):
        connection.execute(statement.encode())


async def test_a_node_needs_the_owner(database_url: str, role: str) -> None:
    with psycopg.connect(database_url) as connection:
        connection.execute(f"grant usage on schema pgchannels to {role}")
        connection.execute(
            f"grant select, insert, update, delete on all tables in schema pgchannels to {role}"
        )
    with pytest.raises(ConfigurationError, match=f'grant "postgres" to "{role}"'):
        await PostgresLayer(as_role(database_url, role)).open()

    with psycopg.connect(database_url) as connection:
        connection.execute(f'grant "postgres" to "{role}"')
    async with (
        PostgresLayer(as_role(database_url, role)) as layer,
        layer.subscribe("a") as messages,
    ):
        await layer.send("a", {"n": 1})
        assert (await anext(messages))["n"] == 1
