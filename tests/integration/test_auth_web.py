"""Authentication by dependencies, in a served application: who is refused is not served."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any

import httpx2
import pytest
from fastapi import Depends, FastAPI, WebSocket
from starlette.types import ASGIApp, Receive, Scope, Send
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.typing import Subprotocol

from pgchannels import MemoryLayer
from pgchannels.web import JsonConsumer, channels_router, lifespan
from pgchannels.web.auth import (
    JWT,
    Action,
    Authentication,
    Capabilities,
    CookieToken,
    FirstMessageToken,
    HeaderToken,
    Identity,
    KeysUnavailable,
    OAuth2Bearer,
    QueryToken,
    SubprotocolToken,
    http_authorize,
)
from pgchannels.web.errors import AuthenticationError
from tests.support.sockets import serve
from tests.support.tokens import HIDDEN, SECRET, says_nothing, token

VERIFY = JWT(SECRET, algorithms=["HS256"], audience="chat")
AUTHENTICATION = Authentication(
    VERIFY, HeaderToken(), SubprotocolToken(), CookieToken(), QueryToken("t"), FirstMessageToken()
)
BEARER = OAuth2Bearer("/token")
MAYBE = OAuth2Bearer("/token", scheme_name="Maybe", auto_error=False)

Current = Annotated[Identity, Depends(AUTHENTICATION.dependency(scheme=MAYBE))]
Optional = Annotated[Identity | None, Depends(AUTHENTICATION.dependency(optional=True))]


class Room(JsonConsumer):
    async def connect(self, identity: Current) -> None:
        RAN.append("consumer")
        await self.accept(AUTHENTICATION.accept_subprotocol(self.websocket))
        await self.identify(identity.user_id)
        await self.send_json({"user": identity.user_id})


# The endpoints that were run.
RAN: list[str] = []


def make_app(layer: MemoryLayer) -> FastAPI:
    app = FastAPI(lifespan=lifespan(layer))

    @app.websocket("/bearer")
    async def with_bearer(socket: WebSocket, given: Annotated[str, Depends(BEARER)]) -> None:
        RAN.append("bearer")
        await socket.accept()
        await socket.send_json({"length": len(given)})

    @app.get("/bearer")
    async def get_with_bearer(given: Annotated[str, Depends(BEARER)]) -> dict[str, int]:
        RAN.append("bearer")
        return {"length": len(given)}

    @app.get("/maybe")
    async def maybe(given: Annotated[str | None, Depends(MAYBE)]) -> dict[str, bool]:
        return {"given": given is not None}

    @app.get("/me")
    async def me(identity: Current) -> dict[str, str]:
        RAN.append("me")
        return {"user": identity.user_id}

    @app.websocket("/me")
    async def socket_me(socket: WebSocket, identity: Current) -> None:
        RAN.append("me")
        await socket.accept(AUTHENTICATION.accept_subprotocol(socket))
        await socket.send_json({"user": identity.user_id})

    @app.get("/optional")
    async def optional(identity: Optional) -> dict[str, bool]:
        return {"known": identity is not None}

    @app.websocket("/first")
    async def first(socket: WebSocket) -> None:
        if (identity := await AUTHENTICATION.handshake(socket)) is None:
            await socket.accept()
            try:
                identity = await AUTHENTICATION.receive(socket)
            except AuthenticationError as error:
                await socket.close(error.ws_code, error.code)
                return
        RAN.append("first")
        await socket.send_json({"user": identity.user_id})

    async def odd(identity: Identity | None, action: Action, channel: str) -> bool:
        if channel == "away":
            raise KeysUnavailable
        return await Capabilities()(identity, action, channel)

    app.add_api_websocket_route("/consumer", Room.as_endpoint())
    app.include_router(
        channels_router(layer, authorize=http_authorize(odd, AUTHENTICATION.dependency())),
        prefix="/channels",
    )
    return app


@pytest.fixture(autouse=True)
def _no_token_in_the_log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    RAN.clear()
    caplog.set_level(logging.DEBUG)
    # What the client and the protocol's parser log is not ours.
    for name in ("websockets", "httpx2", "httpcore2", "uvicorn", "asyncio"):
        caplog.set_level(logging.WARNING, name)
    yield
    says_nothing(caplog.text)


class Plain:
    """The application, on a server that cannot answer a handshake by HTTP."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            scope["extensions"].pop("websocket.http.response", None)
        await self.app(scope, receive, send)


