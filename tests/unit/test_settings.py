"""Settings: where they come from, and what is said about those that cannot be."""

from __future__ import annotations

import os
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from pgchannels.errors import ConfigurationError
from pgchannels.settings import Settings

URL = "postgresql://user:s3cret@host/database"


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings but those of the test; ``.env`` is looked for in the working directory."""
    for name in os.environ:
        if name.upper().startswith("PGCHANNELS_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def test_defaults() -> None:
    settings = Settings()
    assert settings.database_url is None
    assert settings.schema_name == "pgchannels"
    assert settings.max_message_size == 1024 * 1024
    assert settings.retention == timedelta(days=7)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://user:s3cret@host/database",
        "postgres://user:s3cret@host/database",
        "postgresql+asyncpg://user:s3cret@host/database",
        "postgresql+psycopg://user:s3cret@host/database",
        "postgresql+psycopg2://user:s3cret@host/database",
        "postgres+asyncpg://user:s3cret@host/database",
    ],
)
def test_a_drivers_suffix_is_taken_off(url: str) -> None:
    settings = Settings(database_url=url, listen_url=url)
    assert settings.dsn == URL
    assert settings.listen_dsn == URL


def test_only_the_scheme_is_touched() -> None:
    url = "postgresql://u:postgresql+x%3A%2F%2F@h/d?options=-c%20a%3Db&host=/run/postgresql"
    assert Settings(database_url=url.replace("://", "+asyncpg://", 1)).dsn == url


def test_a_url_as_a_secret() -> None:
    assert Settings(database_url=SecretStr("postgresql+asyncpg://h/d")).dsn == "postgresql://h/d"


def test_listening_goes_to_the_database_by_default() -> None:
    assert Settings(database_url=URL).listen_dsn == URL
    settings = Settings(database_url=URL, listen_url="postgresql://direct/database")
    assert settings.dsn == URL
    assert settings.listen_dsn == "postgresql://direct/database"


def test_a_listen_url_of_the_environment_belongs_to_the_database_url_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other, direct = "postgresql://other/database", "postgresql://direct/database"
    monkeypatch.setenv("PGCHANNELS_DATABASE_URL", other)
    monkeypatch.setenv("PGCHANNELS_LISTEN_URL", direct)
    settings = Settings()
    assert (settings.dsn, settings.listen_dsn, settings.is_pooled) == (other, direct, True)
    # Another database than that one is not to be listened to by way of it.
    settings = Settings(database_url=URL)
    assert (settings.dsn, settings.listen_dsn, settings.is_pooled) == (URL, URL, False)
    settings = Settings(database_url=URL, listen_url="postgresql://given/database")
    assert (settings.dsn, settings.listen_dsn) == (URL, "postgresql://given/database")
    settings = Settings(listen_url="postgresql://given/database")
    assert (settings.dsn, settings.listen_dsn) == (other, "postgresql://given/database")


def test_without_a_database() -> None:
    with pytest.raises(ConfigurationError, match="PGCHANNELS_DATABASE_URL"):
        Settings().dsn  # noqa: B018
    with pytest.raises(ConfigurationError, match="PGCHANNELS_DATABASE_URL"):
        Settings().listen_dsn  # noqa: B018


def test_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGCHANNELS_DATABASE_URL", URL)
    monkeypatch.setenv("PGCHANNELS_POOL_SIZE", "17")
    monkeypatch.setenv("PGCHANNELS_POLL_INTERVAL", "0.25")
    monkeypatch.setenv("PGCHANNELS_RETENTION", "P2DT3H")
    monkeypatch.setenv("PGCHANNELS_SCHEMA_NAME", "other")
    settings = Settings()
    assert settings.dsn == URL
    assert settings.pool_size == 17
    assert settings.poll_interval == 0.25
    assert settings.retention == timedelta(days=2, hours=3)
    assert settings.schema_name == "other"


def test_a_dotenv_file(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text(
        f"DATABASE_URL=postgresql://the/applications\nSECRET=x\nPGCHANNELS_DATABASE_URL={URL}\n"
        "PGCHANNELS_POOL_SIZE=17\nPGCHANNELS_OF_A_LATER_VERSION=1\n"
    )
    settings = Settings()
    assert (settings.dsn, settings.pool_size) == (URL, 17)
    # The environment goes before the file, an argument before both.
    monkeypatch.setenv("PGCHANNELS_POOL_SIZE", "18")
    assert Settings().pool_size == 18
    assert Settings(pool_size=19).pool_size == 19


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("PT1H", timedelta(hours=1)),
        ("P30D", timedelta(days=30)),
        ("12:30:00", timedelta(hours=12, minutes=30)),
    ],
)
def test_durations(monkeypatch: pytest.MonkeyPatch, text: str, expected: timedelta) -> None:
    monkeypatch.setenv("PGCHANNELS_RETENTION", text)
    assert Settings().retention == expected


def test_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGCHANNELS_RETENTION", "none")
    assert Settings().retention is None
    assert Settings(retention=None).retention is None


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("PGCHANNELS_DATABASE_URL", "mysql://user:s3cret@host/database"),
        ("PGCHANNELS_DATABASE_URL", "host=h password=s3cret"),
        ("PGCHANNELS_DATABASE_URL", ""),
        ("PGCHANNELS_LISTEN_URL", "postgresql:/user:s3cret@host"),
        ("PGCHANNELS_SCHEMA_NAME", "s3cret schema"),
        ("PGCHANNELS_SCHEMA_NAME", 's3cret"'),
        ("PGCHANNELS_SCHEMA_NAME", "S3CRET"),
        ("PGCHANNELS_SCHEMA_NAME", "s3cret" * 7),
        ("PGCHANNELS_SCHEMA_NAME", ""),
        ("PGCHANNELS_POOL_SIZE", "0"),
        ("PGCHANNELS_POOL_SIZE", "s3cret"),
        ("PGCHANNELS_POLL_INTERVAL", "nan"),
        ("PGCHANNELS_POLL_INTERVAL", "-1"),
        ("PGCHANNELS_RETENTION", "s3cret"),
        ("PGCHANNELS_RETENTION", "3600"),
        ("PGCHANNELS_RETENTION", "PT0S"),
        ("PGCHANNELS_RETENTION", "-P1D"),
        ("PGCHANNELS_MAX_MESSAGE_SIZE", str(16 * 1024 * 1024 + 1)),
        ("PGCHANNELS_PAGE_BYTES", "1023"),
    ],
)
def test_an_error_names_the_variable_and_repeats_no_value(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigurationError) as raised:
        Settings()
    assert variable in str(raised.value)
    # A traceback in a log shows the causes too.
    assert "s3cret" not in "".join(traceback.format_exception(raised.value)).lower()


def test_every_wrong_setting_is_named() -> None:
    with pytest.raises(ConfigurationError) as raised:
        Settings(pool_size=0, batch_size=0, page_size=0)
    for name in ("PGCHANNELS_POOL_SIZE", "PGCHANNELS_BATCH_SIZE", "PGCHANNELS_PAGE_SIZE"):
        assert name in str(raised.value)


def test_passwords_are_not_shown() -> None:
    settings = Settings(database_url=URL, listen_url=URL)
    assert "s3cret" not in repr(settings) + str(settings) + repr(settings.model_dump())


def test_settings_do_not_change() -> None:
    settings = Settings()
    with pytest.raises(ValidationError, match="frozen"):
        setattr(settings, "pool_size", 3)  # noqa: B010 - mypy knows it too
