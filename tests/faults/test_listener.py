"""Notifications that stop, lie or flood: messages still arrive, once, and reading stays cheap."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Literal

import asyncpg
import pytest

from pgchannels import DatabaseUnavailable, PostgresLayer, Settings
from pgchannels.connections import connect
from tests.support.eventually import eventually
from tests.support.tcp_proxy import TcpProxy

if TYPE_CHECKING:
    from asyncpg import Connection, Record

    from pgchannels import Stream

HEARTBEAT = 0.5
POLL = 0.2
# Above any scheduling delay, below any timeout that would otherwise come to the rescue.
SOON = 10.0


class Pooler(TcpProxy):
    """Loses notifications, as a pooler in transaction mode does: LISTEN, or what it brings."""

    def __init__(self, database_url: str, loses: Literal["LISTEN", "notifications"]) -> None:
        super().__init__(database_url)
        self._loses = loses
        self._servers: set[asyncio.StreamReader] = set()
        self.lost = 0

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await super()._connect()
        self._servers.add(reader)
        return reader, writer

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        if self._loses == "LISTEN":
            await self._without_listen(source, sink)
        elif source in self._servers:
            await self._without_notifications(source, sink)
        # The rest, and the end.
        await super()._pump(source, sink)

    async def _without_listen(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter
    ) -> None:
        def replace(listen: re.Match[bytes]) -> bytes:
            self.lost += 1
            return b"select 1".ljust(len(listen[0]))

        while data := await source.read(65536):
            sink.write(re.sub(rb'LISTEN "[^"]*"', replace, data))
            await sink.drain()

    async def _without_notifications(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter
    ) -> None:
        while True:
            try:
                header = await source.readexactly(5)
                body = await source.readexactly(int.from_bytes(header[1:]) - 4)
            except asyncio.IncompleteReadError:
                return
            if header[:1] == b"A":
                self.lost += 1
            else:
                sink.write(header + body)
                await sink.drain()


def make_settings(database_url: str, **values: Any) -> Settings:
    values = {"heartbeat_interval": HEARTBEAT, "poll_interval": POLL, "lease_time": 1.0} | values
    return Settings.model_validate({"database_url": database_url, **values})


@pytest.fixture
async def stranger(database_url: str) -> AsyncIterator[Connection[Record]]:
    """A connection that has nothing to do with pgchannels."""
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close(timeout=5)


async def publish(connection: Connection[Record], first: int, count: int) -> None:
    for number in range(first, first + count):
        await connection.execute(
            "select pgchannels.publish('a', json_build_object('number', $1::int))", number
        )


async def take_numbers(stream: Stream, count: int) -> list[int]:
    return [(await anext(stream))["number"] for _ in range(count)]


async def numbers(stream: Stream, count: int) -> list[int]:
    async with asyncio.timeout(SOON):
        return await take_numbers(stream, count)


async def listeners(connection: Connection[Record]) -> set[int]:
    rows = await connection.fetch(
        "select pid from pg_stat_activity"
        " where datname = current_database() and application_name = 'pgchannels listener'"
    )
    return {row["pid"] for row in rows}


@pytest.mark.parametrize("victims", ["pgchannels listener", "pgchannels hub", "pgchannels %"])
async def test_backends_are_terminated_in_mid_stream(
    database_url: str, stranger: Connection[Record], victims: str
) -> None:
    rounds, a_round = 4, 150
    async with AsyncExitStack() as stack:
        layer = await stack.enter_async_context(PostgresLayer(make_settings(database_url)))
        publisher = await asyncpg.connect(database_url)
        stack.push_async_callback(publisher.close, timeout=5)
        streams = [await stack.enter_async_context(layer.subscribe("a")) for _ in range(3)]
        readings = [
            asyncio.create_task(take_numbers(stream, rounds * a_round)) for stream in streams
        ]
        publishing = asyncio.create_task(publish(publisher, 0, rounds * a_round))
        for number in range(rounds):
            await eventually(lambda: layer.is_listening)
            before = await listeners(stranger)
            await _sealed_more_than(number * a_round, stranger)
            # It may just be coming back from the last time.
            await eventually(
                lambda: stranger.fetch(
                    "select pg_terminate_backend(pid, 5000) from pg_stat_activity"
                    " where datname = current_database() and application_name like $1",
                    victims,
                )
            )
            if victims != "pgchannels hub":
                await eventually(lambda: layer.is_listening)
                await _another_than(before, stranger)
        await publishing
        # From here: how long the rounds take says nothing about how soon messages come.
        async with asyncio.timeout(SOON):
            for reading in readings:
                assert await reading == list(range(rounds * a_round))
        await eventually(lambda: layer.is_listening)
        await publish(publisher, -1, 1)
        assert await numbers(streams[0], 1) == [-1]


async def _sealed_more_than(messages: int, connection: Connection[Record]) -> None:
    query = "select coalesce(max(id), 0) > $1 from pgchannels.messages"
    await eventually(lambda: connection.fetchval(query, messages))


async def _another_than(before: set[int], connection: Connection[Record]) -> None:
    async def changed() -> Any:
        now = await listeners(connection)
        return now and not now & before

    await eventually(changed)


async def test_a_silent_network_is_noticed_and_polled_over(
    database_url: str, stranger: Connection[Record]
) -> None:
    """The listener's connection stays open, and nothing comes through it any more."""
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(PostgresLayer(make_settings(database_url)))
        proxy = await stack.enter_async_context(TcpProxy(database_url))
        layer = await stack.enter_async_context(
            PostgresLayer(make_settings(database_url, listen_url=proxy.url, command_timeout=60))
        )
        stream = await stack.enter_async_context(layer.subscribe("a"))
        await eventually(lambda: layer.is_listening)
        await publish(stranger, 0, 1)
        assert await numbers(stream, 1) == [0]

        proxy.stall()
        await publish(stranger, 1, 20)
        arriving = asyncio.create_task(numbers(stream, 20))
        # Long before a statement that got no answer would time out.
        await eventually(lambda: not layer.is_listening, timeout=SOON)
        got = await asyncio.wait_for(arriving, SOON)
        assert got == list(range(1, 21))

        proxy.resume()
        await eventually(lambda: layer.is_listening, timeout=30)
        await publish(stranger, 21, 5)
        assert await numbers(stream, 5) == list(range(21, 26))


