"""The subscription against a model of log and hub: whatever happens, in whatever order."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pgchannels.messages import Message
from pgchannels.overflow import Policy
from pgchannels.subscription import Read, State, Subscription

pytestmark = pytest.mark.slow

CHANNELS = ("a", "b", "c", "d")
MAX_SIZE = 10
NOW = datetime(2026, 1, 1, tzinfo=UTC)

channels = st.sampled_from(CHANNELS)
orders = st.permutations(CHANNELS)
places = st.integers(0, 59)
published = st.lists(st.tuples(channels, st.integers(2, MAX_SIZE)), min_size=1, max_size=6)

RULES: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "publish": lambda r: {
        "messages": [(r.choice(CHANNELS), r.randint(2, MAX_SIZE)) for _ in range(r.randint(1, 6))]
    },
    "hub_reads_on": lambda r: {"steps": r.randint(1, 8)},
    "prune": lambda r: {"by": r.randint(1, 6)},
    "add_at_a_position": lambda r: {"channel": r.choice(CHANNELS), "where": r.randrange(60)},
    "add_from_now_on": lambda r: {"channel": r.choice(CHANNELS)},
    "add_together": lambda r: {
        "several": r.sample(CHANNELS, 4),
        "count": r.randint(2, 4),
        "where": r.randrange(60),
    },
    "discard": lambda r: {"channel": r.choice(CHANNELS)},
    "leave_all_and_come_back_while_a_page_is_on_its_way": lambda r: {
        "order": r.sample(CHANNELS, 4),
        "one": r.randrange(60),
        "another": r.randrange(60),
    },
    "ask_for_a_page": lambda r: {"age": r.randint(0, 3)},
    "page_arrives": lambda _: {},
    "reader_gives_up_waiting": lambda _: {},
    "take": lambda _: {},
    "acknowledge_truncation": lambda _: {},
}
"""Each rule, and how to draw its arguments without Hypothesis."""

NEEDS_PAGE = {
    "page_arrives",
    "reader_gives_up_waiting",
    "leave_all_and_come_back_while_a_page_is_on_its_way",
}
LIKELY = {"publish": 3, "hub_reads_on": 4, "ask_for_a_page": 5, "page_arrives": 5, "take": 4}


class LogPage(NamedTuple):
    messages: list[Message]
    upto: int
    floor: int


@dataclass
class Reader:
    """What a channel's reader is owed."""

    start: int
    last: int
    delivered: list[int] = field(default_factory=list)
    told: bool = False
    """`truncated` has been seen since this channel was added."""
    taken_in: set[int] = field(default_factory=set)
    """By an offer. Only these may be lost by a policy that drops or replaces."""


