"""The migrations: up, down, side by side, as a script, under other names and with few rights."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Table

from pgchannels import ConfigurationError, DatabaseError, SchemaError, migrate
from pgchannels.bundled import bundled
from pgchannels.embedded import EmbeddedPostgres
from pgchannels.schema import NEEDED_REVISION, REVISIONS, VERSION_TABLE, followers, outbox
from pgchannels.settings import Settings
from tests.migrations.databases import (
    OBJECTS,
    THEIRS,
    column,
    dump,
    execute,
    publish_and_seal,
    refuse_leases,
    run_script,
)
from tests.support.processes import Processes

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in os.environ:
        if name.startswith("PGCHANNELS_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def alembic(*arguments: str, **environment: str) -> str:
    """Run Alembic's own command in the checkout."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-m", "alembic", *arguments],
        cwd=CHECKOUT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


class TestUpgrade:
    def test_from_nothing(self, empty_database_url: str) -> None:
        assert migrate.current(empty_database_url) is None
        assert migrate.is_behind(empty_database_url)
        migrate.upgrade(empty_database_url)
        assert migrate.current(empty_database_url) == NEEDED_REVISION
        assert not migrate.is_behind(empty_database_url)
        assert publish_and_seal(empty_database_url) == 1

    def test_again_changes_nothing(self, database_url: str, postgres: EmbeddedPostgres) -> None:
        publish_and_seal(database_url)
        before = dump(postgres, database_url)
        migrate.upgrade(database_url)
        assert dump(postgres, database_url) == before
        assert column(database_url, "select count(*) from pgchannels.messages") == [1]

    def test_to_a_revision_and_on(self, empty_database_url: str) -> None:
        for revision in REVISIONS:
            migrate.upgrade(empty_database_url, revision)
            assert migrate.current(empty_database_url) == revision

    def test_several_at_once(self, empty_database_url: str, processes: Processes) -> None:
        code = "import sys; from pgchannels.migrate import upgrade; upgrade(sys.argv[1])"
        started = [processes.start("-c", code, empty_database_url) for _ in range(8)]
        for process in started:
            assert process.wait(60) == 0, processes.output(process)
        assert column(
            empty_database_url, f"select version_num from pgchannels.{VERSION_TABLE}"
        ) == [NEEDED_REVISION]

    def test_what_fails_leaves_nothing(self, empty_database_url: str) -> None:
        refuse_leases(empty_database_url)
        before = sorted(column(empty_database_url, OBJECTS))
        with pytest.raises(DatabaseError, match="no leases here"):
            migrate.upgrade(empty_database_url)
        assert sorted(column(empty_database_url, OBJECTS)) == before
        assert migrate.current(empty_database_url) is None

    @pytest.mark.parametrize("statement", THEIRS)
    def test_not_into_a_schema_that_holds_something_else(
        self, empty_database_url: str, statement: str
    ) -> None:
        execute(empty_database_url, "create schema theirs")
        execute(empty_database_url, statement)
        settings = Settings(database_url=empty_database_url, schema_name="theirs")
        before = sorted(column(empty_database_url, OBJECTS))
        for change in (migrate.upgrade, lambda given: migrate.downgrade(given, "base")):
            with pytest.raises(
                ConfigurationError, match=r"not pgchannels' own: .*theirs\..*--schema"
            ):
                change(settings)
        assert sorted(column(empty_database_url, OBJECTS)) == before
        assert migrate.current(settings) is None

    @pytest.mark.parametrize("revision", ["0001", "0004", "a1b2c3"])
    def test_the_version_table_of_the_application_is_not_taken_for_ours(
        self, empty_database_url: str, revision: str
    ) -> None:
        execute(empty_database_url, "create table public.alembic_version (version_num text)")
        execute(empty_database_url, f"insert into public.alembic_version values ('{revision}')")
        settings = Settings(database_url=empty_database_url, schema_name="public")
        with pytest.raises(ConfigurationError, match=r"it holds table .*alembic_version"):
            migrate.upgrade(settings)
        assert migrate.current(settings) is None

    def test_into_a_schema_that_somebody_has_made_for_it(self, empty_database_url: str) -> None:
        execute(empty_database_url, "create schema pgchannels")
        migrate.upgrade(empty_database_url)
        assert publish_and_seal(empty_database_url) == 1


