"""The layers against each other: whatever happens to nodes, both tell their users the same.

Each rule does one thing to both, waits until it has had its effects, and compares everything that
can be seen. What the contract leaves open is not compared: which of several receivers gets a
message, in which order channels come that a stream has yet to merge.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from random import Random
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pgchannels.channels import EVERYONE, presence_channel
from pgchannels.errors import PGChannelsError
from tests.support.eventually import eventually
from tests.support.layer_world import (
    GROUPS,
    KEEPER,
    NODES,
    ORDINARY,
    SECONDS,
    TTLS,
    USERS,
    MemoryWorld,
    Outcome,
    PostgresWorld,
    Reader,
    World,
)

pytestmark = pytest.mark.slow

EXAMPLES = int(os.environ.get("PGCHANNELS_TEST_EXAMPLES", "40"))
SEED = os.environ.get("PGCHANNELS_TEST_SEED", "1")
STEPS = 40
# Looking for the shortest way to a failure takes minutes; so only whoever asks gets it.
SHRINK = "PGCHANNELS_TEST_SHRINK" in os.environ

# How long a layer may take for what another one has done; less, once that has been found too long.
PATIENCE = 10.0
IMPATIENCE = 0.5

ERRORS = (PGChannelsError, TimeoutError, ValueError)

nodes = st.integers(0, NODES - 1)
plain = st.sampled_from((*ORDINARY, *GROUPS))
groups = st.sampled_from(GROUPS)
users = st.sampled_from(USERS)
some = st.integers(0, 9)
# Connections are numbered; see _channel().
connections = some
channels = plain | connections
metadata = st.none() | st.fixed_dictionaries({"colour": st.sampled_from(["red", "blue"])})
presences = st.sampled_from([None, "user", "connection"])
# None is from now on, "0" the beginning; the last two have never been.
positions = st.one_of(
    st.none(),
    st.just("0"),
    st.tuples(st.just("message"), some),
    st.tuples(st.just("marker"), some),
    st.sampled_from(["9-1", "1-999999999999"]),
)
known_positions = st.one_of(
    st.just("0"), st.tuples(st.just("message"), some), st.tuples(st.just("marker"), some)
)
options = st.fixed_dictionaries(
    {},
    optional={
        "ttl": st.sampled_from(TTLS),
        "key": st.sampled_from(["k", "l"]),
        "headers": st.just({"trace": "1"}),
        "bytes": st.binary(max_size=3),
    },
)

Act = Callable[[World], Awaitable[Outcome]]
T = TypeVar("T")


class LayersMachine(RuleBasedStateMachine):
    """Two worlds; *patience* is shared by all runs."""

    runs = 0
    patience = PATIENCE

    def __init__(self, runner: asyncio.Runner, postgres: PostgresWorld) -> None:
        super().__init__()
        self._runner = runner
        self._postgres = postgres
        self._memory = MemoryWorld()
        self._failed = False
        self._sent = 0
        self._readers = 0
        self._owners: dict[int, int] = {}
        # On which nodes one waits or another, since nobody has.
        self._waiting_on: dict[str | int, set[int]] = {}

    @initialize(owners=st.tuples(*[st.none() | users] * NODES))
    def begin(self, owners: tuple[str | None, ...]) -> None:
        LayersMachine.runs += 1
        for world in self._worlds:
            self._run(world.begin(f"x{LayersMachine.runs}."))
        self._do(_nothing)
        for node, user in enumerate(owners):
            self.new_channel(node, user, None)

    def teardown(self) -> None:
        if self._memory.layers:
            if not self._failed:
                self._do(_nothing)
            for world in self._worlds:
                self._run(world.leave_all())
                self._run(world.end())
        super().teardown()

    # Sending

    @rule(node=nodes, channel=channels, with_=options)
    def send(self, node: int, channel: str | int, with_: dict[str, Any]) -> None:
        self._send(node, channel, self._channel(channel), with_)

    @rule(node=nodes, group=plain, exclude=st.none() | channels, with_=options)
    def group_send(
        self, node: int, group: str, exclude: str | int | None, with_: dict[str, Any]
    ) -> None:
        payload, extra = self._payload(with_)
        out = None if exclude is None else self._channel(exclude)

        async def act(world: World) -> Outcome:
            name = None if out is None else world.name(out)
            layer = world.layers[node]
            receipt = await layer.group_send(world.name(group), payload, exclude=name, **extra)
            return world.checked(receipt, group, extra)

        self._do(act)

    @rule(node=nodes, to=st.lists(channels, min_size=0, max_size=3), with_=options)
    def send_to(self, node: int, to: list[str | int], with_: dict[str, Any]) -> None:
        payload, extra = self._payload(with_)
        recipients = [self._channel(channel) for channel in to]

        async def act(world: World) -> Outcome:
            names = [world.name(channel) for channel in recipients]
            receipt = await world.layers[node].send_to(names, payload, **_unkeyed(extra))
            return receipt.repeated

        self._do(act)

    @rule(node=nodes, user=users, with_=options)
    def send_to_user(self, node: int, user: str, with_: dict[str, Any]) -> None:
        payload, extra = self._payload(with_)

        async def act(world: World) -> Outcome:
            layer = world.layers[node]
            receipt = await layer.send_to_user(world.user(user) or "", payload, **extra)
            return world.checked(receipt, f"user {user}", extra)

        self._do(act)

    @rule(node=nodes, with_=options)
    def broadcast(self, node: int, with_: dict[str, Any]) -> None:
        payload, extra = self._payload(with_)

        async def act(world: World) -> Outcome:
            return (await world.layers[node].broadcast(payload, **_unkeyed(extra))).repeated

        self._do(act)

    @rule(node=nodes, to=st.lists(channels, min_size=2, max_size=8))
    def send_in_a_burst(self, node: int, to: list[str | int]) -> None:
        recipients = [self._channel(channel) for channel in to]
        payloads = [self._payload({})[0] for _ in recipients]

        async def act(world: World) -> Outcome:
            for channel, payload in zip(recipients, payloads, strict=True):
                await world.layers[node].send(world.name(channel), payload)

        self._do(act)

    # Receiving

    @rule(node=nodes, channel=channels)
    def receive_what_is_there(self, node: int, channel: str | int) -> None:
        source = self._channel(channel)

        async def act(world: World) -> Outcome:
            return world.describe(await world.layers[node].receive(world.name(source), timeout=0))

        self._do(act)

    @rule(node=nodes, channel=channels)
    def wait_to_receive(self, node: int, channel: str | int) -> None:
        source = self._channel(channel)
        self._waiting_on.setdefault(source, set()).add(node)

        async def act(world: World) -> Outcome:
            world.start_receiving(node, source)

        self._do(act)

    @precondition(lambda self: self._waiting_on)
    @rule(which=some)
    def cancel_a_receiver(self, which: int) -> None:
        source = _one_of(list(self._waiting_on), which)

        async def act(world: World) -> Outcome:
            return await world.cancel_receiver(source)

        self._do(act)

    @rule(
        channel=channels,
        receiving=st.lists(nodes, min_size=1, max_size=4),
        count=st.integers(1, 5),
        milliseconds=st.integers(0, 8),
    )
    def cancel_receivers_while_messages_come(
        self, channel: str | int, receiving: list[int], count: int, milliseconds: int
    ) -> None:
        """None is lost, none comes twice: those who were cancelled had it, or the next one has."""
        source = self._channel(channel)
        if isinstance(source, int) and source not in self._owners:
            source = ORDINARY[0]  # that of a connection which is gone has no certain beginning
        payloads = [self._payload({})[0] for _ in range(count)]
        expected: int | None = None
        self._waiting_on.pop(source, None)

        async def act(world: World) -> Outcome:
            nonlocal expected
            name = world.name(source)
            await world.cancel_receivers(lambda waited_for, _: waited_for == name)
            tasks = [
                asyncio.create_task(world.layers[node].receive(name))
                for node in receiving
                if node in world.open_nodes
            ]
            for payload in payloads:
                await world.layers[KEEPER].send(name, payload)
            await asyncio.sleep(milliseconds / 1000)
            for task in tasks:
                task.cancel()
            got = [
                world.describe(result)
                for result in await asyncio.gather(*tasks, return_exceptions=True)
                if not isinstance(result, BaseException)
            ]

            async def all_taken() -> Any:
                try:
                    while True:
                        message = await world.layers[KEEPER].receive(name, timeout=0)
                        got.append(world.describe(message))
                except TimeoutError:
                    return expected is None or len(got) >= expected

            with suppress(AssertionError):  # what is missing shows when it is compared
                await eventually(all_taken, timeout=self.patience)
            expected = len(got)
            return sorted(got, key=repr)

        self._do(act)

    # Channels and groups

    @rule(node=nodes, user=st.none() | users, metadata=metadata)
    def new_channel(self, node: int, user: str | None, metadata: dict[str, str] | None) -> None:
        async def act(world: World) -> Outcome:
            layer = world.layers[node]
            name = await layer.new_channel("ws", user_id=world.user(user), metadata=metadata)
            world.connections.append(name)

        self._do(act)
        if node in self._memory.open_nodes:
            self._owners[len(self._memory.connections) - 1] = node

    @precondition(lambda self: self._memory.connections)
    @rule(node=st.none() | nodes, channel=connections, user=st.none() | users, metadata=metadata)
    def update_channel(
        self, node: int | None, channel: int, user: str | None, metadata: dict[str, str] | None
    ) -> None:
        changed = self._channel(channel)
        by = self._owner(changed) if node is None else node

        async def act(world: World) -> Outcome:
            await world.layers[by].update_channel(
                world.name(changed), user_id=world.user(user), metadata=metadata
            )

        self._do(act, ordered=False)

    @precondition(lambda self: self._memory.connections)
    @rule(node=st.none() | nodes, channel=connections)
    def delete_channel(self, node: int | None, channel: int) -> None:
        doomed = self._channel(channel)
        by = self._owner(doomed) if node is None else node

        async def act(world: World) -> Outcome:
            await world.layers[by].delete_channel(world.name(doomed))

        if isinstance(doomed, int) and self._owners.get(doomed) == by:
            del self._owners[doomed]
        self._do(act, ordered=False)

    @rule(node=nodes, group=groups, channel=channels, presence=presences)
    def group_add(self, node: int, group: str, channel: str | int, presence: Any) -> None:
        member = self._channel(channel)

        async def act(world: World) -> Outcome:
            layer = world.layers[node]
            await layer.group_add(world.name(group), world.name(member), presence=presence)

        self._do(act, ordered=False)

    @rule(node=nodes, group=groups, channel=channels)
    def group_discard(self, node: int, group: str, channel: str | int) -> None:
        member = self._channel(channel)

        async def act(world: World) -> Outcome:
            await world.layers[node].group_discard(world.name(group), world.name(member))

        self._do(act, ordered=False)

    # Reading

    @rule(
        node=nodes,
        read=st.lists(plain, max_size=3),
        presence_of=st.none() | groups,
        after=positions,
        slow=st.booleans(),
    )
    def subscribe(
        self, node: int, read: list[str], presence_of: str | None, after: Any, slow: bool
    ) -> None:
        symbols = [*read, *([] if presence_of is None else [f"presence {presence_of}"])]
        self._subscribe(node, tuple(symbols), after, None, slow)

    @precondition(lambda self: self._memory.connections)
    @rule(
        node=st.none() | nodes,
        member=connections,
        read=st.lists(plain, max_size=2),
        after=positions,
        slow=st.booleans(),
    )
    def subscribe_as_a_member(
        self, node: int | None, member: int, read: list[str], after: Any, slow: bool
    ) -> None:
        channel = self._channel(member)
        at = self._owner(channel) if node is None else node
        self._subscribe(at, tuple(read), after, channel, slow)

    @precondition(lambda self: self._memory.readers)
    @rule(which=some, channel=channels, after=positions)
    def join(self, which: int, channel: str | int, after: Any) -> None:
        number, joined, where = self._reader(which), self._channel(channel), self._position(after)

        async def act(world: World) -> Outcome:
            stream = world.readers[number].stream
            await stream.join(world.name(joined), world.position(where))

        self._do(act, ordered=False)

    @precondition(lambda self: self._memory.readers)
    @rule(which=some, channel=channels)
    def leave(self, which: int, channel: str | int) -> None:
        number, left = self._reader(which), self._channel(channel)

        async def act(world: World) -> Outcome:
            world.readers[number].stream.leave(world.name(left))

        self._do(act)

    @precondition(lambda self: self._memory.readers)
    @rule(which=some, after=known_positions)
    def resume_as_a_member(self, which: int, after: Any) -> None:
        number, where = self._reader(which), self._position(after)

        async def act(world: World) -> Outcome:
            reader = world.readers[number]
            if reader.member is not None:
                await reader.stream.resume(world.position(where) or "0")

        self._do(act, ordered=False)

    @precondition(lambda self: self._memory.readers)
    @rule(which=some)
    def read_what_has_gathered(self, which: int) -> None:
        number = self._reader(which)
        if not self._memory.readers[number].slow:
            return

        async def act(world: World) -> Outcome:
            world.readers[number].start()

        self._do(act, ordered=False)
        for world in self._worlds:
            if not world.readers[number].ended:
                self._run(world.readers[number].pause())

    @precondition(lambda self: self._memory.readers)
    @rule(which=some)
    def acknowledge_truncation(self, which: int) -> None:
        number = self._reader(which)

        async def act(world: World) -> Outcome:
            world.readers[number].stream.truncated = False

        self._do(act)

    @precondition(lambda self: self._memory.readers)
    @rule(which=some, node=nodes)
    def resume_elsewhere(self, which: int, node: int) -> None:
        """A client goes to another node, and on from the last message that it has had."""
        number = self._reader(which)
        old = {world: world.readers.pop(number) for world in self._worlds}
        for reader in old.values():
            self._run(reader.close())
        reader = old[self._memory]
        if reader.last is not None:
            assert old[self._postgres].last is not None
            self._subscribe(node, reader.symbols, lambda world: old[world].last, None, reader.slow)

    @rule(
        node=nodes,
        channel=plain | connections | st.just(EVERYONE),
        after=positions,
        before=positions,
        order=st.sampled_from(["asc", "desc"]),
        limit=st.integers(1, 6),
    )
    def history(
        self, node: int, channel: str | int, after: Any, before: Any, order: Any, limit: int
    ) -> None:
        read, low, high = self._channel(channel), self._position(after), self._position(before)

        async def act(world: World) -> Outcome:
            page = await world.layers[node].history(
                world.name(read),
                after=world.position(low),
                before=world.position(high),
                order=order,
                limit=limit,
            )
            ids = [message.id for message in page.messages]
            assert ids == sorted(set(ids), reverse=order == "desc")
            assert page.next in (None, *(message.position for message in page.messages[-1:]))
            return [world.describe(m) for m in page.messages], page.next is None, page.truncated

        self._do(act)

    @rule(node=nodes, channel=channels, order=st.sampled_from(["asc", "desc"]), limit=some)
    def page_through(self, node: int, channel: str | int, order: Any, limit: int) -> None:
        read = self._channel(channel)
        onwards = "after" if order == "asc" else "before"

        async def act(world: World) -> Outcome:
            pages: list[list[Any]] = []
            where: dict[str, Any] = {}
            while True:
                page = await world.layers[node].history(
                    world.name(read), order=order, limit=limit, **where
                )
                pages.append([world.describe(message) for message in page.messages])
                if page.next is None:
                    return pages
                where = {onwards: page.next}

        self._do(act)

    # Life and death

    @rule(seconds=st.sampled_from(SECONDS))
    def time_passes(self, seconds: int) -> None:
        async def act(world: World) -> Outcome:
            await world.advance(seconds)

        self._do(act, ordered=False)

    @rule(node=nodes.filter(lambda node: node != KEEPER))
    def kill_a_node(self, node: int) -> None:
        self._end_competition(node)

        async def act(world: World) -> Outcome:
            if node in world.open_nodes:
                await world.kill(node)

        self._disown(node)
        self._do(act, ordered=False)

    @rule(node=nodes.filter(lambda node: node != KEEPER))
    def close_a_node(self, node: int) -> None:
        self._end_competition(node)

        async def act(world: World) -> Outcome:
            await world.close(node)

        self._disown(node)
        self._do(act, ordered=False)

    @rule(node=nodes)
    def open_a_node(self, node: int) -> None:
        async def act(world: World) -> Outcome:
            await world.open(node)

        self._do(act)

    # What they have in common

    @property
    def _worlds(self) -> tuple[World, World]:
        return self._memory, self._postgres

    def _run(self, what: Any) -> Any:
        return self._runner.run(what)

    def _do(self, act: Act, *, ordered: bool = True) -> None:
        try:
            self._run(self._do_to_both(act, ordered))
        except BaseException:
            self._failed = True
            LayersMachine.patience = IMPATIENCE
            raise
        self._waiting_on = {
            source: nodes
            for source, nodes in self._waiting_on.items()
            if any(self._memory.waiting.get(self._memory.name(source), ()))
        }

    async def _do_to_both(self, act: Act, ordered: bool) -> None:
        in_memory, in_postgres = [await _outcome(act, world) for world in self._worlds]
        _compare("what was returned or raised", in_memory, in_postgres)
        for world in self._worlds:
            await world.settle()
        expected = self._memory.view(ordered=ordered)
        view: Any = None

        def alike() -> bool:
            nonlocal view
            view = self._postgres.view(ordered=ordered)
            return bool(view == expected)

        try:
            # What another node has done to a membership, and a receiver then gets, comes soon.
            await eventually(alike, timeout=self.patience)
        except AssertionError:
            _compare("what was received and read", expected, view)
        for group in GROUPS:
            here, there = [await world.membership(KEEPER, group) for world in self._worlds]
            _compare(f"who is in group {group}", here, there)
        assert sorted(self._memory.seen) == sorted(self._postgres.seen)
        for world in self._worlds:
            world.forget()

    def _send(self, node: int, _: Any, channel: str | int, with_: dict[str, Any]) -> None:
        payload, extra = self._payload(with_)

        async def act(world: World) -> Outcome:
            receipt = await world.layers[node].send(world.name(channel), payload, **extra)
            return world.checked(receipt, str(channel), extra)

        self._do(act)

    def _subscribe(
        self, node: int, symbols: Sequence[str], after: Any, member: str | int | None, slow: bool
    ) -> None:
        self._readers += 1
        number = self._readers
        where = after if callable(after) else self._position(after)

        async def act(world: World) -> Outcome:
            start = where(world) if callable(where) else world.position(where)
            name = None if member is None else world.name(member)
            names = [_read_name(world, symbol) for symbol in symbols]
            stream = world.layers[node].subscribe(*names, after=start, member=name)
            await stream.__aenter__()
            reader = Reader(world, stream, node, tuple(symbols), name, slow)
            world.readers[number] = reader
            if not slow:
                reader.start()

        self._do(act, ordered=member is None)

    def _payload(self, with_: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        self._sent += 1
        extra = dict(with_)
        payload: dict[str, Any] = {"n": self._sent}
        if "bytes" in extra:
            payload["nested"] = {"bytes": [extra.pop("bytes")]}
        return payload, extra

    def _channel(self, channel: str | int) -> str | int:
        if isinstance(channel, int):
            count = len(self._memory.connections)
            return channel % count if count else ORDINARY[0]
        return channel

    def _owner(self, channel: str | int) -> int:
        return self._owners.get(channel, KEEPER) if isinstance(channel, int) else KEEPER

    def _position(self, where: Any) -> Any:
        if not isinstance(where, tuple):
            return where
        kind, which = where
        if kind == "marker":
            return kind, len(self._memory.markers) - 1 - which % len(self._memory.markers)
        return (kind, _one_of(sorted(self._memory.seen)[::-1], which)) if self._memory.seen else "0"

    def _reader(self, which: int) -> int:
        return _one_of(list(self._memory.readers), which)

    def _disown(self, node: int) -> None:
        self._owners = {c: owner for c, owner in self._owners.items() if owner != node}

    def _end_competition(self, node: int) -> None:
        """Who still waits on this node, of those on several, is the layer's choice."""
        competing = {s for s, nodes in self._waiting_on.items() if node in nodes and len(nodes) > 1}
        # Ordinary names are the same in both worlds; a connection's is in one of them.
        names = {world.name(source) for world in self._worlds for source in competing}
        for world in self._worlds:
            self._run(world.cancel_receivers(lambda name, _: name in names))


