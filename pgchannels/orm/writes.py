"""A row that a flush writes: what it was, and what it has become."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from sqlalchemy import Connection, select
from sqlalchemy.orm import InstanceState, PassiveFlag
from sqlalchemy.orm.attributes import get_history
from sqlalchemy.orm.exc import ObjectDeletedError

from pgchannels.orm.change import Change, Operation
from pgchannels.orm.plans import Plan

__all__ = ["Write"]

_UNKNOWN = object()


@dataclass(eq=False)
class Write:
    """A row that a flush writes, and what will be forgotten by the end of it."""

    object: Any
    state: InstanceState[Any]
    plan: Plan
    operation: Operation
    connection: Connection
    changed: set[str] = field(default_factory=set)
    former: dict[str, Any] = field(default_factory=dict)
    written: set[str] = field(default_factory=set)
    """What an update writes, whether or not it has been set."""
    read: dict[str, Any] = field(default_factory=dict)
    """What was set, or will be filled in, without being loaded, as it is in the row."""
    filled: dict[str, Any] = field(default_factory=dict)
    """Values, before it, of what an update fills in by itself; some may be unknown."""

    def before(self) -> None:
        """The row is about to be written: note what will be lost, and read what must be known."""
        changed, former = self._history()
        values = self.state.dict
        # Not by committed_state: merge() sets every attribute, mostly to what it is already. The
        # unit of work leaves such a column out of its UPDATE, which then fills it in.
        filled = self.plan.filled.keys() - changed - self.written
        unread = (self.plan.former & changed) - former.keys()
        if changed and self.operation == "update":
            self._load(filled)
            unread |= (self.plan.former & filled) - values.keys()
        self.read = self._read(unread)
        self.changed, self.former = self._history()
        self.filled = {
            name: values[name] if name in values else self.read.get(name, _UNKNOWN)
            for name in filled
        }

    def after(self) -> Change[Any] | None:
        """The row has been written, and its history is still there: what has happened, if anything.

        An update may have changed nothing.
        """
        if self.operation == "insert":
            return Change(self.object, "insert", frozenset(self.known), {})
        if self.operation == "delete":
            return Change(self.object, "delete", frozenset(), self.former)
        self._look_again()
        if not self.changed:
            return None
        return Change(self.object, "update", frozenset(self.changed), self.former)

    def value(self, name: str) -> Any:
        """The value in the row: the new one, of a deleted row the last."""
        values = self.state.dict
        if self.operation == "delete" and name in self.former:
            return self.former[name]
        if name in values:
            return values[name]
        if self.operation == "insert" and self._is_initial(name):
            return self.plan.initial[name]
        if self.state.session is not None:
            return getattr(self.object, name)
        return self._read({name}).get(name)

    @cached_property
    def known(self) -> dict[str, Any]:
        """The values of an inserted row that are known without a query."""
        values = self.state.dict
        return {
            name: values[name] if name in values else self.plan.initial[name]
            for name in self.plan.columns
            if name in values or self._is_initial(name)
        }

    def key(self) -> dict[str, Any]:
        """By which readers know the row: the former one, where an update changes it."""
        if self.operation == "delete":
            return dict(zip(self.plan.key, self._identity(), strict=True))
        return {
            name: self.former[name] if name in self.former else self.value(name)
            for name in self.plan.key
        }

    def _look_again(self) -> None:
        # A listener that came after ours may have set something, and post_update= too. What was set
        # to an expression has been expired by now, and lost its history.
        values = self.state.dict
        lost = self.changed - self.state.committed_state.keys() - self.written
        former = {name: value for name, value in self.former.items() if name in lost}
        self.changed, self.former = self._history()
        self.changed |= lost
        self.former |= former
        # What was set to what it is in the row is written, too, if that was not known.
        updated = self.changed.union(self.read.keys() - self.filled.keys())
        for name, value in self.filled.items():
            if updated.isdisjoint(self.plan.filled[name]):
                continue
            if value is _UNKNOWN:
                self.changed.add(name)
            elif name not in values or not self._equals(name, value):
                self.changed.add(name)
                self.former[name] = value

    def _load(self, names: Collection[str]) -> None:
        """Load *names*, if the object has expired.

        The unit of work would do so next, before the update, for it needs the row's key: it is the
        same query, only earlier.
        """
        expired = self.state.expired_attributes
        if self.state.session is None or expired.isdisjoint(names):
            return
        for name in expired.intersection(self.plan.key):
            with suppress(ObjectDeletedError):  # SQLAlchemy will say so
                getattr(self.object, name)  # brings all that have expired
            return

    def _history(self) -> tuple[set[str], dict[str, Any]]:
        """What has been set to something else, and what is known of before."""
        changed: set[str] = set()
        former: dict[str, Any] = {}
        committed = self.state.committed_state
        for name in self.plan.columns if committed or self.written else ():
            if name not in committed:
                if name not in self.written:
                    continue
                deleted: Sequence[Any] = ()
            else:
                added, _, deleted = get_history(
                    self.object, name, PassiveFlag.PASSIVE_NO_INITIALIZE
                )
                if not added and not deleted:
                    continue
            if deleted:
                former[name] = deleted[0]
            elif name in self.read:
                if self._equals(name, self.read[name]):
                    continue
                former[name] = self.read[name]
            changed.add(name)
        return changed, former

    def _equals(self, name: str, value: Any) -> bool:
        # As SQLAlchemy decides whether to write. An expression equals nothing: it gives another.
        compare = self.state.mapper.columns[name].type.compare_values
        return compare(value, self.state.dict.get(name)) is True

    def _is_initial(self, name: str) -> bool:
        return name in self.plan.initial and name not in self.state.expired_attributes

    def _identity(self) -> tuple[Any, ...]:
        if self.state.identity is not None:
            return tuple(self.state.identity)
        return tuple(self.state.dict.get(name) for name in self.plan.key)

    def _read(self, names: Collection[str]) -> dict[str, Any]:
        """Columns of the row as it is now; nothing if there is none."""
        if not names:
            return {}
        mapper = self.state.mapper
        columns = {name: getattr(mapper.class_, name) for name in names}
        statement = select(*columns.values()).where(
            *(
                column == value
                for column, value in zip(mapper.primary_key, self._identity(), strict=True)
            )
        )
        row = self.connection.execute(statement).one_or_none()
        return {} if row is None else dict(zip(columns, row, strict=True))
