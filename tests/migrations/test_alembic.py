"""The operations for the application's own Alembic: online with two drivers, and as scripts."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from pgchannels import ConfigurationError, Settings, migrate, revisions
from pgchannels.alembic import (
    DowngradeOp,
    UnwatchOp,
    UpgradeOp,
    WatchOp,
    excluding,
    include_name,
)
from pgchannels.embedded import EmbeddedPostgres
from pgchannels.schema import NEEDED_REVISION, REVISIONS
from tests.migrations.databases import (
    OBJECTS,
    THEIRS,
    column,
    dump,
    execute,
    publish_and_seal,
    refuse_leases,
    run_script,
    wait_for_a_waiter,
)

# Of alembic.op, whose attributes type checkers do not know.
Migration = Callable[[Any], None]

STEPS = [("base", *REVISIONS)[at : at + 2] for at in range(len(REVISIONS))]


def run(
    url: str, migration: Migration, *, driver: str = "psycopg", autocommit: bool = False
) -> None:
    """Run *migration* as a revision's function runs: in a transaction of the host's."""

    def within(connection: sa.Connection) -> None:
        context = MigrationContext.configure(connection)
        with (
            context.begin_transaction(),
            context.autocommit_block() if autocommit else nullcontext(),
        ):
            migration(Operations(context))

    async def run_with_asyncpg() -> None:
        engine = create_async_engine(
            url.replace("postgresql:", "postgresql+asyncpg:"), poolclass=NullPool
        )
        async with engine.connect() as connection:
            await connection.run_sync(within)
        await engine.dispose()

    if driver == "asyncpg":
        asyncio.run(run_with_asyncpg())
    else:
        engine = sa.create_engine(
            url.replace("postgresql:", f"postgresql+{driver}:"), poolclass=NullPool
        )
        with engine.connect() as connection:
            within(connection)


def script(migration: Migration, **dialect_options: Any) -> str:
    """What *migration* writes in Alembic's offline mode."""
    output = io.StringIO()
    context = MigrationContext.configure(
        dialect_name="postgresql",
        dialect_opts=dialect_options,
        opts={"as_sql": True, "output_buffer": output},
    )
    with context.begin_transaction():
        migration(Operations(context))
    return output.getvalue()


def upgrade(op: Any) -> None:
    op.pgchannels_upgrade(to=NEEDED_REVISION)


def schema_at(revision: str, url: str, schema: str = "pgchannels") -> None:
    if revision != "base":
        migrate.upgrade(Settings(database_url=url, schema_name=schema), revision)


drivers = pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
paramstyles = pytest.mark.parametrize(
    "options", [{}, {"paramstyle": "named"}, {"paramstyle": "pyformat"}], ids=str
)


