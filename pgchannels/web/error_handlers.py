"""Errors over HTTP: what a client may hear of them, as the body of a response.

The same words, statuses and ids as over sockets: :func:`~pgchannels.web.errors.describe` finds
them, and :mod:`pgchannels.web.refusal` writes them down. What an operator must know is logged here.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from pgchannels.errors import PGChannelsError
from pgchannels.web.codes import cut
from pgchannels.web.errors import Problem, Severity, describe
from pgchannels.web.refusal import body, headers, refuse

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import HTTPConnection

__all__ = ["answering", "exception_handlers", "install_error_handlers"]

logger = logging.getLogger("pgchannels.web")

ExceptionHandler: TypeAlias = "Callable[[HTTPConnection, Exception], Awaitable[Response | None]]"


def exception_handlers() -> dict[type[Exception], ExceptionHandler]:
    """For ``FastAPI(exception_handlers=exception_handlers())``: how our errors are answered.

    Every :class:`~pgchannels.PGChannelsError` that an endpoint lets out gets its status, the body
    ``{"detail": …}`` with an :class:`~pgchannels.web.errors.ErrorResponse` in it, and
    ``Retry-After`` where trying again makes sense. What is internal is answered by 500 and an
    ``error_id``, under which the log has the rest; nothing of it is in the response.

    A socket is closed with the error's code; before it is accepted, it is refused with the status.
    """
    return {PGChannelsError: _answer}


def install_error_handlers(app: Starlette) -> None:
    """Have *app*, which may be a FastAPI, answer our errors: see :func:`exception_handlers`."""
    for kind, handler in exception_handlers().items():
        app.add_exception_handler(kind, handler)  # type: ignore[arg-type]


@contextmanager
def answering() -> Iterator[None]:
    """In this block of an endpoint, our errors become what the client is answered.

    Raises:
        HTTPException: in place of a :class:`~pgchannels.PGChannelsError`.
    """
    try:
        yield
    except PGChannelsError as error:
        problem = _note(error, "a request")
        raise HTTPException(
            problem.http_status, body(problem)["detail"], headers(problem)
        ) from error


async def _answer(connection: HTTPConnection, error: Exception) -> Response | None:
    if isinstance(connection, WebSocket):
        await _close(connection, error)
        return None
    problem = _note(error, connection.scope["path"])
    return JSONResponse(body(problem), problem.http_status, headers(problem))


async def _close(websocket: WebSocket, error: Exception) -> None:
    if WebSocketState.DISCONNECTED in (websocket.application_state, websocket.client_state):
        # What closed it has told the client, and the log, which is to have the traceback too.
        if describe(error).error_id is not None:
            logger.error("%r failed", websocket.scope["path"], exc_info=error)
        return
    problem = _note(error, websocket.scope["path"])
    try:
        if websocket.application_state is WebSocketState.CONNECTING:
            await refuse(websocket, problem)
        else:
            await websocket.close(problem.ws_code, cut(problem.code))
    except (RuntimeError, WebSocketDisconnect):
        logger.debug("the socket was gone before it could be closed")


def _note(error: Exception, where: str) -> Problem:
    """Log what is not the client's own, and say what the client may hear of it."""
    problem = describe(error)
    if problem.error_id is not None:
        logger.error(
            "%r failed; error %s",
            where,
            problem.error_id,
            exc_info=error,
            extra={"error_id": problem.error_id},
        )
    elif problem.severity is not Severity.INFO:
        logger.warning("%r: %s", where, error)
    return problem
