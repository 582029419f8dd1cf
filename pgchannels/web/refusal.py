"""What is refused is answered by an HTTP response that says why: requests, and sockets too.

Sockets by the denial response of ASGI, where the server has that extension (uvicorn and hypercorn
do); by others the socket is closed before it is accepted, which is HTTP 403 (ASGI specification,
``websocket.http.response`` and ``websocket.close``).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException, WebSocketException
from starlette.responses import JSONResponse
from starlette.websockets import WebSocketState

from pgchannels.web.codes import NORMAL, cut

if TYPE_CHECKING:
    from starlette.requests import HTTPConnection
    from starlette.websockets import WebSocket

    from pgchannels.web.errors import Problem

__all__ = ["body", "closed_by", "ending", "headers", "refusal", "refuse"]

_EXTENSION = "websocket.http.response"

# RFC 6750, section 3: no error where no token was given.
_CHALLENGES = {
    "unauthenticated": "Bearer",
    "token_expired": 'Bearer error="invalid_token", error_description="the token has expired"',
}


def body(problem: Problem) -> dict[str, Any]:
    """``{"detail": …}``, where FastAPI has it too."""
    return {"detail": problem.response().model_dump(mode="json", exclude_none=True)}


def headers(problem: Problem) -> dict[str, str]:
    """``Retry-After``, in whole seconds (RFC 9110, section 10.2.3), and for 401 a challenge."""
    found = {}
    if problem.retry_after is not None and math.isfinite(problem.retry_after):
        found["Retry-After"] = str(max(1, math.ceil(problem.retry_after)))
    if problem.http_status == 401:
        found["WWW-Authenticate"] = _CHALLENGES.get(problem.code, 'Bearer error="invalid_token"')
    return found


def refusal(connection: HTTPConnection, problem: Problem) -> HTTPException | WebSocketException:
    """What to raise in an endpoint or a dependency, so that FastAPI refuses the request or socket.

    Nothing after it is run then.
    """
    if connection.scope["type"] != "websocket" or _can_respond(connection):
        return HTTPException(problem.http_status, body(problem)["detail"], headers(problem))
    return WebSocketException(problem.ws_code, cut(problem.code))


def ending(websocket: WebSocket, code: int | None, reason: str) -> WebSocketException:
    """What to raise in an endpoint that is not to run, though its socket has been accepted.

    Whoever serves the application closes the socket by it, if there is anything left to close.

    Args:
        websocket: whose endpoint it is.
        code: to close with; None if the client is gone.
        reason: to close with.
    """
    if code is None or websocket.application_state is WebSocketState.DISCONNECTED:
        return closed_by(websocket, code, reason)
    return WebSocketException(code, cut(reason))


def closed_by(websocket: WebSocket, code: int | None, reason: str = "") -> WebSocketException:
    """What to raise in an endpoint whose socket has been closed because of an error.

    Dependencies with ``yield`` must know that it has failed. Whoever serves the application has
    nothing more to do; but no exception says so, and any other one would be logged.
    """
    websocket.close = _closed  # type: ignore[method-assign]
    return WebSocketException(code or NORMAL, cut(reason))


async def _closed(code: int = NORMAL, reason: str | None = None) -> None:
    """Close a socket that is closed."""


async def refuse(websocket: WebSocket, problem: Problem) -> None:
    """Refuse the socket here and now."""
    if _can_respond(websocket):
        response = JSONResponse(body(problem), problem.http_status, headers(problem))
        await websocket.send_denial_response(response)
    else:
        await websocket.close(problem.ws_code, cut(problem.code))


def _can_respond(connection: HTTPConnection) -> bool:
    return _EXTENSION in (connection.scope.get("extensions") or {})