class TestDowngrade:
    def test_leaves_nothing(self, empty_database_url: str) -> None:
        before = sorted(column(empty_database_url, OBJECTS))
        migrate.upgrade(empty_database_url)
        assert publish_and_seal(empty_database_url) == 1
        migrate.downgrade(empty_database_url, "base")
        assert sorted(column(empty_database_url, OBJECTS)) == before
        assert migrate.current(empty_database_url) is None

    def test_and_up_again(self, database_url: str, postgres: EmbeddedPostgres) -> None:
        before = dump(postgres, database_url)
        migrate.downgrade(database_url, "base")
        migrate.upgrade(database_url)
        assert dump(postgres, database_url) == before

    @pytest.mark.parametrize("to", REVISIONS[1:-1])
    def test_of_a_revision_is_as_if_it_had_never_been(
        self, database_url: str, empty_database_url: str, postgres: EmbeddedPostgres, to: str
    ) -> None:
        """Definitions, settings of routines and privileges, which a dump has all."""
        execute(database_url, "create table watched (id int primary key)")
        execute(empty_database_url, "create table watched (id int primary key)")
        if to < "0003":  # before there was such a thing
            execute(database_url, "select pgchannels.watch('watched', 'room')")
        migrate.downgrade(database_url, to)
        migrate.upgrade(empty_database_url, to)
        assert dump(postgres, database_url) == dump(postgres, empty_database_url)

    def test_of_what_is_newer_is_refused(self, database_url: str) -> None:
        execute(database_url, "update pgchannels.alembic_version set version_num = '9999'")
        with pytest.raises(SchemaError) as raised:
            migrate.downgrade(database_url, "base")
        assert raised.value.newer


class TestAlembic:
    def test_not_into_a_schema_that_holds_something_else(self, empty_database_url: str) -> None:
        execute(empty_database_url, "create table public.messages_2025 (id int)")
        with pytest.raises(AssertionError, match="schema 'public' is not pgchannels' own"):
            alembic(
                "upgrade",
                "head",
                PGCHANNELS_DATABASE_URL=empty_database_url,
                PGCHANNELS_SCHEMA_NAME="public",
            )

    def test_with_the_environment(self, empty_database_url: str) -> None:
        alembic("upgrade", "head", PGCHANNELS_DATABASE_URL=empty_database_url)
        assert migrate.current(empty_database_url) == NEEDED_REVISION
        shown = alembic("current", PGCHANNELS_DATABASE_URL=empty_database_url)
        assert NEEDED_REVISION in shown

    def test_with_a_url(self, empty_database_url: str) -> None:
        url = empty_database_url.replace("postgresql://", "postgresql+asyncpg://")
        alembic("-x", f"url={url}", "upgrade", "head", PGCHANNELS_DATABASE_URL="postgresql://no/")
        assert migrate.current(empty_database_url) == NEEDED_REVISION
        alembic("-x", f"url={url}", "downgrade", "base")
        assert migrate.current(empty_database_url) is None

    def test_with_a_schema(self, empty_database_url: str) -> None:
        alembic("-x", f"url={empty_database_url}", "-x", "schema=other", "upgrade", "head")
        assert publish_and_seal(empty_database_url, "other") == 1
        assert migrate.current(empty_database_url) is None

    def test_asking_changes_nothing(self, empty_database_url: str) -> None:
        before = sorted(column(empty_database_url, OBJECTS))
        alembic("-x", f"url={empty_database_url}", "current")
        assert sorted(column(empty_database_url, OBJECTS)) == before


class TestScript:
    @pytest.mark.parametrize("schema", ["pgchannels", "other"])
    def test_makes_what_upgrade_makes(
        self, database_url: str, empty_database_url: str, postgres: EmbeddedPostgres, schema: str
    ) -> None:
        if schema != "pgchannels":
            migrate.downgrade(database_url, "base")
            migrate.upgrade(Settings(database_url=database_url, schema_name=schema))
        text = migrate.script(Settings(schema_name=schema))
        run_script(postgres, empty_database_url, text)
        assert dump(postgres, empty_database_url) == dump(postgres, database_url)
        settings = Settings(database_url=empty_database_url, schema_name=schema)
        assert migrate.current(settings) == NEEDED_REVISION
        assert publish_and_seal(empty_database_url, schema) == 1

    def test_is_what_alembic_writes(self) -> None:
        assert alembic("upgrade", "head", "--sql").strip() == migrate.script().strip()


class TestSchemas:
    def test_two_in_one_database(self, database_url: str) -> None:
        other = Settings(database_url=database_url, schema_name="other")
        assert migrate.is_behind(other)
        migrate.upgrade(other)
        assert publish_and_seal(database_url, "other") == 1
        assert column(database_url, "select count(*) from pgchannels.messages") == [0]
        migrate.downgrade(other, "base")
        assert publish_and_seal(database_url) == 1

    def test_the_functions_name_no_other(
        self, empty_database_url: str, postgres: EmbeddedPostgres
    ) -> None:
        migrate.upgrade(Settings(database_url=empty_database_url, schema_name="other"))
        assert "pgchannels." not in dump(postgres, empty_database_url)

    def test_the_longest_name(self, empty_database_url: str) -> None:
        name = "s" * 40
        migrate.upgrade(Settings(database_url=empty_database_url, schema_name=name))
        assert publish_and_seal(empty_database_url, name) == 1

    def test_a_word_of_sql(self, empty_database_url: str) -> None:
        settings = Settings(database_url=empty_database_url, schema_name="user")
        migrate.upgrade(settings)
        assert publish_and_seal(empty_database_url, "user") == 1
        migrate.downgrade(settings, "base")

    def test_the_hosts_alembic_is_left_alone(self, empty_database_url: str) -> None:
        execute(empty_database_url, "create table public.alembic_version (version_num text)")
        execute(empty_database_url, "insert into public.alembic_version values ('theirs')")
        migrate.upgrade(empty_database_url)
        migrate.downgrade(empty_database_url, "base")
        assert column(empty_database_url, "select * from public.alembic_version") == ["theirs"]

    def test_whatever_the_search_path(self, empty_database_url: str) -> None:
        (name,) = column(empty_database_url, "select current_database()")
        execute(empty_database_url, "create schema first")
        execute(empty_database_url, f'alter database "{name}" set search_path = first')
        migrate.upgrade(empty_database_url)
        objects = column(empty_database_url, OBJECTS)
        assert "schema first" in objects
        assert not [name for name in objects if "first." in name]
        assert publish_and_seal(empty_database_url) == 1


