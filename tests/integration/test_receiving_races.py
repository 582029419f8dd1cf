"""What meets what in claims, leases, memberships and keys: each race held open by a lock.

A lock that a test holds stops the one just where the other comes in between; `blocked()` says that
it has got there.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import timedelta
from typing import Any, TypeAlias
from uuid import UUID, uuid4

import asyncpg
import pytest

from pgchannels import Limits, PostgresLayer, Settings, receivers
from pgchannels.channels import new_name, presence_channel, user_channel
from pgchannels.connections import connect
from pgchannels.records import PresenceBy
from pgchannels.sql import load_queries
from pgchannels.stream import Stream
from tests.support.eventually import eventually
from tests.support.tcp_proxy import TcpProxy

QUERIES = load_queries("pgchannels")
NOW = timedelta(0)
DAY = timedelta(days=1)
# Ids are below this, as far as the partitions go.
FAR = 10**6
LEASE = 1.5
# The longest time between two signs of life that one may ask for.
SETTINGS: dict[str, Any] = {"lease_time": LEASE, "heartbeat_interval": LEASE / 2}
NAMES = [f"jobs:{n:02}" for n in range(40)]
HOSTILE_HEADERS = [
    r'{"x": "a\u0000b"}',
    r'{"\ud800": "x"}',
    r'{"pgchannels-only": "[\"\\u0000\"]"}',
    r'{"pgchannels-only": "[\"\\ud800\"]"}',
    '{"pgchannels-only": "no JSON"}',
    '{"pgchannels-only": {"a": [null]}}',
    '{"pgchannels-except": ["jobs"]}',
    '{"a": ' + "[" * 5000 + "]" * 5000 + "}",
    '{"a": ' + "[" * 16_330 + "]" * 16_330 + "}",
    '{"pgchannels-only": "[1e999999]"}',
    json.dumps({"pgchannels-only": "[" * 20_000}),
    "[]",
    '"text"',
]


class Session:
    """A connection as a node has them, for its statements by name."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self.connection = connection
        self.transaction = connection.transaction()
        self.execute = connection.execute
        self.value = connection.fetchval

    async def run(self, query: str, *arguments: Any) -> list[Any]:
        rows: list[Any] = await self.connection.fetch(QUERIES[query], *arguments)
        return rows

    async def publish(self, channel: str, *numbers: int) -> None:
        for n in numbers:
            await self.execute("select pgchannels.publish($1, $2)", channel, f'{{"n":{n}}}')
        await self.run("seal", 1000, 2**30, "pgchannels")

    async def claim(self, node: UUID, token: int, names: list[str], wanted: int) -> list[int]:
        counts = [wanted] * len(names)
        rows = await self.run("claim", names, counts, counts, node, token, FAR, 2**20)
        return sorted(id for row in rows if row["name"] is not None for id in row["ids"])

    async def change(self, group: str, names: list[str], *, adding: bool) -> None:
        count = len(names)
        await self.run(
            "change_memberships",
            *([group] * count, names, [adding] * count, [None] * count, NOW, uuid4()),
        )


Sessions: TypeAlias = tuple[Session, Session, Session]


@pytest.fixture
async def sessions(database_url: str) -> AsyncIterator[Sessions]:
    """Three connections: one to hold something up, one that is held up, and one that looks on."""
    connections = [await connect(database_url, role=f"test {n}", timeout=10) for n in range(3)]
    try:
        one, other, watcher = map(Session, connections)
        yield one, other, watcher
    finally:
        for connection in connections:
            connection.terminate()


def blocked(watcher: Session, count: int = 1) -> Callable[[], Awaitable[Any]]:
    """Whether so many of this database's sessions wait for locks, besides a pruner that begins."""
    return lambda: watcher.value(
        "select count(*) = $1 from pg_stat_activity"
        " where datname = current_database() and wait_event_type = 'Lock'"
        " and application_name <> 'pgchannels pruner'",
        count,
    )


@asynccontextmanager
async def held(session: Session, lock: str) -> AsyncIterator[None]:
    """Hold what the statement *lock* locks."""
    await session.transaction.start()
    await session.execute(lock)
    try:
        yield
    finally:
        await session.transaction.rollback()


