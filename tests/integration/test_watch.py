"""Watched tables: what is published of each way to write to one, and what is refused."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql
from psycopg.errors import (
    CheckViolation,
    InvalidParameterValue,
    ObjectNotInPrerequisiteState,
    UndefinedColumn,
    UndefinedTable,
    UntranslatableCharacter,
    WrongObjectType,
)

from pgchannels.channels import user_channel
from pgchannels.migrate import upgrade
from pgchannels.settings import Settings

Connection = psycopg.Connection[tuple[Any, ...]]
Told = tuple[str, dict[str, Any]]

ORDERS = """
create table orders (
    id integer primary key,
    customer_id integer,
    status text not null default 'new',
    total numeric not null default 0
)
"""


@pytest.fixture
def connection(database_url: str) -> Iterator[Connection]:
    with psycopg.connect(database_url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def orders(connection: Connection) -> Connection:
    """A connection to a database where the table orders is watched."""
    connection.execute(ORDERS)
    watch(connection, "orders", "orders:{customer_id}")
    return connection


def watch(connection: Connection, table: str, channel: str, **options: Any) -> None:
    arguments = "".join(f", {name} => %({name})s" for name in options)
    connection.execute(
        f"select pgchannels.watch(%(table)s, %(channel)s{arguments})".encode(),
        {"table": table, "channel": channel, **options},
    )


def told(connection: Connection) -> list[Told]:
    """What was published since the last call: channels and payloads, in the log's order."""
    rows = connection.execute(
        "with taken as (delete from pgchannels.outbox returning xid, id, channel, payload)"
        " select channel, payload from taken order by xid, id"
    ).fetchall()
    return [(channel, payload) for channel, payload in rows]


def payloads(connection: Connection) -> list[dict[str, Any]]:
    return [payload for _, payload in told(connection)]


def outline(connection: Connection) -> list[tuple[str, Any]]:
    """Of messages about tables with a key "id": what happened, and to which row."""
    return [
        (payload["type"].partition(".")[2], payload["key"]["id"])
        for payload in payloads(connection)
    ]


class TestOperations:
    def test_insert(self, orders: Connection) -> None:
        orders.execute("insert into orders values (1, 7, 'new', 12.50)")
        assert told(orders) == [
            (
                "orders:7",
                {
                    "type": "orders.inserted",
                    "key": {"id": 1},
                    "new": {"id": 1, "customer_id": 7, "status": "new", "total": 12.5},
                },
            )
        ]

    def test_update_tells_what_has_changed(self, orders: Connection) -> None:
        orders.execute("insert into orders values (1, 7)")
        told(orders)
        orders.execute("update orders set status = 'paid', total = 3, customer_id = 7")
        assert told(orders) == [
            (
                "orders:7",
                {
                    "type": "orders.updated",
                    "key": {"id": 1},
                    "new": {"status": "paid", "total": 3},
                    "old": {"status": "new", "total": 0},
                },
            )
        ]

    def test_delete(self, orders: Connection) -> None:
        orders.execute("insert into orders values (1, 7, 'new', 2)")
        told(orders)
        orders.execute("delete from orders")
        assert told(orders) == [
            (
                "orders:7",
                {
                    "type": "orders.deleted",
                    "key": {"id": 1},
                    "old": {"id": 1, "customer_id": 7, "status": "new", "total": 2},
                },
            )
        ]

    def test_several_rows_in_the_order_of_writing(self, orders: Connection) -> None:
        orders.execute("insert into orders select i, 7 from unnest('{5,3,9,1}'::int[]) i")
        assert outline(orders) == [("inserted", i) for i in (5, 3, 9, 1)]
        orders.execute("update orders set status = 'paid'")
        assert outline(orders) == [("updated", i) for i in (5, 3, 9, 1)]
        orders.execute("delete from orders")
        assert outline(orders) == [("deleted", i) for i in (5, 3, 9, 1)]

    def test_statements_of_a_transaction_in_their_order(self, orders: Connection) -> None:
        with orders.transaction():
            orders.execute("insert into orders values (1, 7), (2, 7)")
            orders.execute("select pgchannels.publish('other', '{\"type\": \"between\"}')")
            orders.execute("delete from orders where id = 1")
            orders.execute("insert into orders values (1, 8)")
            orders.execute("update orders set status = 'paid' where id = 2")
        assert [(channel, payload["type"]) for channel, payload in told(orders)] == [
            ("orders:7", "orders.inserted"),
            ("orders:7", "orders.inserted"),
            ("other", "between"),
            ("orders:7", "orders.deleted"),
            ("orders:8", "orders.inserted"),
            ("orders:7", "orders.updated"),
        ]

    @pytest.mark.parametrize(
        "statement",
        [
            "update orders set status = status",
            "update orders set total = total + 0.00",
            "update orders set status = 'paid' where id = 99",
            "delete from orders where id = 99",
            "insert into orders select 1, 1 where false",
            "insert into orders values (1, 7) on conflict do nothing",
        ],
    )
    def test_nothing_has_changed(self, orders: Connection, statement: str) -> None:
        orders.execute("insert into orders values (1, 7)")
        told(orders)
        orders.execute(statement.encode())
        assert told(orders) == []

    def test_a_row_that_moves_is_told_of_in_both_channels(self, orders: Connection) -> None:
        orders.execute("insert into orders values (1, 7), (2, 8)")
        told(orders)
        orders.execute("update orders set customer_id = 8")
        change = {"new": {"customer_id": 8}, "old": {"customer_id": 7}}
        message = {"type": "orders.updated", "key": {"id": 1}, **change}
        assert told(orders) == [("orders:7", message), ("orders:8", message)]

    def test_null_in_the_name_is_no_channel(self, orders: Connection) -> None:
        orders.execute("insert into orders values (1, null)")
        orders.execute("update orders set status = 'paid'")
        assert told(orders) == []
        orders.execute("update orders set customer_id = 7")
        assert [channel for channel, _ in told(orders)] == ["orders:7"]
        orders.execute("update orders set customer_id = null")
        assert [channel for channel, _ in told(orders)] == ["orders:7"]
        orders.execute("delete from orders")
        assert told(orders) == []

    def test_a_changed_key_is_a_deletion_and_an_insertion(self, orders: Connection) -> None:
        orders.execute("insert into orders values (1, 7), (2, 7)")
        told(orders)
        orders.execute("update orders set id = id + 10 where id = 1")
        assert [(p["type"], p["key"]["id"]) for p in payloads(orders)] == [
            ("orders.deleted", 1),
            ("orders.inserted", 11),
        ]

    def test_keys_that_move_into_one_another(self, orders: Connection) -> None:
        orders.execute("insert into orders values (3, 3), (2, 2), (1, 1)")
        told(orders)
        orders.execute("update orders set id = id + 1")
        assert sorted((p["key"]["id"], p["type"].split(".")[1]) for p in payloads(orders)) == [
            (1, "deleted"),
            *[(2, "updated")] * 2,  # moved from one customer's channel to another's, too
            *[(3, "updated")] * 2,
            (4, "inserted"),
        ]

    def test_insert_on_conflict(self, orders: Connection) -> None:
        orders.execute("insert into orders values (1, 7)")
        told(orders)
        orders.execute(
            "insert into orders values (1, 7, 'again'), (2, 7, 'first')"
            " on conflict (id) do update set status = excluded.status"
        )
        assert outline(orders) == [("updated", 1), ("inserted", 2)]

    def test_merge(self, orders: Connection) -> None:
        orders.execute("insert into orders values (1, 7), (2, 7), (3, 7)")
        told(orders)
        # The row that is deleted and the one that is inserted have the same key.
        orders.execute(
            """
            merge into orders
            using (values (1, 'gone'), (2, 'paid'), (null, 'new')) s(id, status) on orders.id = s.id
             when matched and s.status = 'gone' then delete
             when matched then update set status = s.status
             when not matched then insert values (1, 8, s.status)
            """
        )
        assert outline(orders) == [("deleted", 1), ("updated", 2), ("inserted", 1)]

    def test_update_from(self, orders: Connection) -> None:
        orders.execute("insert into orders values (1, 7), (2, 7)")
        told(orders)
        orders.execute(
            "update orders set total = v.total from (values (2, 5)) v(id, total)"
            " where v.id = orders.id"
        )
        assert outline(orders) == [("updated", 2)]

    def test_rows_that_are_replaced_in_one_statement(self, orders: Connection) -> None:
        orders.execute("insert into orders values (1, 7), (2, 7)")
        told(orders)
        orders.execute(
            "with gone as (delete from orders returning *)"
            " insert into orders select id, customer_id, 'anew' from gone"
        )
        assert outline(orders) == [
            ("deleted", 1),
            ("deleted", 2),
            ("inserted", 1),
            ("inserted", 2),
        ]

    def test_truncate_is_not_seen(self, orders: Connection) -> None:
        orders.execute("insert into orders values (1, 7)")
        told(orders)
        orders.execute("truncate orders")
        assert told(orders) == []

    def test_what_is_replicated_is_not_seen(self, orders: Connection) -> None:
        with orders.transaction():
            orders.execute("set local session_replication_role = replica")
            orders.execute("insert into orders values (1, 7)")
        assert told(orders) == []

    @pytest.mark.parametrize("operation", ["insert", "update", "delete"])
    def test_some_operations_only(self, connection: Connection, operation: str) -> None:
        connection.execute(ORDERS)
        watch(connection, "orders", "orders", operations=[operation, operation])
        connection.execute("insert into orders values (1, 7)")
        connection.execute("update orders set status = 'paid'")
        connection.execute("delete from orders")
        assert [kind for kind, _ in outline(connection)] == [f"{operation.removesuffix('e')}ed"]

    def test_copy_of_many_rows(self, orders: Connection) -> None:
        orders.execute("set track_functions = 'all'")
        count = 100_000
        with orders.cursor().copy("copy orders (id, customer_id) from stdin") as copy:
            copy.write("".join(f"{i}\t{i % 50}\n" for i in range(count)))
        orders.execute("select pg_stat_force_next_flush()")
        calls = orders.execute(
            "select calls from pg_stat_user_functions where funcname = 'publish_changes'"
        ).fetchall()
        assert calls == [(1,)]
        found = orders.execute(
            """
            select count(*), count(distinct channel),
                   bool_and((payload -> 'key' ->> 'id')::int = place - 1)
              from (select *, row_number() over (order by xid, id) as place
                      from pgchannels.outbox) o
            """
        ).fetchone()
        assert found == (count, 50, True)

    def test_each_row_is_looked_at_once(self, orders: Connection) -> None:
        orders.execute("set track_functions = 'all'")
        orders.execute("insert into orders select i, i % 5 from generate_series(1, 1000) i")
        orders.execute("update orders set status = 'paid'")
        orders.execute("delete from orders")
        orders.execute("select pg_stat_force_next_flush()")
        calls = orders.execute(
            "select funcname, calls from pg_stat_user_functions where funcname ~ '^watched_'"
        ).fetchall()
        assert dict(calls) == {"watched_change": 3000, "watched_channel": 4000}


