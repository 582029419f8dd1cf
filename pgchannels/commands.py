"""The commands of the command line.

They raise what goes wrong; `pgchannels.cli` says it and turns it into an exit code.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pgchannels import migrate, shell
from pgchannels.addresses import address_of
from pgchannels.errors import ConfigurationError, DatabaseError, PGChannelsError
from pgchannels.postgres_follower import MAX_LAG, follower_statuses
from pgchannels.pruner import Pruner, PruneReport
from pgchannels.records import FollowerStatus
from pgchannels.schema import NEEDED_REVISION
from pgchannels.settings import Settings
from pgchannels.store import Session

__all__ = ["app"]

app = typer.Typer(
    name="pgchannels",
    help="Durable messaging for FastAPI, inside the PostgreSQL that the application already has.",
    epilog="Settings come from options, from PGCHANNELS_… variables, or from a .env file.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

DatabaseUrl = Annotated[
    str | None,
    typer.Option(
        metavar="URL", help="postgresql://user:password@host/database [PGCHANNELS_DATABASE_URL]"
    ),
]
Schema = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="The schema of the tables [PGCHANNELS_SCHEMA_NAME]"),
]


_INSUFFICIENT_PRIVILEGE = "42501"


class Access(StrEnum):
    """What a role can be given."""

    PUBLISHER = "publisher"
    NODE = "node"
    MAINTAINER = "maintainer"


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pgchannels {version('pgchannels')}")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_show_version, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


@app.command("migrate")
def migrate_(
    database_url: DatabaseUrl = None,
    schema: Schema = None,
    sql: Annotated[
        bool, typer.Option("--sql", help="Print the script instead; needs no database.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; exit with 1 if not up to date.")
    ] = False,
) -> None:
    """Create or upgrade the tables. Safe to run again, and on several machines at once."""
    if sql and check:
        raise ConfigurationError("--sql and --check exclude each other")
    settings = _settings(database_url=database_url, schema_name=schema)
    if sql:
        typer.echo(migrate.script(settings), nl=False)
        return
    name = f"schema {settings.schema_name!r}"
    needed = "Its owner may; if there is none yet, a role with CREATE on the database"
    if check:
        needed = _grant_needed(settings, Access.NODE)
    with _refusals_explained(settings, needed):
        found = migrate.current(settings)
        if check:
            migrate.check(settings)
        else:
            migrate.upgrade(settings)
        now = migrate.current(settings)
    if now != found:
        before = "created" if found is None else f"migrated from revision {found}"
        typer.echo(f"{name} {before}, now at revision {now}")
    elif now == NEEDED_REVISION:
        typer.echo(f"{name} is up to date (revision {now})")
    else:
        typer.echo(f"{name} is at revision {now}, of a newer version; this one works on it, too")


@app.command()
def prune(
    database_url: DatabaseUrl = None,
    schema: Schema = None,
    retention: Annotated[
        str | None,
        typer.Option(
            metavar="DURATION",
            help="Keep messages for this long, in ISO 8601: P7D, PT12H [PGCHANNELS_RETENTION]",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only count what would be removed.")
    ] = False,
) -> None:
    """Remove what is past its retention, once. Nodes do so too, by themselves."""
    settings = _settings(database_url=database_url, schema_name=schema, retention=retention)
    access = Access.NODE if dry_run else Access.MAINTAINER
    with _refusals_explained(settings, _grant_needed(settings, access)):
        migrate.check(settings)
        report = asyncio.run(_prune(settings, dry_run=dry_run))
    _print_report(report, settings, dry_run=dry_run)
    if report.problems:
        for problem in report.problems:
            typer.echo(f"pgchannels: not done this time: {problem}", err=True)
        raise typer.Exit(1)


@app.command()
def followers(database_url: DatabaseUrl = None, schema: Schema = None) -> None:
    """Show the durable readers: how far each has come, and what it has still to do."""
    settings = _settings(database_url=database_url, schema_name=schema)
    with _refusals_explained(settings, _grant_needed(settings, Access.NODE)):
        migrate.check(settings)
        found = asyncio.run(_followers(settings))
    _print_followers(found)


@app.command()
def grant(
    access: Annotated[
        Access,
        typer.Argument(
            help="publisher: may publish, and read nothing. node: may do what a server does, but "
            "for pruning. maintainer: may do what the schema's owner may."
        ),
    ],
    role: Annotated[str, typer.Argument(metavar="ROLE", help="One that exists.")],
    database_url: DatabaseUrl = None,
    schema: Schema = None,
    to_users: Annotated[
        bool,
        typer.Option(
            "--to-users",
            help="A publisher that may also publish to users, and to several connections at once.",
        ),
    ] = False,
) -> None:
    """Give a role of the database access to the schema. Safe to run again."""
    if to_users and access is not Access.PUBLISHER:
        raise ConfigurationError(f"--to-users is for a publisher; a {access} may do so in any case")
    settings = _settings(database_url=database_url, schema_name=schema)
    needed = "Only the schema's owner may grant"
    if access is Access.MAINTAINER:
        needed = "Only who has ADMIN OPTION on the schema's owner, or a superuser, may"
    with _refusals_explained(settings, needed):
        migrate.check(settings)
        asyncio.run(_grant(settings, access, role, to_users=to_users))
    typer.echo(f"role {role!r} is a {access} on schema {settings.schema_name!r}")


@app.command()
def publish(
    channel: Annotated[
        str,
        typer.Argument(metavar="[CHANNEL]", help="Where to, if not --user or --everyone."),
    ],
    payload: Annotated[
        str | None,
        typer.Argument(
            metavar="PAYLOAD",
            help="A JSON object, or - for one on each line of standard input.",
            show_default=False,
        ),
    ] = None,
    database_url: DatabaseUrl = None,
    schema: Schema = None,
    user: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Publish to all connections of this user."),
    ] = None,
    everyone: Annotated[
        bool, typer.Option("--everyone", help="Publish to every connection.")
    ] = False,
    ttl: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="How long it can be read [PGCHANNELS_DEFAULT_TTL]"),
    ] = None,
    header: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="A header; may be given several times."),
    ] = None,
) -> None:
    """Publish messages on a channel, or to a user. A publisher may, who may do nothing else.

    Of standard input, up to 1000 lines are one transaction. The first that is
    refused ends it, with nothing of its transaction published.
    """
    settings = _settings(database_url=database_url, schema_name=schema)
    named = channel if payload is not None else None
    if (named is not None) + (user is not None) + everyone != 1:
        raise ConfigurationError(
            "give a CHANNEL and a PAYLOAD, or --user or --everyone and a PAYLOAD alone"
        )
    address = address_of(named, user=user, everyone=everyone, to=None, exclude=None)
    if payload is None:
        payload = channel  # the only argument
    needed = _grant_needed(settings, Access.PUBLISHER)
    if user is not None:
        needed += " --to-users"
    with _refusals_explained(settings, needed):
        shell.publish(settings, address.channel, payload, ttl=ttl, headers=header or [])


@app.command()
def tail(
    channels: Annotated[list[str], typer.Argument(metavar="CHANNEL", help="One or more.")],
    database_url: DatabaseUrl = None,
    schema: Schema = None,
    after: Annotated[
        str | None,
        typer.Option(metavar="POSITION", help="Begin after this one; 0: with all that is kept."),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(
            metavar="TIME", help="Begin with this time, in ISO 8601; local, if it has no zone."
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="At most so many: the newest (10 by default), or the first."
        ),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with what comes, until interrupted.")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print what clients get, as a line of JSON each.")
    ] = False,
) -> None:
    """Print the messages of channels, oldest first: the newest 10, or those from a place on.

    A line has the time (UTC), position, channel and payload. Ephemeral messages
    are not shown. The exit code is 130 when it is interrupted.
    """
    settings = _settings(database_url=database_url, schema_name=schema)
    with _refusals_explained(settings, _grant_needed(settings, Access.NODE)):
        shell.tail(
            settings, channels, after=after, since=since, limit=limit, follow=follow, as_json=json
        )


@app.command()
def demo(
    database_url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Use this database, not a PostgreSQL of the demo's own."),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where the demo's own PostgreSQL keeps its data."),
    ] = None,
    port: Annotated[
        int,
        typer.Option(
            min=0, max=65534, help="Of the first node; the second gets the next one. 0: any two."
        ),
    ] = 8000,
    restart_after: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", min=0, help="How long a node stays away that has been killed."
        ),
    ] = 8.0,
) -> None:
    """Run two servers on one PostgreSQL, with a page to place orders, chat, and kill servers."""
    from pgchannels.demo import Demo

    if database_url is not None and data_dir is not None:
        raise ConfigurationError("--database-url and --data-dir exclude each other")
    if database_url is not None:
        migrate.current(_settings(database_url=database_url))  # says what is wrong with it
    # PGCHANNELS_DATABASE_URL is not asked: trying the demo out must not write into a database that
    # happens to be configured.
    console = Console(soft_wrap=True, highlight=False)
    Demo(
        console, database_url=database_url, data_dir=data_dir, port=port, pause=restart_after
    ).run()


def _settings(**options: Any) -> Settings:
    return Settings(**{name: value for name, value in options.items() if value is not None})


def _grant_needed(settings: Settings, access: Access, role: str = "{role}") -> str:
    # An owner that is no superuser cannot make others members of itself.
    granter = "a superuser" if access is Access.MAINTAINER else "its owner"
    option = "" if settings.schema_name == "pgchannels" else f" --schema {settings.schema_name}"
    return f"As {granter}, run: pgchannels grant {access} {role}{option}"


@contextmanager
def _refusals_explained(settings: Settings, needed: str) -> Iterator[None]:
    """Where the role lacks a privilege, name it, and say what is needed.

    Args:
        settings: as whom it is done, and where.
        needed: a sentence, which may have ``{role}`` in it.
    """
    try:
        yield
    except DatabaseError as error:
        if error.sqlstate != _INSUFFICIENT_PRIVILEGE:
            raise
        role = asyncio.run(_role(settings))
        raise DatabaseError(
            f"role {role!r} may not do this on schema {settings.schema_name!r}: {error}. "
            + needed.format(role=quote(role)),
            error.sqlstate,
        ) from error


async def _role(settings: Settings) -> str:
    session = Session(settings, "role")
    try:
        (row,) = await session.fetch("current_role")
    finally:
        await session.close()
    role: str = row[0]
    return role


async def _grant(settings: Settings, access: Access, role: str, *, to_users: bool) -> None:
    session = Session(settings, "grant")
    try:
        await session.fetch("grant_access", access.value, role, to_users)
    finally:
        await session.close()


async def _prune(settings: Settings, *, dry_run: bool) -> PruneReport:
    session = Session(settings, "prune")
    try:
        (row,) = await session.fetch("owner")
        if not dry_run and not row["is_ours"]:
            # It could delete messages, and then not drop the partitions.
            owner, role = row["owner"], row["we"]
            raise PGChannelsError(
                f"role {role!r} is no maintainer of schema {settings.schema_name!r}, nothing was "
                f"removed. Prune as its owner {owner!r}, or make that role one. "
                + _grant_needed(settings, Access.MAINTAINER, quote(role))
            )
        return await Pruner(settings, session).run_once(dry_run=dry_run)
    finally:
        await session.close()


async def _followers(settings: Settings) -> list[FollowerStatus]:
    session = Session(settings, "followers")
    try:
        return await follower_statuses(session)
    finally:
        await session.close()


def _print_followers(found: list[FollowerStatus]) -> None:
    table = Table(box=None)
    for heading in ("name", "position"):
        table.add_column(heading, overflow="fold")
    table.add_column("lag", justify="right")
    for heading in ("active", "moved"):
        table.add_column(heading)
    for each in found:
        lag = str(each.lag) if each.lag < MAX_LAG else f"{MAX_LAG} or more"
        active = "yes" if each.active else "no"
        moved = each.moved_at.isoformat(sep=" ", timespec="seconds")
        table.add_row(Text(each.name), str(each.position), lag, active, moved)
    Console(highlight=False).print(table if found else "There are no followers.")


def _print_report(report: PruneReport, settings: Settings, *, dry_run: bool) -> None:
    retention = settings.model_dump(mode="json", include={"retention"})["retention"]
    kept = "for ever" if retention is None else f"for {retention}"
    title = f"schema {settings.schema_name!r}, messages are kept {kept}"
    title = f"Dry run, nothing was changed: {title}" if dry_run else f"Pruned: {title}"
    table = Table(show_header=False, box=None)
    table.add_column()
    table.add_column(justify="right")
    for field in fields(report):
        if field.name == "problems":
            continue
        value = getattr(report, field.name)
        count = len(value) if isinstance(value, list) else value
        table.add_row(_LABELS.get(field.name, field.name.replace("_", " ")), str(count))
    console = Console(highlight=False)
    console.print(title, markup=False, soft_wrap=True)
    console.print(table)


_LABELS = {
    "floor": "the log begins after id",
    "messages_deleted": "messages deleted, past the retention",
    "keys_deleted": "idempotency keys forgotten",
    "revocations_deleted": "revocations forgotten",
    "memberships_ended": "memberships ended, of channels not in use",
    "receivers_deleted": "channels forgotten that nobody receives from",
    "expired_deleted": "messages deleted, past their own time to live",
    "stragglers": "stragglers published anew",
}
