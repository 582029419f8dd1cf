"""Messages whose time is over and that have not been pruned yet: readers pass by, page by page."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import psycopg
import pytest

from pgchannels import Position, PostgresLayer, Settings
from pgchannels.tail import Tail
from tests.support.pruning import only_by_hand

# Live are the first, one in the middle, and the last.
COUNT = 12_000
LIVE = [1, 6_000, COUNT]


@pytest.fixture
async def layer(database_url: str) -> AsyncIterator[PostgresLayer]:
    only_by_hand(database_url)
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(
            "insert into pgchannels.outbox (channel, payload, expires_at)"
            " select 'room', json_build_object('n', n),"
            "        case when n <> all (%s) then timestamptz '2020-01-01' end"
            "   from generate_series(1, %s) n",
            [LIVE, COUNT],
        )
        connection.execute("select pgchannels.seal(%s)", [COUNT])
    async with PostgresLayer(Settings(database_url=database_url)) as layer:
        yield layer


async def test_a_stream_from_the_beginning(layer: PostgresLayer) -> None:
    async with layer.subscribe("room", after="0") as stream, asyncio.timeout(30):
        assert [(await anext(stream)).id for _ in LIVE] == LIVE
        await layer.send("room", {})
        assert (await anext(stream)).id == COUNT + 1


async def test_a_page_of_one_looks_at_few_and_says_where_to_go_on(layer: PostgresLayer) -> None:
    page = await layer.history("room", limit=1)
    assert [message.id for message in page.messages] == [1]
    assert page.next is not None
    page = await layer.history("room", limit=1, after=page.next)
    assert [message.id for message in page.messages] == [6_000]


@pytest.mark.parametrize("order", ["asc", "desc"])
async def test_all_pages(layer: PostgresLayer, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgchannels.layer._MAX_SPARSE_PAGES", 2)
    found: list[int] = []
    pages = 0
    options: dict[str, Position] = {}
    while True:
        page = await layer.history("room", order=order, limit=2, **options)  # type: ignore[arg-type]
        found += [message.id for message in page.messages]
        pages += 1
        if page.next is None:
            break
        options["after" if order == "asc" else "before"] = page.next
    assert found == (LIVE if order == "asc" else LIVE[::-1])
    # Each has looked at a thousand messages and a few.
    assert pages >= COUNT / 1003


async def test_the_newest_ones(layer: PostgresLayer) -> None:
    async with Tail(layer.settings, ["room"]) as tail:
        messages, _ = await tail.newest(3)
        assert [message.id for message in messages] == LIVE


async def test_those_that_share_a_page_with_other_channels(database_url: str) -> None:
    """Pages of ten, of channels that expire at different places."""
    only_by_hand(database_url)
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(
            "insert into pgchannels.outbox (channel, payload, expires_at)"
            " select 'room:' || n % 3, '{}', case when n % 7 <> 0 or n between 50 and 90"
            "                                     then timestamptz '2020-01-01' end"
            "   from generate_series(1, 200) n"
        )
        connection.execute("select pgchannels.seal()")
    expected = [n for n in range(1, 201) if n % 7 == 0 and not 50 <= n <= 90]
    settings = Settings(database_url=database_url, page_size=10)
    async with (
        PostgresLayer(settings) as layer,
        layer.subscribe("room:0", "room:1", "room:2", after="0") as stream,
        asyncio.timeout(30),
    ):
        assert [(await anext(stream)).id for _ in expected] == expected
        await layer.send("room:1", {})
        assert (await anext(stream)).id == 201