class TestTransactions:
    def test_rollback(self, orders: Connection) -> None:
        with orders.transaction(force_rollback=True):
            orders.execute("insert into orders values (1, 7)")
        assert told(orders) == []

    def test_savepoints(self, orders: Connection) -> None:
        with orders.transaction():
            orders.execute("insert into orders values (1, 7)")
            with orders.transaction(force_rollback=True):
                orders.execute("insert into orders values (2, 7)")
                with orders.transaction():
                    orders.execute("delete from orders")
            with orders.transaction():
                orders.execute("insert into orders values (3, 7)")
        assert outline(orders) == [("inserted", 1), ("inserted", 3)]

    def test_a_statement_that_fails(self, orders: Connection) -> None:
        with pytest.raises(psycopg.errors.UniqueViolation):
            orders.execute("insert into orders values (1, 7), (1, 8)")
        assert told(orders) == []

    def test_two_phase_commit(self, orders: Connection) -> None:
        for end in ("rollback prepared", "commit prepared"):
            orders.execute("begin")
            orders.execute("insert into orders values (1, 7)")
            orders.execute("prepare transaction 'order'")
            assert told(orders) == []
            orders.execute(f"{end} 'order'".encode())
        assert outline(orders) == [("inserted", 1)]


class TestKeys:
    def test_several_columns(self, connection: Connection) -> None:
        connection.execute(
            "create table lines (note text, number int, ordered int, primary key (ordered, number))"
        )
        watch(connection, "lines", "lines")
        connection.execute("insert into lines values ('a', 1, 1), ('b', 2, 1), ('c', 1, 2)")
        assert [p["key"] for p in payloads(connection)] == [
            {"ordered": 1, "number": 1},
            {"ordered": 1, "number": 2},
            {"ordered": 2, "number": 1},
        ]
        connection.execute("update lines set note = note || '!' where number = 1")
        assert [(p["key"]["ordered"], p["new"], p["old"]) for p in payloads(connection)] == [
            (1, {"note": "a!"}, {"note": "a"}),
            (2, {"note": "c!"}, {"note": "c"}),
        ]
        connection.execute("update lines set number = 3 where number = 2")
        assert [(p["type"], p["key"]) for p in payloads(connection)] == [
            ("lines.deleted", {"ordered": 1, "number": 2}),
            ("lines.inserted", {"ordered": 1, "number": 3}),
        ]

    def test_columns_that_the_key_includes_are_not_of_it(self, connection: Connection) -> None:
        connection.execute("create table t (id int, a int, primary key (id) include (a))")
        watch(connection, "t", "t")
        connection.execute("insert into t values (1, 1)")
        connection.execute("update t set a = 2")
        inserted, updated = payloads(connection)
        assert inserted["key"] == {"id": 1}
        assert updated == {
            "type": "t.updated",
            "key": {"id": 1},
            "new": {"a": 2},
            "old": {"a": 1},
        }

    def test_none(self, connection: Connection) -> None:
        connection.execute("create table t (a int)")
        with pytest.raises(ObjectNotInPrerequisiteState, match="t has no primary key"):
            watch(connection, "t", "t")
        watch(connection, "t", "t", operations=["insert", "delete"])
        connection.execute("insert into t values (1), (1)")
        connection.execute("delete from t")
        assert payloads(connection) == [
            *[{"type": "t.inserted", "key": None, "new": {"a": 1}}] * 2,
            *[{"type": "t.deleted", "key": None, "old": {"a": 1}}] * 2,
        ]

    @pytest.mark.parametrize("initially", ["immediate", "deferred"])
    def test_one_that_may_be_broken_for_a_moment(
        self, connection: Connection, initially: str
    ) -> None:
        connection.execute(
            f"create table t (id int primary key deferrable initially {initially})".encode()
        )
        with pytest.raises(ObjectNotInPrerequisiteState, match="a deferrable primary key"):
            watch(connection, "t", "t")
        watch(connection, "t", "t", operations=["insert"])
        connection.execute("insert into t values (1)")
        assert [p["key"] for p in payloads(connection)] == [{"id": 1}]

    def test_has_one_text_whoever_writes(self, connection: Connection) -> None:
        connection.execute(
            "create table t (at timestamptz, b bytea, d interval, r tstzrange, f float8,"
            " primary key (at, b, d, r, f))"
        )
        watch(connection, "t", "t")
        connection.execute(
            "insert into t values ('2026-01-01 00:00+00', '\\x00ff', '1 day 2 hours',"
            " '[2026-01-01 00:00+00, 2026-01-02 00:00+00)', 0.1::float8 + 0.2)"
        )
        connection.execute("set timezone = 'Asia/Tokyo'")
        connection.execute("set bytea_output = 'escape'")
        connection.execute("set intervalstyle = 'iso_8601'")
        connection.execute("set datestyle = 'German'")
        connection.execute("set extra_float_digits = -3")
        connection.execute("delete from t")
        inserted, deleted = payloads(connection)
        assert inserted["key"] == deleted["key"]
        assert inserted["key"]["at"] == "2026-01-01T00:00:00+00:00"
        # What the writer has set holds on.
        assert connection.execute("show timezone").fetchone() == ("Asia/Tokyo",)


