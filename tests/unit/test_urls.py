"""Database URLs: as libpq, SQLAlchemy and hosts write them, and as the driver reads them."""

from __future__ import annotations

import pytest

from pgchannels import ConfigurationError, Settings
from pgchannels.urls import driver_url


@pytest.mark.parametrize(
    ("url", "dsn"),
    [
        ("postgres://h/d", "postgresql://h/d"),
        ("postgresql+asyncpg://u:p%3F@h:1,g:2/d", "postgresql://u:p%3F@h:1,g:2/d"),
        ("postgresql://?host=/run/postgresql", "postgresql://?host=/run/postgresql"),
        # Neon, Supabase, Heroku and Azure write such ones.
        (
            "postgresql://u:p@h/d?sslmode=verify-full&channel_binding=require",
            "postgresql://u:p@h/d?sslmode=verify-full",
        ),
        (
            "postgresql://h/d?sslmode=require&channel_binding=prefer",
            "postgresql://h/d?sslmode=require",
        ),
        ("postgresql://h/d?keepalives=1&keepalives_idle=30&tcp_user_timeout=9", "postgresql://h/d"),
        ("postgresql://h/d?gssencmode=disable&application_name=shop", "postgresql://h/d"),
        (
            "postgresql://h/d?fallback_application_name=shop&load_balance_hosts=random",
            "postgresql://h/d",
        ),
        (
            "postgresql://h/d?target_session_attrs=read-write",
            "postgresql://h/d?target_session_attrs=read-write",
        ),
        (
            "postgresql://h/d?options=-c%20search_path%3Da",
            "postgresql://h/d?options=-c%20search_path%3Da",
        ),
        # SQLAlchemy's own
        ("postgresql+asyncpg://h/d?ssl=require", "postgresql://h/d?sslmode=require"),
        ("postgresql+asyncpg://h/d?ssl=true", "postgresql://h/d?sslmode=require"),
        ("postgresql+asyncpg://h/d?prepared_statement_cache_size=0", "postgresql://h/d"),
    ],
)
def test_a_parameter_is_kept_translated_or_left_out(url: str, dsn: str) -> None:
    assert driver_url(url).dsn == dsn
    assert Settings(database_url=url).dsn == dsn
    assert Settings(database_url="postgresql://h/d", listen_url=url).listen_dsn == dsn


@pytest.mark.parametrize(
    ("parameter", "said"),
    [
        ("channel_binding=require", "channel_binding=require cannot be kept.*sslmode=verify-full"),
        ("channel_binding=require&sslmode=require", "channel_binding=require cannot be kept"),
        ("gssencmode=require", "gssencmode=require cannot be kept"),
        ("sslcertmode=require", "sslcertmode=require cannot be kept"),
        ("requirepeer=postgres", "'requirepeer' is not one that we take"),
        ("hostaddr=127.0.0.1", "'hostaddr' is not"),
        ("statement_timeout=5s", "'statement_timeout' is not one.*options=-c%20name=value"),
        ("pool_size=5", "'pool_size' is not"),
        ("connect_timeout=soon", "connect_timeout must be a whole number"),
    ],
)
@pytest.mark.parametrize("name", ["database_url", "listen_url"])
def test_a_parameter_that_cannot_be_kept_is_refused_by_name(
    parameter: str, said: str, name: str
) -> None:
    urls = {"database_url": "postgresql://h/d", name: f"postgresql://u:s3cret@h/d?{parameter}"}
    with pytest.raises(ConfigurationError, match=rf"{name} .*{said}") as caught:
        Settings(**urls)
    assert "s3cret" not in str(caught.value)


def test_another_drivers_url_is_not_refused() -> None:
    url = "postgresql+psycopg://h/d?requirepeer=postgres&channel_binding=require&sslmode=require"
    assert driver_url(url, strict=False).dsn == "postgresql://h/d?sslmode=require"


@pytest.mark.parametrize(
    ("database", "listen", "seconds"),
    [
        ("", None, 10),
        ("?connect_timeout=3", None, 3),
        ("?connect_timeout=1", None, 2),  # as libpq has it
        ("?connect_timeout=0", None, 10),
        ("?connect_timeout=60", None, 60),
        ("?connect_timeout=60", "?connect_timeout=5", 5),
        ("", "?connect_timeout=5", 5),
    ],
)
def test_how_long_connecting_may_take(database: str, listen: str | None, seconds: float) -> None:
    settings = Settings(
        database_url=f"postgresql://h/d{database}",
        listen_url=None if listen is None else f"postgresql://g/d{listen}",
    )
    assert settings.connect_timeout == seconds