async def test_a_network_that_goes_silent_for_good_holds_nothing_up_for_long(
    database_url: str,
) -> None:
    """Neither a publisher nor the end of the layer waits longer than a statement may take."""
    async with TcpProxy(database_url) as proxy:
        layer = PostgresLayer(make_settings(proxy.url, command_timeout=1))
        await layer.open()
        try:
            await layer.send("a", {"number": 0})
            proxy.stall()
            with pytest.raises(DatabaseUnavailable):
                await asyncio.wait_for(layer.send("a", {"number": 1}), SOON)
        finally:
            async with asyncio.timeout(15):
                await layer.close()


async def test_who_cancels_in_a_silent_network_does_not_wait_for_it(database_url: str) -> None:
    """It takes effect soon, also if it comes twice, and costs the pool no connection."""
    async with TcpProxy(database_url) as proxy:
        settings = make_settings(proxy.url, command_timeout=60, pool_size=1)
        async with PostgresLayer(settings) as layer:
            proxy.stall()
            for again in (False, True):
                asking = asyncio.create_task(layer.count_connections())
                await asyncio.wait([asking], timeout=0.2)  # the statement is on its way by then
                asking.cancel()
                if again:
                    await asyncio.wait([asking], timeout=0.1)
                    asking.cancel()
                await asyncio.wait([asking], timeout=SOON)
                assert asking.cancelled()
            proxy.resume()
            async with asyncio.timeout(SOON):
                assert await layer.count_connections() == 0


async def test_who_cancels_again_and_again_is_cancelled(
    database_url: str, stranger: Connection[Record]
) -> None:
    """As scopes of anyio do, at each await: also while the connection is on its way back."""
    async with PostgresLayer(make_settings(database_url, pool_size=1)) as layer:
        for _ in range(10):
            async with stranger.transaction():
                await stranger.execute("lock table pgchannels.nodes, pgchannels.channels")
                asking = asyncio.create_task(layer.count_connections())
                await eventually(lambda: waits_for_a_lock(stranger), timeout=30)
                while not asking.done():
                    asking.cancel()
                    await asyncio.sleep(0)
                assert asking.cancelled()
        async with asyncio.timeout(SOON):
            assert await layer.count_connections() == 0