class TestForeignKeys:
    @pytest.fixture
    def lines(self, connection: Connection) -> Connection:
        connection.execute(
            """
            create table parents (id int primary key);
            create table children (
                id int primary key,
                a int references parents on update cascade on delete cascade,
                b int references parents on update cascade on delete set null
            );
            insert into parents select generate_series(1, 5);
            """
        )
        watch(connection, "children", "children")
        return connection

    def test_on_delete_cascade(self, lines: Connection) -> None:
        lines.execute("insert into children values (1, 1), (2, 1), (3, 2), (4, 3)")
        told(lines)
        lines.execute("delete from parents where id in (1, 2)")
        assert outline(lines) == [("deleted", 1), ("deleted", 2), ("deleted", 3)]

    def test_on_delete_set_null(self, lines: Connection) -> None:
        lines.execute("insert into children values (1, null, 1), (2, null, 2)")
        told(lines)
        lines.execute("delete from parents where id in (1, 2)")
        assert [(p["key"], p["new"], p["old"]) for p in payloads(lines)] == [
            ({"id": 1}, {"b": None}, {"b": 1}),
            ({"id": 2}, {"b": None}, {"b": 2}),
        ]

    def test_on_update_cascade(self, lines: Connection) -> None:
        lines.execute("insert into children values (1, 1), (2, 2)")
        told(lines)
        lines.execute("update parents set id = id + 10")
        assert [(p["key"], p["new"], p["old"]) for p in payloads(lines)] == [
            ({"id": 1}, {"a": 11}, {"a": 1}),
            ({"id": 2}, {"a": 12}, {"a": 2}),
        ]

    def test_twice_in_one_statement_ends_with_what_it_is(self, lines: Connection) -> None:
        lines.execute("insert into children values (1, 1, 2), (2, 4, 3), (3, 5, 5)")
        told(lines)
        lines.execute("update parents set id = id + 10")
        state: dict[int, dict[str, int]] = {}
        for payload in payloads(lines):
            state.setdefault(payload["key"]["id"], {}).update(payload["new"])
        assert state == {1: {"a": 11, "b": 12}, 2: {"a": 14, "b": 13}, 3: {"a": 15, "b": 15}}

    def test_to_the_table_itself(self, connection: Connection) -> None:
        connection.execute(
            "create table tree (id int primary key, above int references tree on delete cascade);"
            "insert into tree values (1, null), (2, 1), (3, 2), (4, 3), (5, 1), (6, 5)"
        )
        watch(connection, "tree", "tree")
        connection.execute("delete from tree where id = 1")
        assert sorted(outline(connection)) == [("deleted", i) for i in range(1, 7)]


class TestPartitions:
    @pytest.fixture
    def events(self, connection: Connection) -> Connection:
        connection.execute(
            """
            create table events (id int, region text, note text, primary key (id, region))
                partition by list (region);
            create table events_east partition of events for values in ('east');
            create table events_west (note text, region text not null, id int not null);
            alter table events attach partition events_west for values in ('west');
            """
        )
        watch(connection, "events", "events:{region}")
        return connection

    def test_by_the_name_of_the_whole(self, events: Connection) -> None:
        events.execute("insert into events values (1, 'east', 'a'), (2, 'west', 'b')")
        events.execute("update events set note = note || '!'")
        events.execute("delete from events")
        found = told(events)
        assert [(channel, p["type"], p["key"]["id"]) for channel, p in found] == [
            ("events:east", "events.inserted", 1),
            ("events:west", "events.inserted", 2),
            ("events:east", "events.updated", 1),
            ("events:west", "events.updated", 2),
            ("events:east", "events.deleted", 1),
            ("events:west", "events.deleted", 2),
        ]
        assert found[3][1]["new"] == {"note": "b!"}

    def test_a_row_that_moves_to_another(self, events: Connection) -> None:
        events.execute("insert into events values (1, 'east', 'a'), (2, 'east', 'b')")
        told(events)
        events.execute("update events set region = 'west' where id = 1")
        assert [(channel, p["type"], p["key"]) for channel, p in told(events)] == [
            ("events:east", "events.deleted", {"id": 1, "region": "east"}),
            ("events:west", "events.inserted", {"id": 1, "region": "west"}),
        ]

    def test_by_the_name_of_a_partition_is_not_seen(self, events: Connection) -> None:
        events.execute("insert into events_east values (1, 'east', 'a')")
        assert told(events) == []

    def test_a_partition_by_itself(self, events: Connection) -> None:
        watch(events, "events_west", "west", operations=["insert"])
        events.execute("insert into events_west values ('b', 'west', 2)")
        assert [(channel, p["type"]) for channel, p in told(events)] == [
            ("west", "events_west.inserted")
        ]

    def test_inheritance(self, connection: Connection) -> None:
        connection.execute(
            "create table parents (id int primary key, a int);"
            "create table children (b int) inherits (parents)"
        )
        watch(connection, "parents", "parents")
        connection.execute("insert into children values (1, 1, 1)")
        assert told(connection) == []
        connection.execute("update parents set a = 2")
        assert [(p["type"], p["key"], p["new"]) for p in payloads(connection)] == [
            ("parents.updated", {"id": 1}, {"a": 2})
        ]

    @pytest.mark.parametrize("change", ["secret = secret || '!'", "id = 7, secret = 'both'"])
    def test_rows_that_only_inheritance_lets_have_one_key(
        self, connection: Connection, change: str
    ) -> None:
        connection.execute(
            "create table parents (tenant int, id int primary key, secret text);"
            "create table children () inherits (parents);"
            "insert into parents values (1, 1, 'a');"
            "insert into children values (2, 1, 'b'), (2, 2, 'c')"
        )
        watch(connection, "parents", "tenant:{tenant}")
        with pytest.raises(ObjectNotInPrerequisiteState, match="the same primary key"):
            connection.execute(f"update parents set {change}".encode())
        assert told(connection) == []
        connection.execute("update only parents set secret = 'A'")
        connection.execute("update parents set secret = 'C' where id = 2")
        connection.execute("delete from parents")
        assert [
            (channel, p.get("new") or p["old"]["secret"]) for channel, p in told(connection)
        ] == [
            ("tenant:1", {"secret": "A"}),
            ("tenant:2", {"secret": "C"}),
            *[("tenant:1", "A"), ("tenant:2", "b"), ("tenant:2", "C")],
        ]


