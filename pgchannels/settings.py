"""Settings, from arguments, the environment (``PGCHANNELS_…``) or a ``.env`` file."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Annotated, Any

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from pgchannels.errors import ConfigurationError

__all__ = ["Settings"]

_DRIVER = re.compile(r"^(?:postgresql|postgres)(?:\+\w+)?://")

Seconds = Annotated[float, Field(gt=0, le=3600)]


class Settings(BaseSettings):
    """How a layer works. Durations are seconds, or ISO 8601 text where they are ``timedelta``.

    Raises:
        ConfigurationError: for a value out of its range, or an unknown name; the text names it.
    """

    model_config = SettingsConfigDict(
        env_prefix="PGCHANNELS_",
        env_file=".env",
        env_parse_none_str="none",
        extra="ignore",
        frozen=True,
        # The cause of a ConfigurationError shows in tracebacks, and an input may hold a password.
        hide_input_in_errors=True,
    )

    database_url: SecretStr | None = None
    """``postgresql://…``, as libpq takes it; a SQLAlchemy driver suffix is taken off."""

    listen_url: SecretStr | None = None
    """The server itself, if ``database_url`` leads through a pooler that shares sessions: for what
    needs one of its own (LISTEN, the sequencer, the pruner, migrations). Given together with it."""

    schema_name: str = Field("pgchannels", pattern=r"^[a-z_][a-z0-9_]{0,39}$")
    """The PostgreSQL schema of the tables; also the name that is notified."""

    pool_size: int = Field(5, ge=1, le=1000)
    """Connections at most for publishing and replaying. A node keeps four more for its tasks."""

    command_timeout: Seconds = 30.0
    """How long a statement may take before its connection counts as dead."""

    max_message_size: int = Field(1024 * 1024, ge=2, le=16 * 1024 * 1024)
    """Bytes of a payload's JSON text."""

    poll_interval: Seconds = 1.0
    """How often a node looks for new messages, and into the outbox, without having been told."""

    outbox_poll_interval: Seconds = 0.05
    """How often one node looks into the outbox for what was published outside of any node."""

    heartbeat_interval: Seconds = 5.0
    """How often the listening connection is tried. A dead one is noticed within two of these."""

    lease_time: Seconds = 15.0
    """For how long a node that died keeps the frequent polling from others (pruning: for twice the
    ``prune_interval``, if that is longer)."""

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

    prune_interval: Seconds = 60.0
    """How often the pruner looks for work."""

    def __init__(self, **values: Any) -> None:
        if values.get("database_url") is not None:
            # A listen_url from the environment would belong to another database.
            values.setdefault("listen_url", None)
        known = Settings.model_fields
        if unknown := sorted(n for n in values if n not in known and not n.startswith("_")):
            raise ConfigurationError(f"there is no setting {', '.join(unknown)}")
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigurationError(_explain(error)) from error

    @field_validator("database_url", "listen_url", mode="before")
    @classmethod
    def _without_driver(cls, value: object) -> object:
        url = value.get_secret_value() if isinstance(value, SecretStr) else value
        if not isinstance(url, str):
            return value
        if not _DRIVER.match(url):
            raise ValueError("expected a URL such as postgresql://user:password@host/database")
        return _DRIVER.sub("postgresql://", url, count=1)

    @field_validator("retention", mode="after")
    @classmethod
    def _positive(cls, value: timedelta | None) -> timedelta | None:
        if value is not None and value <= timedelta(0):
            raise ValueError("must be positive, or 'none' to keep messages for ever")
        return value

    @property
    def dsn(self) -> str:
        """The database's URL, password and all.

        Raises:
            ConfigurationError: if none was given.
        """
        if self.database_url is None:
            raise ConfigurationError(
                "no database: set PGCHANNELS_DATABASE_URL, or give a postgresql:// URL"
            )
        return self.database_url.get_secret_value()

    @property
    def listen_dsn(self) -> str:
        """The URL for connections that must keep their session."""
        return self.listen_url.get_secret_value() if self.listen_url else self.dsn

    @property
    def is_pooled(self) -> bool:
        """Whether sessions on ``dsn`` may be shared with others, as a pooler does."""
        return self.listen_dsn != self.dsn


def _explain(error: ValidationError) -> str:
    # pydantic's own text repeats the input, which may hold a password.
    lines = []
    for problem in error.errors(include_url=False, include_input=False):
        name = str(problem["loc"][0]) if problem["loc"] else "settings"
        lines.append(f"{name} (PGCHANNELS_{name.upper()}): {problem['msg']}")
    return "; ".join(lines)
