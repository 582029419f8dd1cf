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


@contextmanager
def server_directory() -> Iterator[Path]:
    """A temporary directory; pytest's are closed to the system user that runs the server."""
    path = Path(tempfile.mkdtemp(prefix="pgchannels-test-"))
    try:
        path.chmod(0o711)
        yield path
    finally:
        shutil.rmtree(path)


@contextmanager
def running_server(version: int, **settings: str) -> Iterator[EmbeddedPostgres]:
    """A new server of that version; fsync is on, as in production, unless *settings* say not."""
    with server_directory() as directory:
        server = EmbeddedPostgres(
            directory,
            version=version,
            settings={"max_connections": str(MAX_CONNECTIONS), **settings},
        )
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
