"""Database URLs: what libpq, SQLAlchemy and hosts write, as our driver reads it.

asyncpg takes a parameter that it does not know for a setting of the server, which then refuses the
connection. So each parameter is sorted here: the driver's, ours (what it asks for is done anyway,
or has no meaning here), or refused by name, because the driver cannot keep what it promises.

Source: manual, "Parameter Key Words" of libpq; SQLAlchemy's PostgreSQL dialects.
"""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import parse_qsl, quote, urlencode

__all__ = ["DriverUrl", "driver_url"]

# With SQLAlchemy's name for a driver, or without.
_SCHEME = re.compile(r"^postgres(?:ql)?(?:\+\w+)?://")

_DRIVERS = frozenset(
    {
        "host",
        "port",
        "user",
        "password",
        "dbname",
        "database",
        "passfile",
        "service",
        "sslmode",
        "sslcert",
        "sslkey",
        "sslrootcert",
        "sslcrl",
        "sslpassword",
        "sslnegotiation",
        "ssl_min_protocol_version",
        "ssl_max_protocol_version",
        "target_session_attrs",
        "krbsrvname",
        "gsslib",
        "options",
    }
)

# Left out: we set our own (application_name, keepalives), or there is nothing to set.
_WITHOUT_EFFECT = frozenset(
    {
        "application_name",
        "fallback_application_name",
        "client_encoding",
        "keepalives",
        "keepalives_idle",
        "keepalives_interval",
        "keepalives_count",
        "tcp_user_timeout",
        "load_balance_hosts",
        "sslcompression",
        "sslsni",
        "gssdelegation",
        "min_protocol_version",
        "max_protocol_version",
        # SQLAlchemy's
        "async_fallback",
        "prepared_statement_cache_size",
        "prepared_statement_name_func",
        "prepare_threshold",
    }
)

# Values that ask for nothing; any other one is a promise that the driver cannot keep.
_HARMLESS = {
    "gssencmode": {"disable", "prefer"},
    "channel_binding": {"disable", "prefer"},
    "sslcertmode": {"disable", "allow"},
}

# Seconds. libpq takes 1 for 2, and 0 or less for no limit.
_SHORTEST_CONNECT_TIMEOUT = 2


class DriverUrl(NamedTuple):
    """A URL that asyncpg reads as it is meant."""

    dsn: str
    connect_timeout: float | None
    """Seconds to be connected in; None if the URL does not say."""


def driver_url(url: str, *, strict: bool = True) -> DriverUrl:
    """Read a URL as libpq or SQLAlchemy takes it.

    Args:
        url: ``postgresql://…``, with or without SQLAlchemy's name for a driver.
        strict: False leaves out what would be refused: the URL is another driver's, which keeps it.

    Raises:
        ValueError: not a URL of PostgreSQL, or it has a parameter that cannot be kept. The text has
            the parameter's name, and no password.
    """
    if not _SCHEME.match(url):
        raise ValueError("expected a URL such as postgresql://user:password@host/database")
    address, _, parameters = _SCHEME.sub("postgresql://", url, count=1).partition("?")
    kept: list[tuple[str, str]] = []
    connect_timeout: float | None = None
    given = dict(parse_qsl(parameters, keep_blank_values=True))
    for name, value in given.items():
        if name == "ssl":
            kept.append(("sslmode", _ssl_mode(value)))
        elif name in _DRIVERS:
            kept.append((name, value))
        elif name == "connect_timeout":
            connect_timeout = _seconds(value)
        elif strict and name not in _WITHOUT_EFFECT and value not in _HARMLESS.get(name, ()):
            _check_kept(name, value, given)
    query = urlencode(kept, quote_via=quote, safe="/")
    return DriverUrl(f"{address}?{query}" if query else address, connect_timeout)


def _check_kept(name: str, value: str, given: dict[str, str]) -> None:
    if name == "channel_binding":
        # It proves that the server knows the password's hash; so does a certificate who it is.
        if value == "require" and given.get("sslmode") == "verify-full":
            return
        raise ValueError(
            f"channel_binding={value} cannot be kept, because the driver has no channel binding: "
            "leave it out, or give sslmode=verify-full beside it"
        )
    if name in _HARMLESS:
        raise ValueError(f"{name}={value} cannot be kept by the driver: leave it out")
    raise ValueError(
        f"the parameter {name!r} is not one that we take: settings of the server go into "
        "options=-c%20name=value"
    )


def _ssl_mode(value: str) -> str:
    # SQLAlchemy's asyncpg dialect also takes true and false.
    return {"true": "require", "false": "disable"}.get(value.lower(), value)


def _seconds(value: str) -> float | None:
    try:
        seconds = int(value)
    except ValueError:
        raise ValueError("connect_timeout must be a whole number of seconds") from None
    return float(max(seconds, _SHORTEST_CONNECT_TIMEOUT)) if seconds > 0 else None