@pytest.fixture
def role(empty_database_url: str) -> Iterator[str]:
    """A role that may connect, and nothing else."""
    name = f"role_{uuid4().hex}"
    execute(empty_database_url, f"create role {name} login")
    try:
        yield name
    finally:
        execute(empty_database_url, f"drop owned by {name} cascade")
        execute(empty_database_url, f"drop role {name}")


class TestRights:
    def test_without_the_right_to_create_schemas(self, empty_database_url: str, role: str) -> None:
        url = empty_database_url.replace("postgresql://postgres@", f"postgresql://{role}@")
        with pytest.raises(Exception, match="permission denied"):
            migrate.upgrade(url)
        # An administrator makes the schema; the application's role does the rest.
        execute(empty_database_url, f"create schema pgchannels authorization {role}")
        migrate.upgrade(url)
        assert publish_and_seal(url) == 1

    def test_a_schema_of_another_owner(self, empty_database_url: str, role: str) -> None:
        url = empty_database_url.replace("postgresql://postgres@", f"postgresql://{role}@")
        execute(empty_database_url, "create schema pgchannels")
        execute(empty_database_url, f"grant all on schema pgchannels to {role}")
        migrate.upgrade(url)
        assert publish_and_seal(url) == 1

    def test_publishers_need_little(self, database_url: str) -> None:
        name = f"role_{uuid4().hex}"
        url = database_url.replace("postgresql://postgres@", f"postgresql://{name}@")
        execute(database_url, f"create role {name} login")
        try:
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                execute(url, "select pgchannels.publish('room', '{}')")
            execute(database_url, f"select pgchannels.grant_access('publisher', '{name}')")
            execute(url, "select pgchannels.publish('room', '{}')")
            execute(url, "insert into pgchannels.outbox (channel, payload) values ('a', '{}')")
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                execute(url, "delete from pgchannels.outbox")
        finally:
            execute(database_url, f"drop owned by {name} cascade")
            execute(database_url, f"drop role {name}")


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
def test_another_encoding_is_refused(postgres: EmbeddedPostgres, encoding: str) -> None:
    name = f"test_{uuid4().hex}"
    execute(
        postgres.url(),
        f"create database {name} encoding '{encoding}' locale 'C' template template0",
    )
    try:
        with pytest.raises(Exception, match="encoding UTF8"):
            migrate.upgrade(postgres.url(name))
        assert not [o for o in column(postgres.url(name), OBJECTS) if "pgchannels" in o]
    finally:
        execute(postgres.url(), f"drop database {name} with (force)")


def test_the_revisions_are_those_of_the_scripts() -> None:
    config = Config()
    config.set_main_option("script_location", str(bundled("migrations")))
    config.set_main_option("path_separator", "os")
    scripts = list(ScriptDirectory.from_config(config).walk_revisions())
    assert tuple(script.revision for script in reversed(scripts)) == REVISIONS


@pytest.mark.parametrize("describe", [outbox, followers])
def test_the_metadata_is_what_the_migrations_make(
    database_url: str, describe: Callable[[str], Table]
) -> None:
    table = describe("pgchannels")
    with psycopg.connect(database_url) as connection:
        rows = connection.execute(
            "select column_name, data_type, is_nullable, is_identity, column_default is not null"
            "  from information_schema.columns"
            " where table_schema = 'pgchannels' and table_name = %s",
            [table.name],
        ).fetchall()
    made = {row[0]: row[1:] for row in rows}
    types = {
        "BIGINT": "bigint",
        "INTEGER": "integer",
        "CHAR(32)": "uuid",
        "TEXT": "text",
        "JSON": "json",
        "ARRAY": "ARRAY",
        "DATETIME": "timestamp with time zone",
    }
    for described in table.columns:
        data_type, nullable, identity, _ = made[described.name]
        assert types[str(described.type)] == data_type, described.name
        assert described.nullable == (nullable == "YES"), described.name
        assert (described.identity is not None) == (identity == "YES"), described.name
    if table.name != "outbox":
        return
    # What a publisher does not fill in, the database does.
    for name in made.keys() - {described.name for described in table.columns}:
        _, nullable, _, has_default = made[name]
        assert nullable == "YES" or has_default, name
