"""What a benchmark returns, and the arithmetic on it. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Figure", "figure", "percentile", "ratio"]

RATIO = "×"


@dataclass(frozen=True)
class Figure:
    """One quantity, measured once a run, and what is expected of its median, if anything is."""

    name: str
    unit: str
    values: tuple[float, ...]
    at_least: float | None = None
    at_most: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def min(self) -> float:
        return min(self.values)

    @property
    def max(self) -> float:
        return max(self.values)

    @property
    def as_expected(self) -> bool | None:
        """None where nothing is expected."""
        if self.at_least is not None:
            return self.median >= self.at_least
        if self.at_most is not None:
            return self.median <= self.at_most
        return None


def figure(
    name: str,
    unit: str,
    runs: Iterable[Mapping[str, float]],
    key: str,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Figure:
    """Pick *key* out of what each run returned."""
    return Figure(name, unit, tuple(run[key] for run in runs), at_least, at_most)


def ratio(
    name: str,
    numerator: Figure,
    denominator: Figure,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Figure:
    """Divide run by run: the two values of a run were measured one soon after the other."""
    values = tuple(a / b for a, b in zip(numerator.values, denominator.values, strict=True))
    return Figure(name, RATIO, values, at_least, at_most)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that *percent* of all do not exceed (nearest rank)."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]
