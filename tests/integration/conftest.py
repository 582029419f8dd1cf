"""Layers of both kinds, and what was logged of them."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable

import pytest

from pgchannels import ChannelLayer, MemoryLayer, PostgresLayer, Settings
from pgchannels.memory import MemoryLog
from tests.support.sockets import REFUSED


@pytest.fixture(params=["memory", "postgres"])
def make_layer(request: pytest.FixtureRequest) -> Callable[[], ChannelLayer]:
    """Makes nodes of one log."""
    if request.param == "memory":
        log = MemoryLog()
        settings = Settings(presence_grace=0)
        return lambda: MemoryLayer(settings, log=log)
    url = request.getfixturevalue("database_url")
    return lambda: PostgresLayer(Settings(database_url=url, presence_grace=0))


@pytest.fixture
async def layer(make_layer: Callable[[], ChannelLayer]) -> AsyncIterator[ChannelLayer]:
    async with make_layer() as layer:
        yield layer


@pytest.fixture
async def memory() -> AsyncIterator[MemoryLayer]:
    """For what has nothing to do with where messages are stored."""
    async with MemoryLayer(Settings(presence_grace=0)) as layer:
        yield layer


@pytest.fixture
def errors(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What has been logged as an error, by the library or the server."""
    caplog.set_level(logging.INFO)
    return lambda: [
        record.getMessage()
        for record in caplog.records
        if record.levelno >= logging.ERROR
        and record.name.startswith(("pgchannels", "uvicorn"))
        and record.getMessage() != REFUSED
    ]
