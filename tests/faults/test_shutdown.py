"""Servers that are told to end: their clients hear of it, go elsewhere, and miss nothing."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from pgchannels import PostgresLayer, Settings
from tests.support.balancer import Balancer
from tests.support.eventually import eventually
from tests.support.processes import Processes

# One application as anyone would write it. It prints the port that it got.
APPLICATION = """
import anyio, asyncio, json, os, socket, uvicorn
from fastapi import FastAPI, WebSocket
from pgchannels import PostgresLayer
from pgchannels.web import ConnectionManager, Shutdown, lifespan

connections = ConnectionManager(
    PostgresLayer(), shutdown=Shutdown(**json.loads(os.environ["SHUTDOWN"]))
)
app = FastAPI(lifespan=lifespan(connections))

@app.websocket("/rooms/{room}")
async def follow(socket: WebSocket, room: str) -> None:
    async with connections.connect(socket) as connection:
        await connection.join(room, after=connection.resume_position)
        await connection.send_json({"ready": os.getpid()})
        async for _ in connection:
            pass

@app.websocket("/long")
async def end_slowly(socket: WebSocket) -> None:
    async with connections.connect(socket) as connection:
        try:
            await connection.send_json({"ready": os.getpid()})
            async for _ in connection:
                pass
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(600)

async def main():
    listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
    if sndbuf := os.environ.get("SNDBUF"):  # that sockets inherit from the one that listens
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, int(sndbuf))
    options = {**connections.server_options(), **json.loads(os.environ["UVICORN"])}
    server = uvicorn.Server(uvicorn.Config(app, log_level="info", **options))
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    while not server.started:
        await asyncio.sleep(0.01)
    print("port", listening.getsockname()[1], flush=True)
    await serving

