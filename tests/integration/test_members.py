"""Members and receivers in number, from several nodes, past their time, and under attack."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
from psycopg.rows import scalar_row

from pgchannels import InvalidPayload, Message, PostgresLayer, Settings, Stream, ephemeral
from pgchannels.channels import DIRECT, EVERYONE, user_channel
from pgchannels.records import LogPage
from tests.support.eventually import eventually
from tests.support.pruning import only_by_hand, prune

Connection = psycopg.Connection[Any]


@pytest.fixture
def connection(database_url: str) -> Iterator[Connection]:
    with psycopg.connect(database_url, autocommit=True, row_factory=scalar_row) as connection:
        yield connection


@pytest.fixture
async def layers(database_url: str) -> AsyncIterator[tuple[PostgresLayer, PostgresLayer]]:
    """Two nodes. They leave the pruning to the test."""
    only_by_hand(database_url)
    settings = Settings(database_url=database_url)
    async with PostgresLayer(settings) as layer, PostgresLayer(settings) as other:
        yield layer, other


@pytest.fixture
def layer(layers: tuple[PostgresLayer, PostgresLayer]) -> PostgresLayer:
    return layers[0]


@pytest.fixture
def other(layers: tuple[PostgresLayer, PostgresLayer]) -> PostgresLayer:
    return layers[1]


def value(connection: Connection, sql: str, *arguments: Any) -> Any:
    return connection.execute(sql, arguments or None).fetchone()


async def take(stream: Stream, count: int) -> list[Message]:
    taken: list[Message] = []
    async with asyncio.timeout(20):
        while len(taken) < count:
            taken.append(await anext(stream))
    return taken


class TestManyMembers:
    async def test_a_thousand_of_one_group(
        self, layer: PostgresLayer, other: PostgresLayer, connection: Connection
    ) -> None:
        """A message is stored once, and each of them has it."""
        nodes = [layer, other] * 500
        names = await asyncio.gather(*(node.new_channel() for node in nodes))
        await asyncio.gather(
            *(layer.group_add("room", name) for name in names)  # half of them are other's
        )
        assert await other.group_members("room") == sorted(names)
        async with AsyncExitStack() as stack:
            streams = [
                await stack.enter_async_context(node.subscribe(member=name))
                for node, name in zip(nodes, names, strict=True)
            ]
            receiving = [
                asyncio.create_task(node.receive(name, timeout=30))
                for node, name in zip(nodes, names, strict=True)
            ]
            for n in range(3):
                await layer.group_send("room", {"n": n})
            for stream in streams:
                assert [message["n"] for message in await take(stream, 3)] == [0, 1, 2]
        assert [message["n"] for message in await asyncio.gather(*receiving)] == [0] * 1000
        assert (
            value(connection, "select count(*) from pgchannels.messages m where m.channel = 'room'")
            == 3
        )

    async def test_who_joins_at_once_shares_transactions(
        self, layer: PostgresLayer, connection: Connection
    ) -> None:
        names = await asyncio.gather(*(layer.new_channel() for _ in range(1000)))
        await asyncio.gather(*(layer.group_add("room", name) for name in names))
        transactions = "select count(distinct xmin::text) from pgchannels."
        assert value(connection, "select count(*) from pgchannels.memberships") == 1000
        assert value(connection, transactions + "memberships") <= 3
        assert value(connection, transactions + "channels where node is not null") <= 3
        before = value(connection, "select pg_current_xact_id()::text::bigint")
        await asyncio.gather(*(layer.group_discard("room", name) for name in names))
        assert value(connection, "select count(*) from pgchannels.memberships") == 0
        # Each change is told of in one message; heartbeats have transactions too.
        assert value(connection, "select pg_current_xact_id()::text::bigint") - before < 30

    @pytest.mark.parametrize("seed", range(3))
    async def test_storms_from_two_nodes(
        self, layer: PostgresLayer, other: PostgresLayer, connection: Connection, seed: int
    ) -> None:
        """Whatever order it came to: database, streams and receivers agree in the end."""
        draw = random.Random(seed)
        nodes = (layer, other)
        owners = {await nodes[n % 2].new_channel(): nodes[n % 2] for n in range(10)}
        ordinary = [f"jobs:{n}" for n in range(4)]
        groups = [f"room:{n}" for n in range(5)]

        async def change(node: PostgresLayer) -> None:
            for _ in range(30):
                group, name = draw.choice(groups), draw.choice([*owners, *ordinary])
                act = draw.choice([node.group_add, node.group_discard])
                await act(group, name)

        async with AsyncExitStack() as stack:
            streams = {
                name: await stack.enter_async_context(node.subscribe(member=name))
                for name, node in owners.items()
            }
            async with asyncio.TaskGroup() as tasks:
                for task in range(16):
                    tasks.create_task(change(nodes[task % 2]))
            members = {group: await layer.group_members(group) for group in groups}
            assert any(members.values())
            memberships = {
                name: {group for group in groups if name in members[group]}
                for name in (*owners, *ordinary)
            }
            await eventually(
                lambda: all(
                    set(node._opened.members[name].groups) == memberships[name]
                    for name, node in owners.items()
                )
            )
            for group in groups:
                await other.group_send(group, {"sent": group})
            for name in memberships:
                await layer.send(name, {"sent": None})
            for name, expected in memberships.items():
                count = len(expected) + 1
                if name in streams:
                    read = await take(streams[name], count)
                    assert {message["sent"] for message in read} == {*expected, None}
                received = [await layer.receive(name, timeout=10) for _ in range(count)]
                assert {message["sent"] for message in received} == {*expected, None}
                with pytest.raises(TimeoutError):
                    await other.receive(name, timeout=0)

    async def test_who_waits_elsewhere_is_told(
        self, layer: PostgresLayer, other: PostgresLayer
    ) -> None:
        """Another node makes them members: connections and ordinary channels, that wait or read."""
        name = await layer.new_channel()
        async with layer.subscribe(member=name) as stream:
            receiving = [asyncio.create_task(layer.receive(c)) for c in (name, "jobs")]
            await eventually(
                lambda: all(c in layer._opened.receivers._inboxes for c in (name, "jobs"))
            )
            for channel in (name, "jobs"):
                await other.group_add("room", channel)
            await other.group_send("room", {"n": 1})
            async with asyncio.timeout(10):
                received = await asyncio.gather(*receiving)
            assert [(m.channel, m["n"]) for m in received] == [("room", 1)] * 2
            assert (await take(stream, 1))[0].id == received[0].id


class Sets:
    """A serializer that knows sets."""

    def dumps(self, payload: Mapping[str, Any]) -> str:
        return json.dumps(payload, default=lambda value: {"set": sorted(value)})

    def loads(self, text: str) -> Any:
        return json.loads(text, object_hook=lambda o: set(o["set"]) if "set" in o else o)


async def test_metadata_is_as_it_was_given(database_url: str) -> None:
    """Whatever serializer there is for payloads: it has not written this."""
    async with PostgresLayer(database_url, serializer=Sets()) as layer:
        name = await layer.new_channel(metadata={"colour": {"set": ["red"]}})
        await layer.group_add("room", name, presence="connection")
        (present,) = await layer.presence("room")
        assert present.metadata == {"colour": {"set": ["red"]}}


async def test_what_nodes_tell_each_other_is_not_the_serializers(
    database_url: str, connection: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor does a message that it fails at keep others from anybody."""
    async with (
        PostgresLayer(database_url, serializer=Sets()) as layer,
        layer.subscribe("room") as stream,
    ):
        for channel in ("pgchannels:members", "pgchannels:commands", "room"):
            connection.execute(
                "insert into pgchannels.outbox (channel, payload) values (%s, %s)",
                (channel, '{"set": 5}'),
            )
        await layer.send("room", {"n": 1})
        unreadable, message = await take(stream, 2)
        assert message["n"] == 1
        with pytest.raises(InvalidPayload):
            unreadable["set"]
    assert not [record for record in caplog.records if record.exc_info]


