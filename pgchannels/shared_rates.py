"""Rates that all nodes share: who takes at the same time here goes into one statement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from pgchannels.coalesce import Coalescer
from pgchannels.rates import Admission, Rate, TokenBucket

if TYPE_CHECKING:
    from pgchannels.store import Store

__all__ = ["SharedRates"]

# Requests that one transaction serves: their keys are locked while it runs.
_AT_A_TIME = 500


class _Take(NamedTuple):
    key: str
    rate: Rate
    cost: int


class SharedRates:
    """Takes from the table of rates.

    Args:
        store: where it is.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._takes = Coalescer[_Take, Admission](self._take, max_items=_AT_A_TIME)

    async def close(self) -> None:
        """Do what is waiting, and refuse more."""
        await self._takes.close()

    async def take(self, key: str, rate: Rate, cost: int) -> Admission:
        return await self._takes.submit(_Take(key, rate, cost))

    async def _take(self, requests: Sequence[_Take]) -> list[Admission]:
        # Rows are locked in this order, which is that of bytes; and those of a key in their own.
        places = sorted(range(len(requests)), key=lambda place: requests[place].key.encode())
        ordered = [requests[place] for place in places]
        rates = [request.rate for request in ordered]
        rows = await self._store.fetch(
            "take",
            [request.key for request in ordered],
            [request.cost for request in ordered],
            [rate.capacity for rate in rates],
            [float(rate.rate) if isinstance(rate, TokenBucket) else None for rate in rates],
            [None if isinstance(rate, TokenBucket) else float(rate.window) for rate in rates],
        )
        found = {
            place: Admission(row["allowed"], row["remaining"], row["retry_after"])
            for place, row in zip(places, rows, strict=True)
        }
        return [found[place] for place in range(len(requests))]
