"""Moves a follower's position in the transaction of whoever did the work.

The one statement that this is about runs on the caller's connection, whatever that is: by the name
``save_follower`` on asyncpg's, and as its twin in SQLAlchemy Core on SQLAlchemy's, of any driver.
"""

from __future__ import annotations

from typing import Any

import asyncpg
from sqlalchemy import Connection, Text, Update, and_, cast, func, or_, update
from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session

from pgchannels.errors import ConfigurationError
from pgchannels.records import Move, Moved
from pgchannels.schema import followers
from pgchannels.sql import load_queries

__all__ = ["check_transaction", "move_in_transaction"]


async def move_in_transaction(transaction: Any, schema: str, move: Move) -> Moved | None:
    """Move a position as a part of *transaction*; None if the conditions do not hold.

    On a synchronous session or connection this blocks the event loop for the time of the statement.

    Raises:
        ConfigurationError: it is nothing that is known here, its database is not PostgreSQL, or it
            commits each statement by itself.
        Exception: what its driver raises, as from any statement of the caller's own.
    """
    match transaction:
        case asyncpg.Connection():  # one that was acquired from a pool counts as such too
            return await _on_asyncpg(transaction, schema, move)
        case async_scoped_session():
            return await move_in_transaction(transaction(), schema, move)
        case AsyncSession():
            return await transaction.run_sync(_in_session, schema, move)
        case AsyncConnection():
            return await transaction.run_sync(_on_connection, schema, move)
        case Session() | scoped_session():
            return _in_session(transaction, schema, move)
        case Connection():
            return _on_connection(transaction, schema, move)
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
    if not connection.is_in_transaction():
        raise ConfigurationError(
            "this connection is in no transaction, so the position would be saved at once and by "
            "itself: use 'async with connection.transaction():'"
        )
    row = await connection.fetchrow(load_queries(schema)["save_follower"], *move)
    return None if row is None else Moved(*row)


def _in_session(session: Session | scoped_session[Any], schema: str, move: Move) -> Moved | None:
    try:
        connection = session.connection(bind_arguments={"clause": followers(schema)})
    except UnboundExecutionError as error:
        raise ConfigurationError(
            "this session has no engine that the position could be saved with: give it a bind of "
            "its own, not only binds for some of its classes"
        ) from error
    return _on_connection(connection, schema, move)


def _on_connection(connection: Connection, schema: str, move: Move) -> Moved | None:
    check_transaction(connection)
    row = connection.execute(_statement(schema, move)).one_or_none()
    return None if row is None else Moved(*row)


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
