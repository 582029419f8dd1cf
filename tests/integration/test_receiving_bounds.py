"""A claim does bounded work and brings a bounded number of bytes, whatever was published.

What a claim could not look at, the next one does. Work is counted here, not time.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from pgchannels import PostgresLayer, Settings, receivers
from pgchannels.connections import connect
from pgchannels.sql import load_queries
from tests.support.eventually import eventually

QUERIES = load_queries("pgchannels")
FAR = 10**6
MIB = 2**20
NOBODY = json.dumps({"pgchannels-only": "[]"})


class Claimant:
    """Claims as a process does."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self.connection = connection
        self.id: UUID = uuid4()
        self.token = 0
        self.messages: list[int] = []
        """The ids of those that the last claim has brought."""

    async def run(self, query: str, *arguments: Any) -> list[Any]:
        rows: list[Any] = await self.connection.fetch(QUERIES[query], *arguments)
        return rows

    async def receives(self, *names: str, group: str | None = None) -> None:
        await self.run("add_claimant", self.id)
        await self.run("add_receiver", names)
        if group is not None:
            await self.connection.execute(
                "insert into pgchannels.memberships (group_name, channel, since)"
                " select $1, n.name, 0 from unnest($2::text[]) n(name)",
                *(group, names),
            )

    async def publish(self, channel: str, *sizes: int, headers: str | None = None) -> None:
        """Messages of about so many bytes."""
        await self.connection.execute(
            "insert into pgchannels.outbox (channel, payload, headers)"
            " select $1, json_build_object('x', repeat('x', n.size)), $3::json"
            "   from unnest($2::integer[]) with ordinality n(size, place) order by n.place",
            *(channel, sizes, headers),
        )
        await self.run("seal", 10_000, 2**30, "pgchannels")

    async def claim(
        self, *names: str, wanted: int = 1, looking: int = 1, size: int = MIB, again: bool = False
    ) -> dict[str, Any]:
        """A row for each channel."""
        self.token += not again
        counts = [[number] * len(names) for number in (wanted, looking)]
        rows = await self.run("claim", names, *counts, self.id, self.token, FAR, size)
        self.messages = sorted(row["id"] for row in rows if row["name"] is None)
        return {row["name"]: row for row in rows if row["name"] is not None}


@pytest.fixture
async def claimant(database_url: str) -> AsyncIterator[Claimant]:
    connection = await connect(database_url, role="test", timeout=10)
    try:
        yield Claimant(connection)
    finally:
        connection.terminate()


def ids(claimed: dict[str, Any]) -> dict[str, list[int]]:
    return {name: row["ids"] for name, row in claimed.items()}


