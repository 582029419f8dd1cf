"""The command line, as its user sees it: exit codes, stdout, stderr."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import asyncpg
import psycopg
import pytest
from sqlalchemy.engine import make_url

from pgchannels import PostgresLayer, cli, migrate
from pgchannels.embedded import EmbeddedPostgres
from pgchannels.schema import NEEDED_REVISION
from pgchannels.settings import Settings
from tests.support.eventually import eventually
from tests.support.processes import Processes


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]
Feed = Callable[[bytes], int]


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


def test_migrate_refuses_a_schema_that_holds_something_else(
    run: Run, empty_database_url: str
) -> None:
    with psycopg.connect(empty_database_url, autocommit=True) as connection:
        connection.execute("create table public.messages_2025 (id int)")
    refused = run("migrate", "--database-url", empty_database_url, "--schema", "public")
    assert_one_line(refused, 2, "schema 'public'", "messages_2025", "--schema")


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
    assert_one_line(result, 1, "has not been migrated", "Run: pgchannels migrate\n")
    assert migrate.current(empty_database_url) is None
    other = run("migrate", "--check", "--database-url", empty_database_url, "--schema", "other")
    assert_one_line(other, 1, "schema 'other'", "Run: pgchannels migrate --schema other\n")


@pytest.mark.parametrize(
    "options",
    [
        ["migrate"],
        ["migrate", "--check"],
        ["prune"],
        ["followers"],
        ["tail", "a"],
        ["grant", "node", "postgres"],
    ],
)
def test_a_schema_of_a_newer_version_is_left_alone(
    run: Run, database_url: str, connection: psycopg.Connection, options: list[str]
) -> None:
    connection.execute("update pgchannels.alembic_version set version_num = '9999'")
    connection.execute("update pgchannels.log set works_from = '9999'")
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
    assert result.out.splitlines()[0].endswith("schema 'pgchannels', messages are kept for P7D")
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


# --- grant ---


@pytest.fixture
def role(connection: psycopg.Connection) -> Iterator[str]:
    """A role that may log in, and nothing else."""
    name = f"shop_{uuid4().hex[:12]}"
    connection.execute(f"create role {name} login".encode())
    yield name
    connection.execute(f"drop owned by {name}".encode())
    connection.execute(f"drop role {name}".encode())


def as_role(database_url: str, role: str) -> str:
    return make_url(database_url).set(username=role).render_as_string(hide_password=False)


def test_a_role_is_granted_what_it_needs(run: Run, database_url: str, role: str) -> None:
    theirs = ("--database-url", as_role(database_url, role))
    for access in ("publisher", "publisher", "node"):
        granted = run("grant", access, role, "--database-url", database_url)
        assert granted == Result(0, f"role '{role}' is a {access} on schema 'pgchannels'\n", "")
        assert run("publish", "a", "{}", *theirs) == Result(0, "", "")
        assert run("publish", "a", "{}", "--header", "by=shop", *theirs) == Result(0, "", "")
        if access == "publisher":
            refused = run("tail", "a", *theirs)
            assert_one_line(refused, 1, f"As its owner, run: pgchannels grant node {role}\n")
    assert run("tail", "a", *theirs).out.count("\n") == 6


@pytest.mark.parametrize(
    ("command", "needed"),
    [
        ("publish a {}", "As its owner, run: pgchannels grant publisher"),
        ("tail a", "As its owner, run: pgchannels grant node"),
        ("tail a --follow", "As its owner, run: pgchannels grant node"),
        ("followers", "As its owner, run: pgchannels grant node"),
        ("migrate --check", "As its owner, run: pgchannels grant node"),
        ("prune --dry-run", "As its owner, run: pgchannels grant node"),
        ("prune", "As a superuser, run: pgchannels grant maintainer"),
    ],
)
@pytest.mark.parametrize("schema", ["pgchannels", "other"])
def test_who_may_not_is_told_what_is_needed(
    run: Run,
    database_url: str,
    connection: psycopg.Connection,
    role: str,
    command: str,
    needed: str,
    schema: str,
) -> None:
    option = ""
    if schema != "pgchannels":
        connection.execute(f"alter schema pgchannels rename to {schema}".encode())
        option = f" --schema {schema}"
    theirs = ("--database-url", as_role(database_url, role), "--schema", schema)
    result = run(*command.split(), *theirs)
    start = f"pgchannels: role '{role}' may not do this on schema '{schema}': "
    assert result.err.startswith(start)
    assert_one_line(result, 1, f". {needed} {role}{option}\n")


def test_lines_of_input_that_are_refused_are_named(
    run: Run, database_url: str, role: str, feed: Feed
) -> None:
    feed(b"{}\n{}\n")
    result = run("publish", "a", "-", "--database-url", as_role(database_url, role))
    assert_one_line(result, 1, "lines 1 to 2", f"pgchannels grant publisher {role}")


def test_only_an_owner_prunes_and_others_remove_nothing(
    run: Run, database_url: str, old_and_new: psycopg.Connection, role: str
) -> None:
    assert run("grant", "node", role, "--database-url", database_url).code == 0
    theirs = ("--database-url", as_role(database_url, role))
    result = run("prune", *theirs)
    assert_one_line(
        result, 1, f"role '{role}' is no maintainer", f"run: pgchannels grant maintainer {role}"
    )
    assert value(old_and_new, COUNT) == 10
    assert value(old_and_new, "select floor from pgchannels.bounds") == 0
    rehearsed = run("prune", "--dry-run", *theirs)
    assert counts(rehearsed)["the log begins after id"] == 5


def test_what_cannot_be_granted_is_told(run: Run, database_url: str, role: str) -> None:
    url = ("--database-url", database_url)
    assert_one_line(run("grant", "node", "nobody at all", *url), 1, "does not exist")
    assert_one_line(run("grant", "maintainer", role, *url), 1, "is a superuser")
    theirs = ("--database-url", as_role(database_url, role))
    refused = run("grant", "node", role, *theirs)
    assert_one_line(refused, 1, f"role '{role}' may not", "Only the schema's owner may grant")
    assert run("grant", "king", role, *url).code == 2


def test_a_maintainer_is_a_member_of_the_owner(
    run: Run, empty_database_url: str, connection: psycopg.Connection, role: str
) -> None:
    owner = f"owner_{uuid4().hex[:12]}"
    connection.execute(f"create role {owner} login".encode())
    with psycopg.connect(empty_database_url, autocommit=True) as superuser:
        try:
            database = superuser.info.dbname
            superuser.execute(f"grant create on database {database} to {owner}".encode())
            assert run("migrate", "--database-url", as_role(empty_database_url, owner)).code == 0
            # A role cannot make others members of itself, unless it was given the option to.
            assert run("grant", "maintainer", role, "--database-url", empty_database_url).code == 0
            assert run("prune", "--database-url", as_role(empty_database_url, role)).code == 0
        finally:
            superuser.execute(f"drop owned by {owner} cascade".encode())
            superuser.execute(f"drop role {owner}".encode())


# --- publish ---


def published(connection: psycopg.Connection) -> list[tuple[str, str]]:
    rows = connection.execute("select channel, payload::text from pgchannels.outbox order by id")
    return rows.fetchall()


def test_a_payload_is_published_to_the_letter(
    run: Run, database_url: str, connection: psycopg.Connection
) -> None:
    text = '{"n": 12345678901234567890.10,  "n": "\N{SNOWMAN}"}'
    assert run("publish", "room:1", text, "--database-url", database_url) == Result(0, "", "")
    assert published(connection) == [("room:1", text)]


def test_a_message_has_the_headers_and_the_lifetime_that_were_given(
    run: Run, database_url: str, connection: psycopg.Connection
) -> None:
    options = ["--header", "a=b=c", "--header", "d=", "--ttl", "60", "--database-url", database_url]
    assert run("publish", "a", "{}", *options).code == 0
    row = connection.execute(
        "select headers, expires_at - created_at between '59 s' and '61 s' from pgchannels.outbox"
    ).fetchone()
    assert row == ({"a": "b=c", "d": ""}, True)


async def test_nodes_are_told(database_url: str, processes: Processes) -> None:
    settings = Settings(database_url=database_url, poll_interval=600, outbox_poll_interval=600)
    async with PostgresLayer(settings) as layer, layer.subscribe("a") as messages:
        await eventually(lambda: layer.is_listening)
        process = processes.start(*COMMAND, "publish", "a", '{"n": 1}', env=env(database_url))
        async with asyncio.timeout(30):
            assert (await anext(messages))["n"] == 1
        assert await asyncio.to_thread(process.wait, 30) == 0


@pytest.fixture
def feed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Feed]:
    """Makes these bytes the standard input."""
    path = tmp_path / "input"
    path.touch()
    with path.open("rb") as file:
        monkeypatch.setattr(sys, "stdin", file)
        yield path.write_bytes


def test_lines_of_input_are_published_in_batches(
    run: Run,
    database_url: str,
    connection: psycopg.Connection,
    feed: Feed,
) -> None:
    lines = [b'{"n":%d}' % n for n in range(2500)]
    lines.insert(7, b"")
    lines.insert(9, b" \t\r")
    feed(b"\r\n".join(lines))
    assert run("publish", "a", "-", "--database-url", database_url) == Result(0, "", "")
    assert [json.loads(text)["n"] for _, text in published(connection)] == [*range(2500)]
    assert value(connection, "select count(distinct xid) from pgchannels.outbox") == 3


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (b"oops", "not JSON"),
        (b"[1]", "must be a JSON object, not an array"),
        (b'{"a": "\xff"}', "not JSON"),
        (b'{"a": 1} {"b": 2}', "not JSON"),
        (b'{"a": "%s"}' % (b"x" * 1024 * 1024), "1048585 bytes"),
    ],
    ids=["not json", "not an object", "not utf-8", "two objects", "too large"],
)
def test_a_bad_line_is_named_and_nothing_of_its_batch_is_published(
    run: Run,
    database_url: str,
    connection: psycopg.Connection,
    feed: Feed,
    bad: bytes,
    words: str,
) -> None:
    feed(b"{}\n" * 1499 + bad + b"\n" + b"{}\n" * 1000)
    result = run("publish", "a", "-", "--database-url", database_url)
    assert_one_line(result, 1, "line 1500:", words, "nothing from line 1001 on has been published")
    assert len(published(connection)) == 1000


def test_a_line_without_an_end_is_refused_before_memory_runs_out(
    run: Run, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Path("/dev/zero").open("rb") as endless:
        monkeypatch.setattr(sys, "stdin", endless)
        result = run("publish", "a", "-", "--database-url", database_url)
    assert_one_line(result, 1, "line 1 has more than")


def test_input_that_is_closed_is_told(database_url: str) -> None:
    ended = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", sys.executable, *COMMAND, "publish", "a", "-"],
        env=env(database_url),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    told = "pgchannels: there is no standard input: it is closed\n"
    assert (ended.returncode, ended.stderr) == (2, told)


async def test_input_that_pauses_is_not_held_back(
    database_url: str, connection: psycopg.Connection
) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *(*COMMAND, "publish", "a", "-"),
        stdin=asyncio.subprocess.PIPE,
        env=env(database_url),
    )
    assert process.stdin is not None
    for count in range(1, 4):
        process.stdin.write(b'{"n": 1}\n')
        await eventually(lambda count=count: len(published(connection)) == count, timeout=30)  # type: ignore[misc]
    process.stdin.close()
    async with asyncio.timeout(30):
        assert await process.wait() == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a b", "{}"], "invalid channel name"),
        (["pgchannels:x", "{}"], "reserved"),
        (["a", "{"], "not JSON"),
        (["a", "null"], "must be a JSON object, not null"),
        (["a", "{}", "--ttl", "0"], "invalid ttl"),
        (["a", "-", "--ttl", "0"], "invalid ttl"),
        (["a", "{}", "--header", "x"], "NAME=VALUE"),
        (["a", "{}", "--header", "pgchannels-only=x"], "reserved"),
        (["{}"], "give a CHANNEL and a PAYLOAD"),
        (["a", "{}", "--user", "42"], "PAYLOAD alone"),
        (["{}", "--user", "42", "--everyone"], "PAYLOAD alone"),
        (["{}", "--user", ""], "1 to 1000 characters"),
        (["a", "--everyone"], "not JSON"),
    ],
)
def test_what_cannot_be_published_is_told(
    run: Run, database_url: str, connection: psycopg.Connection, arguments: list[str], words: str
) -> None:
    assert_one_line(run("publish", *arguments, "--database-url", database_url), 2, words)
    assert published(connection) == []


def test_users_and_everyone(
    run: Run, database_url: str, connection: psycopg.Connection, role: str
) -> None:
    theirs = ("--database-url", as_role(database_url, role))
    run("grant", "publisher", role, "--database-url", database_url)
    assert run("publish", "--everyone", '{"n": 1}', *theirs) == Result(0, "", "")
    refused = run("publish", "--user", "a:b", '{"n": 2}', *theirs)
    assert_one_line(refused, 1, f"run: pgchannels grant publisher {role} --to-users")
    granted = run("grant", "publisher", role, "--to-users", "--database-url", database_url)
    assert granted.code == 0
    assert run("publish", '{"n": 2}', "--user", "a:b", *theirs) == Result(0, "", "")
    assert published(connection) == [
        ("pgchannels:everyone", '{"n": 1}'),
        ("pgchannels:user:a%3Ab", '{"n": 2}'),
    ]
    other = run("grant", "node", role, "--to-users", "--database-url", database_url)
    assert_one_line(other, 2, "--to-users is for a publisher")


def test_publishing_wants_a_migrated_database(run: Run, empty_database_url: str) -> None:
    result = run("publish", "a", "{}", "--database-url", empty_database_url)
    assert_one_line(result, 1, "has not been migrated", "pgchannels migrate")


# --- tail ---

COMMAND = ("-c", "from pgchannels.cli import main; main()")


def env(database_url: str) -> dict[str, str]:
    return {**os.environ, "PGCHANNELS_DATABASE_URL": database_url}


@pytest.fixture
def thirty(connection: psycopg.Connection) -> None:
    """Messages 1 to 30, on "a" and "b" by turns. No node is running, and nothing is sealed."""
    connection.execute(
        "select pgchannels.publish(case n % 2 when 1 then 'a' else 'b' end,"
        " json_build_object('n', n, 'text', repeat('x', 100))) from generate_series(1, 30) n"
    )


def numbers(out: str) -> list[int]:
    return [json.loads(line.split("  ", 3)[3])["n"] for line in out.splitlines()]


@pytest.mark.usefixtures("thirty")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["a", "b"], [*range(21, 31)]),
        (["a", "a"], [*range(11, 30, 2)]),
        (["a", "b", "--limit", "3"], [28, 29, 30]),
        (["a", "b", "--limit", "100"], [*range(1, 31)]),
        (["a", "b", "--after", "0"], [*range(1, 31)]),
        (["b", "--after", "0", "--limit", "2"], [2, 4]),
        (["b", "--after", "1-27"], [28, 30]),
        (["b", "--after", "1-30"], []),
        (["a", "b", "--since", "2020-01-01", "--limit", "2"], [1, 2]),
        (["a", "b", "--since", "2020-01-01T00:00:00Z"], [*range(1, 31)]),
        (["a", "b", "--since", "2200-01-01"], []),
        (["c"], []),
    ],
)
def test_tail_prints_what_is_there(
    run: Run,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    expected: list[int],
) -> None:
    # Several pages: of seven messages forwards, and backwards of as many as this has room for.
    monkeypatch.setenv("PGCHANNELS_PAGE_SIZE", "7")
    monkeypatch.setenv("PGCHANNELS_PAGE_BYTES", "1024")
    result = run("tail", *arguments, "--database-url", database_url)
    assert (result.code, result.err) == (0, "")
    assert numbers(result.out) == expected


def test_a_line_is_for_people_and_one_of_json_for_programs(
    run: Run, database_url: str, connection: psycopg.Connection
) -> None:
    """One line each, whatever is in the text; and nothing that a terminal obeys or hides."""
    connection.execute("select pgchannels.publish('a', E'{\n\"x\":\r\n\"\u009b31m\"}')")
    line = run("tail", "a", "--database-url", database_url).out
    time, position, channel, payload = line.removesuffix("\n").split("  ", 3)
    assert time.endswith("Z")
    assert (position, channel, payload) == ("1-1", "a", '{ "x": "\\u009b31m"}')
    line = run("tail", "a", "--json", "--database-url", database_url).out
    assert line.count("\n") == 1
    assert "\u009b" not in line
    envelope = json.loads(line)
    assert (envelope["id"], envelope["channel"]) == (1, "a")
    assert envelope["data"] == {"x": "\u009b31m"}


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize(
    "hidden",
    ["\u0085", "\u202e", "\u2066", "\u200b", "\u2028", "\ufeff", "\xad", "\U000e0041"],
)
def test_a_character_that_a_terminal_would_obey_or_hide_is_shown_as_an_escape(
    run: Run, database_url: str, connection: psycopg.Connection, hidden: str, as_json: bool
) -> None:
    connection.execute("select pgchannels.publish('a', %s)", [f'{{"x": "é{hidden}😀"}}'])
    line = run("tail", "a", *["--json"] * as_json, "--database-url", database_url).out
    assert hidden not in line
    payload = json.loads(line)["data"] if as_json else json.loads(line.split("  ", 3)[3])
    assert payload == {"x": f"é{hidden}😀"}
    assert "é" in line


def test_tail_says_what_has_been_removed(
    run: Run, database_url: str, old_and_new: psycopg.Connection
) -> None:
    assert run("prune", "--database-url", database_url).code == 0
    gone = run("tail", "a", "--after", "1-2", "--database-url", database_url)
    assert gone.code == 0
    assert gone.err == "pgchannels: messages from there on have been removed already\n"
    assert len(gone.out.splitlines()) == 3
    assert run("tail", "a", "--after", "0", "--database-url", database_url).err == ""


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["a b"], 2, "invalid channel name"),
        (["a", "--after", "x"], 2, "invalid position"),
        (["a", "--after", "1-7"], 1, "has never reached"),
        (["a", "--after", "1-7", "-f"], 1, "has never reached"),
        (["a", "--since", "tomorrow"], 2, "ISO 8601"),
        (["a", "--since", "0001-01-01", "--after", "0"], 2, "exclude each other"),
        (["a", "--after", "0", "--limit", "1", "-f"], 2, "--limit"),
    ],
)
def test_what_tail_cannot_do_is_told(
    run: Run, database_url: str, arguments: list[str], code: int, words: str
) -> None:
    assert_one_line(run("tail", *arguments, "--database-url", database_url), code, words)


@pytest.mark.usefixtures("thirty")
def test_a_role_that_may_only_read_can_tail(
    run: Run, database_url: str, connection: psycopg.Connection, role: str
) -> None:
    connection.execute(f"grant pg_read_all_data to {role}".encode())
    theirs = ("--database-url", as_role(database_url, role))
    assert run("tail", "a", *theirs) == Result(0, "", "")
    connection.execute("select pgchannels.seal()")
    assert len(run("tail", "a", *theirs).out.splitlines()) == 10


def test_a_reader_that_closes_the_pipe_ends_it_silently(
    database_url: str, connection: psycopg.Connection
) -> None:
    connection.execute(
        "select pgchannels.publish('a', json_build_object('text', repeat('x', 1000)))"
        " from generate_series(1, 2000)"
    )
    command = [sys.executable, *COMMAND, "tail", "a", "--after", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env(database_url)
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert (process.wait(30), process.stderr.read()) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full device")
@pytest.mark.parametrize(
    "arguments", [("tail", "a", "--after", "0"), ("tail", "a"), ("migrate", "--sql")], ids=str
)
def test_an_output_that_takes_no_more_is_told(
    database_url: str, connection: psycopg.Connection, arguments: tuple[str, ...]
) -> None:
    connection.execute("select pgchannels.publish('a', '{}')")
    connection.execute("select pgchannels.seal()")
    with Path("/dev/full").open("wb") as full:
        result = subprocess.run(
            [sys.executable, *COMMAND, *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            env=env(database_url),
            check=False,
        )
    assert result.stderr == b"pgchannels: No space left on device\n"
    assert result.returncode == 1


@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
async def test_follow_goes_on_until_it_is_ended(
    database_url: str,
    connection: psycopg.Connection,
    processes: Processes,
    sent: signal.Signals,
    code: int,
) -> None:
    """No node is running: what is published shows up all the same, and soon."""
    process = processes.start(*COMMAND, "tail", "a", "--follow", env=env(database_url))
    for count in range(1, 4):
        publish_number(database_url, count)
        await printed(processes, process, count)
    process.send_signal(sent)
    assert await asyncio.to_thread(process.wait, 30) == code
    assert numbers(processes.output(process)) == [1, 2, 3]
    # Nobody has to wait for what it held.
    assert value(connection, "select count(*) from pgchannels.leases") == 0


async def test_follow_goes_on_after_a_restart(
    own_server: EmbeddedPostgres, processes: Processes
) -> None:
    url = own_server.url()
    process = processes.start(*COMMAND, "tail", "a", "--after", "0", "-f", env=env(url))
    publish_number(url, 1)
    await printed(processes, process, 1)
    await asyncio.to_thread(own_server.restart, "fast")
    publish_number(url, 2)
    await printed(processes, process, 2)
    process.send_signal(signal.SIGINT)
    assert await asyncio.to_thread(process.wait, 30) == 130


def publish_number(url: str, number: int) -> None:
    with psycopg.connect(url) as connection:
        connection.execute(
            "select pgchannels.publish('a', json_build_object('n', %s::integer))", [number]
        )


async def printed(processes: Processes, process: subprocess.Popen[bytes], count: int) -> None:
    """So many messages; warnings are in the same file."""
    await eventually(lambda: processes.output(process).count('{"n"') == count, timeout=30)


async def test_it_is_no_node(database_url: str, processes: Processes) -> None:
    process = processes.start(*COMMAND, "tail", "a", "-f", env=env(database_url))
    publish_number(database_url, 1)
    await printed(processes, process, 1)
    connection = await asyncpg.connect(database_url)
    try:
        assert await connection.fetchval("select count(*) from pgchannels.nodes") == 0
        assert await connection.fetchval("select count(*) from pgchannels.channels") == 0
    finally:
        await connection.close()


# --- What can be wrong ---


@pytest.mark.parametrize(
    "command",
    ["migrate", "prune", "followers", "publish a {}", "tail a", "tail a -f", "grant node postgres"],
)
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
    result = run(*command.split(), *options)
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
        assert_one_line(
            result, 1, "role 'only_a_guest' may not", "permission denied", "Its owner may"
        )
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
    for command in ("migrate", "prune", "followers", "grant", "publish", "tail", "demo"):
        shown = run(command, "--help")
        assert shown.code == 0
        assert f"pgchannels {command}" in shown.out
