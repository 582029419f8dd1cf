"""FastAPI's OAuth2 bearer scheme, for sockets as for requests."""

from __future__ import annotations

from typing import Any, cast

from fastapi.openapi.models import OAuthFlows
from fastapi.security import OAuth2
from starlette.requests import HTTPConnection

from pgchannels.web.auth.sources import HeaderToken
from pgchannels.web.errors import AuthenticationError, SocketError
from pgchannels.web.refusal import refusal

__all__ = ["OAuth2Bearer"]


class OAuth2Bearer(OAuth2):
    """A dependency that gives the token of ``Authorization: Bearer <token>``, unverified.

    ::

        bearer = OAuth2Bearer("/token")

        @app.websocket("/ws")
        async def chat(socket: WebSocket, token: Annotated[str, Depends(bearer)]) -> None: …

    It stands in the OpenAPI document, like FastAPI's own. Other schemes than Bearer are not tokens.
    Who gives none is refused, and the endpoint is not run: 401 with ``WWW-Authenticate``, also for
    the handshake of a socket where the server can say so, else a close before it is accepted (403).

    Args:
        token_url: where clients get a token, for the document.
        refresh_url: where they get the next one.
        scopes: names and descriptions, for the document.
        scheme_name: in the document.
        description: in the document.
        auto_error: if False, None is given where there is no token. What is no token by its form is
            refused all the same.
    """

    def __init__(
        self,
        token_url: str = "token",
        *,
        refresh_url: str | None = None,
        scopes: dict[str, str] | None = None,
        scheme_name: str | None = None,
        description: str | None = None,
        auto_error: bool = True,
    ) -> None:
        password = {"tokenUrl": token_url, "refreshUrl": refresh_url, "scopes": scopes or {}}
        super().__init__(
            flows=OAuthFlows(password=cast("Any", password)),
            scheme_name=scheme_name,
            description=description,
            auto_error=auto_error,
        )

    async def __call__(self, request: HTTPConnection) -> str | None:
        failure: SocketError
        try:
            token = HeaderToken().find(request)
        except AuthenticationError as error:
            failure = error
        else:
            if token is not None or not self.auto_error:
                return token
            failure = AuthenticationError()
        raise refusal(request, failure.describe())
