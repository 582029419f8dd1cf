"""What is done in a transaction of the caller's own, on whatever connection that is.

A follower's position moves with the work that it stands for: by the query ``save_follower`` on
asyncpg's connections, and as its twin in SQLAlchemy Core on SQLAlchemy's, of any driver. And a
transaction may be made to see exactly what the log ends with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import asyncpg
from sqlalchemy import (
    Connection,
    Executable,
    Text,
    Update,
    and_,
    cast,
    func,
    or_,
    select,
    update,
)
from sqlalchemy.exc import DBAPIError, UnboundExecutionError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session

from pgchannels.errors import ConfigurationError
from pgchannels.records import Move, Moved
from pgchannels.schema import followers
from pgchannels.sql import load_queries

__all__ = [
    "adopt_snapshot",
    "begin_repeatable_read",
    "check_transaction",
    "move_in_transaction",
]

T = TypeVar("T")

# On another server, before and since PostgreSQL 17; in another database of the server.
_UNKNOWN_SNAPSHOT = frozenset({"22023", "42704", "0A000"})


async def move_in_transaction(transaction: Any, schema: str, move: Move) -> Moved | None:
    """Move a position as a part of *transaction*; None if the conditions do not hold.

    On a synchronous session or connection this blocks the event loop for the time of the statement.

    Raises:
        ConfigurationError: it is nothing that is known here, its database is not PostgreSQL, or it
            commits each statement by itself.
        Exception: what its driver raises, as from any statement of the caller's own.
    """
    if isinstance(transaction, asyncpg.Connection):  # one that was acquired from a pool, too
        return await _on_asyncpg(transaction, schema, move)

    statement = _statement(schema, move)

    def moved(connection: Connection) -> Moved | None:
        row = connection.execute(statement).one_or_none()
        return None if row is None else Moved(*row)

    return await _in_its_connection(transaction, statement, moved)


async def begin_repeatable_read(transaction: Any, schema: str) -> None:
    """Make *transaction*, which must not have run a query yet, one in REPEATABLE READ.

    Raises:
        ConfigurationError: as :func:`move_in_transaction`, or it has run a query.
    """
    await _set(transaction, schema, "set transaction isolation level repeatable read")


async def adopt_snapshot(transaction: Any, schema: str, snapshot: str) -> None:
    """Let *transaction* see what the exported *snapshot* shows; after begin_repeatable_read()."""
    # The server has made the name: hexadecimal digits and hyphens.
    try:
        await _set(transaction, schema, f"set transaction snapshot '{snapshot}'")
    except (asyncpg.PostgresError, DBAPIError) as error:
        if _sqlstate(error) in _UNKNOWN_SNAPSHOT:
            raise ConfigurationError(
                "this transaction is in another database than the layer, or on a replica of it, "
                "and cannot see a snapshot of the layer's"
            ) from error
        raise


async def _set(transaction: Any, schema: str, statement: str) -> None:
    try:
        if isinstance(transaction, asyncpg.Connection):
            _check_in_transaction(transaction)
            await transaction.execute(statement)
        else:
            await _in_its_connection(
                transaction,
                # The connection that the session reads by.
                select(followers(schema)),
                lambda connection: connection.exec_driver_sql(statement),
            )
    except (asyncpg.PostgresError, DBAPIError) as error:
        if _sqlstate(error) == "25001":  # active_sql_transaction
            raise ConfigurationError(
                "this transaction has run a query already, perhaps in another dependency of the "
                "request, or is in a savepoint. Take the snapshot first, in a session of its own "
                "('async with Session.begin() as reader:') or after 'await session.commit()'"
            ) from error
        raise


def _sqlstate(error: Exception) -> object:
    cause = error.orig if isinstance(error, DBAPIError) else error
    # As psycopg and asyncpg have it, and psycopg2 and pg8000.
    return getattr(cause, "sqlstate", None) or getattr(cause, "pgcode", None)


async def _in_its_connection(
    transaction: Any, clause: Executable, function: Callable[[Connection], T]
) -> T:
    """Call *function* with the connection of something of SQLAlchemy's.

    A session with a ``get_bind()`` of its own may choose by *clause*: a replica for what reads, the
    leader for what writes.
    """

    def of_session(session: Session | scoped_session[Any]) -> T:
        return of_connection(_connection(session, clause))

    def of_connection(connection: Connection) -> T:
        check_transaction(connection)
        return function(connection)

    match transaction:
        case async_scoped_session():
            return await _in_its_connection(transaction(), clause, function)
        case AsyncSession():
            return await transaction.run_sync(of_session)
        case AsyncConnection():
            return await transaction.run_sync(of_connection)
        case Session() | scoped_session():
            return of_session(transaction)
        case Connection():
            return of_connection(transaction)
        case _:
            raise ConfigurationError(
                "expected an asyncpg connection, or a SQLAlchemy AsyncSession, AsyncConnection, "
                f"Session or Connection, not {transaction!r}"
            )


def check_transaction(connection: Connection) -> None:
    """Raise :class:`ConfigurationError` if what runs on *connection* commits by itself."""
    if connection.dialect.name != "postgresql":
        raise ConfigurationError(
            f"this connection leads to {connection.dialect.name}, and not to PostgreSQL"
        )
    driver_connection = connection.connection.dbapi_connection
    assert driver_connection is not None
    if connection.dialect.detect_autocommit_setting(driver_connection):
        raise ConfigurationError(
            "this connection is in AUTOCOMMIT: what pgchannels writes could not commit together "
            "with your data. Use an engine without isolation_level='AUTOCOMMIT'"
        )


async def _on_asyncpg(connection: Any, schema: str, move: Move) -> Moved | None:
    _check_in_transaction(connection)
    row = await connection.fetchrow(load_queries(schema)["save_follower"], *move)
    return None if row is None else Moved(*row)


def _check_in_transaction(connection: Any) -> None:
    if not connection.is_in_transaction():
        raise ConfigurationError(
            "this connection is in no transaction, so each statement would commit by itself: use "
            "'async with connection.transaction():'"
        )


def _connection(session: Session | scoped_session[Any], clause: Executable) -> Connection:
    try:
        return session.connection(bind_arguments={"clause": clause})
    except UnboundExecutionError as error:
        raise ConfigurationError(
            "this session has no engine for the tables of pgchannels: give it a bind of its own, "
            "not only binds for some of its classes"
        ) from error


def _statement(schema: str, move: Move) -> Update:
    """The twin of ``save_follower``."""
    table = followers(schema)
    transaction = cast(func.pg_current_xact_id(), Text)
    moved_here = and_(table.c.position >= move.after, transaction == (move.transaction or ""))
    return (
        update(table)
        .where(
            table.c.name == move.name,
            table.c.holder == move.holder,
            table.c.epoch == move.epoch,
            or_(table.c.position.in_(move.before), moved_here),
        )
        .values(
            position=func.greatest(table.c.position, move.after), moved_at=func.clock_timestamp()
        )
        .returning(table.c.position, transaction)
    )
