"""Endpoints that FastAPI resolves parameters for: those of a consumer's ``connect()``."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Sequence
from inspect import Parameter
from typing import TYPE_CHECKING, Any

from starlette.requests import HTTPConnection
from starlette.websockets import WebSocket

from pgchannels.errors import ConfigurationError
from pgchannels.layer import ChannelLayer
from pgchannels.web.annotations import Unresolved, resolve
from pgchannels.web.connections import ConnectionManager

if TYPE_CHECKING:
    from pgchannels.web.consumer import WebSocketConsumer

__all__ = ["Managers", "find_layer", "make_endpoint"]

_VARIADIC = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


def make_endpoint(
    consumer: type[WebSocketConsumer],
    layer: ChannelLayer | ConnectionManager | None,
    connect: Callable[..., Any],
    parameters: Sequence[Parameter],
) -> Callable[..., Awaitable[None]]:
    """A function that serves a socket, whose signature says what *connect* needs.

    Args:
        consumer: a class; each socket gets an object of it.
        layer: or a manager; what the application's state has if None.
        connect: its method.
        parameters: the method's, as far as they could be resolved when the class was created.

    Raises:
        ConfigurationError: a parameter that FastAPI could not give.
    """
    managers = Managers(layer)
    needed = [_resolved(p, connect) for p in parameters if p.kind not in _VARIADIC]
    # FastAPI gives the socket to one parameter only; connect() may have one of its own.
    own = next((p.name for p in needed if _is_socket(p.annotation)), None)
    name = own or "websocket"
    if own is None:
        needed.insert(0, Parameter(name, Parameter.KEYWORD_ONLY, annotation=WebSocket))

    # Starlette's own routes give the socket by place, FastAPI's everything by name.
    async def endpoint(*given: WebSocket, **values: Any) -> None:
        websocket: WebSocket = given[0] if given else values[name]
        if own is None:
            values.pop(name, None)
        await consumer(websocket, managers.of(websocket)).run(**values)

    endpoint.__name__ = consumer.__name__
    endpoint.__qualname__ = consumer.__qualname__
    endpoint.__module__ = consumer.__module__
    endpoint.__doc__ = consumer.__doc__
    setattr(endpoint, "__signature__", inspect.Signature(needed))  # noqa: B010 - mypy's
    return endpoint


class Managers:
    """Which manager serves the sockets of an endpoint.

    Args:
        given: a manager, or a layer, which gets one with the defaults; None for what the
            application's lifespan has opened.

    Raises:
        ConfigurationError: it is neither.
    """

    def __init__(self, given: ChannelLayer | ConnectionManager | None) -> None:
        self._given: ConnectionManager | None = None
        if isinstance(given, ConnectionManager):
            self._given = given
        elif given is not None:
            self._given = ConnectionManager(given)
        self._found: ConnectionManager | None = None

    def of(self, connection: HTTPConnection) -> ConnectionManager:
        """The manager for a socket.

        Raises:
            ConfigurationError: there is none, and no layer either.
        """
        if self._given is not None:
            return self._given
        manager = getattr(connection.state, "connections", None)
        if isinstance(manager, ConnectionManager):
            return manager
        layer = find_layer(connection)
        if self._found is None or self._found.layer is not layer:
            self._found = ConnectionManager(layer)
        return self._found


def find_layer(connection: HTTPConnection) -> ChannelLayer:
    """The layer that :func:`~pgchannels.web.lifespan` has opened.

    Raises:
        ConfigurationError: there is none.
    """
    layer = getattr(connection.state, "layer", None)
    if not isinstance(layer, ChannelLayer):
        raise ConfigurationError(
            "no channel layer: FastAPI(lifespan=lifespan(layer)) puts it where as_endpoint() finds "
            "it; a lifespan of your own has to yield {'layer': layer}; or give as_endpoint(layer)"
        )
    return layer


def _is_socket(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, WebSocket)


def _resolved(parameter: Parameter, connect: Callable[..., Any]) -> Parameter:
    if parameter.kind is Parameter.POSITIONAL_ONLY:
        raise ConfigurationError(
            f"{connect.__qualname__} takes {parameter.name!r} by place; its parameters are given "
            "by name"
        )
    annotation = parameter.annotation
    if isinstance(annotation, Unresolved):
        # It may have been defined in the module, below the class.
        annotation = resolve(str(annotation), connect, {})
    if isinstance(annotation, Unresolved):
        raise ConfigurationError(
            f"{connect.__qualname__} annotates {parameter.name!r} with {str(annotation)!r}, which "
            "is not there at run time; FastAPI needs it (an import for type checkers only?)"
        )
    # By name only, so that those with a default need not come last.
    return parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=annotation)
