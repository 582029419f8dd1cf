"""The command line, as its user sees it: exit codes, stdout, stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import psycopg
import pytest

from pgchannels import cli, migrate
from pgchannels.schema import NEEDED_REVISION
from pgchannels.settings import Settings


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs ``pgchannels <arguments>`` with no settings but those given."""
    monkeypatch.chdir(tmp_path)  # away from any .env
    monkeypatch.delenv("PGCHANNELS_DATABASE_URL", raising=False)

    def run(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["pgchannels", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        code = left.value.code
        return Result(code if isinstance(code, int) else 0, *capsys.readouterr())

    return run


@pytest.fixture
def connection(database_url: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(database_url, autocommit=True) as connection:
        yield connection


def value(connection: psycopg.Connection, query: str) -> object:
    row = connection.execute(query.encode()).fetchone()
    assert row is not None
    return row[0]


def assert_one_line(result: Result, code: int, *words: str) -> None:
    assert (result.code, result.out) == (code, "")
    assert result.err.startswith("pgchannels: ")
    assert result.err.count("\n") == 1
    for word in words:
        assert word in result.err


# --- migrate ---


def test_migrate_creates_the_schema_and_then_finds_it_up_to_date(
    run: Run, empty_database_url: str
) -> None:
    first = run("migrate", "--database-url", empty_database_url)
    assert (first.code, first.err) == (0, "")
    assert first.out == f"schema 'pgchannels' created, now at revision {NEEDED_REVISION}\n"
    assert not migrate.is_behind(empty_database_url)

    again = run("migrate", "--database-url", empty_database_url)
    assert (again.code, again.err) == (0, "")
    assert "is up to date" in again.out


def test_migrate_takes_the_url_from_the_environment_and_another_schema(
    run: Run, empty_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGCHANNELS_DATABASE_URL", empty_database_url)
    assert run("migrate", "--schema", "elsewhere").code == 0
    elsewhere = Settings(database_url=empty_database_url, schema_name="elsewhere")
    assert migrate.current(elsewhere) == NEEDED_REVISION
    assert migrate.current(empty_database_url) is None


def test_the_script_needs_no_database_and_does_what_migrate_does(
    run: Run, empty_database_url: str
) -> None:
    script = run("migrate", "--sql")
    assert (script.code, script.err) == (0, "")
    with psycopg.connect(empty_database_url, autocommit=True) as connection:
        connection.execute(script.out.encode())
    assert run("migrate", "--check", "--database-url", empty_database_url).code == 0


def test_check_fails_where_there_is_something_to_do_and_does_not_do_it(
    run: Run, empty_database_url: str
) -> None:
    result = run("migrate", "--check", "--database-url", empty_database_url)
    assert_one_line(result, 1, "has not been migrated", "pgchannels migrate")
    assert migrate.current(empty_database_url) is None


@pytest.mark.parametrize("options", [["migrate"], ["migrate", "--check"], ["prune"], ["followers"]])
def test_a_schema_of_a_newer_version_is_left_alone(
    run: Run, database_url: str, connection: psycopg.Connection, options: list[str]
) -> None:
    connection.execute("update pgchannels.alembic_version set version_num = '9999'")
    result = run(*options, "--database-url", database_url)
    assert_one_line(result, 1, "9999", "newer")
    assert migrate.current(database_url) == "9999"


def test_sql_and_check_exclude_each_other(run: Run) -> None:
    assert_one_line(run("migrate", "--sql", "--check"), 2, "exclude each other")


# --- prune ---


@pytest.fixture
def old_and_new(connection: psycopg.Connection) -> psycopg.Connection:
    """Five messages from a month ago, two that have expired, three of today."""
    publish = "select pgchannels.publish('a', '{}') from generate_series(1, %s)"
    connection.execute(publish, [5])
    connection.execute("select pgchannels.seal()")
    connection.execute("update pgchannels.messages set created_at = created_at - interval '30 d'")
    connection.execute("update pgchannels.batches set sealed_at = sealed_at - interval '30 d'")
    connection.execute(publish, [5])
    connection.execute("select pgchannels.seal()")
    connection.execute("update pgchannels.messages set expires_at = created_at where id in (6, 7)")
    return connection


COUNT = "select count(*) from pgchannels.messages"


def counts(result: Result) -> dict[str, int]:
    rows = (line.rsplit(maxsplit=1) for line in result.out.splitlines()[1:])
    return {label.strip(): int(count) for label, count in rows}


@pytest.mark.parametrize("dry_run", [True, False])
def test_prune_says_what_it_removes_and_a_dry_run_removes_nothing(
    run: Run, database_url: str, old_and_new: psycopg.Connection, dry_run: bool
) -> None:
    result = run("prune", "--database-url", database_url, *(["--dry-run"] if dry_run else []))
    assert (result.code, result.err) == (0, "")
    assert ("nothing was changed" in result.out) == dry_run
    found = counts(result)
    assert found["the log begins after id"] == 5
    assert found["messages deleted, past the retention"] == 5
    assert found["messages deleted, past their own time to live"] == 2
    assert value(old_and_new, COUNT) == (10 if dry_run else 3)


def test_the_retention_can_be_given(
    run: Run, database_url: str, old_and_new: psycopg.Connection
) -> None:
    assert run("prune", "--database-url", database_url, "--retention", "P60D").code == 0
    assert value(old_and_new, COUNT) == 8
    bad = run("prune", "--database-url", database_url, "--retention", "soon")
    assert_one_line(bad, 2, "retention")


def test_prune_fails_if_something_could_not_be_done(
    run: Run, database_url: str, connection: psycopg.Connection
) -> None:
    connection.execute("update pgchannels.log set partition_size = 2")
    connection.execute("select pgchannels.add_partitions(1000010)")
    connection.execute(
        "insert into pgchannels.batches (last_id, snapshot, sealed_at)"
        " values (1000000, pg_current_snapshot(), now() - interval '30 d'),"
        "        (1000001, pg_current_snapshot(), now())"
    )
    connection.execute("create view holds_it as select * from pgchannels.messages_1")
    result = run("prune", "--database-url", database_url)
    assert result.code == 1
    assert "messages_1" in result.err
    assert "the log begins after id" in result.out


def test_prune_wants_a_migrated_database(run: Run, empty_database_url: str) -> None:
    result = run("prune", "--database-url", empty_database_url)
    assert_one_line(result, 1, "has not been migrated", "pgchannels migrate")


# --- followers ---


def test_followers_are_shown_with_their_lag(
    run: Run, database_url: str, connection: psycopg.Connection
) -> None:
    nobody = run("followers", "--database-url", database_url)
    assert (nobody.code, nobody.out) == (0, "There are no followers.\n")
    connection.execute("select pgchannels.publish('a', '{}') from generate_series(1, 5)")
    connection.execute("select pgchannels.seal()")
    connection.execute(
        "insert into pgchannels.followers (name, channels, position, epoch, moved_at) values"
        " ('[bold]mail', '{a}', 2, 1, '2026-01-02 03:04:05Z'), ('billing', '{a,b}', 5, 1, now())"
    )
    connection.execute(
        "insert into pgchannels.leases values"
        " ('follower:billing', gen_random_uuid(), now() + interval '1 minute')"
    )
    result = run("followers", "--database-url", database_url)
    assert (result.code, result.err) == (0, "")
    heading, *rows = (line.split() for line in result.out.splitlines())
    assert heading == ["name", "position", "lag", "active", "moved"]
    assert [row[:4] for row in rows] == [
        ["[bold]mail", "1-2", "3", "no"],
        ["billing", "1-5", "0", "yes"],
    ]
    assert rows[0][4].startswith("2026-01-0")


# --- What can be wrong ---


@pytest.mark.parametrize("command", ["migrate", "prune", "followers"])
@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ([], 2, ["PGCHANNELS_DATABASE_URL"]),
        (["--database-url", "mysql://user:secret@host/db"], 2, ["postgresql://"]),
        (["--database-url", "postgresql://user:sec/ret@host/db"], 2, ["percent-encoded"]),
        (["--database-url", "postgresql://localhost:1/db"], 1, ["is not available"]),
        (["--database-url", "postgresql://localhost:1/db", "--schema", "No!"], 2, ["schema_name"]),
    ],
    ids=["no url", "not postgresql", "unreadable", "unreachable", "bad schema"],
)
def test_a_mistake_is_told_in_one_line(
    run: Run, command: str, options: list[str], code: int, words: list[str]
) -> None:
    result = run(command, *options)
    assert_one_line(result, code, *words)
    assert "sec" not in result.err


def test_what_the_server_refuses_is_told_in_one_line(
    run: Run, database_url: str, connection: psycopg.Connection
) -> None:
    missing = database_url.replace("/test_", "/no_test_")
    assert_one_line(run("migrate", "--database-url", missing), 1, "does not exist")

    connection.execute("drop role if exists only_a_guest")
    connection.execute("create role only_a_guest login")
    try:
        guest = database_url.replace("postgres@", "only_a_guest@")
        result = run("migrate", "--schema", "other", "--database-url", guest)
        assert_one_line(result, 1, "permission denied")
        assert "create schema" not in result.err
    finally:
        connection.execute("drop role only_a_guest")


def test_the_demo_names_what_is_wrong_with_a_database(run: Run, tmp_path: Path) -> None:
    url = "postgresql://localhost:1/db"
    assert_one_line(run("demo", "--database-url", url), 1, "is not available")
    both = run("demo", "--database-url", url, "--data-dir", str(tmp_path))
    assert_one_line(both, 2, "exclude each other")


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra_it_says_how_to_get_it(
    run: Run, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.delitem(sys.modules, "pgchannels.commands", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    assert_one_line(run("migrate"), 2, "pip install 'pgchannels[cli]'")


def test_help_and_version(run: Run) -> None:
    assert run("--version").out.startswith("pgchannels ")
    for command in ("migrate", "prune", "followers", "demo"):
        shown = run(command, "--help")
        assert shown.code == 0
        assert f"pgchannels {command}" in shown.out
