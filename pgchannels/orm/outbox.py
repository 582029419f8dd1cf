"""What sessions put into the outbox, and the one insert by which they do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import cache
from typing import Any, NamedTuple

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Connection,
    Engine,
    Insert,
    Integer,
    Interval,
    LargeBinary,
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
from sqlalchemy.orm import registry

from pgchannels.layer import ChannelLayer, outgoing
from pgchannels.payloads import DEFAULT, JSONSerializer, Serializer
from pgchannels.records import Outgoing, flatten
from pgchannels.schema import EncodedJSON, outbox
from pgchannels.settings import Settings
from pgchannels.waker import waker_for

__all__ = ["Entry", "Outlet", "entry_class", "write"]


class Outlet(NamedTuple):
    """Where the sessions of a class publish to, and how."""

    settings: Settings
    layer: ChannelLayer | None

    @property
    def serializer(self) -> Serializer:
        return DEFAULT if self.layer is None else self.layer.serializer

    @property
    def wants_plain_values(self) -> bool:
        """Whether attributes' values have to be converted. One's own serialiser may know them."""
        return type(self.serializer) is JSONSerializer

    def message(
        self,
        channel: str,
        payload: Any,
        *,
        ttl: float | timedelta | None,
        headers: Mapping[str, str] | None,
    ) -> Outgoing:
        """Encode a message; *channel* has been checked.

        Raises:
            InvalidMessage: for a bad payload, ttl or header.
        """
        return outgoing(channel, payload, self.settings, self.serializer, ttl=ttl, headers=headers)

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


def write(connection: Connection, schema: str, messages: Sequence[Outgoing]) -> None:
    """Insert *messages*, in their order, by one statement."""
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
    connection.execute(_statement(schema, plain=plain), parameters)


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