class TestNumbers:
    def test_no_key_becomes_another_rows_in_a_browser(self, connection: Connection) -> None:
        connection.execute(
            "create table big (id bigint, part int, total numeric, primary key (id, part))"
        )
        connection.execute("select pgchannels.watch('big', 'big:{id}', condition => '$.*.id > 1')")
        large = 2**53 + 1
        connection.execute("insert into big values (%s, 1, 9.90), (7, 1, 9.90)", [large])
        connection.execute("update big set total = 1234567890.1234567890")
        connection.execute("delete from big where id > 7")
        assert told(connection) == [
            (
                f"big:{large}",
                {
                    "type": "big.inserted",
                    "key": {"id": str(large), "part": 1},
                    "new": {"id": str(large), "part": 1, "total": 9.9},
                },
            ),
            (
                "big:7",
                {
                    "type": "big.inserted",
                    "key": {"id": 7, "part": 1},
                    "new": {"id": 7, "part": 1, "total": 9.9},
                },
            ),
            (
                f"big:{large}",
                {
                    "type": "big.updated",
                    "key": {"id": str(large), "part": 1},
                    "new": {"total": "1234567890.1234567890"},
                    "old": {"total": 9.9},
                },
            ),
            (
                "big:7",
                {
                    "type": "big.updated",
                    "key": {"id": 7, "part": 1},
                    "new": {"total": "1234567890.1234567890"},
                    "old": {"total": 9.9},
                },
            ),
            (
                f"big:{large}",
                {
                    "type": "big.deleted",
                    "key": {"id": str(large), "part": 1},
                    "old": {"id": str(large), "part": 1, "total": "1234567890.1234567890"},
                },
            ),
        ]


class TestTypes:
    @pytest.mark.parametrize(
        ("column", "value", "expected"),
        [
            ("smallint", "-32768", -32768),
            ("bigint", "9007199254740991", 2**53 - 1),
            ("bigint", "-9007199254740991", 1 - 2**53),
            # What a double does not hold is a text.
            ("bigint", "9007199254740992", "9007199254740992"),
            ("bigint", "-9223372036854775807", "-9223372036854775807"),
            ("large", "9223372036854775807", "9223372036854775807"),
            ("numeric", "123456789012.345", 123456789012.345),
            ("numeric", "-1234567890123.456", "-1234567890123.456"),
            ("numeric", "0.000000000000001", 1e-15),
            ("numeric", "1e400", "1" + "0" * 400),
            ("numeric", "1e-400", "0." + "0" * 399 + "1"),
            ("text", "'9007199254740993'", "9007199254740993"),
            ("float8", "1e308", 10**308),
            ("numeric", "'NaN'", "NaN"),
            ("numeric", "'Infinity'", "Infinity"),
            ("numeric", "12.500", 12.5),
            ("float8", "'-Infinity'", "-Infinity"),
            ("float8", "0.1::float8 + 0.2", 0.1 + 0.2),
            ("boolean", "true", True),
            ("text", "E'a\"b\\\\c\\n\\t{}é🚀'", 'a"b\\c\n\t{}é🚀'),
            ("varchar(3)", "'abc'", "abc"),
            ('"char"', "'x'", "x"),
            ("date", "'infinity'", "infinity"),
            ("date", "'0044-03-15 BC'", "0044-03-15 BC"),
            ("timestamp", "'2026-01-02 03:04:05.678901'", "2026-01-02T03:04:05.678901"),
            ("timestamptz", "'2026-01-02 03:04:05+02'", "2026-01-02T01:04:05+00:00"),
            ("timestamptz", "'-infinity'", "-infinity"),
            ("time", "'12:34:56'", "12:34:56"),
            ("interval", "'1 day 02:03:04'", "1 day 02:03:04"),
            (
                "uuid",
                "'00000000-0000-0000-0000-00000000000a'",
                f"{'0' * 8}-0000-0000-0000-{'0' * 11}a",
            ),
            ("bytea", "'\\x00ff'", "\\x00ff"),
            ("jsonb", """'{"a": [1, null]}'""", {"a": [1, None]}),
            ("json", """'{"a":  1, "a": 2}'""", {"a": 2}),
            ("json", "'null'", None),
            ("int[]", "'{{1,2},{3,null}}'", [[1, 2], [3, None]]),
            ("text[]", "'{}'", []),
            ("int4range", "'[1,5)'", "[1,5)"),
            ("nummultirange", "'{[1,2),[3,4]}'", "{[1,2),[3,4]}"),
            ("mood", "'so so'", "so so"),
            ("pair", "row(1, 'b')", {"x": 1, "Y z": "b"}),
            ("pair[]", "array[row(1, 'b')::pair]", [{"x": 1, "Y z": "b"}]),
            ("positive", "5", 5),
            ("inet", "'10.0.0.1/8'", "10.0.0.1/8"),
            ("point", "'(1,2)'", "(1,2)"),
            ("bit(3)", "'101'", "101"),
            ("regclass", "'pg_class'", "pg_class"),
            ("tsvector", "'a b'", "'a' 'b'"),
        ],
    )
    def test_as_they_are_in_json(
        self, connection: Connection, column: str, value: str, expected: Any
    ) -> None:
        connection.execute(
            "create type mood as enum ('so so', 'well');"
            "create domain large as bigint;"
            'create type pair as (x int, "Y z" text);'
            "create domain positive as int check (value > 0)"
        )
        connection.execute(f"create table t (id int primary key, v {column})".encode())
        watch(connection, "t", "t")
        connection.execute(f"insert into t values (1, {value})".encode())
        connection.execute("update t set v = null")
        connection.execute(f"update t set v = {value}".encode())
        inserted, *updated = payloads(connection)
        assert inserted["new"] == {"id": 1, "v": expected}
        if expected is None:
            assert updated == []
        else:
            assert [(p["new"], p["old"]) for p in updated] == [
                ({"v": None}, {"v": expected}),
                ({"v": expected}, {"v": None}),
            ]

    @pytest.mark.parametrize("text", [r'{"a": "\u0000"}', r'{"a": "\ud800"}'])
    def test_json_that_jsonb_cannot_hold(self, connection: Connection, text: str) -> None:
        connection.execute("create table t (id int primary key, v json)")
        watch(connection, "t", "t")
        with pytest.raises((UntranslatableCharacter, psycopg.errors.InvalidTextRepresentation)):
            connection.execute("insert into t values (1, %s::json)", [text])
        assert connection.execute("select count(*) from t").fetchone() == (0,)

    def test_too_large(self, connection: Connection) -> None:
        connection.execute("create table t (id int primary key, v text)")
        watch(connection, "t", "t")
        with pytest.raises(CheckViolation, match="outbox_max_message_size"):
            connection.execute("insert into t values (1, repeat('x', 17000000))")
        watch(connection, "t", "t", columns=["id"])
        connection.execute("insert into t values (1, repeat('x', 17000000))")
        assert payloads(connection) == [{"type": "t.inserted", "key": {"id": 1}, "new": {"id": 1}}]

    def test_generated_columns(self, connection: Connection) -> None:
        connection.execute(
            "create table t (id int primary key, a int,"
            " twice int generated always as (a * 2) stored,"
            " nr int generated always as identity)"
        )
        watch(connection, "t", "t:{twice}")
        connection.execute("insert into t (id, a) values (1, 2)")
        connection.execute("update t set a = 3")
        assert [(channel, p["new"]) for channel, p in told(connection)] == [
            ("t:4", {"id": 1, "a": 2, "twice": 4, "nr": 1}),
            ("t:4", {"a": 3, "twice": 6}),
            ("t:6", {"a": 3, "twice": 6}),
        ]

    def test_virtual_columns_are_left_out(
        self, connection: Connection, postgres_version: int
    ) -> None:
        if postgres_version < 18:
            pytest.skip("virtual generated columns came with PostgreSQL 18")
        connection.execute(
            "create table t (id int primary key, a int,"
            " twice int generated always as (a * 2) virtual)"
        )
        for arguments in ("'t:{twice}'", "'t', columns => '{twice}'"):
            with pytest.raises(UndefinedColumn, match="has no stored column twice"):
                connection.execute(f"select pgchannels.watch('t', {arguments})".encode())
        watch(connection, "t", "t")
        connection.execute("insert into t (id, a) values (1, 2)")
        connection.execute("update t set a = 3")
        assert [p["new"] for p in payloads(connection)] == [{"id": 1, "a": 2}, {"a": 3}]


