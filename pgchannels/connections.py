"""Where connections to PostgreSQL are made, and where their errors become ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import asyncpg

from pgchannels.errors import ConfigurationError, DatabaseError, DatabaseUnavailable

if TYPE_CHECKING:
    from asyncpg import Connection, Pool

__all__ = ["UNAVAILABLE", "connect", "create_pool", "driver_errors"]

# "The server is not there (now)": class 57P is its shutting down or starting up, 53 that it has no
# connection, memory or disk to spare, 57014 that a statement_timeout has hit (manual, appendix A).
UNAVAILABLE = (
    asyncpg.PostgresConnectionError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.CannotConnectNowError,
    asyncpg.IdleSessionTimeoutError,
    asyncpg.InsufficientResourcesError,
    asyncpg.QueryCanceledError,
    # The server has become a standby, or this connection leads to one.
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.InterfaceError,
    # A statement met the server's farewell, which has come and not yet been taken in.
    asyncpg.InternalClientError,
    OSError,  # includes ConnectionError and TimeoutError
)

# Seconds to be connected in.
_CONNECT_TIME = 10

# By statement rather than as start-up parameters, which poolers refuse. The server drops a client
# that has vanished from the network within about half a minute. Each of our queries has one plan
# that is right, by its index: a partition too young for statistics must not make the planner sort a
# backlog instead, and planning it anew each time would take longer than running it.
_PREPARE = """
select set_config('default_transaction_isolation', 'read committed', false),
       set_config('default_transaction_read_only', 'off', false),
       set_config('application_name', 'pgchannels ' || $1, false),
       set_config('enable_seqscan', 'off', false),
       set_config('enable_bitmapscan', 'off', false),
       set_config('jit', 'off', false),
       set_config('plan_cache_mode', 'force_generic_plan', false),
       set_config('tcp_keepalives_idle', '15', false),
       set_config('tcp_keepalives_interval', '5', false),
       set_config('tcp_keepalives_count', '3', false)
"""


@contextmanager
def driver_errors() -> Iterator[None]:
    """Turn what the driver raises into :class:`DatabaseUnavailable` or :class:`DatabaseError`."""
    try:
        yield
    except UNAVAILABLE as error:
        reason = str(error) or type(error).__name__
        raise DatabaseUnavailable(
            f"PostgreSQL is not available: {reason}", getattr(error, "sqlstate", None)
        ) from error
    except asyncpg.PostgresError as error:
        raise DatabaseError(
            f"PostgreSQL refused: {error}", getattr(error, "sqlstate", None)
        ) from error


async def connect(
    dsn: str, *, role: str, timeout: float = _CONNECT_TIME, pooled: bool = False, **options: Any
) -> Connection:
    """Open one connection in autocommit and READ COMMITTED, whatever the server's defaults.

    Args:
        dsn: a libpq URL.
        role: what it is for; shows in ``pg_stat_activity.application_name``.
        timeout: seconds to be connected in.
        pooled: the session may be shared with other clients. Then nothing is set in it and nothing
            prepared, and it is only good for single statements.
        options: for :func:`asyncpg.connect`.

    Raises:
        ConfigurationError: the URL cannot be read.
        DatabaseUnavailable, DatabaseError: no connection.
    """
    with driver_errors():
        try:
            options["timeout"] = timeout
            if pooled:
                options["statement_cache_size"] = 0
            connection: Connection = await asyncpg.connect(dsn, **options)
        except ValueError:
            # The driver's own words may quote a part of the password.
            raise ConfigurationError(
                "the database's URL cannot be read: its port and parameters must be valid, and in "
                "user names and passwords, characters such as / : @ % must be percent-encoded"
            ) from None
        if pooled:
            return connection
        try:
            await connection.execute(_PREPARE, role, timeout=timeout)
        except BaseException:
            connection.terminate()
            raise
    return connection


def create_pool(dsn: str, *, size: int, command_timeout: float, pooled: bool) -> Pool:
    """Describe a pool; it connects when it is awaited or entered."""

    async def connect_for_pool(*_: Any, **options: Any) -> Connection:
        # Whoever publishes waits for no connection longer than for a statement.
        options["timeout"] = min(_CONNECT_TIME, command_timeout)
        options["command_timeout"] = command_timeout
        return await connect(dsn, role="pool", pooled=pooled, **options)

    return asyncpg.create_pool(
        dsn,
        min_size=0,
        max_size=size,
        connect=connect_for_pool,
        # Our statements leave nothing behind in the session. asyncpg's own reset would cost a
        # round trip after each of them, and undo what connect() has set.
        reset=_leave,
    )


async def _leave(connection: Connection) -> None:
    """Leave the session as it is."""
