"""How much may happen in how much time: token buckets and fixed windows. Pure.

The two specifications decide by themselves, from a state that somebody else keeps: a
:class:`Limiter` in this process, or a table that all nodes share. Nothing here has a clock. Times
are integers, nanoseconds of any clock, and a rate is the decimal number that it is written as, so
that the arithmetic is exact: nothing is lost or won by rounding, however long it goes on.

What was refused has cost nothing.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

from pgchannels.errors import ConfigurationError

__all__ = [
    "Admission",
    "Decision",
    "FixedWindow",
    "Limiter",
    "Rate",
    "TokenBucket",
    "check_cost",
    "check_rate",
]

MAX_COUNT = 2**31 - 1
"""Highest burst, limit, and rate a second."""
MAX_TIME = 366 * 86_400
"""Seconds: longest window, and longest time in which an empty bucket fills."""
MIN_WINDOW = 0.001
"""Seconds."""

_SECOND = 10**9


@dataclass(frozen=True, slots=True)
class Admission:
    """What became of an attempt to take.

    Attributes:
        allowed: it was taken.
        remaining: how much could be taken right after it.
        retry_after: seconds after which there is room for that cost, if nobody else takes it; 0 if
            it was allowed.
    """

    allowed: bool
    remaining: int
    retry_after: float = 0.0


class Decision(NamedTuple):
    """An admission, and the state after it."""

    admission: Admission
    state: Any


@dataclass(frozen=True)
class TokenBucket:
    """*rate* a second on average, *burst* at once.

    The bucket holds *burst* tokens at first, and at most; *rate* come to it each second, evenly and
    in fractions, so that in any *t* seconds at most ``burst + rate * t`` are taken. A cost of *n*
    takes *n* tokens.

    Args:
        rate: tokens a second, above 0 and at most 2**31 - 1.
        burst: tokens, 1 to 2**31 - 1. An empty bucket must fill within 366 days.

    Raises:
        ConfigurationError: out of these ranges.
    """

    rate: float
    burst: int

    def __post_init__(self) -> None:
        _check_number("rate", self.rate, 0, MAX_COUNT)
        _check_count("burst", self.burst)
        if self.rate <= 0 or self.burst > self.rate * MAX_TIME:
            raise ConfigurationError(
                f"rate {self.rate!r} is too low: {self.burst} tokens must come within 366 days"
            )

    @property
    def capacity(self) -> int:
        """The highest cost that there can ever be room for."""
        return self.burst

    # Arithmetic is in integers. With a rate of p/q tokens a second, the unit is 1/(q * 10**9) of a
    # token, of which p come in a nanosecond.

    @cached_property
    def _units(self) -> tuple[int, int]:
        """Units that come in a nanosecond, and units of a token."""
        rate = Fraction(str(self.rate))
        return rate.numerator, rate.denominator * _SECOND

    def decide(self, state: int | None, now: int, cost: int = 1) -> Decision:
        """Say whether *cost* tokens may be taken, and what the state is then.

        Args:
            state: as the last decision for this key gave it; None if there was none, or if the
                state :meth:`is_idle`. It is the time at which the bucket is full again, in units.
            now: nanoseconds. A clock that goes back makes callers wait for it, no more.
            cost: tokens, at least 1.

        Raises:
            ConfigurationError: there is never room for *cost*, or it is less than 1.
        """
        check_cost(self, cost)
        speed, token = self._units
        clock = now * speed
        full_at = clock if state is None else max(state, clock)
        missing = full_at - clock
        excess = missing + (cost - self.burst) * token
        if excess <= 0:
            full_at += cost * token
            remaining = -excess // token
            return Decision(Admission(allowed=True, remaining=remaining), full_at)
        remaining = max(0, self.burst * token - missing) // token
        retry_after = -(-excess // speed) / _SECOND
        return Decision(
            Admission(allowed=False, remaining=remaining, retry_after=retry_after), state
        )

    def is_idle(self, state: int, now: int) -> bool:
        """Whether *state* says no more than None does: the bucket is full again."""
        return state <= now * self._units[0]


@dataclass(frozen=True)
class FixedWindow:
    """*limit* in each window of *window* seconds.

    A key's window begins with the first that is taken when there is none, and ends *window* seconds
    later, that moment not included. So windows of different keys do not all begin at once. In a
    window *limit* are taken at most; around the end of one, up to twice as many may come in short
    time. If that is too many, use a :class:`TokenBucket`.

    Args:
        limit: how many, 1 to 2**31 - 1. A cost of *n* counts as *n*.
        window: seconds, 0.001 to 366 days.

    Raises:
        ConfigurationError: out of these ranges.
    """

    limit: int
    window: float

    def __post_init__(self) -> None:
        _check_count("limit", self.limit)
        _check_number("window", self.window, MIN_WINDOW, MAX_TIME)

    @property
    def capacity(self) -> int:
        """The highest cost that there can ever be room for."""
        return self.limit

    @cached_property
    def _length(self) -> int:
        return math.ceil(Fraction(str(self.window)) * _SECOND)

    def decide(self, state: tuple[int, int] | None, now: int, cost: int = 1) -> Decision:
        """Say whether *cost* may be taken, and what the state is then.

        Args:
            state: as the last decision for this key gave it; None if there was none, or if the
                state :meth:`is_idle`. It is when the window ends, and how many it has taken.
            now: nanoseconds. A clock that goes back makes the window longer.
            cost: at least 1.

        Raises:
            ConfigurationError: there is never room for *cost*, or it is less than 1.
        """
        check_cost(self, cost)
        if state is None or self.is_idle(state, now):
            ends_at, taken = now + self._length, 0
        else:
            ends_at, taken = state
        if taken + cost > self.limit:
            retry_after = (ends_at - now) / _SECOND
            admission = Admission(
                allowed=False, remaining=self.limit - taken, retry_after=retry_after
            )
            return Decision(admission, state)
        taken += cost
        return Decision(Admission(allowed=True, remaining=self.limit - taken), (ends_at, taken))

    def is_idle(self, state: tuple[int, int], now: int) -> bool:
        """Whether *state* says no more than None does: the window has ended."""
        return state[0] <= now


Rate: TypeAlias = TokenBucket | FixedWindow


def check_rate(rate: object) -> None:
    """Refuse what is no rate.

    Raises:
        ConfigurationError: it is neither a :class:`TokenBucket` nor a :class:`FixedWindow`.
    """
    if not isinstance(rate, (TokenBucket, FixedWindow)):
        raise ConfigurationError(f"a rate is a TokenBucket or a FixedWindow, not {rate!r}")


def check_cost(rate: Rate, cost: int) -> None:
    """Refuse what *rate* can never admit.

    Raises:
        ConfigurationError: *cost* is no integer, below 1 or above the rate's capacity.
    """
    given: object = cost
    if not isinstance(given, int) or isinstance(given, bool) or given < 1:
        raise ConfigurationError(f"a cost is an integer of at least 1, not {cost!r}")
    if cost > rate.capacity:
        raise ConfigurationError(f"{rate} never has room for a cost of {cost}")


class Limiter:
    """Rates for any number of keys, in this process.

    With several rates, what is taken is taken of all of them, or of none.

    A key that has not taken for a while is forgotten: it has at its disposal what a new one has.
    With each call two of the other keys are looked at, so that the memory stays in proportion to
    the number of keys that are not idle, and no call takes long.

    Raises:
        ConfigurationError: no rate.
    """

    def __init__(self, rate: Rate, *more: Rate) -> None:
        self.rates: tuple[Rate, ...] = (rate, *more)
        for each in self.rates:
            check_rate(each)
        self._states: OrderedDict[Hashable, list[Any]] = OrderedDict()

    def __len__(self) -> int:
        """How many keys are remembered."""
        return len(self._states)

    @property
    def capacity(self) -> int:
        """The highest cost that there can ever be room for."""
        return min(rate.capacity for rate in self.rates)

    def take(self, key: Hashable, now: int, cost: int = 1) -> Admission:
        """Take *cost* for *key*, if there is room for it.

        Args:
            key: whose it is.
            now: nanoseconds of a clock that does not go back, as ``time.monotonic_ns()``.
            cost: at least 1.

        Raises:
            ConfigurationError: there is never room for *cost*, or it is less than 1.
        """
        states = self._states.get(key) or [None] * len(self.rates)
        decisions = [
            rate.decide(state, now, cost) for rate, state in zip(self.rates, states, strict=True)
        ]
        self._forget_idle(now)
        admissions = [decision.admission for decision in decisions]
        if all(admission.allowed for admission in admissions):
            self._states[key] = [decision.state for decision in decisions]
            self._states.move_to_end(key)
            return min(admissions, key=lambda admission: admission.remaining)
        refused = [admission for admission in admissions if not admission.allowed]
        return Admission(
            allowed=False,
            # Of those that would have allowed it, as if they had not been asked.
            remaining=min(a.remaining + (cost if a.allowed else 0) for a in admissions),
            retry_after=max(admission.retry_after for admission in refused),
        )

    def forget(self, key: Hashable) -> None:
        """Drop what is known of *key*, which will not come again."""
        self._states.pop(key, None)

    def _forget_idle(self, now: int) -> None:
        # Two for each that may come, so that the sweep outruns the growth.
        for _ in range(min(2, len(self._states))):
            key, states = next(iter(self._states.items()))
            pairs = zip(self.rates, states, strict=True)
            if all(rate.is_idle(state, now) for rate, state in pairs):
                del self._states[key]
            else:
                self._states.move_to_end(key)


def _check_count(name: str, given: object) -> None:
    if not isinstance(given, int) or isinstance(given, bool) or not 1 <= given <= MAX_COUNT:
        raise ConfigurationError(f"{name} must be an integer of 1 to {MAX_COUNT}, not {given!r}")


def _check_number(name: str, given: object, lowest: float, highest: float) -> None:
    # NaN is in no range.
    if (
        not isinstance(given, (int, float))
        or isinstance(given, bool)
        or not lowest <= given <= highest
    ):
        raise ConfigurationError(f"{name} must be a number of {lowest} to {highest}, not {given!r}")
