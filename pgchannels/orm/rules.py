"""One ``@publishes``, as it was written: checked, and nothing looked up yet. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from inspect import iscoroutinefunction
from typing import Any, NamedTuple, TypeAlias, cast, get_args

from pydantic import BaseModel

from pgchannels.errors import ConfigurationError, InvalidMessage
from pgchannels.layer import outgoing
from pgchannels.orm.change import Change, Operation
from pgchannels.orm.template import Template, UserTemplate
from pgchannels.payloads import DEFAULT
from pgchannels.settings import Settings

__all__ = [
    "Channels",
    "Condition",
    "Content",
    "Naming",
    "Payload",
    "Rule",
    "Users",
    "make_rule",
]

Naming: TypeAlias = Callable[[Change[Any]], str | Iterable[str] | None]
Channels: TypeAlias = str | Naming | Sequence[str | Naming]
Condition: TypeAlias = Callable[[Change[Any]], bool]
Content: TypeAlias = Callable[[Change[Any]], Mapping[str, Any] | BaseModel | None]
Payload: TypeAlias = type[BaseModel] | Content

OPERATIONS: tuple[Operation, ...] = get_args(Operation)


class Users(NamedTuple):
    """A function whose results are ids of users, not names of channels."""

    function: Naming


@dataclass(frozen=True)
class Rule:
    """See :func:`pgchannels.orm.publishes`."""

    targets: tuple[Template | Naming | Users, ...]
    on: frozenset[Operation]
    model: type[BaseModel] | None
    """Makes the payload, …"""
    payload: Content | None
    """… or this does; by default neither."""
    changed: tuple[str, ...] | None
    when: Condition | None
    ttl: float | timedelta | None
    headers: Mapping[str, str] | None

    @property
    def attributes(self) -> frozenset[str]:
        """Those that have a place in a channel's name."""
        templates = [target for target in self.targets if isinstance(target, Template)]
        return frozenset[str]().union(*(template.attributes for template in templates))


def make_rule(
    channel: Channels | None,
    *,
    user: Channels | None,
    on: Operation | Sequence[Operation],
    payload: Payload | None,
    changed: str | Sequence[str] | None,
    when: Condition | None,
    ttl: float | timedelta | None,
    headers: Mapping[str, str] | None,
) -> Rule:
    """Check what was given to ``@publishes``.

    Raises:
        ConfigurationError: it cannot work, whatever the class.
    """
    for function in (payload, when):
        if function is not None:
            _check_function(function)
    _check_extras(ttl, headers)
    model: type[BaseModel] | None = None
    content: Content | None = None
    if isinstance(payload, type) and issubclass(payload, BaseModel):
        model = payload
    elif payload is not None:
        content = cast(Content, payload)  # type checkers disagree about what is left
    return Rule(
        targets=_targets(channel, user),
        on=_operations(on),
        model=model,
        payload=content,
        changed=None if changed is None else _names(changed),
        when=when,
        ttl=ttl,
        headers=None if headers is None else dict(headers),
    )


def _targets(
    channel: Channels | None, user: Channels | None
) -> tuple[Template | Naming | Users, ...]:
    channels = [Template(each) if isinstance(each, str) else each for each in _each(channel)]
    users = [UserTemplate(each) if isinstance(each, str) else Users(each) for each in _each(user)]
    if not channels and not users:
        raise ConfigurationError("@publishes needs a channel, or user=")
    return (*channels, *users)


def _each(given: Channels | None) -> list[str | Naming]:
    if given is None:
        return []
    several = [given] if isinstance(given, str) or callable(given) else list(given)
    for target in several:
        if not isinstance(target, str):
            _check_function(target)
    return several


def _operations(on: Operation | Sequence[Operation]) -> frozenset[Operation]:
    given = {on} if isinstance(on, str) else set(on)
    if not given or not given <= set(OPERATIONS):
        raise ConfigurationError(f"on= is one or more of {', '.join(OPERATIONS)}, not {on!r}")
    return frozenset(operation for operation in OPERATIONS if operation in given)


def _names(changed: str | Sequence[str]) -> tuple[str, ...]:
    names = (changed,) if isinstance(changed, str) else tuple(changed)
    if not names or not all(isinstance(name, str) for name in names):
        raise ConfigurationError(
            f"changed= is the name of an attribute, or several, not {changed!r}"
        )
    return names


def _check_function(function: object) -> None:
    if not callable(function):
        raise ConfigurationError(f"@publishes takes functions here, not {function!r}")
    if iscoroutinefunction(function):
        raise ConfigurationError(
            f"{function!r} cannot be awaited inside a flush: give an ordinary function"
        )


def _check_extras(ttl: float | timedelta | None, headers: Mapping[str, str] | None) -> None:
    if headers is not None and not isinstance(headers, Mapping):
        raise ConfigurationError(f"headers= is a mapping of texts, not {headers!r}")
    try:
        outgoing("checked", {}, Settings.model_construct(), DEFAULT, ttl=ttl, headers=headers)
    except InvalidMessage as error:
        raise ConfigurationError(f"@publishes cannot give a message this: {error}") from error
