"""Sessions that publish: what is added to one commits with its data, or not at all.

``publish()`` adds an entry to the session, as one adds an object. The session's own rules then do
the hard part: a rollback, a savepoint's too, drops what was added since, and so does closing the
session without a commit; and before a savepoint, a query or a commit there is a flush. At its end
the entries and the messages of models go into the outbox, by one insert in the session's
transaction. Only then: of two transactions that change the same row, one waits for the other, and
what it publishes must have the later place in the outbox. After a commit only the sequencer is
woken, unless an event of the commit itself has published: see :mod:`pgchannels.orm.endings`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Literal, TypeAlias, overload
from weakref import WeakKeyDictionary, WeakSet

from sqlalchemy import Connection, Engine, event, inspect, update
from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker
from sqlalchemy.orm import (
    Session,
    SessionTransaction,
    UOWTransaction,
    scoped_session,
    sessionmaker,
)

from pgchannels.addresses import address_of
from pgchannels.errors import ConfigurationError, InvalidChannel, InvalidMessage
from pgchannels.layer import ChannelLayer
from pgchannels.memory import MemoryLayer
from pgchannels.orm import endings, flushes
from pgchannels.orm.bulk import wrap_bulk_save
from pgchannels.orm.flushes import Flush
from pgchannels.orm.outbox import Entry, Outlet, entry_class, write, write_alone
from pgchannels.records import Outgoing
from pgchannels.settings import Settings
from pgchannels.transactions import check_transaction

__all__ = ["install", "publish"]

logger = logging.getLogger("pgchannels.orm")

AnySession: TypeAlias = Session | AsyncSession | scoped_session[Any] | async_scoped_session[Any]
Target: TypeAlias = (
    type[Session]
    | type[AsyncSession]
    | sessionmaker[Any]
    | async_sessionmaker[Any]
    | scoped_session[Any]
    | async_scoped_session[Any]
)

_NOT_GIVEN: Any = object()

# In Session.info: its bind is one that can be published to.
_CHECKED = "pgchannels.checked"
# … the engine by which something was published that has not been committed yet.
_PUBLISHED = "pgchannels.published"

_outlets: WeakKeyDictionary[type[Session], Outlet] = WeakKeyDictionary()

# Engines that do not say where their database is; said once of each.
_unreachable: WeakSet[Engine] = WeakSet()


def install(
    target: Target, layer: ChannelLayer | None = None, *, settings: Settings | None = None
) -> None:
    """Make the sessions of *target* able to publish. Doing it again replaces *layer*.

    Args:
        target: a ``sessionmaker``, ``async_sessionmaker``, ``scoped_session`` or
            ``async_scoped_session``, or a subclass of ``Session`` or ``AsyncSession``. Sessions
            that it has made before are not prepared.
        layer: this process's layer, to be woken after commits. In a process without one, a thread
            with one connection tells the nodes (see :mod:`pgchannels.waker`).
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
    listening = session_class in _outlets
    _outlets[session_class] = Outlet(settings, layer)
    if not listening:
        event.listen(session_class, "after_transaction_create", endings.begun)
        event.listen(session_class, "before_flush", _before_flush)
        event.listen(session_class, "after_flush", _after_flush)
        event.listen(session_class, "after_flush_postexec", _after_flush_postexec)
        event.listen(session_class, "after_commit", _after_commit)
        event.listen(session_class, "after_soft_rollback", _after_soft_rollback)
        event.listen(session_class, "after_transaction_end", _after_transaction_end)
        wrap_bulk_save(session_class, _tell_bulk)


