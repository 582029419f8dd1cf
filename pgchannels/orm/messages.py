"""What a write has to tell: to which channels, and in which words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

from pydantic import BaseModel, ValidationError

from pgchannels.channels import check_channel, user_channel
from pgchannels.errors import InvalidChannel, InvalidPayload, InvalidUser, MessageTooLarge
from pgchannels.orm.change import Change
from pgchannels.orm.outbox import Outlet
from pgchannels.orm.plans import PlannedRule
from pgchannels.orm.rules import Users
from pgchannels.orm.template import Template
from pgchannels.orm.writes import Write
from pgchannels.records import Outgoing

__all__ = ["messages_of"]

_PAST = {"insert": "inserted", "update": "updated", "delete": "deleted"}


def messages_of(write: Write, change: Change[Any], outlet: Outlet) -> list[Outgoing]:
    """The messages about *write* by the rules of its class, in their order."""
    return [
        message
        for planned in write.plan.rules
        for message in _messages(write, change, planned, outlet)
    ]


def _messages(
    write: Write, change: Change[Any], planned: PlannedRule, outlet: Outlet
) -> Iterator[Outgoing]:
    rule = planned.rule
    if (
        change.operation not in rule.on
        or (
            change.operation == "update"
            and planned.changed is not None
            and planned.changed.isdisjoint(change.changed)
        )
        or (rule.when is not None and not rule.when(change))
    ):
        return
    channels = list(dict.fromkeys(_channels(write, change, planned)))
    if not channels:
        return
    message = _encode(write, change, planned, channels[0], outlet)
    if message is not None:
        for channel in channels:
            yield message._replace(channel=channel)


def _channels(write: Write, change: Change[Any], planned: PlannedRule) -> Iterator[str]:
    for target in planned.rule.targets:
        if isinstance(target, Template):
            yield from _names(write, change, target)
            continue
        if isinstance(target, Users):
            yield from map(user_channel, _several(target.function(change)))
        else:
            yield from map(check_channel, _several(target(change)))


def _several(given: str | Iterable[str] | None) -> Iterable[str]:
    if isinstance(given, str) or not isinstance(given, Iterable):
        return () if given is None else (given,)
    return given


def _names(write: Write, change: Change[Any], template: Template) -> Iterator[str]:
    if change.operation == "delete":
        yield from _former_name(template, write.value)
        return
    moved = template.attributes & change.changed
    if change.operation == "update" and moved and moved <= change.former.keys():
        yield from _former_name(
            template,
            lambda name: change.former[name] if name in change.former else write.value(name),
        )
    now = template.render(write.value)
    if now is not None:
        yield template.channel(now)


def _former_name(template: Template, value_of: Callable[[str], Any]) -> Iterator[str]:
    # A row that something else has written may have a value that makes no name. Nobody can read
    # that channel, and the row must be possible to repair and to delete.
    with suppress(InvalidChannel, InvalidUser):
        name = template.render(value_of)
        if name is not None:
            yield template.channel(name)


def _encode(
    write: Write, change: Change[Any], planned: PlannedRule, channel: str, outlet: Outlet
) -> Outgoing | None:
    rule = planned.rule
    content: Any
    if rule.model is not None:
        content = _validated(rule.model, write, change)
    elif rule.payload is not None:
        content = rule.payload(change)
        if content is None:
            return None
    else:
        return _encode_default(write, change, planned, channel, outlet)
    return outlet.message(channel, content, ttl=rule.ttl, headers=rule.headers)


def _validated(model: type[BaseModel], write: Write, change: Change[Any]) -> BaseModel:
    try:
        return model.model_validate(change.object, from_attributes=True)
    except ValidationError as error:
        raise InvalidPayload(
            f"{write.plan.class_name} does not fit {model.__name__}: {error}"
        ) from error


def _encode_default(
    write: Write, change: Change[Any], planned: PlannedRule, channel: str, outlet: Outlet
) -> Outgoing:
    parts = {"key": write.key()}
    if change.operation == "insert":
        parts["new"] = write.known
    elif change.operation == "update":
        parts["new"] = {
            name: write.value(name)
            for name in write.plan.columns
            if name in change.changed and (name in write.state.dict or name not in write.filled)
        }
    payload = {"type": f"{planned.table}.{_PAST[change.operation]}", **parts}
    rule = planned.rule
    try:
        return outlet.message(channel, payload, ttl=rule.ttl, headers=rule.headers)
    except InvalidPayload:
        for values in parts.values():
            for name, value in values.items():
                _check_value(write, name, value, outlet)
        raise


def _check_value(write: Write, name: str, value: Any, outlet: Outlet) -> None:
    try:
        outlet.message("checked", {name: value}, ttl=None, headers=None)
    except MessageTooLarge:
        pass
    except InvalidPayload as error:
        raise _refused(write, name, error) from error


def _refused(write: Write, name: str, error: Exception) -> InvalidPayload:
    return InvalidPayload(
        f"{write.plan.class_name}.{name} cannot be published: {error}. Give @publishes a payload "
        "that does without it"
    )
