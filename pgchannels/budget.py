"""How much of the log the readers of a process hold together. Pure.

A reader that replays holds a page until it has passed on all of it, which a slow client may draw
out. No reader waits for another one's: when they hold much, pages are smaller.
"""

from __future__ import annotations

from weakref import finalize

__all__ = ["Budget", "Held"]


class Held:
    """Stands for a page: it is held for as long as there is a reference to this."""

    __slots__ = ("__weakref__",)


class Budget:
    """Counts bytes of pages that are held, those that several readers share once.

    Args:
        limit: bytes that may be held before :attr:`is_used_up`.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.held = 0
        """Bytes that are held now."""

    @property
    def is_used_up(self) -> bool:
        return self.held >= self._limit

    def hold(self, size: int) -> Held:
        """Count a page of *size* bytes until nothing refers to the result any more."""
        held = Held()
        self.held += size
        finalize(held, self._release, size).atexit = False
        return held

    def _release(self, size: int) -> None:
        self.held -= size
