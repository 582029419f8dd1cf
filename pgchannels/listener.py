"""The one connection that LISTENs: hints come in here, and the news that they may have been lost.

A hint is never more than a reason to look, so the contract with the hub is small: ``on_hint(text)``
for each notification, ``on_connected()`` when they begin to come in, ``on_disconnected()`` when
they no longer do. Catching up after ``on_connected()`` leaves no gap: LISTEN came before it.

asyncpg would go on believing in a dead connection: it sets no keepalive and does not see a
half-open socket. So every few seconds a query on this very connection asks whether the server still
knows that it listens, and a notification to a channel of its own makes the round trip that a pooler
in transaction mode would swallow.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from pgchannels.backoff import Backoff
from pgchannels.connections import connect, driver_errors
from pgchannels.errors import DatabaseError, DatabaseUnavailable
from pgchannels.waiting import set_within

if TYPE_CHECKING:
    from asyncpg import Connection

    from pgchannels.settings import Settings
    from pgchannels.store import Store

__all__ = ["Listener"]

logger = logging.getLogger("pgchannels.listener")

_HEARTBEAT = "select pg_is_in_recovery(), array(select pg_listening_channels())"


class _Deaf(Exception):
    """The connection does not (any longer) bring notifications."""


class Listener:
    """Keeps a connection listening. ``run()`` is its whole life; cancelling it ends it.

    Args:
        settings: where to connect, how often to try the connection.
        store: sends the notifications that make the round trip, on a connection of its own.
        on_hint: called with the payload of each notification.
        on_connected: called each time that listening begins (anew).
        on_disconnected: called each time that it has ended.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        *,
        on_hint: Callable[[str], None],
        on_connected: Callable[[], None],
        on_disconnected: Callable[[], None],
        backoff: Backoff | None = None,
    ) -> None:
        self._settings = settings
        self._store = store
        self._on_hint = on_hint
        self._on_connected = on_connected
        self._on_disconnected = on_disconnected
        self._backoff = backoff or Backoff()
        # A channel has 63 bytes at most, a schema's name up to 40.
        self._echo_channel = f"{settings.schema_name}.{uuid4().hex[:16]}"
        self._echo = asyncio.Event()
        self._lost = asyncio.Event()
        self.healthy = False
        """Whether notifications are coming in, as far as the last heartbeat could tell."""

    async def run(self) -> None:
        """Listen until cancelled; come back, with jitter, whenever the connection is lost."""
        while True:
            try:
                await self._listen()
            except (_Deaf, DatabaseError) as error:
                delay = self._backoff.next()
                logger.warning("not listening, retry in %.1f s: %s", delay, error)
                await asyncio.sleep(delay)

    async def _listen(self) -> None:
        connection = await connect(
            self._settings.listen_dsn, role="listener", timeout=self._settings.connect_timeout
        )
        try:
            self._lost.clear()
            connection.add_termination_listener(lambda _: self._lost.set())
            with driver_errors():
                # asyncpg's LISTEN has no time limit of its own.
                async with asyncio.timeout(self._settings.heartbeat_interval):
                    await connection.add_listener(self._echo_channel, self._received_echo)
                    await connection.add_listener(self._settings.schema_name, self._received)
            await self._heartbeat(connection)
            self.healthy = True
            self._backoff.reset()
            self._on_connected()
            while not await set_within(self._lost, self._settings.heartbeat_interval):
                await self._heartbeat(connection)
            raise _Deaf("the connection was closed")
        finally:
            if self.healthy:
                self.healthy = False
                self._on_disconnected()
            connection.terminate()

    async def _heartbeat(self, connection: Connection) -> None:
        interval = self._settings.heartbeat_interval
        with driver_errors():
            row = await connection.fetchrow(_HEARTBEAT, timeout=interval)
        assert row is not None
        in_recovery, listening = row
        if in_recovery:
            raise _Deaf("the server is a standby")
        if not {self._settings.schema_name, self._echo_channel} <= set(listening):
            raise _Deaf("the session does not listen any more")
        self._echo.clear()
        try:
            async with asyncio.timeout(interval):
                await self._store.notify(self._echo_channel, "")
        except (DatabaseUnavailable, TimeoutError):
            return  # says nothing about this connection, which has just answered
        if not await set_within(self._echo, interval):
            raise _Deaf(
                "notifications do not arrive; if there is a pooler in transaction mode between, "
                "set listen_url (PGCHANNELS_LISTEN_URL) to the server itself"
            )

    def _received(self, connection: Any, pid: int, channel: str, payload: Any) -> None:
        self._on_hint(payload)

    def _received_echo(self, connection: Any, pid: int, channel: str, payload: Any) -> None:
        self._echo.set()
