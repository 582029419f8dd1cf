"""Brings ephemeral messages from other processes, and this one's, to who is there.

They are inserted into a table that is not logged, and the notification of that transaction names
their ids. What it says is checked by reading them: a forged one shows nothing that is not there,
and no message comes twice: those that came are remembered for as long as they stay there, and a
message that is older than all that are remembered is no news. Nobody looks for them otherwise, so
what is sent while a node does not listen, it misses. They are swept out within seconds.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import deque
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from pgchannels.errors import DatabaseError

if TYPE_CHECKING:
    from pgchannels.hub import Hub
    from pgchannels.store import Store

__all__ = ["Ephemeral"]

logger = logging.getLogger("pgchannels.ephemeral")

_HINT = re.compile(r"e (\d{1,18}) (\d{1,18})", re.ASCII)
# Messages that one read brings.
_MAX_MESSAGES = 1000
# Seconds for which a message is remembered, as long as it stays in the table; and how many are.
_MEMORY_TIME = 10.0
_REMEMBERED = 100_000
# Seconds to rest after a look that found nothing, or mostly what had come already. A few of those
# are no sign of a forged hint, for the hints of concurrent statements overlap.
_AFTER_FALSE_HINT = 0.05
_AFTER_OLD_HINT = 0.005
_FEW = 20


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
        self._seen: deque[tuple[float, int, datetime]] = deque()
        self._is_seen: set[tuple[int, datetime]] = set()
        # No message up to here that is not remembered is a new one. Both count: after a crash the
        # ids are lower, and after the clock has been set back the times.
        self._forgotten = (0, datetime.min.replace(tzinfo=UTC))

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
        old = new = 0
        while True:
            position = self._hub.position
            read = await self._store.read_ephemeral(first, last, _MAX_MESSAGES, position)
            for id, message in read:
                # Those of concurrent statements may lie in between, and have hints of their own.
                if self._is_new(id, message.created_at):
                    new += 1
                    self._remember(id, message.created_at)
                    self._hub.offer(message)
                else:
                    old += 1
            if len(read) < _MAX_MESSAGES:
                break
            first = read[-1][0] + 1
        if old > max(_FEW, new) or (not old and not new):
            return _AFTER_FALSE_HINT
        return 0 if new else _AFTER_OLD_HINT

    def _is_new(self, id: int, created_at: datetime) -> bool:
        if (id, created_at) in self._is_seen:
            return False
        return id > self._forgotten[0] or created_at > self._forgotten[1]

    def _remember(self, id: int, created_at: datetime) -> None:
        now = asyncio.get_running_loop().time()
        self._seen.append((now, id, created_at))
        self._is_seen.add((id, created_at))
        while now - self._seen[0][0] > _MEMORY_TIME or len(self._seen) > _REMEMBERED:
            _, id, created_at = self._seen.popleft()
            self._is_seen.discard((id, created_at))
            self._forgotten = max(self._forgotten[0], id), max(self._forgotten[1], created_at)
