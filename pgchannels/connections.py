"""Where connections to PostgreSQL are made, and where their errors become ours."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import asyncpg

from pgchannels.errors import ConfigurationError, DatabaseError, DatabaseUnavailable

if TYPE_CHECKING:
    from asyncpg import Connection, Pool

__all__ = ["UNAVAILABLE", "connect", "create_pool", "driver_errors"]

logger = logging.getLogger("pgchannels.connections")

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

# Each of our queries has one plan that is right, by its index: a partition too young for statistics
# must not make the planner sort a backlog instead, and planning it again each time would take
# longer than running it.
_PLANNING = {
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "jit": "off",
    "plan_cache_mode": "force_generic_plan",
}

# Whatever the role, the database or the server has for a default. The server drops a client that
# has vanished from the network within about half a minute. It ends a statement by itself where we
# have given up on it: nothing that we no longer wait for may keep a backend, or commit much later.
_SESSION = _PLANNING | {
    "default_transaction_isolation": "read committed",
    "default_transaction_read_only": "off",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "idle_session_timeout": "0",
    "tcp_keepalives_idle": "15",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
}
# PostgreSQL 17 and newer.
_SINCE_17 = {"transaction_timeout": "0"}

# Seconds that the server waits longer than we do: it is the second to give up, so that the error is
# the same whether it still answers or not.
_GRACE = 1.0

# By statement rather than as start-up parameters, which poolers refuse.
_PREPARE = "select " + ", ".join(
    [
        "set_config('application_name', 'pgchannels ' || $1, false)",
        "set_config('statement_timeout', $2, false)",
        *(f"set_config('{name}', '{value}', false)" for name, value in _SESSION.items()),
        *(
            "case when current_setting('server_version_num')::integer >= 170000 "
            f"then set_config('{name}', '{value}', false) end"
            for name, value in _SINCE_17.items()
        ),
    ]
)

# For a session that others use too: in one message, and it ends with the transaction.
_BEGIN = "begin isolation level read committed read write; select " + ", ".join(
    f"set_config('{name}', '{value}', true)" for name, value in _PLANNING.items()
)
_DEFAULTS = """
select current_setting('transaction_isolation') as default_transaction_isolation,
       current_setting('transaction_read_only') as default_transaction_read_only
"""
_OURS = {"default_transaction_isolation": "read committed", "default_transaction_read_only": "off"}


class _Shared(asyncpg.Connection):  # type: ignore[misc]  # asyncpg has no types
    """A session of a pooler, which other clients use too: nothing can be set in it.

    Where its defaults are not ours, each statement runs in a transaction that says how. That takes
    two round trips more.
    """

    _sets_all = False

    async def look_at_defaults(self, timeout: float) -> None:
        """Find out whether single statements run as they must."""
        row = await super().fetchrow(_DEFAULTS, timeout=timeout)
        assert row is not None
        others = {name: value for name, value in row.items() if value != _OURS[name]}
        self._sets_all = bool(others)
        if others:
            said = ", ".join(f"{name} is {value!r}" for name, value in others.items())
            logger.info("behind the pooler, %s: each statement has to set what it needs", said)

    async def fetch(self, query: str, *args: Any, timeout: float | None = None, **kw: Any) -> Any:
        if not self._sets_all:
            return await super().fetch(query, *args, timeout=timeout, **kw)
        try:
            await self.execute(_BEGIN, timeout=timeout)
            rows = await super().fetch(query, *args, timeout=timeout, **kw)
            await self.execute("commit", timeout=timeout)
        except asyncpg.PostgresError:
            await self.execute("rollback", timeout=timeout)
            raise
        except BaseException:
            # What is under way is in a transaction that nothing else would end.
            self.terminate()
            raise
        return rows


@contextmanager
def driver_errors() -> Iterator[None]:
    """Turn what the driver raises into :class:`DatabaseUnavailable` or :class:`DatabaseError`."""
    try:
        yield
    except asyncpg.QueryCanceledError as error:
        # It is there, and has too much to do, or waits for a lock.
        raise DatabaseUnavailable(
            f"PostgreSQL has not done it in time: {error}", error.sqlstate
        ) from error
    except TimeoutError as error:
        raise DatabaseUnavailable(
            f"PostgreSQL has not answered in time{_reason(error)}", None
        ) from error
    except UNAVAILABLE as error:
        raise DatabaseUnavailable(
            f"PostgreSQL is not available{_reason(error) or f': {type(error).__name__}'}",
            getattr(error, "sqlstate", None),
        ) from error
    except asyncpg.PostgresError as error:
        raise DatabaseError(
            f"PostgreSQL refused: {error}", getattr(error, "sqlstate", None)
        ) from error


def _reason(error: BaseException) -> str:
    return f": {error}" if str(error) else ""


async def connect(
    dsn: str,
    *,
    role: str,
    timeout: float,
    statement_time: float | None = None,
    pooled: bool = False,
    **options: Any,
) -> Connection:
    """Open one connection in autocommit and READ COMMITTED, whatever the server's defaults.

    Args:
        dsn: a URL as asyncpg takes it.
        role: what it is for; shows in ``pg_stat_activity.application_name``.
        timeout: seconds to be connected in.
        statement_time: seconds for which we wait for a statement; a second later the server ends
            it. None for any time.
        pooled: the session may be shared with other clients. Then nothing is set in it and nothing
            prepared, and it is only good for single statements, by ``fetch()``.
        options: for :func:`asyncpg.connect`.

    Raises:
        ConfigurationError: the URL cannot be read.
        DatabaseUnavailable, DatabaseError: no connection.
    """
    with driver_errors():
        try:
            options["timeout"] = timeout
            if pooled:
                options |= {"statement_cache_size": 0, "connection_class": _Shared}
            connection: Any = await asyncpg.connect(dsn, **options)
        except ValueError:
            # The driver's own words may quote a part of the password.
            raise ConfigurationError(
                "the database's URL cannot be read: its port and parameters must be valid, and in "
                "user names and passwords, characters such as / : @ % must be percent-encoded"
            ) from None
        try:
            if pooled:
                await connection.look_at_defaults(timeout)
                return connection
            limit = 0 if statement_time is None else round((statement_time + _GRACE) * 1000)
            await connection.execute(_PREPARE, role, str(limit), timeout=timeout)
        except BaseException:
            connection.terminate()
            raise
    return connection


def create_pool(
    dsn: str, *, size: int, connect_timeout: float, command_timeout: float, pooled: bool
) -> Pool:
    """Describe a pool; it connects when it is awaited or entered."""

    async def connect_for_pool(*_: Any, **options: Any) -> Connection:
        # A publisher waits for a connection no longer than for a statement.
        options["timeout"] = min(connect_timeout, command_timeout)
        options["command_timeout"] = command_timeout
        return await connect(
            dsn, role="pool", pooled=pooled, statement_time=command_timeout, **options
        )

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
