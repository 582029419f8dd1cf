"""Which methods handle what, declared or found by their names, once, when a class is created.

The result is a dictionary from types to functions. What comes in is looked up there and nowhere
else: no name that a client or another service sends is ever looked up on an object.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel

from pgchannels.errors import ConfigurationError, InvalidPayload
from pgchannels.messages import Message, validated
from pgchannels.web.annotations import Unresolved, parameters
from pgchannels.web.overriding import is_ours

__all__ = [
    "EventHandlers",
    "Handler",
    "find_events",
    "find_receivers",
    "handles",
    "is_overridden",
    "receives",
]

_F = TypeVar("_F", bound=Callable[..., Awaitable[None]])

_HANDLES = "__pgchannels_handles__"
_RECEIVES = "__pgchannels_receives__"

_EMPTY = inspect.Parameter.empty
# In JSON, these can be written with a backslash, others only with \u.
_ESCAPABLE = re.compile(r'["\\/\x00-\x1f]')


def handles(*types: str) -> Callable[[_F], _F]:
    """Declare a consumer's method to handle the messages of these types, in place of forwarding.

    ::

        @handles("chat.message")
        async def on_chat(self, message: Message) -> None: ...

    A message's type is its payload's ``"type"``. The method's only parameter gets the
    :class:`~pgchannels.Message`; annotated with a pydantic model, the payload, validated.
    """
    return _declare(_HANDLES, "handles", types)


def receives(*types: str) -> Callable[[_F], _F]:
    """Declare a :class:`JsonConsumer`'s method to receive what clients send with these types.

    ::

        @receives("chat.send")
        async def on_send(self, content: ChatSend) -> None: ...

    What has another ``"type"``, or none, goes to ``receive_json()``. The method's only parameter
    gets the object that was sent; annotated with a pydantic model, that, validated.
    """
    return _declare(_RECEIVES, "receives", types)


class Handler(NamedTuple):
    """A method, and what its parameter is to be given."""

    function: Callable[..., Awaitable[None]]
    convert: Callable[[Any], Any]
    """From a message, or from what a client sent. Raises pydantic's ``ValidationError``."""

    @property
    def name(self) -> str:
        return getattr(self.function, "__qualname__", repr(self.function))


def is_overridden(cls: type, name: str) -> bool:
    """Whether a user's class, among *cls* and its bases, has defined the method *name*."""
    return not is_ours(next(each for each in cls.__mro__ if name in vars(each)))


class EventHandlers:
    """The handlers of a class for messages, by type.

    A message that no handler is for is to be passed on unparsed, so this looks into its text first:
    its type can be one of ours only if it is there in quotes, or disguised by an escape.
    """

    def __init__(self, by_type: Mapping[str, Handler]) -> None:
        self.by_type = by_type
        self._candidate = _candidate(by_type) if by_type else None

    def find(self, message: Message) -> Handler | None:
        """Who handles *message*; None for nobody."""
        if self._candidate is None or self._candidate.search(message.payload) is None:
            return None
        try:
            kind = message.type
        except InvalidPayload:
            return None
        return None if kind is None else self.by_type.get(kind)


def find_events(
    cls: type, namespace: Mapping[str, Any], known: Collection[Handler]
) -> EventHandlers:
    """The methods of *cls* that handle messages: declared, or by a name in the style of Channels.

    So ``chat_message`` is for ``"chat.message"``. A name counts if it is public, has an underscore
    and overrides nothing of ours, and if the method's only parameter is ``message`` or ``event``.

    Args:
        cls: a consumer's class.
        namespace: where to find what annotations name, besides the module.
        known: handlers of its bases; a method that is one of these is not resolved again.

    Raises:
        ConfigurationError: a method that cannot be a handler, or two for one type.
    """
    found: dict[str, Handler] = {}
    for name, method in _methods(cls):
        types = _declared(cls, name, _HANDLES)
        if types:
            _add(found, types, _handler(cls, name, method, namespace, known, _from_message))
        elif not _declared(cls, name, _RECEIVES) and _is_channels_style(cls, name, method):
            handler = _handler(cls, name, method, namespace, known, _from_message_or_other)
            if handler.convert is not _not_a_message:
                _add(found, (name.replace("_", "."),), handler)
    return EventHandlers(found)


def find_receivers(
    cls: type, namespace: Mapping[str, Any], known: Collection[Handler]
) -> dict[str, Handler]:
    """The methods of *cls* that receive what clients send, by type. As :func:`find_events`."""
    found: dict[str, Handler] = {}
    for name, method in _methods(cls):
        if types := _declared(cls, name, _RECEIVES):
            _add(found, types, _handler(cls, name, method, namespace, known, _from_content))
    return found


