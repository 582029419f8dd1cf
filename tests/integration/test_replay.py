"""Replay from a point in time and by filters: what the contract's suite cannot see from outside."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from itertools import chain
from typing import Any, Literal

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg.rows import scalar_row

from pgchannels import (
    ChannelLayer,
    DatabaseUnavailable,
    MemoryLayer,
    Message,
    PostgresLayer,
    Settings,
)
from pgchannels.sql import load_queries
from tests.support.eventually import eventually
from tests.support.tcp_proxy import TcpProxy

Connection = psycopg.Connection[Any]
Order = Literal["asc", "desc"]

QUERY = load_queries("pgchannels")["position_before"]


@pytest.fixture
async def layer(database_url: str) -> AsyncIterator[PostgresLayer]:
    async with PostgresLayer(database_url) as layer:
        yield layer


# Not asynchronous: the first database that is asked for is migrated in an event loop of its own.
@pytest.fixture(params=["memory", "postgres"])
def unopened(request: pytest.FixtureRequest) -> ChannelLayer:
    if request.param == "memory":
        return MemoryLayer(Settings(page_bytes=1024))
    url = request.getfixturevalue("database_url")
    return PostgresLayer(Settings(database_url=url, page_bytes=1024))


@pytest.fixture
async def small_pages(unopened: ChannelLayer) -> AsyncIterator[ChannelLayer]:
    """A layer that reads a few messages at a time."""
    async with unopened:
        yield unopened


def connect(url: str) -> Connection:
    return psycopg.connect(url, autocommit=True, row_factory=scalar_row)


async def fill(layer: ChannelLayer, channel: str, payloads: list[dict[str, Any]]) -> list[Message]:
    async with layer.subscribe(channel) as stream, asyncio.timeout(30):
        await asyncio.gather(*(layer.send(channel, payload) for payload in payloads))
        return [await anext(stream) for _ in payloads]


async def pages(
    layer: ChannelLayer, order: Order = "asc", **options: Any
) -> AsyncIterator[list[int]]:
    """What ``n`` is in each page."""
    while True:
        page = await layer.history("room", order=order, **options)
        assert not page.truncated
        yield [message["n"] for message in page.messages]
        if page.next is None:
            return
        options["after" if order == "asc" else "before"] = page.next
        if order == "asc":
            options.pop("since", None)


class TestPositions:
    """Where the log had come to, by the clock of the database."""

    @pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
    @pytest.mark.parametrize("since", ["2026-01-01 10:00", "2020-01-01", "2030-01-01"])
    def test_it_is_found_on_the_index(self, database_url: str, mode: str, since: str) -> None:
        with connect(database_url) as connection:
            connection.execute(
                "insert into pgchannels.batches (last_id, snapshot, sealed_at)"
                " select 10 * i, pg_current_snapshot(),"
                "        timestamptz '2026-01-01' + i * interval '1 s'"
                "   from generate_series(1, 100000) i"
            )
            connection.execute("analyze pgchannels.batches")
            connection.execute(f"set plan_cache_mode = {mode}")
            connection.execute(f"prepare q as {QUERY}")
            explained: Any = connection.execute(
                f"explain (analyze, buffers, format json) execute q('{since}')"
            ).fetchone()
        nodes, found = [explained[0]["Plan"]], []
        while nodes:
            node = nodes.pop()
            nodes += node.get("Plans", [])
            if node.get("Relation Name") == "batches":
                found.append(node)
        assert "batches_sealed_at" in [node.get("Index Name") for node in found]
        assert all(node["Actual Rows"] * node["Actual Loops"] <= 1 for node in found)
        assert "Seq Scan" not in [node["Node Type"] for node in found]
        assert sum(node["Shared Hit Blocks"] + node["Shared Read Blocks"] for node in found) < 30

    async def test_who_committed_late_is_there(
        self, layer: PostgresLayer, database_url: str
    ) -> None:
        async with layer.subscribe("room") as stream, asyncio.timeout(10):
            with psycopg.connect(database_url) as late:
                late.execute("select pgchannels.publish('room', '{\"n\": 1}')")
                await layer.send("room", {"n": 2})
                second = await anext(stream)
                late.commit()
            layer.wake()
            sent = [second, await anext(stream)]
            await layer.send("room", {"n": 3})
            sent.append(await anext(stream))
        assert [message["n"] for message in sent] == [2, 1, 3]
        assert sent[1].created_at < second.created_at
        # Created before it, but in the log after it.
        for since in (message.created_at for message in sent):
            page = await layer.history("room", since=since)
            assert {m for m in sent if m.created_at >= since} <= set(page.messages)
        assert [m async for m in pages(layer, since=second.created_at)] == [[2, 1, 3]]
        assert [m async for m in pages(layer, since=sent[2].created_at)] == [[3]]

    async def test_what_is_gone(self, layer: PostgresLayer, database_url: str) -> None:
        messages = [(await fill(layer, "room", [{"n": n}]))[0] for n in range(5)]
        long_ago = datetime(2020, 1, 1, tzinfo=UTC)

        async def seen(since: datetime) -> tuple[list[int], bool]:
            page = await layer.history("room", since=since)
            async with layer.subscribe("room", since=since) as stream, asyncio.timeout(10):
                got: list[int] = []
                while len(got) < len(page.messages) or stream.truncated != page.truncated:
                    got += [message["n"] for message in await stream.batch()]
            assert got == [message["n"] for message in page.messages]
            return got, page.truncated

        with connect(database_url) as connection:
            assert await seen(long_ago) == ([0, 1, 2, 3, 4], False)
            # Batches are known of that are older than what is retained.
            connection.execute("update pgchannels.log set floor = 2")
            assert await seen(messages[0].created_at) == ([2, 3, 4], True)
            assert await seen(messages[1].created_at) == ([2, 3, 4], True)
            assert await seen(messages[2].created_at) == ([2, 3, 4], False)
            assert await seen(messages[4].created_at) == ([4], False)
            # None are.
            connection.execute("delete from pgchannels.batches where last_id <= 3")
            assert await seen(long_ago) == ([2, 3, 4], True)
            assert await seen(messages[4].created_at) == ([4], False)
            connection.execute("update pgchannels.log set floor = 0")
            assert await seen(long_ago) == ([0, 1, 2, 3, 4], False)

    async def test_while_the_database_is_away(self, database_url: str) -> None:
        since = datetime.now(UTC)
        async with TcpProxy(database_url) as proxy, PostgresLayer(proxy.url) as layer:
            await proxy.cut(refuse=True)
            with pytest.raises(DatabaseUnavailable):
                await layer.history("room", since=since)
            with pytest.raises(DatabaseUnavailable):
                async with layer.subscribe("room", since=since):
                    pass
            proxy.resume()
            async with layer.subscribe("room", since=since) as stream, asyncio.timeout(20):
                await layer.send("room", {"n": 1})
                assert (await anext(stream))["n"] == 1

    async def test_by_the_clock_of_a_layer_in_memory(self) -> None:
        now = start = datetime(2026, 1, 1, tzinfo=UTC)
        settings = Settings(retention=timedelta(hours=1))
        async with MemoryLayer(settings, clock=lambda: now) as layer:

            async def seen(minute: float) -> tuple[list[int], bool]:
                page = await layer.history("room", since=start + timedelta(minutes=minute))
                return [message["n"] for message in page.messages], page.truncated

            for n in range(4):
                await layer.send("room", {"n": n})
                now += timedelta(minutes=10)
            assert await seen(-1000) == ([0, 1, 2, 3], False)
            assert await seen(0) == ([0, 1, 2, 3], False)
            assert await seen(0.1) == ([1, 2, 3], False)
            assert await seen(30) == ([3], False)
            assert await seen(30.1) == ([], False)
            now = start + timedelta(minutes=75)  # the first two are gone
            assert await seen(0) == ([2, 3], True)
            assert await seen(10) == ([2, 3], True)
            assert await seen(10.1) == ([2, 3], False)
            assert await seen(20) == ([2, 3], False)
            now = start + timedelta(minutes=1000)
            assert await seen(30) == ([], True)
            assert await seen(40) == ([], False)


class TestFilteredPages:
    """A page costs a bounded amount, and all pages together are everything that matches."""

    async def test_ten_thousand_messages_are_looked_at(self) -> None:
        async with MemoryLayer(Settings(page_bytes=2**30)) as layer:
            for n in range(12_000):
                await layer.send("room", {"n": n})
            first = await layer.history("room", filter="$.n < 0 || $.n == 11999", limit=100)
            assert first.messages == []
            assert first.next is not None
            assert 9_000 <= first.next.id <= 10_000
            last = await layer.history(
                "room", filter="$.n < 0 || $.n == 11999", limit=100, after=first.next
            )
            assert [message["n"] for message in last.messages] == [11_999]
            assert last.next is None

    async def test_what_is_looked_at_is_bounded_by_bytes_too(
        self, small_pages: ChannelLayer
    ) -> None:
        # Each page of the log holds five.
        sent = await fill(small_pages, "room", [{"n": n, "x": "x" * 200} for n in range(120)])
        for order in ("asc", "desc"):
            none = [page async for page in pages(small_pages, order, filter="$.n < 0")]
            assert none == [[]] * len(none)
            assert 3 <= len(none) <= 4
        # No further than it takes to find what was asked for.
        page = await small_pages.history("room", filter="$.n == 0", limit=1)
        assert (page.messages, page.next) == (sent[:1], sent[1].position)
        # What is found counts as well.
        everything = [page async for page in pages(small_pages, filter="$.n >= 0", limit=1000)]
        assert [*chain(*everything)] == list(range(120))
        assert max(map(len, everything)) <= 10

    async def test_neither_holes_nor_repeats(self, small_pages: ChannelLayer) -> None:
        rng = random.Random(4)
        numbers = list(range(150))
        sent = await fill(
            small_pages,
            "room",
            [{"n": n, "x": "x" * rng.choice([0, 100, 2000]), "k": rng.random()} for n in numbers],
        )
        for _ in range(12):
            order: Order = rng.choice(["asc", "desc"])
            share = rng.choice([0.01, 0.1, 0.5, 1])
            low = rng.choice([None, *sent])
            expected = [m["n"] for m in sent if m["k"] < share and (not low or m.id > low.id)]
            read = [
                page
                async for page in pages(
                    small_pages,
                    order,
                    filter=f"$.k < {share}",
                    limit=rng.choice([1, 3, 10, 1000]),
                    after=low and low.position,
                )
            ]
            assert [*chain(*read)] == (expected if order == "asc" else expected[::-1])

    async def test_new_ones_while_newest_come_first(
        self, small_pages: ChannelLayer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What comes while a page is put together is not in it, and comes after its position."""
        await fill(small_pages, "room", [{"n": n, "x": "x" * 400} for n in range(20)])
        read = small_pages._read_history
        count = 0

        async def slow_read(*args: Any, **options: Any) -> Any:
            nonlocal count
            page = await read(*args, **options)
            await fill(small_pages, "room", [{"n": 100 + count}])
            count += 1
            return page

        monkeypatch.setattr(small_pages, "_read_history", slow_read)
        page = await small_pages.history("room", order="desc", filter="$.n == 5 || $.n >= 100")
        assert [message["n"] for message in page.messages] == [5]
        assert count >= 5
        async with small_pages.subscribe("room", after=page.position) as stream:
            async with asyncio.timeout(10):
                assert [(await anext(stream))["n"] for _ in range(count)] == [
                    100 + n for n in range(count)
                ]

    @given(
        st.lists(st.tuples(st.integers(0, 5), st.sampled_from([0, 300, 1500])), max_size=60),
        st.integers(1, 8),
        st.sampled_from(["asc", "desc"]),
        st.integers(0, 6),
    )
    def test_whatever_the_sizes(
        self, messages: list[tuple[int, int]], limit: int, order: Order, wanted: int
    ) -> None:
        async def read() -> list[list[int]]:
            async with MemoryLayer(Settings(page_bytes=1024)) as layer:
                for n, size in messages:
                    await layer.send("room", {"n": n, "x": "x" * size})
                    await layer.send("other", {"n": wanted})
                return [
                    page
                    async for page in pages(layer, order, limit=limit, filter=f"$.n >= {wanted}")
                ]

        found = asyncio.run(read())
        expected = [n for n, _ in messages if n >= wanted]
        assert [*chain(*found)] == (expected if order == "asc" else expected[::-1])
        assert all(len(page) <= limit for page in found)


