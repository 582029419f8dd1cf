"""Token buckets and fixed windows against models that count in the simplest way."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pgchannels.errors import ConfigurationError
from pgchannels.rates import Admission, FixedWindow, Limiter, Rate, TokenBucket

SECOND = 10**9
DAY = 86_400 * SECOND

buckets = st.builds(
    TokenBucket,
    rate=st.one_of(
        st.integers(1, 1000), st.floats(0.01, 1e6, allow_nan=False), st.sampled_from([0.1, 1 / 3])
    ),
    burst=st.integers(1, 50),
)
windows = st.builds(
    FixedWindow,
    limit=st.integers(1, 50),
    window=st.one_of(st.integers(1, 100), st.floats(0.001, 100), st.sampled_from([0.1, 1 / 3])),
)
rates = st.one_of(buckets, windows)
pauses = st.one_of(st.just(0), st.integers(0, 1000), st.integers(0, 10 * SECOND), st.just(DAY))
# How long after the one before, and which share of the capacity.
attempts = st.lists(st.tuples(pauses, st.floats(0, 1)), max_size=60)
starts = st.integers(-DAY, 10**19)


def costs(rate: Rate, share: float) -> int:
    return max(1, round(rate.capacity * share))


class BucketModel:
    """All that was ever taken, summed up anew each time, in fractions."""

    def __init__(self, bucket: TokenBucket) -> None:
        self.rate = Fraction(str(bucket.rate))
        self.burst = bucket.burst
        self.taken: list[tuple[int, int]] = []

    def level(self, now: int) -> Fraction:
        level, at = Fraction(self.burst), now
        if self.taken:
            at = self.taken[0][0]
        for when, cost in self.taken:
            level = min(Fraction(self.burst), level + self.rate * (when - at) / SECOND) - cost
            at = when
        return min(Fraction(self.burst), level + self.rate * (now - at) / SECOND)

    def take(self, now: int, cost: int) -> bool:
        allowed = self.level(now) >= cost
        if allowed:
            self.taken.append((now, cost))
        return allowed

    def remaining(self, now: int) -> int:
        return math.floor(self.level(now))


class WindowModel:
    """All that was ever taken; a window begins with the first that is in none."""

    def __init__(self, spec: FixedWindow) -> None:
        self.limit = spec.limit
        self.length = Fraction(str(spec.window)) * SECOND
        self.windows: list[tuple[int, list[int]]] = []

    def _current(self, now: int) -> list[int]:
        for begun, taken in self.windows:
            if begun <= now < begun + self.length:
                return taken
        return []

    def take(self, now: int, cost: int) -> bool:
        taken = self._current(now)
        if sum(taken) + cost > self.limit:
            return False
        if not taken:
            self.windows.append((now, taken))
        taken.append(cost)
        return True

    def remaining(self, now: int) -> int:
        return self.limit - sum(self._current(now))


def model_of(rate: Rate) -> BucketModel | WindowModel:
    return BucketModel(rate) if isinstance(rate, TokenBucket) else WindowModel(rate)


def after(now: int, admission: Admission) -> int:
    """The first moment that *retry_after* promises."""
    return now + math.ceil(admission.retry_after * SECOND)


@given(rate=rates, attempts=attempts, now=starts)
def test_they_decide_as_the_models_do(
    rate: Rate, attempts: list[tuple[int, float]], now: int
) -> None:
    model, state = model_of(rate), None
    for pause, share in attempts:
        now += pause
        cost = costs(rate, share)
        admission, state = rate.decide(state, now, cost)
        assert admission.allowed == model.take(now, cost)
        assert admission.remaining == model.remaining(now)
        assert (admission.retry_after == 0) == admission.allowed


@given(rate=rates, attempts=attempts, now=starts, share=st.floats(0, 1))
def test_retry_after_is_when_there_is_room_and_not_later(
    rate: Rate, attempts: list[tuple[int, float]], now: int, share: float
) -> None:
    state: Any = None
    for pause, each in attempts:
        now += pause
        _, state = rate.decide(state, now, costs(rate, each))
    cost = costs(rate, share)
    admission, state = rate.decide(state, now, cost)
    if not admission.allowed:
        # A float of seconds says it to within some nanoseconds.
        at = after(now, admission)
        slack = 2 + math.ceil(admission.retry_after * SECOND * 2**-52)
        assert rate.decide(state, at + slack, cost).admission.allowed
        assert not rate.decide(state, max(now, at - slack), cost).admission.allowed


@given(bucket=buckets, attempts=attempts, now=starts)
def test_a_bucket_admits_the_burst_and_what_has_come_since(
    bucket: TokenBucket, attempts: list[tuple[int, float]], now: int
) -> None:
    taken: list[tuple[int, int]] = []
    state: Any = None
    for pause, share in attempts:
        now += pause
        cost = costs(bucket, share)
        admission, state = bucket.decide(state, now, cost)
        if admission.allowed:
            taken.append((now, cost))
    for first, (begun, _) in enumerate(taken):
        total = 0
        for ended, cost in taken[first:]:
            total += cost
            come = Fraction(str(bucket.rate)) * (ended - begun) / SECOND
            assert total <= bucket.burst + come


@pytest.mark.parametrize(
    ("rate", "burst"), [(10, 2), (0.1, 3), (1 / 3, 5), (7, 7), (1e6, 2), (333.3, 10)]
)
def test_a_bucket_that_is_always_asked_admits_exactly_its_rate(rate: float, burst: int) -> None:
    bucket, state, admitted = TokenBucket(rate, burst), None, 0
    steps, step = 20_000, math.ceil(SECOND / rate / 7)
    for number in range(steps + 1):
        admission, state = bucket.decide(state, number * step)
        admitted += admission.allowed
    # To the last token, whatever the number of additions: nothing was lost by rounding.
    assert admitted == burst + math.floor(Fraction(str(rate)) * steps * step / SECOND)


@pytest.mark.parametrize("limit", [1, 2, 10, 1000])
def test_a_window_admits_its_limit_and_not_one_more(limit: int) -> None:
    window, state = FixedWindow(limit, 1), None
    for number in range(3):
        begun = 5 * SECOND + number * SECOND
        allowed = []
        for attempt in range(limit + 10):
            # The last moment of the window is in it, the next one begins the next window.
            now = begun if attempt == 0 else begun + SECOND - 1
            admission, state = window.decide(state, now)
            allowed.append(admission.allowed)
        assert allowed == [True] * limit + [False] * 10


@given(rate=rates, attempts=attempts, now=starts, pause=pauses)
def test_an_idle_state_says_no_more_than_none(
    rate: Rate, attempts: list[tuple[int, float]], now: int, pause: int
) -> None:
    state: Any = None
    for gap, share in attempts:
        now += gap
        _, state = rate.decide(state, now, costs(rate, share))
    if state is not None and rate.is_idle(state, now + pause):
        for cost in (1, rate.capacity):
            assert rate.decide(state, now + pause, cost) == rate.decide(None, now + pause, cost)


@given(rate=rates, attempts=attempts, now=starts)
def test_what_was_refused_has_cost_nothing(
    rate: Rate, attempts: list[tuple[int, float]], now: int
) -> None:
    state: Any = None
    for pause, share in attempts:
        now += pause
        before = state
        admission, state = rate.decide(before, now, costs(rate, share))
        assert admission.allowed or state is before


@given(rate=rates, now=starts, back=st.integers(0, DAY))
def test_a_clock_that_goes_back_wins_nothing(rate: Rate, now: int, back: int) -> None:
    _, state = rate.decide(None, now, rate.capacity)
    assert not rate.decide(state, now - back).admission.allowed


@pytest.mark.parametrize(
    "make",
    [
        lambda: TokenBucket(0, 1),
        lambda: TokenBucket(-1, 1),
        lambda: TokenBucket(math.nan, 1),
        lambda: TokenBucket(math.inf, 1),
        lambda: TokenBucket(2**31, 1),
        lambda: TokenBucket(1, 0),
        lambda: TokenBucket(1, 2**31),
        lambda: TokenBucket(5e-324, 1),
        lambda: TokenBucket(1, 1.5),  # type: ignore[arg-type]
        lambda: TokenBucket(True, 1),
        lambda: TokenBucket(1, True),
        lambda: TokenBucket("1", 1),  # type: ignore[arg-type]
        lambda: FixedWindow(0, 1),
        lambda: FixedWindow(1, 0),
        lambda: FixedWindow(1, math.nan),
        lambda: FixedWindow(1, math.inf),
        lambda: FixedWindow(1, -1),
        lambda: FixedWindow(1, 1e-4),
        lambda: FixedWindow(2**31, 1),
    ],
)
def test_what_cannot_be_a_rate_is_refused(make: Callable[[], Rate]) -> None:
    with pytest.raises(ConfigurationError):
        make()


@given(
    rate=st.one_of(
        st.builds(TokenBucket, st.floats(1e-7, 2**31 - 1), st.just(1)),
        st.builds(TokenBucket, st.just(2**31 - 1), st.integers(1, 2**31 - 1)),
        st.builds(FixedWindow, st.integers(1, 2**31 - 1), st.floats(0.001, 366 * 86_400)),
    ),
    now=starts,
)
@example(rate=TokenBucket(1 / (366 * 86_400), 1), now=0)
def test_the_whole_range_works(rate: Rate, now: int) -> None:
    admission, state = rate.decide(None, now, rate.capacity)
    assert admission == Admission(allowed=True, remaining=0)
    admission, _ = rate.decide(state, now, rate.capacity)
    assert 0 < admission.retry_after <= 366 * 86_400


@pytest.mark.parametrize("rate", [TokenBucket(10, 5), FixedWindow(5, 60)])
@pytest.mark.parametrize("cost", [0, -1, 6, 1.5, True])
def test_a_cost_that_there_is_never_room_for_is_a_mistake(rate: Rate, cost: Any) -> None:
    limiter = Limiter(rate)
    with pytest.raises(ConfigurationError):
        rate.decide(None, 0, cost)
    with pytest.raises(ConfigurationError):
        limiter.take("a", 0, cost)
    assert len(limiter) == 0


def test_specifications_are_values() -> None:
    bucket = TokenBucket(5, burst=10)
    bucket.decide(None, 0)
    assert bucket == TokenBucket(5.0, 10)
    assert len({bucket, TokenBucket(5, 10), FixedWindow(5, 10)}) == 2
    with pytest.raises(AttributeError):
        bucket.burst = 11  # type: ignore[misc]


# Many keys


@given(
    first=rates,
    more=st.lists(rates, max_size=2),
    attempts=st.lists(st.tuples(pauses, st.sampled_from("abc"), st.floats(0, 1)), max_size=60),
    now=starts,
)
def test_a_limiter_is_a_model_for_each_key(
    first: Rate, more: list[Rate], attempts: list[tuple[int, str, float]], now: int
) -> None:
    limiter = Limiter(first, *more)
    models = {key: [model_of(rate) for rate in limiter.rates] for key in "abc"}
    for pause, key, share in attempts:
        now += pause
        cost = max(1, round(limiter.capacity * share))
        expected = all(model.remaining(now) >= cost for model in models[key])
        admission = limiter.take(key, now, cost)
        assert admission.allowed == expected
        if expected:
            assert all(model.take(now, cost) for model in models[key])
        assert admission.remaining == min(model.remaining(now) for model in models[key])


@given(
    limits=st.lists(rates, min_size=1, max_size=3),
    attempts=st.lists(st.tuples(pauses, st.floats(0, 1)), max_size=30),
    now=starts,
)
def test_a_limiter_says_when_there_is_room_in_all(
    limits: list[Rate], attempts: list[tuple[int, float]], now: int
) -> None:
    limiter = Limiter(*limits)
    for pause, share in attempts:
        now += pause
        cost = max(1, round(limiter.capacity * share))
        admission = limiter.take("a", now, cost)
        if not admission.allowed:
            now = after(now, admission) + 2 + math.ceil(admission.retry_after * SECOND * 2**-52)
            assert limiter.take("a", now, cost).allowed


@pytest.mark.parametrize("rate", [TokenBucket(10, 2), FixedWindow(2, 0.2)])
def test_millions_of_keys_that_come_once_are_not_kept(rate: Rate) -> None:
    limiter, most = Limiter(rate), 0
    for number in range(50_000):
        # 1 000 a second, each idle again after 0.2 s at the latest: 200 are not.
        limiter.take(number, number * SECOND // 1000)
        most = max(most, len(limiter))
    assert most <= 500


def test_keys_that_stay_do_not_keep_those_that_are_idle() -> None:
    limiter = Limiter(TokenBucket(10, 100))
    for number in range(1000):
        assert limiter.take(("busy", number), 0, 100).allowed  # for ten seconds
    for number in range(20_000):
        limiter.take(number, number * SECOND // 2500)  # 250 at a time are not idle
    assert len(limiter) <= 2 * 1250 + 10
    assert not any(limiter.take(("busy", number), 8 * SECOND, 90).allowed for number in range(1000))


def test_keys_that_are_not_idle_are_kept_among_others_that_come_and_go() -> None:
    limiter = Limiter(FixedWindow(1, 3600))
    for number in range(1000):
        assert limiter.take(("busy", number), 0).allowed
    other = Limiter(TokenBucket(10, 1), FixedWindow(1, 3600))
    assert other.take("a", 0).allowed
    for number in range(10_000):
        limiter.take(number % 7, number)
        assert not other.take("a", number * SECOND // 5).allowed
    assert all(not limiter.take(("busy", number), SECOND).allowed for number in range(1000))


def test_a_key_is_forgotten_on_demand() -> None:
    limiter = Limiter(FixedWindow(1, 3600))
    assert limiter.take("a", 0).allowed
    assert not limiter.take("a", 0).allowed
    limiter.forget("a")
    limiter.forget("b")
    assert len(limiter) == 0
    assert limiter.take("a", 0).allowed
