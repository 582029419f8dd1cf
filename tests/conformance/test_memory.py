"""The memory layer keeps the contract."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from pgchannels.memory import MemoryLayer, MemoryLog
from pgchannels.settings import Settings
from pgchannels.testing import ChannelLayerSuite, MakeLayer


class TestMemoryLayer(ChannelLayerSuite):
    @pytest.fixture
    async def make_layer(self) -> AsyncIterator[MakeLayer]:
        log = MemoryLog()
        async with AsyncExitStack() as stack:

            async def make(**settings: Any) -> MemoryLayer:
                layer = MemoryLayer(Settings(**{"presence_grace": 0.3, **settings}), log=log)
                return await stack.enter_async_context(layer)

            yield make
