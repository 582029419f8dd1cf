"""pgchannels' schema and watched tables in the migrations of the application's own Alembic.

Importing this module, in ``env.py``, adds operations for use in revisions:

- ``op.pgchannels_upgrade(to="0004")`` and ``op.pgchannels_downgrade(to="base")``;
- ``op.pgchannels_watch("orders", "orders:{customer_id}")``, or ``user="{customer_id}"`` instead of
  a channel, and ``op.pgchannels_unwatch("orders")``.

They run in the migration's own transaction, or are written to its script (``--sql``), and need to
know nothing of the database: each statement finds out for itself whether there is something to do.
So an operation that has been done before does nothing, and ``pgchannels migrate`` may go on where
an operation has stopped, or the other way round.

:func:`include_name`, given to ``context.configure()``, keeps autogenerate and ``alembic check``
from the schema.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, MutableMapping
from typing import Any

from alembic.operations import MigrateOperation, Operations
from sqlalchemy import text

from pgchannels.errors import ConfigurationError
from pgchannels.revisions import block, downgrade_blocks, upgrade_blocks
from pgchannels.schema import REVISIONS

__all__ = ["DowngradeOp", "UnwatchOp", "UpgradeOp", "WatchOp", "excluding", "include_name"]

IncludeName = Callable[[Any, Any, Any], bool]

_SCHEMA_NAME = re.compile(r"[a-z_][a-z0-9_]{0,39}")  # as Settings.schema_name


@Operations.register_operation("pgchannels_upgrade", "pgchannels_upgrade")
class UpgradeOp(MigrateOperation):
    """Bring the schema to a revision. What undoes it depends on where it was: say so yourself."""

    def __init__(self, to: str, *, schema: str = "pgchannels") -> None:
        self.to = _revision(to, REVISIONS)
        self.schema = _schema(schema)

    @classmethod
    def pgchannels_upgrade(
        cls, operations: Operations, to: str, *, schema: str = "pgchannels"
    ) -> None:
        """Make pgchannels' schema, or bring it to a later revision.

        It does nothing if it is there or further. It waits for no lock for longer than half a
        second, because publishers would have to wait behind it: it gives up what it has, and tries
        again, for a minute. What it has changed stays locked until the transaction ends. Into a
        schema that holds anything else it does not go: the statement fails.

        Args:
            to: the revision. Pinned, so that a migration means the same for ever.
            schema: its name, ``Settings.schema_name``.

        Raises:
            ConfigurationError: there is no such revision, or this is not PostgreSQL.
        """
        operations.invoke(cls(to, schema=schema))


@Operations.register_operation("pgchannels_downgrade", "pgchannels_downgrade")
class DowngradeOp(MigrateOperation):
    """Bring the schema back to a revision."""

    def __init__(self, to: str, *, schema: str = "pgchannels") -> None:
        self.to = _revision(to, ("base", *REVISIONS))
        self.schema = _schema(schema)

    @classmethod
    def pgchannels_downgrade(
        cls, operations: Operations, to: str, *, schema: str = "pgchannels"
    ) -> None:
        """Undo later revisions of pgchannels' schema. It does nothing if it is there or before.

        Args:
            to: the revision that ``pgchannels_upgrade`` found; ``"base"`` removes everything,
                messages included.
            schema: its name, ``Settings.schema_name``.

        Raises:
            ConfigurationError: there is no such revision, or this is not PostgreSQL.
        """
        operations.invoke(cls(to, schema=schema))


@Operations.register_operation("pgchannels_watch", "pgchannels_watch")
class WatchOp(MigrateOperation):
    """Publish what becomes of a table's rows."""

    def __init__(
        self,
        table: str,
        channel: str | None = None,
        *,
        user: str | None = None,
        columns: Iterable[str] | None = None,
        condition: str | None = None,
        on: Iterable[str] = ("insert", "update", "delete"),
        table_schema: str | None = None,
        schema: str = "pgchannels",
    ) -> None:
        if (channel is None) == (user is None):
            raise ConfigurationError("a watch has a channel or a user=: call it once for each")
        self.table = table
        self.channel = channel
        self.user = user
        self.columns = None if columns is None else _names("columns", columns)
        self.condition = condition
        self.on = _names("on", on)
        self.table_schema = table_schema
        self.schema = _schema(schema)

    @classmethod
    def pgchannels_watch(
        cls,
        operations: Operations,
        table: str,
        channel: str | None = None,
        *,
        user: str | None = None,
        columns: Iterable[str] | None = None,
        condition: str | None = None,
        on: Iterable[str] = ("insert", "update", "delete"),
        table_schema: str | None = None,
        schema: str = "pgchannels",
    ) -> None:
        """Publish what becomes of a table's rows, whoever writes them.

        Again for the same channel, it replaces what was said before. It needs
        revision 0003, and waits for locks as ``pgchannels_upgrade`` does.

        Args:
            table: its name as it is, ``Orders`` and not ``"Orders"``.
            channel: where to; ``{column}`` stands for a value of the row, ``{{`` for a brace.
            user: instead of a channel, the id of the user whose connections get the messages.
            columns: that messages have, and of which an UPDATE must change one; None for all.
            condition: a jsonpath predicate over ``{"new": …, "old": …}``.
            on: some of insert, update and delete.
            table_schema: of the table; None for the first that has it in the search path.
            schema: of pgchannels, ``Settings.schema_name``.

        Raises:
            ConfigurationError: this is not PostgreSQL, or not one of channel and user is given.
            sqlalchemy.exc.DBAPIError: no such table or column, an invalid channel or condition.
        """
        operations.invoke(
            cls(
                table,
                channel,
                user=user,
                columns=columns,
                condition=condition,
                on=on,
                table_schema=table_schema,
                schema=schema,
            )
        )

    def reverse(self) -> UnwatchOp:
        return UnwatchOp(
            self.table,
            self.channel,
            user=self.user,
            table_schema=self.table_schema,
            schema=self.schema,
            _reverse=self,
        )


