"""Where tokens come from: each source finds its own in a request, or says that there is none.

What is found is a token in form only. A token that stands there twice, is empty, is too long or
could not be one is refused, not passed over: whoever sends it means something by it, and another
source must not decide in its place.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import orjson

from pgchannels.errors import ConfigurationError
from pgchannels.web.errors import AuthenticationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.requests import HTTPConnection

__all__ = [
    "MAX_TOKEN_LENGTH",
    "CookieToken",
    "FirstMessageToken",
    "HeaderToken",
    "QueryToken",
    "SubprotocolToken",
    "TokenSource",
    "check_token",
    "invalid_token",
]

MAX_TOKEN_LENGTH = 8192
MAX_FIRST_MESSAGE = MAX_TOKEN_LENGTH + 1024

# RFC 6265, section 4.1.1, cookie-octet: whatever carries a token can carry these, and nothing
# among them separates two tokens.
_TOKEN = re.compile(r"[\x21\x23-\x2b\x2d-\x3a\x3c-\x5b\x5d-\x7e]+")
# RFC 9110, section 5.6.2, token: the names of cookies and subprotocols.
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


def invalid_token(detail: str = "the token is not valid") -> AuthenticationError:
    """What is said of a token that was given and is no good; never why to the letter."""
    return AuthenticationError(detail, code="invalid_token")


def check_token(token: object) -> str:
    """Return *token* if it has the form of one: 1 to 8192 visible ASCII characters.

    Raises:
        AuthenticationError: if it has not.
    """
    if not isinstance(token, str) or not 0 < len(token) <= MAX_TOKEN_LENGTH:
        raise invalid_token()
    if not _TOKEN.fullmatch(token):
        raise invalid_token()
    return token


class TokenSource(Protocol):
    """A place where a token may stand.

    Attributes:
        ambient: browsers send it along whichever site asks them to, so that the token alone does
            not show that the user wanted it: the request's origin has to be checked.
    """

    @property
    def ambient(self) -> bool: ...

    def find(self, connection: HTTPConnection) -> str | None:
        """The token that stands there; None if none does.

        Raises:
            AuthenticationError: something stands there that is no token, or two are.
        """
        ...


@dataclass(frozen=True)
class HeaderToken:
    """``Authorization: Bearer <token>``. Other schemes are not tokens."""

    ambient: bool = field(default=False, init=False, repr=False)

    def find(self, connection: HTTPConnection) -> str | None:
        values = connection.headers.getlist("authorization")
        if not values:
            return None
        if len(values) > 1:
            raise invalid_token("more than one Authorization header was given")
        scheme, _, token = values[0].strip(" \t").partition(" ")
        if scheme.lower() != "bearer":
            return None
        return check_token(token.strip(" "))


@dataclass(frozen=True)
class CookieToken:
    """A cookie. The request's origin is checked with it."""

    name: str = "token"

    ambient: bool = field(default=True, init=False, repr=False)

    def __post_init__(self) -> None:
        _check_name(self.name, "a cookie")

    def find(self, connection: HTTPConnection) -> str | None:
        # Not from connection.cookies, which hides that a name came twice: a sibling domain may
        # have set the second one.
        found = [
            value.strip(" \t")
            for header in connection.headers.getlist("cookie")
            for name, equals, value in (pair.partition("=") for pair in header.split(";"))
            if equals and name.strip(" \t") == self.name
        ]
        return _only(found, f"more than one cookie {self.name!r} was given", quoted=True)


@dataclass(frozen=True)
class SubprotocolToken:
    """``Sec-WebSocket-Protocol: bearer, <token>``: what a browser can send besides cookies.

    The token follows the name. The name is the subprotocol to accept, never the token. Only
    characters that a subprotocol may have can be sent so: those of a JWT are.
    """

    name: str = "bearer"

    ambient: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        _check_name(self.name, "a subprotocol")

    def find(self, connection: HTTPConnection) -> str | None:
        offered = _subprotocols(connection)
        at = [index for index, name in enumerate(offered) if name == self.name]
        if not at:
            return None
        if len(at) > 1:
            raise invalid_token(f"more than one subprotocol {self.name!r} was offered")
        (index,) = at
        if index + 1 == len(offered):
            raise invalid_token(f"no token follows the subprotocol {self.name!r}")
        return check_token(offered[index + 1])

    def accepted(self, connection: HTTPConnection) -> str | None:
        """The subprotocol to accept: a browser closes the socket if it offered some, and gets none.

        None if it was not offered.
        """
        return self.name if self.name in _subprotocols(connection) else None


@dataclass(frozen=True)
class QueryToken:
    """A parameter of the query: ``?token=<token>``.

    URLs end up in the access logs of servers and proxies, in histories and in traces, and the token
    with them. Prefer any other source; if it must be this one, let the tokens be short-lived.
    """

    name: str = "token"

    ambient: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigurationError("the query's parameter needs a name")

    def find(self, connection: HTTPConnection) -> str | None:
        found = connection.query_params.getlist(self.name)
        return _only(found, f"more than one {self.name!r} was given")


@dataclass(frozen=True)
class FirstMessageToken:
    """The first message, ``{"type": "auth", "token": …}``, after the socket has been accepted.

    Args:
        deadline: seconds that the client has for it.
    """

    deadline: float = 10.0

    ambient: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.deadline < float("inf"):
            raise ConfigurationError(f"a deadline is more than 0 seconds, not {self.deadline!r}")

    def find(self, connection: HTTPConnection) -> str | None:
        return None  # it is still to come

    def parse(self, frame: str | bytes) -> str:
        """The token in the first message.

        Raises:
            AuthenticationError: it has none.
        """
        wanted = 'the first message has to be {"type": "auth", "token": …}'
        if len(frame) > MAX_FIRST_MESSAGE:  # before it is parsed
            raise AuthenticationError(wanted)
        try:
            content = orjson.loads(frame)
        except (ValueError, UnicodeError):
            content = None
        if not isinstance(content, dict) or content.get("type") != "auth":
            raise AuthenticationError(wanted)
        if "token" not in content:
            raise AuthenticationError(wanted)
        return check_token(content["token"])


def _subprotocols(connection: HTTPConnection) -> Sequence[str]:
    # The server has parsed them; over HTTP there are none.
    offered: Sequence[str] = connection.scope.get("subprotocols") or ()
    return offered


def _only(found: Sequence[str], otherwise: str, *, quoted: bool = False) -> str | None:
    if not found:
        return None
    if len(found) > 1:
        raise invalid_token(otherwise)
    token = found[0]
    if quoted and len(token) > 1 and token[0] == token[-1] == '"':
        token = token[1:-1]
    return check_token(token)


def _check_name(name: object, what: str) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigurationError(f"{what} cannot be named {name!r}")