class TestUpgrade:
    @drivers
    @pytest.mark.parametrize("autocommit", [False, True])
    def test_makes_what_migrate_makes(
        self,
        database_url: str,
        empty_database_url: str,
        postgres: EmbeddedPostgres,
        driver: str,
        autocommit: bool,
    ) -> None:
        run(empty_database_url, upgrade, driver=driver, autocommit=autocommit)
        assert dump(postgres, empty_database_url) == dump(postgres, database_url)
        assert migrate.current(empty_database_url) == NEEDED_REVISION
        assert publish_and_seal(empty_database_url) == 1

    @paramstyles
    def test_as_a_script(
        self,
        database_url: str,
        empty_database_url: str,
        postgres: EmbeddedPostgres,
        options: dict[str, Any],
    ) -> None:
        text = script(upgrade, **options)
        run_script(postgres, empty_database_url, text)
        assert dump(postgres, empty_database_url) == dump(postgres, database_url)
        assert publish_and_seal(empty_database_url) == 1
        run_script(postgres, empty_database_url, text)
        assert dump(postgres, empty_database_url) == dump(postgres, database_url)
        assert column(empty_database_url, "select count(*) from pgchannels.messages") == [1]

    @pytest.mark.parametrize("revision", ["base", *REVISIONS])
    def test_goes_on_where_migrate_has_stopped(
        self, database_url: str, empty_database_url: str, postgres: EmbeddedPostgres, revision: str
    ) -> None:
        schema_at(revision, empty_database_url)
        run(empty_database_url, upgrade)
        assert dump(postgres, empty_database_url) == dump(postgres, database_url)
        assert migrate.current(empty_database_url) == NEEDED_REVISION

    @pytest.mark.parametrize("revision", REVISIONS)
    def test_migrate_goes_on_where_it_has_stopped(
        self, database_url: str, empty_database_url: str, postgres: EmbeddedPostgres, revision: str
    ) -> None:
        run(empty_database_url, lambda op: op.pgchannels_upgrade(to=revision))
        assert migrate.current(empty_database_url) == revision
        migrate.upgrade(empty_database_url)
        assert dump(postgres, empty_database_url) == dump(postgres, database_url)

    def test_does_nothing_on_a_later_one(
        self, database_url: str, postgres: EmbeddedPostgres
    ) -> None:
        publish_and_seal(database_url)
        before = dump(postgres, database_url)

        def every_revision(op: Any) -> None:
            for revision in REVISIONS:
                op.pgchannels_upgrade(to=revision)

        run(database_url, every_revision)
        assert dump(postgres, database_url) == before
        assert column(database_url, "select count(*) from pgchannels.messages") == [1]

    def test_does_nothing_on_one_that_it_does_not_know(
        self, database_url: str, postgres: EmbeddedPostgres
    ) -> None:
        execute(database_url, "update pgchannels.alembic_version set version_num = '9999'")
        before = dump(postgres, database_url)
        run(database_url, upgrade)
        assert dump(postgres, database_url) == before
        assert migrate.current(database_url) == "9999"

    def test_under_another_name(self, empty_database_url: str, postgres: EmbeddedPostgres) -> None:
        def both(op: Any) -> None:
            upgrade(op)
            op.pgchannels_upgrade(to=NEEDED_REVISION, schema="other")

        run(empty_database_url, both)
        assert publish_and_seal(empty_database_url, "other") == 1
        assert column(empty_database_url, "select count(*) from pgchannels.messages") == [0]
        run(empty_database_url, lambda op: op.pgchannels_downgrade(to="base"))
        assert "pgchannels." not in dump(postgres, empty_database_url)
        assert publish_and_seal(empty_database_url, "other") == 1

    def test_is_the_hosts_transaction(self, empty_database_url: str) -> None:
        before = sorted(column(empty_database_url, OBJECTS))

        def fail(op: Any) -> None:
            upgrade(op)
            op.execute("select 1 / 0")

        with pytest.raises(sa.exc.DataError):
            run(empty_database_url, fail)
        assert sorted(column(empty_database_url, OBJECTS)) == before

    def test_several_at_once(self, empty_database_url: str) -> None:
        with ThreadPoolExecutor(4) as pool:
            runs = [pool.submit(run, empty_database_url, upgrade) for _ in range(3)]
            runs.append(pool.submit(migrate.upgrade, empty_database_url))
            for each in runs:
                each.result(timeout=60)
        assert publish_and_seal(empty_database_url) == 1

    def test_leaves_the_lock_timeout_as_it_was(self, empty_database_url: str) -> None:
        found: list[str] = []

        def migration(op: Any) -> None:
            op.execute("set lock_timeout = '7s'")
            upgrade(op)
            found.append(op.get_bind().scalar(sa.text("show lock_timeout")))

        run(empty_database_url, migration)
        assert found == ["7s"]

    @pytest.mark.parametrize("to", ["head", "0009", "", "base"])
    def test_only_to_a_revision_that_is_known(self, empty_database_url: str, to: str) -> None:
        with pytest.raises(
            ConfigurationError, match=rf"no revision '{to}'.*0001, 0002, 0003, 0004"
        ):
            run(empty_database_url, lambda op: op.pgchannels_upgrade(to=to))

    @pytest.mark.parametrize("found", ["0002x", "0"])
    def test_a_schema_that_somebody_has_tampered_with(self, database_url: str, found: str) -> None:
        execute(database_url, f"update pgchannels.alembic_version set version_num = '{found}'")
        with pytest.raises(sa.exc.DBAPIError, match=f"cannot get from revision {found} to 0004"):
            run(database_url, upgrade)

    def test_what_fails_says_why(self, empty_database_url: str) -> None:
        refuse_leases(empty_database_url)
        with pytest.raises(sa.exc.DBAPIError, match="no leases here"):
            run(empty_database_url, upgrade)

    @drivers
    @pytest.mark.parametrize("statement", THEIRS)
    def test_not_into_a_schema_that_holds_something_else(
        self, empty_database_url: str, driver: str, statement: str
    ) -> None:
        execute(empty_database_url, "create schema theirs")
        execute(empty_database_url, statement)
        before = sorted(column(empty_database_url, OBJECTS))
        with pytest.raises(sa.exc.DBAPIError, match=r"not pgchannels' own: it holds .*theirs\."):
            run(
                empty_database_url,
                lambda op: op.pgchannels_upgrade(to=NEEDED_REVISION, schema="theirs"),
                driver=driver,
            )
        run(
            empty_database_url,
            lambda op: op.pgchannels_downgrade(to="base", schema="theirs"),
            driver=driver,
        )
        assert sorted(column(empty_database_url, OBJECTS)) == before

    def test_the_version_table_of_the_application_is_not_taken_for_ours(
        self, empty_database_url: str
    ) -> None:
        execute(empty_database_url, "create table public.alembic_version (version_num text)")
        execute(empty_database_url, "insert into public.alembic_version values ('0003')")
        with pytest.raises(sa.exc.DBAPIError, match=r"it holds table .*alembic_version"):
            run(
                empty_database_url,
                lambda op: op.pgchannels_upgrade(to=NEEDED_REVISION, schema="public"),
            )

    @pytest.mark.parametrize("schema", ["Upper", "it's", "a.b", "", "9a", "s" * 41])
    def test_only_names_that_settings_take(self, schema: str) -> None:
        with pytest.raises(ConfigurationError):
            Settings(schema_name=schema)
        for operation in (UpgradeOp, DowngradeOp):
            with pytest.raises(ConfigurationError, match="cannot be pgchannels' schema"):
                operation("0001", schema=schema)
        with pytest.raises(ConfigurationError, match="cannot be pgchannels' schema"):
            WatchOp("orders", "orders", schema=schema)

    @pytest.mark.parametrize("schema", ["_", "s" * 40, "user", "a9"])
    def test_all_names_that_settings_take(self, empty_database_url: str, schema: str) -> None:
        assert Settings(schema_name=schema).schema_name == schema
        run(empty_database_url, lambda op: op.pgchannels_upgrade(to=NEEDED_REVISION, schema=schema))
        assert publish_and_seal(empty_database_url, schema) == 1
        run(empty_database_url, lambda op: op.pgchannels_downgrade(to="base", schema=schema))

    def test_only_on_postgresql(self) -> None:
        with sa.create_engine("sqlite://").connect() as connection:
            context = MigrationContext.configure(connection)
            with pytest.raises(ConfigurationError, match=r"needs PostgreSQL.*sqlite"):
                upgrade(Operations(context))