async def _nothing(_: World) -> Outcome:
    return None


async def _outcome(act: Act, world: World) -> Outcome:
    try:
        return await act(world)
    except ERRORS as error:
        return type(error).__name__


def _compare(what: str, in_memory: Outcome, in_postgres: Outcome) -> None:
    assert in_memory == in_postgres, (
        f"{what}:\n in memory:     {in_memory}\n in PostgreSQL: {in_postgres}"
    )


def _one_of(items: Sequence[T], which: int) -> T:
    return items[which % len(items)]


def _unkeyed(extra: dict[str, Any]) -> dict[str, Any]:
    """Keys live on by channel; these are the same ones in each run."""
    return {name: value for name, value in extra.items() if name != "key"}


def _read_name(world: World, symbol: str) -> str:
    kind, _, group = symbol.rpartition(" ")
    return presence_channel(world.name(group)) if kind else world.name(symbol)


def _channel(r: Random) -> str | int:
    return r.choice((*ORDINARY, *GROUPS)) if r.random() < 0.5 else r.randrange(6)


def _where(r: Random) -> Any:
    return r.choice([None, "0", ("message", r.randrange(10)), ("marker", r.randrange(10))])


def _options(r: Random) -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    if r.random() < 0.2:
        chosen["ttl"] = r.choice(TTLS)
    if r.random() < 0.4:
        chosen["key"] = "k"
    if r.random() < 0.2:
        chosen["bytes"] = b"\0\xff"
    return chosen


