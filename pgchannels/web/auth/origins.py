"""From which sites a browser may open a socket.

A browser lets any page open a socket to any server, and sends the cookies of that server with it.
The page's origin is the one thing that it reports truthfully (RFC 6455, section 10.2). Other
clients can send any origin, or none; they have no cookies of another person either.
"""

from __future__ import annotations

import logging
import re
from ipaddress import AddressValueError, IPv6Address
from typing import TYPE_CHECKING, NamedTuple

from pgchannels.errors import ConfigurationError
from pgchannels.web.errors import ConnectionRefused

if TYPE_CHECKING:
    from starlette.requests import HTTPConnection

__all__ = ["Origins"]

logger = logging.getLogger("pgchannels.web")

_SCHEME = r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)"
_HOST = r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*)"
_PORT = r"(?::(?P<port>[0-9]{1,5}))?"
_ORIGIN = re.compile(f"{_SCHEME}://{_HOST}{_PORT}")
_AUTHORITY = re.compile(_HOST + _PORT)
MAX_ORIGIN_LENGTH = 400
# Different refusals that the log warns of. Strangers can invent as many as they like.
MAX_WARNINGS = 100

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
    """The origins that may connect; without arguments, only the server's own.

    The server's own is the header ``Host``, as it arrives here, so a proxy must pass it on. Headers
    such as ``X-Forwarded-Host`` are not read. The log names both origins of a refusal.

    Args:
        allowed: ``"https://shop.example"``, with a port if it is not the scheme's own. Compared as
            a whole, scheme and port too; case does not matter. ``"https://*.shop.example"`` is for
            any subdomain, at any depth, not for shop.example itself. ``"*"`` is for all.
        same_origin: pages of the request's own host and port may connect, too. Where the server
            knows that the request is encrypted, only those of ``https``.
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
        self._warned: set[tuple[str, str]] = set()
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
        """Let the request pass, or refuse it, and say in the log how to allow it.

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
            self._report(given, connection)
            # The Host may be a proxy's name for this server, which is not for clients to know.
            raise ConnectionRefused("pages of this origin may not connect", code="origin")

    def _report(self, given: list[str], connection: HTTPConnection) -> None:
        theirs = ", ".join(given)[:MAX_ORIGIN_LENGTH] or "no origin"
        host = ", ".join(connection.headers.getlist("host"))[:MAX_ORIGIN_LENGTH] or "no host"
        encrypted = connection.scope.get("scheme") in ("wss", "https")
        own = f"{'https' if encrypted else 'http'}://{host}"
        # Once each: a page that is refused tries again and again.
        is_news = (theirs, own) not in self._warned and len(self._warned) < MAX_WARNINGS
        if is_news:
            self._warned.add((theirs, own))
        logger.log(
            logging.WARNING if is_news else logging.DEBUG,
            "a page of %r may not connect: this server was asked for as %r. If the page is yours, "
            "allow it: origins=Origins('https://…'); or if a proxy has changed the name, let it "
            "pass the header Host on",
            theirs,
            own,
        )

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
    # Without encryption here, a proxy may have taken it off: both schemes are possible. With it, a
    # page without it may have been changed on its way.
    if connection.scope.get("scheme") in ("wss", "https") and origin.scheme != "https":
        return False
    return origin.is_at(hosts[0])