class TestDowngrade:
    @drivers
    @pytest.mark.parametrize(("to", "revision"), STEPS)
    def test_undoes_a_revision(
        self,
        database_url: str,
        empty_database_url: str,
        postgres: EmbeddedPostgres,
        driver: str,
        to: str,
        revision: str,
    ) -> None:
        for url in (database_url, empty_database_url):
            migrate.upgrade(url, revision)
            migrate.downgrade(url, revision)
        migrate.downgrade(empty_database_url, to)
        run(database_url, lambda op: op.pgchannels_downgrade(to=to), driver=driver)
        assert dump(postgres, database_url) == dump(postgres, empty_database_url)
        assert migrate.current(database_url) == (None if to == "base" else to)

    @paramstyles
    def test_as_a_script(
        self, empty_database_url: str, postgres: EmbeddedPostgres, options: dict[str, Any]
    ) -> None:
        before = sorted(column(empty_database_url, OBJECTS))
        migrate.upgrade(empty_database_url)
        publish_and_seal(empty_database_url)
        text = script(lambda op: op.pgchannels_downgrade(to="base"), **options)
        for _ in range(2):
            run_script(postgres, empty_database_url, text)
            assert sorted(column(empty_database_url, OBJECTS)) == before

    def test_does_nothing_on_an_earlier_one(
        self, empty_database_url: str, postgres: EmbeddedPostgres
    ) -> None:
        migrate.upgrade(empty_database_url, "0001")
        before = dump(postgres, empty_database_url)
        run(empty_database_url, lambda op: op.pgchannels_downgrade(to="0002"))
        assert dump(postgres, empty_database_url) == before

    @pytest.mark.parametrize("to", ["base", "0004"])
    def test_of_one_that_it_does_not_know(self, database_url: str, to: str) -> None:
        execute(database_url, "update pgchannels.alembic_version set version_num = '9999'")
        with pytest.raises(sa.exc.DBAPIError, match=f"cannot get from revision 9999 to {to}"):
            run(database_url, lambda op: op.pgchannels_downgrade(to=to))

    def test_only_to_a_revision_that_is_known(self, database_url: str) -> None:
        with pytest.raises(ConfigurationError, match=r"'0000'.*base, 0001, 0002, 0003, 0004"):
            run(database_url, lambda op: op.pgchannels_downgrade(to="0000"))