class TestFilteredStreams:
    async def test_what_cannot_be_parsed_is_left_out(
        self, layer: PostgresLayer, database_url: str
    ) -> None:
        odd = ['{"a": 1e999}', json.dumps({"a": json.loads("[" * 500 + "]" * 500)}), '{"a": 1}']
        async with layer.subscribe("room", filter="$.a || !$.a") as live, asyncio.timeout(10):
            with connect(database_url) as connection:
                # As before the database refused such payloads.
                connection.execute(
                    "alter table pgchannels.outbox drop constraint outbox_payload_is_valid"
                )
                for payload in odd:
                    connection.execute(
                        "insert into pgchannels.outbox (channel, payload) values ('room', %s)",
                        [payload],
                    )
            layer.wake()
            assert [(await anext(live)).payload for _ in range(2)] == odd[1:]
            async with layer.subscribe("room", after="0", filter="$.a") as replayed:
                assert [(await anext(replayed)).payload for _ in range(2)] == odd[1:]

    async def test_others_get_their_turn_while_many_replay(self) -> None:
        """As many filtered streams as there may be after the loss of a node."""
        async with MemoryLayer() as layer:
            for n in range(1000):
                await layer.send("room", {"n": n, "x": "x" * 100})
            streams = [layer.subscribe("room", after="0", filter="$.n < 0") for _ in range(20)]
            for stream in streams:
                await stream.__aenter__()
            tasks = [asyncio.create_task(stream.batch()) for stream in streams]
            turns = 0
            async with asyncio.timeout(20):
                while any(stream.caught_up is None for stream in streams):
                    turns += 1
                    assert sum(stream.pending for stream in streams) == 0
                    await asyncio.sleep(0)
            assert turns >= 10
            for stream in streams:
                stream.close()
            await asyncio.gather(*tasks, return_exceptions=True)


