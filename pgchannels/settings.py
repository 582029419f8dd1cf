"""Settings, from arguments, the environment (``PGCHANNELS_…``) or a ``.env`` file."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Annotated, Any, Self

from pydantic import Field, PrivateAttr, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from pgchannels.errors import ConfigurationError
from pgchannels.urls import driver_url

__all__ = ["DEFAULT_ALIAS", "ENV_FILE", "Settings", "did_you_mean", "env_prefix", "shown_value"]

DEFAULT_ALIAS = "default"
ENV_FILE = ".env"

_PREFIX = "PGCHANNELS_"
_ALIAS = re.compile(r"[a-z0-9]+(_[a-z0-9]+)*")
_SCHEME = re.compile(r"[a-zA-Z][\w+.-]*://")

# Seconds to be connected in, where the URL does not say.
_CONNECT_TIME = 10.0

_CENTURY = timedelta(days=36525)

Seconds = Annotated[float, Field(gt=0, le=3600)]


def env_prefix(alias: object) -> str:
    """What the variables of the layer *alias* begin with.

    ``PGCHANNELS_`` for the default one, ``PGCHANNELS__REPORTS__`` for ``reports``. No alias has two
    underscores in a row, nor one at an end, and no setting does: a variable belongs to one alias.

    Raises:
        ConfigurationError: *alias* cannot be one.
    """
    if not isinstance(alias, str) or not _ALIAS.fullmatch(alias):
        raise ConfigurationError(
            f"{alias!r} is no alias of a channel layer: expected lower-case letters, digits and "
            "single underscores between them"
        )
    return _PREFIX if alias == DEFAULT_ALIAS else f"{_PREFIX}_{alias.upper()}__"


class Settings(BaseSettings):
    """How a layer works. Durations are seconds, or ISO 8601 text where they are ``timedelta``.

    Raises:
        ConfigurationError: for a value out of its range, two that contradict each other, or an
            unknown name. The text has the names, the variables and the values, passwords excepted.
    """

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX,
        env_file=ENV_FILE,
        env_parse_none_str="none",
        extra="ignore",
        frozen=True,
        # The cause of a ConfigurationError shows in tracebacks, and an input may hold a password.
        hide_input_in_errors=True,
    )

    database_url: SecretStr | None = None
    """``postgresql://…``, as libpq or SQLAlchemy takes it. A parameter that the driver cannot keep
    is refused by name."""

    listen_url: SecretStr | None = None
    """The server itself, if ``database_url`` leads through a pooler that shares sessions: for what
    needs one of its own (LISTEN, the sequencer, the pruner, migrations). Given together with it."""

    schema_name: str = Field("pgchannels", pattern=r"^[a-z_][a-z0-9_]{0,39}$")
    """The PostgreSQL schema of the tables, for nothing but them; also the name that is notified."""

    pool_size: int = Field(5, ge=1, le=1000)
    """Connections at most for publishing and replaying. A node has four to seven for its tasks."""

    command_timeout: Seconds = 30.0
    """How long a statement may take before its connection counts as dead."""

    max_message_size: int = Field(1024 * 1024, ge=2, le=16 * 1024 * 1024)
    """Bytes of a message: of its payload's JSON text and its attachments.

    The database has a limit too, for all that publish, also from SQL: 1 MiB, or the largest that a
    process of the schema's owner or ``pgchannels migrate`` was ever set up for."""

    poll_interval: Seconds = 1.0
    """How often a node looks for new messages, and into the outbox, without having been told."""

    outbox_poll_interval: Seconds = 0.05
    """How often one node looks into the outbox for what was published outside of any node."""

    heartbeat_interval: Seconds = 5.0
    """How often the listening connection is tried and the node's lease renewed (five times a
    ``lease_time``, if that is more often). A dead connection is noticed within two of these."""

    lease_time: Seconds = 15.0
    """How long after a node's last sign of life it counts as dead: its connections' memberships
    end, and others take over what it did (pruning after twice the ``prune_interval``, if that is
    longer). At least twice the ``heartbeat_interval``."""

    batch_size: int = Field(10_000, ge=1, le=100_000)
    """Messages that one transaction of the sequencer moves at most."""

    page_size: int = Field(1000, ge=1, le=10_000)
    """Messages that one read of the log returns at most."""

    page_bytes: int = Field(1024 * 1024, ge=1024)
    """Bytes of payload that one read of the log returns at most, give or take one message."""

    buffer_size: int = Field(1000, ge=1)
    """Messages that may wait for a subscriber before it is sent back to reading the log."""

    buffer_bytes: int = Field(1024 * 1024, ge=1024)
    """Bytes of payload that may, likewise."""

    retention: timedelta | None = timedelta(days=7)
    """How long messages are kept; None (in the environment: ``none``) for ever."""

    default_ttl: float = Field(0.0, ge=0, le=3_155_760_000)
    """Seconds that a message can be read if it is sent without ``ttl=``; 0: while it is retained.
    Not more than ``retention``."""

    capacity: int | None = Field(None, ge=1)
    """Messages that may wait to be received from a channel before ``send()`` raises
    :class:`ChannelFull`; None for any number. Channels that nobody has received from hold any."""

    key_lifetime: timedelta = timedelta(days=1)
    """How long an idempotency key is remembered."""

    group_expiry: float = Field(86400.0, ge=0, le=3_155_760_000)
    """Seconds without use after which the membership of an ordinary channel ends; 0: never. Those
    of connections live and end with their node."""

    presence_grace: float = Field(3.0, ge=0, le=3600)
    """Seconds that a user who leaves a group has to come back in, before it is told."""

    prune_interval: Seconds = 60.0
    """How often the pruner looks for work."""

    _prefix: str = PrivateAttr(default=_PREFIX)

    def __init__(self, **values: Any) -> None:
        if values.get("database_url") is not None:
            # A listen_url from the environment would belong to another database.
            values.setdefault("listen_url", None)
        known = type(self).model_fields
        if unknown := sorted(n for n in values if n not in known and not n.startswith("_")):
            names = ", ".join(f"{name}{did_you_mean(name, known)}" for name in unknown)
            raise ConfigurationError(f"there is no setting {names}")
        prefix = values.get("_env_prefix") or _PREFIX
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigurationError(_explain(error, prefix)) from error
        self._prefix = prefix
        if contradictions := "; ".join(self._contradictions()):
            raise ConfigurationError(contradictions)

    @classmethod
    def for_alias(cls, alias: str, **values: Any) -> Self:
        """The settings of the layer *alias*, from the variables that :func:`env_prefix` begins.

        What they do not say is the built-in default, never a variable of the default alias: with
        its own database's variable misspelt, a layer would be on the default one's, silently.
        """
        return cls(_env_prefix=env_prefix(alias), **values)

    @field_validator("database_url", "listen_url", mode="before")
    @classmethod
    def _readable(cls, value: object) -> object:
        url = value.get_secret_value() if isinstance(value, SecretStr) else value
        if isinstance(url, str):
            driver_url(url)  # raises what is wrong with it
        return value

    @field_validator("retention", "key_lifetime", mode="before")
    @classmethod
    def _with_its_unit(cls, value: object) -> object:
        if isinstance(value, (int, float)):
            raise ValueError(
                "give a timedelta, or ISO 8601 text such as 'P7D': a number has no unit"
            )
        return None if isinstance(value, str) and value.lower() == "none" else value

    @field_validator("retention", mode="after")
    @classmethod
    def _positive(cls, value: timedelta | None) -> timedelta | None:
        # More is before PostgreSQL's first date, sooner or later: the pruner would fail, not this.
        if value is not None and not timedelta(0) < value <= _CENTURY:
            raise ValueError(
                "must be positive, up to 100 years, or 'none' to keep messages for ever"
            )
        return value

    @field_validator("key_lifetime", mode="after")
    @classmethod
    def _some_time(cls, value: timedelta) -> timedelta:
        if not timedelta(0) < value <= _CENTURY:
            raise ValueError("must be positive, up to 100 years")
        return value

    def _contradictions(self) -> Iterator[str]:
        """Pairs that nobody can mean. What is merely unwise is left to who sets it."""
        if self.lease_time < 2 * self.heartbeat_interval:
            yield (
                f"{self._named('lease_time')} is {self.lease_time:g} s, less than twice "
                f"{self._named('heartbeat_interval')}, {self.heartbeat_interval:g} s: a node would "
                "count as dead between two signs of life"
            )
        if self.retention is not None and self.default_ttl > self.retention.total_seconds():
            yield (
                f"{self._named('default_ttl')} is {timedelta(seconds=self.default_ttl)}, more "
                f"than {self._named('retention')}, {self.retention}: messages are removed before "
                "it has run out"
            )
        if self.listen_url is not None and self.database_url is None:
            yield (
                f"{self._named('listen_url')} is given, but not {self._named('database_url')}: "
                "there is nothing to listen for"
            )

    def _named(self, name: str) -> str:
        return f"{name} ({self._prefix}{name.upper()})"

    @property
    def dsn(self) -> str:
        """The database's URL as asyncpg takes it, password and all.

        Raises:
            ConfigurationError: if none was given.
        """
        if self.database_url is None:
            raise ConfigurationError(
                f"no database: set {self._prefix}DATABASE_URL, or give a postgresql:// URL"
            )
        return driver_url(self.database_url.get_secret_value()).dsn

    @property
    def listen_dsn(self) -> str:
        """The URL for connections that must keep their session."""
        return driver_url(self.listen_url.get_secret_value()).dsn if self.listen_url else self.dsn

    @property
    def connect_timeout(self) -> float:
        """Seconds to be connected in: ``connect_timeout`` of the URLs, the shorter one; or 10."""
        given = [
            seconds
            for url in (self.database_url, self.listen_url)
            if url and (seconds := driver_url(url.get_secret_value()).connect_timeout) is not None
        ]
        return min(given, default=_CONNECT_TIME)

    @property
    def is_pooled(self) -> bool:
        """Whether sessions on ``dsn`` may be shared with others, as a pooler does."""
        return self.listen_dsn != self.dsn


def _explain(error: ValidationError, prefix: str) -> str:
    """What is wrong with which settings, in our own words: pydantic's would show passwords."""
    lines = []
    for problem in error.errors(include_url=False):
        name = str(problem["loc"][0]) if problem["loc"] else "settings"
        reason = problem["msg"].removeprefix("Value error, ")
        value = problem["input"]
        shown = _shown_url(value) if name.endswith("_url") else shown_value(value)
        lines.append(f"{name} ({prefix}{name.upper()}){shown}: {reason}")
    return "; ".join(lines)


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """A question after a name that nobody knows; empty if there is nothing like it."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {prefix}{close[0]}?)" if close else ""


def shown_value(value: object) -> str:
    """What to say of a wrong value: nothing, if a URL with a password has got there."""
    text = str(value)
    if "://" in text or "password" in text.lower():
        return ""
    if len(text) > 60:
        text = text[:57] + "..."
    return f" is {text!r}" if isinstance(value, str) else f" is {text}"


def _shown_url(value: object) -> str:
    scheme = _SCHEME.match(str(value))
    return f" begins with {scheme[0]!r}" if scheme else ""
