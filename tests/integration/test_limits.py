"""Limits on PostgreSQL: what is counted is what is there, over nodes, leases and revisions."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.rows import dict_row

from pgchannels import (
    DatabaseUnavailable,
    GroupFull,
    InvalidChannel,
    Limits,
    PostgresLayer,
    Settings,
    TooManyConnections,
    migrate,
)
from pgchannels.channels import new_name
from pgchannels.sql import load_queries
from tests.support.eventually import eventually
from tests.support.pruning import only_by_hand

Connection = psycopg.Connection[dict[str, Any]]

QUERIES = load_queries("pgchannels")


@pytest.fixture
def connection(database_url: str) -> Iterator[Connection]:
    with psycopg.connect(database_url, autocommit=True, row_factory=dict_row) as connection:
        yield connection


@pytest.fixture
async def layers(database_url: str) -> AsyncIterator[list[PostgresLayer]]:
    """Three nodes."""
    only_by_hand(database_url)
    settings = Settings(database_url=database_url)
    async with (
        PostgresLayer(settings) as first,
        PostgresLayer(settings) as second,
        PostgresLayer(settings) as third,
    ):
        yield [first, second, third]


def rows(connection: Connection, sql: str, *arguments: Any) -> list[dict[str, Any]]:
    return connection.execute(sql.encode(), arguments or None).fetchall()


def counted(connection: Connection) -> dict[UUID, int]:
    """The connections of each node, as the database has counted them."""
    found = rows(
        connection,
        """
        select n.id, coalesce(p.connections, 0) as connections
          from pgchannels.nodes n left join pgchannels.places p on p.node = n.id
        """,
    )
    return {row["id"]: row["connections"] for row in found}


def there(connection: Connection) -> dict[UUID, int]:
    """What there is."""
    found = rows(
        connection,
        """
        select n.id, count(c.name) as count
          from pgchannels.nodes n
          left join pgchannels.channels c on c.node = n.id and c.is_connection
         group by n.id
        """,
    )
    return {row["id"]: row["count"] for row in found}


def node_id(layer: PostgresLayer) -> UUID:
    return layer._opened.members._id


async def test_a_place_is_free_again_although_it_could_not_be_given_back_at_once(
    database_url: str, connection: Connection
) -> None:
    """Whatever the database had against it: a lock that is held for too long, say."""
    settings = Settings(database_url=database_url, heartbeat_interval=0.2, command_timeout=0.5)
    async with PostgresLayer(settings) as layer:
        name = await layer.new_channel(user_id="u", limits=Limits(per_user=1))
        with connection.transaction():
            connection.execute("lock table pgchannels.channels in share mode")
            await layer.delete_channel(name)
            assert there(connection) == {node_id(layer): 1}
        await eventually(lambda: there(connection) == {node_id(layer): 0}, timeout=30)
        await layer.new_channel(user_id="u", limits=Limits(per_user=1))


class TestCounting:
    async def test_what_is_counted_is_what_is_there(
        self, layers: list[PostgresLayer], connection: Connection
    ) -> None:
        """Whatever comes and goes at the same time; and nobody waits for each other in a circle."""
        chance = random.Random(random.random())
        users = [None, "a", "b", "c"]
        limits = [None, Limits(), Limits(per_user=3), Limits(per_node=8, total=20)]

        async def live(layer: PostgresLayer) -> None:
            for _ in range(12):
                try:
                    channel = await layer.new_channel(
                        user_id=chance.choice(users), limits=chance.choice(limits)
                    )
                except TooManyConnections:
                    continue
                for _ in range(chance.randrange(3)):
                    try:
                        await layer.group_add(
                            chance.choice("gh"),
                            channel,
                            presence=chance.choice([None, "connection"]),
                            limit=chance.choice([None, 5]),
                        )
                        await layer.update_channel(
                            channel,
                            user_id=chance.choice(users),
                            limits=chance.choice(limits),
                        )
                    except (TooManyConnections, GroupFull):
                        pass  # it goes on as what it was
                if chance.random() < 0.8:
                    await layer.delete_channel(channel)

        (before,) = rows(
            connection, "select deadlocks from pg_stat_database where datname = current_database()"
        )
        async with asyncio.timeout(60):
            await asyncio.gather(*(live(layer) for layer in layers * 6))
        assert counted(connection) == there(connection)
        assert await layers[0].count_connections() == sum(there(connection).values())
        await layers[2].close()
        assert counted(connection) == there(connection)
        connection.execute("select pg_stat_clear_snapshot()")
        (after,) = rows(
            connection, "select deadlocks from pg_stat_database where datname = current_database()"
        )
        assert after == before

    async def test_a_total_beside_those_without_one(self, layers: list[PostgresLayer]) -> None:
        attempts = [
            layers[n % 3].new_channel(limits=Limits(total=10) if n % 2 else Limits())
            for n in range(60)
        ]
        results = await asyncio.gather(*attempts, return_exceptions=True)
        unlimited = [result for n, result in enumerate(results) if n % 2 == 0]
        assert all(isinstance(result, str) for result in unlimited)
        total = await layers[0].count_connections()
        limited = sum(isinstance(result, str) for n, result in enumerate(results) if n % 2)
        assert total == 30 + limited
        assert limited <= 10
        with pytest.raises(TooManyConnections):
            await layers[0].new_channel(limits=Limits(total=30))

    async def test_different_limits_in_one_batch(
        self, layers: list[PostgresLayer], connection: Connection
    ) -> None:
        """Each is judged by its own, and none that is refused takes a place."""
        me = node_id(layers[0])
        names = [new_name("ws", uuid4()) for _ in range(6)]
        found = rows(
            connection,
            "select * from pgchannels.admit(%s, %s, %s, %s, %s, %s, %s)",
            me,
            names,
            ["u", "u", "u", "v", "v", None],
            [None] * 6,
            [1, 2, 2, None, 1, 1],
            [None, None, None, 3, None, 3],
            [None, None, None, None, None, 9],
        )
        refused = {row["channel"]: (row["scope"], row["allowed"]) for row in found}
        assert refused == {names[2]: ("user", 2), names[4]: ("user", 1), names[5]: ("node", 3)}
        assert counted(connection)[me] == there(connection)[me] == 3

    async def test_a_batch_locks_a_bounded_number(
        self, layers: list[PostgresLayer], database_url: str
    ) -> None:
        """However many users connect at once: the server's table of locks is for all."""
        names = [new_name("ws", uuid4()) for _ in range(2000)]
        with psycopg.connect(database_url, row_factory=dict_row) as connection:
            found = rows(
                connection,
                "select * from pgchannels.admit(%s, %s, %s, %s, %s, %s, %s)",
                node_id(layers[0]),
                names,
                [f"u{n}" for n in range(2000)],
                *([[None] * 2000, [5] * 2000, [None] * 2000, [None] * 2000]),
            )
            assert found == []
            (locks,) = rows(
                connection,
                "select count(*) from pg_locks"
                " where locktype = 'advisory' and pid = pg_backend_pid()",
            )
            assert locks["count"] <= 257
            connection.rollback()

    @pytest.mark.parametrize(
        ("query", "index"),
        [("connections", "channels_connections"), ("connections_of_user", "channels_user")],
    )
    async def test_a_page_of_the_registry_is_read_from_an_index(
        self, layers: list[PostgresLayer], connection: Connection, query: str, index: str
    ) -> None:
        connection.execute(
            """
            insert into pgchannels.channels (name, node, user_id, is_connection)
            select 'ws.' || md5(n::text), %s, 'u' || n %% 2000, true
              from generate_series(1, 20000) n
            """,
            [node_id(layers[0])],
        )
        connection.execute("analyze pgchannels.channels")
        values = {"connections": "('ws.8', 100)", "connections_of_user": "('ws.8', 100, 'u7')"}
        kinds = {"connections": "(text, bigint)", "connections_of_user": "(text, bigint, text)"}
        connection.execute("set plan_cache_mode = force_generic_plan")
        connection.execute(f"prepare page {kinds[query]} as {QUERIES[query]}".encode())
        plan = "\n".join(
            row["QUERY PLAN"]
            for row in rows(connection, f"explain (costs off) execute page{values[query]}")
        )
        assert index in plan
        # Those of a user are few; of all, no more are read than are given.
        assert query == "connections_of_user" or "Sort" not in plan
        assert "Seq Scan on channels" not in plan


