"""The channel layer, from opening to closing, against a real server and with real commits."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from typing import Any, Literal

import asyncpg
import psycopg
import pytest

from pgchannels import (
    BEGINNING,
    ChannelLayerClosed,
    ConfigurationError,
    DatabaseError,
    DatabaseUnavailable,
    InvalidChannel,
    InvalidMessage,
    InvalidPayload,
    InvalidPosition,
    Message,
    MessageTooLarge,
    Position,
    PostgresLayer,
    Receipt,
    SchemaError,
    Settings,
    Stream,
    UnknownPosition,
)
from pgchannels.migrate import upgrade
from pgchannels.publisher import Publisher
from pgchannels.records import Outgoing
from pgchannels.store import Store
from pgchannels.subscription import State
from tests.support.eventually import eventually

ORDERS: list[Literal["asc", "desc"]] = ["asc", "desc"]


@pytest.fixture
async def layer(database_url: str) -> AsyncIterator[PostgresLayer]:
    async with PostgresLayer(database_url) as layer:
        yield layer


def execute(url: str, *statements: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement)


def value(url: str, query: str) -> Any:
    with psycopg.connect(url, autocommit=True) as connection:
        row = connection.execute(query).fetchone()
        assert row is not None
        return row[0]


async def take(stream: Stream, count: int) -> list[Message]:
    """The next *count* messages."""
    taken: list[Message] = []
    async with asyncio.timeout(10):
        while len(taken) < count:
            taken.append(await anext(stream))
    return taken


def numbers(messages: list[Message]) -> list[int]:
    return [message["n"] for message in messages]


async def fill(layer: PostgresLayer, channel: str, count: int) -> list[Message]:
    """Publish *count* messages in order; return them when they are in the log."""
    async with layer.subscribe(channel) as stream:
        await asyncio.gather(*(layer.send(channel, {"n": n}) for n in range(count)))
        return await take(stream, count)


class TestOpening:
    async def test_not_migrated(self, empty_database_url: str) -> None:
        layer = PostgresLayer(empty_database_url)
        with pytest.raises(SchemaError) as raised:
            await layer.open()
        assert (raised.value.found, raised.value.newer) == (None, False)
        assert "pgchannels migrate" in str(raised.value)
        with pytest.raises(ChannelLayerClosed):
            await layer.send("room", {})

    async def test_migrated_under_another_name(self, database_url: str) -> None:
        layer = PostgresLayer(Settings(database_url=database_url, schema_name="other"))
        with pytest.raises(SchemaError, match="'other' has not been migrated"):
            await layer.open()

    async def test_no_revision(self, database_url: str) -> None:
        execute(database_url, "delete from pgchannels.alembic_version")
        with pytest.raises(SchemaError, match="has not been migrated"):
            await PostgresLayer(database_url).open()

    async def test_newer(self, database_url: str) -> None:
        execute(database_url, "update pgchannels.alembic_version set version_num = '9999'")
        execute(database_url, "update pgchannels.log set works_from = '9999'")
        with pytest.raises(SchemaError) as raised:
            await PostgresLayer(database_url).open()
        assert (raised.value.found, raised.value.newer) == ("9999", True)

    @pytest.mark.parametrize(
        ("find", "replace"),
        [
            (r"/test_\w+", "/no_such_database"),
            (r"//postgres@", "//no_such_role@"),
            (r"host=[^&]+", "host=/no/such/directory"),
            (r"\?.*", "?host=127.0.0.1&port=1"),
        ],
    )
    async def test_unreachable(self, database_url: str, find: str, replace: str) -> None:
        layer = PostgresLayer(re.sub(find, replace, database_url))
        with pytest.raises(DatabaseError) as raised:
            await layer.open()
        assert raised.value.__cause__ is not None
        if "host" in replace:
            assert isinstance(raised.value, DatabaseUnavailable)

    async def test_reading_goes_on_where_listening_cannot(self, database_url: str) -> None:
        settings = Settings(
            database_url=database_url,
            listen_url="postgresql://?host=127.0.0.1&port=1",
            poll_interval=0.05,
        )
        async with PostgresLayer(settings) as layer, layer.subscribe("room") as stream:
            await layer.send("room", {"n": 1})
            execute(database_url, "select pgchannels.seal()")  # as another node would
            assert numbers(await take(stream, 1)) == [1]
            assert not layer.is_listening

    async def test_no_url(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.delenv("PGCHANNELS_DATABASE_URL", raising=False)
        with pytest.raises(ConfigurationError, match="PGCHANNELS_DATABASE_URL"):
            await PostgresLayer().open()

    async def test_opens_and_closes_any_number_of_times(self, database_url: str) -> None:
        layer = PostgresLayer(database_url)
        await layer.close()
        for n in range(3):
            await layer.open()
            await layer.open()
            await layer.send("room", {"n": n})
            await layer.close()
            await layer.close()
        async with layer, layer.subscribe("room", after=BEGINNING) as stream:
            assert numbers(await take(stream, 3)) == [0, 1, 2]

    async def test_opening_at_once_makes_one_node(self, database_url: str) -> None:
        layer = PostgresLayer(database_url)
        await asyncio.gather(*(layer.open() for _ in range(5)))
        await eventually(lambda: layer.is_listening)
        try:
            listeners = value(
                database_url,
                "select count(*) from pg_stat_activity where datname = current_database()"
                " and application_name = 'pgchannels listener'",
            )
            assert listeners == 1
        finally:
            await layer.close()

    async def test_closing_leaves_no_connection(self, database_url: str) -> None:
        async with PostgresLayer(database_url) as layer:
            await layer.send("room", {})
            await eventually(lambda: layer.is_listening)
        assert not layer.is_listening
        await eventually(
            lambda: value(
                database_url,
                "select count(*) = 0 from pg_stat_activity"
                " where datname = current_database() and application_name like 'pgchannels%'",
            )
        )

    @pytest.mark.parametrize(
        "use",
        [
            lambda layer: layer.send("room", {}),
            lambda layer: layer.group_send("room", {}),
            lambda layer: layer.history("room"),
        ],
    )
    async def test_use_when_closed(self, use: Callable[[PostgresLayer], Any]) -> None:
        layer = PostgresLayer("postgresql://")
        with pytest.raises(ChannelLayerClosed, match="async with"):
            await use(layer)

    async def test_subscribing_when_closed(self) -> None:
        layer = PostgresLayer("postgresql://")
        with pytest.raises(ChannelLayerClosed):
            layer.subscribe("room")
        layer.wake()  # never raises


class TestSending:
    @pytest.mark.parametrize("channel", ["", "a b", "a#", "x" * 201, None, 5])
    async def test_bad_channels(self, layer: PostgresLayer, channel: Any) -> None:
        with pytest.raises(InvalidChannel):
            await layer.send(channel, {})
        with pytest.raises(InvalidChannel):
            layer.subscribe(channel)
        with pytest.raises(InvalidChannel):
            await layer.history(channel)

    async def test_bad_payloads(self, layer: PostgresLayer) -> None:
        with pytest.raises(InvalidPayload):
            await layer.send("room", [1])
        with pytest.raises(MessageTooLarge):
            await layer.send("room", {"text": "x" * 1024 * 1024})
        with pytest.raises(InvalidMessage):
            await layer.send("room", {}, ttl=0)
        assert (await layer.history("room")).position.id == 0

    async def test_what_python_accepts_the_database_accepts(self, layer: PostgresLayer) -> None:
        payload = {"text": '\0\\ud800 \\ "\n\u2028 🚀', "\0": [1e308, 2**64 - 1, -(2**63)]}
        channel = "a/b%20c:é日🚀'\"\\"
        async with layer.subscribe(channel) as stream:
            await layer.send(channel, payload)
            (message,) = await take(stream, 1)
        assert dict(message) == payload
        assert message.channel == channel

    async def test_the_largest_message(self, database_url: str) -> None:
        settings = Settings(database_url=database_url, max_message_size=16 * 1024 * 1024)
        async with PostgresLayer(settings) as layer, layer.subscribe("room") as stream:
            payload = {"text": "x" * (settings.max_message_size - len('{"text":""}'))}
            await layer.send("room", payload)
            (message,) = await take(stream, 1)
            assert message.size == settings.max_message_size

    async def test_one_task_is_ordered(self, layer: PostgresLayer) -> None:
        async with layer.subscribe("a", "b") as stream:
            for n in range(20):
                await layer.send("ab"[n % 2], {"n": n})
            messages = await take(stream, 20)
        assert numbers(messages) == list(range(20))
        assert [message.id for message in messages] == list(range(1, 21))
        assert {message.position.epoch for message in messages} == {1}

    async def test_concurrent_sends_share_transactions(
        self, layer: PostgresLayer, database_url: str
    ) -> None:
        messages = await fill(layer, "room", 1000)
        assert numbers(messages) == list(range(1000))
        with psycopg.connect(database_url) as connection:
            # What is published in one statement has one transaction id, and so shares a batch.
            row = connection.execute("select count(*) from pgchannels.batches").fetchone()
        assert row is not None
        assert 1 <= row[0] <= 20

    async def test_one_refused_among_many_fails_alone(self, database_url: str) -> None:
        settings = Settings(database_url=database_url)
        store = Store(settings)
        await store.open()
        published: list[None] = []
        publisher = Publisher(settings, store, lambda: published.append(None))
        bad = {
            10: Outgoing("not valid", "{}"),
            20: Outgoing("room", "[1]"),
            30: Outgoing("room", "{"),
            40: Outgoing("room", '{"a": "\\ud800"}'),
            50: Outgoing("room", '{"a": "\0"}'),
            60: Outgoing("room", '{"a": "' + chr(0xD800) + '"}'),
            70: Outgoing("room", "{}", timedelta.max),
        }
        results = await asyncio.gather(
            *(publisher.publish(bad.get(n, Outgoing("room", f'{{"n":{n}}}'))) for n in range(100)),
            return_exceptions=True,
        )
        await publisher.close()
        await store.close()
        failed = {n: result for n, result in enumerate(results) if not isinstance(result, Receipt)}
        assert failed.keys() == bad.keys()
        for error in failed.values():
            assert isinstance(error, DatabaseError)
            assert not isinstance(error, DatabaseUnavailable)
        assert published
        assert value(database_url, "select count(*) from pgchannels.outbox") == 93
        order = value(
            database_url,
            "select array_agg((payload->>'n')::int order by xid, id) from pgchannels.outbox",
        )
        assert order == sorted(order)

    async def test_cancelled_before_its_insert_it_is_not_published(
        self, layer: PostgresLayer, database_url: str
    ) -> None:
        with psycopg.connect(database_url) as lock:
            lock.execute("lock table pgchannels.outbox in share mode")
            first = asyncio.create_task(layer.send("room", {"n": 0}))
            await eventually(lambda: is_waiting(database_url))
            second = asyncio.create_task(layer.send("room", {"n": 1}))
            third = asyncio.create_task(layer.send("room", {"n": 2}))
            await asyncio.sleep(0)
            second.cancel()
            lock.rollback()
        await asyncio.gather(first, third)
        with pytest.raises(asyncio.CancelledError):
            await second
        async with layer.subscribe("room", after=BEGINNING) as stream:
            assert numbers(await take(stream, 2)) == [0, 2]

    async def test_cancelled_during_its_insert_it_takes_no_other_with_it(
        self, layer: PostgresLayer, database_url: str
    ) -> None:
        with psycopg.connect(database_url) as lock:
            lock.execute("lock table pgchannels.outbox in share mode")
            blocked = asyncio.create_task(layer.send("room", {"n": 0}))
            await eventually(lambda: is_waiting(database_url))
            tasks = [asyncio.create_task(layer.send("room", {"n": n})) for n in (1, 2)]
            await asyncio.sleep(0)
            blocked.cancel()
            lock.rollback()
        await asyncio.gather(*tasks)
        async with layer.subscribe("room", after=BEGINNING) as stream:
            messages = await take(stream, 2)
            assert numbers(messages)[-1] in (1, 2)

    async def test_closing_loses_nothing_that_was_sent(self, database_url: str) -> None:
        layer = PostgresLayer(database_url)
        await layer.open()
        tasks = [asyncio.create_task(layer.send("room", {"n": n})) for n in range(500)]
        await asyncio.sleep(0)
        await layer.close()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        sent = [n for n, result in enumerate(results) if isinstance(result, Receipt)]
        assert sent
        for result in results:
            assert isinstance(result, (Receipt, ChannelLayerClosed))
        async with layer, layer.subscribe("room", after=BEGINNING) as stream:
            assert numbers(await take(stream, len(sent))) == sent

    async def test_from_psql(self, layer: PostgresLayer, database_url: str) -> None:
        async with layer.subscribe("room") as stream:
            execute(database_url, "select pgchannels.publish('room', '{\"n\": 1}')")
            (message,) = await take(stream, 1)
        assert message.payload == '{"n": 1}'

    async def test_what_is_rolled_back_was_never_there(
        self, layer: PostgresLayer, database_url: str
    ) -> None:
        connection = await asyncpg.connect(database_url)
        try:
            async with layer.subscribe("room") as stream:
                transaction = connection.transaction()
                await transaction.start()
                await connection.execute("select pgchannels.publish('room', '{\"n\": 1}')")
                await transaction.rollback()
                await connection.execute("select pgchannels.publish('room', '{\"n\": 2}')")
                (message,) = await take(stream, 1)
        finally:
            await connection.close()
        assert (message["n"], message.id) == (2, 1)


def is_waiting(url: str) -> bool:
    waiting: bool = value(
        url,
        "select exists (select from pg_stat_activity where wait_event_type = 'Lock'"
        " and datname = current_database() and query like '%outbox%')",
    )
    return waiting


class TestSubscribing:
    async def test_from_now_on(self, layer: PostgresLayer) -> None:
        await fill(layer, "room", 3)
        async with layer.subscribe("room") as stream:
            await layer.send("room", {"n": 99})
            assert numbers(await take(stream, 1)) == [99]

    @pytest.mark.parametrize("after", ["0", BEGINNING])
    async def test_from_the_beginning(self, layer: PostgresLayer, after: Position | str) -> None:
        await fill(layer, "room", 3)
        async with layer.subscribe("room", after=after) as stream:
            assert numbers(await take(stream, 3)) == [0, 1, 2]
            await layer.send("room", {"n": 3})
            assert numbers(await take(stream, 1)) == [3]
            assert stream.truncated is False

    async def test_after_a_position(self, layer: PostgresLayer) -> None:
        messages = await fill(layer, "room", 10)
        for after in (messages[3].position, str(messages[3].position)):
            async with layer.subscribe("room", after=after) as stream:
                assert numbers(await take(stream, 6)) == list(range(4, 10))
        async with layer.subscribe("room", after=messages[-1].position) as stream:
            await layer.send("room", {"n": 10})
            assert numbers(await take(stream, 1)) == [10]

    async def test_several_channels_have_one_order(self, layer: PostgresLayer) -> None:
        channels = [f"room:{n}" for n in range(5)]
        async with layer.subscribe(*channels) as live:
            await asyncio.gather(*(layer.send(channels[n % 5], {"n": n}) for n in range(200)))
            seen = await take(live, 200)
        assert [message.id for message in seen] == list(range(1, 201))
        async with layer.subscribe(*reversed(channels), after="0") as replayed:
            assert await take(replayed, 200) == seen

    async def test_other_channels_are_not_heard(self, layer: PostgresLayer) -> None:
        async with layer.subscribe("a", "c", after="0") as stream:
            for n, channel in enumerate("abcabc"):
                await layer.send(channel, {"n": n})
            assert numbers(await take(stream, 4)) == [0, 2, 3, 5]

    async def test_join_and_leave_while_iterating(self, layer: PostgresLayer) -> None:
        await fill(layer, "b", 5)
        async with layer.subscribe("a") as stream:
            await layer.send("a", {"n": 100})
            assert numbers(await take(stream, 1)) == [100]
            await stream.join("b", after="0")
            await layer.send("b", {"n": 5})
            assert numbers(await take(stream, 6)) == list(range(6))
            stream.leave("b")
            stream.leave("never joined")
            await layer.send("b", {"n": 6})
            await layer.send("a", {"n": 101})
            assert numbers(await take(stream, 1)) == [101]

    async def test_leaving_drops_what_waits(self, layer: PostgresLayer) -> None:
        async with layer.subscribe("a", "b") as stream:
            for n in range(10):
                await layer.send("ab"[n % 2], {"n": n})
            await eventually(lambda: stream.pending == 10)
            assert numbers(await take(stream, 1)) == [0]
            stream.leave("a")
            assert numbers(await take(stream, 5)) == [1, 3, 5, 7, 9]

    async def test_joining_again_reads_again(self, layer: PostgresLayer) -> None:
        await fill(layer, "a", 3)
        async with layer.subscribe("a", after="0") as stream:
            assert numbers(await take(stream, 3)) == [0, 1, 2]
            await stream.join("a", after="0")
            assert numbers(await take(stream, 3)) == [0, 1, 2]

    async def test_joining_what_is_read_already_drops_nothing(self, layer: PostgresLayer) -> None:
        async with layer.subscribe("a", "b") as stream:
            for n in range(6):
                await layer.send("ab"[n % 2], {"n": n})
            await eventually(lambda: stream.pending == 6)
            await stream.join("a")
            assert numbers(await take(stream, 6)) == list(range(6))
            await stream.join("a")
            await layer.send("a", {"n": 6})
            assert numbers(await take(stream, 1)) == [6]

    async def test_joining_again_after_a_position_begins_again_there(
        self, layer: PostgresLayer
    ) -> None:
        async with layer.subscribe("a") as stream:
            await asyncio.gather(*(layer.send("a", {"n": n}) for n in range(5)))
            await eventually(lambda: stream.pending == 5)
            await stream.join("a", after="1-2")
            assert numbers(await take(stream, 3)) == [2, 3, 4]
            await layer.send("a", {"n": 5})
            assert numbers(await take(stream, 1)) == [5]  # none of what waited comes as well

    async def test_joining_before_entering(self, layer: PostgresLayer) -> None:
        stream = layer.subscribe("room")
        for after in (None, "0"):
            with pytest.raises(RuntimeError, match="async with"):
                await stream.join("other", after=after)
        assert not stream.reads("other")

    async def test_without_channels_it_waits_for_some(self, layer: PostgresLayer) -> None:
        async with layer.subscribe() as stream:
            waiting = asyncio.create_task(take(stream, 1))
            await asyncio.sleep(0)
            await stream.join("late")
            await layer.send("late", {"n": 1})
            assert numbers(await waiting) == [1]

    @pytest.mark.parametrize("after", ["", "1", "x", "1-", 5, b"0"])
    async def test_no_positions(self, layer: PostgresLayer, after: Any) -> None:
        with pytest.raises(InvalidPosition):
            layer.subscribe("room", after=after)
        with pytest.raises(InvalidPosition):
            await layer.history("room", after=after)
        with pytest.raises(InvalidPosition):
            await layer.history("room", before=after)

    @pytest.mark.parametrize("position", ["1-4", "2-1", "2-0", f"1-{2**63 - 1}"])
    async def test_unknown_positions(self, layer: PostgresLayer, position: str) -> None:
        await fill(layer, "room", 3)
        with pytest.raises(UnknownPosition):
            async with layer.subscribe("room", after=position):
                pass
        async with layer.subscribe("other") as stream:
            with pytest.raises(UnknownPosition):
                await stream.join("room", after=position)
            await layer.send("room", {"n": 3})
            await layer.send("other", {"n": 4})
            assert numbers(await take(stream, 1)) == [4]  # and it was not joined
        with pytest.raises(UnknownPosition):
            await layer.history("room", before=Position(7, 1))

    async def test_truncated(self, layer: PostgresLayer, database_url: str) -> None:
        messages = await fill(layer, "room", 10)
        execute(
            database_url,
            "update pgchannels.log set floor = 6",
            "delete from pgchannels.messages where id <= 3",  # the rest has yet to be removed
        )
        for after, truncated in ((2, True), (4, True), (5, False)):
            # Message n has the id n + 1.
            async with layer.subscribe("room", after=messages[after].position) as stream:
                assert numbers(await take(stream, 4)) == [6, 7, 8, 9]
                assert stream.truncated is truncated
                stream.truncated = False
                await layer.send("room", {"n": 9})
                await take(stream, 1)
                assert stream.truncated is False
            page = await layer.history("room", after=messages[after].position)
            assert page.truncated is truncated
            assert numbers(page.messages)[:4] == [6, 7, 8, 9]
        page = await layer.history("room", order="desc", limit=1000)
        assert numbers(page.messages)[-1] == 6
        assert page.truncated is False
        async with layer.subscribe("room", after="0") as stream:
            assert numbers(await take(stream, 1)) == [6]
            assert stream.truncated is False  # the beginning is that of what is retained

    async def test_truncated_with_nothing_left_to_read(
        self, layer: PostgresLayer, database_url: str
    ) -> None:
        messages = await fill(layer, "room", 5)
        execute(
            database_url,
            "update pgchannels.log set floor = 5",
            "delete from pgchannels.messages",
        )
        async with layer.subscribe("room", after=messages[2].position) as stream:
            assert await asyncio.wait_for(stream.batch(), 5) == []
            assert stream.truncated is True
            # It is told once, whether it has been reset or not.
            waiting = asyncio.create_task(stream.batch())
            await layer.send("room", {"n": 5})
            assert numbers(await asyncio.wait_for(waiting, 10)) == [5]
            assert stream.truncated is True
        async with layer.subscribe("room", after=messages[2].position) as stream:
            waiting_for_one = asyncio.create_task(take(stream, 2))
            await layer.send("room", {"n": 6})
            assert numbers(await waiting_for_one) == [5, 6]  # iteration passes over what is empty
            assert stream.truncated is True
        async with layer.subscribe("room", after="1-5") as stream:
            assert numbers(await take(stream, 2)) == [5, 6]
            assert stream.truncated is False

    async def test_expired_messages_are_gone(self, layer: PostgresLayer, database_url: str) -> None:
        async def only_lasting() -> bool:
            return numbers((await layer.history("room")).messages) == [1, 3]

        await layer.send("room", {"n": 0}, ttl=0.001)
        await layer.send("room", {"n": 1}, ttl=3600)
        await layer.group_send("room", {"n": 2}, ttl=timedelta(microseconds=1))
        await layer.send("room", {"n": 3})
        await eventually(lambda: value(database_url, "select max(id) = 4 from pgchannels.messages"))
        gone: bool = await eventually(only_lasting)
        assert gone
        assert numbers((await layer.history("room", order="desc")).messages) == [3, 1]
        async with layer.subscribe("room", after="0") as stream:
            assert numbers(await take(stream, 2)) == [1, 3]

    async def test_a_slow_reader_is_sent_back_to_the_log(self, database_url: str) -> None:
        settings = Settings(database_url=database_url, buffer_size=10, page_size=7)
        async with PostgresLayer(settings) as layer, layer.subscribe("room", "b") as stream:
            await asyncio.gather(*(layer.send("room", {"n": n}) for n in range(100)))
            await eventually(lambda: stream.state is State.REPLAYING)
            assert stream.pending <= 10
            assert numbers(await take(stream, 100)) == list(range(100))
            assert stream.pending <= 10
            assert stream.truncated is False
            await layer.send("b", {"n": 100})
            assert numbers(await take(stream, 1)) == [100]


class TestHistory:
    @pytest.fixture
    async def messages(self, layer: PostgresLayer) -> list[Message]:
        """120 of room, with others between them."""
        async with layer.subscribe("room") as stream:
            for n in range(120):
                if n % 40 == 0:
                    await layer.send("other", {"n": n})
                await layer.send("room", {"n": n})
            return await take(stream, 120)

    @pytest.mark.parametrize("limit", [1, 7, 40, 60, 119, 120, 121, 1000])
    async def test_paging_both_ways(
        self, layer: PostgresLayer, messages: list[Message], limit: int
    ) -> None:
        pages, after = [], None
        while True:
            page = await layer.history("room", after=after, limit=limit)
            pages.append(numbers(page.messages))
            if (after := page.next) is None:
                break
        assert [n for found in pages for n in found] == list(range(120))
        assert [len(found) for found in pages[:-1]] == [limit] * (len(pages) - 1)
        assert pages[-1]  # no empty page at the end, also where the last one is exactly full
        pages, before = [], None
        while True:
            page = await layer.history("room", before=before, order="desc", limit=limit)
            pages.append(numbers(page.messages))
            if (before := page.next) is None:
                break
        assert [n for found in pages for n in found] == list(range(119, -1, -1))
        assert pages[-1]

    async def test_between(self, layer: PostgresLayer, messages: list[Message]) -> None:
        low, high = messages[10].position, messages[20].position
        page = await layer.history("room", after=low, before=high)
        assert numbers(page.messages) == list(range(11, 20))
        assert page.next is None
        page = await layer.history("room", after=low, before=str(high), limit=9)
        assert (numbers(page.messages), page.next) == (list(range(11, 20)), None)
        page = await layer.history("room", after=str(low), before=high, limit=5)
        assert numbers(page.messages) == list(range(11, 16))
        assert page.next == messages[15].position
        page = await layer.history("room", after=low, before=high, order="desc", limit=5)
        assert numbers(page.messages) == list(range(19, 14, -1))
        assert page.next == messages[15].position
        page = await layer.history("room", after=low, before=page.next, order="desc", limit=5)
        assert (numbers(page.messages), page.next) == ([14, 13, 12, 11], None)
        for order in ORDERS:
            page = await layer.history("room", after=high, before=low, order=order)
            assert (page.messages, page.next) == ([], None)
            page = await layer.history("room", before="0", order=order)
            assert (page.messages, page.next) == ([], None)

    async def test_a_channel_without_messages(
        self, layer: PostgresLayer, messages: list[Message]
    ) -> None:
        for order in ORDERS:
            page = await layer.history("nobody", order=order)
            assert (page.messages, page.next, page.truncated) == ([], None, False)
            assert page.position == messages[-1].position

    async def test_before_what_is_retained(self, layer: PostgresLayer, database_url: str) -> None:
        messages = await fill(layer, "room", 6)
        execute(
            database_url,
            "update pgchannels.log set floor = 3",
            "delete from pgchannels.messages where id <= 3",
        )
        for high, found, truncated in (
            (1, [], True),
            (2, [], True),
            (3, [], False),
            (4, [3], False),
        ):
            # Message n has the id n + 1.
            page = await layer.history("room", before=messages[high].position, order="desc")
            assert numbers(page.messages) == found
            assert (page.next, page.truncated) == (None, truncated)

    async def test_live_from_where_it_ended(self, layer: PostgresLayer) -> None:
        async def sealed() -> bool:
            return (await layer.history("room")).position.id == 4

        await fill(layer, "room", 3)
        await layer.send("other", {})
        ready: bool = await eventually(sealed)
        assert ready
        page = await layer.history("room")
        assert page.position.id == 4
        await layer.send("room", {"n": 3})
        async with layer.subscribe("room", after=page.position) as stream:
            assert numbers(await take(stream, 1)) == [3]

    @pytest.mark.parametrize("limit", [0, -1, 1001])
    async def test_limits(self, layer: PostgresLayer, limit: int) -> None:
        with pytest.raises(ValueError, match="limit"):
            await layer.history("room", limit=limit)

    async def test_orders(self, layer: PostgresLayer) -> None:
        with pytest.raises(ValueError, match="order"):
            await layer.history("room", order="up")  # type: ignore[arg-type]

    @pytest.mark.parametrize("order", ["asc", "desc"])
    async def test_large_messages_make_short_pages(self, database_url: str, order: Any) -> None:
        settings = Settings(database_url=database_url, page_bytes=1024)
        async with PostgresLayer(settings) as layer:
            async with layer.subscribe("room") as stream:
                for n in range(10):
                    await layer.send("room", {"n": n, "text": "x" * (400 if n != 5 else 5000)})
                await take(stream, 10)  # they are read in short pages too
            found: list[int] = []
            cursor: dict[str, Any] = {}
            while True:
                page = await layer.history("room", order=order, **cursor)
                assert 1 <= len(page.messages) <= 3
                found += numbers(page.messages)
                if page.next is None:
                    break
                cursor = {"after" if order == "asc" else "before": page.next}
            assert found == (list(range(10)) if order == "asc" else list(range(9, -1, -1)))


class TestClosing:
    async def test_ends_iteration(self, database_url: str) -> None:
        layer = PostgresLayer(database_url)
        await layer.open()

        async def read() -> list[int]:
            async with layer.subscribe("room", after="0") as stream:
                return [message["n"] async for message in stream]

        tasks = [asyncio.create_task(read()) for _ in range(3)]
        await fill(layer, "room", 3)
        await layer.close()
        for found in await asyncio.gather(*tasks):
            assert found == [0, 1, 2][: len(found)]

    async def test_batch_raises(self, database_url: str) -> None:
        layer = PostgresLayer(database_url)
        await layer.open()
        async with layer.subscribe("room") as stream:
            waiting = asyncio.create_task(stream.batch())
            await asyncio.sleep(0)
            await layer.close()
            with pytest.raises(ChannelLayerClosed, match="layer"):
                await waiting
            with pytest.raises(ChannelLayerClosed):
                await stream.batch()
            with pytest.raises(ChannelLayerClosed):
                await stream.join("other")
            with pytest.raises(StopAsyncIteration):
                await anext(stream)

    @pytest.mark.parametrize("after", [None, "0", "1-1"])
    async def test_a_stream_that_is_entered_afterwards(
        self, database_url: str, after: str | None
    ) -> None:
        layer = PostgresLayer(database_url)
        await layer.open()
        await fill(layer, "room", 1)
        stream = layer.subscribe("room", after=after)
        await layer.close()
        with pytest.raises(ChannelLayerClosed):
            async with stream:
                pass
        async with layer:
            with pytest.raises(ChannelLayerClosed):
                async with stream:
                    pass

    async def test_cancelled_it_goes_on_by_itself(self, database_url: str) -> None:
        layer = PostgresLayer(database_url)
        await layer.open()
        await eventually(lambda: layer.is_listening)
        with psycopg.connect(database_url) as lock:
            lock.execute("lock table pgchannels.outbox in share mode")
            sending = asyncio.create_task(layer.send("room", {"n": 0}))
            await eventually(lambda: is_waiting(database_url))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(layer.close(), 0.05)
            again = asyncio.create_task(layer.close())
            opening = asyncio.create_task(layer.open())
            done, _ = await asyncio.wait([again, opening], timeout=0.2)
            assert not done  # until the first has finished
            opening.cancel()
            lock.rollback()
        await asyncio.wait_for(again, 10)
        await sending
        left = {task.get_name() for task in asyncio.all_tasks()}
        assert not [name for name in left if name.startswith("pgchannels")]
        await eventually(
            lambda: value(
                database_url,
                "select count(*) = 0 from pg_stat_activity"
                " where datname = current_database() and application_name like 'pgchannels%'",
            )
        )
        async with layer, layer.subscribe("room", after=BEGINNING) as stream:
            await layer.send("room", {"n": 1})
            assert numbers(await take(stream, 2)) == [0, 1]

    async def test_a_stream_alone(self, layer: PostgresLayer) -> None:
        async with layer.subscribe("room") as stream:
            pass
        with pytest.raises(ChannelLayerClosed):
            await stream.batch()
        await layer.send("room", {})  # the layer goes on


# What a restored backup, and a standby promoted too early, leave of a log of five messages.
REWRITTEN = {
    "went back": (
        "delete from pgchannels.messages where id > 2",
        "delete from pgchannels.batches where last_id > 2",
    ),
    "was overtaken": (
        # As one transaction: other nodes were back sooner, and gave the ids to other messages.
        """delete from pgchannels.messages where id > 2;
           delete from pgchannels.batches where last_id > 2;
           select pgchannels.publish('room', '{}') from generate_series(1, 10);
           select pgchannels.seal()""",
    ),
    "another epoch": ("update pgchannels.batches set epoch = 2 where last_id = 5",),
}


class TestRewritten:
    @pytest.mark.parametrize("how", REWRITTEN)
    async def test_ends_streams(
        self, database_url: str, caplog: pytest.LogCaptureFixture, how: str
    ) -> None:
        poll_interval = 0.3
        settings = Settings(database_url=database_url, poll_interval=poll_interval)
        async with (
            PostgresLayer(settings) as layer,
            layer.subscribe("room") as reading,
            layer.subscribe("quiet") as quiet,
        ):
            await eventually(lambda: layer.is_listening)
            await fill(layer, "room", 2)
            messages = await fill(layer, "room", 3)
            assert len(await take(reading, 5)) == 5
            assert caplog.records == []
            waiting = [asyncio.create_task(stream.batch()) for stream in (reading, quiet)]
            execute(database_url, *REWRITTEN[how])
            _, late = await asyncio.wait(waiting, timeout=poll_interval + 2)
            assert not late
            for each in waiting:
                assert isinstance(each.exception(), UnknownPosition)
            with pytest.raises(UnknownPosition):
                await anext(reading)
            logged = [r for r in caplog.records if r.levelno >= logging.ERROR]
            assert len(logged) == 1
            assert logged[0].name == "pgchannels.hub"
            assert "rewritten" in logged[0].getMessage()
            with pytest.raises(UnknownPosition):
                async with layer.subscribe("room", after=messages[-1].position):
                    pass
            async with layer.subscribe("room") as stream:
                await layer.send("room", {"n": 9})
                (message,) = await take(stream, 1)
            assert message["n"] == 9
            heads = {"went back": 2, "was overtaken": 12, "another epoch": 5}
            assert message.position == Position(2, heads[how] + 1)
            # It is over: streams live on, and nothing more is said.
            async with layer.subscribe("room", after=message.position) as stream:
                await layer.send("room", {"n": 10})
                assert numbers(await take(stream, 1)) == [10]
            assert [r for r in caplog.records if r.levelno >= logging.ERROR] == logged


class TestSchemas:
    async def test_two_do_not_hear_each_other(self, layer: PostgresLayer) -> None:
        assert layer.settings.database_url is not None
        # Of the longest name, so that nothing that is made from it may be too long.
        settings = Settings(database_url=layer.settings.database_url, schema_name="s" * 40)
        await asyncio.to_thread(upgrade, settings)
        async with (
            PostgresLayer(settings) as other,
            layer.subscribe("room") as ours,
            other.subscribe("room") as theirs,
        ):
            await eventually(lambda: layer.is_listening and other.is_listening)
            for n in range(5):
                await layer.send("room", {"n": n})
                await other.send("room", {"n": -n})
            assert numbers(await take(ours, 5)) == [0, 1, 2, 3, 4]
            assert numbers(await take(theirs, 5)) == [0, -1, -2, -3, -4]
            assert ours.pending == theirs.pending == 0


@pytest.mark.parametrize(
    "setting",
    [
        "default_transaction_isolation = 'serializable'",
        "default_transaction_isolation = 'repeatable read'",
        "default_transaction_read_only = on",
        "synchronous_commit = off",
        "timezone = 'Pacific/Chatham'",
        "datestyle = 'German'",
        "intervalstyle = 'iso_8601'",
        "search_path = ''",
        "plan_cache_mode = force_generic_plan",
        "jit_above_cost = 0",
        "row_security = off",
        "client_encoding = 'LATIN1'",
        "bytea_output = 'escape'",
        "extra_float_digits = -10",
        "enable_partition_pruning = off",
    ],
)
async def test_whatever_the_servers_defaults(database_url: str, setting: str) -> None:
    name = value(database_url, "select current_database()")
    execute(database_url, f'alter database "{name}" set {setting}')
    async with PostgresLayer(database_url) as layer, layer.subscribe("room") as stream:
        await eventually(lambda: layer.is_listening)
        await layer.send("room", {"n": 1, "text": "é日🚀"}, ttl=3600)
        await layer.send("room", {"n": 2})
        messages = await take(stream, 2)
        assert numbers(messages) == [1, 2]
        assert messages[0]["text"] == "é日🚀"
        page = await layer.history("room", order="desc")
        assert numbers(page.messages) == [2, 1]
        age = messages[1].created_at - messages[0].created_at
        assert timedelta(0) <= age < timedelta(minutes=1)