HOSTILE_NAMES = [
    "Orders",
    "order",
    "two words",
    'quo"te',
    "quo'te",
    "semi;colon",
    "new\nline",
    "back\\slash",
    "dollar$$",
    "$body$",
    "per%cent %I %s",
    "--",
    "/*",
    "'); drop table victim; --",
    '"; drop table victim; --',
    "dot.ted",
    "n" * 63,
    "é" * 31,
    "日本",
    "🚀",
    "\u202eright to left",
]

# The trigger function's variables and what it calls its tables and columns.
VARIABLES = [
    "watch",
    "kind",
    "parts",
    "key",
    "columns",
    "condition",
    "unseen",
    "sample",
    "missing",
    "row",
    "place",
    "n",
    "o",
    "a",
    "b",
    "c",
    "k",
    "r",
    "m",
    "t",
    "u",
    "old",
    "new",
    "channel",
    "payload",
    "before",
    "after",
    "new_rows",
    "old_rows",
    "tg_op",
    "tg_argv",
    "name",
    "value",
    "xid",
    "id2",
    "identity",
    "news",
    "olds",
]


class TestNames:
    @pytest.mark.parametrize("name", HOSTILE_NAMES)
    def test_of_tables_schemas_and_columns(self, connection: Connection, name: str) -> None:
        connection.execute("create table victim ()")
        table = sql.Identifier(name, name)
        column = sql.Identifier(name)
        connection.execute(sql.SQL("create schema {}").format(column))
        connection.execute(
            sql.SQL("create table {} ({} int primary key, v int)").format(table, column)
        )
        relation = table.as_string(connection)
        channel = "changes:{" + name + "}"
        watch(connection, relation, channel, columns=[name, "v"])
        connection.execute(sql.SQL("insert into {} values (1, 1)").format(table))
        connection.execute(sql.SQL("update {} set v = 2").format(table))
        connection.execute(sql.SQL("delete from {}").format(table))
        assert [(to, p["type"], p["key"]) for to, p in told(connection)] == [
            ("changes:1", f"{name}.{what}", {name: 1})
            for what in ("inserted", "updated", "deleted")
        ]
        listed = connection.execute(
            "select distinct relation::text, channel, columns from pgchannels.watches"
        ).fetchall()
        assert listed == [
            (connection.execute("select %s::regclass::text", [relation]).fetchone() or ())
            + (channel, [name, "v"])
        ]
        assert connection.execute(
            "select pgchannels.unwatch(%s, %s)", [relation, channel]
        ).fetchone() == (True,)
        connection.execute(sql.SQL("insert into {} values (1, 1)").format(table))
        assert told(connection) == []
        connection.execute("table victim")

    @pytest.mark.parametrize("table", ["new_rows", "old_rows", "outbox", "watch", "pg_class", "n"])
    def test_like_those_in_the_function(self, connection: Connection, table: str) -> None:
        columns = ", ".join(f'"{name}" int' for name in VARIABLES)
        connection.execute(
            f'create table public."{table}" (id int primary key, {columns})'.encode()
        )
        watch(
            connection, f'public."{table}"', "t:{key}", condition="$.new.row > 0 || $.old.row > 0"
        )
        values = ", ".join(map(str, range(1, len(VARIABLES) + 1)))
        connection.execute(f'insert into public."{table}" values (1, {values})'.encode())
        connection.execute(f'update public."{table}" set payload = -1, "row" = 99'.encode())
        connection.execute(f'delete from public."{table}"'.encode())
        inserted, updated, deleted = payloads(connection)
        expected = dict(zip(["id", *VARIABLES], [1, *range(1, len(VARIABLES) + 1)], strict=True))
        assert inserted["new"] == expected
        assert updated["new"] == {"payload": -1, "row": 99}
        assert deleted["old"] == {**expected, "payload": -1, "row": 99}

    def test_braces_in_a_channel(self, connection: Connection) -> None:
        connection.execute("create table t (id int primary key, b text)")
        watch(connection, "t", "t:{{{id}}}{{id}}/{b}{b}")
        connection.execute("insert into t values (7, 'x{y}')")
        assert [channel for channel, _ in told(connection)] == ["t:{7}{id}/x{y}x{y}"]

    @pytest.mark.parametrize(
        "value",
        ["a b", "a\nb", "a+", "#", "*", "x" * 200, "\u200b", "zero\u2028width"],
    )
    def test_an_invalid_channel_fails_the_write(self, connection: Connection, value: str) -> None:
        connection.execute("create table t (id int primary key, name text)")
        connection.execute("insert into t values (1, %s)", [value])
        watch(connection, "t", "tt:{name}")
        complaint = r"invalid channel name (.|\n)*, of a watched row"
        with pytest.raises(InvalidParameterValue, match=complaint):
            connection.execute("insert into t values (2, %s)", [value])
        with pytest.raises(InvalidParameterValue, match=complaint):
            connection.execute("update t set name = name || '!'")
        # One that is there already can be put right, and be deleted: nobody listens there.
        connection.execute("update t set name = 'valid'")
        assert [channel for channel, _ in told(connection)] == ["tt:valid"]
        connection.execute("alter table t disable trigger user")
        connection.execute("update t set name = %s", [value])
        connection.execute("alter table t enable trigger user")
        connection.execute("delete from t")
        assert told(connection) == []

    def test_an_invalid_channel_of_what_is_not_published(self, connection: Connection) -> None:
        connection.execute("create table t (id int primary key, name text)")
        watch(connection, "t", "t:{name}", condition='$.new.name starts with "ok"')
        connection.execute("insert into t values (1, 'not ok')")
        assert told(connection) == []


class TestColumnsAndConditions:
    def test_columns(self, connection: Connection) -> None:
        connection.execute(ORDERS)
        watch(connection, "orders", "orders:{customer_id}", columns=["status", "status"])
        connection.execute("insert into orders values (1, 7)")
        connection.execute("update orders set total = 1")
        connection.execute("update orders set total = 2, status = 'paid'")
        connection.execute("delete from orders")
        assert payloads(connection) == [
            {"type": "orders.inserted", "key": {"id": 1}, "new": {"status": "new"}},
            {
                "type": "orders.updated",
                "key": {"id": 1},
                "new": {"status": "paid"},
                "old": {"status": "new"},
            },
            {"type": "orders.deleted", "key": {"id": 1}, "old": {"status": "paid"}},
        ]

    @pytest.mark.parametrize(
        ("condition", "expected"),
        [
            ('$.new.status == "paid" && $.old.status != "paid"', [("updated", 1)]),
            ('$.new.status == "paid"', [("updated", 1), ("updated", 1)]),
            ("$.new.total > 10", [("updated", 1)]),
            ("!exists($.new)", []),  # there always is one, null after a deletion
            ("$.new == null", [("deleted", 1)]),
            ('strict $.old.status == "paid"', [("updated", 1), ("deleted", 1)]),
            ('$.new.status like_regex "^n"', [("inserted", 1)]),
            ("$.new.nothing > 1", []),
            ("$.new.status > 1", []),
            ("$.new.status.double() > 1", []),
        ],
    )
    def test_conditions(
        self, connection: Connection, condition: str, expected: list[tuple[str, int]]
    ) -> None:
        connection.execute(ORDERS)
        watch(connection, "orders", "orders", condition=condition)
        connection.execute("insert into orders values (1, 7)")
        connection.execute("update orders set status = 'paid'")
        connection.execute("update orders set total = 11")
        connection.execute("delete from orders")
        assert outline(connection) == expected