asyncio.run(main())
"""

SOCKETS = 500
ROOMS = 10
WINDOW = 10.0
# Seconds that a loaded machine may need besides.
PATIENCE = 60.0
SETTINGS = {"poll_interval": 0.2, "presence_grace": 0.0}


class Node:
    """A process that serves the application."""

    def __init__(
        self,
        processes: Processes,
        database_url: str,
        *,
        shutdown: dict[str, float],
        uvicorn: dict[str, Any] | None = None,
        **env: str,
    ) -> None:
        self._processes = processes
        settings = {f"PGCHANNELS_{name.upper()}": str(value) for name, value in SETTINGS.items()}
        self.process: subprocess.Popen[bytes] = processes.start(
            "-c",
            APPLICATION,
            env={
                **settings,
                **env,
                "PGCHANNELS_DATABASE_URL": database_url,
                "SHUTDOWN": json.dumps(shutdown),
                "UVICORN": json.dumps(uvicorn or {}),
            },
        )
        self.port = 0

    async def started(self) -> None:
        self.port = await eventually(self._printed_port, timeout=PATIENCE)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def output(self) -> str:
        return self._processes.output(self.process)

    def url(self, path: str) -> str:
        return f"ws://127.0.0.1:{self.port}{path}"

    async def ended(self) -> int:
        """The exit code."""
        await eventually(lambda: self.process.poll() is not None, timeout=PATIENCE)
        return self.process.returncode

    def _printed_port(self) -> int:
        words = self.output.split()
        return int(words[words.index("port") + 1]) if "port" in words[:-1] else 0


class Parting:
    """What a client heard from a server that closed its socket."""

    def __init__(self) -> None:
        self.reconnect_in: float | None = None
        self.at = 0.0
        self.code: int | None = None


class Client:
    """Follows a room, as the documentation says: resumes, and comes again when it is told to."""

    def __init__(self, number: int, port: int, connecting: asyncio.Semaphore) -> None:
        self.room = f"room:{number % ROOMS}"
        self._port = port
        self._connecting = connecting
        self._position = "0"
        self._last_id = 0
        self._ended = False
        self.numbers: list[int] = []
        self.repeats = 0
        self.nodes: list[int] = []
        self.partings: list[Parting] = []
        self.attempts: list[float] = []
        self.refusals: list[int] = []

    async def run(self) -> None:
        while not self._ended:
            wait = 0.2
            try:
                wait = await self._converse()
            except InvalidStatus as error:
                self.refusals.append(error.response.status_code)
                wait = float(error.response.headers.get("Retry-After", wait))
            except (OSError, InvalidHandshake, TimeoutError):
                pass  # the server has gone while it shook hands: come again
            if not self._ended:
                await asyncio.sleep(wait)

    async def _converse(self) -> float:
        """Read until the socket is closed; when to come again, in seconds."""
        url = f"ws://127.0.0.1:{self._port}/rooms/{self.room}?after={self._position}"
        async with AsyncExitStack() as stack:
            self.attempts.append(time.monotonic())
            async with self._connecting:
                socket = await stack.enter_async_context(
                    connect(
                        url,
                        proxy=None,
                        compression=None,
                        ping_interval=None,
                        open_timeout=PATIENCE,
                        close_timeout=1,
                    )
                )
            parting = Parting()
            with suppress(ConnectionClosed):
                while not self._ended:
                    self._receive(json.loads(await socket.recv()), parting)
            if self._ended:
                return 0
            parting.code = socket.close_code
        self.partings.append(parting)
        return 0.2 if parting.reconnect_in is None else parting.reconnect_in

    def _receive(self, content: dict[str, Any], parting: Parting) -> None:
        match content:
            case {"ready": int(pid)}:
                self.nodes.append(pid)
            case {"type": "reconnect", "reconnect_in": int() | float() as wait}:
                parting.reconnect_in = wait
                parting.at = time.monotonic()
            case {"id": int(id_), "position": str(position), "data": {"number": int(number)}}:
                if id_ <= self._last_id:
                    self.repeats += 1
                    return
                self._last_id, self._position = id_, position
                self.numbers.append(number)
            case {"data": {"end": True}}:
                self._ended = True
            case _:
                raise AssertionError(f"unexpected: {content}")


class Publisher:
    """Sends numbers to all rooms, one after the other, all the time."""

    def __init__(self, layer: PostgresLayer) -> None:
        self._layer = layer
        self.rounds = 0

    async def run(self) -> None:
        while True:
            self.rounds += 1
            for room in range(ROOMS):
                await self._layer.send(f"room:{room}", {"number": self.rounds})
            await asyncio.sleep(0.2)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.run())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


@pytest.mark.timeout(300)
async def test_clients_of_a_node_that_ends(database_url: str, processes: Processes) -> None:
    """SIGTERM to one of two nodes, under load: everyone is sent to the other one, little by little,
    and has every message once."""
    shutdown = {"reconnect_within": WINDOW, "timeout": PATIENCE}
    nodes = [Node(processes, database_url, shutdown=shutdown) for _ in range(2)]
    for node in nodes:
        await node.started()
    leaving, staying = nodes
    settings = Settings.model_validate({**SETTINGS, "database_url": database_url})
    async with AsyncExitStack() as stack:
        layer = await stack.enter_async_context(PostgresLayer(settings))
        balancer = await stack.enter_async_context(Balancer([node.port for node in nodes]))
        connecting = asyncio.Semaphore(50)
        clients = [Client(number, balancer.port, connecting) for number in range(SOCKETS)]
        group = await stack.enter_async_context(asyncio.TaskGroup())
        for client in clients:
            group.create_task(client.run())
        publisher = Publisher(layer)
        async with publisher.running():
            await eventually(lambda: all(client.numbers for client in clients), timeout=PATIENCE)
            moving = [client for client in clients if client.nodes == [leaving.pid]]
            assert len(moving) >= SOCKETS // 3
            leaving.process.send_signal(signal.SIGTERM)
            code = await leaving.ended()
            await eventually(lambda: all(len(c.nodes) == 2 for c in moving), timeout=PATIENCE)
            back_at = time.monotonic()
            rounds = publisher.rounds
            await eventually(lambda: publisher.rounds > rounds + 3)
        # Half a round may have been under way.
        for room in range(ROOMS):
            await layer.send(f"room:{room}", {"end": True})
    assert code in (0, -signal.SIGTERM), leaving.output
    assert "Traceback" not in leaving.output + staying.output

    # Each was told when to come, and that the server is about to restart; nobody else was.
    assert {client.nodes[1] for client in moving} == {staying.pid}
    for client in clients:
        assert [parting.code for parting in client.partings] == [1012] * (client in moving)
        assert set(client.refusals) <= {503}
    told = [client.partings[0].reconnect_in for client in moving]
    waits = [wait for wait in told if wait is not None]
    assert len(waits) == len(moving)
    assert 0 <= min(waits) <= max(waits) <= WINDOW
    # A slot each: every fifth of the time has its fifth of them, but for what rounding moves.
    fifths = Counter(min(int(5 * wait / WINDOW), 4) for wait in waits)
    assert all(abs(fifths[fifth] - len(moving) / 5) <= 2 for fifth in range(5)), fifths
    # And so they came. They heard of it at slightly different times.
    first = min(client.partings[0].at for client in moving)
    came = Counter(int(5 * (client.attempts[1] - first) / WINDOW) for client in moving)
    assert all(came[fifth] >= len(moving) / 20 for fifth in range(5)), came
    assert back_at - first <= WINDOW + PATIENCE

    for client in clients:
        assert client.numbers == [*range(1, len(client.numbers) + 1)], client.room
        assert len(client.numbers) in (publisher.rounds, publisher.rounds - 1)
    # Whoever gives the position that it has is sent nothing twice.
    assert sum(client.repeats for client in clients) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_server_that_takes_its_time(
    database_url: str, processes: Processes, number: signal.Signals
) -> None:
    """New sockets are refused meanwhile; and who signals again does not want to wait."""
    node = Node(
        processes,
        database_url,
        shutdown={"timeout": 600},
        uvicorn={"timeout_graceful_shutdown": 1},
    )
    await node.started()
    async with (
        connect(node.url("/long"), proxy=None) as busy,
        connect(node.url("/rooms/room:0"), proxy=None) as other,
    ):
        for socket_ in (busy, other):
            assert json.loads(await socket_.recv()) == {"ready": node.pid}
        node.process.send_signal(number)
        farewell = json.loads(await other.recv())
        assert farewell["type"] == "reconnect"
        assert 0 <= farewell["reconnect_in"] <= 10
        await other.wait_closed()
        assert other.close_code == 1012
        # What serves the other one has not come to its end yet, and so the server has not.
        for _ in range(3):
            with pytest.raises(InvalidStatus) as refused:
                async with connect(node.url("/rooms/room:0"), proxy=None):
                    pass
            response = refused.value.response
            assert response.status_code == 503
            assert int(response.headers["Retry-After"]) >= 1
            assert json.loads(response.body)["detail"]["code"] == "draining"
        assert node.process.poll() is None
        node.process.send_signal(number)
        assert await node.ended() in (0, -number), node.output


async def test_a_client_that_does_not_read(database_url: str, processes: Processes) -> None:
    """It cannot keep a server from ending; the others hear what they are to hear."""
    node = Node(
        processes,
        database_url,
        shutdown={"timeout": 600},
        # What the manager would have it do is not what this is about.
        uvicorn={"timeout_graceful_shutdown": None, "ws_ping_interval": None},
        SNDBUF="16384",
    )
    await node.started()
    async with AsyncExitStack() as stack:
        layer = await stack.enter_async_context(PostgresLayer(database_url))
        deaf = socket.socket()
        stack.callback(deaf.close)
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(deaf, ("127.0.0.1", node.port))
        await loop.sock_sendall(
            deaf,
            b"GET /rooms/room:0?after=0 HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
            b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n",
        )
        other = await stack.enter_async_context(
            connect(node.url("/rooms/room:0?after=0"), proxy=None, max_queue=None)
        )
        assert json.loads(await other.recv()) == {"ready": node.pid}
        for n in range(100):
            await layer.send("room:0", {"number": n, "padding": "x" * 10_000})
        for n in range(100):
            assert json.loads(await other.recv())["data"]["number"] == n
        node.process.send_signal(signal.SIGTERM)
        assert json.loads(await other.recv())["type"] == "reconnect"
        assert await node.ended() in (0, -signal.SIGTERM)
