"""Whether this process should get sockets: what a load balancer asks.

Anybody may ask, and as often as they like: the database is asked once a second at most, whatever
comes in.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING

from pgchannels.errors import ChannelLayerClosed, ConfigurationError, PGChannelsError
from pgchannels.waiting import LoopLock

if TYPE_CHECKING:
    from pgchannels.web.connections import ConnectionManager

__all__ = ["Health", "is_listening"]

logger = logging.getLogger("pgchannels.web")

# Seconds for which an answer of the database is good.
_FRESH = 1.0


def is_listening(connections: ConnectionManager) -> bool:
    """Whether notifications of other nodes come in. A layer without a listener needs none."""
    listening: bool = getattr(connections.layer, "is_listening", True)
    return listening


class Health:
    """What is wrong with a manager's process.

    Args:
        connections: the manager.
        grace: seconds that the listener may be away. Messages are found by polling meanwhile.
        timeout: seconds that the database may take to answer.
        clock: seconds, as ``time.monotonic()``.

    Raises:
        ConfigurationError: a number is out of its range.
    """

    def __init__(
        self,
        connections: ConnectionManager,
        *,
        grace: float = 15.0,
        timeout: float = 5.0,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        # Not the other way around: of NaN, every comparison is false.
        if not grace >= 0:
            raise ConfigurationError(f"grace must not be negative: {grace!r}")
        if not timeout > 0:
            raise ConfigurationError(f"timeout must be positive, not {timeout!r}")
        self._connections = connections
        self._grace = grace
        self._timeout = timeout
        self._clock = clock
        self._deaf_since: float | None = None
        self._asking = LoopLock()
        self._asked_at: float | None = None
        self._answer: str | None = None

    async def problems(self) -> list[str]:
        """What is wrong, of ``"draining"``, ``"closed"``, ``"database"`` and ``"listener"``.

        ``"listener"`` comes when the listener has been found away for longer than the grace time:
        counted from the first time that this was asked while it was. Never raises.
        """
        found = ["draining"] if self._connections.is_draining else []
        layer = await self._layer_problem()
        if layer is not None:
            found.append(layer)
        if self._is_deaf() and layer != "closed":
            found.append("listener")
        return found

    def _is_deaf(self) -> bool:
        if is_listening(self._connections):
            self._deaf_since = None
            return False
        if self._deaf_since is None:
            self._deaf_since = self._clock()
        return self._clock() - self._deaf_since >= self._grace

    async def _layer_problem(self) -> str | None:
        # One asks, and the others who came meanwhile share the answer.
        async with self._asking.here():
            now = self._clock()
            if self._asked_at is None or now - self._asked_at >= _FRESH:
                self._answer = await self._ask()
                self._asked_at = self._clock()
            return self._answer

    async def _ask(self) -> str | None:
        try:
            async with asyncio.timeout(self._timeout):
                await self._connections.count()
        except ChannelLayerClosed:
            return "closed"
        except (PGChannelsError, TimeoutError) as error:
            reason = "not in time" if isinstance(error, TimeoutError) else error
            logger.warning("not ready: the database does not answer: %s", reason)
            return "database"
        return None
