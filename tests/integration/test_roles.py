"""Who may do what: publishers, nodes, maintainers, and roles without any access."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import psycopg
import pytest
from alembic.migration import MigrationContext
from alembic.operations import Operations
from psycopg import sql
from psycopg.errors import (
    InsufficientPrivilege,
    InvalidParameterValue,
    ObjectNotInPrerequisiteState,
    UndefinedObject,
)
from psycopg.rows import scalar_row
from sqlalchemy import create_engine
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, ProgrammingError
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import NullPool

from pgchannels import (
    Command,
    ConfigurationError,
    FixedWindow,
    Limits,
    PostgresLayer,
    Settings,
    migrate,
)
from pgchannels.alembic import UpgradeOp
from pgchannels.orm import install, publish
from pgchannels.pruner import Pruner
from pgchannels.schema import NEEDED_REVISION
from pgchannels.store import Session as StoreSession
from pgchannels.testing.support import listening
from tests.support.partitions import make_small

Connection = psycopg.Connection[Any]
MakeRole = Callable[..., str]

PUBLISHING = {
    "is_channel",
    "is_payload",
    "is_headers",
    "is_attachments",
    "attachments_size",
    "check_message",
    "check_ttl",
    "publish",
    "publish_many",
    "primary_key",
    "watched_channel",
    "watched_change",
    "user_channel",
    "check_reserved",
    "claim_keys",
    "claim_channel_keys",
}
GIVING = {"watch", "unwatch", "publish_changes", "grant_access", "regrant", "limit_messages"}


def as_role(url: str, role: str) -> str:
    return make_url(url).set(username=role).render_as_string(hide_password=False)


def execute(url: str, statement: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(statement.encode())


@pytest.fixture
def make_role(postgres: Any, database_url: str, empty_database_url: str) -> Iterator[MakeRole]:
    """Makes roles that may log in, and nothing else; they go with the test."""
    with ExitStack() as stack:

        def make(options: str = "") -> str:
            name = f"shop_{uuid4().hex[:12]}"
            execute(database_url, f"create role {name} login {options}")
            stack.callback(execute, database_url, f"drop role {name}")
            for url in (database_url, empty_database_url):
                stack.callback(execute, url, f"drop owned by {name} cascade")
            return name

        yield make


@pytest.fixture
def role(make_role: MakeRole) -> str:
    return make_role()


def grant(url: str, kind: str, role: str, *, to_users: bool = False) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("select pgchannels.grant_access(%s, %s, %s)", [kind, role, to_users])


@pytest.fixture
def publisher(database_url: str, role: str) -> str:
    """The URL of a publisher."""
    grant(database_url, "publisher", role)
    return as_role(database_url, role)


@pytest.fixture
def node(database_url: str, role: str) -> str:
    """The URL of a node."""
    grant(database_url, "node", role)
    return as_role(database_url, role)


def may_use_columns(connection: Connection, role: str) -> set[tuple[str, str, str]]:
    """The columns that a role may use in any way: relation, column and how."""
    return set(
        connection.execute(
            """
            select c.relname::text, a.attname::text, p.privilege
              from pg_class c
              join pg_attribute a on a.attrelid = c.oid and not a.attisdropped
             cross join unnest('{select,insert,update,references}'::text[]) p(privilege)
             where c.relnamespace = 'pgchannels'::regnamespace
               and c.relkind in ('r', 'p', 'v', 'm', 'f')
               and has_column_privilege(%s, c.oid, a.attnum, p.privilege)
            """,
            [role],
        ).fetchall()
    )


def may_use_relations(connection: Connection, role: str) -> set[tuple[str, str]]:
    """The relations that a role may use as a whole: which and how."""
    return set(
        connection.execute(
            """
            select c.relname::text, p.privilege
              from pg_class c
             cross join unnest(
                       '{select,insert,update,delete,truncate,references,trigger}'::text[]
                   ) p(privilege)
             where c.relnamespace = 'pgchannels'::regnamespace
               and c.relkind in ('r', 'p', 'v', 'm', 'f')
               and has_table_privilege(%(role)s, c.oid, p.privilege)
            union all
            select c.relname::text, p.privilege
              from pg_class c cross join unnest('{usage,select,update}'::text[]) p(privilege)
             where c.relnamespace = 'pgchannels'::regnamespace and c.relkind = 'S'
               and has_sequence_privilege(%(role)s, c.oid, p.privilege)
            """,
            {"role": role},
        ).fetchall()
    )


def may_call(connection: Connection, role: str) -> set[str]:
    return {
        name
        for (name,) in connection.execute(
            "select proname::text from pg_proc where pronamespace = 'pgchannels'::regnamespace"
            " and has_function_privilege(%s, oid, 'execute')",
            [role],
        )
    }


def routines(connection: Connection) -> set[str]:
    return {
        name
        for (name,) in connection.execute(
            "select proname::text from pg_proc where pronamespace = 'pgchannels'::regnamespace"
        )
    }


def relations(connection: Connection, kinds: str) -> list[str]:
    return [
        name
        for (name,) in connection.execute(
            "select relname::text from pg_class"
            " where relnamespace = 'pgchannels'::regnamespace and relkind = any (%s::\"char\"[])",
            [kinds],
        )
    ]


def refused(connection: Connection, statement: str) -> None:
    with pytest.raises(InsufficientPrivilege):
        connection.execute(statement.encode())
    connection.rollback()


def try_everything_on(connection: Connection, relation: str) -> None:
    """What needs more than to be a publisher, on a table, view or sequence."""
    name = f"pgchannels.{relation}"
    for statement in (
        f"alter table {name} rename to mine",
        f"alter table {name} owner to current_user",
        f"comment on table {name} is 'mine'",
        f"drop table {name}",
        f"truncate {name}",
        f"create trigger t before insert on {name} execute function tsvector_update_trigger()",
        f"create rule r as on insert to {name} do instead nothing",
        f"create policy p on {name}",
        f"create index on {name} ((1))",
    ):
        with pytest.raises((InsufficientPrivilege, psycopg.errors.WrongObjectType)):
            connection.execute(statement.encode())


class TestPublisher:
    async def test_publishes_by_function_and_session(
        self, database_url: str, publisher: str
    ) -> None:
        url = make_url(publisher).set(drivername="postgresql+psycopg")
        sessions: sessionmaker[Session] = sessionmaker(create_engine(url, poolclass=NullPool))
        install(sessions, settings=Settings(database_url=publisher))
        async with (
            asyncio.timeout(30),
            PostgresLayer(database_url) as layer,
            layer.subscribe("a", after="0") as messages,
        ):
            with psycopg.connect(publisher) as connection:
                connection.execute("select pgchannels.publish('a', '{\"by\": \"one\"}', '1 hour')")
                connection.execute(
                    "select pgchannels.publish_many("
                    """'{a,a}', array['{"by": "two"}', '{"by": "three"}']::json[])"""
                )
                connection.execute(
                    "insert into pgchannels.outbox (channel, payload, headers, attachments)"
                    """ values ('a', '{"by": "row"}', '{"x": "y"}', '{}')"""
                )
            with sessions() as session:
                publish(
                    session, "a", {"by": "session", "bytes": b"\0"}, ttl=3600, headers={"x": "y"}
                )
                session.commit()
            received = [(await anext(messages))["by"] for _ in range(5)]
        assert received == ["one", "two", "three", "row", "session"]

    def test_has_been_given_nothing_else(
        self, database_url: str, role: str, publisher: str
    ) -> None:
        with psycopg.connect(database_url) as connection:
            assert may_use_columns(connection, role) == {
                ("outbox", column, "insert")
                for column in ("channel", "payload", "expires_at", "headers", "attachments")
            }
            assert may_use_relations(connection, role) == set()
            assert may_call(connection, role) == PUBLISHING
            rights = connection.execute(
                "select has_schema_privilege(%(role)s, 'pgchannels', 'usage'),"
                " has_schema_privilege(%(role)s, 'pgchannels', 'create')",
                {"role": role},
            ).fetchone()
        assert rights == (True, False)

    def test_is_refused_everything_else(self, database_url: str, publisher: str) -> None:
        with psycopg.connect(database_url, autocommit=True) as connection:
            connection.execute("select pgchannels.publish('secret', '{}')")
            connection.execute("select pgchannels.seal()")
            readable = relations(connection, "{r,p,v}")
            tables = relations(connection, "{r,p}")
            sequences = relations(connection, "{S}")
            calls = connection.execute(
                """
                select format('%%s pgchannels.%%I(%%s)',
                              case prokind when 'p' then 'call' else 'select' end, proname,
                              (select string_agg('null::' || t.type::regtype, ', ' order by t.place)
                                 from unnest(coalesce(proallargtypes, proargtypes::oid[]),
                                             proargmodes) with ordinality t(type, mode, place)
                                where prokind = 'p' or coalesce(t.mode, 'i') in ('i', 'b')))
                  from pg_proc
                 where pronamespace = 'pgchannels'::regnamespace and proname <> all (%s)
                   and prorettype <> 'trigger'::regtype
                """,
                [list(PUBLISHING)],
            ).fetchall()
        assert "messages_1" in readable
        assert "watches" in readable
        assert len(calls) > 10
        with psycopg.connect(publisher, autocommit=True) as connection:
            for name in readable:
                relation = f"pgchannels.{name}"
                for statement in (
                    f"select * from {relation}",
                    f"select count(*) from {relation}",
                    f"select 1 from {relation} limit 0",
                    f"copy {relation} to stdout",
                    f"begin; lock table {relation} in access share mode",
                    f"begin; lock table {relation} in access exclusive mode",
                ):
                    refused(connection, statement)
                try_everything_on(connection, name)
            for name in tables:
                refused(connection, f"delete from pgchannels.{name}")
                if name != "outbox":
                    refused(connection, f"insert into pgchannels.{name} default values")
            for name in sequences:
                refused(connection, f"select nextval('pgchannels.{name}')")
                refused(connection, f"select setval('pgchannels.{name}', 1)")
                refused(connection, f"select * from pgchannels.{name}")
                refused(connection, f"alter sequence pgchannels.{name} restart")
            for (call,) in calls:
                refused(connection, call)

    @pytest.mark.parametrize(
        "statement",
        [
            "insert into pgchannels.outbox (xid, channel, payload) values ('1', 'a', '{}')",
            "insert into pgchannels.outbox (created_at, channel, payload) select now(), 'a', '{}'",
            (
                "insert into pgchannels.outbox (id, channel, payload) overriding system value"
                " values (1, 'a', '{}')"
            ),
            "insert into pgchannels.outbox (channel, payload) values ('a', '{}') returning id",
            (
                "insert into pgchannels.outbox (channel, payload) values ('a', '{}')"
                " on conflict do nothing returning channel"
            ),
            "insert into pgchannels.outbox values (default, '1', 'a', '{}')",
            "update pgchannels.outbox set channel = 'b'",
            "create table pgchannels.mine ()",
            "create function pgchannels.mine() returns int language sql return 1",
            (
                "create or replace function pgchannels.is_channel(name text) returns boolean"
                " language sql return true"
            ),
            "alter function pgchannels.publish reset search_path",
            "alter function pgchannels.add_partitions(bigint) set search_path = public",
            "drop function pgchannels.is_payload(json)",
            "drop schema pgchannels cascade",
            "alter schema pgchannels rename to mine",
            "set role postgres",
            "set session authorization postgres",
            "set session_replication_role = replica",
            "create table mine (id bigint references pgchannels.messages)",
            "create table mine () inherits (pgchannels.outbox)",
            "create event trigger e on sql_drop execute function pgchannels.publish_changes()",
        ],
    )
    def test_attempts(self, publisher: str, statement: str) -> None:
        with psycopg.connect(publisher, autocommit=True) as connection:
            refused(connection, statement)

    def test_cannot_use_the_trigger_function(self, database_url: str, publisher: str) -> None:
        execute(database_url, "grant create on schema public to public")
        with psycopg.connect(publisher, autocommit=True) as connection:
            connection.execute("create table mine (id int)")
            refused(
                connection,
                "create trigger t after insert on mine for each statement"
                " execute function pgchannels.publish_changes('{}')",
            )
            refused(connection, "select pgchannels.watch('mine', 'a')")

    def test_cannot_lead_a_function_astray(self, database_url: str, publisher: str) -> None:
        """Neither the functions nor the outbox's constraints meet what is on its search path."""
        name = make_url(database_url).database
        execute(database_url, f'grant create on database "{name}" to public')
        with psycopg.connect(publisher, autocommit=True) as connection:
            connection.execute(
                """
                create schema evil;
                create function evil.char_length(text) returns int language sql return 1;
                create function evil.json_typeof(json) returns text language sql return 'object';
                create function evil.octet_length(text) returns int language sql return 1;
                create function evil.strpos(text, text) returns int language sql return 0;
                create function evil.starts_with(text, text) returns boolean
                    language sql return false;
                create function evil.clock_timestamp() returns timestamptz language sql
                    return '9998-01-01'::timestamptz;
                create function evil.never(text, text) returns boolean language sql return false;
                create operator evil.~ (function = evil.never, leftarg = text, rightarg = text);
                create function evil.always(text, text) returns boolean language sql return true;
                create operator evil.!~ (function = evil.always, leftarg = text, rightarg = text);
                create operator evil.= (function = evil.always, leftarg = text, rightarg = text);
                create function evil.between(int, int) returns boolean language sql return true;
                create operator evil.<= (function = evil.between, leftarg = int, rightarg = int);
                create operator evil.>= (function = evil.between, leftarg = int, rightarg = int);
                create temp table outbox (channel text, payload json, expires_at timestamptz);
                create temp table log (singleton boolean);
                create domain pg_temp.interval as text;
                set search_path = evil, pg_temp, pg_catalog;
                """
            )
            for channel in ("a b", "a*", "x" * 201, "pgchannels:members", "", "\x01"):
                with pytest.raises(InvalidParameterValue):
                    connection.execute("select pgchannels.publish(%s::text, '{}')", [channel])
                with pytest.raises(InvalidParameterValue):
                    connection.execute(
                        "select pgchannels.publish_many(array[%s::text], array['{}']::json[])",
                        [channel],
                    )
                if not channel.startswith("pgchannels:"):
                    with pytest.raises(psycopg.errors.CheckViolation):
                        connection.execute(
                            "insert into pgchannels.outbox (channel, payload) values (%s, '{}')",
                            [channel],
                        )
            for payload in ("[]", '"x"', r'{"a": "\ud800"}'):
                with pytest.raises(InvalidParameterValue):
                    connection.execute("select pgchannels.publish('a', %s::json)", [payload])
                with pytest.raises(psycopg.errors.CheckViolation):
                    connection.execute(
                        "insert into pgchannels.outbox (channel, payload) values ('a', %s)",
                        [payload],
                    )
            with pytest.raises(psycopg.errors.CheckViolation):
                connection.execute(
                    "insert into pgchannels.outbox (channel, payload, headers)"
                    """ values ('a', '{}', '{"a": 1}')"""
                )
            connection.execute(
                "select pgchannels.publish('a', '{}', '1 hour'::pg_catalog.interval)"
            )
        with psycopg.connect(database_url, row_factory=scalar_row) as connection:
            assert connection.execute(
                "select expires_at < now() + interval '2 hours' from pgchannels.outbox"
            ).fetchall() == [True]


