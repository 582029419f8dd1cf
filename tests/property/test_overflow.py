"""What waits for a slow consumer, under each policy, for any course of offers and takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgchannels.messages import Message
from pgchannels.overflow import Policy
from pgchannels.subscription import State, Subscription

NOW = datetime(2026, 1, 1, tzinfo=UTC)


class Offer(NamedTuple):
    """The key is the text; "" for a message without one."""

    channel: str
    key: str
    size: int


class Bounds(NamedTuple):
    max_messages: int
    max_bytes: int

    def hold(self, messages: Sequence[Message]) -> bool:
        return (
            len(messages) <= self.max_messages and sum(m.size for m in messages) <= self.max_bytes
        )


Step: TypeAlias = Offer | None  # None: the consumer takes what is there

offers = st.builds(
    Offer, channel=st.sampled_from("ab"), key=st.sampled_from(["", *"xyz"]), size=st.integers(1, 12)
)
# Takes are rarer than offers, or nothing would overflow.
steps = st.lists(st.one_of(offers, offers, offers, st.none()), min_size=1, max_size=80)
bounds = st.builds(Bounds, st.integers(1, 5), st.integers(5, 30))


def key_of(message: Message) -> str | None:
    return message.payload or None


def subscribe(policy: Policy, bounds: Bounds) -> Subscription:
    subscription = Subscription(
        max_messages=bounds.max_messages,
        max_bytes=bounds.max_bytes,
        policy=policy,
        key=key_of if policy == "latest_by_key" else None,
    )
    for channel in "ab":
        subscription.add(channel, None, 0)
    return subscription


def course(
    subscription: Subscription, steps: list[Step]
) -> Iterator[tuple[list[Message], list[Message]]]:
    """What was offered between two takes, and what the second one gave. Takes at the end, too."""
    offered: list[Message] = []
    total, delivered = 0, 0
    for step in [*steps, None]:
        if step is None:
            taken = subscription.take()
            delivered += len(taken)
            yield offered, taken
            offered = []
        else:
            total += 1
            message = Message(total, step.channel, step.key, NOW, step.size, 1)
            offered.append(message)
            assert subscription.offer(message) or subscription.state is State.ENDED
        waiting = len(subscription)
        if subscription.state is State.LIVE:
            gone = subscription.dropped + subscription.replaced
            assert delivered + gone + waiting == total


def newest_that_fit(messages: list[Message], bounds: Bounds) -> list[Message]:
    """The longest end of them that fits; the last one in any case."""
    start = max(0, len(messages) - 1)
    while start and bounds.hold(messages[start - 1 :]):
        start -= 1
    return messages[start:]


@given(bounds, steps)
def test_drop_oldest_gives_the_newest_that_fit(bounds: Bounds, steps: list[Step]) -> None:
    for offered, taken in course(subscribe("drop_oldest", bounds), steps):
        assert taken == newest_that_fit(offered, bounds)


@given(bounds, steps)
def test_latest_by_key_gives_the_last_of_each_key(bounds: Bounds, steps: list[Step]) -> None:
    for offered, taken in course(subscribe("latest_by_key", bounds), steps):
        assert all(earlier.id < later.id for earlier, later in pairwise(taken))
        assert bounds.hold(taken) or len(taken) == 1
        assert taken[-1:] == offered[-1:]
        # A message without a key is the last one, and the only one, of a key of its own.
        last = {(m.channel, key_of(m) or m.id): m for m in offered}
        assert set(taken) <= set(last.values())
        # Whoever is missing was dropped, and then so was all that is older.
        assert all(m in taken or m.id < taken[0].id for m in last.values())


@given(bounds, steps)
def test_latest_by_key_drops_nothing_while_the_keys_fit(bounds: Bounds, steps: list[Step]) -> None:
    subscription = subscribe("latest_by_key", Bounds(bounds.max_messages + 6, 10_000))
    keyed = [step for step in steps if step is None or step.key]
    for offered, taken in course(subscription, keyed):
        assert taken == sorted({(m.channel, m.payload): m for m in offered}.values(), key=_id)
    assert subscription.dropped == 0


@given(bounds, steps)
def test_disconnect_ends_it_when_they_do_not_fit(bounds: Bounds, steps: list[Step]) -> None:
    subscription = subscribe("disconnect", bounds)
    ended = False
    for offered, taken in course(subscription, steps):
        too_many = next(
            (n for n in range(2, len(offered) + 1) if not bounds.hold(offered[:n])), None
        )
        if ended:
            assert taken == []
        elif too_many is not None:
            ended = True
            assert taken == []
            assert subscription.dropped == too_many
        else:
            assert taken == offered
        assert (subscription.state is State.ENDED) == ended
    assert subscription.next_read() is None
    assert not len(subscription)


@pytest.mark.parametrize("policy", ["drop_oldest", "latest_by_key", "disconnect"])
@given(bounds, steps)
def test_memory_is_bounded(policy: Policy, bounds: Bounds, steps: list[Step]) -> None:
    subscription = subscribe(policy, bounds)
    for id, step in enumerate(steps, 1):
        if step is None:
            subscription.take()
        else:
            subscription.offer(Message(id, step.channel, step.key, NOW, step.size, 1))
        waiting = list(subscription._waiting.values())
        assert bounds.hold(waiting) or len(waiting) == 1
        assert subscription._waiting_bytes == sum(message.size for message in waiting)


@pytest.mark.parametrize("policy", ["drop_oldest", "latest_by_key"])
def test_what_waits_of_a_channel_that_is_left_makes_room(policy: Policy) -> None:
    subscription = subscribe(policy, Bounds(3, 100))
    for id, channel in enumerate("aba", 1):
        subscription.offer(Message(id, channel, "", NOW, 10, 1))
    subscription.discard("a")
    for id in (4, 5):
        subscription.offer(Message(id, "b", "", NOW, 10, 1))
    assert [message.id for message in subscription.take()] == [2, 4, 5]
    assert subscription.dropped == 0


@pytest.mark.parametrize("policy", ["drop_oldest", "latest_by_key"])
def test_what_was_dropped_here_was_not_missed(policy: Policy) -> None:
    subscription = subscribe(policy, Bounds(2, 100))
    for id in range(1, 6):
        subscription.offer(Message(id, "a", "", NOW, 10, 1))
    assert subscription.dropped == 3
    subscription.missed(5)
    assert not subscription.truncated
    subscription.missed(6)
    assert subscription.truncated


def test_who_has_ended_stays_so() -> None:
    subscription = subscribe("disconnect", Bounds(1, 100))
    for id in (1, 2):
        subscription.offer(Message(id, "a", "", NOW, 10, 1))
    assert subscription.state is State.ENDED
    for channel in "ab":
        subscription.discard(channel)
    subscription.add("a", -1, 2)
    assert subscription.state is State.ENDED
    assert subscription.next_read() is None
    assert not subscription.offer(Message(3, "a", "", NOW, 10, 1))


def _id(message: Message) -> int:
    return message.id
