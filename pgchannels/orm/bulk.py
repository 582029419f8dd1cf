"""``Session.bulk_save_objects()`` with messages: it has no events that would tell of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

from sqlalchemy import Connection, inspect
from sqlalchemy.orm import InstanceState, Mapper, Session

from pgchannels.orm.flushes import Flush
from pgchannels.orm.plans import plan_of

__all__ = ["wrap_bulk_save"]

# In Session.info: a call is being made. A class and its base may both have been wrapped.
_SAVING = "pgchannels.saving"


def wrap_bulk_save(session_class: type[Session], tell: Callable[[Session, Flush], None]) -> None:
    """Have ``bulk_save_objects()`` of *session_class* call *tell* when its rows are written.

    Keys that the server makes are asked for where there are none yet, as with
    ``return_defaults=True``: a message needs them.
    """
    save = session_class.bulk_save_objects

    @wraps(save)
    def bulk_save_objects(
        self: Session,
        objects: Iterable[object],
        return_defaults: bool = False,
        update_changed_only: bool = True,
        preserve_order: bool = True,
        **options: Any,
    ) -> None:
        objects = list(objects)
        options |= {"update_changed_only": update_changed_only, "preserve_order": preserve_order}
        states = [] if _SAVING in self.info else _publishing(objects)
        if not states:
            save(self, objects, return_defaults=return_defaults, **options)
            return
        # As a flush does: if the messages cannot be written, neither are the rows.
        transaction = self._autobegin_t()._begin()  # noqa: SLF001
        self.info[_SAVING] = True
        try:
            flush = _note(self, states, update_changed_only=update_changed_only)
            save(self, objects, return_defaults=return_defaults or _lack_keys(states), **options)
            flush.written()
            with self.no_autoflush:
                tell(self, flush)
            transaction.commit()
        except BaseException:
            transaction.rollback(_capture_exception=True)
            raise
        finally:
            del self.info[_SAVING]

    session_class.bulk_save_objects = bulk_save_objects  # type: ignore[method-assign]


def _publishing(objects: Iterable[object]) -> list[InstanceState[Any]]:
    states = (inspect(object, raiseerr=False) for object in objects)
    return [
        state
        for state in states
        if isinstance(state, InstanceState) and plan_of(state.mapper).rules
    ]


def _lack_keys(states: Iterable[InstanceState[Any]]) -> bool:
    new = (state for state in states if state.key is None)
    return any(state.dict.get(name) is None for state in new for name in plan_of(state.mapper).key)


def _note(
    session: Session, states: Iterable[InstanceState[Any]], *, update_changed_only: bool
) -> Flush:
    flush = Flush()
    connections: dict[Mapper[Any], Connection] = {}
    for state in states:
        connection = connections.get(state.mapper)
        if connection is None:
            connection = session.connection(bind_arguments={"mapper": state.mapper})
            connections[state.mapper] = connection
        write = flush.add("insert" if state.key is None else "update", state, connection)
        if write is not None and write.operation == "update":
            if not update_changed_only:
                plan = write.plan
                write.written = set(plan.columns).intersection(state.dict).difference(plan.key)
            write.before()
    return flush