class TestManyWhoReplay:
    """Readers that replay, and take their time, hold a bounded part of the log together."""

    async def test_pages_get_small_when_much_is_held_and_nobody_waits(
        self, layer: PostgresLayer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pgchannels.hub._SMALL_PAGE", 4000)
        async with layer.subscribe("room") as live:
            for n in range(30):
                await layer.send("room", {"n": n, "text": "x" * 2000})
            sent = [await anext(live) for _ in range(30)]
        budget = layer._opened.hub._budget
        monkeypatch.setattr(budget, "_limit", 100_000)
        assert budget.held == 0

        def replay(after: int) -> Any:
            return layer.subscribe("room", after=f"1-{after}")

        async with replay(0) as one, replay(0) as same, replay(1) as two, replay(2) as three:
            # Two that have asked for the same page share it, and it counts once.
            pages = await asyncio.gather(one.batch(), same.batch())
            assert [*pages] == [sent, sent]
            assert 60_000 < budget.held < 100_000
            assert await two.batch() == sent[1:]
            assert budget.held > 100_000
            # It gets less at a time, though none of the others has taken more.
            read = await three.batch()
            assert read == sent[2 : 2 + len(read)]
            assert 1 <= len(read) <= 3
            while len(read) < 28:
                read += await three.batch()
            assert read == sent[2:]
        await eventually(lambda: budget.held == 0)
