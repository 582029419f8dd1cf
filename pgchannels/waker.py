"""Tells the nodes after a commit, from a process that has none: a Celery worker, a script.

One daemon thread for each database, with an event loop and one connection, started by the first
:meth:`Waker.wake`. All that it sends is an empty notification, on which the node that polls the
outbox looks at once. It may as well be lost: then that node finds the messages by polling.

Processes fork: Celery, gunicorn, multiprocessing. The child has a copy of everything but the
thread, and shares the socket with its parent. Whatever it did with that copy, also by collecting it
as garbage, would reach the parent's server: asyncpg says goodbye when it drops a connection. So the
first thing in a child is to put ``/dev/null`` in the place of each descriptor that the loop
watches, which leaves the parent's alone. The copy is then kept, and never used.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pgchannels.backoff import Backoff
from pgchannels.connections import connect, driver_errors
from pgchannels.errors import (
    ConfigurationError,
    DatabaseError,
    DatabaseUnavailable,
    PGChannelsError,
)
from pgchannels.sql import load_queries
from pgchannels.urls import driver_url
from pgchannels.waiting import set_within

if TYPE_CHECKING:
    from asyncpg import Connection

    from pgchannels.settings import Settings

__all__ = ["Waker", "close_wakers", "waker_for"]

logger = logging.getLogger("pgchannels.waker")

# Seconds without a wake-up after which the connection is closed and the thread ends.
_IDLE_TIME = 60.0
# … that a connection and a notification may take.
_PATIENCE = 5.0
# … that the exit of the interpreter may wait for a last notification.
_EXIT_TIME = 1.0
# … to wait after having been refused. A password does not get better by trying.
_AFTER_REFUSAL = 60.0

_wakers: dict[tuple[str, str], Waker] = {}


def waker_for(settings: Settings, url: str | None = None) -> Waker:
    """The waker of this process for a database and schema: one, however often it is asked for.

    Args:
        settings: where the database is, and the schema.
        url: of the database, if the settings have none: as libpq or SQLAlchemy takes it, with its
            password.

    Raises:
        ConfigurationError: neither has a URL, or *url* says nothing of where the database is.
    """
    dsn = settings.dsn if url is None or settings.database_url is not None else _for_driver(url)
    key = dsn, settings.schema_name
    # Without a lock, for it is a single step, and a waker that loses has not begun anything.
    return _wakers.get(key) or _wakers.setdefault(key, Waker(*key))


class Waker:
    """Wakes the nodes on one database. Made by :func:`waker_for`; nothing opens in the constructor.

    It ends with the interpreter, having sent what was still to be sent, unless that takes longer
    than a second. ``os._exit()``, with which the processes of multiprocessing end too, skips this.

    Args:
        dsn: a libpq URL. A pooler that shares sessions may be in between.
        schema: which schema, and so the channel that is notified.
        idle_time: seconds without a wake-up after which the connection is closed.
    """

    def __init__(self, dsn: str, schema: str, *, idle_time: float = _IDLE_TIME) -> None:
        self._dsn = dsn
        self._schema = schema
        self._idle_time = idle_time
        # Now, and not in a thread: that imports, and a child that is forked during an import waits
        # for a lock that no thread of its own will release.
        load_queries(schema)
        # Reentrant: a signal handler may commit, too, at any moment.
        self._lock = threading.RLock()
        self._sender: _Sender | None = None
        self._inherited: list[_Sender] = []

    def wake(self) -> None:
        """Something was committed to the outbox: tell the nodes.

        From any thread; does not wait for anything, and never raises. While one notification is
        under way, any number of calls become the next one.
        """
        with self._lock:
            sender = self._sender
            if sender is None:
                sender = _Sender(self._dsn, self._schema, self._idle_time, self._lock, self._ended)
                self._sender = sender
                try:
                    sender.thread.start()
                except RuntimeError as error:
                    # No thread can be started any more: the interpreter is on its way out.
                    self._sender = None
                    logger.debug("nodes are not woken: %s", error)
                    return
            sender.wake()

    def close(self, timeout: float = _EXIT_TIME) -> None:
        """Send what is still to be sent, close the connection, and end the thread.

        The next ``wake()`` starts it again. Does nothing if it does not run.

        Args:
            timeout: seconds to wait for that.
        """
        thread = self.stop()
        if thread is not None:
            thread.join(timeout)

    def stop(self) -> threading.Thread | None:
        """Begin to close; return the thread that is about to end."""
        with self._lock:
            sender = self._sender
            if sender is None:
                return None
            sender.stop()
            return sender.thread

    def _ended(self, sender: _Sender) -> None:
        if self._sender is sender:
            self._sender = None

    def forked(self) -> None:
        """This is a child process: the thread is not here, nor is who may have held the lock."""
        self._lock = threading.RLock()
        sender, self._sender = self._sender, None
        if sender is not None:
            sender.sever()
            self._inherited.append(sender)


class _Sender:
    """One life of the thread: from a wake-up to when there has been none for a while.

    The lock is the waker's. It guards what is wanted, and the moment at which the thread gives up:
    from then on a wake-up starts another one.
    """

    def __init__(
        self,
        dsn: str,
        schema: str,
        idle_time: float,
        lock: threading.RLock,
        ended: Callable[[_Sender], None],
    ) -> None:
        self._dsn = dsn
        self._schema = schema
        self._idle_time = idle_time
        self._lock = lock
        self._ended = ended
        self._query = load_queries(schema)["notify"]
        # Not epoll or kqueue: a child would share that with its parent, and with it, what is
        # registered there.
        self._selector = _selector()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._connection: Connection | None = None
        self._changed = asyncio.Event()
        self._stopped = asyncio.Event()
        self._wanted = False
        self._stopping = False
        self._failing = False
        self._backoff = Backoff(cap=1.0)
        self.thread = threading.Thread(target=self._main, name="pgchannels waker", daemon=True)

    def wake(self) -> None:
        """With the lock held."""
        if not self._wanted:
            self._wanted = True
            self._tell(self._changed)

    def stop(self) -> None:
        """With the lock held."""
        self._stopping = True
        self._tell(self._changed)
        self._tell(self._stopped)

    def _tell(self, event: asyncio.Event) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(event.set)

    def sever(self) -> None:
        """In a child process: let go of the descriptors, in a way that their numbers stay taken."""
        descriptors = [key.fd for key in self._selector.get_map().values()]
        if descriptors:
            nowhere = os.open(os.devnull, os.O_RDWR)
            for descriptor in descriptors:
                os.dup2(nowhere, descriptor, inheritable=False)
            os.close(nowhere)

    def _main(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: _Loop(self._selector)) as runner:
                runner.run(self._run())
        except Exception:
            logger.exception("nodes are not woken; what is published is found by polling")
        finally:
            with self._lock:
                self._ended(self)

    async def _run(self) -> None:
        with self._lock:
            self._loop = asyncio.get_running_loop()
            if self._stopping:
                self._stopped.set()
        try:
            while await self._next():
                await self._send()
        finally:
            with self._lock:
                self._loop = None
                self._ended(self)
            await self._disconnect()

    async def _next(self) -> bool:
        """Wait for a wake-up. False: the thread has ended, as far as anyone else can see."""
        in_time = True
        while True:
            with self._lock:
                self._changed.clear()
                if self._wanted:
                    self._wanted = False
                    return True
                if self._stopping or not in_time:
                    self._ended(self)
                    return False
            in_time = await set_within(self._changed, self._idle_time)

    async def _send(self) -> None:
        try:
            await self._notify()
        except PGChannelsError as error:
            await self._disconnect()
            if not self._failing:
                self._failing = True
                logger.warning(
                    "nodes are not woken, they find by polling what is published: %s", error
                )
            await set_within(
                self._stopped,
                self._backoff.next() if isinstance(error, DatabaseUnavailable) else _AFTER_REFUSAL,
            )
        else:
            if self._failing:
                self._failing = False
                logger.info("nodes are woken again")
            self._backoff.reset()

    async def _notify(self) -> None:
        if self._connection is not None:
            try:
                await self._execute(self._connection)
            except DatabaseUnavailable as error:
                # It may have been dead for long: the server has been restarted, say.
                logger.debug("the connection is made anew: %s", error)
                await self._disconnect()
            else:
                return
        # As behind a pooler, in any case: nobody knows what the URL of a publisher leads through,
        # and a single statement needs nothing of its session.
        self._connection = await connect(
            self._dsn,
            role="waker",
            timeout=_PATIENCE,
            pooled=True,
            server_settings={"application_name": "pgchannels waker"},
        )
        await self._execute(self._connection)

    async def _execute(self, connection: Connection) -> None:
        with driver_errors():
            await connection.execute(self._query, self._schema, "", timeout=_PATIENCE)

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                with driver_errors():
                    await connection.close(timeout=_EXIT_TIME)
            except DatabaseError:
                connection.terminate()


class _Loop(asyncio.SelectorEventLoop):
    """Looks names up in its own thread, which has nothing else to do.

    The executor's threads, by which others do it, can no longer be used once the interpreter has
    begun to exit, and that is when a script that has just committed gets here.
    """

    async def getaddrinfo(
        self,
        host: bytes | str | None,
        port: bytes | str | int | None,
        *,
        family: int = 0,
        type: int = 0,
        proto: int = 0,
        flags: int = 0,
    ) -> list[Any]:
        return socket.getaddrinfo(host, port, family, type, proto, flags)


def _selector() -> selectors.BaseSelector:
    if sys.platform == "win32":
        return selectors.SelectSelector()
    return selectors.PollSelector()


def _for_driver(url: str) -> str:
    """A URL of SQLAlchemy's as our driver reads it: without what is for another one."""
    dsn = driver_url(url, strict=False).dsn
    if dsn.strip("/") == "postgresql:":
        # An engine that connects by creator=. What libpq takes by default is somewhere else.
        raise ConfigurationError(
            "the engine's URL has no address: set database_url (PGCHANNELS_DATABASE_URL)"
        )
    return dsn


def close_wakers(timeout: float = _EXIT_TIME) -> None:
    """Close the wakers of this process, all at the same time; see :meth:`Waker.close`.

    Done at exit by itself. Tests need it before they drop a database: the connection of a waker
    stays for a minute after the last commit.

    Args:
        timeout: seconds to wait for all of them together.
    """
    ends_at = time.monotonic() + timeout
    for thread in [waker.stop() for waker in list(_wakers.values())]:
        if thread is not None:
            thread.join(max(0.0, ends_at - time.monotonic()))


def _forked() -> None:
    for waker in _wakers.values():
        waker.forked()


atexit.register(close_wakers)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
