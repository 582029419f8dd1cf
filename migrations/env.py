"""Alembic's environment for pgchannels' own schema.

Serves ``alembic upgrade head`` in a checkout and ``pgchannels migrate`` from an installed wheel.
The version table lies inside the schema, so that nothing here ever meets the host application's
Alembic.

The database comes from a connection in ``config.attributes`` (what ``pgchannels.migrate`` does),
from ``-x url=…``, or from ``PGCHANNELS_DATABASE_URL``; the schema from ``-x schema=…`` or
``PGCHANNELS_SCHEMA_NAME``.
"""

from alembic import context
from sqlalchemy import Connection, text

from pgchannels import migrate
from pgchannels.errors import ConfigurationError
from pgchannels.revisions import foreign_object, migration_lock, prepared, stranger
from pgchannels.schema import LOCK_TIMEOUT, VERSION_TABLE
from pgchannels.settings import Settings


def settings() -> Settings:
    given = context.config.attributes.get("settings")
    if isinstance(given, Settings):
        return given
    arguments = context.get_x_argument(as_dictionary=True)
    overrides = {"database_url": arguments.get("url"), "schema_name": arguments.get("schema")}
    return Settings(**{name: value for name, value in overrides.items() if value})


def run(connection: Connection | None, schema: str) -> None:
    """Run what was asked for, on *connection* or, without one, as a script on the output."""
    context.configure(
        connection=connection,
        dialect_name=None if connection else "postgresql",
        as_sql=connection is None,
        literal_binds=connection is None,
        dialect_opts={"paramstyle": "named"},  # any other would double percent signs
        version_table=VERSION_TABLE,
        version_table_schema=schema,
        transactional_ddl=True,
    )
    quoted = '"' + schema + '"'
    with context.begin_transaction():
        # Before the version table is read: of several that start at once, the second waits here
        # and then finds nothing left to do.
        context.execute(f"select {migration_lock(schema)}")
        # Whoever comes after it in the queue for a lock has to wait as long, so not for ever.
        context.execute(f"set local lock_timeout = '{LOCK_TIMEOUT}'")
        if connection is None:
            context.execute(prepared(schema))
        elif (found := connection.scalar(text(f"select {foreign_object(schema)}"))) is not None:
            raise ConfigurationError(
                f"schema {schema!r} is not pgchannels' own: it holds {found}. Choose a schema that "
                "does not exist yet, or is empty: --schema, PGCHANNELS_SCHEMA_NAME, schema_name="
            )
        elif (owner := connection.scalar(text(f"select {stranger(schema)}"))) is not None:
            raise ConfigurationError(
                f"schema {schema!r} belongs to {owner!r}, who could replace what it holds. "
                "Migrate as that role, give the schema to the role that migrates (ALTER SCHEMA … "
                "OWNER TO …), or choose another one: --schema, PGCHANNELS_SCHEMA_NAME, schema_name="
            )
        elif not schema_exists(connection, schema):
            # IF NOT EXISTS would ask for the right to create schemas even where one is there.
            context.execute(f"create schema {quoted}")
        context.run_migrations()
        if connection is not None and not context.get_context().get_current_heads():
            context.execute(f"drop table if exists {quoted}.{VERSION_TABLE}")
            context.execute(f"drop schema {quoted}")


def schema_exists(connection: Connection, schema: str) -> bool:
    found = connection.scalar(
        text("select to_regnamespace(quote_ident(:schema)) is not null"), {"schema": schema}
    )
    return bool(found)


if context.is_offline_mode():
    run(None, settings().schema_name)
elif isinstance(connection := context.config.attributes.get("connection"), Connection):
    run(connection, settings().schema_name)
else:
    chosen = settings()
    migrate.run_in_transaction(chosen, lambda connection: run(connection, chosen.schema_name))
