"""Sockets that are not accepted: the client gets an HTTP response that says why.

By the denial response of ASGI, where the server has that extension (uvicorn and hypercorn do); by
others the socket is closed before it is accepted, which is HTTP 403 (ASGI specification,
``websocket.http.response`` and ``websocket.close``).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException, WebSocketException
from starlette.responses import JSONResponse

if TYPE_CHECKING:
    from starlette.websockets import WebSocket

    from pgchannels.web.errors import Problem

__all__ = ["body", "headers", "refusal", "refuse"]

_EXTENSION = "websocket.http.response"


def body(problem: Problem) -> dict[str, Any]:
    """``{"detail": …}``, where FastAPI has it too."""
    return {"detail": problem.response().model_dump(mode="json", exclude_none=True)}


def headers(problem: Problem) -> dict[str, str]:
    """``Retry-After``, in whole seconds (RFC 9110, section 10.2.3), and for 401 what is wanted."""
    found = {}
    if problem.retry_after is not None:
        found["Retry-After"] = str(max(1, math.ceil(problem.retry_after)))
    if problem.http_status == 401:
        found["WWW-Authenticate"] = "Bearer"
    return found


def refusal(websocket: WebSocket, problem: Problem) -> HTTPException | WebSocketException:
    """What to raise in an endpoint, so that whoever serves the application refuses the socket."""
    if _EXTENSION in websocket.scope.get("extensions", {}):
        return HTTPException(problem.http_status, body(problem)["detail"], headers(problem))
    return WebSocketException(problem.ws_code, problem.code)


async def refuse(websocket: WebSocket, problem: Problem) -> None:
    """Refuse the socket here and now."""
    if _EXTENSION in websocket.scope.get("extensions", {}):
        response = JSONResponse(body(problem), problem.http_status, headers(problem))
        await websocket.send_denial_response(response)
    else:
        await websocket.close(problem.ws_code, problem.code)
