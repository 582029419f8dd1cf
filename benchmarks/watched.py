"""What it costs to write to a watched table: in bulk, and row by row.

The same statements on tables of the same shape, by which each row makes one message or none:

- *plain*: a table that nobody watches.
- *watched*: ``pgchannels.watch()``, a trigger that is called once a statement.
- *row trigger*: the alternative, by hand: a trigger that is called for each row, and calls
  ``pgchannels.publish()`` for it. Its messages say the same.
- *least*, for ``COPY``: into the plain table, and in the same transaction the messages of the
  watched one, ready made, into the outbox by one ``INSERT … SELECT``. No trigger can be faster.

Bulk is a ``COPY`` in one transaction, then an ``UPDATE`` of one column of all rows, then a
``DELETE`` of them; time counts until the commit has returned. A ratio is low where a row costs
next to nothing without a message, so what a message adds to a row stands beside it. *Single rows*
are ``INSERT`` statements by pgbench, each a transaction.

Nothing sequences beside it: this is the writer's part. The sequencer's, which nobody waits for, is
in :mod:`benchmarks.ceiling`.
"""

from __future__ import annotations

import io
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg

from benchmarks.arrivals import now
from benchmarks.context import Benchmark, Context
from benchmarks.figures import Figure, figure, ratio
from benchmarks.log import execute
from benchmarks.pgbench import pgbench

__all__ = ["BENCHMARK"]

WRITERS = 8
CUSTOMERS = 1000

TABLE = """
create table {name} (
    id bigint generated always as identity primary key,
    customer_id integer not null,
    status text not null,
    note text not null,
    created_at timestamptz not null default clock_timestamp()
);
"""

ROW_TRIGGER = """
create function publish_row() returns trigger language plpgsql as $$
begin
    if tg_op = 'INSERT' then
        perform pgchannels.publish('orders:' || new.customer_id, json_build_object(
            'type', tg_table_name || '.inserted',
            'key', json_build_object('id', new.id), 'new', to_json(new)));
    elsif tg_op = 'UPDATE' then
        perform pgchannels.publish('orders:' || new.customer_id, json_build_object(
            'type', tg_table_name || '.updated',
            'key', json_build_object('id', new.id),
            'new', json_build_object('status', new.status),
            'old', json_build_object('status', old.status)));
    else
        perform pgchannels.publish('orders:' || old.customer_id, json_build_object(
            'type', tg_table_name || '.deleted',
            'key', json_build_object('id', old.id), 'old', to_json(old)));
    end if;
    return null;
end
$$;

create trigger publish_row after insert or update or delete on triggered_orders
    for each row execute function publish_row();
"""

PLAIN, WATCHED, ROW_BY_ROW, LEAST = "plain", "watched", "row trigger", "least"

TABLES = {PLAIN: "orders", WATCHED: "watched_orders", ROW_BY_ROW: "triggered_orders"}

SCHEMA = (
    "".join(TABLE.format(name=name) for name in TABLES.values())
    + "select pgchannels.watch('watched_orders', 'orders:{customer_id}');"
    + ROW_TRIGGER
)

BULK = {
    "UPDATE": "update {table} set status = 'paid'",
    "DELETE": "delete from {table}",
}

SINGLE_ROW = f"""\
\\set customer random(1, {CUSTOMERS})
insert into {{table}} (customer_id, status, note)
values (:customer, 'new', 'by card, to be sent tomorrow');
"""

COLUMNS = ("customer_id", "status", "note")

READY = """
create table ready as select channel, payload from pgchannels.outbox order by id;
truncate pgchannels.outbox;
"""

INSERT_READY = "insert into pgchannels.outbox (channel, payload) select channel, payload from ready"


