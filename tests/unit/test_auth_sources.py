"""Where tokens stand, and the origins that may come with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import HTTPConnection

from pgchannels import ConfigurationError
from pgchannels.web.auth import (
    CookieToken,
    FirstMessageToken,
    HeaderToken,
    Origins,
    QueryToken,
    SubprotocolToken,
    TokenSource,
)
from pgchannels.web.auth.sources import MAX_TOKEN_LENGTH
from pgchannels.web.errors import AuthenticationError, ConnectionRefused, SocketError
from tests.support.tokens import bearer, connection

TOKEN = "abc.DEF-123_~+/="


def origin(*values: str, host: str | None = "chat.example", scheme: str = "ws") -> HTTPConnection:
    hosts = [] if host is None else [("Host", host)]
    return connection(*hosts, *(("Origin", value) for value in values), scheme=scheme)


class TestSources:
    @pytest.mark.parametrize(
        ("source", "request_"),
        [
            (HeaderToken(), connection(bearer(TOKEN))),
            (HeaderToken(), connection(("authorization", f"bEaReR {TOKEN}"))),
            (HeaderToken(), connection(("Authorization", f"Bearer   {TOKEN} "))),
            (CookieToken(), connection(("Cookie", f"token={TOKEN}"))),
            (CookieToken("s"), connection(("Cookie", f'a=1; s="{TOKEN}"; ss=2'))),
            (CookieToken("s"), connection(("Cookie", "a=1"), ("Cookie", f"s={TOKEN}"))),
            (SubprotocolToken(), connection(subprotocols=("bearer", TOKEN))),
            (SubprotocolToken("t"), connection(subprotocols=("chat.v1", "t", TOKEN, "x"))),
            (QueryToken(), connection(query=f"a=1&token={TOKEN.replace('+', '%2B')}")),
            (QueryToken("t"), connection(query="token=other&t=" + TOKEN.replace("+", "%2B"))),
        ],
    )
    def test_found(self, source: TokenSource, request_: HTTPConnection) -> None:
        assert source.find(request_) == TOKEN

    @pytest.mark.parametrize(
        ("source", "request_"),
        [
            (HeaderToken(), connection()),
            (HeaderToken(), connection(("Authorization", f"Basic {TOKEN}"))),
            (HeaderToken(), connection(("Authorization", f"Bearerx {TOKEN}"))),
            (HeaderToken(), connection(("Authorization", f"Bearer\t{TOKEN}"))),
            (HeaderToken(), connection(("Authorization", TOKEN))),
            (HeaderToken(), connection(("Authorization", ""))),
            (CookieToken(), connection()),
            (CookieToken(), connection(("Cookie", "tokens=x; TOKEN=y; token"))),
            (SubprotocolToken(), connection(subprotocols=("chat.v1", "Bearer"))),
            (SubprotocolToken(), connection(kind="http")),
            (QueryToken(), connection(query="tokens=x&Token=y")),
            (FirstMessageToken(), connection(bearer(TOKEN))),
        ],
    )
    def test_none(self, source: TokenSource, request_: HTTPConnection) -> None:
        assert source.find(request_) is None

    @pytest.mark.parametrize(
        ("source", "request_"),
        [
            (HeaderToken(), connection(bearer("a"), bearer("a"))),
            (HeaderToken(), connection(bearer("a"), ("Authorization", "Basic x"))),
            (HeaderToken(), connection(("Authorization", "Bearer"))),
            (HeaderToken(), connection(("Authorization", "Bearer   "))),
            (HeaderToken(), connection(("Authorization", "Bearer a, Bearer b"))),
            (HeaderToken(), connection(("Authorization", "Bearer a,b"))),
            (HeaderToken(), connection(("Authorization", "Bearer a b"))),
            (CookieToken(), connection(("Cookie", "token="))),
            (CookieToken(), connection(("Cookie", 'token=""'))),
            (CookieToken(), connection(("Cookie", "token=a; token=b"))),
            (CookieToken(), connection(("Cookie", "token=a"), ("Cookie", "token=a"))),
            (CookieToken(), connection(("Cookie", "token=ä"))),
            (SubprotocolToken(), connection(subprotocols=("bearer",))),
            (SubprotocolToken(), connection(subprotocols=("bearer", ""))),
            (SubprotocolToken(), connection(subprotocols=("bearer", "a", "bearer", "b"))),
            (QueryToken(), connection(query="token=a&token=b")),
            (QueryToken(), connection(query="token=%00")),
            (QueryToken(), connection(query="token=")),
            (QueryToken(), connection(query="token=a+b")),
        ],
    )
    def test_refused_not_skipped(self, source: TokenSource, request_: HTTPConnection) -> None:
        with pytest.raises(AuthenticationError) as caught:
            source.find(request_)
        assert caught.value.code == "invalid_token"

    @pytest.mark.parametrize(
        ("source", "make"),
        [
            (HeaderToken(), lambda token: connection(bearer(token))),
            (CookieToken(), lambda token: connection(("Cookie", f"token={token}"))),
            (SubprotocolToken(), lambda token: connection(subprotocols=("bearer", token))),
            (QueryToken(), lambda token: connection(query=f"token={token}")),
        ],
    )
    def test_a_token_may_have_8_kib(
        self, source: TokenSource, make: Callable[[str], HTTPConnection]
    ) -> None:
        assert source.find(make("x" * MAX_TOKEN_LENGTH))
        with pytest.raises(AuthenticationError):
            source.find(make("x" * (MAX_TOKEN_LENGTH + 1)))

    def test_the_subprotocol_to_accept_is_the_name(self) -> None:
        source = SubprotocolToken()
        assert source.accepted(connection(subprotocols=("bearer", TOKEN))) == "bearer"
        assert source.accepted(connection(subprotocols=("chat", TOKEN))) is None

    @pytest.mark.parametrize(
        "make",
        [
            lambda: CookieToken(""),
            lambda: CookieToken("a b"),
            lambda: CookieToken("a=b"),
            lambda: SubprotocolToken("a,b"),
            lambda: QueryToken(""),
            lambda: FirstMessageToken(0),
            lambda: FirstMessageToken(float("inf")),
            lambda: FirstMessageToken(float("nan")),
        ],
    )
    def test_configuration(self, make: Callable[[], object]) -> None:
        with pytest.raises(ConfigurationError):
            make()


class TestFirstMessage:
    @pytest.mark.parametrize("kind", [str, str.encode])
    def test_it_has_the_token(self, kind: Callable[[str], Any]) -> None:
        message = json.dumps({"type": "auth", "token": TOKEN, "id": 1})
        assert FirstMessageToken().parse(kind(message)) == TOKEN

    @pytest.mark.parametrize(
        "frame",
        [
            "",
            "{",
            "null",
            "[]",
            '"auth"',
            '{"type": "auth"}',
            '{"type": "other", "token": "a"}',
            '{"type": ["auth"], "token": "a"}',
            '{"token": "a"}',
            '{"type": "auth", "token": null}',
            '{"type": "auth", "token": ""}',
            '{"type": "auth", "token": 7}',
            '{"type": "auth", "token": "a b"}',
            '{"type": "auth", "token": "\\ud800"}',
            '{"type": "auth", "token": "' + "x" * 8193 + '"}',
            b"\xff",
            "[" * 9000,
            " " * 10_000_000,
            "\ud800",
        ],
        ids=lambda frame: repr(frame[:40]),
    )
    def test_anything_else_is_refused(self, frame: str | bytes) -> None:
        with pytest.raises(AuthenticationError):
            FirstMessageToken().parse(frame)


class TestOrigins:
    @pytest.mark.parametrize(
        ("allowed", "given"),
        [
            ("https://shop.example", "https://shop.example"),
            ("https://shop.example", "HTTPS://Shop.Example"),
            ("https://shop.example:443", "https://shop.example"),
            ("https://shop.example", "https://shop.example:443"),
            ("http://localhost:8000", "http://localhost:8000"),
            ("http://[::1]:8000", "http://[0:0::1]:8000"),
            ("http://127.0.0.1", "http://127.0.0.1:80"),
            ("capacitor://localhost", "capacitor://localhost"),
            ("https://*.shop.example", "https://a.shop.example"),
            ("https://*.shop.example", "https://a.b.shop.example"),
            ("https://*.shop.example:8443", "https://a.shop.example:8443"),
            ("*", "https://anything.example"),
            ("*", "null"),
        ],
    )
    def test_allowed(self, allowed: str, given: str) -> None:
        Origins(allowed).check(origin(given))

    @pytest.mark.parametrize(
        ("allowed", "given"),
        [
            ("https://shop.example", "http://shop.example"),
            ("https://shop.example", "https://shop.example:8443"),
            ("https://shop.example", "https://shop.example."),
            ("https://shop.example", "https://shop.example.evil.example"),
            ("https://shop.example", "https://evilshop.example"),
            ("https://shop.example", "https://a.shop.example"),
            ("https://shop.example", "https://shop.example/"),
            ("https://shop.example", "https://shop.example@evil.example"),
            ("https://shop.example", "https://evil.example#https://shop.example"),
            ("https://shop.example", "https://shop.example https://evil.example"),
            ("https://shop.example", "https://shop.example\t"),
            ("https://shop.example", "shop.example"),
            ("https://shop.example", "null"),
            ("https://shop.example", ""),
            ("https://shop.example", "*"),
            ("https://shop.example", "https://shop.example:99999"),
            ("https://shop.example", "https://shop.exämple"),
            ("https://*.shop.example", "https://shop.example"),
            ("https://*.shop.example", "https://evilshop.example"),
            ("https://*.shop.example", "http://a.shop.example"),
            ("https://*.shop.example", "https://a.shop.example:8443"),
            ("https://*.shop.example", "https://.shop.example"),
            ("https://*.shop.example", "https://*.shop.example"),
            ("https://*.shop.example", "https://a.shop.example.evil.example"),
        ],
    )
    def test_refused(self, allowed: str, given: str) -> None:
        with pytest.raises(ConnectionRefused) as caught:
            Origins(allowed).check(origin(given))
        assert (caught.value.code, caught.value.http_status) == ("origin", 403)

    @pytest.mark.parametrize(
        ("given", "host", "scheme"),
        [
            ("https://chat.example", "chat.example", "wss"),
            ("https://chat.example", "Chat.Example:443", "wss"),
            ("https://chat.example", "chat.example", "ws"),  # a proxy took the encryption off
            ("http://chat.example", "chat.example", "ws"),
            ("http://localhost:8000", "localhost:8000", "ws"),
            ("http://[::1]:8000", "[::1]:8000", "ws"),
        ],
    )
    def test_the_same_origin(self, given: str, host: str, scheme: str) -> None:
        request = origin(given, host=host, scheme=scheme)
        Origins().check(request)
        with pytest.raises(ConnectionRefused):
            Origins(same_origin=False).check(request)

    @pytest.mark.parametrize(
        ("given", "host", "scheme"),
        [
            ("https://evil.example", "chat.example", "wss"),
            ("http://chat.example", "chat.example", "wss"),
            ("http://chat.example:8000", "chat.example", "ws"),
            ("https://chat.example", "chat.example:80", "ws"),
            ("null", "null", "ws"),
            ("https://chat.example", "", "ws"),
            ("https://chat.example", "chat.example/", "ws"),
            ("https://chat.example", None, "ws"),
            ("capacitor://chat.example", "chat.example", "ws"),
        ],
    )
    def test_another_origin(self, given: str, host: str | None, scheme: str) -> None:
        with pytest.raises(ConnectionRefused):
            Origins().check(origin(given, host=host, scheme=scheme))

    def test_two_of_either_header_are_refused(self) -> None:
        for origins in (Origins(), Origins("*"), Origins("https://chat.example")):
            with pytest.raises(ConnectionRefused):
                origins.check(origin("https://chat.example", "https://chat.example"))
        two = connection(
            ("Host", "a.example"), ("Host", "a.example"), ("Origin", "https://a.example")
        )
        with pytest.raises(ConnectionRefused):
            Origins().check(two)

    def test_what_is_no_browser_sends_none(self) -> None:
        Origins("https://shop.example").check(origin())
        for origins in (Origins(required=True), Origins("*", required=True)):
            with pytest.raises(ConnectionRefused):
                origins.check(origin())

    @pytest.mark.parametrize(
        "allowed",
        [
            "",
            "null",
            "shop.example",
            "https://shop.example/",
            "https://shop.example/chat",
            "https://shop.example?",
            "https://user@shop.example",
            "https://shop.example:port",
            "https://shop.example:0",
            "https://shop.example:65536",
            "https://",
            "https://*",
            "https://*.",
            "https://*.example",
            "https://*.0.0.1",
            "https://shop.*",
            "https://*shop.example",
            "https://a.*.example",
            "https://*.*.shop.example",
            "*.shop.example",
            "**",
            "https://[::g]",
            "https://x.exämple",
            " https://shop.example",
            7,
            None,
        ],
    )
    def test_what_is_no_origin_cannot_be_allowed(self, allowed: Any) -> None:
        with pytest.raises(ConfigurationError):
            Origins(allowed)


class TestFuzz:
    SOURCES = (HeaderToken(), CookieToken("t"), SubprotocolToken(), QueryToken("t"))

    @given(
        st.lists(
            st.tuples(
                st.sampled_from(
                    [b"authorization", b"cookie", b"origin", b"host", b"sec-websocket-protocol"]
                ),
                st.binary(max_size=40)
                | st.sampled_from([b"Bearer ", b"bearer", b"t=", b't="', b"null", b"http://"]),
            ),
            max_size=5,
        ),
        st.binary(max_size=40),
        st.lists(st.text(max_size=10) | st.just("bearer"), max_size=4),
    )
    def test_any_request(
        self, headers: list[tuple[bytes, bytes]], query: bytes, subprotocols: list[str]
    ) -> None:
        request = HTTPConnection(
            {
                "type": "websocket",
                "headers": headers,
                "query_string": query,
                "subprotocols": subprotocols,
            }
        )
        for look in (
            *(source.find for source in self.SOURCES),
            Origins("https://*.shop.example", required=True).check,
        ):
            try:
                found = look(request)
            except SocketError:
                continue
            assert found is None or 0 < len(found) <= MAX_TOKEN_LENGTH

    @given(st.text() | st.binary())
    def test_any_first_message(self, frame: str | bytes) -> None:
        with pytest.raises(SocketError):
            FirstMessageToken().parse(frame)
