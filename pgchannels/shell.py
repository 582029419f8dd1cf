"""What ``pgchannels publish`` and ``pgchannels tail`` do, between a shell's pipes and channels."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from datetime import datetime
from typing import Any

import typer

from pgchannels import migrate
from pgchannels.errors import (
    ConfigurationError,
    DatabaseError,
    DatabaseUnavailable,
    InvalidMessage,
    PGChannelsError,
)
from pgchannels.layer import outgoing
from pgchannels.lines import (
    KeptText,
    Line,
    batches,
    discard_output,
    envelope_line,
    message_line,
    parse_payload,
)
from pgchannels.messages import Message, Position
from pgchannels.records import Outgoing
from pgchannels.schema import check_revision
from pgchannels.settings import Settings
from pgchannels.store import Session
from pgchannels.tail import Tail

__all__ = ["publish", "tail"]

# Messages that are printed if nothing else is asked for.
_NEWEST = 10
# Bytes of a line of input. A payload may have 16 MiB, and white space besides.
_MAX_LINE = 32 * 1024 * 1024
# What a shell reports of a command that a signal has ended (bash manual, "Exit Status").
_INTERRUPTED = 128 + signal.SIGINT
_TERMINATED = 128 + signal.SIGTERM
# undefined_table, invalid_schema_name
_NO_SCHEMA = ("42P01", "3F000")


def publish(
    settings: Settings, channel: str, payload: str, *, ttl: float | None, headers: Sequence[str]
) -> None:
    """Publish a payload, or if it is ``-``, each line of standard input, and tell the nodes.

    *channel* has been checked. Needs no more rights than to insert into the outbox.
    """
    options = {"ttl": ttl, "headers": _headers(headers)}
    if payload == "-":
        if sys.stdin is None:
            raise ConfigurationError("there is no standard input: it is closed")
        _message(channel, "{}", settings, options)  # what would be wrong with every line
        messages = _messages_of_input(channel, settings, options)
    else:
        messages = iter([("", [_message(channel, payload, settings, options)])])
    # Not one run of the event loop: while this waits for input, an interrupt must end it.
    with _ended_by_signals(), asyncio.Runner() as runner:
        session = Session(settings, "publish", dsn=settings.dsn)
        try:
            for place, batch in messages:
                try:
                    runner.run(_publish(session, settings.schema_name, batch))
                except DatabaseError as error:
                    raise _at(place, error) from error
        finally:
            runner.run(session.close())


def tail(
    settings: Settings,
    channels: Sequence[str],
    *,
    after: str | None,
    since: str | None,
    limit: int | None,
    follow: bool,
    as_json: bool,
) -> None:
    """Print the newest messages, or those from a place on, and go on with what comes."""
    if after is not None and since is not None:
        raise ConfigurationError("--after and --since exclude each other")
    position = None if after is None else Position.parse(after)
    time = None if since is None else _time(since)
    if follow and limit is not None and (after is not None or since is not None):
        raise ConfigurationError(
            "--limit with --follow is how many of the newest to begin with: leave out --after and "
            "--since, or one of the two"
        )
    reading = Tail(settings, channels)
    migrate.check(settings)
    with _ended_by_signals():
        asyncio.run(_tail(reading, _Output(as_json=as_json), position, time, limit, follow=follow))


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Leave without a word when interrupted or terminated, or when nobody reads the output."""
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(_INTERRUPTED) from None
    except asyncio.CancelledError:
        raise typer.Exit(_TERMINATED) from None
    except BrokenPipeError:
        # Nor would anybody read what the interpreter flushes at its end.
        discard_output()


def _headers(given: Sequence[str]) -> dict[str, str]:
    headers = {}
    for each in given:
        name, separator, value = each.partition("=")
        if not separator or not name:
            raise ConfigurationError(f"a header is given as NAME=VALUE, not {each!r}")
        headers[name] = value
    return headers


def _message(
    channel: str, text: str | bytes, settings: Settings, options: dict[str, Any]
) -> Outgoing:
    payload = parse_payload(text)
    kept = KeptText((text if isinstance(text, str) else text.decode()).strip())
    return outgoing(channel, payload, settings, kept, **options)


def _messages_of_input(
    channel: str, settings: Settings, options: dict[str, Any]
) -> Iterator[tuple[str, list[Outgoing]]]:
    """Batches, and which lines they are."""
    for lines in batches(sys.stdin.fileno(), max_line=_MAX_LINE):
        messages = []
        for line in lines:
            try:
                messages.append(_message(channel, line.content, settings, options))
            except InvalidMessage as error:
                raise PGChannelsError(
                    f"line {line.number}: {error}; nothing from line {lines[0].number} on has been "
                    "published"
                ) from error
        yield _place(lines), messages


def _place(lines: Sequence[Line]) -> str:
    first, last = lines[0].number, lines[-1].number
    return f"line {first}" if first == last else f"lines {first} to {last}"


def _at(place: str, error: DatabaseError) -> DatabaseError:
    return DatabaseError(f"{place}: {error}", error.sqlstate) if place else error


async def _publish(session: Session, schema: str, messages: Sequence[Outgoing]) -> None:
    channels = [message.channel for message in messages]
    payloads = [message.payload for message in messages]
    ttl, headers = messages[0].ttl, messages[0].headers  # the same for all
    try:
        if headers is None:
            await session.fetch("insert_only", channels, payloads, ttl)
        else:
            await session.fetch("insert_only_with_headers", channels, payloads, ttl, headers)
    except DatabaseError as error:
        if error.sqlstate in _NO_SCHEMA:
            check_revision(schema, None)
        raise
    # It is published. Should the nodes not be told, then one finds it by polling.
    with suppress(DatabaseUnavailable):
        await session.notify(schema, "")


def _time(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError) as error:
        raise ConfigurationError(f"--since {text!r} is no time in ISO 8601: {error}") from error


class _Output:
    """Prints messages."""

    def __init__(self, *, as_json: bool) -> None:
        self._line = envelope_line if as_json else message_line
        self._told_truncated = False

    def show(self, messages: Sequence[Message], *, truncated: bool) -> None:
        if truncated and not self._told_truncated:
            self._told_truncated = True
            typer.echo("pgchannels: messages from there on have been removed already", err=True)
        if messages:
            typer.echo("\n".join(map(self._line, messages)))


async def _tail(
    reading: Tail,
    output: _Output,
    after: Position | None,
    since: datetime | None,
    limit: int | None,
    *,
    follow: bool,
) -> None:
    task = asyncio.current_task()
    assert task is not None
    with suppress(NotImplementedError):  # on Windows
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    async with reading:
        if after is None and since is None:
            messages, after = await reading.newest(limit or _NEWEST)
            output.show(messages, truncated=False)
        elif not follow:
            await _show_stored(reading, output, after, since, limit)
        if follow:
            async with aclosing(reading.follow(after, since)) as coming:
                async for messages in coming:
                    output.show(messages, truncated=reading.truncated)


async def _show_stored(
    reading: Tail,
    output: _Output,
    after: Position | None,
    since: datetime | None,
    limit: int | None,
) -> None:
    shown = 0
    async with aclosing(reading.stored(after, since)) as pages:
        async for messages in pages:
            wanted = messages if limit is None else messages[: limit - shown]
            output.show(wanted, truncated=reading.truncated)
            shown += len(wanted)
            if shown == limit:
                return