async def measure(context: Context) -> list[Figure]:
    rows = context.pick(100_000, 20_000)
    seconds = context.pick(2.0, 1.0)
    async with context.server.database() as url:
        await execute(url, SCHEMA)
        connection = await asyncpg.connect(url)
        try:
            writer = Writer(connection, rows)
            await writer.copy(TABLES[WATCHED])
            await connection.execute(READY)
            variants: dict[str, Callable[[], Awaitable[dict[str, float]]]] = {
                name: partial(
                    _measure, writer, url, context.server.bin_path / "pgbench", name, seconds
                )
                for name in TABLES
            }
            variants[LEAST] = writer.least
            results = await context.interleave(variants)
        finally:
            await connection.close()
    figures: list[Figure] = []
    for key, title in (
        ("COPY", f"COPY of {rows} rows"),
        ("UPDATE", f"UPDATE of {rows} rows"),
        ("DELETE", f"DELETE of {rows} rows"),
        ("INSERT", f"INSERT of single rows, {WRITERS} writers"),
    ):
        rates = {name: figure(f"{title}: {name}", "rows/s", results[name], key) for name in TABLES}
        if key == "COPY":
            rates[LEAST] = figure(f"{title}: {LEAST}", "rows/s", results[LEAST], key)
        plain, watched = rates[PLAIN], rates[WATCHED]
        figures += rates.values()
        figures += [
            ratio(f"  … {name} / {PLAIN}", rate, plain)
            for name, rate in rates.items()
            if name != PLAIN
        ]
        figures += [
            ratio(f"  … {WATCHED} / {name}", watched, rate)
            for name, rate in rates.items()
            if name not in (PLAIN, WATCHED)
        ]
        if key != "INSERT":
            figures += [
                _added(f"  … {name}: added by a message", rate, plain)
                for name, rate in rates.items()
                if name != PLAIN
            ]
    return figures


class Writer:
    """Writes many rows at a time, and looks how many messages that has made."""

    def __init__(self, connection: Any, rows: int) -> None:
        self._connection = connection
        self._rows = rows
        row = "{}\tnew\tby card, to be sent tomorrow\n"
        self._text = "".join(row.format(1 + n % CUSTOMERS) for n in range(rows)).encode()

    async def copy(self, table: str) -> float:
        """Empty *table* and the outbox, and COPY into the table; rows a second."""
        await self._connection.execute(f"truncate {table}, pgchannels.outbox")
        source = io.BytesIO(self._text)
        start = now()
        await self._connection.copy_to_table(table, source=source, columns=COLUMNS, format="text")
        return self._rows / (now() - start)

    async def least(self) -> dict[str, float]:
        """COPY into the plain table, and insert messages that are ready; rows a second."""
        await self._connection.execute(f"truncate {TABLES[PLAIN]}, pgchannels.outbox")
        source = io.BytesIO(self._text)
        start = now()
        async with self._connection.transaction():
            await self._connection.copy_to_table(
                TABLES[PLAIN], source=source, columns=COLUMNS, format="text"
            )
            await self._connection.execute(INSERT_READY)
        rate = self._rows / (now() - start)
        await self.check_messages(self._rows)
        return {"COPY": rate}

    async def bulk(self, table: str, *, publishes: bool) -> dict[str, float]:
        """Rows a second of each statement."""
        expected = self._rows if publishes else 0
        rates = {"COPY": await self.copy(table)}
        await self.check_messages(expected)
        for name, statement in BULK.items():
            start = now()
            await self._connection.execute(statement.format(table=table))
            rates[name] = self._rows / (now() - start)
            await self.check_messages(expected)
        await self._connection.execute(f"truncate {table}")
        return rates

    async def check_messages(self, expected: int) -> None:
        """Empty the outbox, which must hold as many."""
        count = await self._connection.fetchval("select count(*) from pgchannels.outbox")
        if count != expected:
            raise RuntimeError(f"{count} messages were published instead of {expected}")
        await self._connection.execute("truncate pgchannels.outbox")


async def _measure(
    writer: Writer, url: str, program: Path, variant: str, seconds: float
) -> dict[str, float]:
    table, publishes = TABLES[variant], variant != PLAIN
    rates = await writer.bulk(table, publishes=publishes)
    script = SINGLE_ROW.format(table=table)
    result = await pgbench(program, url, script, clients=WRITERS, seconds=seconds)
    await writer.check_messages(result.transactions if publishes else 0)
    return {**rates, "INSERT": result.per_second}


def _added(name: str, rate: Figure, plain: Figure) -> Figure:
    """What a row takes longer, run by run."""
    values = tuple(1e6 / a - 1e6 / b for a, b in zip(rate.values, plain.values, strict=True))
    return Figure(name, "µs", values)


BENCHMARK = Benchmark("watched", "Tables that publish what becomes of their rows", measure)
