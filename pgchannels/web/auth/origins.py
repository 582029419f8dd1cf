"""From which sites a browser may open a socket.

A browser lets any page open a socket to anywhere, and sends the cookies of that server with it;
what it tells truthfully is the page's origin (RFC 6455, section 10.2). Whatever is no browser can
send any origin, or none: it is not protected by this, and has no cookies of somebody else's either.
"""

from __future__ import annotations

import re
from ipaddress import AddressValueError, IPv6Address
from typing import TYPE_CHECKING, NamedTuple

from pgchannels.errors import ConfigurationError
from pgchannels.web.errors import ConnectionRefused

if TYPE_CHECKING:
    from starlette.requests import HTTPConnection

__all__ = ["Origins"]

_SCHEME = r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)"
_HOST = r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*)"
_PORT = r"(?::(?P<port>[0-9]{1,5}))?"
_ORIGIN = re.compile(f"{_SCHEME}://{_HOST}{_PORT}")
_AUTHORITY = re.compile(_HOST + _PORT)
MAX_ORIGIN_LENGTH = 400

_DEFAULT_PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443}


class _Origin(NamedTuple):
    scheme: str
    host: str
    port: int | None

    @classmethod
    def parse(cls, text: str) -> _Origin | None:
        """None if it is not the origin of a page: ``null``, say, or a URL with a path."""
        match = _ORIGIN.fullmatch(text) if len(text) <= MAX_ORIGIN_LENGTH else None
        return None if match is None else cls._of(match, match["scheme"].lower())

    @classmethod
    def _of(cls, match: re.Match[str], scheme: str) -> _Origin | None:
        host = match["host"].lower()
        if host.startswith("["):
            try:
                host = f"[{IPv6Address(host[1:-1])}]"
            except AddressValueError:
                return None
        port = int(match["port"]) if match["port"] else _DEFAULT_PORTS.get(scheme)
        return cls(scheme, host, port) if port is None or 0 < port < 65536 else None

    def is_at(self, authority: str) -> bool:
        """Whether a ``Host`` header names the same place; without a port, its scheme's."""
        match = _AUTHORITY.fullmatch(authority) if len(authority) <= MAX_ORIGIN_LENGTH else None
        return match is not None and self._of(match, self.scheme) == self


class Origins:
    """The origins that may connect; calls nothing, waits for nothing.

    Args:
        allowed: ``"https://shop.example"``, with a port if it is not the scheme's own. Compared as
            a whole, scheme and port too; case does not matter. ``"https://*.shop.example"`` is for
            any subdomain, at any depth, not for shop.example itself. ``"*"`` is for all.
        same_origin: the request's own host may connect, too: the page was served from here.
        required: refuse clients that send no origin, which are not browsers.

    Raises:
        ConfigurationError: not an origin. It has no path, and no slash at its end.
    """

    def __init__(self, *allowed: str, same_origin: bool = True, required: bool = False) -> None:
        self.any = "*" in allowed
        self.same_origin = same_origin
        self.required = required
        self._exact: set[_Origin] = set()
        self._below: set[_Origin] = set()
        for text in allowed:
            if text != "*":
                self._add(text)

    def _add(self, text: object) -> None:
        if not isinstance(text, str):
            raise ConfigurationError(f"an origin is a str, not {text!r}")
        scheme, wildcard, rest = text.partition("://*.")
        origin = _Origin.parse(f"{scheme}://{rest}" if wildcard else text)
        if origin is None:
            raise ConfigurationError(
                f"{text!r} is not an origin: expected 'https://shop.example', with a port if it is "
                "not the usual one, without a path and without a slash at the end"
            )
        if wildcard and ("." not in origin.host or origin.host[-1].isdigit() or "[" in origin.host):
            raise ConfigurationError(f"{text!r} would allow other people's sites")
        (self._below if wildcard else self._exact).add(origin)

    def check(self, connection: HTTPConnection) -> None:
        """Let the request pass, or not.

        Raises:
            ConnectionRefused: with the code ``"origin"``.
        """
        given = connection.headers.getlist("origin")
        if not given and not self.required:
            return
        if self.any and len(given) == 1:
            return
        origin = _Origin.parse(given[0]) if len(given) == 1 else None
        if origin is None or not self._allows(origin, connection):
            raise ConnectionRefused("this origin is not allowed", code="origin")

    def _allows(self, origin: _Origin, connection: HTTPConnection) -> bool:
        if origin in self._exact:
            return True
        labels = origin.host.split(".")
        if self._below and any(
            origin._replace(host=".".join(labels[start:])) in self._below
            for start in range(1, len(labels))
        ):
            return True
        return self.same_origin and _is_same(origin, connection)


def _is_same(origin: _Origin, connection: HTTPConnection) -> bool:
    hosts = connection.headers.getlist("host")
    if len(hosts) != 1 or origin.scheme not in ("http", "https"):
        return False
    # A proxy may have taken the encryption off; that none was there to begin with is worse.
    if connection.scope.get("scheme") in ("wss", "https") and origin.scheme != "https":
        return False
    return origin.is_at(hosts[0])