def _declare(attribute: str, decorator: str, types: tuple[object, ...]) -> Callable[[_F], _F]:
    if not types or not all(isinstance(kind, str) and kind for kind in types):
        raise ConfigurationError(f'@{decorator} takes the types: @{decorator}("chat.message")')

    def mark(function: _F) -> _F:
        setattr(function, attribute, (*getattr(function, attribute, ()), *types))
        return function

    return mark


def _add(found: dict[str, Handler], types: tuple[str, ...], handler: Handler) -> None:
    for kind in types:
        other = found.setdefault(kind, handler)
        if other is not handler:
            raise ConfigurationError(f"{kind!r} has two handlers: {other.name} and {handler.name}")


def _methods(cls: type) -> Iterator[tuple[str, Any]]:
    """What users' classes define, by name, as it is inherited. Ours are left out."""
    names = {name: None for each in cls.__mro__ if not is_ours(each) for name in vars(each)}
    for name in names:
        method = next(vars(each)[name] for each in cls.__mro__ if name in vars(each))
        if method is not None:  # which is how a subclass takes an inherited handler away
            yield name, method


def _declared(cls: type, name: str, attribute: str) -> tuple[str, ...]:
    """The types of a method: an override is declared as what it overrides, or anew."""
    for each in cls.__mro__:
        types: tuple[str, ...] | None = getattr(vars(each).get(name), attribute, None)
        if types:
            return types
    return ()


def _overrides_ours(cls: type, name: str) -> bool:
    return any(name in vars(each) for each in cls.__mro__ if is_ours(each))


def _is_channels_style(cls: type, name: str, method: object) -> bool:
    if name.startswith("_") or "_" not in name or not _is_coroutine_function(method):
        return False
    return _only_parameter(method) in ("message", "event") and not _overrides_ours(cls, name)


def _is_coroutine_function(method: object) -> typing.TypeGuard[FunctionType]:
    return isinstance(method, FunctionType) and inspect.iscoroutinefunction(method)


def _only_parameter(method: FunctionType) -> str | None:
    names = list(inspect.signature(inspect.unwrap(method)).parameters.values())[1:]
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return names[0].name if len(names) == 1 and names[0].kind not in variadic else None


def _handler(
    cls: type,
    name: str,
    method: object,
    namespace: Mapping[str, Any],
    known: Collection[Handler],
    converter: Callable[[Any], Callable[[Any], Any] | None],
) -> Handler:
    where = f"{cls.__qualname__}.{name}"
    if not _is_coroutine_function(method):
        raise ConfigurationError(f"{where} cannot be a handler: it is no 'async def' method")
    if _overrides_ours(cls, name):
        raise ConfigurationError(f"{where} cannot be a handler: it has another meaning already")
    for handler in known:
        if handler.function is method:
            return handler
    if _only_parameter(method) is None:
        raise ConfigurationError(f"{where} cannot be a handler: it must have one parameter")
    (parameter,) = parameters(method, {**namespace, **vars(cls)})
    convert = converter(parameter.annotation)
    if convert is None:
        raise ConfigurationError(
            f"{where} is a handler, and what it takes is not clear: annotate {parameter.name!r} "
            f"with a pydantic model, Message or nothing, not {parameter.annotation!r}, or rename it"
        )
    return Handler(method, convert)


def _from_message(annotation: Any) -> Callable[[Any], Any] | None:
    if isinstance(annotation, Unresolved):
        # Imported for type checkers only, most likely.
        return _as_it_is if annotation.rpartition(".")[2] == "Message" else None
    if annotation in (_EMPTY, Any, Message) or _origin(annotation) is Mapping:
        return _as_it_is
    if _origin(annotation) is dict:
        return dict
    model = _model(annotation)
    return None if model is None else partial(_validated_payload, model)


def _from_message_or_other(annotation: Any) -> Callable[[Any], Any] | None:
    """For methods that are handlers by their names only: one that takes a str, say, is none."""
    convert = _from_message(annotation)
    return _not_a_message if convert is None and not isinstance(annotation, Unresolved) else convert


def _from_content(annotation: Any) -> Callable[[Any], Any] | None:
    if annotation in (_EMPTY, Any) or _origin(annotation) in (dict, Mapping):
        return _as_it_is
    model = _model(annotation)
    return None if model is None else model.model_validate


def _model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return None


def _origin(annotation: Any) -> Any:
    return typing.get_origin(annotation) or annotation


def _as_it_is(value: Any) -> Any:
    return value


def _not_a_message(value: Any) -> Any:
    raise TypeError("this method takes something else")


def _validated_payload(model: type[BaseModel], message: Message) -> BaseModel:
    return validated(message, model)


def _candidate(types: Collection[str]) -> re.Pattern[str]:
    texts = "|".join(re.escape(kind) for kind in types)
    # As JSON, each could also be written with escapes. Those of \u do for any character; others
    # are common in texts, and so looked at only if they can matter.
    escapes = r"\\" if any(map(_ESCAPABLE.search, types)) else r"\\u"
    return re.compile(f'"(?:{texts})"|{escapes}')
