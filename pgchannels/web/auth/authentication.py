"""From a request to an identity: where tokens may stand, who verifies them, what else must hold."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Security
from starlette.requests import HTTPConnection
from starlette.websockets import WebSocket, WebSocketDisconnect

from pgchannels.errors import ConfigurationError
from pgchannels.web.auth.identity import Identity
from pgchannels.web.auth.origins import Origins
from pgchannels.web.auth.sources import (
    FirstMessageToken,
    HeaderToken,
    SubprotocolToken,
    TokenSource,
    check_token,
)
from pgchannels.web.callables import is_async_callable
from pgchannels.web.errors import AuthenticationError, SocketError
from pgchannels.web.refusal import refusal

__all__ = ["Authentication", "Verify"]

Verify = Callable[[str], Awaitable[Identity]]
"""From a token to who bears it; raises AuthenticationError if it is not good."""


class Authentication:
    """Says whose request it is, before anything is done for it.

    ::

        Authentication(JWT(…), HeaderToken(), SubprotocolToken(), FirstMessageToken(deadline=5))

    The sources are looked at in their order, and the first that has something decides: a bad token
    is refused, though a good one may stand elsewhere.

    Args:
        verify: from a token to an :class:`Identity`; a :class:`JWT`, or an async function of yours
            that raises :class:`~pgchannels.web.errors.AuthenticationError`.
        sources: where tokens may stand; the Authorization header and the subprotocol ``bearer`` if
            none are given.
        origins: which sites' pages may come with a cookie; if None, those of the same host only.
        revoked: whether somebody whose token is good is not welcome any more.

    Raises:
        ConfigurationError: what is no source, several first messages, or cookies from any site.

    Attributes:
        needs_origin_check: a browser may send the token unasked, so that the origin is checked.
        origins: by what it is checked, if it is.
        deadline: seconds that a client has for its first message; None if no token comes that way.
    """

    def __init__(
        self,
        verify: Verify,
        *sources: TokenSource,
        origins: Origins | None = None,
        revoked: Callable[[Identity], Awaitable[bool]] | None = None,
    ) -> None:
        if not is_async_callable(verify):
            raise ConfigurationError("verify is an async callable, from a token to an Identity")
        if revoked is not None and not is_async_callable(revoked):
            raise ConfigurationError("revoked is an async callable, from an Identity to a bool")
        given: object = origins
        if given is not None and not isinstance(given, Origins):
            raise ConfigurationError(f"origins must be Origins(…), not {given!r}")
        self.sources = sources or (HeaderToken(), SubprotocolToken())
        for source in self.sources:
            if isinstance(source, type) or not hasattr(source, "ambient"):
                raise ConfigurationError(f"{source!r} is not a source of tokens")
        first = [source for source in self.sources if isinstance(source, FirstMessageToken)]
        if len(first) > 1:
            raise ConfigurationError("there is one first message")
        self._first = first[0] if first else None
        self.needs_origin_check = any(source.ambient for source in self.sources)
        self.origins = Origins() if origins is None else origins
        if self.needs_origin_check and self.origins.any:
            raise ConfigurationError("with cookies, any site could act for its visitors: list them")
        self._verify = verify
        self._revoked = revoked

    @property
    def deadline(self) -> float | None:
        return None if self._first is None else self._first.deadline

    async def handshake(
        self, connection: HTTPConnection, *, origin_checked: bool = False
    ) -> Identity | None:
        """Who opens this socket, or makes this request. None: the first message will say.

        Args:
            connection: the request, before it is answered.
            origin_checked: the caller has seen to that.

        Raises:
            AuthenticationError: no token, or one that is not good; TokenExpired if it was.
            ConnectionRefused: the token came with a cookie, from a site that may not.
        """
        identity = await self._find(connection, origin_checked=origin_checked)
        if identity is None and (self._first is None or not _is_socket(connection)):
            raise AuthenticationError
        return identity

    async def first_message(self, frame: str | bytes) -> Identity:
        """Who says ``{"type": "auth", "token": …}`` first.

        Raises:
            AuthenticationError: that is not what is said, or the token is not good.
        """
        if self._first is None:
            raise ConfigurationError("the token does not come with the first message here")
        return await self._identify(self._first.parse(frame))

    async def receive(self, websocket: WebSocket) -> Identity:
        """Wait for the first message of a socket that has just been accepted, up to the deadline.

        Raises:
            AuthenticationError: it did not come in time, or is not good.
            WebSocketDisconnect: the client has gone.
        """
        try:
            async with asyncio.timeout(self.deadline):
                received = await websocket.receive()
        except TimeoutError:
            raise AuthenticationError("no token came in time") from None
        if received["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(received.get("code") or 1006, received.get("reason"))
        text: str | None = received.get("text")
        return await self.first_message(received.get("bytes") or b"" if text is None else text)

    async def refresh(self, token: str, current: Identity) -> Identity:
        """The identity for a connection that goes on with a new token.

        Raises:
            AuthenticationError: the token is not good, or another user's.
        """
        identity = await self._identify(token)
        if identity.user_id != current.user_id:
            raise AuthenticationError("this is another user's token", code="other_user")
        return identity

    def accept_subprotocol(self, connection: HTTPConnection) -> str | None:
        """The subprotocol to accept a socket with, if its client sends its token as one."""
        for source in self.sources:
            if isinstance(source, SubprotocolToken):
                name = source.accepted(connection)
                if name is not None:
                    return name
        return None

    def dependency(
        self, *, optional: bool = False, scheme: Callable[..., Any] | None = None
    ) -> Callable[..., Awaitable[Any]]:
        """Make a dependency of FastAPI that gives the :class:`Identity`, for requests and sockets.

        ::

            Current = Annotated[Identity, Depends(authentication.dependency())]

        Who has no good token is refused, and the endpoint is not run.

        Args:
            optional: give None where there is no token, rather than refuse. A bad one is refused. A
                token in the first message has not come yet when dependencies are asked.
            scheme: stands in the OpenAPI document, such as ``OAuth2Bearer(auto_error=False)``.
        """
        if scheme is not None and getattr(scheme, "auto_error", False):
            raise ConfigurationError(
                "the scheme is for the document only: give it auto_error=False"
            )

        async def current_identity(connection: HTTPConnection) -> Identity | None:
            try:
                identity = await self._find(connection)
                if identity is None and not optional:
                    raise AuthenticationError
            except SocketError as error:
                failure = refusal(connection, error.describe())
            else:
                return identity
            raise failure

        if scheme is None:
            return current_identity

        async def documented(
            connection: HTTPConnection,
            _: Any = Security(scheme),  # noqa: B008 - an annotation could not name what is local
        ) -> Identity | None:
            return await current_identity(connection)

        return documented

    async def _find(
        self, connection: HTTPConnection, *, origin_checked: bool = False
    ) -> Identity | None:
        for source in self.sources:
            token = source.find(connection)
            if token is not None:
                if source.ambient and not origin_checked:
                    self.origins.check(connection)
                return await self._identify(token)
        return None

    async def _identify(self, token: str) -> Identity:
        identity = await self._verify(check_token(token))
        if not isinstance(identity, Identity):
            raise ConfigurationError(f"verify gave {type(identity).__name__}, not an Identity")
        if self._revoked is not None and await self._revoked(identity):
            raise AuthenticationError("the token has been revoked", code="token_revoked")
        return identity


def _is_socket(connection: HTTPConnection) -> bool:
    return bool(connection.scope["type"] == "websocket")
