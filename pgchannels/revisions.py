"""The migrations as SQL: what each revision does, and what undoes it.

Beside each revision's script in ``migrations/versions`` stand two files: ``<name>.sql`` and
``<name>.down.sql``. Both name the schema ``pgchannels``. In the second, a line ``-- restore
pgchannels.<routine>`` stands for the definition that the newest earlier revision gave it.

``upgrade_to()`` and ``downgrade_from()`` are what our own Alembic environment runs.
``upgrade_blocks()`` and ``downgrade_blocks()`` do the same without it, in anybody's transaction or
script: each block is one ``DO`` statement that finds out for itself whether its turn has come.
"""

from __future__ import annotations

import re
from pathlib import Path

from pgchannels.bundled import bundled
from pgchannels.schema import LOCK_TIMEOUT, REVISIONS, VERSION_TABLE
from pgchannels.sql import in_schema, statements

__all__ = [
    "block",
    "downgrade_blocks",
    "downgrade_from",
    "foreign_object",
    "is_ours",
    "migration_lock",
    "prepared",
    "stranger",
    "upgrade_blocks",
    "upgrade_to",
]

_RESTORE = re.compile(r"^-- restore (pgchannels\.\w+)$", re.MULTILINE)
_DEFINITION = re.compile(r"create (?:or replace )?(function|procedure) (pgchannels\.\w+)\(")

_PATIENCE = "1 minute"

# An exception block is a savepoint: what fails in it gives its locks back. The advisory lock is
# waited for outside of it, as long as it takes: another migration holds it, and no publisher waits.
_BLOCK = """\
declare
    lock_timeout_before text := current_setting('lock_timeout');
    gives_up_at timestamptz := clock_timestamp() + interval '{patience}';
    revision text;
begin
    perform {lock};
    perform set_config('lock_timeout', '{lock_timeout}', true);
    loop
        begin
{body}
            exit;
        exception when lock_not_available then
            if clock_timestamp() > gives_up_at then
                raise exception 'a table that is to change was in use all the time, for {patience}'
                    using errcode = 'lock_not_available',
                          hint = 'See in pg_stat_activity which transactions are open for long.';
            end if;
        end;
        perform pg_sleep(random());
    end loop;
    perform set_config('lock_timeout', lock_timeout_before, true);
end
"""

_READ_REVISION = """\
            revision := null;
            if {is_ours} then
                select v.version_num into revision from {version_table} v;
            end if;
"""

# A version table by itself may be the application's: its Alembic calls it the same.
_IS_OURS = """\
(to_regclass('"{schema}".{version_table}') is not null
    and to_regclass('"{schema}".outbox') is not null
    and to_regclass('"{schema}".log') is not null)"""

# Tables before what belongs to them, for that is what somebody will recognise.
_FOREIGN = """\
(select case when not {is_ours} then coalesce(
    (select pg_describe_object('pg_class'::regclass, c.oid, 0) from pg_class c
      where c.relnamespace = to_regnamespace('"{schema}"')
      order by c.relkind in ('r', 'p', 'v', 'm', 'f') desc, c.relname limit 1),
    (select pg_describe_object('pg_proc'::regclass, p.oid, 0) from pg_proc p
      where p.pronamespace = to_regnamespace('"{schema}"') order by p.proname limit 1),
    (select pg_describe_object('pg_type'::regclass, t.oid, 0) from pg_type t
      where t.typnamespace = to_regnamespace('"{schema}"') order by t.typname limit 1)) end)"""

# The owner of a schema may drop what is in it, and put functions of its own in the place of ours. A
# superuser could do so anyway. The schema "public" belongs to the owner of the database.
_STRANGER = """\
(select pg_get_userbyid(o.owner)
   from (select case when n.nspowner = 'pg_database_owner'::regrole
                     then d.datdba else n.nspowner end as owner
           from pg_namespace n join pg_database d on d.datname = current_database()
          where n.nspname = '{schema}') o
  where o.owner <> case
            when {is_ours}
            then (select c.relowner from pg_class c where c.oid = to_regclass('"{schema}".log'))
            else (select r.oid from pg_roles r where r.rolname = current_user) end
    and not (select r.rolsuper from pg_roles r where r.oid = o.owner))"""

_REFUSE = """\
            if {foreign} is not null then
                raise exception 'schema {schema} is not pgchannels'' own: it holds %', {foreign}
                    using errcode = 'object_not_in_prerequisite_state',
                          hint = 'Choose a schema that does not exist yet, or is empty.';
            elsif {stranger} is not null then
                raise exception 'schema {schema} belongs to %, who could replace what it holds',
                        {stranger}
                    using errcode = 'object_not_in_prerequisite_state',
                          hint = 'Migrate as that role, give the schema to the role that migrates '
                                 '(ALTER SCHEMA … OWNER TO …), or choose another schema.';
            end if;
"""

# IF NOT EXISTS would ask for the right to create schemas even where one is there.
_CREATE_SCHEMA = """\
            if to_regnamespace('"{schema}"') is null then
                create schema "{schema}";
            end if;
"""

# As Alembic makes it for our own environment.
_CREATE_VERSION_TABLE = """\
create table if not exists {version_table} (
    version_num varchar(32) not null,
    constraint alembic_version_pkc primary key (version_num)
)"""


def upgrade_to(revision: str, schema: str) -> list[str]:
    """The statements that bring *schema* from the revision before to *revision*."""
    return statements(in_schema(_file(revision, ".sql"), schema))


def downgrade_from(revision: str, schema: str) -> list[str]:
    """The statements that undo *revision*."""
    script = _RESTORE.sub(
        lambda match: _definition(match[1], before=revision) + ";", _file(revision, ".down.sql")
    )
    return statements(in_schema(script, schema))