async def claimant(session: Session, *channels: str) -> UUID:
    """A process that claims, and channels that somebody receives from."""
    node = uuid4()
    await session.run("add_claimant", node)
    await session.run("add_receiver", channels)
    return node


async def claim(session: Session, node: UUID, names: list[str]) -> None:
    await session.claim(node, 1, names, 1)


async def hand_back(session: Session, node: UUID, names: list[str]) -> None:
    await session.run("hand_back", names, list(range(len(names))), node, 1)


async def touch(session: Session, node: UUID, names: list[str]) -> None:
    await session.run("touch_channels", names)


async def add(session: Session, node: UUID, names: list[str]) -> None:
    await session.change("room", names, adding=True)


async def discard(session: Session, node: UUID, names: list[str]) -> None:
    await session.change("room", names, adding=False)


async def remove(session: Session, node: UUID, names: list[str]) -> None:
    await session.run("remove_channels", names, NOW, None)


class TestLocks:
    """Whatever names a statement is given, it locks in their order: no two wait for each other."""

    @pytest.mark.parametrize(
        ("do", "of"),
        [
            (claim, "channels c"),
            (hand_back, "channels c"),
            (touch, "channels c"),
            (add, "channels c"),
            (remove, "channels c"),
            (add, "memberships c(group_name, name)"),
            (discard, "memberships c(group_name, name)"),
        ],
    )
    async def test_order(
        self, sessions: Sessions, do: Callable[..., Coroutine[Any, Any, None]], of: str
    ) -> None:
        holder, session, watcher = sessions
        node = await claimant(holder, *NAMES)
        if "memberships" in of:
            await holder.change("room", NAMES, adding=True)
        rows = f"select c.name from pgchannels.{of}"
        middle = len(NAMES) // 2
        async with held(holder, f"{rows} where c.name = '{NAMES[middle]}' for update"):
            doing = asyncio.create_task(do(session, node, NAMES[::-1]))
            await eventually(blocked(watcher))
            free = {r[0] for r in await watcher.connection.fetch(f"{rows} for update skip locked")}
        await doing
        assert sorted(set(NAMES) - free) == NAMES[: middle + 1]


class TestRepeating:
    """A statement whose answer was lost, repeated while its first attempt has not ended."""

    @pytest.mark.parametrize("ends", ["commit", "rollback"])
    async def test_a_claim(self, sessions: Sessions, ends: str) -> None:
        first, second, watcher = sessions
        node = await claimant(first, "jobs")
        await first.publish("jobs", 1, 2)
        await first.transaction.start()
        assert await first.claim(node, 1, ["jobs"], 1) == [1]
        again = asyncio.create_task(second.claim(node, 1, ["jobs"], 1))
        await eventually(blocked(watcher))
        await getattr(first.transaction, ends)()
        assert await again == [1], "the one that it took first, and not the next"
        assert await first.claim(node, 2, ["jobs"], 2) == [2]

    async def test_handing_back(self, sessions: Sessions) -> None:
        first, second, watcher = sessions
        node = await claimant(first, "jobs")
        await first.publish("jobs", 1)
        assert await first.claim(node, 1, ["jobs"], 1) == [1]
        await first.transaction.start()
        await first.run("hand_back", ["jobs"], [1], node, 2)
        again = asyncio.create_task(second.run("hand_back", ["jobs"], [1], node, 2))
        await eventually(blocked(watcher))
        await first.transaction.commit()
        await again
        assert await watcher.value("select returned from pgchannels.cursors") == [1]
        assert await first.claim(node, 3, ["jobs"], 2) == [1]

    async def test_an_attempt_that_was_overtaken(self, sessions: Sessions) -> None:
        """It gets through when the claimant has long been asking for other things."""
        first, second, watcher = sessions
        node = await claimant(first, "jobs")
        await first.publish("jobs", 1, 2)
        await first.transaction.start()
        await first.claim(node, 2, ["jobs"], 1)
        late = asyncio.create_task(second.claim(node, 1, ["jobs"], 1))
        await eventually(blocked(watcher))
        await first.transaction.commit()
        assert await late == []
        assert await first.claim(node, 3, ["jobs"], 2) == [2]


