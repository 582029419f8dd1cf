"""What a flush writes, noted down on the way, so that it can be told at the end.

Mapper events say what the unit of work is about to write, orphans and cascades included. They only
note it: former values are still in reach then, and keys are not known yet. At the end of the flush
it is the other way round, and messages are made of the two. What a flush that failed has noted is
dropped with it.

What :func:`publish` has added to the session is told at the end, too: after the rows, some of which
may have been waited for. Until then it stays in the session, as pending objects do.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection
from sqlalchemy.orm import InstanceState, Mapper, Session, UOWTransaction
from sqlalchemy.orm.attributes import instance_state
from sqlalchemy.orm.exc import ObjectDeletedError

from pgchannels.orm.change import Change, Operation
from pgchannels.orm.messages import messages_of
from pgchannels.orm.outbox import Entry, Outlet
from pgchannels.orm.plans import plan_of
from pgchannels.orm.writes import Write
from pgchannels.records import Outgoing
from pgchannels.transactions import check_transaction

__all__ = ["Flush", "before_delete", "before_insert", "before_update", "begin", "current", "end"]

# In Session.info, during a flush: what it writes.
_FLUSH = "pgchannels.flush"


class Flush:
    """What one flush writes, in the order in which the unit of work takes it.

    Attributes:
        entries: what was published beside it, in the order of publishing.
        is_written: whether :meth:`written` was called.
    """

    def __init__(self, context: UOWTransaction | None = None) -> None:
        self._context = context
        self._writes: dict[InstanceState[Any], Write] = {}
        self._changes: list[tuple[Write, Change[Any] | None]] = []
        self._connections: set[Connection] = set()
        self.entries: list[Entry] = []
        self.is_written = False

    def hold(self, entry: Entry) -> None:
        """Leave *entry*, which the session has, for the end of the flush."""
        if self._context is not None:
            # It counts as work, so that the end is reached, and is none: no INSERT of its own.
            self._context.register_object(instance_state(entry), listonly=True)
        self.entries.append(entry)

    def add(
        self, operation: Operation, state: InstanceState[Any], connection: Connection
    ) -> Write | None:
        """Note a write that is about to happen; None if it has been noted.

        A class and its base may both listen.

        Raises:
            ConfigurationError: it would commit by itself, or not in PostgreSQL.
        """
        if state in self._writes:
            return None
        if connection not in self._connections:
            check_transaction(connection)
            self._connections.add(connection)
        write = Write(state.obj(), state, plan_of(state.mapper), operation, connection)
        self._writes[state] = write
        return write

    def replaced_by(self, state: InstanceState[Any]) -> InstanceState[Any] | None:
        """The object that this flush was to delete, and whose row that of *state* takes over."""
        key = plan_of(state.mapper).key
        if self._context is None or all(state.dict.get(name) is None for name in key):
            return None
        # As the unit of work itself looks for it; orphans are deleted too.
        identity = state.mapper.identity_key_from_instance(state.obj())
        found = self._context.session.identity_map.get(identity)
        if found is None:
            return None
        existing = instance_state(found)
        deleted: bool = self._context.is_deleted(existing)  # type: ignore[no-untyped-call]
        return existing if deleted else None

    def written(self) -> None:
        """All has been written. To be called while the objects still have their history."""
        self._changes = [(write, write.after()) for write in self._writes.values()]
        self.is_written = True
        if self._context is None:
            return
        # They have had no INSERT, and must not become objects of the session.
        for entry in self.entries:
            state = instance_state(entry)
            if self._context.states.pop(state, None) is not None and state.session is not None:
                state.session.expunge(entry)

    def messages(self, outlet: Outlet) -> dict[Connection, list[Outgoing]]:
        """What is to be told, by the connection that wrote the rows.

        Raises:
            InvalidMessage: a message that cannot be published.
            Exception: what one of the application's functions raises.
        """
        messages: dict[Connection, list[Outgoing]] = {}
        for write, change in self._changes:
            if change is not None and (made := messages_of(write, change, outlet)):
                messages.setdefault(write.connection, []).extend(made)
        return messages


def begin(session: Session, context: UOWTransaction) -> Flush:
    """Take notes from here on, and forget those of a flush that had nothing to do."""
    flush = session.info[_FLUSH] = Flush(context)
    return flush


def current(session: Session) -> Flush | None:
    """What has been noted so far, if notes are taken."""
    flush: Flush | None = session.info.get(_FLUSH)
    return flush


def end(session: Session) -> Flush | None:
    """What has been noted, if anything; no more notes are taken."""
    flush: Flush | None = session.info.pop(_FLUSH, None)
    return flush


def before_insert(mapper: Mapper[Any], connection: Connection, state: InstanceState[Any]) -> None:
    if (flush := _flush_of(state)) is not None:
        replaced = flush.replaced_by(state)
        if replaced is not None:
            # The unit of work makes one UPDATE of the two; its DELETE will not come.
            before_delete(mapper, connection, replaced)
        flush.add("insert", state, connection)


def before_update(mapper: Mapper[Any], connection: Connection, state: InstanceState[Any]) -> None:
    flush = _flush_of(state)
    if flush is not None and (write := flush.add("update", state, connection)):
        write.before()


def before_delete(mapper: Mapper[Any], connection: Connection, state: InstanceState[Any]) -> None:
    if (flush := _flush_of(state)) is None:
        return
    object = state.obj()
    plan = plan_of(state.mapper)
    try:
        for name in state.expired_attributes.intersection(plan.columns).union(plan.places):
            getattr(object, name)  # the first of those that have expired brings them all
    except ObjectDeletedError:
        return  # Somebody else has deleted the row; SQLAlchemy will say so.
    if write := flush.add("delete", state, connection):
        write.before()


def _flush_of(state: InstanceState[Any]) -> Flush | None:
    session = state.session
    return None if session is None else current(session)