@Operations.register_operation("pgchannels_unwatch", "pgchannels_unwatch")
class UnwatchOp(MigrateOperation):
    """No longer publish what becomes of a table's rows."""

    def __init__(
        self,
        table: str,
        channel: str | None = None,
        *,
        user: str | None = None,
        table_schema: str | None = None,
        schema: str = "pgchannels",
        _reverse: WatchOp | None = None,
    ) -> None:
        self.table = table
        self.channel = channel
        self.user = user
        self.table_schema = table_schema
        self.schema = _schema(schema)
        self._reverse = _reverse

    @classmethod
    def pgchannels_unwatch(
        cls,
        operations: Operations,
        table: str,
        channel: str | None = None,
        *,
        user: str | None = None,
        table_schema: str | None = None,
        schema: str = "pgchannels",
    ) -> None:
        """No longer publish a table's changes. It does nothing if they were not.

        Args:
            table, table_schema, schema: as they were given to ``pgchannels_watch``.
            channel, user: likewise; without both, all of the table's.
        """
        operations.invoke(cls(table, channel, user=user, table_schema=table_schema, schema=schema))

    def reverse(self) -> WatchOp:
        if self._reverse is None:
            raise NotImplementedError("how the table was watched is not known")
        return self._reverse


@Operations.implementation_for(UpgradeOp)
def _upgrade(operations: Operations, operation: UpgradeOp) -> None:
    _run(operations, upgrade_blocks(operation.to, operation.schema))


@Operations.implementation_for(DowngradeOp)
def _downgrade(operations: Operations, operation: DowngradeOp) -> None:
    to = None if operation.to == "base" else operation.to
    _run(operations, downgrade_blocks(to, operation.schema))


@Operations.implementation_for(WatchOp)
def _watch(operations: Operations, operation: WatchOp) -> None:
    columns = "null" if operation.columns is None else _array(operation.columns)
    condition = "null" if operation.condition is None else _literal(operation.condition)
    call = (
        f'perform "{operation.schema}".watch({_relation(operation)}, {_address(operation)},'
        f" columns => {columns}, condition => {condition}, operations => {_array(operation.on)});"
    )
    _run(operations, [block(call, operation.schema)])


@Operations.implementation_for(UnwatchOp)
def _unwatch(operations: Operations, operation: UnwatchOp) -> None:
    call = f'perform "{operation.schema}".unwatch({_relation(operation)}, {_address(operation)});'
    _run(operations, [block(call, operation.schema)])


def excluding(schema: str = "pgchannels", include_name: IncludeName | None = None) -> IncludeName:
    """An ``include_name`` for ``context.configure()`` that leaves *schema* out.

    Args:
        schema: of pgchannels, ``Settings.schema_name``.
        include_name: the application's own, asked about everything else.
    """

    def includes(name: str | None, type_: str, parent_names: MutableMapping[str, Any]) -> bool:
        found = name if type_ == "schema" else parent_names.get("schema_name")
        if found == schema:
            return False
        return include_name is None or include_name(name, type_, parent_names)

    return includes


include_name: IncludeName = excluding()
"""For ``context.configure(include_name=include_name)``: leaves the schema ``pgchannels`` out."""


def _run(operations: Operations, statements: list[str]) -> None:
    context = operations.get_context()
    if context.dialect.name != "postgresql":
        raise ConfigurationError(
            f"pgchannels needs PostgreSQL; these migrations are for {context.dialect.name}"
        )
    for statement in statements:
        if context.as_sql:
            # As it is: compiled for some drivers, it would get each percent sign twice.
            context.impl.static_output(statement + context.impl.command_terminator)
        else:
            operations.execute(text(statement.replace(":", r"\:")))


def _revision(to: str, known: tuple[str, ...]) -> str:
    if to not in known:
        raise ConfigurationError(
            f"pgchannels has no revision {to!r}; this version knows {', '.join(known)}"
        )
    return to


def _schema(name: str) -> str:
    if not _SCHEMA_NAME.fullmatch(name):
        raise ConfigurationError(
            f"{name!r} cannot be pgchannels' schema: expected up to 40 lower-case letters, digits "
            "and underscores, and no digit first"
        )
    return name


def _names(argument: str, names: Iterable[str]) -> list[str]:
    if isinstance(names, str):
        raise ConfigurationError(f"{argument}= takes several names, as a list")
    return list(names)


def _relation(operation: WatchOp | UnwatchOp) -> str:
    names = [operation.table]
    if operation.table_schema is not None:
        names.insert(0, operation.table_schema)
    quoted = ('"' + name.replace('"', '""') + '"' for name in names)
    return _literal(".".join(quoted)) + "::regclass"


def _address(operation: WatchOp | UnwatchOp) -> str:
    if operation.user is not None:
        return f"user_id => {_literal(operation.user)}"
    return "null" if operation.channel is None else _literal(operation.channel)


def _array(values: list[str]) -> str:
    return f"array[{', '.join(map(_literal, values))}]::text[]"


def _literal(value: str) -> str:
    # The form with E means the same whatever standard_conforming_strings says.
    return "E'" + value.replace("\\", "\\\\").replace("'", "''") + "'"