class TestLeases:
    async def lose_its_lease(
        self, layer: PostgresLayer, connection: Connection, others: dict[UUID, list[str]]
    ) -> None:
        """What happens to a node that is paused for too long; others take its places meanwhile."""
        me = node_id(layer)
        with connection.transaction():
            names = [
                r["name"]
                for r in rows(
                    connection, QUERIES["channels_of"].replace("$1", "%s").replace("$2", "1000"), me
                )
            ]
            connection.execute("select pgchannels.remove_channels(%s, '0', null)", [names])
            connection.execute("delete from pgchannels.nodes where id = %s", [me])
            for node, taken in others.items():
                empty = [None] * len(taken)
                found = rows(
                    connection,
                    "select * from pgchannels.admit(%s, %s, %s, %s, %s, %s, %s)",
                    node,
                    taken,
                    ["u"] * len(taken),
                    empty,
                    [5] * len(taken),
                    empty,
                    empty,
                )
                assert found == []

    @pytest.fixture
    async def pair(self, database_url: str) -> AsyncIterator[tuple[PostgresLayer, PostgresLayer]]:
        settings = Settings(database_url=database_url, lease_time=5, heartbeat_interval=1)
        async with PostgresLayer(settings) as layer, PostgresLayer(settings) as other:
            yield layer, other

    async def test_a_node_that_comes_back_asks_for_its_places(
        self, pair: tuple[PostgresLayer, PostgresLayer], connection: Connection
    ) -> None:
        layer, other = pair
        limits = Limits(per_user=5)
        names = [await layer.new_channel(user_id="u", limits=limits) for _ in range(5)]
        bystander = await layer.new_channel(user_id="v", limits=limits)
        ended: dict[str, TooManyConnections] = {}

        async def read(name: str) -> None:
            async with layer.subscribe(member=name) as stream:
                try:
                    async for _ in stream:
                        pass
                except TooManyConnections as error:
                    ended[name] = error

        readers = [asyncio.create_task(read(name)) for name in [*names, bystander]]
        waiting = [asyncio.create_task(layer.receive(name)) for name in names]
        taken = [new_name("ws", uuid4()) for _ in range(3)]
        await self.lose_its_lease(layer, connection, {node_id(other): taken})
        await eventually(lambda: len(ended) == 3, timeout=30)
        assert {(error.scope, error.limit) for error in ended.values()} == {("user", 5)}
        assert await other.count_connections(user_id="u") == 5
        assert await other.count_connections(user_id="v") == 1
        left = {info.channel for info in await other.connections(user_id="u")}
        assert left == {*names, *taken} - set(ended)
        assert counted(connection) == there(connection)
        # They are no more, and the others are as they were.
        for name in ended:
            with pytest.raises(InvalidChannel):
                layer.subscribe(member=name)
            await layer.delete_channel(name)
        for name in set(names) - set(ended):
            await layer.delete_channel(name)
        done, still = await asyncio.wait(waiting, timeout=20)
        assert not still
        assert all(isinstance(task.exception(), InvalidChannel) for task in done)
        assert await other.count_connections(user_id="u") == 3
        for task in readers:
            task.cancel()
        await asyncio.gather(*readers, return_exceptions=True)

    async def test_a_membership_comes_back_if_there_is_a_place(
        self, pair: tuple[PostgresLayer, PostgresLayer], connection: Connection
    ) -> None:
        layer, other = pair
        channel = await layer.new_channel(limits=Limits())
        await layer.group_add("room", channel, limit=1)
        await layer.group_add("hall", channel, limit=1)
        with connection.transaction():
            connection.execute("select pgchannels.remove_channels(%s, '0', null)", [[channel]])
            connection.execute("delete from pgchannels.nodes where id = %s", [node_id(layer)])
            connection.execute(
                "insert into pgchannels.memberships (group_name, channel, since)"
                " values ('room', 'somebody', 0)"
            )

        async def is_back() -> Any:
            return await other.group_members("hall") == [channel]

        await eventually(is_back, timeout=30)
        member = layer._opened.members[channel]
        await eventually(lambda: set(member.groups) == {"hall"})
        assert await other.group_members("room") == ["somebody"]

    async def test_no_place_is_given_without_a_lease(
        self, layers: list[PostgresLayer], connection: Connection
    ) -> None:
        """Or it would be nobody's to free. The node finds out, and then it is given."""
        layer = layers[0]
        connection.execute("delete from pgchannels.nodes where id = %s", [node_id(layer)])
        with pytest.raises(DatabaseUnavailable, match="lease"):
            await layer.new_channel(user_id="u", limits=Limits(per_user=1))
        assert await layers[1].count_connections() == 0

        async def connected() -> Any:
            try:
                await layer.new_channel(user_id="u", limits=Limits(per_user=1))
            except DatabaseUnavailable:
                return False
            return True

        await eventually(connected, timeout=30)
        assert counted(connection) == there(connection)

    async def test_the_reaper_frees_the_places_of_the_dead(
        self, database_url: str, connection: Connection
    ) -> None:
        settings = Settings(database_url=database_url, lease_time=2, heartbeat_interval=1)
        dead = uuid4()
        connection.execute(
            "insert into pgchannels.nodes (id, heartbeat_at) values (%s, now() - interval '1 h')",
            [dead],
        )
        taken = [new_name("ws", uuid4()) for _ in range(3)]
        empty = [None] * 3
        rows(
            connection,
            "select * from pgchannels.admit(%s, %s, %s, %s, %s, %s, %s)",
            dead,
            taken,
            ["u"] * 3,
            *([empty] * 4),
        )
        async with PostgresLayer(settings) as layer:

            async def connected() -> Any:
                try:
                    await layer.new_channel(
                        user_id="u", limits=Limits(per_user=1, per_node=1, total=1)
                    )
                except TooManyConnections:
                    return False
                return True

            assert not await connected()
            await eventually(connected, timeout=30)
            await eventually(lambda: set(counted(connection)) == {node_id(layer)})
            assert counted(connection) == there(connection)