def _node(r: Random) -> int:
    return r.randrange(NODES)


def _mortal(r: Random) -> int:
    return r.choice([node for node in range(NODES) if node != KEEPER])


def _metadata(r: Random) -> dict[str, str] | None:
    return r.choice([None, {"colour": "red"}, {"colour": "blue"}])


def _user(r: Random) -> str | None:
    return r.choice([None, *USERS])


def _some(r: Random) -> int:
    return r.randrange(10)


RULES: dict[str, Callable[[Random], dict[str, Any]]] = {
    "send": lambda r: {"node": _node(r), "channel": _channel(r), "with_": _options(r)},
    "group_send": lambda r: {
        "node": _node(r),
        "group": r.choice((*GROUPS, *GROUPS, *ORDINARY)),
        "exclude": r.choice([None, _channel(r)]),
        "with_": _options(r),
    },
    "send_to": lambda r: {
        "node": _node(r),
        "to": [_channel(r) for _ in range(r.randint(0, 3))],
        "with_": _options(r),
    },
    "send_to_user": lambda r: {"node": _node(r), "user": r.choice(USERS), "with_": _options(r)},
    "broadcast": lambda r: {"node": _node(r), "with_": _options(r)},
    "send_in_a_burst": lambda r: {
        "node": _node(r),
        "to": [_channel(r) for _ in range(r.randint(2, 8))],
    },
    "receive_what_is_there": lambda r: {"node": _node(r), "channel": _channel(r)},
    "wait_to_receive": lambda r: {"node": _node(r), "channel": _channel(r)},
    "cancel_a_receiver": lambda r: {"which": _some(r)},
    "cancel_receivers_while_messages_come": lambda r: {
        "channel": _channel(r),
        "receiving": [_node(r) for _ in range(r.randint(1, 4))],
        "count": r.randint(1, 5),
        "milliseconds": r.randint(0, 8),
    },
    "new_channel": lambda r: {"node": _node(r), "user": _user(r), "metadata": _metadata(r)},
    "update_channel": lambda r: {
        "node": None if r.random() < 0.8 else _node(r),
        "channel": _some(r),
        "user": _user(r),
        "metadata": _metadata(r),
    },
    "delete_channel": lambda r: {
        "node": None if r.random() < 0.8 else _node(r),
        "channel": _some(r),
    },
    "group_add": lambda r: {
        "node": _node(r),
        "group": r.choice(GROUPS),
        "channel": _channel(r),
        "presence": r.choice([None, "user", "user", "connection"]),
    },
    "group_discard": lambda r: {
        "node": _node(r),
        "group": r.choice(GROUPS),
        "channel": _channel(r),
    },
    "subscribe": lambda r: {
        "node": _node(r),
        "read": r.sample((*ORDINARY, *GROUPS), r.randint(0, 3)),
        "presence_of": r.choice([None, *GROUPS]),
        "after": _where(r),
        "slow": r.random() < 0.3,
    },
    "subscribe_as_a_member": lambda r: {
        "node": None if r.random() < 0.9 else _node(r),
        "member": _some(r),
        "read": r.sample(ORDINARY, r.randint(0, 2)),
        "after": _where(r),
        "slow": r.random() < 0.3,
    },
    "join": lambda r: {"which": _some(r), "channel": _channel(r), "after": _where(r)},
    "leave": lambda r: {"which": _some(r), "channel": _channel(r)},
    "resume_as_a_member": lambda r: {"which": _some(r), "after": _where(r) or "0"},
    "read_what_has_gathered": lambda r: {"which": _some(r)},
    "acknowledge_truncation": lambda r: {"which": _some(r)},
    "resume_elsewhere": lambda r: {"which": _some(r), "node": _node(r)},
    "history": lambda r: {
        "node": _node(r),
        "channel": r.choice([_channel(r), EVERYONE]),
        "after": _where(r),
        "before": _where(r),
        "order": r.choice(["asc", "desc"]),
        "limit": r.randint(1, 6),
    },
    "page_through": lambda r: {
        "node": _node(r),
        "channel": _channel(r),
        "order": r.choice(["asc", "desc"]),
        "limit": r.randint(1, 4),
    },
    "time_passes": lambda r: {"seconds": r.choice(SECONDS)},
    "kill_a_node": lambda r: {"node": _mortal(r)},
    "close_a_node": lambda r: {"node": _mortal(r)},
    "open_a_node": lambda r: {"node": _node(r)},
}
"""Each rule, and how to draw its arguments without Hypothesis."""

