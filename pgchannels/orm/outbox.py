"""What sessions put into the outbox, and the one insert by which they do."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, NamedTuple

from sqlalchemy import (
    ARRAY,
    Boolean,
    ColumnElement,
    Connection,
    Engine,
    Insert,
    Integer,
    Interval,
    LargeBinary,
    Select,
    Text,
    bindparam,
    case,
    cast,
    column,
    func,
    insert,
    select,
    true,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import registry

from pgchannels.layer import ChannelLayer, outgoing
from pgchannels.payloads import DEFAULT, Serializer
from pgchannels.records import Outgoing, flatten
from pgchannels.schema import EncodedJSON, outbox
from pgchannels.settings import Settings
from pgchannels.waker import waker_for

__all__ = ["Entry", "Outlet", "entry_class", "write", "write_alone"]

logger = logging.getLogger("pgchannels.orm")


class Outlet(NamedTuple):
    """Where the sessions of a class publish to, and how."""

    settings: Settings
    layer: ChannelLayer | None

    @property
    def serializer(self) -> Serializer:
        return DEFAULT if self.layer is None else self.layer.serializer

    def message(
        self,
        channel: str,
        payload: Any,
        *,
        ttl: float | timedelta | None,
        headers: Mapping[str, str] | None,
        key: str | None = None,
        extra: Mapping[str, str] | None = None,
    ) -> Outgoing:
        """Encode a message; *channel* and *extra*, headers of our own, have been checked.

        Raises:
            InvalidMessage: for a bad payload, ttl, header or key.
        """
        return outgoing(
            channel,
            payload,
            self.settings,
            self.serializer,
            ttl=ttl,
            headers=headers,
            key=key,
            extra=extra,
        )

    def wake(self, engine: Engine) -> None:
        """Something was committed to the outbox by a connection of *engine*: have it sequenced.

        Raises:
            ConfigurationError: nothing says where the database is.
        """
        if self.layer is not None:
            self.layer.wake()
        else:
            url = engine.url.render_as_string(hide_password=False)
            waker_for(self.settings, url).wake()


class Entry:
    """What waits in a session for its flush. Mapped, so that the unit of work keeps it."""

    def __init__(self, message: Outgoing) -> None:
        self.message = message


@cache
def entry_class(schema: str) -> type[Entry]:
    mapped = type("Entry", (Entry,), {})
    table = outbox(schema)
    registry().map_imperatively(mapped, table, include_properties=[table.c.id])
    return mapped


def write(connection: Connection, settings: Settings, messages: Sequence[Outgoing]) -> None:
    """Insert *messages*, in their order, by one statement.

    If some have idempotency keys, another statement claims these first, and waits for transactions
    that have claimed the same. Messages whose keys are known are left out.
    """
    if any(message.key is not None for message in messages):
        messages = _fresh(connection, settings, messages)
        if not messages:
            return
    plain = not any(message.headers or message.attachments for message in messages)
    firsts, lasts, attachments = flatten(messages)
    parameters = {
        "channels": [message.channel for message in messages],
        "payloads": [message.payload for message in messages],
        "ttls": [message.ttl for message in messages],
        "headers": [message.headers for message in messages],
        "firsts": firsts,
        "lasts": lasts,
    }
    if not plain:
        parameters["attachments"] = attachments
    connection.execute(_statement(settings.schema_name, plain=plain), parameters)


def _fresh(
    connection: Connection, settings: Settings, messages: Sequence[Outgoing]
) -> list[Outgoing]:
    """Claim the keys of *messages*; those without a key, and those with a new one."""
    keyed = [message for message in messages if message.key is not None]
    claimed = connection.execute(
        _claim(settings.schema_name),
        {
            "channels": [message.channel for message in keyed],
            "keys": [message.key for message in keyed],
            "lifetime": settings.key_lifetime,
        },
    ).scalar_one()
    known = iter(claimed)
    return [message for message in messages if message.key is None or next(known)]


@cache
def _claim(schema: str) -> Select[tuple[list[bool]]]:
    claim_keys: Any = getattr(getattr(func, schema), "claim_keys")  # noqa: B009 - the schema's
    return select(
        claim_keys(
            cast(bindparam("channels"), ARRAY(Text)),
            cast(bindparam("keys"), ARRAY(Text)),
            cast(bindparam("lifetime"), Interval),
            type_=ARRAY(Boolean),
        )
    )


def write_alone(
    bind: Engine | Connection, settings: Settings, messages: Sequence[Outgoing]
) -> bool:
    """Insert *messages* in a transaction of their own, and commit it; return whether it has worked.

    If that fails before the COMMIT, it is tried once more, at once: a connection from a pool may
    have died since its last use. After the COMMIT was sent nobody knows whether the messages have
    been published. Then they are not tried again, so that none comes twice. The failure is logged,
    with the channels, and without the payloads.

    On a connection that is in a transaction, which somebody else will commit, it is a savepoint.

    Raises:
        BaseException: a cancellation or an interrupt, when all this has been done; no other error.
    """
    error, is_written = _attempt(bind, settings, messages)
    errors = [error]
    if error is not None and not is_written:
        error, is_written = _attempt(bind, settings, messages)
        errors.append(error)
    if error is not None:
        logger.error(
            "%d messages that were published after a commit %s lost, on %s: %s",
            len(messages),
            "may be" if is_written else "are",
            ", ".join(sorted({message.channel for message in messages})),
            _reason(error),
        )
    for each in errors:
        if each is not None and not isinstance(each, Exception):
            raise each
    return error is None


def _attempt(
    bind: Engine | Connection, settings: Settings, messages: Sequence[Outgoing]
) -> tuple[BaseException | None, bool]:
    """Return what went wrong, if anything, and whether the messages had been written by then."""
    is_written = False
    try:
        with _transaction(bind) as connection:
            write(connection, settings, messages)
            is_written = True
    except BaseException as error:  # noqa: BLE001  # write_alone() raises it again
        return error, is_written
    return None, is_written


@contextmanager
def _transaction(bind: Engine | Connection) -> Iterator[Connection]:
    if isinstance(bind, Connection):
        with bind.begin_nested() if bind.in_transaction() else bind.begin():
            yield bind
        return
    with bind.connect() as connection:
        # Not in AUTOCOMMIT, where keys would stay claimed for messages that have failed.
        connection.execution_options(isolation_level="READ COMMITTED")
        with connection.begin():
            yield connection


def _reason(error: BaseException) -> str:
    """An error in one line, without the statement's parameters, which SQLAlchemy appends."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    return next(iter(str(cause).splitlines()), "") or type(cause).__name__


