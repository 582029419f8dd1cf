"""What a subclass of a connection may override, and how; checked once, when the class is made.

A method with the name of one of ours takes its place, whether that is meant or not. Found out when
the class is made, it is a sentence for its author; otherwise, a socket that is accepted and deaf.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import FunctionType
from typing import Any, NamedTuple

from pgchannels.errors import ConfigurationError
from pgchannels.web.callables import is_async_callable

__all__ = ["check_overrides", "is_ours"]


class _Call(NamedTuple):
    """How a method is called: what it must be able to take."""

    arguments: tuple[Any, ...] = ()
    keywords: tuple[str, ...] = ()


_ARGUMENT = object()
_CALLS = {
    "disconnect": [_Call((_ARGUMENT,))],
    "dispatch": [_Call((_ARGUMENT,))],
    "forward": [_Call((_ARGUMENT,))],
    "receive": [_Call((), ("text",)), _Call((), ("bytes",))],
    "receive_bytes": [_Call((_ARGUMENT,))],
    "receive_json": [_Call((_ARGUMENT,))],
    "serve": [_Call()],
    "truncated": [_Call()],
}
_FINAL = {"is_meant_by", "life", "reauthorize_soon", "run"}
# Set by us on each object.
_ATTRIBUTES = {
    "bytes_in",
    "bytes_out",
    "channel_name",
    "close_code",
    "connected_at",
    "connections",
    "identity",
    "layer",
    "messages_in",
    "messages_out",
    "metadata",
    "user_id",
    "websocket",
}
_INSTEAD = {
    "groups": "to read groups, call self.group_add('news') in connect()",
    "run": "to receive in another way, override serve()",
    "user_id": "call self.identify(user_id) in connect()",
    "metadata": "call self.identify(user_id, metadata) in connect()",
    "layer": "say as_endpoint(layer)",
}


def is_ours(cls: type) -> bool:
    """Whether *cls* is a class of this library, or of Python."""
    return cls is object or cls.__module__.partition(".")[0] == "pgchannels"


def check_overrides(cls: type) -> None:
    """Look at what *cls* and its bases define under names of ours.

    Raises:
        ConfigurationError: it is not there to be overridden, or cannot be called as ours is.
    """
    for name, given in _overrides(cls):
        where = f"{cls.__qualname__}.{name}"
        ours = next((vars(each)[name] for each in _ours(cls) if name in vars(each)), None)
        is_private = name.startswith("_") and not name.startswith("__")
        is_data = name in _ATTRIBUTES or (isinstance(ours, property) and name != "resume_position")
        if is_private or is_data or name in _FINAL:
            instead = _INSTEAD.get(name, "choose another name")
            raise ConfigurationError(f"{where} would take the place of pgchannels' own: {instead}")
        if not inspect.iscoroutinefunction(ours):
            continue
        if not is_async_callable(given) and not is_async_callable(inspect.unwrap(given)):
            raise ConfigurationError(f"{where} must be an async method: async def {name}(self, …)")
        if isinstance(given, FunctionType) and not _can_be_called(given, name):
            parameters = str(inspect.signature(ours)).partition(" ->")[0].replace("'", "")
            raise ConfigurationError(
                f"{where} has other parameters than it is called with: async def {name}{parameters}"
            )


def _ours(cls: type) -> Iterator[type]:
    return (each for each in cls.__mro__ if is_ours(each) and each is not object)


def _overrides(cls: type) -> Iterator[tuple[str, Any]]:
    """What users' classes have put in the place of something of ours, by name."""
    *_, base = _ours(cls)
    known = _ATTRIBUTES.union(*(vars(each) for each in _ours(cls)))
    # Other subclasses among its bases have been looked at, when they were made.
    new = (each for each in cls.__mro__ if each is cls or not issubclass(each, base))
    for name in {name: None for each in new if not is_ours(each) for name in vars(each)}:
        owner = next(each for each in cls.__mro__ if name in vars(each))
        if name in known and not is_ours(owner):
            yield name, vars(owner)[name]


def _can_be_called(given: FunctionType, name: str) -> bool:
    signature = inspect.signature(given)
    try:
        for call in _CALLS.get(name, ()):
            signature.bind(_ARGUMENT, *call.arguments, **dict.fromkeys(call.keywords))
    except TypeError:
        return False
    return True