@pytest.fixture
async def address() -> AsyncIterator[str]:
    async with serve(make_app(MemoryLayer())) as address:
        yield address


@pytest.fixture
async def plain_address() -> AsyncIterator[str]:
    async with serve(Plain(make_app(MemoryLayer()))) as address:
        yield address


async def get(address: str, path: str, **headers: str) -> httpx2.Response:
    async with httpx2.AsyncClient() as client:
        return await client.get(f"http://{address}{path}", headers=headers)


async def refused(address: str, path: str, **options: Any) -> Any:
    with pytest.raises(InvalidStatus) as caught:
        async with connect(f"ws://{address}{path}", **options):
            pass
    return caught.value.response


def header(given: str) -> dict[str, Any]:
    return {"additional_headers": {"Authorization": f"Bearer {given}"}}


BAD = [
    pytest.param({}, "Bearer", id="no token"),
    pytest.param({"Authorization": "Basic YTpi"}, "Bearer", id="another scheme"),
    pytest.param({"Authorization": "Bearer"}, 'Bearer error="invalid_token"', id="empty"),
    pytest.param({"Authorization": "Bearer a b"}, 'Bearer error="invalid_token"', id="two tokens"),
]


class TestBearer:
    async def test_a_token_is_given_to_both(self, address: str) -> None:
        given = token()
        response = await get(address, "/bearer", Authorization=f"Bearer {given}")
        assert response.json() == {"length": len(given)}
        async with connect(f"ws://{address}/bearer", **header(given)) as socket:
            assert await socket.recv() == f'{{"length":{len(given)}}}'

    @pytest.mark.parametrize(("headers", "challenge"), BAD)
    async def test_refused_over_http(
        self, address: str, headers: dict[str, str], challenge: str
    ) -> None:
        response = await get(address, "/bearer", **headers)
        assert (response.status_code, response.headers["WWW-Authenticate"]) == (401, challenge)
        assert RAN == []

    @pytest.mark.parametrize(("headers", "challenge"), BAD)
    async def test_a_socket_is_refused_before_it_is_accepted(
        self, address: str, headers: dict[str, str], challenge: str
    ) -> None:
        response = await refused(address, "/bearer", additional_headers=headers)
        assert (response.status_code, response.headers["WWW-Authenticate"]) == (401, challenge)
        assert RAN == []

    @pytest.mark.parametrize(("headers", "challenge"), BAD)
    async def test_also_where_the_server_knows_403_only(
        self, plain_address: str, headers: dict[str, str], challenge: str
    ) -> None:
        response = await refused(plain_address, "/bearer", additional_headers=headers)
        assert response.status_code == 403
        assert RAN == []

    async def test_without_auto_error(self, address: str) -> None:
        assert (await get(address, "/maybe")).json() == {"given": False}
        assert (await get(address, "/maybe", Authorization="Basic x")).json() == {"given": False}
        assert (await get(address, "/maybe", Authorization="Bearer x")).json() == {"given": True}
        assert (await get(address, "/maybe", Authorization="Bearer")).status_code == 401

    async def test_the_document_has_it(self, address: str) -> None:
        document = (await get(address, "/openapi.json")).json()
        schemes = document["components"]["securitySchemes"]
        assert schemes["OAuth2Bearer"]["flows"]["password"]["tokenUrl"] == "/token"
        assert document["paths"]["/bearer"]["get"]["security"] == [{"OAuth2Bearer": []}]
        assert document["paths"]["/me"]["get"]["security"] == [{"Maybe": []}]


