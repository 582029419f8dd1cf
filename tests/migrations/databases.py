"""What tests of migrations do with a database, and see in it."""

from __future__ import annotations

import subprocess
from typing import Any

import psycopg
from psycopg.rows import scalar_row

from pgchannels.embedded import EmbeddedPostgres

# Whatever a schema could leave behind; partitions' types and toast tables go with their tables.
OBJECTS = """
select 'schema ' || nspname from pg_namespace
 where nspname !~ '^pg_' and nspname not in ('information_schema', 'public')
union all
select c.relkind::text || ' ' || c.oid::regclass from pg_class c
  join pg_namespace n on n.oid = c.relnamespace
 where n.nspname !~ '^pg_' and n.nspname <> 'information_schema'
union all
select 'function ' || p.oid::regprocedure from pg_proc p
  join pg_namespace n on n.oid = p.pronamespace
 where n.nspname !~ '^pg_' and n.nspname <> 'information_schema'
union all
select 'type ' || t.oid::regtype from pg_type t
  join pg_namespace n on n.oid = t.typnamespace
 where n.nspname !~ '^pg_' and n.nspname <> 'information_schema'
union all
select 'trigger ' || t.tgname from pg_trigger t
"""


def execute(url: str, statement: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(statement.encode())


def refuse_leases(url: str) -> None:
    """Let a migration fail midway."""
    execute(
        url,
        "create function public.refuse() returns event_trigger language plpgsql as $$ begin"
        "  if exists (select from pg_event_trigger_ddl_commands() d"
        "              where d.object_identity = 'pgchannels.leases') then"
        "    raise exception 'no leases here';"
        "  end if;"
        " end $$",
    )
    execute(
        url,
        "create event trigger refuse on ddl_command_end execute function public.refuse()",
    )


# What an application may have in its schema.
THEIRS = [
    "create table theirs.messages_2025 (id int)",
    "create table theirs.alembic_version (version_num varchar(32) not null)",
    "create sequence theirs.numbers",
    "create view theirs.everything as select 1 as one",
    "create function theirs.mine() returns int language sql as 'select 1'",
    "create procedure theirs.mine() language sql as 'select 1'",
    "create type theirs.mood as enum ('good')",
    "create domain theirs.word as text",
]


def column(url: str, query: str) -> list[Any]:
    with psycopg.connect(url, autocommit=True, row_factory=scalar_row) as connection:
        return connection.execute(query.encode()).fetchall()


def dump(server: EmbeddedPostgres, url: str, *options: str) -> str:
    """The schema of a database as DDL, without what differs from one dump to the next."""
    text = subprocess.run(
        [server.bin_path / "pg_dump", "--schema-only", *options, url],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return "\n".join(
        line for line in text.splitlines() if not line.startswith(("\\restrict", "\\unrestrict"))
    )


def run_script(server: EmbeddedPostgres, url: str, script: str) -> None:
    """Run *script* through psql; a statement that fails ends it."""
    result = subprocess.run(
        [server.bin_path / "psql", "--quiet", "--no-psqlrc", "-v", "ON_ERROR_STOP=1", url],
        input=script,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def publish_and_seal(url: str, schema: str = "pgchannels") -> int:
    """Try whether the schema works; the number of messages that came out."""
    execute(url, f"select \"{schema}\".publish('room', '{{}}')")
    (sealed,) = column(url, f'select sealed from "{schema}".seal()')
    return int(sealed)


def wait_for_a_waiter(url: str) -> None:
    """Until a session waits for a lock on a table."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "do $$ begin"
            "  for n in 1 .. 3000 loop"
            "    perform from pg_locks l where l.locktype = 'relation' and not l.granted;"
            "    if found then return; end if;"
            "    perform pg_sleep(0.01);"
            "  end loop;"
            "  raise exception 'nobody waits';"
            " end $$"
        )
