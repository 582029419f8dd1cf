"""Settings: where they come from, and what is said about those that cannot be."""

from __future__ import annotations

import os
import re
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from pgchannels.errors import ConfigurationError
from pgchannels.settings import Settings, env_prefix

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
        ("SCHEMA_NAME", "a schema"),
        ("SCHEMA_NAME", 'quo"ted'),
        ("SCHEMA_NAME", "UPPER"),
        ("SCHEMA_NAME", "s" * 41),
        ("SCHEMA_NAME", ""),
        ("POOL_SIZE", "0"),
        ("POOL_SIZE", "many"),
        ("POLL_INTERVAL", "nan"),
        ("POLL_INTERVAL", "-1"),
        ("RETENTION", "a week"),
        ("RETENTION", "3600"),
        ("RETENTION", "PT0S"),
        ("RETENTION", "-P1D"),
        ("RETENTION", "P36526D"),
        ("MAX_MESSAGE_SIZE", str(16 * 1024 * 1024 + 1)),
        ("PAGE_BYTES", "1023"),
        ("DEFAULT_TTL", "-1"),
        ("DEFAULT_TTL", "inf"),
        ("CAPACITY", "0"),
        ("KEY_LIFETIME", "PT0S"),
        ("KEY_LIFETIME", "P36526D"),
        ("GROUP_EXPIRY", "-0.1"),
        ("PRESENCE_GRACE", "3601"),
    ],
)
@pytest.mark.parametrize("alias", ["default", "reports"])
def test_an_error_names_the_variable_and_the_value(
    monkeypatch: pytest.MonkeyPatch, alias: str, variable: str, value: str
) -> None:
    monkeypatch.setenv(env_prefix(alias) + variable, value)
    with pytest.raises(ConfigurationError) as raised:
        Settings.for_alias(alias)
    assert str(raised.value).startswith(
        f"{variable.lower()} ({env_prefix(alias)}{variable}) is {value!r}: "
    )


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("DATABASE_URL", "mysql://user:s3cret@host/database"),
        ("DATABASE_URL", "host=h password=s3cret"),
        ("DATABASE_URL", "s3cret"),
        ("LISTEN_URL", "postgresql:/user:s3cret@host"),
        # In the wrong place.
        ("POOL_SIZE", "postgresql://user:s3cret@host/database"),
        ("SCHEMA_NAME", "host=h password=s3cret"),
    ],
)
def test_an_error_repeats_no_password(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(f"PGCHANNELS_{variable}", value)
    with pytest.raises(ConfigurationError, match=f"PGCHANNELS_{variable}") as raised:
        Settings()
    # A traceback in a log shows the causes too.
    assert "s3cret" not in "".join(traceback.format_exception(raised.value))


def test_an_error_shows_what_a_wrong_url_begins_with() -> None:
    with pytest.raises(ConfigurationError, match=r"begins with 'mysql://'"):
        Settings(database_url="mysql://user:s3cret@host/database")


def test_every_wrong_setting_is_named() -> None:
    with pytest.raises(ConfigurationError) as raised:
        Settings(pool_size=0, batch_size=0, page_size=0)
    for name in ("PGCHANNELS_POOL_SIZE", "PGCHANNELS_BATCH_SIZE", "PGCHANNELS_PAGE_SIZE"):
        assert name in str(raised.value)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"lease_time": 9.9},
            r"^lease_time \((\w+)LEASE_TIME\) is 9.9 s, .* \(\1HEARTBEAT_INTERVAL\), 5 s: ",
        ),
        ({"heartbeat_interval": 8}, r"lease_time .* is 15 s, .* heartbeat_interval .*, 8 s: "),
        (
            {"default_ttl": 3600.5, "retention": "PT1H"},
            r"^default_ttl \((\w+)DEFAULT_TTL\) is 1:00:00.500000, .* \(\1RETENTION\), 1:00:00: ",
        ),
        (
            {"listen_url": "postgresql://user:s3cret@host/d"},
            r"^listen_url \((\w+)LISTEN_URL\) .* database_url \(\1DATABASE_URL\): ",
        ),
    ],
)
@pytest.mark.parametrize("alias", ["default", "reports"])
def test_a_contradiction_names_both(
    monkeypatch: pytest.MonkeyPatch, alias: str, values: dict[str, Any], expected: str
) -> None:
    for given, variables in ((values, {}), ({}, values)):
        for name, value in variables.items():
            monkeypatch.setenv(env_prefix(alias) + name.upper(), str(value))
        with pytest.raises(ConfigurationError, match=expected) as raised:
            Settings.for_alias(alias, **given)
        assert env_prefix(alias) in str(raised.value)
        assert "s3cret" not in str(raised.value)


