"""What every benchmark is given, and how its variants take turns."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from benchmarks.figures import Figure
from benchmarks.server import Server

__all__ = ["Benchmark", "Context"]

T = TypeVar("T")


@dataclass(frozen=True)
class Context:
    """Where to measure, how often and for how long."""

    server: Server
    runs: int
    quick: bool
    progress: Callable[[str], None]

    def pick(self, normal: T, quick: T) -> T:
        """A size or a duration, by ``--quick``."""
        return quick if self.quick else normal

    async def interleave(
        self, variants: Mapping[str, Callable[[], Awaitable[T]]]
    ) -> dict[str, list[T]]:
        """Measure each variant once a run: there and back again, which cancels a steady drift."""
        results: dict[str, list[T]] = {name: [] for name in variants}
        for run in range(self.runs):
            names = list(variants)
            for name in names if run % 2 == 0 else reversed(names):
                self.progress(f"run {run + 1} of {self.runs}: {name}")
                results[name].append(await variants[name]())
        return results


@dataclass(frozen=True)
class Benchmark:
    """A benchmark as the command line knows it."""

    name: str
    title: str
    measure: Callable[[Context], Awaitable[list[Figure]]]
