"""``pgchannels demo``: a PostgreSQL, two nodes of ``examples/orders``, and a watch over both.

The nodes are processes of their own session, so Ctrl-C reaches the supervisor alone, which then
ends them, and PostgreSQL last. Should the supervisor itself be killed, the nodes end with the pipe
that they have for stdin, and the server that is left behind is taken over by the next start.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING

from pgchannels import migrate
from pgchannels.bundled import bundled
from pgchannels.embedded import EmbeddedPostgres, default_data_dir
from pgchannels.errors import ConfigurationError, PGChannelsError
from pgchannels.settings import Settings

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from pathlib import Path

    from rich.console import Console

__all__ = ["Demo"]

HOST = "127.0.0.1"
NODES = 2
# Seconds: for a node to answer after its start, and to end after SIGTERM.
START_TIME = 30.0
STOP_TIME = 5.0


@dataclass
class Node:
    """One process that serves the application, and what it needs to know."""

    name: str
    port: int
    environment: dict[str, str] = field(repr=False)
    has_served: bool = False

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    async def start(self) -> Process:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            str(bundled("examples") / "orders" / "node.py"),
            str(self.port),
            stdin=asyncio.subprocess.PIPE,
            env=self.environment,
            start_new_session=True,
        )

    def answers(self, pid: int) -> bool:
        """Whether it serves: that very process, and not another program on its port."""
        # Not urllib, which would ask a proxy from the environment.
        connection = http.client.HTTPConnection(HOST, self.port, timeout=2)
        try:
            connection.request("GET", "/node")
            answer = json.loads(connection.getresponse().read())
        except (OSError, http.client.HTTPException, ValueError):
            return False
        finally:
            connection.close()
        return isinstance(answer, dict) and answer.get("pid") == pid


class Demo:
    """What ``pgchannels demo`` runs.

    Args:
        console: where to say what happens.
        database_url: use this database, rather than a server of the demo's own.
        data_dir: of the demo's own server; by default where it was the last time.
        port: of the first node, the others get those that follow; 0 for any that are free.
        pause: seconds that a node stays away after it has ended.
    """

    def __init__(
        self,
        console: Console,
        *,
        database_url: str | None,
        data_dir: Path | None,
        port: int,
        pause: float,
    ) -> None:
        self._console = console
        self._database_url = database_url
        self._data_dir = data_dir
        self._port = port
        self._pause = pause
        self._stop = asyncio.Event()

    def run(self) -> None:
        """Run until SIGINT, SIGTERM or SIGHUP. When it returns, everything has ended.

        Raises:
            PGChannelsError: the demo cannot be started.
        """
        if sys.platform == "win32":
            raise ConfigurationError("the demo needs Linux or macOS (WSL will do)")
        if find_spec("uvicorn") is None:
            raise ConfigurationError("uvicorn is not installed: pip install 'pgchannels[demo]'")
        asyncio.run(self._run())

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._stop.set)
        if self._database_url is not None:
            await self._run_on(self._database_url)
            return
        server = EmbeddedPostgres(self._data_dir or default_data_dir())
        self._say(f"Starting PostgreSQL {server.version}; its data is in {server.data_dir}")
        # To the end, whatever signal comes: half-started, it could not be stopped.
        await asyncio.to_thread(server.start)
        try:
            await self._run_on(server.url())
        finally:
            await asyncio.to_thread(server.stop)
            self._say("Everything has stopped. The data is kept for the next time.")

    async def _run_on(self, database_url: str) -> None:
        # A listen_url from the environment would belong to another database.
        settings = Settings(database_url=database_url, listen_url=database_url)
        await asyncio.to_thread(migrate.upgrade, settings)
        nodes = self._nodes(settings)
        stop = asyncio.create_task(self._stop.wait())
        tasks = [stop, *(asyncio.create_task(self._keep(node, nodes)) for node in nodes)]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # raises what a node has failed with
        finally:
            self._say("\nStopping")
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep(self, node: Node, nodes: list[Node]) -> bool:
        """Run *node*, again whenever it has ended, until cancelled."""
        while True:
            process = await node.start()
            try:
                if await _until_serving(node, process):
                    self._say_serving(node, nodes)
                code = await process.wait()
            finally:
                await _end(process)
            if not node.has_served:
                raise PGChannelsError(f"{node.name} could not be started (exit code {code})")
            how = "was killed" if code == -signal.SIGKILL else f"has ended (exit code {code})"
            self._say(f"{node.name} {how}. It is started again in {self._pause:g} s.")
            await asyncio.sleep(self._pause)

    def _nodes(self, settings: Settings) -> list[Node]:
        ports = self._ports()
        common = {
            # A short lease: what a node has committed in its last moment is sequenced by another
            # one when that has run out.
            "PGCHANNELS_LEASE_TIME": "3",
            "PGCHANNELS_HEARTBEAT_INTERVAL": "1",
            **os.environ,
            # Not on the command line, which anyone may read.
            "PGCHANNELS_DATABASE_URL": settings.dsn,
            "PGCHANNELS_LISTEN_URL": settings.listen_dsn,
            "DEMO_URLS": " ".join(f"http://{HOST}:{port}" for port in ports),
        }
        names = [f"node {number}" for number in range(1, NODES + 1)]
        return [
            Node(name, port, {**common, "DEMO_NODE": name})
            for name, port in zip(names, ports, strict=True)
        ]

    def _ports(self) -> list[int]:
        with ExitStack() as held:  # until all are chosen, so that none is chosen twice
            wanted = [self._port and self._port + index for index in range(NODES)]
            return [self._choose_port(port, held) for port in wanted]

    def _choose_port(self, wanted: int, held: ExitStack) -> int:
        listener = held.enter_context(socket.socket())
        # As servers do: a port with connections that are being closed is free.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, wanted))
        except OSError as error:
            listener.bind((HOST, 0))
            chosen = listener.getsockname()[1]
            self._say(f"Port {wanted} cannot be used ({error.strerror}); using {chosen} instead")
        port: int = listener.getsockname()[1]
        return port

    def _say_serving(self, node: Node, nodes: list[Node]) -> None:
        if node.has_served:
            self._say(f"{node.name} is back on {node.url}")
            return
        node.has_served = True
        if all(other.has_served for other in nodes):
            self._say("\nReady: two servers, one PostgreSQL. Open both, side by side:\n")
            for each in nodes:
                self._say(f"    {each.name}   {each.url}")
            self._say("\nPlace orders, chat, kill a server. Ctrl-C ends it all.\n")

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False)


async def _until_serving(node: Node, process: Process) -> bool:
    try:
        async with asyncio.timeout(START_TIME):
            while process.returncode is None:
                if await asyncio.to_thread(node.answers, process.pid):
                    return True
                await asyncio.sleep(0.1)
    except TimeoutError:
        process.kill()
    return False


async def _end(process: Process) -> None:
    """SIGTERM; SIGKILL to what is left after a while."""
    if process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(STOP_TIME):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
