"""How long to wait before trying again. Pure: the randomness comes in, nothing sleeps here."""

from __future__ import annotations

import random
from collections.abc import Callable

__all__ = ["Backoff"]


class Backoff:
    """Exponential backoff with full jitter: a uniform draw from 0 to a ceiling that doubles.

    Full jitter spreads a herd that lost the same server at the same moment best (M. Brooker,
    "Exponential Backoff And Jitter", AWS Architecture Blog, 2015).

    Args:
        base: ceiling of the first delay, in seconds.
        cap: highest ceiling, in seconds.
        uniform: draws from an interval; ``random.uniform`` unless a test says otherwise.
    """

    def __init__(
        self,
        base: float = 0.1,
        cap: float = 5.0,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._base = base
        self._cap = cap
        self._uniform = uniform
        self.attempts = 0

    def next(self) -> float:
        """Seconds to wait before the next attempt."""
        # 2**32 times the base is past any cap; beyond it the power would only overflow.
        ceiling = min(self._cap, self._base * 2.0 ** min(self.attempts, 32))
        self.attempts += 1
        return self._uniform(0, ceiling)

    def reset(self) -> None:
        """Begin anew: the last attempt succeeded."""
        self.attempts = 0
