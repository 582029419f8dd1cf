"""``@publishes``: mapped classes whose objects publish what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from sqlalchemy import event, inspect
from sqlalchemy.orm import Mapper

from pgchannels.errors import ConfigurationError
from pgchannels.orm import flushes
from pgchannels.orm.change import Operation
from pgchannels.orm.plans import add_rule, has_rules, plan_of
from pgchannels.orm.rules import Channels, Condition, Payload, Rule, make_rule

__all__ = ["publishes"]

T = TypeVar("T")


def publishes(
    channel: Channels | None = None,
    *,
    user: Channels | None = None,
    on: Operation | Sequence[Operation] = ("insert", "update", "delete"),
    payload: Payload | None = None,
    changed: str | Sequence[str] | None = None,
    when: Condition | None = None,
    ttl: float | timedelta | None = None,
    headers: Mapping[str, str] | None = None,
) -> Callable[[type[T]], type[T]]:
    """Publish whenever an object of the decorated class is inserted, updated or deleted.

    ::

        @publishes("orders:{customer_id}", on=("insert", "update"))
        @publishes(user="{customer_id}", changed="status")  # all of the customer's connections
        class Order(Base): ...

    The message is written by the flush that writes the row, in the same transaction: it is
    published if, and only if, the row commits. All messages of a flush go by one insert at its end,
    in the order in which the unit of work took the objects, and after what :func:`publish` was
    called with before and in that flush.

    For a class that is mapped in any way, above or below the decorator that maps it; for a mixin;
    several times for several messages. Subclasses publish as their bases do. Only sessions of a
    target that was given to :func:`install` publish; in others the class is an ordinary one.

    Seen is what the unit of work writes, cascades and orphans too, and ``bulk_save_objects()``,
    which then asks for the keys that the server makes, as with ``return_defaults=True``. Not seen
    is what the unit of work does not know of: ``bulk_insert_mappings()``,
    ``bulk_update_mappings()``, ``insert()``, ``update()`` and ``delete()`` statements, and what the
    database does by itself (``ON DELETE CASCADE``, triggers). For these, have the table publish:
    ``pgchannels.watch()`` in SQL, a trigger.

    The functions are called at the end of the flush, when all keys are known, and may read what the
    session can load; objects of ``bulk_save_objects()`` are in no session, and have what was set.
    They must not change objects. An exception in one fails the flush, which rolls back.

    So that former values are known where they are asked for, by a template or by *changed*, an
    attribute that was set while it was expired costs a query: in the flush, never where it is set.

    Args:
        channel: a template, ``"orders:{customer_id}"``, with names of mapped columns; braces are
            doubled to mean themselves. It begins with a word of its own: with ``"{name}"``, a value
            could lead to any channel. Or a function of a :class:`Change` that returns
            one name, several, or None. Or a list of such. An object whose value is None has no
            message there. When an update moves an object from one channel to another, both get the
            message. A deleted object's channel is that of its row. If something else has written
            the row, where it was may be no valid name; nothing goes there, then. Names and payloads
            agree: an enum is its value, a bool is ``true`` or ``false``.
        user: instead of a channel or besides it, whose connections get the message: a template of a
            user's id, ``"{customer_id}"``, a function that returns one, several or None, or a list
            of such. As for channels: none for None, and both users are told when it changes.
        on: which of ``"insert"``, ``"update"`` and ``"delete"``. An update that changes no column
            is none.
        payload: a pydantic model class, to be validated from the object; or a function of a
            :class:`Change`, whose result is published as by :func:`publish`, or not at all if it is
            None. By default ``{"type": "<table>.inserted", "key": {…}, "new": {…}}``, or
            ``updated``, or ``deleted``: *key* has the primary key, as it was before an update;
            *new* the columns that have changed, after an insert all that are known without a query;
            a deleted object has no *new*. Values are as in FastAPI's responses, unless the layer
            has a serialiser of its own, which gets them as they are. Decimals are texts,
            ``"9.90"``, because a float would lose digits; in the messages of a watched table they
            are numbers up to 15 digits. It tells all that the row holds: where that is too much,
            give a payload.
        changed: names of attributes. An update is published only if one of them has changed.
        when: a function of a :class:`Change` that says whether it is published.
        ttl: how long the message can be read, in seconds; ``default_ttl`` if None.
        headers: texts by name, for each message.

    Raises:
        ConfigurationError: an argument that cannot work. Names of attributes are checked as soon
            as the class is mapped, at the latest when mappers are configured.

    A flush fails with :class:`InvalidChannel`, :class:`InvalidUser`, :class:`InvalidPayload` or
    :class:`MessageTooLarge` for a message that cannot be published, and with
    :class:`ConfigurationError` on AUTOCOMMIT and on another database than PostgreSQL.
    """
    rule = make_rule(
        channel,
        user=user,
        on=on,
        payload=payload,
        changed=changed,
        when=when,
        ttl=ttl,
        headers=headers,
    )

    def decorate(class_: type[T]) -> type[T]:
        _register(class_, rule)
        return class_

    return decorate


def _register(class_: type, rule: Rule) -> None:
    given: object = class_  # it may be anything
    if not isinstance(given, type):
        raise ConfigurationError(f"@publishes decorates a class, not {given!r}")
    mapper: Mapper[Any] | None = inspect(class_, raiseerr=False)
    if mapper is not None:
        for name in sorted(rule.attributes.union(rule.changed or ())):
            if not hasattr(class_, name):
                raise ConfigurationError(f"{class_.__name__} has no attribute {name!r}")
    listening = has_rules(class_)
    add_rule(class_, rule)
    if not listening:
        event.listen(class_, "mapper_configured", _check, propagate=True)
        event.listen(class_, "before_insert", flushes.before_insert, propagate=True, raw=True)
        event.listen(class_, "before_update", flushes.before_update, propagate=True, raw=True)
        event.listen(class_, "before_delete", flushes.before_delete, propagate=True, raw=True)
    if mapper is not None:
        for each in mapper.self_and_descendants:
            if each.configured:
                plan_of(each)


def _check(mapper: Mapper[Any], _: type) -> None:
    plan_of(mapper)