async def test_it_works_again_after_the_network_was_silent(database_url: str) -> None:
    async with AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(TcpProxy(database_url))
        settings = make_settings(proxy.url, command_timeout=1, pool_size=2)
        layer = await stack.enter_async_context(PostgresLayer(settings))
        stream = await stack.enter_async_context(layer.subscribe("a"))
        proxy.stall()
        lost = await asyncio.gather(
            *(layer.send("a", {"number": n}) for n in range(10)), return_exceptions=True
        )
        assert all(isinstance(error, DatabaseUnavailable) for error in lost)
        await eventually(lambda: not layer.is_listening)
        proxy.resume()

        async def send() -> Any:
            try:
                await layer.send("a", {"number": 100})
            except DatabaseUnavailable:
                return False
            return True

        await eventually(send, timeout=20)
        async with asyncio.timeout(20):
            # What was lost on its way may have arrived all the same: that is what the error says.
            got = [await anext(stream)]
            while got[-1]["number"] != 100:
                got.append(await anext(stream))
        assert [m.id for m in got] == list(range(1, len(got) + 1))
        await eventually(lambda: layer.is_listening, timeout=30)


async def test_a_dead_listener_is_noticed_also_while_the_pool_is_exhausted(
    database_url: str, stranger: Connection[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The heartbeat needs a connection of the pool, whose only one waits for a lock."""
    settings = make_settings(database_url, pool_size=1)
    blocker = await asyncpg.connect(database_url)
    try:
        async with PostgresLayer(settings) as layer:
            await eventually(lambda: layer.is_listening)
            await blocker.execute("begin; lock table pgchannels.outbox in share mode")
            sending = asyncio.create_task(layer.send("a", {"number": 0}))
            await eventually(lambda: waits_for_a_lock(stranger))

            store = layer._opened.store
            notify, beating = store.notify, asyncio.Event()

            async def observed(channel: str, payload: str) -> None:
                beating.set()
                await notify(channel, payload)

            monkeypatch.setattr(store, "notify", observed)
            await beating.wait()  # a heartbeat now waits for the pool
            before = await listeners(stranger)
            assert layer.is_listening
            killed = time.monotonic()
            await stranger.execute("select pg_terminate_backend(unnest($1::int[]))", before)
            await eventually(lambda: not layer.is_listening)
            assert time.monotonic() - killed < SOON
            # It comes back though the pool is still of no help.
            await eventually(lambda: layer.is_listening)
            await _another_than(before, stranger)
            assert not sending.done()
            await blocker.execute("rollback")
            await sending
    finally:
        await blocker.close(timeout=5)


async def waits_for_a_lock(connection: Connection[Record]) -> Any:
    return await connection.fetchval(
        "select exists (select from pg_stat_activity where datname = current_database()"
        " and application_name = 'pgchannels pool' and wait_event_type = 'Lock')"
    )


class Mute(TcpProxy):
    """Swallows, once, what a client says when it says *word*; the connection stays open."""

    def __init__(self, database_url: str, word: bytes) -> None:
        super().__init__(database_url)
        self._word = word
        self.swallowed = 0

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            if self._word in data and not self.swallowed:
                self.swallowed += 1
            else:
                sink.write(data)
                await sink.drain()
        await super()._pump(source, sink)


async def test_a_connection_that_goes_silent_while_it_is_made(database_url: str) -> None:
    """The server has let us in, and the first statement gets no answer."""
    async with Mute(database_url, b"set_config") as proxy:
        url = f"{proxy.url}?sslmode=disable"
        begun = time.monotonic()
        with pytest.raises(DatabaseUnavailable):
            await asyncio.wait_for(connect(url, role="x", timeout=0.5), 8)
        assert time.monotonic() - begun < 4
        assert proxy.swallowed


@pytest.mark.parametrize("word", [b"LISTEN", b"pg_listening_channels"])
async def test_a_listener_that_goes_silent_while_it_begins(database_url: str, word: bytes) -> None:
    """A statement of the very first ones gets no answer: the connection is given up soon."""
    async with Mute(database_url, word) as proxy:
        settings = make_settings(database_url, listen_url=f"{proxy.url}?sslmode=disable")
        async with PostgresLayer(settings) as layer:
            await eventually(lambda: proxy.swallowed)
            assert not layer.is_listening
            await eventually(lambda: layer.is_listening)


@pytest.mark.parametrize("loses", ["LISTEN", "notifications"])
async def test_a_pooler_that_swallows_notifications(
    database_url: str, stranger: Connection[Record], loses: Literal["LISTEN", "notifications"]
) -> None:
    async with Pooler(database_url, loses) as pooler:
        url = f"{pooler.url}?sslmode=disable"
        settings = make_settings(database_url, listen_url=url)
        async with PostgresLayer(settings) as layer, layer.subscribe("a") as stream:
            await eventually(lambda: pooler.lost > 2)
            assert not layer.is_listening
            await publish(stranger, 0, 10)
            assert await numbers(stream, 10) == list(range(10))
            assert not layer.is_listening


GARBAGE = [
    "",
    "garbage",
    "-1",
    "+5",
    "1.5",
    " 7",
    "0x10",
    "1_000",
    "١٢٣",  # decimal digits, and int() would take them
    "²",
    "9" * 19,
    "9" * 20,
    "9" * 7999,
    "x" * 7999,
    '{"last_id": 1}',
    "'; drop table pgchannels.messages; --",
    "NaN",
]


async def test_hints_of_strangers_move_nothing(
    database_url: str, stranger: Connection[Record]
) -> None:
    unhandled: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
    # A heartbeat that cannot come by itself: what ends the listening would be the garbage.
    settings = make_settings(database_url, heartbeat_interval=60, lease_time=120, poll_interval=60)
    async with PostgresLayer(settings) as layer, layer.subscribe("a") as stream:
        await eventually(lambda: layer.is_listening)
        await publish(stranger, 0, 3)
        assert await numbers(stream, 3) == [0, 1, 2]
        hub = layer._opened.hub
        before = await listeners(stranger)
        for payload in GARBAGE:
            await stranger.execute("select pg_notify('pgchannels', $1)", payload)
        # By the end of the round trip of a real message all of that has been seen.
        await publish(stranger, 3, 3)
        assert await numbers(stream, 3) == [3, 4, 5]
        assert hub.cursor == 6
        assert layer.is_listening
        assert await listeners(stranger) == before
    assert unhandled == []


async def test_a_flood_of_forged_hints_is_no_flood_of_reads(
    database_url: str, stranger: Connection[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_settings(database_url, heartbeat_interval=60, lease_time=120, poll_interval=60)
    async with PostgresLayer(settings) as layer, layer.subscribe("a") as stream:
        await eventually(lambda: layer.is_listening)
        hub = layer._opened.hub
        reads = hints = 0
        read, hint = hub._session.fetch, hub.hint

        async def counted(name: str, *arguments: Any) -> list[Record]:
            nonlocal reads
            reads += 1
            return await read(name, *arguments)

        def counted_hint(payload: str) -> None:
            nonlocal hints
            hints += 1
            hint(payload)

        monkeypatch.setattr(hub._session, "fetch", counted)
        monkeypatch.setattr(layer._opened.listener, "_on_hint", counted_hint)
        begun = time.monotonic()
        for number in range(40):
            # Each its own statement and its own text: equal ones in a transaction are merged.
            await asyncio.gather(
                stranger.execute(
                    f"select pg_notify('pgchannels', (10^9 + {number} * 100 + n)::bigint::text)"
                    " from generate_series(1, 100) n"
                )
            )
        await eventually(lambda: hints >= 4000)
        assert reads <= 5 + 25 * (time.monotonic() - begun)
        # And the flood does not keep real messages away.
        await publish(stranger, 0, 5)
        assert await numbers(stream, 5) == list(range(5))
