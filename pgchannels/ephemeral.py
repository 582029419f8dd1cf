"""Brings ephemeral messages from other processes, and this one's, to who is there.

They are inserted into a table that is not logged, and the notification of that transaction names
their ids. What it says is checked by reading them: a forged one shows nothing that is not there,
and no message comes twice. Nobody looks for them otherwise, so what is sent while a node does not
listen, it misses. They are swept out of the table within seconds.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import deque
from datetime import datetime
from typing import TYPE_CHECKING

from pgchannels.errors import DatabaseError

if TYPE_CHECKING:
    from pgchannels.hub import Hub
    from pgchannels.store import Store

__all__ = ["Ephemeral"]

logger = logging.getLogger("pgchannels.ephemeral")

_HINT = re.compile(r"e (\d{1,18}) (\d{1,18})", re.ASCII)
# Messages that one read brings, and ids that are remembered.
_MAX_MESSAGES = 1000
_REMEMBERED = 20_000
# Seconds to wait after a hint at messages that are not there, or that have come already.
_AFTER_FALSE_HINT = 0.05
_AFTER_OLD_HINT = 0.005


class Ephemeral:
    """``run()`` is its whole life; cancelling it ends it.

    Args:
        store: where they are read.
        hub: hands them out.
    """

    def __init__(self, store: Store, hub: Hub) -> None:
        self._store = store
        self._hub = hub
        # What was hinted at since the last look. However many hints come, they cost one look.
        self._range: tuple[int, int] | None = None
        self._hinted = asyncio.Event()
        # With their times: after a crash of the server the ids begin anew.
        self._seen: deque[tuple[int, datetime]] = deque()
        self._is_seen: set[tuple[int, datetime]] = set()

    def hint(self, payload: str) -> bool:
        """A notification came. Say whether it is about ephemeral messages."""
        match = _HINT.fullmatch(payload)
        if match is None:
            return False
        first, last = int(match[1]), int(match[2])
        if self._range is not None:
            first, last = min(first, self._range[0]), max(last, self._range[1])
        self._range = first, last
        self._hinted.set()
        return True

    async def run(self) -> None:
        while True:
            await self._hinted.wait()
            self._hinted.clear()
            hinted, self._range = self._range, None
            if hinted is None:
                continue
            try:
                await asyncio.sleep(await self._bring(*hinted))
            except DatabaseError as error:
                logger.info("ephemeral messages are lost: %s", error)
                await asyncio.sleep(_AFTER_FALSE_HINT)

    async def _bring(self, first: int, last: int) -> float:
        """Hand out what is there; return for how long to rest after that."""
        rest = _AFTER_FALSE_HINT
        while True:
            position = self._hub.position
            read = await self._store.read_ephemeral(first, last, _MAX_MESSAGES, position)
            for id, message in read:
                # Those of concurrent statements may lie in between, and have hints of their own.
                if (id, message.created_at) in self._is_seen:
                    rest = min(rest, _AFTER_OLD_HINT)
                else:
                    rest = 0
                    self._remember(id, message.created_at)
                    self._hub.offer(message)
            if len(read) < _MAX_MESSAGES:
                return rest
            first = read[-1][0] + 1

    def _remember(self, id: int, created_at: datetime) -> None:
        self._seen.append((id, created_at))
        self._is_seen.add((id, created_at))
        if len(self._seen) > _REMEMBERED:
            self._is_seen.discard(self._seen.popleft())