def upgrade_blocks(to: str, schema: str) -> list[str]:
    """What brings *schema* to the revision *to*, wherever it is.

    Nothing, if it is there or further. It makes the schema, if need be, and its version table, as
    our own environment does; and as that does, it refuses one that holds anything else.
    """
    return [
        *(
            _guarded(revision, schema, wanted=before, then=revision)
            for before, revision in zip((None, *REVISIONS), REVISIONS, strict=False)
            if revision <= to
        ),
        _checked(f"revision is null or revision < '{to}' collate \"C\"", to, schema),
    ]


def downgrade_blocks(to: str | None, schema: str) -> list[str]:
    """What brings *schema* back to the revision *to*; None: removes it, if no other is known.

    Nothing, if it is there or before.
    """
    return [
        *(
            _guarded(revision, schema, wanted=revision, then=before)
            for before, revision in reversed(list(zip((None, *REVISIONS), REVISIONS, strict=False)))
            if to is None or revision > to
        ),
        _checked(f"revision > '{to or ''}' collate \"C\"", to, schema),
    ]


def block(body: str, schema: str) -> str:
    """A ``DO`` statement that runs *body*, in PL/pgSQL, with the patience of a migration.

    It waits for no lock longer than ``LOCK_TIMEOUT``, for others would wait behind it: it gives up
    what it has and begins *body* again, for a minute. Outside of a transaction it is one.
    """
    code = _BLOCK.format(
        lock=migration_lock(schema),
        lock_timeout=LOCK_TIMEOUT,
        patience=_PATIENCE,
        body=body.rstrip(),
    )
    return f"do {_dollar_quoted(code, 'pgchannels')}"


def migration_lock(schema: str) -> str:
    """The call that lets one transaction at a time migrate *schema*."""
    return f"pg_advisory_xact_lock(1885823848, hashtext('migrate {schema}'))"


def is_ours(schema: str) -> str:
    """The expression that tells whether pgchannels has made what is in *schema*."""
    return _IS_OURS.format(schema=schema, version_table=VERSION_TABLE)


def foreign_object(schema: str) -> str:
    """The expression that names something in *schema*, if it is not pgchannels' own; or is null.

    Pruning, grants and a downgrade take whatever is in the schema for pgchannels' own, so that it
    must have been empty when it was migrated first.
    """
    return _FOREIGN.format(schema=schema, is_ours=is_ours(schema))


def stranger(schema: str) -> str:
    """The expression that names the owner of *schema*, or is null if that role can be trusted.

    Trusted are the role that owns the tables, which is the current one before they are made, and
    superusers.
    """
    return _STRANGER.format(schema=schema, is_ours=is_ours(schema))


def prepared(schema: str) -> str:
    """A ``DO`` statement: refuse a schema that is not for us, and make one that is missing."""
    return f"do {_dollar_quoted(f'begin{chr(10)}{_prepare(schema)}end', 'pgchannels')}"


def _guarded(revision: str, schema: str, *, wanted: str | None, then: str | None) -> str:
    """The step between the revisions *wanted* and *then*, which is *revision* or its undoing."""
    table = _version_table(schema)
    if then is None:
        steps = [
            *downgrade_from(revision, schema),
            f"drop table {table}",
            f'drop schema "{schema}"',
        ]
    elif wanted is None:
        steps = [
            _CREATE_VERSION_TABLE.format(version_table=table),
            *upgrade_to(revision, schema),
            f"insert into {table} (version_num) values ('{then}')",
        ]
    else:
        steps = [
            *(upgrade_to if then == revision else downgrade_from)(revision, schema),
            f"update {table} set version_num = '{then}'",
        ]
    condition = "revision is null" if wanted is None else f"revision = '{wanted}'"
    return block(
        _READ_REVISION.format(version_table=table, is_ours=is_ours(schema))
        + f"            if {condition} then\n"
        + (_prepare(schema) if then == revision else "")
        + "".join(f"execute {_dollar_quoted(step, 'statement')};\n" for step in steps)
        + "            end if;",
        schema,
    )


def _prepare(schema: str) -> str:
    """What comes before the first revision."""
    refuse = _REFUSE.format(
        schema=schema, foreign=foreign_object(schema), stranger=stranger(schema)
    )
    return refuse + _CREATE_SCHEMA.format(schema=schema)


def _checked(wrong: str, to: str | None, schema: str) -> str:
    """A ``DO`` statement that raises if the condition *wrong* is true of ``revision``."""
    return block(
        _READ_REVISION.format(version_table=_version_table(schema), is_ours=is_ours(schema))
        + f"""\
            if {wrong} then
                raise exception 'schema {schema} cannot get from revision % to {to or "base"}',
                        coalesce(revision, 'base')
                    using errcode = 'object_not_in_prerequisite_state',
                          hint = 'This version of pgchannels does not know the way.';
            end if;""",
        schema,
    )


def _version_table(schema: str) -> str:
    return f'"{schema}".{VERSION_TABLE}'


def _dollar_quoted(text: str, tag: str) -> str:
    while f"${tag}$" in text:
        tag += "_"
    return f"${tag}$\n{text}\n${tag}$"


def _definition(routine: str, *, before: str) -> str:
    for revision in reversed(REVISIONS[: REVISIONS.index(before)]):
        for statement in statements(_file(revision, ".sql")):
            match = _DEFINITION.search(statement)
            if match is not None and match[2] == routine:
                return f"create or replace {match[1]} {match[2]}({statement[match.end() :]}"
    raise LookupError(f"no revision before {before} defines {routine}")


def _file(revision: str, suffix: str) -> str:
    (script,) = _versions().glob(f"{revision}_*.py")
    return script.with_suffix(suffix).read_text(encoding="utf-8")


def _versions() -> Path:
    return bundled("migrations") / "versions"