LIKELY = {
    "send": 3,
    "group_send": 4,
    "send_in_a_burst": 3,
    "group_add": 6,
    "group_discard": 3,
    "wait_to_receive": 3,
    "receive_what_is_there": 3,
    "update_channel": 2,
    "subscribe": 2,
    "subscribe_as_a_member": 3,
    "leave": 2,
    "read_what_has_gathered": 3,
    "time_passes": 2,
    "open_a_node": 3,
}
NEEDS_READERS = {
    "join",
    "leave",
    "resume_as_a_member",
    "read_what_has_gathered",
    "acknowledge_truncation",
    "resume_elsewhere",
}


def _run_at_random(machine: LayersMachine, seed: object, steps: int) -> None:
    draw = Random(f"layers {seed}")
    names = [name for name in RULES for _ in range(LIKELY.get(name, 1))]
    taken: list[str] = []
    try:
        machine.begin(tuple(_user(draw) for _ in range(NODES)))
        for _ in range(steps):
            name = draw.choice(names)
            arguments = RULES[name](draw)
            if name in NEEDS_READERS and not machine._memory.readers:
                continue
            if name == "cancel_a_receiver" and not machine._waiting_on:
                continue
            taken.append(f"{name}({arguments})")
            getattr(machine, name)(**arguments)
    except BaseException as error:
        error.add_note("\n".join((f"seed {seed!r}", *taken)))
        raise
    finally:
        machine.teardown()


@pytest.fixture
def make_machine(database_url: str) -> Iterator[Callable[[], LayersMachine]]:
    with asyncio.Runner() as runner:
        postgres = PostgresWorld(database_url)
        runner.run(postgres.connect())
        try:
            yield lambda: LayersMachine(runner, postgres)
        finally:
            runner.run(postgres.disconnect())


@pytest.mark.timeout(60 + 10 * EXAMPLES + 600 * SHRINK)
def test_both_layers_tell_their_users_the_same(make_machine: Callable[[], LayersMachine]) -> None:
    run_state_machine_as_test(
        make_machine,  # type: ignore[arg-type]  # a factory is as good
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            phases=[Phase.generate, *([Phase.shrink] if SHRINK else [])],
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
        ),
    )


@pytest.mark.timeout(60 + 10 * EXAMPLES)
def test_the_same_in_more_crowded_worlds(make_machine: Callable[[], LayersMachine]) -> None:
    """Hypothesis tries what is short and odd; this goes on for longer, with more at once."""
    for number in range(EXAMPLES):
        _run_at_random(make_machine(), f"{SEED} {number}", 2 * STEPS)