class TestClaims:
    async def test_a_channel_that_is_a_member_of_itself(self, sessions: Sessions) -> None:
        session, _, _ = sessions
        node = await claimant(session, "jobs")
        await session.change("jobs", ["jobs"], adding=True)
        await session.publish("jobs", 1)
        assert len(await session.claim(node, 1, ["jobs"], 5)) == 1

    async def test_hostile_headers_stop_nobody(self, sessions: Sessions, database_url: str) -> None:
        """Refused or published: what comes after them is received, and by who waits beside them."""
        session, _, _ = sessions
        insert = (
            "insert into pgchannels.outbox (channel, payload, headers) values ('jobs', '{}', $1)"
        )
        async with PostgresLayer(database_url) as layer:
            for headers in HOSTILE_HEADERS:
                waiting = [asyncio.create_task(layer.receive(c)) for c in ("jobs", "other")]
                with suppress(
                    asyncpg.CheckViolationError, asyncpg.DataError, asyncpg.StatementTooComplexError
                ):
                    await session.execute(insert, headers)
                await layer.send("other", {"after": headers[:50]})
                await layer.send("jobs", {"after": headers[:50]})
                async with asyncio.timeout(20):
                    message, other = await asyncio.gather(*waiting)
                    assert other["after"] == headers[:50]
                    while "after" not in message.data:  # it was published, and is for all
                        message = await layer.receive("jobs")
                    assert message["after"] == headers[:50]

    async def test_refused(
        self, sessions: Sessions, database_url: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Whoever waits is not forgotten."""
        session, _, _ = sessions
        async with PostgresLayer(database_url) as layer:
            await layer.group_add("room", "jobs")
            receiving = asyncio.create_task(layer.receive("jobs"))
            # It has looked: the groups of the channel are known.
            await eventually(lambda: "room" in layer._opened.hub._index)
            await session.execute("alter table pgchannels.claims rename to gone")
            await layer.send("jobs", {"n": 1})
            await eventually(lambda: "was refused" in caplog.text)
            await session.execute("alter table pgchannels.gone rename to claims")
            async with asyncio.timeout(10):
                assert (await receiving)["n"] == 1

    async def test_taking_what_is_there_does_not_wait_for_others(
        self, sessions: Sessions, database_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        holder, _, watcher = sessions
        monkeypatch.setattr(receivers, "_PATIENCE", 0.2)
        await claimant(holder, "jobs")
        async with PostgresLayer(database_url) as layer:
            await layer.send("jobs", {"n": 1})
            async with held(holder, "select from pgchannels.channels for update"):
                taking = asyncio.create_task(layer.receive("jobs", timeout=0))
                await eventually(blocked(watcher))
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(5) as limit:
                        await taking
                assert not limit.expired()
            assert (await layer.receive("jobs", timeout=5))["n"] == 1, "the claim found nobody"

    async def test_closing_with_a_claim_under_way(
        self, sessions: Sessions, database_url: str
    ) -> None:
        """What it takes for those who are told that the layer has been closed goes back."""
        holder, session, watcher = sessions
        await claimant(holder, "jobs", "other")
        await session.publish("jobs", 1)
        layer = PostgresLayer(database_url)
        await layer.open()
        with pytest.raises(TimeoutError):
            await layer.receive("other", timeout=0)  # so that it claims next, and nothing else
        async with held(holder, "select from pgchannels.channels where name = 'other' for update"):
            receiving = [asyncio.create_task(layer.receive(c)) for c in ("jobs", "other")]
            await eventually(blocked(watcher))
            closing = asyncio.create_task(layer.close())
            await asyncio.wait(receiving, timeout=5)
            ended, _ = await asyncio.wait([closing], timeout=0.5)
            assert not ended, "it cannot know yet what the claim has taken"
        await closing
        assert all(task.exception() is not None for task in receiving)
        assert await watcher.value(
            "select returned from pgchannels.cursors where name = 'jobs'"
        ) == [1]

    async def test_a_connection_that_was_declared_dead(
        self, sessions: Sessions, database_url: str
    ) -> None:
        """It is not received from once more, from the beginning of the log."""
        session, _, _ = sessions
        async with PostgresLayer(database_url) as layer:
            name = await layer.new_channel()
            for n in range(2):
                await layer.send(name, {"n": n})
                assert (await layer.receive(name, timeout=5))["n"] == n
            await session.run("remove_channels", [name], NOW, None)
            for _ in range(2):
                with pytest.raises(TimeoutError):
                    await layer.receive(name, timeout=0)
            assert not await session.value("select count(*) from pgchannels.channels")


class TestPruning:
    """What is being used at that very moment stays."""

    async def test_a_receiver(self, sessions: Sessions) -> None:
        claiming, pruning, watcher = sessions
        node = await claimant(claiming, "jobs")
        await claiming.publish("jobs", 1)
        await claiming.execute(
            "update pgchannels.channels set last_active_at = last_active_at - interval '2 days'"
        )
        await claiming.transaction.start()
        assert await claiming.claim(node, 1, ["jobs"], 1) == [1]
        await self.prunes_nothing(claiming, pruning, watcher, "delete_stale_receivers", DAY)
        assert await claiming.claim(node, 2, ["jobs"], 1) == []
        assert await watcher.value("select cursor from pgchannels.cursors") == 1

    async def test_a_key(self, sessions: Sessions) -> None:
        publishing, pruning, watcher = sessions

        async def publish() -> tuple[Any, bool]:
            ((at, is_new),) = await publishing.run(
                "insert_checked",
                *(["jobs"], ["{}"], [None], [None], [1], [0], [], ["k"], DAY, None),
            )
            return at, is_new

        await publish()
        await publishing.execute("update pgchannels.keys set expires_at = created_at")
        await publishing.transaction.start()
        published_at, is_new = await publish()
        assert is_new, "it had run out"
        await self.prunes_nothing(publishing, pruning, watcher, "delete_expired_keys")
        assert await publish() == (published_at, False)

    async def test_a_membership(self, sessions: Sessions) -> None:
        using, pruning, watcher = sessions
        await using.change("room", ["jobs"], adding=True)
        await using.execute("update pgchannels.memberships set renewed_at = now() - interval '2 d'")
        await using.transaction.start()
        await using.change("room", ["jobs"], adding=True)
        await self.prunes_nothing(using, pruning, watcher, "end_stale_memberships", DAY)
        assert await watcher.value("select count(*) from pgchannels.memberships") == 1

    async def prunes_nothing(
        self, using: Session, pruning: Session, watcher: Session, query: str, *arguments: Any
    ) -> None:
        deleting = asyncio.create_task(pruning.run(query, *arguments, 100))

        async def has_met_it() -> Any:
            return deleting.done() or await blocked(watcher)()

        await eventually(has_met_it)
        await using.transaction.commit()
        assert (await deleting)[0]["count"] == 0


class TestMemberships:
    @pytest.mark.parametrize("first", ["added", "removed"])
    async def test_added_while_its_channel_is_removed(self, sessions: Sessions, first: str) -> None:
        one, other, watcher = sessions
        node = uuid4()
        name = new_name("ws", node)
        await one.run("register_node", node, "{}")
        await one.run("add_channels", [name], node, [None], [None])

        async def add(session: Session) -> None:
            await session.change("room", [name], adding=True)

        async def remove(session: Session) -> None:
            await session.run("remove_channels", [name], NOW, node)

        before, after = (add, remove) if first == "added" else (remove, add)
        await one.transaction.start()
        await before(one)
        later = asyncio.create_task(after(other))
        await eventually(blocked(watcher))
        await one.transaction.commit()
        await later
        assert await watcher.value("select count(*) from pgchannels.channels") == 0
        assert await watcher.value("select count(*) from pgchannels.memberships") == 0

    @pytest.mark.parametrize("adding", [True, False])
    async def test_cancelled_it_may_happen_all_the_same(
        self, sessions: Sessions, database_url: str, *, adding: bool
    ) -> None:
        """Then the streams know it too."""
        holder, _, watcher = sessions
        async with PostgresLayer(database_url) as layer:
            name = await layer.new_channel()
            change = layer.group_add if adding else layer.group_discard
            if not adding:
                await layer.group_add("room", name)
            async with layer.subscribe(member=name) as stream:
                assert stream.reads("room") is not adding
                async with held(holder, "lock table pgchannels.memberships in share mode"):
                    changing = asyncio.create_task(change("room", name))
                    await eventually(blocked(watcher))
                    changing.cancel()
                    await asyncio.wait([changing])
                    assert changing.cancelled()
                await eventually(lambda: stream.reads("room") is adding)
            assert await layer.group_members("room") == [name][: int(adding)]

    @pytest.mark.parametrize("cancelled", [True, False])
    @pytest.mark.parametrize("answer_lost", [True, False])
    async def test_an_owner_changes_in_the_row_and_in_the_process_or_in_neither(
        self, sessions: Sessions, database_url: str, *, cancelled: bool, answer_lost: bool
    ) -> None:
        """The caller was cancelled, the answer of the database was lost, or both."""
        holder, _, watcher = sessions
        owners: list[tuple[str | None, str | None]] = []
        async with (
            asyncio.timeout(60),
            TcpProxy(database_url) as proxy,
            PostgresLayer(Settings(database_url=proxy.url, poll_interval=0.1)) as layer,
        ):
            name = await layer.new_channel(user_id="u", limits=Limits())
            async with layer.subscribe(member=name) as stream:
                stream.on_owner(lambda *owner: owners.append(owner))
                async with held(holder, "lock table pgchannels.channels in share mode"):
                    changing = asyncio.create_task(
                        layer.update_channel(name, user_id="v", metadata={"n": 1})
                    )
                    await eventually(blocked(watcher))
                    if cancelled:
                        changing.cancel()
                        await asyncio.wait([changing])
                    if answer_lost:
                        await proxy.cut()
                if answer_lost:
                    proxy.resume()
                await asyncio.wait([changing])

                async def agree() -> Any:
                    user = await watcher.value("select user_id from pgchannels.channels")
                    other = "v" if user == "u" else "u"
                    return (
                        await watcher.value(
                            "select count(*) = 0 from pg_stat_activity where query like '%admit%'"
                            " and datname = current_database() and state = 'active'"
                            " and pid <> pg_backend_pid()"
                        )
                        and stream.reads(user_channel(user))
                        and not stream.reads(user_channel(other))
                        and [owner for owner, _ in owners[-1:]] == ["v"][: int(user == "v")]
                    )

                await eventually(agree, timeout=20)
                if not answer_lost:
                    assert owners == [("v", '{"n":1}')]

    async def test_a_node_that_does_not_know_of_its_death_adds_none(
        self, sessions: Sessions
    ) -> None:
        """It is under way with that while another one removes what lived by it."""
        dead, alive, watcher = sessions
        node, other = uuid4(), uuid4()
        name = new_name("ws", node)
        for id in (node, other):
            await dead.run("register_node", id, "{}")
        await dead.run("add_channels", [name], node, [None], [None])
        await dead.execute("update pgchannels.nodes set dead_since = now() where id = $1", node)
        await dead.execute(
            "update pgchannels.nodes set steady_since = now() - interval '1 d' where id = $1", other
        )
        await dead.transaction.start()
        await dead.run("change_memberships", ["room"], [name], [True], ["connection"], NOW, node)
        reaping = asyncio.create_task(alive.run("reap", other, timedelta(minutes=1), 100))
        await eventually(blocked(watcher))
        await dead.transaction.commit()
        assert (await reaping)[0]["more"]
        assert await watcher.value("select count(*) from pgchannels.channels") == 0
        assert await watcher.value("select count(*) from pgchannels.memberships") == 0

    async def test_a_channel_that_nobody_waits_for_any_more(
        self, sessions: Sessions, database_url: str
    ) -> None:
        """Whoever asked for it was cancelled: it goes as it came, and not only with its node."""
        holder, _, watcher = sessions

        async def channels() -> Any:
            return await watcher.value("select count(*) from pgchannels.channels")

        async with PostgresLayer(Settings(database_url=database_url, poll_interval=0.1)) as layer:
            async with held(holder, "lock table pgchannels.channels in share mode"):
                asking = asyncio.create_task(layer.new_channel())
                await eventually(blocked(watcher))
                asking.cancel()
                await asyncio.wait([asking])
                assert asking.cancelled()
            await layer.new_channel()  # behind the other one
            await eventually(lambda: only_one(channels))

    async def test_what_was_subscribed_to_stays(self, database_url: str) -> None:
        """Whether before, as, or after the channel was made a member."""
        async with PostgresLayer(database_url) as layer:
            name = await layer.new_channel()
            groups = ["before", "at", "after", "never"]
            async with AsyncExitStack() as stack:
                subscribe = layer.subscribe("before", member=name)
                stream = await stack.enter_async_context(subscribe)
                await stream.join("at")
                for group in groups:
                    await layer.group_add(group, name)
                await stream.join("after")
                for group in groups:
                    await layer.group_discard(group, name)
                    await layer.group_send(group, {"group": group})
                assert [stream.reads(group) for group in groups] == [True, True, True, False]
                assert await read(stream, 3) == [{"group": group} for group in groups[:3]]

    @pytest.mark.parametrize("presence", ["user", None])
    async def test_back_from_grace_as_somebody_else(
        self, database_url: str, presence: PresenceBy | None
    ) -> None:
        """Or as nobody: who was still counted has left at last."""
        settings = Settings(database_url=database_url, presence_grace=60)
        async with PostgresLayer(settings) as layer:
            name = await layer.new_channel(user_id="u")
            await layer.group_add("room", name, presence="user")
            await layer.group_discard("room", name)
            await layer.update_channel(name, user_id="v")
            await layer.group_add("room", name, presence=presence)
            present = [p.user_id for p in await layer.presence("room")]
            assert present == (["v"] if presence else [])
            async with layer.subscribe(presence_channel("room"), after="0") as stream:
                events = [
                    (event["type"], event["user_id"], event["count"])
                    for event in await read(stream, 2 + len(present))
                ]
        joined, left = "presence.joined", "presence.left"
        assert events[0] == (joined, "u", 1)
        news = {(left, "u"), *((joined, user) for user in present)}
        assert {event[:2] for event in events[1:]} == news
        assert events[-1][2] == len(present)


async def only_one(count: Callable[[], Awaitable[Any]]) -> Any:
    return await count() == 1


async def read(stream: Stream, count: int) -> list[dict[str, Any]]:
    async with asyncio.timeout(20):
        return [(await anext(stream)).data for _ in range(count)]


class TestLeases:
    async def test_a_death_is_noticed_however_rarely_nodes_give_signs_of_life(
        self, sessions: Sessions, database_url: str
    ) -> None:
        session, _, _ = sessions
        async with PostgresLayer(Settings(database_url=database_url, **SETTINGS)) as layer:
            dead = uuid4()
            name = new_name("ws", dead)
            await session.run("register_node", dead, "{}")
            await session.run("add_channels", [name], dead, [None], [None])
            await layer.group_add("room", name)

            async def has_left() -> Any:
                return not await layer.group_members("room")

            await eventually(has_left, timeout=30)

    async def test_a_short_outage_ends_nobody(self, sessions: Sessions, database_url: str) -> None:
        """One is back within its lease, the other one a little later: it has not died."""
        session, _, _ = sessions
        lease = 2 * LEASE  # time enough to look before one may declare the other dead
        settings = {"lease_time": lease, "heartbeat_interval": lease / 2}

        async def ago(node: Any, column: str) -> float:
            age: float = await session.value(
                f"select extract(epoch from clock_timestamp() - n.{column})::float8"
                " from pgchannels.nodes n where n.id = $1",
                node,
            )
            return age

        async with AsyncExitStack() as stack:
            proxies = [await stack.enter_async_context(TcpProxy(database_url)) for _ in range(2)]
            early, late = [
                (await stack.enter_async_context(PostgresLayer(chosen)))._opened.members._id
                for chosen in (Settings(database_url=proxy.url, **settings) for proxy in proxies)
            ]
            # As if they had been there for long.
            await session.execute(
                "update pgchannels.nodes set steady_since = steady_since - interval '1 h'"
            )
            for proxy in proxies:
                await proxy.cut(refuse=True)

            async def away() -> Any:
                return await ago(early, "heartbeat_at") > 0.85 * lease

            async def back() -> Any:
                return await ago(early, "heartbeat_at") < 0.3 * lease

            async def overdue() -> Any:
                return await ago(late, "heartbeat_at") > 1.5 * lease

            await eventually(away)
            proxies[0].resume()
            await eventually(back)
            await eventually(overdue)
            assert await ago(early, "steady_since") < lease
            assert await session.value("select count(*) from pgchannels.nodes") == 2
            assert not await session.value(
                "select bool_or(dead_since is not null) from pgchannels.nodes"
            )

    async def test_alone_and_nobodys_it_comes_back(
        self, sessions: Sessions, database_url: str
    ) -> None:
        """A node that was declared dead and is the only one, with a member that is no user now."""
        session, _, _ = sessions
        async with PostgresLayer(Settings(database_url=database_url, **SETTINGS)) as layer:
            nobody = await layer.new_channel(user_id="u")
            other = await layer.new_channel()
            await layer.group_add("room", nobody, presence="user")
            await layer.update_channel(nobody)
            await layer.group_add("room", other)
            node = await session.value(
                "update pgchannels.nodes set dead_since = now() returning id"
            )

            async def is_back() -> Any:
                renewed = await session.value("select array_agg(id) from pgchannels.nodes") != [
                    node
                ]
                members = await layer.group_members("room")
                return renewed and members == sorted([nobody, other])

            await eventually(is_back)

    async def test_renewed_whatever_else_waits(self, sessions: Sessions, database_url: str) -> None:
        """Somebody holds up those who are to be told of in a group."""
        holder, _, watcher = sessions
        settings = Settings(
            database_url=database_url, presence_grace=0.01, poll_interval=0.1, **SETTINGS
        )
        async with PostgresLayer(settings) as layer:
            name = await layer.new_channel(user_id="u")
            await layer.group_add("room", name, presence="user")
            async with held(holder, "select pgchannels.lock_presence(array['room'])"):
                await watcher.execute("update pgchannels.memberships set left_at = joined_at")
                await eventually(blocked(watcher))
                signs = await self.signs_of_life(watcher, 3)
                assert await blocked(watcher)()
            assert len(signs) == 3

    async def signs_of_life(self, watcher: Session, count: int) -> set[Any]:
        signs: set[Any] = set()

        async def enough() -> Any:
            signs.add(await watcher.value("select heartbeat_at from pgchannels.nodes"))
            return len(signs) >= count

        await eventually(enough, timeout=15)
        return signs


class TestCapacity:
    """A channel may hold three; there is one in it."""

    @pytest.fixture
    async def publish(self, sessions: Sessions) -> Callable[..., Awaitable[list[bool | None]]]:
        session, _, _ = sessions
        await claimant(session, "jobs")
        await session.publish("jobs", 0)

        async def publish(*keys: str | None) -> list[bool | None]:
            """Whether each is new; None: there was no room for it."""
            count = len(keys)
            rows = await session.run(
                "insert_checked",
                *(["jobs"] * count, ["{}"] * count, [None] * count, [None] * count),
                *([1] * count, [0] * count, [], keys, DAY, 3),
            )
            return [row["is_new"] if row["created_at"] else None for row in rows]

        return publish

    async def test_repeats_take_no_room(
        self, publish: Callable[..., Awaitable[list[bool | None]]]
    ) -> None:
        assert await publish("k", "k", None, None) == [True, False, True, None]

    async def test_known_keys_take_no_room(
        self, publish: Callable[..., Awaitable[list[bool | None]]]
    ) -> None:
        assert await publish("k") == [True]
        assert await publish("k", None, None) == [False, True, None]

    async def test_what_is_under_way_counts(
        self, publish: Callable[..., Awaitable[list[bool | None]]]
    ) -> None:
        """And a repeat of what is in it is told so, though there is no room."""
        assert await publish("k", None) == [True, True]
        assert await publish(None, "k") == [None, False]


async def test_ephemeral_messages_of_what_is_read_no_more(database_url: str) -> None:
    async with PostgresLayer(database_url) as layer, layer.subscribe("room", "other") as stream:
        await eventually(lambda: layer.is_listening)
        await layer.send_ephemeral("room", {"n": 1})
        await layer.send_ephemeral("other", {"n": 2})
        await eventually(lambda: stream.pending == 2)
        stream.leave("room")
        assert await read(stream, 1) == [{"n": 2}]
