"""The delays between attempts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgchannels.backoff import Backoff


def highest(low: float, high: float) -> float:
    assert low == 0
    return high


def test_the_ceiling_doubles_up_to_the_cap() -> None:
    backoff = Backoff(base=0.5, cap=5, uniform=highest)
    assert [backoff.next() for _ in range(6)] == [0.5, 1, 2, 4, 5, 5]


def test_reset_begins_anew() -> None:
    backoff = Backoff(base=0.5, cap=5, uniform=highest)
    for _ in range(10):
        backoff.next()
    assert backoff.attempts == 10
    backoff.reset()
    assert backoff.attempts == 0
    assert backoff.next() == 0.5


def test_never_overflows() -> None:
    backoff = Backoff(uniform=highest)
    assert [backoff.next() for _ in range(5000)][-1] == 5.0


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_jitter_is_full(share: float) -> None:
    backoff = Backoff(base=1, cap=8, uniform=lambda low, high: low + (high - low) * share)
    assert [backoff.next() for _ in range(5)] == [share * c for c in (1, 2, 4, 8, 8)]


@given(
    base=st.floats(min_value=1e-3, max_value=10),
    cap=st.floats(min_value=1e-3, max_value=100),
    attempts=st.integers(min_value=1, max_value=100),
)
def test_a_delay_lies_between_nothing_and_its_ceiling(
    base: float, cap: float, attempts: int
) -> None:
    backoff = Backoff(base=base, cap=cap)
    for attempt in range(attempts):
        assert 0 <= backoff.next() <= min(cap, base * 2.0**attempt)