class SubscriptionMachine(RuleBasedStateMachine):
    """A log, a hub that follows it, one subscription, and at most one page on its way."""

    policy: Policy = "replay"
    key: Callable[[Message], Hashable] | None = None

    @initialize(
        max_messages=st.integers(1, 4), max_bytes=st.integers(5, 40), page_size=st.integers(1, 4)
    )
    def begin(self, max_messages: int, max_bytes: int, page_size: int) -> None:
        self.max_messages, self.max_bytes, self.page_size = max_messages, max_bytes, page_size
        self.subscription = Subscription(
            max_messages=max_messages, max_bytes=max_bytes, policy=self.policy, key=self.key
        )
        self.log: list[Message] = []
        self.floor = 0
        self.hub_cursor = 0
        # The bounds of the log at every moment: a page that is shared was read for someone else,
        # perhaps a while ago.
        self.bounds = [(0, 0)]
        self.readers: dict[str, Reader] = {}
        self.under_way: tuple[Read, LogPage] | None = None
        # Of the channels that are read together: the last id; None while one is catching up.
        self.merged_last: int | None = 0

    @property
    def head(self) -> int:
        return len(self.log)

    # The log and the hub

    @rule(messages=published)
    def publish(self, messages: list[tuple[str, int]]) -> None:
        for channel, size in messages:
            self.log.append(Message(self.head + 1, channel, "{}", NOW, size, 1))
        self.bounds.append((self.head, self.floor))

    @precondition(lambda self: self.hub_cursor < self.head)
    @rule(steps=st.integers(1, 8))
    def hub_reads_on(self, steps: int) -> None:
        for _ in range(min(steps, self.head - self.hub_cursor)):
            message = self.log[self.hub_cursor]
            if message.id > self.floor and message.channel in self.readers:
                self._offer(message)
            self.hub_cursor = message.id

    @rule(by=st.integers(1, 6))
    def prune(self, by: int) -> None:
        # Retention is days; it does not overtake the hub, which is milliseconds behind.
        self.floor = min(self.floor + by, self.hub_cursor)
        self.bounds.append((self.head, self.floor))

    # The subscription's user

    @rule(channel=channels, where=places)
    def add_at_a_position(self, channel: str, where: int) -> None:
        self._add([channel], self._position(where))

    @rule(channel=channels)
    def add_from_now_on(self, channel: str) -> None:
        self._add([channel], None)

    @rule(several=orders, count=st.integers(2, 4), where=places)
    def add_together(self, several: list[str], count: int, where: int) -> None:
        self._add(several[:count], self._position(where))

    @rule(channel=channels)
    def discard(self, channel: str) -> None:
        self.subscription.discard(channel)
        self.readers.pop(channel, None)

    @precondition(lambda self: self.readers)
    @rule()
    def discard_all(self) -> None:
        for channel in list(self.readers):
            self.subscription.discard(channel)
        self.readers.clear()

    @precondition(lambda self: self.under_way is not None)
    @rule(order=orders, one=places, another=places)
    def leave_all_and_come_back_while_a_page_is_on_its_way(
        self, order: list[str], one: int, another: int
    ) -> None:
        self.discard_all()
        self._add([order[0]], self._position(one))
        self._add([order[1]], self._position(another))

    @precondition(lambda self: self.under_way is None)
    @rule(age=st.integers(0, 3))
    def ask_for_a_page(self, age: int) -> None:
        if read := self.subscription.next_read():
            self.under_way = read, self._read(read, age)

    @precondition(lambda self: self.under_way is not None)
    @rule()
    def page_arrives(self) -> None:
        assert self.under_way is not None
        (read, page), self.under_way = self.under_way, None
        asked, flagged = set(read.channels), self.subscription.truncated
        self.subscription.page(
            read, page.messages, upto=page.upto, floor=page.floor, hub_cursor=self.hub_cursor
        )
        if self.subscription.truncated and not flagged:
            begun = [max(read.after, self.readers[name].start) for name in asked & {*self.readers}]
            assert any(0 <= after < page.floor for after in begun), "told, and nothing was missing"

    @precondition(lambda self: self.under_way is not None)
    @rule()
    def reader_gives_up_waiting(self) -> None:
        self.under_way = None

    @rule()
    def take(self) -> None:
        messages = self.subscription.take()
        assert not len(self.subscription)
        waiting = max(self.max_bytes, MAX_SIZE)  # one alone may be larger
        assert sum(m.size for m in messages) <= self.page_size * MAX_SIZE + waiting
        if self.subscription.truncated:
            for reader in self.readers.values():
                reader.told = True
        for message in messages:
            self._deliver(message)
        self._check_order([message.id for message in messages])

    @precondition(lambda self: self.subscription.truncated)
    @rule()
    def acknowledge_truncation(self) -> None:
        for reader in self.readers.values():
            reader.told = True
        self.subscription.truncated = False

    # What must hold

    @invariant()
    def check(self) -> None:
        self.memory_is_bounded()
        self.it_reads_what_it_was_told_to()
        self.idle_means_nothing_is_missing()

    def memory_is_bounded(self) -> None:
        assert len(self.subscription) <= self.page_size + self.max_messages

    def it_reads_what_it_was_told_to(self) -> None:
        assert self.subscription.channels == set(self.readers)

    def idle_means_nothing_is_missing(self) -> None:
        """A stream that waits is woken only by the hub, so all up to its cursor must be there."""
        if self.under_way or self.subscription.next_read() or len(self.subscription):
            return
        if self.readers:
            assert self.subscription.state is State.LIVE
        self._check_complete(self.hub_cursor)

    def teardown(self) -> None:
        if not hasattr(self, "subscription"):
            return
        self.hub_reads_on(self.head)
        if self.under_way is not None:
            self.page_arrives()
        for _ in range(20 + 3 * self.head * len(CHANNELS)):
            self.take()
            read = self.subscription.next_read()
            if read is None:
                break
            self.under_way = read, self._read(read, 0)
            self.page_arrives()
        else:
            raise AssertionError("it does not become live, although nothing new comes")
        self._check_complete(self.head)

    # How the model does it

    def _offer(self, message: Message) -> None:
        held, read = len(self.subscription), self.subscription.next_read()
        something_to_do = self.subscription.offer(message)
        if something_to_do:
            self.readers[message.channel].taken_in.add(message.id)
            assert len(self.subscription) or self.subscription.next_read()
        else:
            # Nobody is woken for it, so nothing may wait that did not wait before.
            assert (len(self.subscription), self.subscription.next_read()) == (held, read)

    def _add(self, several: list[str], after: int | None) -> None:
        was_empty = not self.readers
        for channel in several:
            self.readers.pop(channel, None)
        fresh = was_empty or not self.readers
        start = self.hub_cursor if after is None else after
        for channel in several:
            self.subscription.add(channel, after, self.hub_cursor)
            self.readers[channel] = Reader(start, start)
        # Those that begin together are in one order from the first message on.
        self.merged_last = start if fresh and was_empty else None

    def _position(self, where: int) -> int:
        # Up to the head: another node's hub may be further than this one's. Where things meet is
        # where they go wrong, so those ids are likely.
        meeting = {-1, self.floor, self.hub_cursor, self.head}
        meeting.update(reader.last for reader in self.readers.values())
        if self.under_way is not None:
            meeting.add(self.under_way[0].after)
        near = sorted(meeting)
        return near[where % len(near)] if where < 30 else where % (self.head + 2) - 1

    def _read(self, read: Read, age: int) -> LogPage:
        possible = [bounds for bounds in self.bounds if bounds[0] >= read.after]
        head, floor = possible[max(0, len(possible) - 1 - age)]
        messages = [
            m
            for m in self.log[:head]
            if m.id > max(read.after, floor) and m.channel in read.channels
        ]
        if len(messages) < self.page_size:
            return LogPage(messages, head, floor)
        messages = messages[: self.page_size]
        return LogPage(messages, messages[-1].id, floor)

    def _deliver(self, message: Message) -> None:
        reader = self.readers.get(message.channel)
        assert reader is not None, f"{message} of a channel that is not read"
        assert message.id > reader.last, f"{message} again, out of order, or from before its start"
        self._check_gap(message.channel, reader, message.id - 1)
        reader.last = message.id

    def _check_complete(self, upto: int) -> None:
        for channel, reader in self.readers.items():
            self._check_gap(channel, reader, upto)

    def _check_gap(self, channel: str, reader: Reader, upto: int) -> None:
        missing = [m.id for m in self.log[max(reader.last, 0) : upto] if m.channel == channel]
        if self.policy != "replay":
            missing = [id for id in missing if id not in reader.taken_in]
        assert all(id <= self.floor for id in missing), f"{channel} lacks {missing}"
        if missing and reader.last >= 0:
            assert reader.told or self.subscription.truncated, f"{missing} gone without a word"

    def _check_order(self, ids: list[int]) -> None:
        if self.merged_last is not None:
            for earlier, later in pairwise([self.merged_last, *ids]):
                assert earlier < later, f"out of order: {later} after {earlier}"
            self.merged_last = ids[-1] if ids else self.merged_last
        elif not self.subscription._joining and self.under_way is None:
            # All have been merged, and from here on are in one order.
            self.merged_last = -1


