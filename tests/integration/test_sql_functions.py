"""What the database itself refuses and accepts, and how it plans the queries that run all the time.

Whoever publishes, by whatever way, meets the functions and constraints that are tested here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import asyncpg
import orjson
import psycopg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from psycopg.rows import scalar_row

from pgchannels.channels import check_channel
from pgchannels.errors import InvalidChannel
from pgchannels.sql import load_queries
from tests.support.partitions import make_small

MIB = 1024 * 1024
QUERIES = load_queries("pgchannels")

Connection = psycopg.Connection[Any]


@pytest.fixture
def connection(database_url: str) -> Iterator[Connection]:
    with psycopg.connect(database_url, autocommit=True, row_factory=scalar_row) as connection:
        yield connection


def value(connection: Connection, sql: str, *arguments: object) -> Any:
    return connection.execute(sql, arguments or None).fetchone()


def accepted(name: str) -> bool:
    try:
        check_channel(name)
    except InvalidChannel:
        return False
    return True


class TestIsChannel:
    def test_agrees_with_python_on_every_character(self, connection: Connection) -> None:
        by_sql = value(
            connection,
            "select array_agg(c) from generate_series(1, 1114111) c"
            " where c not between 55296 and 57343 and pgchannels.is_channel(chr(c))",
        )
        by_python = [
            c for c in range(1, 0x110000) if not 0xD800 <= c <= 0xDFFF and accepted(chr(c))
        ]
        assert by_sql == by_python

    @pytest.mark.parametrize("character", ["a", "é", "日", "🚀"])
    @pytest.mark.parametrize("length", [0, 1, 199, 200, 201, 400])
    def test_agrees_with_python_on_lengths(
        self, connection: Connection, character: str, length: int
    ) -> None:
        name = character * length
        assert value(connection, "select pgchannels.is_channel(%s)", name) is accepted(name)

    @pytest.mark.parametrize("name", ["a b", "a\n", "\na", "a\nb", "ok\u200b", "a#"])
    def test_looks_at_the_whole_name(self, connection: Connection, name: str) -> None:
        assert value(connection, "select pgchannels.is_channel(%s)", name) is False


# What strings of JSON are made of, with whatever could confuse a search for surrogates.
pieces = st.sampled_from(
    [
        *[r"\ud83d", r"\uD83D", r"\udbff", r"\ud800"],  # high halves
        *[r"\ude80", r"\uDE80", r"\udfff", r"\udc00"],  # low halves
        *[r"\\", r"\"", r"\/", r"\n", r"\u0000", r"\u0041", r"\ud7ff", r"\ue000"],
        *["u", "ud83d", "ude80", "d83d", "de80", "d", "8", " ", "é", "🚀"],
    ]
)
strings = st.lists(pieces, max_size=7).map(lambda found: '"' + "".join(found) + '"')
objects = st.lists(st.tuples(strings, strings), max_size=3).map(
    lambda members: "{" + ", ".join(f"{key}: {text}" for key, text in members) + "}"
)


class TestIsPayload:
    # The connection is shared by the examples of one test, and keeps nothing between them.
    @settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @example(r'{"a": "\ud83d\\\ude80"}')
    @example(r'{"a": "\\ud83d"}')
    @example(r'{"a": "\\\ud83d"}')
    @example(r'{"a": "\ud83d\ud83d\ude80\ude80"}')
    @example(r'{"a": "\ud83d", "b": "\ude80"}')
    @given(text=objects)
    def test_takes_what_readers_can_decode(self, connection: Connection, text: str) -> None:
        try:
            orjson.loads(text)
        except orjson.JSONDecodeError:
            decodable = False
        else:
            decodable = True
        assert value(connection, "select pgchannels.is_payload(%s)", text) is decodable

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("{}", True),
            (' {\n"a" : 1 }\t', True),
            ("[]", False),
            ('"{}"', False),
            ("null", False),
            ("1", False),
        ],
    )
    def test_objects_only(self, connection: Connection, text: str, expected: bool) -> None:
        assert value(connection, "select pgchannels.is_payload(%s)", text) is expected

    @pytest.mark.parametrize(
        "number",
        [
            *("1e400", "-1e400", "1E+309", "1e308", "1e-400", "0e999", "-0.0e400", "12.5e0308"),
            *("1.7976931348623157e308", "1.7976931348623159e308", "1e999999", "1e+000000000000005"),
            *("1" + "0" * 400, "9" * 308, "9" * 309, "1" + "0" * 400 + "e-300", "1" * 30),
        ],
    )
    @pytest.mark.parametrize(
        "text",
        [
            '{"a":%s}',
            '{"a": [1, %s ]}',
            '{"\\\\u0000": "\\u0000\\"", "a":\n%s}',
        ],
    )
    def test_numbers_within_the_range_of_a_double(
        self, connection: Connection, text: str, number: str
    ) -> None:
        whole = text % number
        try:
            orjson.loads(whole)
        except orjson.JSONDecodeError:
            decodable = False
        else:
            decodable = True
        assert value(connection, "select pgchannels.is_payload(%s)", whole) is decodable

    @pytest.mark.parametrize("text", ["1e400", ": 1e400", ", 9" + "9" * 400, "[" * 600])
    def test_what_looks_like_it_in_a_string_passes(self, connection: Connection, text: str) -> None:
        assert value(connection, "select pgchannels.is_payload(%s)", f'{{"a": "{text}"}}') is True

    @pytest.mark.parametrize("around", ["[%s]", '{"a":%s}', '[{"b": [%s], "c": 1}, {}]'])
    def test_at_most_500_levels(self, connection: Connection, around: str) -> None:
        levels = 3 if "b" in around else 1
        for depth, expected in ((498, True), (500, True), (501, False), (1100, False)):
            text, left = "1", depth - 1
            while left >= levels:
                text, left = around % text, left - levels
            text = '{"x": ' + "[" * left + text + "]" * left + "}"
            assert value(connection, "select pgchannels.is_payload(%s)", text) is expected

    @pytest.mark.parametrize("separator", [",", ", ", ",\n"])
    def test_many_neighbours_are_not_deep(self, connection: Connection, separator: str) -> None:
        text = '{"a": [' + separator.join(['{"b": [1]}'] * 2000) + "]}"
        assert value(connection, "select pgchannels.is_payload(%s)", text) is True

    @pytest.mark.parametrize(
        ("payload", "reason"),
        [
            ('{"a": "\\ud800"}', "half of a surrogate pair"),
            ('{"a": 1e400}', "beyond the range of a double"),
            ('{"a": ' + "[" * 500 + "]" * 500 + "}", "more than 500 arrays"),
        ],
    )
    def test_publishers_read_why(self, connection: Connection, payload: str, reason: str) -> None:
        with pytest.raises(psycopg.errors.InvalidParameterValue, match=reason):
            connection.execute("select pgchannels.publish('room', %s)", [payload])
        with pytest.raises(psycopg.errors.CheckViolation, match="payload_is_valid"):
            connection.execute(
                "insert into pgchannels.outbox (channel, payload) values ('room', %s)", [payload]
            )

    def test_the_size_is_in_bytes(self, connection: Connection) -> None:
        fits = '{"a":"' + "é" * (8 * MIB - 4) + '"}'
        assert len(fits.encode()) == 16 * MIB
        assert value(connection, "select pgchannels.is_payload(%s)", fits) is True
        assert value(connection, "select pgchannels.is_payload(%s)", fits + " ") is False


class TestPublish:
    def test_puts_the_message_into_the_outbox_as_it_is(self, connection: Connection) -> None:
        payload = ' {"text":   "hello\\u0041"}'
        connection.execute("select pgchannels.publish('room:1', %s)", [payload])
        assert value(connection, "select payload::text from pgchannels.outbox") == payload
        assert value(connection, "select channel from pgchannels.outbox") == "room:1"
        assert value(connection, "select expires_at is null from pgchannels.outbox") is True

    def test_ttl(self, connection: Connection) -> None:
        connection.execute("select pgchannels.publish('room:1', '{}', interval '1 hour')")
        connection.execute("select pgchannels.publish('room:1', '{}', ttl => '1 hour')")
        assert value(
            connection,
            "select bool_and(expires_at between created_at + '59 min' and created_at + '61 min')"
            " from pgchannels.outbox",
        )

    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            (("a b", "{}", None), "invalid channel name 'a b'"),
            (("", "{}", None), "invalid channel name ''"),
            ((None, "{}", None), "invalid channel name NULL"),
            (("x" * 201, "{}", None), "invalid channel name"),
            (("room", "[1]", None), "invalid payload: it is a JSON array"),
            (("room", "null", None), "invalid payload: it is a JSON null"),
            (("room", None, None), "invalid payload: it is NULL"),
            (("room", r'{"a": "\ud800"}', None), "invalid payload: .* surrogate"),
            (("room", r'{"a": "\ud83d\\\ude80"}', None), "invalid payload: .* surrogate"),
            (("room", "{}", "0 s"), "invalid ttl"),
            (("room", "{}", "-1 s"), "invalid ttl"),
        ],
    )
    def test_refusals(
        self, connection: Connection, arguments: tuple[Any, ...], complaint: str
    ) -> None:
        with pytest.raises(psycopg.errors.InvalidParameterValue, match=complaint):
            connection.execute(
                "select pgchannels.publish(%s::text, %s::json, %s::interval)", arguments
            )
        assert value(connection, "select count(*) from pgchannels.outbox") == 0

    def test_too_large(self, connection: Connection) -> None:
        with pytest.raises(psycopg.errors.InvalidParameterValue, match="more than 16 MiB"):
            connection.execute(
                "select pgchannels.publish('room', json_build_object('a', repeat('x', 16777216)))"
            )

    def test_no_json(self, connection: Connection) -> None:
        with pytest.raises(psycopg.errors.InvalidTextRepresentation):
            connection.execute("select pgchannels.publish('room', '{text: 1}')")

    def test_whatever_the_search_path(self, connection: Connection) -> None:
        connection.execute("create schema evil")
        connection.execute(
            "create function evil.char_length(text) returns int language sql return 1"
        )
        connection.execute("set search_path = evil, pg_catalog")
        with pytest.raises(psycopg.errors.InvalidParameterValue):
            connection.execute("select pgchannels.publish(repeat('x', 201), '{}')")

    def test_in_a_read_only_transaction(self, connection: Connection) -> None:
        connection.execute("set default_transaction_read_only = on")
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            connection.execute("select pgchannels.publish('room', '{}')")


class TestPublishMany:
    def test_keeps_their_order(self, connection: Connection) -> None:
        payloads = [f'{{"n":  {n}}}' for n in range(100)]
        channels = [f"room:{n % 3}" for n in range(100)]
        count = value(
            connection,
            "select pgchannels.publish_many(%s::text[], %s::json[], '1 hour')",
            channels,
            payloads,
        )
        assert count == 100
        rows = connection.execute(
            "select array[channel, payload::text, (expires_at > now())::text]"
            "  from pgchannels.outbox order by id"
        ).fetchall()
        assert rows == [[c, p, "true"] for c, p in zip(channels, payloads, strict=True)]

    def test_none(self, connection: Connection) -> None:
        assert value(connection, "select pgchannels.publish_many('{}', '{}')") == 0

    def test_arrays_that_begin_elsewhere(self, connection: Connection) -> None:
        sql = "select pgchannels.publish_many('[5:6]={a,b}', '[0:1]={1,2}'::json[])"
        with pytest.raises(psycopg.errors.InvalidParameterValue, match="at place 1"):
            connection.execute(sql)
        sql = """select pgchannels.publish_many('[5:6]={a,b}', '[0:1]={"{}","{}"}'::json[])"""
        assert value(connection, sql) == 2

    @pytest.mark.parametrize(
        ("channels", "payloads", "complaint"),
        [
            (None, ["{}"], "of NULL and 1"),
            (["a"], None, "of 1 and NULL"),
            (["a"], [], "of 1 and 0"),
            (["a"], ["{}", "{}"], "of 1 and 2"),
            ([["a", "b"]], ["{}", "{}"], "takes an array of channels"),
            (["a", "b"], [["{}", "{}"]], "takes an array of channels"),
            (["a", "b c"], ["{}", "{}"], "invalid channel name 'b c' at place 2"),
            (["a", None], ["{}", "{}"], "invalid channel name NULL at place 2"),
            (["a", "pgchannels:x"], ["{}", "{}"], "invalid channel name .* at place 2"),
            (["a", "'); drop table x; --"], ["{}", "{}"], "invalid channel name .* at place 2"),
            (["a", "b"], ["{}", None], "invalid payload at place 2: it is NULL"),
            (["a", "b"], ["{}", "[]"], "invalid payload at place 2: it is a JSON array"),
            (["a", "b"], ["{}", r'{"a": "\ud800"}'], "at place 2: .* surrogate"),
        ],
    )
    def test_refusals(
        self, connection: Connection, channels: Any, payloads: Any, complaint: str
    ) -> None:
        with pytest.raises(psycopg.errors.InvalidParameterValue, match=complaint):
            connection.execute(
                "select pgchannels.publish_many(%s::text[], %s::json[])", [channels, payloads]
            )
        assert value(connection, "select count(*) from pgchannels.outbox") == 0

    @pytest.mark.parametrize("ttl", ["0 s", "-1 day", "1 month -30 days"])
    def test_ttl(self, connection: Connection, ttl: str) -> None:
        with pytest.raises(psycopg.errors.InvalidParameterValue, match="invalid ttl"):
            connection.execute(
                "select pgchannels.publish_many('{a}', array['{}']::json[], %s)", [ttl]
            )


@pytest.mark.parametrize(
    ("channel", "payload", "error"),
    [
        ("a b", "{}", psycopg.errors.CheckViolation),
        ("", "{}", psycopg.errors.CheckViolation),
        ("room", "[]", psycopg.errors.CheckViolation),
        ("room", r'{"a": "\ude80"}', psycopg.errors.CheckViolation),
        ("room", r'{"a": "\ud83d\\\ude80"}', psycopg.errors.CheckViolation),
        ("room", "{", psycopg.errors.InvalidTextRepresentation),
        (None, "{}", psycopg.errors.NotNullViolation),
        ("room", None, psycopg.errors.NotNullViolation),
    ],
)
def test_the_outbox_refuses_likewise(
    connection: Connection, channel: str | None, payload: str | None, error: type[Exception]
) -> None:
    with pytest.raises(error):
        connection.execute(
            "insert into pgchannels.outbox (channel, payload) values (%s, %s)", [channel, payload]
        )


@pytest.mark.parametrize(
    ("created_at", "accepted"),
    [
        ("infinity", False),
        ("-infinity", False),
        ("20000-01-01", False),
        ("9999-01-01 00:00:00+00", False),
        ("1969-12-31 23:59:59+00", False),
        ("0044-03-15 BC", False),
        ("9998-12-31 23:59:59+00", True),
        ("1970-01-01 00:00:00+00", True),
    ],
)
def test_the_outbox_takes_only_times_that_readers_can_hold(
    connection: Connection, created_at: str, accepted: bool
) -> None:
    insert = (
        "insert into pgchannels.outbox (channel, payload, created_at) values ('room', '{}', %s)"
    )
    if accepted:
        connection.execute(insert, [created_at])
    else:
        with pytest.raises(psycopg.errors.CheckViolation, match="outbox_created_at_is_valid"):
            connection.execute(insert, [created_at])


@pytest.mark.parametrize(
    ("attachments", "accepted"),
    [
        ("null", True),
        ("'{}'", True),
        ("array['x', 'y']::bytea[]", True),
        ("array[convert_to(repeat('x', 16777214), 'UTF8')]", True),
        ("array[convert_to(repeat('x', 16777216), 'UTF8'), 'y'::bytea]", False),
        ("array[null]::bytea[]", False),
        ("array['x', null]::bytea[]", False),
        ("array[array['x', 'y']]::bytea[]", False),
    ],
)
@pytest.mark.parametrize("table", ["outbox", "ephemeral"])
def test_attachments_are_lists_of_bytes(
    connection: Connection, table: str, attachments: str, accepted: bool
) -> None:
    connection.execute("select pgchannels.limit_messages(16777216)")
    insert = (
        f"insert into pgchannels.{table} (channel, payload, attachments)"
        f" values ('room', '{{}}', {attachments})"
    )
    if accepted:
        connection.execute(insert.encode())
    else:
        with pytest.raises(psycopg.errors.CheckViolation, match="attachments_are_valid"):
            connection.execute(insert.encode())


class TestSeal:
    def test_the_size_is_that_of_all_that_is_read(self, connection: Connection) -> None:
        connection.execute(
            "insert into pgchannels.outbox (channel, payload, headers, attachments)"
            " values ('room', '{\"a\": 1}', '{\"b\": \"c\"}',"
            " array[convert_to(repeat('x', 10000), 'UTF8'), 'y'])"
        )
        connection.execute("select pgchannels.seal()")
        size = value(connection, "select size from pgchannels.messages")
        assert size == len('{"a": 1}') + len('{"b": "c"}') + 10_001

    def test_only_in_read_committed(self, connection: Connection) -> None:
        connection.execute("begin isolation level repeatable read")
        with pytest.raises(psycopg.errors.InvalidTransactionState, match="REPEATABLE READ"):
            connection.execute("select pgchannels.seal()")

    def test_who_waited_for_another_comes_second(
        self, connection: Connection, database_url: str
    ) -> None:
        """Whichever of the two began first."""
        connection.execute("create table rows (id int primary key, n int)")
        connection.execute("insert into rows values (1, 0)")
        publish = "select pgchannels.publish('rows', json_build_object('by', %s::text))"
        change = "update rows set n = n + 1"
        with psycopg.connect(database_url) as first, psycopg.connect(database_url) as second:
            first.execute(publish, ["first"])  # and so gets the lower transaction id
            second.execute(change)
            second.execute(publish, ["second"])
            second.commit()
            first.execute(change)
            first.execute(publish, ["first"])
            first.commit()
        connection.execute("select pgchannels.seal()")
        assert connection.execute(
            "select payload ->> 'by' from pgchannels.messages order by id"
        ).fetchall() == ["second", "first", "first"]

    def test_an_empty_outbox_makes_no_batch(self, connection: Connection) -> None:
        assert value(connection, "select sealed from pgchannels.seal()") == 0
        assert value(connection, "select head from pgchannels.seal()") == 0
        assert value(connection, "select count(*) from pgchannels.batches") == 0

    def test_a_snapshot_from_another_cluster_is_ignored(self, connection: Connection) -> None:
        # As after a dump and restore: transaction ids have begun anew.
        connection.execute("select pgchannels.publish('room', '{}')")
        connection.execute("select pgchannels.seal()")
        connection.execute("update pgchannels.batches set snapshot = '900000000:900000000:'")
        connection.execute("select pgchannels.publish('room', '{}')")
        assert value(connection, "select sealed from pgchannels.seal()") == 1
        assert value(connection, "select max(id) from pgchannels.messages") == 2

    def test_the_size_is_that_of_the_text(self, connection: Connection) -> None:
        connection.execute("select pgchannels.publish('room', ' {\"a\": \"é🚀\" }')")
        connection.execute("select pgchannels.seal()")
        size = value(connection, "select size from pgchannels.messages")
        assert size == len(' {"a": "é🚀" }'.encode())

    def test_missing_partitions_are_made(self, database_url: str, connection: Connection) -> None:
        make_small(database_url, 10)
        publish_many(connection, 95, channels=1, batch=20)
        assert value(connection, "select count(*) from pgchannels.messages") == 95

    def test_a_partition_takes_messages_from_the_next_call_on(
        self, database_url: str, connection: Connection
    ) -> None:
        """Others hear of it a moment after they can see what was committed with it."""
        make_small(database_url, 10)
        connection.execute("drop table pgchannels.messages_1")
        connection.execute("update pgchannels.log set partitioned_to = 1, attached_to = 1")
        connection.execute("select pgchannels.publish('room', '{}') from generate_series(1, 25)")
        room = "select (partitioned_to, attached_to)::text from pgchannels.log"
        sealed = "select sealed from pgchannels.seal(4)"
        assert (value(connection, sealed), value(connection, room)) == (0, "(1,11)")
        assert (value(connection, sealed), value(connection, room)) == (4, "(11,11)")
        # Made ahead: batches of one size are never cut short by it again.
        assert [value(connection, sealed) for _ in range(6)] == [4, 4, 4, 4, 4, 1]
        # A larger one stops where readers know of partitions, and goes on with the next call.
        connection.execute("select pgchannels.publish('room', '{}') from generate_series(1, 30)")
        assert value(connection, room) == "(31,41)"
        assert value(connection, "select sealed from pgchannels.seal(30)") == 15
        assert value(connection, "select sealed from pgchannels.seal(30)") == 15


async def test_every_query_can_be_prepared(database_url: str) -> None:
    connection = await asyncpg.connect(database_url)
    try:
        for sql in QUERIES.values():
            await connection.prepare(sql)
    finally:
        await connection.close()


def publish_many(connection: Connection, count: int, *, channels: int, batch: int) -> None:
    connection.execute(
        "insert into pgchannels.outbox (channel, payload)"
        " select 'room:' || i %% %s, json_build_object('i', i) from generate_series(1, %s) i",
        [channels, count],
    )
    while value(connection, "select sealed from pgchannels.seal(%s)", batch):
        pass


def oldest(scans: list[Any]) -> int:
    """The first id of the oldest partition that was read."""
    return min(int(node["Relation Name"].removeprefix("messages_")) for node in scans)


def rows_read(scans: list[Any]) -> int:
    """Rows that were looked at, those that a filter then removed included."""
    return sum(
        round((node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"])
        for node in scans
    )


class TestPlans:
    """On 20 partitions of 1000 messages: 50 busy channels take turns, one was heard of once."""

    @pytest.fixture
    def log(self, database_url: str, connection: Connection) -> Connection:
        make_small(database_url, 1000)
        connection.execute("select pgchannels.publish('quiet', '{}')")
        publish_many(connection, 19_799, channels=50, batch=500)
        connection.execute("analyze pgchannels.messages")
        connection.execute("analyze pgchannels.batches")
        return connection

    # asyncpg's prepared statements get either, as the server sees fit.
    @pytest.fixture(params=["force_custom_plan", "force_generic_plan"])
    def mode(self, request: pytest.FixtureRequest) -> str:
        mode: str = request.param
        return mode

    @staticmethod
    def scans(connection: Connection, mode: str, query: str, *arguments: str) -> list[Any]:
        """The nodes of the executed plan that read a partition of the log."""
        connection.execute(f"set plan_cache_mode = {mode}")
        connection.execute(f"prepare q as {QUERIES[query]}")
        (plan,) = value(
            connection, f"explain (analyze, format json) execute q({', '.join(arguments)})"
        )
        nodes = [plan["Plan"]]
        found = []
        while nodes:
            node = nodes.pop()
            nodes.extend(node.get("Plans", []))
            if node.get("Relation Name", "").startswith("messages_") and node["Actual Loops"]:
                found.append(node)
        assert found
        return found

    def test_a_page_of_a_long_history(self, log: Connection, mode: str) -> None:
        scans = self.scans(
            log, mode, "read_channels", "array['room:7']", "-1", "6", "1048576", "0", "0"
        )
        # Six, and the first one of each partition.
        assert rows_read(scans) <= 6 + 20

    def test_a_page_of_messages_whose_time_is_over(self, log: Connection, mode: str) -> None:
        log.execute("update pgchannels.messages set expires_at = '2020-01-01'")
        scans = self.scans(
            log, mode, "read_channels", "array['room:7']", "-1", "6", "1048576", "0", "0"
        )
        assert rows_read(scans) <= 6 + 20

    def test_what_is_new_of_some_channels(self, log: Connection, mode: str) -> None:
        scans = self.scans(
            log,
            mode,
            "read_channels",
            "array['room:7', 'room:8']",
            "19600",
            "1000",
            "1048576",
            "0",
            "0",
        )
        assert oldest(scans) == 19_001
        assert rows_read(scans) == 8

    def test_a_page_of_a_quiet_channel(self, log: Connection, mode: str) -> None:
        # Few channels, so a planner that goes by averages expects to find this one everywhere.
        scans = self.scans(
            log, mode, "read_channels", "array['quiet']", "-1", "51", "1048576", "0", "0"
        )
        assert rows_read(scans) == 1

    def test_the_newest_of_a_channel(self, log: Connection, mode: str) -> None:
        scans = self.scans(
            log,
            mode,
            "read_channel_backwards",
            "'room:7'",
            str(2**63 - 1),
            "0",
            "6",
            "1048576",
            "0",
            "0",
        )
        assert rows_read(scans) <= 396  # its own, of 19 800

    def test_the_newest_of_a_quiet_channel(self, log: Connection, mode: str) -> None:
        scans = self.scans(
            log,
            mode,
            "read_channel_backwards",
            "'quiet'",
            str(2**63 - 1),
            "0",
            "51",
            "1048576",
            "0",
            "0",
        )
        # A partition of a few pages may be read as it is; not all 19 800 rows.
        assert rows_read(scans) <= 1000

    def test_what_is_new_of_the_log(self, log: Connection, mode: str) -> None:
        scans = self.scans(log, mode, "read_log", "19600", "1000", "1048576", "0", "0")
        assert oldest(scans) == 19_001
        assert rows_read(scans) == 200

    def test_a_page_of_the_log(self, log: Connection, mode: str) -> None:
        scans = self.scans(log, mode, "read_log", "-1", "100", "1048576", "0", "0")
        assert {node["Relation Name"] for node in scans} == {"messages_1"}
        assert rows_read(scans) == 100
        assert [node["Index Name"] for node in scans] == ["messages_1_pkey"]

    def test_an_insert_neither_sorts_nor_scans(self, log: Connection, mode: str) -> None:
        log.execute(f"set plan_cache_mode = {mode}")
        log.execute(f"prepare q as {QUERIES['insert']}")
        (plan,) = value(
            log,
            "explain (format json)"
            " execute q(array['a', 'b'], array['{}', '{}'], array[null, '1 s']::interval[],"
            " array[null, null]::text[])",
        )
        node = plan["Plan"]
        types = [node["Node Type"]]
        while node.get("Plans"):
            (node,) = node["Plans"]  # one branch only
            types.append(node["Node Type"])
        assert [name for name in types if name != "Subquery Scan"] == [
            "ModifyTable",
            "Function Scan",
        ]