class TestWork:
    async def test_so_many_messages_are_looked_at_and_passed_by(self, claimant: Claimant) -> None:
        await claimant.receives("jobs", group="team")
        await claimant.publish("team", *[1] * 25, headers=NOBODY)
        await claimant.publish("team", 1)
        for passed_by in (10, 10):
            row = (await claimant.claim("jobs", looking=10))["jobs"]
            assert (row["ids"], row["passed_by"], row["may_have_more"]) == ([], passed_by, True)
        row = (await claimant.claim("jobs", looking=10))["jobs"]
        assert (row["ids"], row["passed_by"]) == ([26], 5)

    async def test_expired_ones_are_passed_by_too(self, claimant: Claimant) -> None:
        await claimant.receives("jobs")
        await claimant.publish("jobs", *[1] * 5)
        await claimant.connection.execute(
            "update pgchannels.messages set expires_at = now() where id < 5"
        )
        assert ids(await claimant.claim("jobs", looking=3)) == {"jobs": []}
        assert ids(await claimant.claim("jobs", looking=3)) == {"jobs": [5]}

    async def test_one_message_at_a_time_gets_there_too(self, claimant: Claimant) -> None:
        """As many are looked at as are wanted, and none of them is for the channel."""
        await claimant.receives("jobs", "other", group="team")
        only = json.dumps({"pgchannels-only": '["other"]'})
        await claimant.publish("team", 1, 1, headers=only)
        await claimant.publish("team", 1)
        found = [ids(await claimant.claim("jobs", "other")) for _ in range(3)]
        assert [each["jobs"] for each in found] == [[], [], [3]]
        assert [each["other"] for each in found] == [[1], [2], [3]]

    async def test_headers_are_parsed_once_for_all_and_to_a_bounded_size(
        self, claimant: Claimant
    ) -> None:
        names = [f"jobs:{n}" for n in range(50)]
        await claimant.receives(*names, group="team")
        headers = json.dumps({"pgchannels-only": "[]", "x": "x" * 400_000})
        await claimant.publish("team", *[1] * 10, headers=headers)
        async with claimant.connection.transaction():
            await claimant.connection.execute("set local track_functions = 'pl'")
            claimed = await claimant.claim(*names, looking=10)
            parsed = await claimant.connection.fetchval(
                "select pg_stat_get_xact_function_calls(p.oid) from pg_proc p"
                " where p.oid = 'pgchannels.recipients(json)'::regprocedure"
            )
        assert {row["passed_by"] for row in claimed.values()} == {3}, "those of a MiB"
        assert parsed == 3

    async def test_receivers_get_what_comes_behind_it(self, database_url: str) -> None:
        """Their claims look at more messages when they have found none."""
        names = [f"jobs:{n}" for n in range(5)]
        async with PostgresLayer(database_url) as layer:
            for name in names:
                await layer.group_add("team", name)
            connection = await asyncpg.connect(database_url)
            try:
                await connection.execute(
                    "insert into pgchannels.outbox (channel, payload, headers)"
                    " select 'team', '{}', $1::json from generate_series(1, 5000)",
                    NOBODY,
                )
            finally:
                await connection.close(timeout=5)
            receiving = [asyncio.create_task(layer.receive(name)) for name in (*names, "other")]
            await layer.group_send("team", {"n": 1})
            await layer.send("other", {"n": 1})
            async with asyncio.timeout(60):
                assert [message["n"] for message in await asyncio.gather(*receiving)] == [1] * 6


class TestBytes:
    async def test_a_message_comes_once_for_all_that_it_is_for(self, claimant: Claimant) -> None:
        names = [f"jobs:{n}" for n in range(50)]
        await claimant.receives(*names, group="team")
        await claimant.publish("team", 1_000_000, 1)
        assert ids(await claimant.claim(*names)) == {name: [1] for name in names}
        assert claimant.messages == [1]

    async def test_messages_of_a_page_and_one_more(self, claimant: Claimant) -> None:
        names = ["b", "a", "d", "c"]
        await claimant.receives(*names)
        for name in names:
            await claimant.publish(name, 600_000, 600_000)
        claimed = await claimant.claim(*names, wanted=2, looking=2)
        assert ids(claimed) == {"b": [1], "a": [3], "d": [], "c": []}, "the first ones come first"
        assert all(row["may_have_more"] for row in claimed.values())
        claimed = await claimant.claim(*names[::-1], wanted=2, looking=2)
        assert ids(claimed) == {"c": [7], "d": [5], "a": [], "b": []}

    async def test_of_one_channel(self, claimant: Claimant) -> None:
        await claimant.receives("jobs")
        await claimant.publish("jobs", *[400_000] * 5)
        found = [ids(await claimant.claim("jobs", wanted=9, looking=9))["jobs"] for _ in range(3)]
        assert found == [[1, 2, 3], [4, 5], []]

    async def test_none_is_passed_by_for_a_shared_one_that_is_brought(
        self, claimant: Claimant
    ) -> None:
        """ "a" has a large message of its own before one that "b" gets in this claim, too."""
        await claimant.receives("a", "b", group="team")
        await claimant.publish("a", 1_000_000)
        await claimant.publish("team", 1)
        assert ids(await claimant.claim("b", "a", wanted=2, looking=2, size=1)) == {
            "b": [2],
            "a": [],
        }
        assert ids(await claimant.claim("a", "b", wanted=2, looking=2, size=1)) == {
            "a": [1],
            "b": [],
        }
        assert ids(await claimant.claim("a", "b", wanted=2, looking=2)) == {"a": [2], "b": []}

    async def test_what_was_handed_back_counts_too(self, claimant: Claimant) -> None:
        await claimant.receives("jobs")
        await claimant.publish("jobs", *[600_000] * 4)
        for _ in range(2):
            await claimant.claim("jobs", wanted=3, looking=3)
        claimant.token += 1
        handed = ["jobs"] * 4, [1, 2, 3, 4]
        await claimant.run("hand_back", *handed, claimant.id, claimant.token)
        found = [ids(await claimant.claim("jobs", wanted=9, looking=9))["jobs"] for _ in range(3)]
        assert found == [[1, 2], [3, 4], []]

    async def test_receivers_of_more_than_one_page(self, database_url: str) -> None:
        settings = Settings(database_url=database_url, page_bytes=50_000)
        async with PostgresLayer(settings) as layer, asyncio.timeout(60):
            names = [f"jobs:{n}" for n in range(8)]
            for name in names:
                for n in range(2):
                    await layer.send(name, {"n": n, "x": "x" * 40_000})
            tasks = [asyncio.create_task(layer.receive(name)) for name in names * 2]
            received = [(m.channel, m["n"]) for m in await asyncio.gather(*tasks)]
            assert sorted(received) == [(name, n) for name in names for n in range(2)]


