"""Open the layer with the application, close it with it, and say goodbye to clients before."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, NotRequired, TypedDict

from pgchannels.web.connections import ConnectionManager, check_layer
from pgchannels.web.signals import before_exit

if TYPE_CHECKING:
    from fastapi import FastAPI

    from pgchannels.layer import ChannelLayer

__all__ = ["lifespan"]


class State(TypedDict):
    layer: ChannelLayer
    connections: NotRequired[ConnectionManager]


def lifespan(
    layer: ChannelLayer | ConnectionManager,
) -> Callable[[FastAPI], AbstractAsyncContextManager[State]]:
    """Make a lifespan for ``FastAPI(lifespan=lifespan(layer))``, or ``lifespan(connections)``.

    Requests and sockets find the layer as ``request.state.layer``, and the manager as
    ``request.state.connections``. An application with a lifespan of its own enters the layer there:
    ``async with layer: yield``; or enters this one: ``async with lifespan(connections)(app) as
    state: yield state``.

    With a manager, the server's clients are told to connect again, to another one, before it shuts
    down: at SIGTERM and SIGINT, which the server gets when that is done, or at once if they come
    again; or when the lifespan ends, whatever is first.
    """
    if isinstance(layer, ConnectionManager):
        return _managed(layer)
    check_layer(layer)

    @asynccontextmanager
    async def open_layer(_: FastAPI) -> AsyncIterator[State]:
        async with layer:
            yield {"layer": layer}

    return open_layer


def _managed(
    connections: ConnectionManager,
) -> Callable[[FastAPI], AbstractAsyncContextManager[State]]:
    @asynccontextmanager
    async def open_all(_: FastAPI) -> AsyncIterator[State]:
        connections.is_draining = False  # a test may start the application again
        async with connections.layer:
            try:
                async with before_exit(connections.drain):
                    yield {"layer": connections.layer, "connections": connections}
            finally:
                await connections.drain()

    return open_all