class TestLocks:
    def test_gives_way_until_it_gets_its_lock(self, database_url: str) -> None:
        """It succeeds once the table is free; before, it has kept nothing of what it had."""
        migrate.downgrade(database_url, "0002")
        ended = threading.Event()

        def migration(op: Any) -> None:
            op.execute("create table theirs (id int)")
            upgrade(op)
            assert ended.is_set()

        with ThreadPoolExecutor(1) as pool, psycopg.connect(database_url) as holder:
            holder.execute("select from pgchannels.log")
            migrated = pool.submit(run, database_url, migration)
            # Twice it has to have given up its locks, or a publisher could not come in between.
            for _ in range(2):
                wait_for_a_waiter(database_url)
                execute(database_url, "begin; lock pgchannels.log in row exclusive mode; commit")
            ended.set()
            holder.commit()
            migrated.result(timeout=60)
        assert migrate.current(database_url) == NEEDED_REVISION
        assert column(database_url, "select count(*) from theirs") == [0]

    @drivers
    def test_says_so_at_the_end_of_its_patience(
        self, database_url: str, monkeypatch: pytest.MonkeyPatch, driver: str
    ) -> None:
        monkeypatch.setattr(revisions, "_PATIENCE", "1 second")
        migrate.downgrade(database_url, "0002")
        with psycopg.connect(database_url) as holder:
            holder.execute("select from pgchannels.log")
            with pytest.raises(sa.exc.DBAPIError, match="was in use all the time, for 1 second"):
                run(database_url, upgrade, driver=driver)
        assert migrate.current(database_url) == "0002"


