"""How a dependency refuses: by exceptions that FastAPI ends the request, or the handshake, with.

The endpoint is then never run. A socket is refused before it is accepted: with the HTTP status
where the server can answer a handshake so (ASGI's ``websocket.http.response``), else with a close,
which a client sees as 403.
"""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

from fastapi import HTTPException, WebSocketException

from pgchannels.web.codes import POLICY_VIOLATION
from pgchannels.web.errors import AuthenticationError, SocketError, TokenExpired

if TYPE_CHECKING:
    from starlette.requests import HTTPConnection

__all__ = ["refusal"]


def refusal(error: SocketError, connection: HTTPConnection) -> HTTPException | WebSocketException:
    """What to raise in a dependency because of *error*."""
    is_socket = connection.scope["type"] == "websocket"
    if is_socket and "websocket.http.response" not in (connection.scope.get("extensions") or {}):
        return WebSocketException(POLICY_VIOLATION, error.code)
    headers = {}
    if isinstance(error, AuthenticationError):
        headers["WWW-Authenticate"] = _challenge(error)
    if error.retry_after is not None:
        headers["Retry-After"] = str(ceil(error.retry_after))
    return HTTPException(error.http_status, error.detail, headers)


def _challenge(error: AuthenticationError) -> str:
    # RFC 6750, section 3: no error where no token was given.
    if isinstance(error, TokenExpired):
        return 'Bearer error="invalid_token", error_description="the token has expired"'
    return "Bearer" if error.code == "unauthenticated" else 'Bearer error="invalid_token"'
