"""Where connections to PostgreSQL are made, each set up in the same way."""

from __future__ import annotations

from typing import TYPE_CHECKING

import asyncpg

if TYPE_CHECKING:
    from asyncpg import Connection, Pool

__all__ = ["connect", "create_pool"]


async def connect(dsn: str, *, role: str, timeout: int = 10) -> Connection:
    """Open one connection in autocommit and READ COMMITTED, whatever the server's defaults.

    Args:
        dsn: a libpq URL.
        role: what it is for; shows in ``pg_stat_activity.application_name``.
        timeout: seconds to be connected in.
    """
    connection: Connection = await asyncpg.connect(dsn, timeout=timeout)
    try:
        await _prepare(connection, role)
    except BaseException:
        connection.terminate()
        raise
    return connection


def create_pool(dsn: str, *, size: int, command_timeout: float, timeout: int = 10) -> Pool:
    """Describe a pool; it connects when it is awaited or entered."""

    async def init(connection: Connection) -> None:
        await _prepare(connection, "pool")

    return asyncpg.create_pool(
        dsn,
        min_size=0,
        max_size=size,
        timeout=timeout,
        command_timeout=command_timeout,
        init=init,
        # Our statements leave nothing behind in the session. asyncpg's own reset would cost a
        # round trip after each of them, and undo what init() has set.
        reset=_leave,
    )


async def _prepare(connection: Connection, role: str) -> None:
    # By statement rather than as start-up parameters, which poolers refuse. The server drops a
    # client that has vanished from the network within about half a minute.
    await connection.execute(
        "select set_config('default_transaction_isolation', 'read committed', false),"
        " set_config('default_transaction_read_only', 'off', false),"
        f" set_config('application_name', 'pgchannels {role}', false),"
        " set_config('tcp_keepalives_idle', '15', false),"
        " set_config('tcp_keepalives_interval', '5', false),"
        " set_config('tcp_keepalives_count', '3', false)"
    )


async def _leave(connection: Connection) -> None:
    """Leave the session as it is."""
