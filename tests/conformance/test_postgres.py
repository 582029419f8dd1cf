"""The PostgreSQL layer keeps the contract."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from pgchannels.postgres import PostgresLayer
from pgchannels.settings import Settings
from pgchannels.testing import ChannelLayerSuite, MakeLayer


class TestPostgresLayer(ChannelLayerSuite):
    @pytest.fixture
    async def make_layer(self, database_url: str) -> AsyncIterator[MakeLayer]:
        async with AsyncExitStack() as stack:

            async def make(**settings: Any) -> PostgresLayer:
                chosen = Settings(database_url=database_url, **{"presence_grace": 0.3, **settings})
                return await stack.enter_async_context(PostgresLayer(chosen))

            yield make
