"""Publish from SQLAlchemy sessions: messages commit with the data, or not at all.

``publish()`` adds an entry to the session, as one adds an object. The session's own rules then do
the hard part: a rollback, a savepoint's too, drops what was added since, and so does closing the
session without a commit; and before a savepoint, a query or a commit there is a flush. At the flush
the entries go into the outbox by one insert, in the session's transaction and ahead of the other
objects. After a commit only the sequencer is woken.
"""

from __future__ import annotations

import logging
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Insert,
    Integer,
    Interval,
    LargeBinary,
    Text,
    bindparam,
    case,
    cast,
    column,
    event,
    func,
    insert,
    select,
    true,
)
from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker
from sqlalchemy.orm import (
    Session,
    SessionTransaction,
    registry,
    scoped_session,
    sessionmaker,
)

from pgchannels.channels import check_channel
from pgchannels.errors import ConfigurationError
from pgchannels.layer import ChannelLayer, outgoing
from pgchannels.memory import MemoryLayer
from pgchannels.payloads import DEFAULT
from pgchannels.records import Outgoing, flatten
from pgchannels.schema import EncodedJSON, outbox
from pgchannels.settings import Settings
from pgchannels.transactions import check_transaction

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["install", "publish"]

logger = logging.getLogger("pgchannels.orm")

AnySession: TypeAlias = Session | AsyncSession | scoped_session[Any] | async_scoped_session[Any]
Target: TypeAlias = (
    type[Session]
    | type[AsyncSession]
    | sessionmaker[Any]
    | async_sessionmaker[Any]
    | scoped_session[Any]
)

# In Session.info: its bind is one that can be published to.
_CHECKED = "pgchannels.checked"
# … something was published that has not been committed yet.
_PUBLISHED = "pgchannels.published"


class _Installed(NamedTuple):
    settings: Settings
    layer: ChannelLayer | None


_installed: WeakKeyDictionary[type[Session], _Installed] = WeakKeyDictionary()


class Entry:
    """What waits in a session for its flush. Mapped, so that the unit of work keeps it."""

    def __init__(self, message: Outgoing) -> None:
        self.message = message


def install(
    target: Target, layer: ChannelLayer | None = None, *, settings: Settings | None = None
) -> None:
    """Make the sessions of *target* able to publish. Doing it again replaces *layer*.

    Args:
        target: a ``sessionmaker`` or ``async_sessionmaker``, a ``scoped_session``, or a subclass of
            ``Session`` or ``AsyncSession``: of its later sessions.
        layer: this process's layer, to be woken after commits. Without one, what was published is
            found by the node that polls.
        settings: which schema, and how large a message may be; the layer's by default, else from
            the environment.

    Raises:
        ConfigurationError: for another kind of target, or a ``MemoryLayer``.
    """
    if isinstance(layer, MemoryLayer):
        raise ConfigurationError(
            "a session's messages go to PostgreSQL with its data; a MemoryLayer would not get them"
        )
    session_class = _session_class(target)
    if settings is None:
        settings = layer.settings if layer is not None else Settings()
    # Not event.contains(): that goes by id(), which a class has from one that is no more.
    listening = session_class in _installed
    _installed[session_class] = _Installed(settings, layer)
    if not listening:
        event.listen(session_class, "before_flush", _before_flush)
        event.listen(session_class, "after_commit", _after_commit)
        event.listen(session_class, "after_transaction_end", _after_transaction_end)


def publish(
    session: AnySession,
    channel: str,
    payload: Any,
    *,
    ttl: float | timedelta | None = None,
    headers: Mapping[str, str] | None = None,
) -> None:
    """Publish *payload* on *channel* if, and only if, the session's transaction commits.

    An ordinary call, also on an ``AsyncSession``, and inside of mapper and flush events. Nothing is
    sent to the database before the next flush.

    Args:
        session: of a target that was given to :func:`install`.
        channel: see :func:`pgchannels.channels.check_channel`.
        payload: see :func:`pgchannels.payloads.encode_payload`.
        ttl: how long the message can be read, in seconds; ``default_ttl`` if None.
        headers: texts by name, as in :meth:`pgchannels.ChannelLayer.send`.

    Raises:
        InvalidMessage: for a bad channel, payload or ttl.
        ConfigurationError: if the session was not prepared by :func:`install`, is bound to another
            database than PostgreSQL, or commits each statement by itself (AUTOCOMMIT). The last is
            seen at the flush, before anything is written.
    """
    sync_session = _sync_session(session)
    installed = _installation(sync_session)
    entry_class = _entry_class(installed.settings.schema_name)
    if _CHECKED not in sync_session.info:
        _check_bind(sync_session, entry_class)
        sync_session.info[_CHECKED] = True
    layer = installed.layer
    serializer = DEFAULT if layer is None else layer.serializer
    entry = entry_class(
        outgoing(
            check_channel(channel),
            payload,
            installed.settings,
            serializer,
            ttl=ttl,
            headers=headers,
        )
    )
    if sync_session._flushing:  # noqa: SLF001 - what Session.add() itself asks, to warn
        # From an event inside a flush, where nothing may be added any more. What was published
        # before goes first.
        _insert(sync_session, entry)
    else:
        sync_session.add(entry)