class TestExpiry:
    async def test_memberships_of_who_does_not_use_them(
        self, database_url: str, connection: Connection
    ) -> None:
        only_by_hand(database_url)
        settings = Settings(database_url=database_url, group_expiry=8.0)
        async with PostgresLayer(settings) as layer:
            mine = await layer.new_channel()
            for name in ("unused", "renewed", "received", "waited", mine):
                await layer.group_add("room", name)
            waiting = asyncio.create_task(layer.receive("waited"))
            for name in ("received", "unused"):
                with pytest.raises(TimeoutError):
                    await layer.receive(name, timeout=0)
            for table, column in (("memberships", "renewed_at"), ("channels", "last_active_at")):
                connection.execute(
                    f"update pgchannels.{table} set {column} = {column} - interval '1 h'"
                )
            await layer.group_add("room", "renewed")
            await layer.send("received", {})
            await layer.receive("received")

            def has_been_touched() -> Any:
                return value(
                    connection,
                    "select last_active_at > clock_timestamp() - interval '1 min'"
                    " from pgchannels.channels where name = 'waited'",
                )

            await eventually(has_been_touched)
            foretold = await prune(settings, dry_run=True)
            report = await prune(settings)
            assert foretold.memberships_ended == report.memberships_ended == 1
            assert await layer.group_members("room") == sorted(
                ["renewed", "received", "waited", mine]
            )
            await layer.group_send("room", {"n": 1})
            async with asyncio.timeout(10):
                assert (await waiting)["n"] == 1

    async def test_a_membership_that_expires_is_told_of(
        self, layer: PostgresLayer, connection: Connection
    ) -> None:
        """Whoever begins to wait only then has no messages of that group."""
        await layer.group_add("room", "jobs")
        connection.execute(
            "update pgchannels.memberships set renewed_at = renewed_at - interval '2 d'"
        )
        assert (await prune(layer.settings)).memberships_ended == 1
        await layer.group_send("room", {"n": 1})
        await layer.send("jobs", {"n": 2})
        assert (await layer.receive("jobs", timeout=10))["n"] == 2

    async def test_keys(self, layer: PostgresLayer, connection: Connection) -> None:
        first = await layer.send("jobs", {"n": 1}, key="k")
        connection.execute("update pgchannels.keys set expires_at = expires_at - interval '23 h'")
        assert (await prune(layer.settings)).keys_deleted == 0
        assert (await layer.send("jobs", {"n": 2}, key="k")).repeated
        connection.execute("update pgchannels.keys set expires_at = expires_at - interval '2 h'")
        assert (await prune(layer.settings, dry_run=True)).keys_deleted == 1
        assert (await prune(layer.settings)).keys_deleted == 1
        again = await layer.send("jobs", {"n": 3}, key="k")
        assert not again.repeated
        assert again.created_at > first.created_at
        assert [(await layer.receive("jobs", timeout=10))["n"] for _ in range(2)] == [1, 3]

    async def test_receivers_are_remembered_while_it_matters(
        self, layer: PostgresLayer, connection: Connection
    ) -> None:
        """Without its row, a channel would be received from its beginning, a second time."""
        for n in range(3):
            await layer.send("jobs", {"n": n})
        for _ in range(3):
            await layer.receive("jobs", timeout=10)
        connection.execute(
            "update pgchannels.channels set last_active_at = last_active_at - interval '3 d'"
        )
        assert (await prune(layer.settings)).receivers_deleted == 0
        with pytest.raises(TimeoutError):
            await layer.receive("jobs", timeout=0)

        connection.execute("update pgchannels.batches set sealed_at = sealed_at - interval '8 d'")
        connection.execute("update pgchannels.channels set last_active_at = clock_timestamp()")
        assert (await prune(layer.settings)).receivers_deleted == 0, "it is still in use"
        connection.execute(
            "update pgchannels.channels set last_active_at = last_active_at - interval '3 d'"
        )
        assert (await prune(layer.settings, dry_run=True)).receivers_deleted == 1
        assert (await prune(layer.settings)).receivers_deleted == 1
        with pytest.raises(TimeoutError):
            await layer.receive("jobs", timeout=0)
        await layer.send("jobs", {"n": 3})
        assert (await layer.receive("jobs", timeout=10))["n"] == 3

    async def test_ephemeral_messages_are_swept(
        self, database_url: str, connection: Connection
    ) -> None:
        settings = Settings(database_url=database_url, heartbeat_interval=0.2)
        count = "select count(*) from pgchannels.ephemeral"
        async with PostgresLayer(settings) as layer, layer.subscribe("room") as stream:
            await eventually(lambda: layer.is_listening)
            await layer.send_ephemeral("room", {"n": 1})
            assert (await take(stream, 1))[0]["n"] == 1
            assert value(connection, count) == 1
            connection.execute(
                "update pgchannels.ephemeral set created_at = created_at - interval '9 s'"
            )
            await eventually(lambda: value(connection, count) == 0)
            await layer.send("room", {"n": 2})
            assert (await take(stream, 1))[0]["n"] == 2
        stored = (
            "select json_agg(payload -> 'n')::text from pgchannels.messages where channel = 'room'"
        )
        assert value(connection, stored) == "[2]"