def test_who_has_no_access_has_none(database_url: str, role: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        assert may_use_columns(connection, role) == set()
        assert may_use_relations(connection, role) == set()
        assert may_call(connection, role) == set()
    with psycopg.connect(as_role(database_url, role)) as connection:
        refused(connection, "select pgchannels.publish('a', '{}')")


@pytest.mark.parametrize("kind", [None, "publisher"])
def test_delivery_waits_for_no_lock_that_others_than_nodes_can_take(
    database_url: str, role: str, kind: str | None
) -> None:
    if kind:
        grant(database_url, kind, role)
    with psycopg.connect(database_url, row_factory=scalar_row) as sealer:
        sealer.execute("select pgchannels.publish('room', '{}')")
        assert sealer.execute("select sealed from pgchannels.seal()").fetchone() == 1
        held = "from pg_locks where pid = pg_backend_pid() and locktype"
        # Advisory locks are everybody's.
        assert sealer.execute(f"select count(*) {held} = 'advisory'").fetchone() == 0
        tables = sealer.execute(
            f"select distinct relation::regclass::text {held} = 'relation'"
            " and relation in (select oid from pg_class where relkind in ('r', 'p')"
            " and relnamespace = 'pgchannels'::regnamespace)"
        ).fetchall()
    assert {"pgchannels.sequencer_lock", "pgchannels.outbox", "pgchannels.messages"} <= set(tables)
    with psycopg.connect(as_role(database_url, role), autocommit=True) as stranger:
        for table in tables:
            for mode in ("access share", "share update exclusive", "access exclusive"):
                with pytest.raises(InsufficientPrivilege), stranger.transaction():
                    stranger.execute(f"lock table {table} in {mode} mode".encode())


def test_who_may_watch_a_table(database_url: str, role: str, publisher: str) -> None:
    """With the grants of the documentation: an owner all, with the right TRIGGER a first watch."""
    page = Path(__file__).parents[2] / "docs" / "publishing.md"
    (grants,) = re.findall(r"```sql\n(\s*grant.*?)```", page.read_text("utf-8"), re.DOTALL)
    for statement in (
        "create table theirs (id integer primary key); create table own (id integer primary key)",
        f"grant trigger on theirs to {role}",
        f"grant create on schema public to {role}",
        f"alter table own owner to {role}",
    ):
        execute(database_url, statement)
    with psycopg.connect(publisher, autocommit=True) as connection:
        refused(connection, "select pgchannels.watch('own', 'a')")
        execute(database_url, grants.replace("to shop;", f"to {role};"))
        for _ in range(2):
            connection.execute("select pgchannels.watch('own', 'a')")
        connection.execute("insert into own values (1)")
        connection.execute("select pgchannels.unwatch('own')")
        connection.execute("select pgchannels.watch('theirs', 'a')")
        refused(connection, "select pgchannels.watch('theirs', 'a')")
        refused(connection, "select pgchannels.unwatch('theirs')")


ADDRESSES = {
    "publish": "select pgchannels.publish(user_id => '42', payload => '{}')",
    "publish_many": (
        "select pgchannels.publish_many(user_ids => '{42}', payloads => array['{}']::json[])"
    ),
    "recipients": "select pgchannels.publish(recipients => '{a,b}', payload => '{}')",
    "key": "select pgchannels.publish(user_id => '42', payload => '{}', key => 'k')",
    "row": "insert into pgchannels.outbox (channel, payload) values ('pgchannels:user:42', '{}')",
    "unknown": "insert into pgchannels.outbox (channel, payload) values ('pgchannels:new', '{}')",
    "watch": "insert into invoices values (1, '42')",
}


class TestToUsers:
    """A publisher may publish to users, and to several connections, where it was granted so."""

    @pytest.fixture
    def invoices(self, database_url: str, role: str) -> None:
        with psycopg.connect(database_url, autocommit=True) as connection:
            connection.execute("create table invoices (id int primary key, owner text)")
            connection.execute("select pgchannels.watch('invoices', user_id => '{owner}')")
            connection.execute(f"grant insert on invoices to {role}".encode())

    @pytest.mark.usefixtures("invoices")
    @pytest.mark.parametrize("statement", ADDRESSES.values(), ids=ADDRESSES)
    def test_is_refused_with_what_to_do(
        self, database_url: str, role: str, publisher: str, statement: str
    ) -> None:
        with psycopg.connect(publisher, autocommit=True) as connection:
            with pytest.raises(InsufficientPrivilege, match="may publish to channels") as refusal:
                connection.execute(statement.encode())
            hint = refusal.value.diag.message_hint
            assert hint is not None
            execute(database_url, hint.partition(": ")[2])
            connection.execute(statement.encode())

    def test_by_sessions(self, database_url: str, role: str, publisher: str) -> None:
        url = make_url(publisher).set(drivername="postgresql+psycopg")
        sessions: sessionmaker[Session] = sessionmaker(create_engine(url, poolclass=NullPool))
        install(sessions, settings=Settings(database_url=publisher))
        for key in (None, "k"):
            with sessions() as session:
                publish(session, {}, user="42", key=key)
                with pytest.raises(ProgrammingError, match="may publish to channels"):
                    session.commit()
        grant(database_url, "publisher", role, to_users=True)
        with sessions.begin() as session:
            publish(session, {}, user="42", key="k")
            publish(session, {}, to=["a"])

    def test_everyone_groups_and_keys_need_no_more(self, database_url: str, publisher: str) -> None:
        with psycopg.connect(publisher, autocommit=True) as connection:
            connection.execute("select pgchannels.publish(everyone => true, payload => '{}')")
            connection.execute("select pgchannels.publish('a', '{}', exclude => 'b', key => 'k')")
            connection.execute("select pgchannels.publish('a', '{}', key => 'k')")
        with psycopg.connect(database_url) as connection:
            published = connection.execute("select channel from pgchannels.outbox order by id")
            assert published.fetchall() == [("pgchannels:everyone",), ("a",)]

    def test_a_publisher_cannot_use_up_the_keys_of_users(self, publisher: str) -> None:
        arguments = "('{pgchannels:user:42}', '{invoice}', '1 day')"
        with psycopg.connect(publisher, autocommit=True) as connection:
            for name in ("claim_keys", "claim_channel_keys", "claim_reserved_keys"):
                refused(connection, f"select pgchannels.{name}{arguments}")

    def test_a_name_with_a_quote(self, database_url: str) -> None:
        name = 'o"; drop table x; --' + uuid4().hex
        quoted = sql.Identifier(name)
        with psycopg.connect(database_url, autocommit=True) as connection:
            connection.execute(sql.SQL("create role {} login").format(quoted))
            try:
                grant(database_url, "publisher", name)
                connection.execute(sql.SQL("set role {}").format(quoted))
                with pytest.raises(InsufficientPrivilege) as refusal:
                    connection.execute(ADDRESSES["publish"].encode())
                connection.execute("reset role")
                hint = refusal.value.diag.message_hint
                assert hint is not None
                execute(database_url, hint.partition(": ")[2])
            finally:
                connection.execute("reset role")
                connection.execute(sql.SQL("drop owned by {}").format(quoted))
                connection.execute(sql.SQL("drop role {}").format(quoted))


def test_functions_have_a_search_path_of_their_own(database_url: str) -> None:
    with psycopg.connect(database_url, row_factory=scalar_row) as connection:
        without = connection.execute(
            "select proname::text from pg_proc where pronamespace = 'pgchannels'::regnamespace"
            "   and not coalesce(proconfig, '{}') @> '{\"search_path=pg_catalog, pg_temp\"}'"
        ).fetchall()
        definers = connection.execute(
            "select proname::text from pg_proc"
            " where pronamespace = 'pgchannels'::regnamespace and prosecdef"
        ).fetchall()
    # It commits, which a procedure with settings of its own cannot.
    assert without == ["seal_and_notify"]
    # Publishers may not read the table of keys.
    assert set(definers) == {"add_partitions", "claim_reserved_keys", "claim_channel_keys"}


class TestNode:
    async def test_does_what_nodes_do(self, database_url: str, node: str) -> None:
        settings = Settings(
            database_url=node, batch_size=10, heartbeat_interval=0.2, prune_interval=0.2
        )
        # Messages go over the ends of partitions, which are made as they are needed.
        make_small(database_url, 10)
        async with asyncio.timeout(60), PostgresLayer(settings) as layer:
            async with layer.subscribe("a", after="0") as messages:
                for n in range(40):
                    await layer.send("a", {"n": n}, headers={"x": "y"}, ttl=3600)
                assert [(await anext(messages))["n"] for _ in range(40)] == list(range(40))
            execute(database_url, "update pgchannels.log set partition_size = 1000000")
            for _ in range(2):
                await layer.send("a", {"n": 40, "bytes": b"\0"}, key="once")
            page = await layer.history("a", order="desc", limit=3)
            assert page.messages[0]["n"] in (39, 40)

            channel = await layer.new_channel("ws", user_id="ann", metadata={"a": 1})
            await layer.group_add("room", channel, presence="user")
            assert await layer.group_members("room") == [channel]
            assert [each.user_id for each in await layer.presence("room")] == ["ann"]
            await layer.group_send("room", {"n": 1})
            await layer.send_to_user("ann", {"n": 2})
            await layer.send_ephemeral("room", {"n": 3})
            await layer.broadcast({"n": 4})
            await layer.update_channel(channel, user_id="bob")
            await layer.group_discard("room", channel)
            await layer.delete_channel(channel)

            limits = Limits(per_user=1, per_node=1, total=1)
            channel = await layer.new_channel("ws", user_id="ann", limits=limits)
            await layer.group_add("room", channel, limit=1)
            assert [each.channel for each in await layer.connections()] == [channel]
            with listening(layer) as heard:
                await layer.command(Command("close", channel=channel))
                await layer.revoke(user_id="ann")
                async with asyncio.timeout(20):
                    actions = [(await heard.get()).action for _ in range(2)]
                assert actions == ["close", "reauthorize"]
            assert await layer.is_revoked(user_id="ann")
            assert (await layer.take("ann", FixedWindow(1, 60))).allowed
            await layer.delete_channel(channel)
            assert await layer.count_connections() == 0

            await layer.send("jobs", {"n": 5})
            assert (await layer.receive("jobs", timeout=10))["n"] == 5

            async with layer.follow("a", name="reader", after="0") as batches:
                batch = await anext(aiter(batches))
                await batch.ack()
            assert [status.name for status in await layer.followers()] == ["reader"]
            assert await layer.forget_follower("reader")

            connection = await asyncpg.connect(node)
            try:
                async with connection.transaction(isolation="repeatable_read"):
                    position = await layer.snapshot(connection)
                async with layer.subscribe("b", after=position) as messages:
                    await layer.send("b", {"n": 6})
                    assert (await anext(messages))["n"] == 6
            finally:
                await connection.close(timeout=5)
        with psycopg.connect(database_url, row_factory=scalar_row) as connection:
            # The owner's, whoever had them made.
            assert connection.execute(
                "select distinct pg_get_userbyid(relowner)::text from pg_class"
                " where relname ~ '^messages_[0-9]+$'"
            ).fetchall() == ["postgres"]

    def test_has_been_given_nothing_else(self, database_url: str, role: str, node: str) -> None:
        with psycopg.connect(database_url) as connection:
            tables = [
                name
                for name in relations(connection, "{r,p,v}")
                if name not in ("alembic_version", "watches", "messages_1")
            ]
            assert may_use_relations(connection, role) == {
                ("alembic_version", "select"),
                *(
                    (name, how)
                    for name in tables
                    for how in ("select", "insert", "update", "delete")
                ),
            }
            assert may_call(connection, role) == routines(connection) - GIVING

    def test_may_not_change_the_schema(self, database_url: str, node: str) -> None:
        execute(database_url, "create table orders (id int primary key)")
        with psycopg.connect(database_url, autocommit=True) as connection:
            names = relations(connection, "{r,p,v}")
        with psycopg.connect(node, autocommit=True) as connection:
            for name in names:
                try_everything_on(connection, name)
            for statement in (
                "select pgchannels.watch('orders', 'orders')",
                "select pgchannels.unwatch('orders')",
                "select pgchannels.grant_access('node', current_user)",
                "select pgchannels.regrant()",
                "update pgchannels.alembic_version set version_num = '0001'",
                "select * from pgchannels.messages_1",
                "alter table pgchannels.messages detach partition pgchannels.messages_1",
                (
                    "create table pgchannels.messages_x partition of pgchannels.messages"
                    " for values from (-10) to (-5)"
                ),
                "drop schema pgchannels cascade",
                "set role postgres",
            ):
                refused(connection, statement)

    def test_makes_partitions_by_nobodys_rules_but_ours(self, database_url: str, node: str) -> None:
        """add_partitions() runs as the owner: nothing of the caller's may get into that."""
        name = make_url(database_url).database
        execute(database_url, f'grant create on database "{name}" to public')
        with psycopg.connect(node, autocommit=True) as connection:
            connection.execute(
                """
                create schema evil;
                create function evil.grab() returns text language plpgsql as $$
                begin
                    create table public.grabbed_by_a_superuser ();
                    return '1';
                end $$;
                create function evil.plus(bigint, bigint) returns bigint language plpgsql as
                    $$ begin perform evil.grab(); return $1; end $$;
                create operator evil.+ (function = evil.plus, leftarg = bigint, rightarg = bigint);
                create function evil.join(text, bigint) returns text language plpgsql as
                    $$ begin return evil.grab(); end $$;
                create operator evil.|| (function = evil.join, leftarg = text, rightarg = bigint);
                create temp table log as select * from pgchannels.log;
                create temp table messages (id bigint);
                set search_path = evil, pg_temp, pg_catalog;
                """
            )
            made = connection.execute("select pgchannels.add_partitions(5000000)").fetchone()
            assert made is not None
            assert made[0] > 0
        with psycopg.connect(database_url, row_factory=scalar_row) as connection:
            assert connection.execute(
                "select to_regclass('public.grabbed_by_a_superuser') is null"
            ).fetchone()
            assert connection.execute(
                "select count(*) > 4 from pg_inherits"
                " where inhparent = 'pgchannels.messages'::regclass"
            ).fetchone()

    async def test_others_are_refused(self, database_url: str, role: str) -> None:
        with pytest.raises(ConfigurationError, match="pgchannels grant node"):
            await PostgresLayer(as_role(database_url, role)).open()
        grant(database_url, "publisher", role)
        with pytest.raises(ConfigurationError, match="pgchannels grant node"):
            await PostgresLayer(as_role(database_url, role)).open()


class TestMaintainer:
    @pytest.fixture
    def owner(self, empty_database_url: str, make_role: MakeRole) -> str:
        """A role that is no superuser and owns the schema, at the revision before roles."""
        name = make_role()
        execute(empty_database_url, f"create schema pgchannels authorization {name}")
        migrate.upgrade(as_role(empty_database_url, name), "0002")
        return name

    @pytest.fixture
    def maintainer(self, empty_database_url: str, owner: str, make_role: MakeRole) -> str:
        name = make_role()
        execute(empty_database_url, f"grant {owner} to {name}")
        return name

    def owners(self, url: str) -> list[str]:
        with psycopg.connect(url, row_factory=scalar_row) as connection:
            return connection.execute(
                """
                select distinct pg_get_userbyid(relowner)::text from pg_class
                 where relnamespace = 'pgchannels'::regnamespace
                union
                select pg_get_userbyid(proowner)::text from pg_proc
                 where pronamespace = 'pgchannels'::regnamespace
                """
            ).fetchall()

    @pytest.mark.parametrize("who", ["owner", "maintainer", "postgres"])
    async def test_migrates_and_prunes(
        self, empty_database_url: str, owner: str, maintainer: str, make_role: MakeRole, who: str
    ) -> None:
        name = {"owner": owner, "maintainer": maintainer}.get(who, who)
        url = as_role(empty_database_url, name)
        await asyncio.to_thread(migrate.upgrade, url)
        assert await asyncio.to_thread(migrate.current, url) == NEEDED_REVISION
        # What is new is the owner's, so that each of them can go on from there.
        assert self.owners(empty_database_url) == [owner]
        publisher = make_role()
        grant(as_role(empty_database_url, owner), "publisher", publisher)
        execute(as_role(empty_database_url, publisher), "select pgchannels.publish('a', '{}')")
        async with asyncio.timeout(60):
            for each in (owner, maintainer):
                settings = Settings(database_url=as_role(empty_database_url, each))
                session = StoreSession(settings, "test")
                try:
                    await Pruner(settings, session).run_once()
                finally:
                    await session.close()
            async with PostgresLayer(as_role(empty_database_url, maintainer)) as layer:
                await layer.send("a", {})
        await asyncio.to_thread(migrate.downgrade, url, "0002")

    def test_is_a_member_of_the_owner(
        self, empty_database_url: str, owner: str, make_role: MakeRole
    ) -> None:
        migrate.upgrade(as_role(empty_database_url, owner))
        name = make_role()
        with psycopg.connect(as_role(empty_database_url, owner)) as connection:
            # In PostgreSQL, nobody can make others members of himself.
            refused(connection, f"select pgchannels.grant_access('maintainer', '{name}')")
        grant(empty_database_url, "maintainer", name)
        execute(as_role(empty_database_url, name), "select pgchannels.seal()")
        execute(as_role(empty_database_url, name), "drop table pgchannels.messages_1")

    def test_not_of_a_superuser(self, database_url: str, role: str) -> None:
        with pytest.raises(ObjectNotInPrerequisiteState, match="is a superuser, and so would be"):
            grant(database_url, "maintainer", role)
        with psycopg.connect(as_role(database_url, role)) as connection:
            refused(connection, "set role postgres")


class TestWhoseSchema:
    """The owner of a schema can replace what is in it, and others would run that."""

    def migrate_by_operation(self, url: str) -> None:
        engine = create_engine(
            url.replace("postgresql:", "postgresql+psycopg:"), poolclass=NullPool
        )
        with engine.begin() as connection:
            operations = Operations(MigrationContext.configure(connection))
            operations.invoke(UpgradeOp(NEEDED_REVISION))

    def migrate_by_script(self, url: str) -> None:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(migrate.script().encode())

    def test_nobody_migrates_into_anothers(
        self, empty_database_url: str, make_role: MakeRole
    ) -> None:
        squatter = make_role()
        execute(empty_database_url, f"create schema pgchannels authorization {squatter}")
        with pytest.raises(ConfigurationError, match=f"belongs to '{squatter}'.*OWNER TO"):
            migrate.upgrade(empty_database_url)
        with pytest.raises(DBAPIError, match=f"belongs to {squatter}, who could replace"):
            self.migrate_by_operation(empty_database_url)
        with pytest.raises(ObjectNotInPrerequisiteState, match=f"belongs to {squatter}"):
            self.migrate_by_script(empty_database_url)
        assert migrate.current(empty_database_url) is None

    def test_nor_when_it_was_given_away_later(
        self, empty_database_url: str, make_role: MakeRole
    ) -> None:
        migrate.upgrade(empty_database_url, "0003")
        other = make_role()
        execute(empty_database_url, f"alter schema pgchannels owner to {other}")
        with pytest.raises(ConfigurationError, match=f"belongs to '{other}'"):
            migrate.upgrade(empty_database_url)
        with pytest.raises(DBAPIError, match=f"belongs to {other}"):
            self.migrate_by_operation(empty_database_url)

    def test_a_superusers_and_ones_own_will_do(
        self, empty_database_url: str, make_role: MakeRole
    ) -> None:
        name = make_role()
        execute(
            empty_database_url,
            f"create schema pgchannels; grant all on schema pgchannels to {name};"
            f"create schema own authorization {name}",
        )
        for schema in ("pgchannels", "own"):
            settings = Settings(database_url=as_role(empty_database_url, name), schema_name=schema)
            migrate.upgrade(settings)
            assert migrate.current(settings) == NEEDED_REVISION

    @pytest.mark.parametrize("who", ["owner", "postgres"])
    def test_public_is_the_database_owners(
        self, empty_database_url: str, make_role: MakeRole, who: str
    ) -> None:
        owner = make_role()
        database = make_url(empty_database_url).database
        execute(empty_database_url, f'alter database "{database}" owner to {owner}')
        url = as_role(empty_database_url, owner if who == "owner" else "postgres")
        settings = Settings(database_url=url, schema_name="public")
        if who == "owner":
            migrate.upgrade(settings)
            assert migrate.current(settings) == NEEDED_REVISION
        else:
            with pytest.raises(ConfigurationError, match=f"belongs to '{owner}'"):
                migrate.upgrade(settings)
        execute(empty_database_url, f'alter database "{database}" owner to postgres')


class TestGrantAccess:
    @pytest.mark.parametrize(
        "kind", [None, "", "Node", "superuser", "publisher; drop table orders"]
    )
    def test_kinds(self, database_url: str, role: str, kind: str) -> None:
        with pytest.raises(InvalidParameterValue, match="there is no access as"):
            grant(database_url, kind, role)

    @pytest.mark.parametrize("kind", ["publisher", "node", "maintainer"])
    @pytest.mark.parametrize(
        "role",
        [None, "", "nobody", "public", "PUBLIC", "a, b", 'x"; create role evil; --', "r" * 64],
    )
    def test_roles_that_do_not_exist(self, database_url: str, kind: str, role: str) -> None:
        with pytest.raises(UndefinedObject, match="does not exist"):
            grant(database_url, kind, role)

    @pytest.mark.parametrize("kind", ["publisher", "node"])
    @pytest.mark.parametrize(
        "name",
        ["Mixed Case", 'quo"te', "quo'te", "semi;colon", "--", "%I %s", "$$", "n" * 63, "日本"],
    )
    def test_names_of_roles(self, database_url: str, kind: str, name: str) -> None:
        quoted = sql.Identifier(name)
        with psycopg.connect(database_url, autocommit=True) as connection:
            connection.execute(sql.SQL("create role {}").format(quoted))
            try:
                grant(database_url, kind, name)
                assert may_call(connection, name) >= PUBLISHING
                connection.execute(sql.SQL("set role {}").format(quoted))
                connection.execute("select pgchannels.publish('a', '{}')")
                connection.execute("reset role")
            finally:
                with suppress(psycopg.Error):
                    connection.execute("reset role")
                connection.execute(sql.SQL("drop owned by {}").format(quoted))
                connection.execute(sql.SQL("drop role {}").format(quoted))

    def test_again_changes_nothing(self, database_url: str, role: str) -> None:
        for _ in range(2):
            grant(database_url, "publisher", role)
        with psycopg.connect(database_url) as connection:
            assert may_call(connection, role) == PUBLISHING

    def test_is_given_anew_to_who_has_it(self, database_url: str, make_role: MakeRole) -> None:
        publisher, node, nobody = make_role(), make_role(), make_role()
        to_users = make_role()
        grant(database_url, "publisher", publisher)
        grant(database_url, "publisher", to_users, to_users=True)
        grant(database_url, "node", node)
        with psycopg.connect(database_url, autocommit=True) as connection:
            before = [may_call(connection, role) for role in (publisher, node, to_users, nobody)]
            # As a later migration does.
            connection.execute(
                "drop function pgchannels.publish_many;"
                "create function pgchannels.publish_many(text[]) returns int language sql return 1;"
                "create function pgchannels.another() returns int language sql return 1;"
                "create table pgchannels.another (id int)"
            )
            connection.execute("select pgchannels.regrant()")
            after = [may_call(connection, role) for role in (publisher, node, to_users, nobody)]
            assert after == [before[0], before[1] | {"another"}, before[2], set()]
            assert before[2] == PUBLISHING | {"claim_reserved_keys"}
            assert ("another", "delete") in may_use_relations(connection, node)
            assert may_use_relations(connection, publisher) == set()


class TestBeforeThereWereRoles:
    """Rights that were given as the documentation said then."""

    @pytest.mark.parametrize(
        "rights",
        [
            "insert (channel, payload, expires_at) on pgchannels.outbox",
            "insert (headers, attachments), insert (channel, payload) on pgchannels.outbox",
            "insert on pgchannels.outbox",
            "insert on all tables in schema pgchannels",
        ],
    )
    def test_publishers_go_on_publishing(
        self, empty_database_url: str, role: str, rights: str
    ) -> None:
        migrate.upgrade(empty_database_url, "0002")
        execute(empty_database_url, f"grant usage on schema pgchannels to {role}")
        execute(empty_database_url, f"grant {rights} to {role}")
        url = as_role(empty_database_url, role)
        migrate.upgrade(empty_database_url)
        execute(url, "select pgchannels.publish('a', '{}', '1 hour')")
        execute(url, "insert into pgchannels.outbox (channel, payload) values ('a', '{}')")
        with psycopg.connect(empty_database_url) as connection:
            assert may_call(connection, role) == PUBLISHING

    async def test_nodes_are_members_of_the_owner(
        self, empty_database_url: str, make_role: MakeRole
    ) -> None:
        owner, name = make_role(), make_role()
        execute(empty_database_url, f"create schema pgchannels authorization {owner}")
        execute(empty_database_url, f"grant {owner} to {name}")
        url = as_role(empty_database_url, owner)
        await asyncio.to_thread(migrate.upgrade, url, "0002")
        await asyncio.to_thread(migrate.upgrade, url)
        async with (
            asyncio.timeout(30),
            PostgresLayer(as_role(empty_database_url, name)) as layer,
            layer.subscribe("a") as messages,
        ):
            await layer.send("a", {"n": 1})
            assert (await anext(messages))["n"] == 1
