"""An application with an Alembic history of its own, driven by Alembic's command line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from pgchannels import migrate
from pgchannels.embedded import EmbeddedPostgres
from pgchannels.schema import NEEDED_REVISION
from tests.migrations.databases import OBJECTS, column, dump, execute, run_script

pytestmark = pytest.mark.slow

HOST = Path(__file__).parent / "host"

# env.py as it stands, without what is optional in it, and where it looks into all schemas.
OPTION = r'^    "transaction_per_migration": True,.*\n'
VARIANTS = {
    "as documented": (r"^", ""),
    "one transaction": (OPTION, ""),
    "all schemas": (
        OPTION,
        '    "include_schemas": True,\n    "include_name": pgchannels.alembic.include_name,\n',
    ),
}


class Host:
    """A copy of the application, to write revisions into."""

    def __init__(self, directory: Path, url: str) -> None:
        self.directory = directory
        self.url = url

    def alembic(self, *arguments: str) -> str:
        """Run a command; what it has written, warnings being errors."""
        result = subprocess.run(
            [sys.executable, "-W", "error", "-m", "alembic", *arguments],
            cwd=self.directory,
            env={**os.environ, "DATABASE_URL": self.url.replace(":", "+psycopg:", 1)},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return shutil.copytree(
        HOST, tmp_path / "host", ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True
    )


@pytest.fixture
def host(directory: Path, empty_database_url: str) -> Host:
    return Host(directory, empty_database_url)


@pytest.mark.parametrize(("part", "instead"), VARIANTS.values(), ids=VARIANTS)
def test_upgrade_and_what_follows(host: Host, part: str, instead: str) -> None:
    env = host.directory / "migrations" / "env.py"
    text, found = re.subn(part, instead, env.read_text("utf-8"), count=1, flags=re.MULTILINE)
    assert found == 1
    env.write_text(text, "utf-8")

    host.alembic("upgrade", "head")
    assert "c90b (head)" in host.alembic("current")
    assert migrate.current(host.url) == NEEDED_REVISION

    assert "No new upgrade operations detected" in host.alembic("check")
    host.alembic("revision", "--autogenerate", "-m", "empty", "--rev-id", "ffff")
    (written,) = (host.directory / "migrations" / "versions").glob("ffff_*.py")
    bodies = re.findall(r"^def \w+\(\) -> None:\n((?:    .*\n)+)", written.read_text("utf-8"), re.M)
    assert [re.findall(r"^    (?!#)(.+)", body, re.M) for body in bodies] == [["pass"], ["pass"]]
    written.unlink()

    with psycopg.connect(host.url, autocommit=True) as connection:
        connection.execute("insert into customers values (7, 'Ada')")
        connection.execute("insert into orders values (1, 7, 'new', 9.5)")
        connection.execute("update orders set status = 'paid'")
        connection.execute("update orders set note = 'fragile'")
        connection.execute("select pgchannels.seal()")
        published = connection.execute(
            "select channel, payload ->> 'type', payload -> 'new' ->> 'status'"
            "  from pgchannels.messages order by id"
        ).fetchall()
    assert published == [
        ("orders:7", "orders.inserted", "new"),
        ("orders:7", "orders.updated", "paid"),
    ]


def test_up_again_and_down(host: Host, postgres: EmbeddedPostgres) -> None:
    host.alembic("upgrade", "head")
    before = dump(postgres, host.url)
    host.alembic("upgrade", "head")
    assert dump(postgres, host.url) == before

    host.alembic("downgrade", "-2")
    assert "c90b" not in host.alembic("current")
    assert "schema pgchannels" not in column(host.url, OBJECTS)
    host.alembic("upgrade", "head")
    execute(host.url, "insert into customers values (7, 'Ada')")
    execute(host.url, "insert into orders values (1, 7, 'new', 9.5)")
    assert column(host.url, "select sealed from pgchannels.seal()") == [1]

    host.alembic("downgrade", "base")
    assert [each for each in column(host.url, OBJECTS) if each.startswith("r ")] == [
        "r alembic_version"
    ]
    assert not [each for each in column(host.url, OBJECTS) if "pgchannels" in each]


def test_as_a_script(
    directory: Path, database_url: str, empty_database_url: str, postgres: EmbeddedPostgres
) -> None:
    # The database that has been migrated is one where `pgchannels migrate` has come before.
    online, offline = Host(directory, database_url), Host(directory, empty_database_url)
    online.alembic("upgrade", "head")
    run_script(postgres, offline.url, offline.alembic("upgrade", "head", "--sql"))
    assert dump(postgres, offline.url) == dump(postgres, online.url)
    assert "No new upgrade operations detected" in offline.alembic("check")

    online.alembic("downgrade", "base")
    run_script(postgres, offline.url, offline.alembic("downgrade", "head:base", "--sql"))
    assert dump(postgres, offline.url) == dump(postgres, online.url)
    assert "pgchannels" not in dump(postgres, offline.url)