class TestForgery:
    """What any role can do to a node: notify, and where it may, publish."""

    HINTS = (
        "",
        "e",
        "e 0",
        "e 0 9223372036854775807",
        "e 0 999999999999999999",
        "e 999999999999999999 0",
        "e -1 5",
        "e ٣ ٤",
        "99999999999999999999",
        "9223372036854775807",
        "-1",
        "null",
        "x" * 7999,
    )

    async def test_hints(
        self,
        layer: PostgresLayer,
        connection: Connection,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        name = await layer.new_channel()
        await layer.group_add("room", name)
        await eventually(lambda: layer.is_listening)
        async with layer.subscribe(member=name) as stream:
            await layer.send_ephemeral("room", {"n": 0})
            assert (await take(stream, 1))[0]["n"] == 0
            receiving = asyncio.create_task(layer.receive(name))
            for hint in self.HINTS:
                connection.execute("select pg_notify('pgchannels', %s)", (hint,))
            # A flood: each transaction is a notification of its own.
            for n in range(1000):
                connection.execute("select pg_notify('pgchannels', %s)", (str(10**18 + n),))
            await layer.group_send("room", {"n": 1})
            await layer.send_ephemeral("room", {"n": 2})
            # The ephemeral message that has been there is not shown again, by whatever hint.
            assert sorted(message["n"] for message in await take(stream, 2)) == [1, 2]
            async with asyncio.timeout(10):
                assert (await receiving)["n"] == 1
        assert worse_than(caplog, logging.INFO) == []

    @pytest.mark.parametrize("remembered", [5, 100])
    async def test_hints_at_ephemeral_messages_that_have_come(
        self,
        layer: PostgresLayer,
        connection: Connection,
        monkeypatch: pytest.MonkeyPatch,
        remembered: int,
    ) -> None:
        """None comes twice, though a node does not remember all of them; it rests after a look."""
        monkeypatch.setattr(ephemeral, "_REMEMBERED", remembered)
        await eventually(lambda: layer.is_listening)
        async with layer.subscribe("room") as stream:
            for n in range(50):
                await layer.send_ephemeral("room", {"n": n})
            received = [message["n"] for message in await take(stream, 50)]
            connection.execute("select pg_notify('pgchannels', 'e 1 999999999999999999')")
            await layer.send_ephemeral("room", {"n": 50})
            received += [message["n"] for message in await take(stream, 1)]
            assert received == list(range(51))
            found = ephemeral.Ephemeral(layer._opened.store, layer._opened.hub)
            assert await found._bring(1, 1000) == 0
            assert await found._bring(1, 1000) == ephemeral._AFTER_FALSE_HINT
            assert await found._bring(1, 1) == ephemeral._AFTER_OLD_HINT
            assert await found._bring(1000, 1000) == ephemeral._AFTER_FALSE_HINT

    async def test_a_new_channel_does_not_read_what_was_sent_directly_to_others(
        self, layer: PostgresLayer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """From whatever position its client resumes."""
        old = await layer.new_channel()
        async with layer.subscribe(member=old) as stream:
            for n in range(3):
                await layer.send_to([old], {"n": n})
            sent = (await take(stream, 3))[-1]
        hub = layer._opened.hub
        read: list[tuple[tuple[str, ...], int]] = []
        replay = hub.replay

        async def noted(channels: tuple[str, ...], after: int) -> LogPage:
            read.append((channels, after))
            return await replay(channels, after)

        monkeypatch.setattr(hub, "replay", noted)
        new = await layer.new_channel(user_id="u")
        async with layer.subscribe(member=new) as stream:
            await layer.send_to([new], {"n": 3})
            assert [m["n"] for m in await take(stream, 1)] == [3]
            await layer.send_to_user("u", {"n": 4})
            assert [m["n"] for m in await take(stream, 1)] == [4]
            await stream.resume(str(sent.position))
            assert [m["n"] for m in await take(stream, 1)] == [4]
        assert {channels for channels, after in read if after == sent.id} == {
            (EVERYONE,),
            (user_channel("u"),),
        }
        assert [after for channels, after in read if DIRECT in channels and after <= sent.id] == []

    async def test_news_that_names_too_many_channels_is_not_parsed(
        self, layer: PostgresLayer
    ) -> None:
        """It is a reason to look at all: that keeps the event loop for less time."""

        class Unread(Message):
            @property
            def document(self) -> dict[str, Any] | None:
                raise AssertionError

        name = await layer.new_channel()
        now = datetime.now(UTC)
        members = layer._opened.members
        members.offer(Unread(1, "pgchannels:members", "{}", now, (1 << 20) + 1, 1))
        assert members._to_look_at == {name}
        with pytest.raises(AssertionError):
            members.offer(Unread(1, "pgchannels:members", "{}", now, 1 << 20, 1))

    async def test_news_of_memberships(
        self, layer: PostgresLayer, connection: Connection, caplog: pytest.LogCaptureFixture
    ) -> None:
        """They are at most a reason to look."""
        name = await layer.new_channel()
        await layer.group_add("room", name)
        await layer.group_add("room", "jobs")
        deep = "[" * 5000 + "]" * 5000
        payloads = [
            "{}",
            '{"channels": null}',
            '{"channels": "x"}',
            '{"channels": {}}',
            '{"channels": [null, 1, {}, [], true, ""]}',
            '{"channels": ["\\t\\u200b", "pgchannels:members", "room"]}',
            f'{{"channels": {deep}}}',
            f'{{"channels": ["nobody", "jobs", "{name}"]}}',
            f'{{"channels": ["{name}"], "left": ["room"], "type": "presence.left"}}',
            json.dumps({"channels": [f"nobody:{n}" for n in range(50_000)]}),
            '{"channels": ["' + "x" * 1_000_000 + '"]}',
        ]
        # So that those pass which the database refuses today.
        connection.execute("alter table pgchannels.outbox drop constraint outbox_payload_is_valid")
        async with layer.subscribe(member=name) as stream:
            receiving = [asyncio.create_task(layer.receive(c)) for c in (name, "jobs")]
            for payload in payloads:
                connection.execute(
                    "insert into pgchannels.outbox (channel, payload)"
                    " values ('pgchannels:members', %s::json)",
                    (payload,),
                )
            await layer.send("later", {})
            async with layer.subscribe("later", after="0") as later:
                await take(later, 1)
            assert value(
                connection,
                "select count(*) from pgchannels.messages m where m.channel = 'pgchannels:members'",
            ) >= len(payloads)
            await layer.group_send("room", {"n": 1})
            assert (await take(stream, 1))[0]["n"] == 1
            async with asyncio.timeout(10):
                assert [m["n"] for m in await asyncio.gather(*receiving)] == [1, 1]
        assert await layer.group_members("room") == sorted([name, "jobs"])
        assert value(connection, "select count(*) from pgchannels.channels") == 2
        assert worse_than(caplog, logging.INFO) == []


def worse_than(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno > level]


@pytest.mark.slow
async def test_ten_thousand_wait(database_url: str, connection: Connection) -> None:
    """Each on a channel of its own. They use no connection of the pool, and one that listens."""
    count = 10_000
    waiting_sql = (
        "select count(*) from pg_stat_activity where datname = current_database()"
        " and application_name = 'pgchannels {}'"
    )
    async with PostgresLayer(database_url) as layer, asyncio.timeout(100):
        receiving = [asyncio.create_task(layer.receive(f"jobs:{n}")) for n in range(count)]
        await eventually(
            lambda: value(connection, "select count(*) from pgchannels.channels") == count,
            timeout=60,
        )
        # By and by: what is done beside that, now and then, needs a connection for a moment.
        await eventually(lambda: value(connection, waiting_sql.format("listener")) == 1, timeout=30)
        assert value(connection, waiting_sql.format("receivers")) == 1
        busy = waiting_sql.format("pool") + " and state <> 'idle'"
        await eventually(lambda: value(connection, busy) == 0, timeout=30)
        everyone = waiting_sql.replace("= 'pgchannels {}'", "like 'pgchannels %'")
        assert value(connection, everyone) <= layer.settings.pool_size + 8
        assert not any(task.done() for task in receiving)
        await asyncio.gather(*(layer.send(f"jobs:{n}", {"n": n}) for n in range(count)))
        received = await asyncio.gather(*receiving)
        assert [message["n"] for message in received] == list(range(count))
