"""What is done about a client that is silent, stuck or expired."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgchannels.web.liveness import Heartbeat, Liveness, Verdict

JSON = Heartbeat(10, 35, missed=2, by="json")


def asks(
    heartbeat: Heartbeat, until: float, heard: tuple[float, ...] = ()
) -> list[tuple[float, str]]:
    """What is found when it is looked at exactly when it says, and at what the client sends."""
    liveness = Liveness(heartbeat, None, 0.0)
    found, now, to_hear = [], 0.0, list(heard)
    while True:
        verdict, again = liveness.check(now)
        if verdict is not Verdict.FINE:
            found.append((now, verdict.name))
        if to_hear and to_hear[0] <= again:
            now = to_hear.pop(0)
            liveness.heard(now)
        elif again == inf or again > until:
            return found
        else:
            now = again


def test_silence() -> None:
    assert asks(JSON, 100) == [(10, "PING"), (20, "PING"), (30, "GONE")]


def test_the_timeout_may_come_first() -> None:
    slow = Heartbeat(10, 25, missed=9, by="json")
    assert asks(slow, 100) == [(10, "PING"), (20, "PING"), (25, "GONE")]


def test_whatever_is_heard_counts() -> None:
    assert asks(JSON, 40, heard=(5, 12, 31)) == [(22, "PING")]
    assert asks(JSON, 60, heard=(29,)) == [
        (10, "PING"),
        (20, "PING"),
        (39, "PING"),
        (49, "PING"),
        (59, "GONE"),
    ]


@pytest.mark.parametrize("by", ["protocol", "off"])
def test_what_is_not_by_json_asks_nothing(by: str) -> None:
    assert asks(Heartbeat(10, 35, by=by), 1000) == []  # type: ignore[arg-type]


def test_a_send_that_makes_no_progress() -> None:
    liveness = Liveness(Heartbeat(), 30.0, 0.0)
    assert liveness.check(0) == (Verdict.FINE, 15)
    liveness.sending(20)
    assert liveness.check(20) == (Verdict.FINE, 35)
    liveness.sending(25)  # beside the first one
    assert liveness.check(40) == (Verdict.FINE, 50)
    liveness.sent(45)
    assert liveness.check(50) == (Verdict.FINE, 65)
    assert liveness.check(75) == (Verdict.STUCK, inf)


def test_what_is_sent_is_not_stuck() -> None:
    liveness = Liveness(Heartbeat(), 30.0, 0.0)
    liveness.sending(1)
    liveness.sent(2)
    assert liveness.check(500)[0] is Verdict.FINE
    liveness.sending(500)
    assert liveness.check(529)[0] is Verdict.FINE
    assert liveness.check(530)[0] is Verdict.STUCK


def test_a_slow_link_is_not_stuck() -> None:
    """One message of 1 MiB at 35 KB a second: the send waits, and some of it is always taken."""
    liveness = Liveness(Heartbeat(), 20.0, 0.0)
    liveness.sending(0)
    for now in range(1, 31):
        assert liveness.check(now, now * 35_000)[0] is Verdict.FINE
    liveness.sent(31)
    liveness.sending(31)
    assert liveness.check(31, 31 * 35_000)[0] is Verdict.FINE
    assert liveness.check(50, 31 * 35_000)[0] is Verdict.FINE
    assert liveness.check(51, 31 * 35_000)[0] is Verdict.STUCK


def test_reading_a_little_now_and_then_does_not_keep_a_socket() -> None:
    """2 KiB every five seconds, so that each send is done in time, and another one waits."""
    liveness = Liveness(Heartbeat(), 30.0, 0.0)
    assert liveness.check(0, 100)[0] is Verdict.FINE
    liveness.sending(1)
    for now in range(5, 30, 5):
        liveness.sent(now)
        liveness.sending(now)
        assert liveness.check(now, 100 + now * 400)[0] is Verdict.FINE
    assert liveness.check(30, 100 + 30 * 400)[0] is Verdict.STUCK


def test_who_has_taken_all_in_between_may_be_slow() -> None:
    liveness = Liveness(Heartbeat(), 30.0, 0.0)
    for now in range(0, 300, 10):
        liveness.sending(now)
        assert liveness.check(now + 5, 100 + now)[0] is Verdict.FINE
        liveness.sent(now + 6)
        assert liveness.check(now + 9, 101 + now)[0] is Verdict.FINE


def test_a_token_that_runs_out() -> None:
    liveness = Liveness(Heartbeat(by="off"), None, 0.0)
    assert liveness.check(0) == (Verdict.FINE, inf)
    liveness.expire_at(50)
    assert liveness.check(49) == (Verdict.FINE, 50)
    assert liveness.check(50) == (Verdict.EXPIRED, inf)
    liveness.expire_at(100)
    assert liveness.check(50) == (Verdict.FINE, 100)
    liveness.expire_at(inf)
    assert liveness.check(1000) == (Verdict.FINE, inf)


@given(
    st.floats(0.1, 100),
    st.floats(1.1, 10),
    st.integers(1, 5),
    st.lists(st.floats(0.01, 50), max_size=20),
)
def test_nobody_is_gone_who_is_heard_within_the_interval(
    interval: float, factor: float, missed: int, pauses: list[float]
) -> None:
    """And whoever is silent is gone by the timeout, having been asked as often as may be."""
    heartbeat = Heartbeat(interval, interval * factor, missed, by="json")
    heard, now = [], 0.0
    for pause in pauses:
        now += min(pause, 0.99 * interval)
        heard.append(now)
    found = asks(heartbeat, now + 10 * heartbeat.timeout, tuple(heard))
    kinds = [kind for _, kind in found]
    assert kinds.count("GONE") == 1
    assert kinds[-1] == "GONE"
    assert len(kinds) - 1 <= missed
    assert all(at > now for at, _ in found)
    assert found[-1][0] <= now + heartbeat.timeout + 1e-6 * interval