@overload
def publish(
    session: AnySession,
    channel: str,
    payload: Any,
    *,
    exclude: str | None = None,
    ttl: float | timedelta | None = None,
    headers: Mapping[str, str] | None = None,
    key: str | None = None,
) -> None: ...
@overload
def publish(
    session: AnySession,
    payload: Any,
    *,
    user: str,
    exclude: str | None = None,
    ttl: float | timedelta | None = None,
    headers: Mapping[str, str] | None = None,
    key: str | None = None,
) -> None: ...
@overload
def publish(
    session: AnySession,
    payload: Any,
    *,
    everyone: Literal[True],
    exclude: str | None = None,
    ttl: float | timedelta | None = None,
    headers: Mapping[str, str] | None = None,
    key: str | None = None,
) -> None: ...
@overload
def publish(
    session: AnySession,
    payload: Any,
    *,
    to: Iterable[str],
    ttl: float | timedelta | None = None,
    headers: Mapping[str, str] | None = None,
    key: str | None = None,
) -> None: ...
def publish(  # type: ignore[misc]  # without a channel, the payload takes its place
    session: AnySession,
    channel: Any = _NOT_GIVEN,
    payload: Any = _NOT_GIVEN,
    *,
    user: str | None = None,
    everyone: bool = False,
    to: Iterable[str] | None = None,
    exclude: str | None = None,
    ttl: float | timedelta | None = None,
    headers: Mapping[str, str] | None = None,
    key: str | None = None,
) -> None:
    """Publish *payload* if, and only if, the session's transaction commits.

    ::

        publish(session, "orders:7", {"type": "order.paid"})  # a channel or group
        publish(session, "room:1", message, exclude=channel)  # … but one of its members
        publish(session, {"type": "invoice.paid"}, user="42")  # all connections of a user
        publish(session, {"type": "maintenance"}, everyone=True)
        publish(session, message, to=[channel, ...])  # several connections

    An ordinary call, also on an ``AsyncSession``, and inside of SQLAlchemy's events. Nothing is
    sent to the database before the next flush, which writes the session's objects first. Messages
    are in the order of the calls, and ahead of those of the models that the same flush writes.
    Until then they are pending objects of the session, and ``session.expunge_all()`` drops them.

    In ``after_commit``, and at the end of a transaction that was committed
    (``after_transaction_end``), the message can no longer commit with the data. It is published in
    a transaction of its own, on another connection of the session's engine, before ``commit()``
    returns. If that fails twice, ``commit()`` raises nothing; the logger ``pgchannels.orm`` says at
    ERROR on which channels how many messages are lost. A savepoint's end is not the end of its
    transaction, which the message is a part of.

    Of two transactions that change the same row, readers get the messages of the one that had to
    wait second, if these were published with the flush that writes the row, or later. So call it
    after a statement (``session.execute(update(…))``) that it tells of, not before.

    Args:
        session: of a target that was given to :func:`install`.
        channel: a channel or group, see :func:`pgchannels.channels.check_channel`.
        payload: see :func:`pgchannels.payloads.encode_payload`.
        user: instead of a channel, a user's id, as in ``layer.send_to_user()``.
        everyone: instead, every connection, as in ``layer.broadcast()``.
        to: instead, the channels of 1 to 1000 connections, as in ``layer.send_to()``.
        exclude: the channel of a connection that does not get it, as in ``layer.group_send()``.
        ttl: how long the message can be read, in seconds; ``default_ttl`` if None.
        headers: texts by name, as in :meth:`pgchannels.ChannelLayer.send`.
        key: an idempotency key, as in :meth:`pgchannels.ChannelLayer.send`. It is claimed at the
            flush, and given back by a rollback, also of a savepoint. Until this transaction ends,
            others that publish with the same key to the same address wait for it. Two that claim
            several keys in different orders are a deadlock, of which PostgreSQL ends one.

    Raises:
        InvalidMessage: for a bad channel, user, payload, ttl or key, or for several addresses.
        ConfigurationError: if the session was not prepared by :func:`install`, is bound to another
            database than PostgreSQL, or commits each statement by itself (AUTOCOMMIT). The last is
            seen at the flush, before anything is written. Also if its transaction has been rolled
            back, or prepared: in ``after_rollback``, say, or after a flush that failed.
    """
    if payload is _NOT_GIVEN:
        channel, payload = None, channel
    elif channel is _NOT_GIVEN:
        channel = None
    elif channel is None:
        raise InvalidChannel(channel, "it must be a str")
    if payload is _NOT_GIVEN:
        raise InvalidMessage("publish() needs a payload")
    address = address_of(channel, user=user, everyone=everyone, to=to, exclude=exclude)
    sync_session = _sync_session(session)
    outlet = _outlet(sync_session)
    entries = entry_class(outlet.settings.schema_name)
    if _CHECKED not in sync_session.info:
        _check_bind(sync_session, entries)
        sync_session.info[_CHECKED] = True
    message = outlet.message(
        address.channel, payload, ttl=ttl, headers=headers, key=key, extra=address.headers
    )
    if endings.is_committed(sync_session):
        if not endings.gather(sync_session, message):
            _publish_alone(sync_session, [message])
        return
    entry = entries(message)
    flush = flushes.current(sync_session) if sync_session._flushing else None  # noqa: SLF001
    if flush is None:
        sync_session.add(entry)
        return
    if not endings.is_connecting(sync_session):
        _connect(sync_session)
    # What Session.add() itself asks, to warn: an event inside a flush.
    if flush.is_written or sync_session._warn_on_events:  # noqa: SLF001
        flush.entries.append(entry)
    else:
        sync_session.add(entry)
        flush.hold(entry)