class TestTrouble:
    async def test_an_answer_that_was_lost_comes_whatever_is_asked(
        self, claimant: Claimant
    ) -> None:
        """A claim that timed out is repeated for fewer channels, for others, or for none."""
        await claimant.receives("a", "b", "c")
        for name in ("a", "b", "c"):
            await claimant.publish(name, 1)
        given = {"a": [1], "b": [2]}
        assert ids(await claimant.claim("a", "b")) == given
        assert ids(await claimant.claim("a", again=True)) == given
        assert ids(await claimant.claim("c", again=True)) == {**given, "c": []}
        assert ids(await claimant.claim(again=True)) == given
        assert claimant.messages == [1, 2]
        assert ids(await claimant.claim("a", "b", "c")) == {"a": [], "b": [], "c": [3]}

    async def test_a_channel_that_is_locked_does_not_stop_the_others(
        self, database_url: str
    ) -> None:
        """Claims time out, and are repeated for fewer and fewer channels."""
        names = ["a", "b", "c", "d"]
        settings = Settings(database_url=database_url, command_timeout=1.0)
        holder = await asyncpg.connect(database_url)
        try:
            # So that no statement goes on in the server whose answer nobody waits for any more.
            await holder.execute(
                "do $$ begin execute format("
                "  'alter database %I set statement_timeout = 1000', current_database()"
                "); end $$"
            )
            async with (
                asyncio.timeout(60),
                PostgresLayer(settings) as layer,
                PostgresLayer(database_url) as other,
            ):
                for name in names:
                    await other.send(name, {"n": 0})
                    await layer.receive(name)
                async with holder.transaction():
                    await holder.execute(
                        "select from pgchannels.channels where name = 'b' for update"
                    )
                    receiving = {name: asyncio.create_task(layer.receive(name)) for name in names}
                    for name in names:
                        await other.send(name, {"n": 1})
                    free = [receiving[name] for name in names if name != "b"]
                    assert [message["n"] for message in await asyncio.gather(*free)] == [1] * 3
                    assert not receiving["b"].done()
                assert (await receiving["b"])["n"] == 1
        finally:
            await holder.close(timeout=5)

    async def test_a_process_uses_a_row_for_some_claims_only(
        self, database_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(receivers, "_CLAIMS_BY_ROW", 3)
        connection = await asyncpg.connect(database_url)
        try:
            async with PostgresLayer(database_url) as layer:
                rows = set()
                for n in range(10):
                    await layer.send("jobs", {"n": n})
                    assert (await layer.receive("jobs", timeout=20))["n"] == n
                    rows |= {r[0] for r in await connection.fetch("table pgchannels.claims")}

                async def one() -> Any:
                    return await connection.fetchval("select count(*) = 1 from pgchannels.claims")

                await eventually(one)
                assert len(rows) > 2
        finally:
            await connection.close(timeout=5)