class TestChangesOfTheTable:
    def test_a_column_is_added_and_one_dropped(self, orders: Connection) -> None:
        orders.execute("insert into orders values (1, 7)")
        orders.execute("alter table orders add note text default 'n', drop total")
        orders.execute("insert into orders values (2, 7)")
        orders.execute("update orders set note = 'm' where id = 2")
        _, inserted, updated = payloads(orders)
        assert inserted["new"] == {"id": 2, "customer_id": 7, "status": "new", "note": "n"}
        assert updated["new"] == {"note": "m"}

    def test_a_column_changes_its_type(self, orders: Connection) -> None:
        orders.execute("insert into orders values (1, 7)")
        orders.execute("alter table orders alter total type text")
        orders.execute("update orders set total = 'much'")
        assert payloads(orders)[-1]["new"] == {"total": "much"}

    @pytest.mark.parametrize(
        "change",
        [
            "rename customer_id to client_id",  # of the channel
            "rename id to number",  # of the key
            "rename status to state",  # of the columns
            "drop status",
        ],
    )
    def test_what_the_watch_needs_is_gone(self, connection: Connection, change: str) -> None:
        connection.execute(ORDERS)
        watch(connection, "orders", "orders:{customer_id}", columns=["status"])
        connection.execute("insert into orders values (1, 7), (2, 7)")
        connection.execute(f"alter table orders {change}".encode())
        told(connection)
        for statement in (
            "insert into orders values (3, 7)",
            "update orders set total = 1",
            "delete from orders",
        ):
            with pytest.raises(
                UndefinedColumn, match=r"of watched table public\.orders is no more"
            ):
                connection.execute(statement.encode())
        connection.execute("select pgchannels.unwatch('orders')")
        connection.execute("delete from orders")
        assert told(connection) == []

    def test_the_table_is_renamed_and_moved(self, orders: Connection) -> None:
        orders.execute("create schema shop")
        orders.execute("alter table orders rename to purchases")
        orders.execute("alter table purchases set schema shop")
        orders.execute("insert into shop.purchases values (1, 7)")
        assert [p["type"] for p in payloads(orders)] == ["purchases.inserted"]
        assert orders.execute(
            "select distinct relation::text from pgchannels.watches"
        ).fetchall() == [("shop.purchases",)]

    def test_the_table_is_dropped(self, orders: Connection) -> None:
        orders.execute("drop table orders")
        assert orders.execute("select * from pgchannels.watches").fetchall() == []


class TestWatches:
    def test_the_view(self, connection: Connection) -> None:
        connection.execute(ORDERS)
        condition = '$."new"."total" > 10'
        watch(
            connection,
            "orders",
            "orders:{id}",
            columns=["status", "total"],
            condition=condition,
            operations=["update", "insert"],
        )
        rows = connection.execute(
            "select relation::text, channel, columns, condition::text, operation, trigger"
            "  from pgchannels.watches order by operation"
        ).fetchall()
        assert [row[:5] for row in rows] == [
            ("orders", "orders:{id}", ["status", "total"], f"({condition})", operation)
            for operation in ("insert", "update")
        ]
        triggers = connection.execute(
            "select tgname from pg_trigger where tgrelid = 'orders'::regclass order by tgname"
        ).fetchall()
        assert [row[5] for row in rows] == [name for (name,) in triggers]

    def test_two_of_one_table(self, orders: Connection) -> None:
        watch(orders, "orders", "everything", columns=["status"])
        orders.execute("insert into orders values (1, 7)")
        assert sorted(channel for channel, _ in told(orders)) == ["everything", "orders:7"]
        assert orders.execute("select pgchannels.unwatch('orders', 'everything')").fetchone() == (
            True,
        )
        orders.execute("update orders set status = 'paid'")
        assert [channel for channel, _ in told(orders)] == ["orders:7"]

    def test_again_replaces_it(self, orders: Connection) -> None:
        watch(orders, "orders", "orders:{customer_id}", operations=["delete"])
        orders.execute("insert into orders values (1, 7)")
        orders.execute("delete from orders")
        assert outline(orders) == [("deleted", 1)]

    def test_unwatch_of_what_is_not_watched(self, orders: Connection) -> None:
        orders.execute("create table others (id int primary key)")
        for arguments in ("'others'", "'orders', 'orders'", "null", "null, 'orders:{customer_id}'"):
            found = orders.execute(f"select pgchannels.unwatch({arguments})".encode()).fetchone()
            assert found == (False,)
        assert orders.execute("select pgchannels.unwatch('orders')").fetchone() == (True,)
        assert orders.execute("select pgchannels.unwatch('orders')").fetchone() == (False,)

    def test_it_leaves_other_triggers_alone(self, orders: Connection) -> None:
        orders.execute(
            "create trigger pgchannels_mine before update on orders"
            " for each row execute function suppress_redundant_updates_trigger()"
        )
        orders.execute("select pgchannels.unwatch('orders')")
        assert orders.execute(
            "select tgname from pg_trigger where tgrelid = 'orders'::regclass"
        ).fetchall() == [("pgchannels_mine",)]

    def test_two_schemas_watch_one_table(self, orders: Connection, database_url: str) -> None:
        upgrade(Settings(database_url=database_url, schema_name="other"))
        orders.execute("select other.watch('orders', 'orders:{customer_id}')")
        orders.execute("insert into orders values (1, 7)")
        assert outline(orders) == [("inserted", 1)]
        assert orders.execute("select channel from other.outbox").fetchall() == [("orders:7",)]
        orders.execute("select other.unwatch('orders')")
        orders.execute("insert into orders values (2, 7)")
        assert outline(orders) == [("inserted", 2)]
        assert orders.execute("select count(*) from other.outbox").fetchone() == (1,)

    @pytest.mark.parametrize("kind", ["temporary", "unlogged"])
    def test_tables_that_do_not_last(self, connection: Connection, kind: str) -> None:
        connection.execute(f"create {kind} table t (id int primary key)".encode())
        watch(connection, "t", "t")
        connection.execute("insert into t values (1)")
        connection.execute("delete from t")
        assert outline(connection) == [("inserted", 1), ("deleted", 1)]

    def test_rolled_back(self, connection: Connection) -> None:
        connection.execute(ORDERS)
        with connection.transaction(force_rollback=True):
            watch(connection, "orders", "orders")
            connection.execute("insert into orders values (1, 7)")
        connection.execute("insert into orders values (2, 7)")
        assert told(connection) == []


