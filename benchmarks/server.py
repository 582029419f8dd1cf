"""The PostgreSQL that is measured on: one of our own, or one that was named; databases in it."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import asyncpg

from pgchannels.embedded import EmbeddedPostgres
from pgchannels.migrate import upgrade

__all__ = ["Server", "embedded_server", "named_server"]

# fsync and synchronous_commit stay on. Room for the WAL keeps checkpoints out of the short runs,
# where they would hit one variant and spare another.
SETTINGS = {"max_connections": "200", "shared_buffers": "256MB", "max_wal_size": "8GB"}


@dataclass(frozen=True)
class Server:
    """A server on which databases may be created and dropped."""

    url: str
    bin_path: Path
    """Where ``pgbench`` is."""

    @asynccontextmanager
    async def database(self, *, settings: dict[str, str] | None = None) -> AsyncIterator[str]:
        """The URL of a new, migrated database. *settings* hold for all sessions in it."""
        name = f"pgchannels_bench_{uuid4().hex[:12]}"
        await self._execute(f'create database "{name}"')
        try:
            for parameter, value in (settings or {}).items():
                await self._execute(f"alter database \"{name}\" set {parameter} = '{value}'")
            url = urlunsplit(urlsplit(self.url)._replace(path=f"/{name}"))
            await asyncio.to_thread(upgrade, url)
            yield url
        finally:
            await self._execute(f'drop database "{name}" with (force)')

    async def facts(self) -> dict[str, object]:
        """The version, and the parameters that are not at their defaults."""
        connection = await asyncpg.connect(self.url)
        try:
            version: str = await connection.fetchval("select version()")
            rows = await connection.fetch(
                "select name, current_setting(name) as value from pg_settings"
                " where source not in ('default', 'override', 'client', 'session')"
                " or name in ('fsync', 'synchronous_commit') order by name"
            )
        finally:
            await connection.close()
        private = ("unix_socket_directories", "data_directory", "port", "log_timezone", "TimeZone")
        settings = {row["name"]: row["value"] for row in rows if row["name"] not in private}
        return {"postgresql": version, "settings": settings}

    async def _execute(self, statement: str) -> None:
        connection = await asyncpg.connect(self.url)
        try:
            await connection.execute(statement)
        finally:
            await connection.close()


@contextmanager
def embedded_server() -> Iterator[Server]:
    """A new server in a temporary directory, removed in the end."""
    directory = Path(tempfile.mkdtemp(prefix="pgchannels-bench-"))
    try:
        # mkdtemp() keeps others out, and root's server runs as a system user.
        directory.chmod(0o711)
        with EmbeddedPostgres(directory, settings=SETTINGS) as server:
            yield Server(server.url(), server.bin_path)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def named_server(url: str) -> Iterator[Server]:
    """The server behind *url*, whose user must be a superuser (for ``commit_delay``)."""
    yield Server(url, EmbeddedPostgres("unused").bin_path)
