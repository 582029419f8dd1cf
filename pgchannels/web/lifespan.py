"""Open the layer with the application, close it with it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, TypedDict

from pgchannels.web.endpoint import check_layer

if TYPE_CHECKING:
    from fastapi import FastAPI

    from pgchannels.layer import ChannelLayer

__all__ = ["lifespan"]


class State(TypedDict):
    layer: ChannelLayer


def lifespan(
    layer: ChannelLayer,
) -> Callable[[FastAPI], AbstractAsyncContextManager[State]]:
    """Make a lifespan for ``FastAPI(lifespan=lifespan(layer))``.

    Requests and sockets find the layer as ``request.state.layer``. An application with a lifespan
    of its own enters the layer there: ``async with layer: yield``.
    """

    check_layer(layer)

    @asynccontextmanager
    async def open_layer(_: FastAPI) -> AsyncIterator[State]:
        async with layer:
            yield {"layer": layer}

    return open_layer