def _session_class(target: Target) -> type[Session]:
    match target:
        case scoped_session() | async_scoped_session():
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
                "install() takes a sessionmaker, an async_sessionmaker, a scoped_session, an "
                f"async_scoped_session or a session class, not {target!r}"
            )


def _own_subclass(session_class: type[Session]) -> type[Session]:
    # Session events attach to the synchronous class, which all AsyncSessions share by default.
    if session_class in _outlets:
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


def _outlet(session: Session) -> Outlet:
    for session_class in type(session).__mro__:
        if outlet := _outlets.get(session_class):
            return outlet
    raise ConfigurationError(
        "this session cannot publish: call pgchannels.orm.install() with its sessionmaker first"
    )


def _check_bind(session: Session, entries: type[Entry]) -> None:
    try:
        bind = session.get_bind(**_bind_arguments(entries))
    except UnboundExecutionError as error:
        raise ConfigurationError(
            "this session has no engine that it could publish to: give it a bind of its own, not "
            "only binds for some of its classes"
        ) from error
    if bind.dialect.name != "postgresql":
        raise ConfigurationError(
            f"this session is bound to {bind.dialect.name}; publishing needs PostgreSQL"
        )


def _bind_arguments(entries: type[Entry]) -> dict[str, Any]:
    """For ``get_bind()``, which an application may have replaced to route what reads and writes.

    As SQLAlchemy itself calls it: with a mapper. The clause is one that even a ``get_bind()`` that
    knows nothing of inserts takes for writing.
    """
    mapper = inspect(entries)
    return {"mapper": mapper, "clause": update(mapper.local_table)}


def _connect(session: Session) -> Connection:
    """The connection that the session's entries go by.

    Raises:
        ConfigurationError: it would commit by itself.
    """
    entries = entry_class(_outlet(session).settings.schema_name)
    connection = session.connection(bind_arguments=_bind_arguments(entries))
    check_transaction(connection)
    return connection


def _waiting(session: Session) -> list[Entry]:
    """The entries that wait in *session*, in the order of publishing."""
    return [entry for entry in session.new if isinstance(entry, Entry)]


def _has_work(session: Session) -> bool:
    """Whether a flush would have anything to write but entries."""
    return bool(
        session.deleted
        or session.dirty
        or any(not isinstance(object, Entry) for object in session.new)
    )


def _insert(session: Session, connection: Connection, messages: Sequence[Outgoing]) -> None:
    write(connection, _outlet(session).settings, messages)
    session.info[_PUBLISHED] = connection.engine