def test_every_contradiction_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"lease_time .*; default_ttl "):
        Settings(lease_time=1, default_ttl=1e9)


@pytest.mark.parametrize(
    "values",
    [
        {"lease_time": 2, "heartbeat_interval": 1},
        {"default_ttl": 3600, "retention": timedelta(hours=1)},
        {"default_ttl": 1e9, "retention": None},
        # A key may be remembered for longer than its message, a message be larger than a page.
        {"retention": timedelta(minutes=1)},
        {"max_message_size": 16 * 1024 * 1024, "page_bytes": 1024, "buffer_bytes": 1024},
        {"group_expiry": 0, "presence_grace": 0, "capacity": None},
    ],
)
def test_what_may_be_unwise_but_can_be_meant(values: dict[str, Any]) -> None:
    settings = Settings(**values)
    assert {name: getattr(settings, name) for name in values} == values


def test_an_unknown_name() -> None:
    with pytest.raises(
        ConfigurationError, match=r"no setting pool_sise \(did you mean pool_size\?"
    ):
        Settings(pool_sise=3)


class TestAliases:
    def test_its_variables(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PGCHANNELS__REPORTS_2__DATABASE_URL", URL)
        monkeypatch.setenv("PGCHANNELS__REPORTS_2__POOL_SIZE", "7")
        settings = Settings.for_alias("reports_2", page_size=8)
        assert (settings.dsn, settings.pool_size, settings.page_size) == (URL, 7, 8)
        assert (Settings().database_url, Settings().pool_size) == (None, 5)

    def test_no_variable_of_the_default_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PGCHANNELS_DATABASE_URL", URL)
        monkeypatch.setenv("PGCHANNELS_POOL_SIZE", "7")
        settings = Settings.for_alias("reports")
        assert settings.pool_size == 5
        with pytest.raises(ConfigurationError, match="PGCHANNELS__REPORTS__DATABASE_URL"):
            settings.dsn  # noqa: B018

    def test_the_default_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PGCHANNELS_POOL_SIZE", "7")
        assert Settings.for_alias("default").pool_size == 7

    def test_a_dotenv_file(self) -> None:
        Path(".env").write_text("PGCHANNELS__REPORTS__POOL_SIZE=7\n")
        Path("other.env").write_text("PGCHANNELS__REPORTS__POOL_SIZE=8\nPGCHANNELS_POOL_SIZE=9\n")
        assert Settings.for_alias("reports").pool_size == 7
        assert Settings.for_alias("reports", _env_file="other.env").pool_size == 8
        assert Settings(_env_file="other.env").pool_size == 9

    @pytest.mark.parametrize(
        "alias", ["", "Reports", "a__b", "_a", "a_", "a-b", "a b", "ä", None, 3]
    )
    def test_what_is_none(self, alias: Any) -> None:
        with pytest.raises(ConfigurationError, match=r"is no alias .* single underscores"):
            Settings.for_alias(alias)


def test_the_table_of_settings() -> None:
    """Every setting is in docs/operations.md, with its default."""
    text = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    rows = re.findall(r"^\| `PGCHANNELS_(\w+)` \| (.+?) \|", text, re.MULTILINE)
    documented = {name.lower(): default.strip("`") for name, default in rows}
    assert len(rows) == len(documented)
    assert documented.pop("backend") == "postgres"
    assert documented.pop("serializer") == "JSON"
    expected = {
        name: _as_variable(field.get_default()) for name, field in Settings.model_fields.items()
    }
    assert documented == expected | {"listen_url": "the same"}


def _as_variable(value: object) -> str:
    match value:
        case None:
            return "–"
        case timedelta():
            return f"P{value.days}D"
        case float():
            return f"{value:g}"
        case _:
            return str(value)


def test_passwords_are_not_shown() -> None:
    settings = Settings(database_url=URL, listen_url=URL)
    assert "s3cret" not in repr(settings) + str(settings) + repr(settings.model_dump())


def test_settings_do_not_change() -> None:
    settings = Settings()
    with pytest.raises(ValidationError, match="frozen"):
        setattr(settings, "pool_size", 3)  # noqa: B010 - mypy knows it too
