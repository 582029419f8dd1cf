"""Bring the schema to the revision that this version of pgchannels works on.

Runs the migrations that are packaged with it through Alembic, with a version table of their own
inside the schema: they meet neither the host application's migrations nor its version table.

The functions block, and run an event loop of their own: call them from a script or a thread.
"""

from __future__ import annotations

import asyncio
import io
import logging
import time
from typing import TYPE_CHECKING, Any, TypeVar

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, inspect, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from pgchannels.backoff import Backoff
from pgchannels.bundled import bundled
from pgchannels.connections import connect
from pgchannels.errors import DatabaseError, SchemaError
from pgchannels.revisions import is_ours
from pgchannels.schema import NEEDED_REVISION, REVISIONS, VERSION_TABLE, check_revision
from pgchannels.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "check",
    "current",
    "downgrade",
    "is_behind",
    "run_in_transaction",
    "script",
    "upgrade",
]

logger = logging.getLogger("pgchannels.migrate")

T = TypeVar("T")

# Seconds that a migration goes on trying to get its locks in.
_PATIENCE = 60.0
_LOCK_NOT_AVAILABLE = "55P03"


def upgrade(settings: Settings | str, revision: str = "head") -> None:
    """Migrate up. Safe to run in several processes at once, again, and beside running nodes.

    It does not wait for long for a lock, because publishers would have to wait behind it: it gives
    up what it has, and tries again, for a minute. A schema that a newer version has migrated, and
    which this one works on, is left as it is. The limit of the database for messages is raised to
    ``max_message_size``, if it is lower.

    Raises:
        ConfigurationError: the schema holds something else already: it is not pgchannels' own.
        SchemaError: a newer version of pgchannels has migrated this database.
        DatabaseError: PostgreSQL refused, or cannot be reached.
    """
    resolved = _settings(settings)
    found, works_from = _found(resolved)
    if found is not None and found not in REVISIONS:
        check_revision(resolved.schema_name, found, works_from)
        return
    _patiently(lambda: _run_command(resolved, lambda config: command.upgrade(config, revision)))
    if revision in ("head", NEEDED_REVISION):
        _patiently(lambda: run_in_transaction(resolved, lambda c: _raise_limit(c, resolved)))


def downgrade(settings: Settings | str, revision: str) -> None:
    """Migrate down; to ``"base"`` removes everything, messages included.

    Raises:
        SchemaError: only the newer version of pgchannels that has migrated it can undo that.
        DatabaseError: PostgreSQL refused, or cannot be reached.
    """
    resolved = _settings(settings)
    found, _ = _found(resolved)
    if found is not None and found not in REVISIONS:
        raise SchemaError(resolved.schema_name, found, NEEDED_REVISION, newer=True)
    _patiently(lambda: _run_command(resolved, lambda config: command.downgrade(config, revision)))


def script(settings: Settings | str | None = None) -> str:
    """The SQL that ``upgrade()`` would run on a database without the schema."""
    output = io.StringIO()
    config = _config(_settings(settings), output_buffer=output)
    command.upgrade(config, "head", sql=True)
    return output.getvalue()


def current(settings: Settings | str) -> str | None:
    """The revision of the database; None if it has not been migrated."""
    found, _ = _found(_settings(settings))
    return found


def check(settings: Settings | str) -> None:
    """Raise :class:`~pgchannels.SchemaError` if this version does not work on the database."""
    resolved = _settings(settings)
    check_revision(resolved.schema_name, *_found(resolved))


def is_behind(settings: Settings | str) -> bool:
    """Whether ``upgrade()`` has something to do."""
    found = current(settings)
    return found is None or found in REVISIONS[:-1]


def _found(settings: Settings) -> tuple[str | None, str | None]:
    """The revision of the database, and since which one code works on it, if that is said."""
    schema = settings.schema_name

    def read(connection: Connection) -> tuple[str | None, str | None]:
        if not connection.scalar(text(f"select {is_ours(schema)}")):
            return None, None
        found = connection.scalar(text(f'select version_num from "{schema}".{VERSION_TABLE}'))
        if found is None or found in REVISIONS:
            return found, None
        columns = {
            column["name"] for column in inspect(connection).get_columns("log", schema=schema)
        }
        if "works_from" not in columns:
            return found, None
        return found, connection.scalar(text(f'select works_from from "{schema}".log'))

    return run_in_transaction(settings, read)


def _raise_limit(connection: Connection, settings: Settings) -> None:
    """Let the database take messages that are as large as the settings allow. Never lower it."""
    schema, wanted = settings.schema_name, settings.max_message_size
    limit = connection.scalar(text(f'select max_message_size from "{schema}".log'))
    if limit < wanted:
        connection.execute(text(f'select "{schema}".limit_messages({wanted})'))


def _patiently(migrate: Callable[[], None]) -> None:
    backoff = Backoff(base=0.1, cap=2.0)
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            return migrate()
        except DatabaseError as error:
            if error.sqlstate != _LOCK_NOT_AVAILABLE or time.monotonic() > deadline:
                raise
        delay = backoff.next()
        logger.info("a table is in use, the migration begins again in %.1f s", delay)
        time.sleep(delay)


def _settings(settings: Settings | str | None) -> Settings:
    if isinstance(settings, Settings):
        return settings
    return Settings() if settings is None else Settings(database_url=settings)


def _config(settings: Settings, **options: Any) -> Config:
    config = Config(**options)
    # A percent sign would be an interpolation to the ini parser behind Config.
    config.set_main_option("script_location", str(bundled("migrations")).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["settings"] = settings
    return config


def _run_command(settings: Settings, run: Callable[[Config], None]) -> None:
    def migrate(connection: Connection) -> None:
        config = _config(settings)
        config.attributes["connection"] = connection
        run(config)

    run_in_transaction(settings, migrate)


def run_in_transaction(settings: Settings, function: Callable[[Connection], T]) -> T:
    """Call *function* with a connection in a transaction, committed if it returns."""

    async def run() -> T:
        engine = create_async_engine(
            "postgresql+asyncpg://",
            # Our own connections take any libpq URL; SQLAlchemy's URLs have rules of their own.
            async_creator=lambda: connect(
                settings.listen_dsn, role="migrate", timeout=settings.connect_timeout
            ),
            poolclass=NullPool,
        )
        try:
            async with engine.begin() as connection:
                return await connection.run_sync(function)
        except DBAPIError as error:
            # Its own text repeats the statement, which is of no use to who migrates.
            sqlstate = getattr(error.orig, "sqlstate", None)
            raise DatabaseError(f"PostgreSQL refused: {error.orig}", sqlstate) from error
        finally:
            await engine.dispose()

    return asyncio.run(run())
