"""Where a process without a node finds the database. What a waker does is in integration."""

from __future__ import annotations

import pytest

from pgchannels import ConfigurationError, Settings
from pgchannels.waker import waker_for


@pytest.fixture(autouse=True)
def nothing_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PGCHANNELS_DATABASE_URL", raising=False)


@pytest.mark.parametrize(
    "url", ["postgresql://", "postgresql+psycopg://", "postgresql+psycopg:///?application_name=a"]
)
def test_an_engine_s_url_without_an_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="PGCHANNELS_DATABASE_URL"):
        waker_for(Settings(), url)
    given = Settings(database_url="postgresql://db/shop")
    assert waker_for(given, url) is waker_for(given)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://db/shop",
        "postgresql+psycopg://db",
        "postgresql+psycopg:///shop",
        "postgresql+psycopg://?host=/run/postgresql",
        "postgresql+psycopg://?service=shop",
    ],
)
def test_any_part_of_an_address_will_do(url: str) -> None:
    assert waker_for(Settings(), url) is waker_for(Settings(), url)