class TestRefusals:
    @pytest.mark.parametrize(
        "relation",
        ["a_view", "a_materialized_view", "a_foreign_table", "a_sequence", "an_index", "a_type"],
    )
    def test_what_is_not_a_table(self, connection: Connection, relation: str) -> None:
        connection.execute(ORDERS)
        connection.execute(
            """
            create view a_view as select * from orders;
            create materialized view a_materialized_view as select * from orders;
            create foreign data wrapper nothing;
            create server nowhere foreign data wrapper nothing;
            create foreign table a_foreign_table (id int) server nowhere;
            create sequence a_sequence;
            create index an_index on orders (status);
            create type a_type as (id int);
            """
        )
        with pytest.raises(WrongObjectType, match=f"{relation} is not a table"):
            watch(connection, relation, "a")

    def test_none(self, connection: Connection) -> None:
        with pytest.raises(WrongObjectType, match="NULL is not a table"):
            connection.execute("select pgchannels.watch(null, 'a')")
        with pytest.raises(UndefinedTable):
            connection.execute("select pgchannels.watch('nothing', 'a')")
        with pytest.raises(WrongObjectType, match="pgchannels itself"):
            connection.execute("select pgchannels.watch('pgchannels.outbox', 'a')")
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="system catalog"):
            connection.execute("select pgchannels.watch('pg_type', 'a', operations => '{insert}')")

    @pytest.mark.parametrize(
        ("channel", "complaint"),
        [
            (None, "invalid channel NULL"),
            ("", "invalid channel name ''"),
            ("a b", "invalid channel name 'a b'"),
            ("a\nb:{id}", "invalid channel name"),
            ("a*", "invalid channel name"),
            ("x" * 201, "invalid channel name"),
            ("x" * 200 + "{id}", "invalid channel name"),
            ("pgchannels:members", "invalid channel name"),
            ("pgchannels:{id}", "invalid channel name"),
            ("pgchannels:everyone{id}", "invalid channel name"),
            ("{id}", "begin with a word of its own"),
            ("{status}{id}", "begin with a word of its own"),
            ("pg{status}", "begin with a word of its own"),
            ("pgchannels{status}", "begin with a word of its own"),
            ("a:{}", "a single brace"),
            ("a:{id", "a single brace"),
            ("a:id}", "a single brace"),
            ("a:{{id}", "a single brace"),
            ("a:{id}}", "a single brace"),
            ("a:{i{d}", "a single brace"),
        ],
    )
    def test_channels(self, connection: Connection, channel: str | None, complaint: str) -> None:
        connection.execute(ORDERS)
        with pytest.raises(InvalidParameterValue, match=complaint):
            connection.execute("select pgchannels.watch('orders', %s)", [channel])
        assert connection.execute("select * from pgchannels.watches").fetchall() == []

    @pytest.mark.parametrize(
        "name", ["ID", "nothing", " id", "id ", "ctid", "xmin", "tableoid", "1", "id; drop", "'"]
    )
    def test_columns_that_are_not_there(self, connection: Connection, name: str) -> None:
        connection.execute(ORDERS)
        with pytest.raises(UndefinedColumn, match="orders has no stored column"):
            watch(connection, "orders", "a:{" + name + "}")
        with pytest.raises(UndefinedColumn, match="orders has no stored column"):
            watch(connection, "orders", "a", columns=["id", name])

    @pytest.mark.parametrize(
        "columns", ["{}", "{null}", "{id,null}", "{{id,status}}", "{{id,status},{id,total}}"]
    )
    def test_columns(self, connection: Connection, columns: str) -> None:
        connection.execute(ORDERS)
        with pytest.raises(InvalidParameterValue, match="columns must be an array of names"):
            connection.execute("select pgchannels.watch('orders', 'a', %s)", [columns])

    @pytest.mark.parametrize(
        "condition",
        [
            "$.new.status",
            '$.new ? (@.status == "paid")',
            "$",
            "1",
            '"x"',
            "$.new.*",
            "$.new.total + 1",
        ],
    )
    def test_conditions_that_are_not_predicates(
        self, connection: Connection, condition: str
    ) -> None:
        connection.execute(ORDERS)
        with pytest.raises(InvalidParameterValue, match="is not a predicate"):
            watch(connection, "orders", "a", condition=condition)

    @pytest.mark.parametrize(
        "condition", ["", "status == 'paid'", "$.new.total > $limit", "$.new; drop table orders"]
    )
    def test_conditions_that_are_not_jsonpath(self, connection: Connection, condition: str) -> None:
        connection.execute(ORDERS)
        with pytest.raises(
            (psycopg.errors.SyntaxError, psycopg.errors.UndefinedObject, psycopg.errors.DataError)
        ):
            watch(connection, "orders", "a", condition=condition)

    @pytest.mark.parametrize(
        "operations", [None, "{}", "{null}", "{insert,null}", "{INSERT}", "{truncate}", "{insert;}"]
    )
    def test_operations(self, connection: Connection, operations: str | None) -> None:
        connection.execute(ORDERS)
        with pytest.raises(InvalidParameterValue, match="operations must be some of"):
            connection.execute(
                "select pgchannels.watch('orders', 'a', operations => %s)", [operations]
            )

    def test_the_trigger_function_is_only_that(self, connection: Connection) -> None:
        with pytest.raises(psycopg.errors.FeatureNotSupported, match="trigger"):
            connection.execute("select pgchannels.publish_changes()")


class TestSearchPath:
    def test_evil_functions_operators_and_tables(self, orders: Connection) -> None:
        orders.execute(
            """
            create schema evil;
            create function evil.to_jsonb(anyelement) returns jsonb
                language sql as $$ select '{}'::jsonb $$;
            create function evil.md5(text) returns text language sql as $$ select 'x' $$;
            create function evil.eq(jsonb, jsonb) returns boolean language sql as $$ select true $$;
            create operator evil.= (function = evil.eq, leftarg = jsonb, rightarg = jsonb);
            create function evil.arrow(jsonb, text) returns text
                language sql as $$ select 'evil' $$;
            create operator evil.->> (function = evil.arrow, leftarg = jsonb, rightarg = text);
            create table evil.pg_class (oid oid, relkind "char");
            create table evil.outbox (channel text, payload json);
            create table evil.new_rows (id int);
            create temp table outbox (channel text, payload json);
            create temp table new_rows (id int);
            create temp table old_rows (id int);
            create temp table pg_trigger (oid oid);
            set search_path = evil, pg_catalog, public;
            """
        )
        orders.execute("insert into public.orders values (1, 7), (2, 8)")
        orders.execute("update public.orders set status = 'paid'")
        orders.execute("select pgchannels.unwatch('public.orders')")
        watch(orders, "public.orders", "again:{id}")
        orders.execute("delete from public.orders")
        assert [(channel, p["type"]) for channel, p in told(orders)] == [
            *[("orders:7", "orders.inserted"), ("orders:8", "orders.inserted")],
            *[("orders:7", "orders.updated"), ("orders:8", "orders.updated")],
            *[("again:1", "orders.deleted"), ("again:2", "orders.deleted")],
        ]


