"""Tables as SQLAlchemy sees them, and which revision of the schema this code works on.

The migrations make the tables; a test compares what stands here with a migrated database.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Column,
    DateTime,
    Identity,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    Uuid,
)
from sqlalchemy.types import UserDefinedType

from pgchannels.errors import SchemaError

__all__ = [
    "LOCK_TIMEOUT",
    "NEEDED_REVISION",
    "REVISIONS",
    "VERSION_TABLE",
    "EncodedJSON",
    "check_revision",
    "followers",
    "outbox",
]

REVISIONS = ("0001", "0002", "0003", "0004")
"""Every revision that there has been, oldest first."""

NEEDED_REVISION = REVISIONS[-1]

VERSION_TABLE = "alembic_version"

LOCK_TIMEOUT = "500ms"
"""How long a migration waits for a lock, and makes others wait behind it."""


def check_revision(schema: str, found: str | None, works_from: str | None = None) -> None:
    """Raise :class:`SchemaError` if this code does not work on a schema of the revision *found*.

    It works on the one that it needs, and on a later one that says so: *works_from* is the oldest
    revision whose code may go on, as the schema itself has it. So a database is migrated first, and
    the servers are replaced then, one by one.
    """
    if found == NEEDED_REVISION:
        return
    newer = found is not None and found not in REVISIONS
    if newer and works_from is not None and works_from <= NEEDED_REVISION:
        return
    raise SchemaError(schema, found, NEEDED_REVISION, newer=newer)


class EncodedJSON(UserDefinedType[str]):
    """A ``json`` column whose Python value is the JSON text itself.

    SQLAlchemy's own JSON type would encode again, by its own rules; the publisher has done it.
    """

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "JSON"


@cache
def outbox(schema: str) -> Table:
    """The outbox in *schema*, with the columns that a publisher fills in.

    The table has no primary key (nothing ever looks a row up); for the unit of work the identity
    column is one.
    """
    return Table(
        "outbox",
        MetaData(schema=schema),
        Column("id", BigInteger, Identity(always=True), primary_key=True),
        Column("channel", Text, nullable=False),
        Column("payload", EncodedJSON, nullable=False),
        Column("expires_at", DateTime(timezone=True)),
        Column("headers", EncodedJSON),
        Column("attachments", ARRAY(LargeBinary)),
    )


@cache
def followers(schema: str) -> Table:
    """The positions of durable readers in *schema*, with the columns that an ack concerns."""
    return Table(
        "followers",
        MetaData(schema=schema),
        Column("name", Text, primary_key=True),
        Column("position", BigInteger, nullable=False),
        Column("epoch", Integer, nullable=False),
        Column("holder", Uuid),
        Column("moved_at", DateTime(timezone=True), nullable=False),
    )