class DropOldestMachine(SubscriptionMachine):
    policy = "drop_oldest"


class LatestByKeyMachine(SubscriptionMachine):
    policy = "latest_by_key"

    @staticmethod
    def key(message: Message) -> int | None:
        return message.size % 3 or None


def test_a_page_from_before_it_began_anew_means_nothing() -> None:
    """All channels are left, and others are joined together, with a page still on its way."""
    for first, second in (("a", "d"), ("d", "a")):  # whichever of them a set gives first
        machine = SubscriptionMachine()
        machine.begin(max_messages=1, max_bytes=5, page_size=1)
        machine.publish([(first, 2)])
        machine.add_together(["b", "c"], 2, 0)
        machine.ask_for_a_page(0)
        machine.discard_all()
        machine.publish([(second, 2)])
        machine.add_together(["a", "d"], 2, 0)
        machine.check()
        machine.teardown()


@pytest.mark.parametrize(
    ("machine", "examples"),
    [(SubscriptionMachine, 400), (DropOldestMachine, 100), (LatestByKeyMachine, 100)],
)
def test_each_message_once_in_order_and_nothing_lost(
    machine: type[SubscriptionMachine], examples: int
) -> None:
    """By a policy that drops, nothing that is read from the log."""
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=60,
            deadline=None,
            phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
            report_multiple_bugs=False,
        ),
    )


@pytest.mark.parametrize(
    ("kind", "seed", "times"),
    [
        *((SubscriptionMachine, seed, 4000) for seed in range(4)),
        (DropOldestMachine, 4, 1500),
        (LatestByKeyMachine, 5, 1500),
    ],
)
def test_the_same_in_many_more_ways(kind: type[SubscriptionMachine], seed: int, times: int) -> None:
    """Hypothesis finds the short counterexamples; this tries a hundred times as many long ones."""
    draw = random.Random(seed)
    names = [name for name in RULES for _ in range(LIKELY.get(name, 1))]
    for _ in range(times):
        machine = kind()
        steps = [f"begin{(begin := (draw.randint(1, 4), draw.randint(5, 40), draw.randint(1, 4)))}"]
        machine.begin(*begin)
        try:
            for _ in range(60):
                name = draw.choice(names)
                arguments = RULES[name](draw)
                if name in NEEDS_PAGE and machine.under_way is None:
                    continue
                if name == "ask_for_a_page" and machine.under_way is not None:
                    continue
                if name == "acknowledge_truncation" and not machine.subscription.truncated:
                    continue
                steps.append(f"{name}({arguments})")
                getattr(machine, name)(**arguments)
                machine.check()
            machine.teardown()
        except Exception as error:
            error.add_note("\n".join(steps))
            raise