class TestDependency:
    @pytest.mark.parametrize("path", ["/me", "/consumer"])
    async def test_sockets_and_consumers(self, address: str, path: str) -> None:
        url = f"ws://{address}{path}"
        wanted = f'{{"user":"{HIDDEN[0]}"}}'
        async with connect(url, **header(token())) as socket:
            assert await socket.recv() == wanted
            assert socket.subprotocol is None
        offered = [Subprotocol("bearer"), Subprotocol(token())]
        async with connect(url, subprotocols=offered) as socket:
            assert await socket.recv() == wanted
            assert socket.subprotocol == "bearer"
        async with connect(f"{url}?t={token()}") as socket:
            assert await socket.recv() == wanted
        async with connect(url, additional_headers={"Cookie": f"token={token()}"}) as socket:
            assert await socket.recv() == wanted

    @pytest.mark.parametrize("path", ["/me", "/consumer"])
    @pytest.mark.parametrize(
        ("make", "challenge"),
        [
            (lambda: token("x" * 64), 'Bearer error="invalid_token"'),
            (
                lambda: token(exp=1),
                'Bearer error="invalid_token", error_description="the token has expired"',
            ),
        ],
    )
    async def test_a_bad_token_is_refused_and_that_is_all(
        self, address: str, plain_address: str, path: str, make: Any, challenge: str
    ) -> None:
        given = make()
        response = await refused(address, path, **header(given))
        assert response.status_code == 401
        assert response.headers["WWW-Authenticate"] == challenge
        says_nothing(response.body.decode())
        assert (await refused(plain_address, path, **header(given))).status_code == 403
        # Neither by another source, though that one is good.
        for where in (address, plain_address):
            await refused(where, f"{path}?t={token()}", **header(given))
        assert RAN == []

    async def test_requests(self, address: str) -> None:
        good = await get(address, "/me", Authorization=f"Bearer {token()}")
        assert good.json() == {"user": HIDDEN[0]}
        bad = await get(address, "/me", Authorization="Bearer x")
        assert bad.status_code == 401
        assert bad.json()["detail"]["code"] == "invalid_token"
        assert (await get(address, "/me")).status_code == 401
        assert (await get(address, "/optional")).json() == {"known": False}
        assert (await get(address, "/optional", Authorization="Bearer x")).status_code == 401

    @pytest.mark.parametrize("origin", ["https://evil.example", "null"])
    async def test_a_foreign_origin_with_a_cookie(self, address: str, origin: str) -> None:
        cookie = {"Cookie": f"token={token()}"}
        response = await refused(address, "/me", additional_headers={**cookie, "Origin": origin})
        assert response.status_code == 403
        response = await get(address, "/me", **cookie, Origin=origin)
        assert response.status_code == 403
        assert RAN == []
        own = {**cookie, "Origin": f"http://{address}"}
        async with connect(f"ws://{address}/me", additional_headers=own) as socket:
            assert await socket.recv()

    async def test_the_first_message(self, address: str) -> None:
        url = f"ws://{address}/first"
        async with connect(url) as socket:
            await socket.send(f'{{"type": "auth", "token": "{token()}"}}')
            assert await socket.recv() == f'{{"user":"{HIDDEN[0]}"}}'
        for bad in ("{", '{"type": "auth"}', '{"type": "auth", "token": "x"}', b"\xff"):
            async with connect(url) as socket:
                await socket.send(bad)
                with pytest.raises(ConnectionClosed):
                    await socket.recv()
                assert socket.close_code == 3000
        assert RAN == ["first"]


class TestHistory:
    async def test_it_goes_by_the_same_rules(self, address: str) -> None:
        headers = {"Authorization": f"Bearer {token(cap={'room:*': ['history']})}"}

        async def status(channel: str, **headers: str) -> int:
            return (await get(address, f"/channels/{channel}/messages", **headers)).status_code

        assert await status("room:1", **headers) == 200
        assert await status("secret", **headers) == 403
        assert await status("room:%2A", **headers) == 403
        assert await status("pgchannels:members", **headers) == 403
        assert await status("room:1") == 401
        live = {"Authorization": f"Bearer {token(cap={'room:*': ['subscribe']})}"}
        assert await status("room:1", **live) == 403

    async def test_what_is_wrong_with_authorizing_is_told(self, address: str) -> None:
        headers = {"Authorization": f"Bearer {token()}"}
        response = await get(address, "/channels/away/messages", **headers)
        assert (response.status_code, response.headers["Retry-After"]) == (503, "5")