def _tell(session: Session, flush: Flush) -> None:
    """Insert what was published, and what the models have to say of *flush*.

    It has written its rows.
    """
    messages: dict[Connection, list[Outgoing]] = {}
    if flush.entries:
        messages[_connect(session)] = [entry.message for entry in flush.entries]
    # On the very connection that the rows went to, whatever else the session is bound to.
    for connection, made in flush.messages(_outlet(session)).items():
        messages.setdefault(connection, []).extend(made)
    for connection, made in messages.items():
        _insert(session, connection, made)


def _tell_bulk(session: Session, flush: Flush) -> None:
    # What was published before goes first, unless there are objects that it must come after.
    waiting = [] if _has_work(session) else _waiting(session)
    flush.entries += waiting
    _tell(session, flush)
    for entry in waiting:
        session.expunge(entry)


def _before_flush(session: Session, context: UOWTransaction, _: object) -> None:
    flush = flushes.begin(session, context)
    waiting = _waiting(session)
    if not waiting:
        return
    has_work = _has_work(session)
    if has_work:
        # Before connecting: an event of that may publish, too.
        for entry in waiting:
            flush.hold(entry)
    connection = _connect(session)  # now, before anything is written
    if has_work:
        return
    # There are no rows that it could have to wait for, and no need of a flush.
    _insert(session, connection, [entry.message for entry in waiting])
    # Only now: had the insert failed, they would have to wait on, as the session's objects do.
    for entry in waiting:
        session.expunge(entry)


def _after_flush(session: Session, *_: object) -> None:
    if (flush := flushes.current(session)) is not None:
        flush.written()


def _after_flush_postexec(session: Session, *_: object) -> None:
    # Still a part of the flush, which an exception fails; and what was inserted can load by now.
    if (flush := flushes.end(session)) is not None:
        _tell(session, flush)


def _after_commit(session: Session) -> None:
    # SQLAlchemy calls this for a released savepoint too. An exception from here would leave the
    # session in a state that it cannot get out of, so none may leave: the commit has succeeded.
    if session.in_nested_transaction():
        return
    late = endings.committed(session)
    if session._new:  # noqa: SLF001
        # From an event of the driver's, say, when the last flush was over.
        late[:0] = _take_waiting(session)
    engine = session.info.pop(_PUBLISHED, None)
    if engine is not None:
        _wake(session, engine)


def _take_waiting(session: Session) -> list[Outgoing]:
    """Take the entries that wait in *session* out of it."""
    waiting = _waiting(session)
    for entry in waiting:
        session.expunge(entry)
    return [entry.message for entry in waiting]


def _publish_alone(session: Session, messages: Sequence[Outgoing]) -> None:
    """Publish *messages* of *session*, which has been committed without them."""
    settings = _outlet(session).settings
    # Not by the session: to use it would begin its next transaction.
    bind = session.get_bind(**_bind_arguments(entry_class(settings.schema_name)))
    if write_alone(bind, settings, messages):
        _wake(session, bind.engine)


def _wake(session: Session, engine: Engine) -> None:
    try:
        _outlet(session).wake(engine)
    except ConfigurationError as error:
        if engine not in _unreachable:
            _unreachable.add(engine)
            logger.warning("cannot wake the sequencer; messages are found by polling: %s", error)
    except Exception:
        logger.exception("cannot wake the sequencer; messages are found by polling")


def _after_soft_rollback(session: Session, _: SessionTransaction) -> None:
    # Of a flush that has failed: what it has noted is not for the next one to tell.
    flushes.end(session)


def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    # However it ended; after a rollback there is nothing to wake the sequencer for.
    if transaction.parent is not None:
        return
    session.info.pop(_PUBLISHED, None)
    flushes.end(session)
    late = endings.ended(session)
    is_left = session._new and not session.in_transaction()  # noqa: SLF001
    if is_left and (waiting := _take_waiting(session)):
        # What waits in a session is dropped when it is closed, before its events are called.
        logger.warning(
            "%d messages are dropped that were published while a session was being closed, on %s",
            len(waiting),
            ", ".join(sorted({message.channel for message in waiting})),
        )
    if late:
        _publish_alone(session, late)