@cache
def _statement(schema: str, *, plain: bool) -> Insert:
    """One insert for any number of messages, in their order; the twin of the store's.

    A plain one, without headers and attachments, needs no right to write these.
    """
    entries = (
        func.unnest(
            bindparam("channels", type_=ARRAY(Text)),
            bindparam("payloads", type_=ARRAY(Text)),
            bindparam("ttls", type_=ARRAY(Interval)),
            bindparam("headers", type_=ARRAY(Text)),
            bindparam("firsts", type_=ARRAY(Integer)),
            bindparam("lasts", type_=ARRAY(Integer)),
        )
        .table_valued(
            column("channel", Text),
            column("payload", Text),
            column("ttl", Interval),
            column("headers", Text),
            column("first", Integer),
            column("last", Integer),
        )
        .render_derived()
    )
    values: dict[str, ColumnElement[Any]] = {
        "channel": entries.c.channel,
        "payload": cast(entries.c.payload, EncodedJSON),
        "expires_at": func.clock_timestamp() + entries.c.ttl,
    }
    if plain:
        return insert(outbox(schema)).from_select(list(values), select(*values.values()))
    # As a column of its own: PostgreSQL takes no slice of what has just been cast.
    all_of_them = select(
        cast(bindparam("attachments", type_=ARRAY(LargeBinary)), ARRAY(LargeBinary)).label("each")
    ).subquery()
    values["headers"] = cast(entries.c.headers, EncodedJSON)
    values["attachments"] = case(
        (
            entries.c.last >= entries.c.first,
            all_of_them.c.each[entries.c.first : entries.c.last],
        )
    )
    rows = select(*values.values()).select_from(entries.join(all_of_them, true()))
    return insert(outbox(schema)).from_select(list(values), rows)