class TestWatch:
    @pytest.fixture
    def url(self, database_url: str) -> str:
        execute(
            database_url,
            "create schema shop; create table shop.orders"
            " (id int primary key, customer_id int, total int, note text)",
        )
        return database_url

    def published(self, url: str) -> list[tuple[str, Any]]:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("select pgchannels.seal()")
            return connection.execute(
                "select channel, payload from pgchannels.messages order by id"
            ).fetchall()

    @drivers
    def test_publishes(self, url: str, driver: str) -> None:
        def migration(op: Any) -> None:
            op.pgchannels_watch(
                "orders",
                "orders:{customer_id}",
                columns=["total"],
                condition="$.new.total > 5",
                on=["insert"],
                table_schema="shop",
            )

        run(url, migration, driver=driver)
        execute(url, "insert into shop.orders values (1, 7, 5), (2, 7, 6)")
        execute(url, "update shop.orders set total = 9")
        execute(url, "delete from shop.orders")
        ((channel, payload),) = self.published(url)
        assert channel == "orders:7"
        assert payload == {"type": "orders.inserted", "key": {"id": 2}, "new": {"total": 6}}

    def test_to_a_user(self, url: str) -> None:
        watch = WatchOp("orders", user="{customer_id}", on=["insert"], table_schema="shop")
        run(url, lambda op: op.invoke(watch))
        execute(url, "insert into shop.orders values (1, 7, 5)")
        assert [channel for channel, _ in self.published(url)] == ["pgchannels:user:7"]
        run(url, lambda op: op.invoke(watch.reverse()))
        assert column(url, "select count(*) from pgchannels.watches") == [0]
        for arguments in ({}, {"channel": "a", "user": "b"}):
            with pytest.raises(ConfigurationError, match="a channel or a user="):
                WatchOp("orders", **arguments)

    def test_by_the_search_path(self, url: str) -> None:
        def migration(op: Any) -> None:
            op.execute("set local search_path = shop")
            op.pgchannels_watch("orders", "orders")

        run(url, migration)
        execute(url, "insert into shop.orders values (1)")
        execute(url, "update shop.orders set total = 9")
        execute(url, "delete from shop.orders")
        assert len(self.published(url)) == 3

    @pytest.mark.parametrize("driver", ["psycopg", "asyncpg", "script"])
    def test_hostile_names(self, url: str, postgres: EmbeddedPostgres, driver: str) -> None:
        table = "$pgchannels$ Or\"d'e\\rs %s :id"
        name = "%(total)s::x \\: $statement$ it's"
        quoted = '"' + table.replace('"', '""') + '"'
        execute(url, f'create table shop.{quoted} (id int primary key, "{name}" text)')

        def migration(op: Any) -> None:
            op.pgchannels_watch(
                table,
                f"$pgchannels$:x%s'\\:{{{name}}}",
                columns=[name],
                condition='$.new.id >= 0 && "%s :x\\\\" == "%s :x\\\\"',
                table_schema="shop",
            )

        if driver == "script":
            run_script(postgres, url, script(migration))
        else:
            run(url, migration, driver=driver)
        execute(url, f"insert into shop.{quoted} values (1, 'a')")
        ((channel, payload),) = self.published(url)
        assert channel == "$pgchannels$:x%s'\\:a"
        assert payload["new"] == {name: "a"}

        run(url, lambda op: op.pgchannels_unwatch(table, table_schema="shop"))
        assert column(url, "select count(*) from pgchannels.watches") == [0]

    def test_of_a_table_that_is_not_there(self, url: str) -> None:
        with pytest.raises(sa.exc.ProgrammingError, match='relation "none" does not exist'):
            run(url, lambda op: op.pgchannels_watch("none", "orders"))

    def test_one_name_is_not_several(self) -> None:
        with pytest.raises(ConfigurationError, match="columns= takes several"):
            WatchOp("orders", "orders", columns="total")
        with pytest.raises(ConfigurationError, match="on= takes several"):
            WatchOp("orders", "orders", on="insert")

    def test_unwatch(self, url: str) -> None:
        def watch(op: Any) -> None:
            for channel in ("a", "b", "c"):
                op.pgchannels_watch("orders", channel, on=["insert"], table_schema="shop")

        def watched() -> list[str]:
            return sorted(column(url, "select channel from pgchannels.watches"))

        run(url, watch)
        assert watched() == ["a", "b", "c"]
        for _ in range(2):
            run(url, lambda op: op.pgchannels_unwatch("orders", "b", table_schema="shop"))
            assert watched() == ["a", "c"]
        for _ in range(2):
            run(url, lambda op: op.pgchannels_unwatch("orders", table_schema="shop"))
            assert watched() == []

    def test_reversed(self, url: str) -> None:
        watch = WatchOp("orders", "a", columns=["total"], table_schema="shop")
        unwatch = watch.reverse()
        assert unwatch.reverse() is watch
        run(url, lambda op: op.invoke(watch))
        execute(url, "insert into shop.orders values (1)")
        run(url, lambda op: op.invoke(unwatch))
        execute(url, "insert into shop.orders values (2)")
        assert len(self.published(url)) == 1
        with pytest.raises(NotImplementedError):
            UnwatchOp("orders", "a").reverse()

    def test_waits_for_no_writer_for_long(self, url: str) -> None:
        """A watch asks for a lock that writers wait behind, so it gives way to them."""
        with ThreadPoolExecutor(1) as pool, psycopg.connect(url) as holder:
            holder.execute("insert into shop.orders values (1)")
            watched = pool.submit(
                run, url, lambda op: op.pgchannels_watch("orders", "a", table_schema="shop")
            )
            for id in (2, 3):
                wait_for_a_waiter(url)
                execute(url, f"insert into shop.orders values ({id})")
            assert not watched.done()
            holder.commit()
            watched.result(timeout=60)
        execute(url, "insert into shop.orders values (4)")
        assert len(self.published(url)) == 1


