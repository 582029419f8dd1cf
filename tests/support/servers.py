"""PostgreSQL for the tests: temporary servers, databases cloned from a migrated template."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from pytest_postgresql.executors import NoopExecutor
from pytest_postgresql.janitor import DatabaseJanitor

from pgchannels.embedded import PORT, SUPERUSER, EmbeddedPostgres
from pgchannels.migrate import upgrade

MAX_CONNECTIONS = 300

MEMORY = Path("/dev/shm")
ROOM = 4 * 1024**3
"""What there must be free in memory, to keep servers there: each may need an eighth of that."""


@contextmanager
def server_directory(*, in_memory: bool = False) -> Iterator[Path]:
    """A temporary directory; pytest's are closed to the system user that runs the server.

    *in_memory* if there is room: a database has a thousand files, which a disk takes twenty times
    as long to make.
    """
    where = MEMORY if in_memory and _has_room(MEMORY) else None
    path = Path(tempfile.mkdtemp(prefix="pgchannels-test-", dir=where))
    try:
        path.chmod(0o711)
        yield path
    finally:
        shutil.rmtree(path)


def _has_room(path: Path) -> bool:
    return path.is_dir() and os.access(path, os.W_OK) and shutil.disk_usage(path).free >= ROOM


@contextmanager
def running_server(version: int, *, is_volatile: bool = False) -> Iterator[EmbeddedPostgres]:
    """A new server of that version, as in production; if *is_volatile*, one without the disk."""
    settings = {"max_connections": str(MAX_CONNECTIONS), "max_prepared_transactions": "10"}
    if is_volatile:
        settings |= {"fsync": "off", "full_page_writes": "off", "max_wal_size": "256MB"}
    with server_directory(in_memory=is_volatile) as directory:
        server = EmbeddedPostgres(directory, version=version, settings=settings)
        server.start()
        try:
            yield server
        finally:
            # Nothing in it is needed any longer, and no leftover session may hold the end up.
            server.stop("immediate")


def executor(server: EmbeddedPostgres) -> NoopExecutor:
    """The server, as pytest-postgresql knows servers that it has not started."""
    return NoopExecutor(
        host=str(server.socket_dir), port=PORT, user=SUPERUSER, options="", dbname="tests"
    )


@contextmanager
def template(server: EmbeddedPostgres, noproc: NoopExecutor) -> Iterator[str]:
    """A migrated template database."""
    janitor = _janitor(noproc, noproc.template_dbname, as_template=True)
    with janitor:
        janitor.load(lambda *, dbname, **_: upgrade(server.url(dbname)))
        yield noproc.template_dbname


@contextmanager
def fresh_database(noproc: NoopExecutor, *, template: str | None = None) -> Iterator[str]:
    """The name of a new database, dropped at the end with whoever is still connected."""
    name = f"test_{os.getpid()}_{uuid4().hex[:12]}"
    with _janitor(noproc, name, template=template):
        yield name


def _janitor(
    noproc: NoopExecutor, name: str, *, template: str | None = None, as_template: bool = False
) -> DatabaseJanitor:
    return DatabaseJanitor(
        host=noproc.host,
        port=noproc.port,
        user=noproc.user,
        dbname=name,
        template_dbname=template,
        as_template=as_template,
    )