def _session_class(target: Target) -> type[Session]:
    match target:
        case scoped_session():
            return _session_class(target.session_factory)
        case sessionmaker():
            return target.class_
        case async_sessionmaker():
            given = target.kw.get("sync_session_class") or target.class_.sync_session_class
            own = _own_subclass(given)
            target.configure(sync_session_class=own)
            return own
        case type() if issubclass(target, AsyncSession):
            target.sync_session_class = _own_subclass(target.sync_session_class)
            return target.sync_session_class
        case type() if issubclass(target, Session):
            return target
        case _:
            raise ConfigurationError(
                "install() takes a sessionmaker, an async_sessionmaker, a scoped_session or a "
                f"session class, not {target!r}"
            )


def _own_subclass(session_class: type[Session]) -> type[Session]:
    # Session events attach to the synchronous class, which all AsyncSessions share by default.
    if session_class in _installed:
        return session_class
    return type(session_class.__name__, (session_class,), {})


def _sync_session(session: AnySession) -> Session:
    match session:
        case Session():
            return session
        case AsyncSession():
            return session.sync_session
        case scoped_session() | async_scoped_session():
            return _sync_session(session())
        case _:
            raise ConfigurationError(f"publish() takes a SQLAlchemy session, not {session!r}")


def _installation(session: Session) -> _Installed:
    for session_class in type(session).__mro__:
        if installed := _installed.get(session_class):
            return installed
    raise ConfigurationError(
        "this session cannot publish: call pgchannels.orm.install() with its sessionmaker first"
    )


@cache
def _entry_class(schema: str) -> type[Entry]:
    mapped = type("Entry", (Entry,), {})
    table = outbox(schema)
    registry().map_imperatively(mapped, table, include_properties=[table.c.id])
    return mapped


@cache
def _insert_statement(schema: str, *, plain: bool) -> Insert:
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


def _check_bind(session: Session, entry_class: type[Entry]) -> None:
    try:
        bind = session.get_bind(entry_class)
    except UnboundExecutionError as error:
        raise ConfigurationError(
            "this session has no engine that it could publish to: give it a bind of its own, not "
            "only binds for some of its classes"
        ) from error
    if bind.dialect.name != "postgresql":
        raise ConfigurationError(
            f"this session is bound to {bind.dialect.name}; publishing needs PostgreSQL"
        )


def _insert(session: Session, *more: Entry) -> None:
    """Insert the entries that wait in *session*, in the order of publishing, and then *more*."""
    pending = [entry for entry in session.new if isinstance(entry, Entry)]
    entries = [*pending, *more]
    if not entries:
        return
    installed = _installation(session)
    schema = installed.settings.schema_name
    connection = session.connection(bind_arguments={"mapper": _entry_class(schema)})
    check_transaction(connection)
    messages = [entry.message for entry in entries]
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
    connection.execute(_insert_statement(schema, plain=plain), parameters)
    # Only now: had the insert failed, they would have to wait on, as the session's objects do.
    for entry in pending:
        session.expunge(entry)
    session.info[_PUBLISHED] = True


def _before_flush(session: Session, *_: object) -> None:
    _insert(session)


def _after_commit(session: Session) -> None:
    # SQLAlchemy calls this for a released savepoint too. An exception from here would leave the
    # session in a state that it cannot get out of, so none may leave: the commit has succeeded.
    if session.in_nested_transaction() or not session.info.pop(_PUBLISHED, False):
        return
    try:
        if (layer := _installation(session).layer) is not None:
            layer.wake()
    except Exception:
        logger.exception("the sequencer could not be woken; what was published will be found")


def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    # However it ended; after a rollback there is nothing to wake the sequencer for.
    if transaction.parent is None:
        session.info.pop(_PUBLISHED, None)
