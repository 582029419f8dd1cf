"""Whatever way a schema has come to where it is: who may run its routines, and by which path."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest

from pgchannels import Settings, migrate
from pgchannels.embedded import EmbeddedPostgres
from pgchannels.schema import NEEDED_REVISION, REVISIONS
from tests.migrations.databases import column, run_script
from tests.migrations.test_alembic import run, script

# With a search path of its own, it could not commit.
COMMITTING = "seal_and_notify"

Way = Callable[[str, EmbeddedPostgres], None]


def at_once(url: str, _: EmbeddedPostgres) -> None:
    migrate.upgrade(url)


def step_by_step(url: str, _: EmbeddedPostgres) -> None:
    for revision in REVISIONS:
        migrate.upgrade(url, revision)


def down_and_up(url: str, _: EmbeddedPostgres) -> None:
    migrate.upgrade(url)
    for revision in reversed(REVISIONS[:-1]):
        migrate.downgrade(url, revision)
    migrate.upgrade(url)


def by_script(url: str, server: EmbeddedPostgres) -> None:
    run_script(server, url, migrate.script(Settings()))


def by_operation(url: str, _: EmbeddedPostgres) -> None:
    run(url, lambda op: op.pgchannels_upgrade(to=NEEDED_REVISION))


def by_operation_down_and_up(url: str, server: EmbeddedPostgres) -> None:
    by_operation(url, server)
    run(url, lambda op: op.pgchannels_downgrade(to=REVISIONS[-2]))
    by_operation(url, server)


def by_script_of_operation(url: str, server: EmbeddedPostgres) -> None:
    run_script(server, url, script(lambda op: op.pgchannels_upgrade(to=NEEDED_REVISION)))


@pytest.mark.parametrize(
    "way",
    [
        at_once,
        step_by_step,
        down_and_up,
        by_script,
        by_operation,
        by_operation_down_and_up,
        by_script_of_operation,
    ],
)
def test_nothing_is_for_everybody(
    empty_database_url: str, postgres: EmbeddedPostgres, way: Way
) -> None:
    way(empty_database_url, postgres)
    routines = "pg_proc p where p.pronamespace = 'pgchannels'::regnamespace"
    (count,) = column(empty_database_url, f"select count(*) from {routines}")
    assert count > 20
    for_everybody = column(
        empty_database_url,
        f"select p.oid::regprocedure::text from {routines}"
        "   and has_function_privilege('public', p.oid, 'execute')"
        " union all "
        "select c.oid::regclass::text from pg_class c"
        " where c.relnamespace = 'pgchannels'::regnamespace and c.relkind in ('r', 'p', 'v')"
        "   and has_table_privilege('public', c.oid, 'select, insert, update, delete')"
        " union all "
        "select 'schema' where has_schema_privilege('public', 'pgchannels', 'usage, create')",
    )
    assert for_everybody == []
    with_the_callers_path = column(
        empty_database_url,
        f"select p.proname from {routines}"
        "   and not coalesce('search_path=pg_catalog, pg_temp' = any (p.proconfig), false)",
    )
    assert with_the_callers_path == [COMMITTING]


def test_the_one_that_has_the_callers_search_path_needs_none(database_url: str) -> None:
    """What it calls, compares and casts, it names with the schema."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        # In a search path that has pg_catalog at the end, these come before the real ones.
        connection.execute("create schema evil; create table evil.calls (name text)")
        connection.execute(
            """
            create domain evil.text as pg_catalog.text check (value is null);
            create function evil.pg_notify(pg_catalog.text, pg_catalog.text) returns void
            language sql as $$ insert into evil.calls values ('pg_notify') $$;
            create function evil.seal(
                integer, bigint, out sealed integer, out head bigint, out stopped boolean)
            language sql as
            $$ insert into evil.calls values ('seal') returning 0, 0::bigint, false $$;
            create function evil.greater(integer, integer) returns boolean
            language sql as $$ insert into evil.calls values ('>') returning true $$;
            create operator evil.> (function = evil.greater, leftarg = integer, rightarg = integer)
            """
        )
        connection.execute("select pgchannels.publish('room', '{}')")
        connection.execute("listen pgchannels")
        connection.execute("set search_path = evil, pg_catalog")
        row = connection.execute(f"call pgchannels.{COMMITTING}(10, 1000, 'pgchannels')").fetchone()
        assert row == (1, 1, False)
        (notification,) = connection.notifies(timeout=30, stop_after=1)
        assert (notification.channel, notification.payload) == ("pgchannels", "1")
        assert connection.execute("select name from evil.calls").fetchall() == []
