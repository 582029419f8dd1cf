"""From a request to an identity, and what is refused on the way."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest
from starlette.websockets import WebSocket, WebSocketDisconnect

from pgchannels import ConfigurationError
from pgchannels.web.auth import (
    JWT,
    Authentication,
    CookieToken,
    FirstMessageToken,
    HeaderToken,
    Identity,
    OAuth2Bearer,
    Origins,
    QueryToken,
    SubprotocolToken,
    TokenSource,
)
from pgchannels.web.errors import AuthenticationError, ConnectionRefused, TokenExpired
from tests.support.tokens import HIDDEN, SECRET, bearer, connection, hides, says_nothing, token

JWTS = JWT(SECRET, algorithms=["HS256"], audience="chat")


@pytest.fixture(autouse=True)
def _no_token_in_the_log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level("DEBUG")
    yield
    says_nothing(caplog.text)


def made(*sources: TokenSource, **options: Any) -> Authentication:
    return Authentication(JWTS, *sources, **options)


def cookie(value: str) -> tuple[str, str]:
    return ("Cookie", f"token={value}")


class TestHandshake:
    async def test_header_and_subprotocol_by_default(self) -> None:
        authentication = made()
        for request in (
            connection(bearer(token())),
            connection(subprotocols=("bearer", token())),
        ):
            identity = await authentication.handshake(request)
            assert identity is not None
            assert identity.user_id == HIDDEN[0]
        assert authentication.deadline is None
        assert not authentication.needs_origin_check

    async def test_no_token(self) -> None:
        with pytest.raises(AuthenticationError) as caught:
            await made().handshake(connection(cookie(token())))
        assert (caught.value.code, caught.value.http_status) == ("unauthenticated", 401)

    async def test_expired(self) -> None:
        with pytest.raises(TokenExpired) as caught:
            await made().handshake(connection(bearer(token(exp=1))))
        hides(caught.value)

    async def test_the_first_source_that_has_one_decides(self) -> None:
        authentication = made(HeaderToken(), QueryToken(), FirstMessageToken())
        good = f"token={token()}"
        with pytest.raises(AuthenticationError):
            await authentication.handshake(connection(bearer("bad"), query=good))
        with pytest.raises(AuthenticationError):
            await authentication.handshake(connection(bearer(""), query=good))
        first = await authentication.handshake(connection(bearer(token(sub="eve")), query=good))
        assert first is not None
        assert first.user_id == "eve"
        other = await authentication.handshake(connection(("Authorization", "Basic x"), query=good))
        assert other is not None
        assert other.user_id == HIDDEN[0]

    async def test_none_if_the_first_message_is_to_say(self) -> None:
        authentication = made(HeaderToken(), FirstMessageToken(deadline=3))
        assert authentication.deadline == 3
        assert await authentication.handshake(connection()) is None
        with pytest.raises(AuthenticationError):
            await authentication.handshake(connection(bearer("bad")))
        with pytest.raises(AuthenticationError):
            await authentication.handshake(connection(kind="http"))

    async def test_revoked(self) -> None:
        async def revoked(identity: Identity) -> bool:
            return identity.token_id == "stolen"

        authentication = made(HeaderToken(), FirstMessageToken(), revoked=revoked)
        good = await authentication.handshake(connection(bearer(token())))
        assert good is not None
        for asked in (
            authentication.handshake(connection(bearer(token(jti="stolen")))),
            authentication.first_message(
                json.dumps({"type": "auth", "token": token(jti="stolen")})
            ),
            authentication.refresh(token(jti="stolen"), good),
        ):
            with pytest.raises(AuthenticationError) as caught:
                await asked
            assert caught.value.code == "token_revoked"

    async def test_a_verifier_of_ones_own(self) -> None:
        async def verify(given: str) -> Identity:
            if given != "good":
                raise AuthenticationError
            return Identity("ada")

        authentication = Authentication(verify)
        assert await authentication.handshake(connection(bearer("good"))) == Identity("ada")
        with pytest.raises(AuthenticationError):
            await authentication.handshake(connection(bearer("bad")))

    async def test_a_verifier_has_to_give_an_identity(self) -> None:
        async def verify(given: str) -> Any:
            return {"sub": given}

        with pytest.raises(ConfigurationError) as caught:
            await Authentication(verify).handshake(connection(bearer(token())))
        hides(caught.value)

    def test_the_subprotocol_to_accept(self) -> None:
        request = connection(subprotocols=("chat", "bearer", token()))
        assert made().accept_subprotocol(request) == "bearer"
        assert made(SubprotocolToken("jwt")).accept_subprotocol(request) is None
        assert made(HeaderToken()).accept_subprotocol(request) is None


class TestCookies:
    HOST = ("Host", "chat.example")

    @pytest.mark.parametrize("value", ["https://evil.example", "null", "", "https://chat.example/"])
    async def test_a_foreign_origin(self, value: str) -> None:
        request = connection(self.HOST, cookie(token()), ("Origin", value))
        authentication = made(CookieToken())
        assert authentication.needs_origin_check
        with pytest.raises(ConnectionRefused) as caught:
            await authentication.handshake(request)
        assert caught.value.code == "origin"
        hides(caught.value)
        assert await authentication.handshake(request, origin_checked=True) is not None

    async def test_its_own_and_listed_origins(self) -> None:
        authentication = made(CookieToken(), origins=Origins("https://shop.example"))
        for value in ("https://chat.example", "https://shop.example"):
            request = connection(self.HOST, cookie(token()), ("Origin", value))
            assert await authentication.handshake(request) is not None
        assert await authentication.handshake(connection(self.HOST, cookie(token()))) is not None

    async def test_a_token_that_a_page_has_to_know_needs_no_origin(self) -> None:
        request = connection(self.HOST, bearer(token()), ("Origin", "https://other.example"))
        assert await made(HeaderToken(), CookieToken()).handshake(request) is not None


class TestFirstMessage:
    async def test_it_says_who(self) -> None:
        authentication = made(FirstMessageToken())
        message = json.dumps({"type": "auth", "token": token()})
        for frame in (message, message.encode()):
            assert (await authentication.first_message(frame)).user_id == HIDDEN[0]
        with pytest.raises(AuthenticationError) as caught:
            await authentication.first_message(json.dumps({"type": "hi", "token": token()}))
        hides(caught.value)

    async def test_only_if_it_is_a_source(self) -> None:
        with pytest.raises(ConfigurationError):
            await made().first_message(json.dumps({"type": "auth", "token": token()}))

    async def test_it_is_waited_for_until_the_deadline(self) -> None:
        authentication = made(FirstMessageToken(deadline=0.02))

        async def never() -> Any:
            await asyncio.Event().wait()

        with pytest.raises(AuthenticationError) as caught:
            await authentication.receive(await accepted(never))
        assert caught.value.code == "unauthenticated"

    async def test_received(self) -> None:
        authentication = made(FirstMessageToken(deadline=60))
        message = json.dumps({"type": "auth", "token": token()})

        async def text() -> Any:
            return {"type": "websocket.receive", "text": message}

        async def gone() -> Any:
            return {"type": "websocket.disconnect", "code": 1001}

        assert (await authentication.receive(await accepted(text))).user_id == HIDDEN[0]
        with pytest.raises(WebSocketDisconnect) as caught:
            await authentication.receive(await accepted(gone))
        assert caught.value.code == 1001


async def accepted(receive: Any) -> WebSocket:
    """A socket that *receive* is the client of."""
    first = True

    async def received() -> Any:
        nonlocal first
        if first:
            first = False
            return {"type": "websocket.connect"}
        return await receive()

    async def send(_: Any) -> None:
        pass

    socket = WebSocket({"type": "websocket", "headers": []}, received, send)
    await socket.accept()
    return socket


class TestRefresh:
    async def test_the_same_user_goes_on(self) -> None:
        authentication = made()
        current = await JWTS(token())
        new = await authentication.refresh(token(jti="t-2"), current)
        assert new.token_id == "t-2"

    @pytest.mark.parametrize("sub", ["eve", f"{HIDDEN[0]} ", HIDDEN[0].upper()])
    async def test_another_users_token(self, sub: str) -> None:
        current = await JWTS(token())
        with pytest.raises(AuthenticationError) as caught:
            await made().refresh(token(sub=sub), current)
        assert caught.value.code == "other_user"
        hides(caught.value)

    async def test_a_bad_token(self) -> None:
        current = await JWTS(token())
        for bad in ("", "bad", token("x" * 64), "x" * 9000):
            with pytest.raises(AuthenticationError):
                await made().refresh(bad, current)
        with pytest.raises(TokenExpired):
            await made().refresh(token(exp=1), current)


class TestConfiguration:
    @pytest.mark.parametrize(
        "make",
        [
            lambda: Authentication("secret"),  # type: ignore[arg-type]
            lambda: made(HeaderToken),  # type: ignore[arg-type]
            lambda: made("token"),  # type: ignore[arg-type]
            lambda: made(FirstMessageToken(), FirstMessageToken()),
            lambda: made(CookieToken(), origins=Origins("*")),
        ],
    )
    def test_refused(self, make: Any) -> None:
        with pytest.raises(ConfigurationError):
            make()

    def test_any_origin_is_fine_without_cookies(self) -> None:
        assert not made(HeaderToken(), origins=Origins("*")).needs_origin_check

    def test_a_scheme_must_not_refuse_for_itself(self) -> None:
        with pytest.raises(ConfigurationError):
            made().dependency(scheme=OAuth2Bearer())


class TestIdentity:
    def test_it_tells_nobody_who(self) -> None:
        identity = Identity(HIDDEN[0], claims={"a": HIDDEN[1]}, token_id=HIDDEN[1])
        says_nothing(f"{identity!r} {identity} {[identity]}")
        says_nothing(f"{made(QueryToken(), CookieToken()).sources}")

    def test_its_claims_do_not_change(self) -> None:
        given = {"a": 1}
        identity = Identity("ada", claims=given)
        given["a"] = 2
        assert identity.claims["a"] == 1
        with pytest.raises(TypeError):
            identity.claims["a"] = 3  # type: ignore[index]

    @pytest.mark.parametrize("token_id", ["", "\0", "x" * 1001, "\ud800", 7])
    def test_a_token_can_be_revoked_by_its_id(self, token_id: Any) -> None:
        with pytest.raises(ValueError, match=r"the id of a token|surrogates"):
            Identity("ada", token_id=token_id)

    def test_times_have_a_zone(self) -> None:
        with pytest.raises(ValueError, match="time zone"):
            Identity("ada", expires_at=datetime(2026, 1, 1))  # noqa: DTZ001