class TestWriters:
    @pytest.fixture
    def writer(self, orders: Connection) -> Iterator[str]:
        name = f"writer_{uuid4().hex[:12]}"
        orders.execute(f"create role {name} login".encode())
        orders.execute(f"grant all on orders to {name}".encode())
        yield name
        orders.execute(f"drop owned by {name}".encode())
        orders.execute(f"drop role {name}".encode())

    def test_must_be_publishers(self, orders: Connection, writer: str, database_url: str) -> None:
        url = database_url.replace("postgres@", f"{writer}@")
        with psycopg.connect(url, autocommit=True) as connection:
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute("insert into orders values (1, 7)")
            orders.execute("select pgchannels.grant_access('publisher', %s)", [writer])
            connection.execute("insert into orders values (1, 7), (2, 7)")
            connection.execute("update orders set status = 'paid'")
            connection.execute("delete from orders where id = 1")
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute("select pgchannels.unwatch('orders')")
        assert [kind for kind, _ in outline(orders)] == [
            *["inserted"] * 2,
            *["updated"] * 2,
            "deleted",
        ]

    def test_a_watch_comes_and_goes_while_they_write(
        self, orders: Connection, database_url: str
    ) -> None:
        stop = threading.Event()
        written: list[int] = []
        failed: list[Exception] = []

        def write(first: int) -> None:
            try:
                with psycopg.connect(database_url, autocommit=True) as connection:
                    id = first
                    while not stop.is_set():
                        connection.execute("insert into orders values (%s, 7)", [id])
                        connection.execute("update orders set status = 'paid' where id = %s", [id])
                        written.append(id)
                        id += 3
            except psycopg.Error as error:
                failed.append(error)

        threads = [threading.Thread(target=write, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(15):
                # Replaced in one transaction: no change falls between the old and the new.
                watch(orders, "orders", "orders:{customer_id}")
                watch(orders, "orders", "others", columns=["total"], operations=["delete"])
                orders.execute("select pgchannels.unwatch('orders', 'others')")
        finally:
            stop.set()
            for thread in threads:
                thread.join(30)
        assert failed == []
        found = outline(orders)
        assert sorted(found) == sorted(
            [("inserted", i) for i in written] + [("updated", i) for i in written]
        )
        for id in written:
            assert found.index(("inserted", id)) < found.index(("updated", id))


class TestOtherKeys:
    """A table whose primary key is another one than when it was watched."""

    @pytest.mark.parametrize(
        "statement",
        [
            "alter table tenants drop constraint tenants_pkey, add primary key (tenant, id)",
            "alter table tenants drop constraint tenants_pkey",
            (
                "alter table tenants drop constraint tenants_pkey,"
                " add constraint tenants_pkey primary key (id) deferrable"
            ),
        ],
    )
    def test_an_update_fails_rather_than_to_mix_rows_up(
        self, connection: Connection, statement: str
    ) -> None:
        connection.execute(
            "create table tenants (tenant int not null, id int primary key, secret text)"
        )
        watch(connection, "tenants", "tenant:{tenant}")
        connection.execute(statement.encode())
        connection.execute("insert into tenants values (1, 1, 'a'), (2, 2, 'b')")
        assert len(told(connection)) == 2
        with pytest.raises(ObjectNotInPrerequisiteState, match="primary key of watched table"):
            connection.execute("update tenants set secret = secret || '!'")
        assert told(connection) == []

    def test_watched_anew_it_works(self, connection: Connection) -> None:
        connection.execute(
            "create table tenants (tenant int not null, id int primary key, secret text)"
        )
        watch(connection, "tenants", "tenant:{tenant}")
        connection.execute(
            "alter table tenants drop constraint tenants_pkey, add primary key (tenant, id)"
        )
        watch(connection, "tenants", "tenant:{tenant}")
        connection.execute("insert into tenants values (1, 1, 'a'), (2, 1, 'b')")
        told(connection)
        connection.execute("update tenants set secret = secret || '!'")
        assert [(channel, payload["new"]) for channel, payload in told(connection)] == [
            ("tenant:1", {"secret": "a!"}),
            ("tenant:2", {"secret": "b!"}),
        ]


def test_a_row_that_moves_is_told_of_whatever_messages_show(connection: Connection) -> None:
    connection.execute(ORDERS)
    watch(connection, "orders", "orders:{customer_id}", columns=["status"])
    connection.execute("insert into orders values (1, 7)")
    told(connection)
    connection.execute("update orders set customer_id = 8")
    moved = {
        "type": "orders.updated",
        "key": {"id": 1},
        "new": {"customer_id": 8},
        "old": {"customer_id": 7},
    }
    assert told(connection) == [("orders:7", moved), ("orders:8", moved)]
    connection.execute("update orders set total = 1")
    assert told(connection) == []


class TestUsers:
    """``user_id =>``: the connections of the user whom a row names."""

    @pytest.fixture
    def invoices(self, connection: Connection) -> Connection:
        connection.execute("create table invoices (id int primary key, owner text, paid boolean)")
        connection.execute("select pgchannels.watch('invoices', user_id => '{owner}')")
        return connection

    def test_is_told_who_is_named_in_the_row(self, invoices: Connection) -> None:
        invoices.execute("insert into invoices values (1, 'a:b'), (2, null), (3, repeat('é', 900))")
        invoices.execute("update invoices set owner = 'c' where id = 1")
        invoices.execute("update invoices set owner = null where id = 1")
        invoices.execute("delete from invoices where id = 3")
        assert [(channel, payload["type"]) for channel, payload in told(invoices)] == [
            (user_channel("a:b"), "invoices.inserted"),
            (user_channel("é" * 900), "invoices.inserted"),
            (user_channel("a:b"), "invoices.updated"),
            (user_channel("c"), "invoices.updated"),
            (user_channel("c"), "invoices.updated"),
            (user_channel("é" * 900), "invoices.deleted"),
        ]

    def test_an_update_of_other_columns_is_told_where_the_row_moves(
        self, invoices: Connection
    ) -> None:
        invoices.execute(
            "select pgchannels.watch('invoices', user_id => '{owner}', columns => '{paid}')"
        )
        invoices.execute("insert into invoices values (1, 'a', false)")
        told(invoices)
        invoices.execute("update invoices set id = id")
        invoices.execute("update invoices set owner = 'b'")
        assert [channel for channel, _ in told(invoices)] == [user_channel("a"), user_channel("b")]

    def test_an_id_that_cannot_be_is_the_writers_mistake(self, invoices: Connection) -> None:
        for owner in ("", "x" * 1001):
            with pytest.raises(InvalidParameterValue, match="invalid user id"):
                invoices.execute("insert into invoices values (1, %s)", [owner])
        invoices.execute("alter table invoices disable trigger user")
        invoices.execute("insert into invoices values (1, '')")
        invoices.execute("alter table invoices enable trigger user")
        invoices.execute("update invoices set owner = 'a'")
        assert [channel for channel, _ in told(invoices)] == [user_channel("a")]

    def test_is_one_watch_beside_those_of_channels(self, invoices: Connection) -> None:
        watch(invoices, "invoices", "owners:{owner}")
        shown = "select distinct channel, user_id from pgchannels.watches order by 1, 2"
        assert invoices.execute(shown).fetchall() == [("owners:{owner}", None), (None, "{owner}")]
        invoices.execute("select pgchannels.watch('invoices', user_id => '{owner}')")
        invoices.execute("insert into invoices values (1, 'a')")
        assert sorted(channel for channel, _ in told(invoices)) == ["owners:a", user_channel("a")]
        unwatch = "select pgchannels.unwatch('invoices', user_id => '{owner}')"
        assert invoices.execute(unwatch).fetchone() == (True,)
        assert invoices.execute(unwatch).fetchone() == (False,)
        invoices.execute("insert into invoices values (2, 'a')")
        assert [channel for channel, _ in told(invoices)] == ["owners:a"]
        invoices.execute("select pgchannels.watch('invoices', user_id => 'a')")
        assert invoices.execute("select pgchannels.unwatch('invoices')").fetchone() == (True,)
        assert invoices.execute(shown).fetchall() == []

    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            ("", "invalid channel NULL"),
            (", 'a', user_id => 'b'", "a channel or a user_id"),
            (", user_id => ''", "invalid user id"),
            (", user_id => '{owner'", "invalid user_id .*: a single brace"),
            (", user_id => repeat('x', 1001)", "invalid user id"),
        ],
    )
    def test_refusals(self, invoices: Connection, arguments: str, complaint: str) -> None:
        with pytest.raises(InvalidParameterValue, match=complaint):
            invoices.execute(f"select pgchannels.watch('invoices'{arguments})".encode())
        with pytest.raises(UndefinedColumn):
            invoices.execute("select pgchannels.watch('invoices', user_id => '{nothing}')")


class TestTriggersOfTheTablesOwn:
    """Which of them may write to the row again, so that the last message has its last value."""

    @pytest.fixture
    def states(self, orders: Connection) -> Connection:
        orders.execute(
            """
            create function mark() returns trigger language plpgsql as $$
            begin
                if tg_when = 'BEFORE' then
                    new.status := 'marked';
                    return new;
                end if;
                update orders set status = 'marked' where status = 'new';
                return null;
            end $$
            """
        )
        return orders

    @staticmethod
    def shown(connection: Connection) -> str:
        """The status that a reader has of the row in the end."""
        status = ""
        for payload in payloads(connection):
            status = payload["new"].get("status", status)
        return status

    @pytest.mark.parametrize(
        "trigger",
        [
            "mark before insert on orders for each row",
            "z_mark after insert on orders for each statement",
        ],
    )
    def test_before_a_row_and_after_ours(self, states: Connection, trigger: str) -> None:
        states.execute(f"create trigger {trigger} execute function mark()".encode())
        states.execute("insert into orders values (1, 7)")
        assert self.shown(states) == "marked"

    @pytest.mark.parametrize(
        "trigger",
        [
            "z_mark after insert on orders for each row",
            "mark after insert on orders for each statement",
        ],
    )
    def test_others_come_before_ours(self, states: Connection, trigger: str) -> None:
        """As the documentation says: what they change is told first, and the insert last."""
        states.execute(f"create trigger {trigger} execute function mark()".encode())
        states.execute("insert into orders values (1, 7)")
        assert self.shown(states) == "new"