class TestAutogenerate:
    def proposed(self, url: str, include_name: Any, **options: Any) -> list[Any]:
        """What autogenerate proposes for an application without any table."""
        engine = sa.create_engine(
            url.replace("postgresql:", "postgresql+psycopg:"), poolclass=NullPool
        )
        with engine.connect() as connection:
            context = MigrationContext.configure(
                connection, opts={"include_name": include_name, **options}
            )
            proposed: list[Any] = compare_metadata(context, sa.MetaData())
            return proposed

    @pytest.fixture
    def url(self, database_url: str) -> str:
        execute(database_url, "create table theirs (id int primary key)")
        run(database_url, lambda op: op.pgchannels_watch("theirs", "theirs"))
        return database_url

    @pytest.mark.parametrize("include_schemas", [False, True])
    def test_sees_nothing_of_ours(self, url: str, include_schemas: bool) -> None:
        proposed = self.proposed(url, include_name, include_schemas=include_schemas)
        assert [(kind, table.name) for kind, table in proposed] == [("remove_table", "theirs")]

    @pytest.mark.filterwarnings("ignore:Did not recognize type")
    def test_would_see_it(self, url: str) -> None:
        assert len(self.proposed(url, None, include_schemas=True)) > 10

    def test_another_schema(self, url: str) -> None:
        run(url, lambda op: op.pgchannels_downgrade(to="base"))
        run(url, lambda op: op.pgchannels_upgrade(to=NEEDED_REVISION, schema="other"))
        proposed = self.proposed(url, excluding("other"), include_schemas=True)
        assert [(kind, table.name) for kind, table in proposed] == [("remove_table", "theirs")]

    def test_and_what_the_application_excludes(self, url: str) -> None:
        execute(url, "create table kept (id int)")
        asked: list[Any] = []

        def theirs(name: str | None, type_: str, parent_names: Any) -> bool:
            asked.append((name, dict(parent_names)))
            return name != "kept"

        proposed = self.proposed(url, excluding(include_name=theirs), include_schemas=True)
        assert [(kind, table.name) for kind, table in proposed] == [("remove_table", "theirs")]
        assert not [each for each in asked if "pgchannels" in str(each)]
