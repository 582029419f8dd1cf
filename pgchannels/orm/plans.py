"""What each mapped class publishes: its rules, and what has to be known of its attributes.

Rules are kept by the class that was decorated. A subclass has those of its bases too; mixins and
classes that are mapped later need nothing more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import Column
from sqlalchemy.orm import (
    ColumnProperty,
    CompositeProperty,
    Mapper,
    RelationshipDirection,
    RelationshipProperty,
    SynonymProperty,
)
from sqlalchemy.sql.schema import ScalarElementColumnDefault

from pgchannels.errors import ConfigurationError
from pgchannels.orm.rules import Rule

__all__ = ["Plan", "PlannedRule", "add_rule", "has_rules", "plan_of"]

_rules: WeakKeyDictionary[type, list[Rule]] = WeakKeyDictionary()
_plans: WeakKeyDictionary[Mapper[Any], Plan] = WeakKeyDictionary()


@dataclass(frozen=True)
class PlannedRule:
    """A rule, for the objects of one class."""

    rule: Rule
    table: str
    """What the default payload's type begins with."""
    changed: frozenset[str] | None
    """The column attributes that ``changed=`` comes down to."""


@dataclass(frozen=True)
class Plan:
    """What the objects of one mapped class publish. Names are those of column attributes."""

    class_name: str
    rules: tuple[PlannedRule, ...]
    columns: tuple[str, ...]
    key: tuple[str, ...]
    former: frozenset[str]
    """Those whose former values must be known."""
    places: frozenset[str]
    """Those that have a place in a channel's name."""
    filled: Mapping[str, frozenset[str]]
    """Those that an update fills in by itself, each with those whose update does so."""
    initial: Mapping[str, Any]
    """Values that an insert gives to those that were not set, where they are always the same."""


def has_rules(class_: type) -> bool:
    """Whether *class_* itself was decorated before."""
    return class_ in _rules


def add_rule(class_: type, rule: Rule) -> None:
    # Decorators apply from the bottom up, and messages come in the order that one reads.
    _rules.setdefault(class_, []).insert(0, rule)
    _plans.clear()


def plan_of(mapper: Mapper[Any]) -> Plan:
    """The plan for the objects of *mapper*, which has been configured.

    Raises:
        ConfigurationError: a rule names an attribute that is no mapped column.
    """
    plan = _plans.get(mapper)
    if plan is None:
        plan = _plans[mapper] = _make_plan(mapper)
    return plan


def _make_plan(mapper: Mapper[Any]) -> Plan:
    columns = {
        property_.key: property_.columns[0]
        for property_ in mapper.column_attrs
        if isinstance(property_.columns[0], Column)
    }
    rules = tuple(_planned_rules(mapper))
    places = frozenset[str]().union(*(planned.rule.attributes for planned in rules))
    for name in sorted(places - columns.keys()):
        raise ConfigurationError(
            f"a channel of {mapper.class_.__name__} has a place for {name!r}, which is no mapped "
            "column of it; for anything else, give a function"
        )
    key = tuple(mapper.get_property_by_column(column).key for column in mapper.primary_key)
    return Plan(
        class_name=mapper.class_.__name__,
        rules=rules,
        columns=tuple(columns),
        key=key,
        former=places.union(*(planned.changed or () for planned in rules)),
        places=places,
        filled={
            name: _updated_with(mapper, column, columns)
            for name, column in columns.items()
            if column.onupdate is not None
            or column.server_onupdate is not None
            or _is_counted(mapper, column)
        },
        initial={
            name: _initial(column)
            for name, column in columns.items()
            if _has_initial(column)
            and name not in key
            and column is not mapper.version_id_col
            and column is not mapper.polymorphic_on
        },
    )


def _is_counted(mapper: Mapper[Any], column: Column[Any]) -> bool:
    """Whether it is a version that changes by itself, not one that the application sets."""
    return column is mapper.version_id_col and (
        mapper.version_id_generator is not False or column.server_default is not None
    )


def _updated_with(mapper: Mapper[Any], column: Column[Any], names: Iterable[str]) -> frozenset[str]:
    """Those of *names* whose change updates the table of *column*.

    Inheritance may have several tables. The one with the version is updated with any of them.
    """
    version = mapper.version_id_col
    if version is not None and version.table is column.table:
        return frozenset(names)
    return frozenset(
        name
        for name in names
        if any(each.table is column.table for each in mapper.column_attrs[name].columns)
    )


def _has_initial(column: Column[Any]) -> bool:
    if column.default is None:
        return column.server_default is None
    return column.default.is_scalar


def _initial(column: Column[Any]) -> Any:
    return column.default.arg if isinstance(column.default, ScalarElementColumnDefault) else None


def _planned_rules(mapper: Mapper[Any]) -> Iterator[PlannedRule]:
    for class_ in mapper.class_.__mro__:
        for rule in _rules.get(class_, ()):
            changed = None
            if rule.changed is not None:
                names = (_column_names(mapper, name) for name in rule.changed)
                changed = frozenset[str]().union(*names)
            yield PlannedRule(rule, _table_name(mapper, class_), changed)


def _table_name(mapper: Mapper[Any], declared: type) -> str:
    """The table of the class that the rule was declared on, or of the first one with it."""
    while (
        mapper.inherits is not None
        and not mapper.concrete
        and issubclass(mapper.inherits.class_, declared)
    ):
        mapper = mapper.inherits
    name: str = getattr(mapper.local_table, "name", mapper.class_.__name__)
    return name


def _column_names(mapper: Mapper[Any], name: str) -> set[str]:
    """The column attributes that are written when the attribute *name* changes."""
    match mapper.attrs.get(name):
        case ColumnProperty(columns=[Column(), *_]):
            return {name}
        case CompositeProperty() as composite:
            return {part.key for part in composite.props}
        case SynonymProperty() as synonym:
            return _column_names(mapper, synonym.name)
        case RelationshipProperty(direction=RelationshipDirection.MANYTOONE) as relationship:
            return {
                mapper.get_property_by_column(column).key
                for column in relationship.local_columns
                if isinstance(column, Column)
            }
        case _:
            raise ConfigurationError(
                f"changed= names {name!r}, which no column of {mapper.class_.__name__} holds"
            )