class TestOlderCode:
    async def test_its_channels_are_no_connections(
        self, layers: list[PostgresLayer], connection: Connection
    ) -> None:
        """The statements of revision 0003, and its row of a node."""
        node = uuid4()
        connection.execute("insert into pgchannels.nodes (id, info) values (%s, '{}')", [node])
        connection.execute(
            """
            insert into pgchannels.channels as c
                   (name, node, user_id, metadata, cursor, is_received)
            select n.name, %s, 'u', null, 0, false from unnest('{a,b}'::text[]) n(name)
            on conflict (name) do update
                set node = excluded.node, user_id = excluded.user_id, metadata = excluded.metadata
            """,
            [node],
        )
        assert await layers[0].count_connections() == 0
        await layers[0].new_channel(user_id="u", limits=Limits(per_user=1, total=1))
        connection.execute(
            "select pgchannels.change_memberships('{g}', '{a}', '{t}', '{null}', '1 s', %s)", [node]
        )
        connection.execute("select pgchannels.remove_channels('{a,b}', '1 s', %s)", [node])
        connection.execute("delete from pgchannels.nodes where id = %s", [node])
        assert await layers[0].count_connections() == 1

    async def test_the_schema_says_so(self, connection: Connection) -> None:
        assert rows(connection, "select works_from from pgchannels.log") == [{"works_from": "0003"}]

    async def test_down_and_up_again(self, database_url: str, connection: Connection) -> None:
        async with PostgresLayer(database_url) as layer:
            await layer.new_channel(user_id="u", limits=Limits(per_user=1))
        await asyncio.to_thread(migrate.downgrade, database_url, "0003")
        connection.execute("select pgchannels.remove_channels('{a}', '0', null)")
        await asyncio.to_thread(migrate.upgrade, database_url)
        async with PostgresLayer(database_url) as layer:
            await layer.new_channel(user_id="u", limits=Limits(per_user=1, total=1))
