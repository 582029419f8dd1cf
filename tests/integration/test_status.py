"""Status and health, through the API, in all the states that a process can be in."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
from fastapi import Depends, FastAPI, HTTPException, Request
from starlette.websockets import WebSocket
from websockets.asyncio.client import connect

from pgchannels import ConfigurationError, MemoryLayer, PostgresLayer
from pgchannels.memory import MemoryLog
from pgchannels.web import ConnectionManager, status_router
from pgchannels.web.health import Health
from tests.support.eventually import eventually
from tests.support.sockets import answer, serve
from tests.support.tcp_proxy import TcpProxy


@pytest.fixture
async def memory() -> AsyncIterator[ConnectionManager]:
    async with MemoryLayer() as layer:
        yield ConnectionManager(layer)


def application(connections: ConnectionManager, **options: Any) -> FastAPI:
    app = FastAPI()
    app.include_router(connections.status_router(**{"public": True, **options}))

    @app.websocket("/ws")
    async def endpoint(socket: WebSocket, user: str | None = None) -> None:
        async with connections.connect(socket, user_id=user) as connection:
            async for content in connection:
                await connection.send_json(content)

    return app


def client(app: FastAPI) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(
        transport=httpx2.ASGITransport(app), base_url="http://test", timeout=60
    )


async def ready(app: FastAPI) -> tuple[int, list[str]]:
    async with client(app) as http:
        response = await http.get("/health/ready")
    body = response.json()
    assert body["status"] == ("ready" if response.status_code == 200 else "not ready")
    assert response.headers["cache-control"] == "no-store"
    return response.status_code, body["problems"]


class TestStatus:
    async def test_what_this_process_has_counted(self, memory: ConnectionManager) -> None:
        app = application(memory)
        async with serve(app) as address:
            async with (
                connect(f"ws://{address}/ws?user=ada") as ada,
                connect(f"ws://{address}/ws?user=ada"),
            ):
                await ada.send('{"n": 1}')
                await answer(ada)
                async with client(app) as http:
                    status = (await http.get("/status")).json()
            await eventually(lambda: len(memory) == 0)
            async with client(app) as http:
                after = (await http.get("/status")).json()
        assert status == {
            "connections": 2,
            "users": 1,
            "pending": 0,
            "is_draining": False,
            "is_listening": True,
            "opened": 2,
            "closed": {},
            "refused": {},
            "errors": {},
            "messages_in": 1,
            "bytes_in": 8,
            "messages_out": 1,
            "bytes_out": 7,
        }
        assert (after["connections"], after["closed"]) == (0, {"1000": 2})

    async def test_bytes_are_those_of_utf_8(self, memory: ConnectionManager) -> None:
        async with serve(application(memory)) as address:
            async with connect(f"ws://{address}/ws") as socket:
                for text in ('"ü€😀"', '"abc"'):
                    await socket.send(text)
                    await answer(socket)
                (connection,) = memory
                size = len('"ü€😀""abc"'.encode())
                assert (connection.bytes_in, connection.bytes_out) == (size, size)
            await eventually(lambda: len(memory) == 0)
        counted = memory.statistics()
        assert (counted.bytes_in, counted.bytes_out) == (size, size)

    async def test_all_nodes_together(self) -> None:
        log = MemoryLog()
        async with MemoryLayer(log=log) as here, MemoryLayer(log=log) as there:
            apps = [application(ConnectionManager(layer)) for layer in (here, there)]
            async with (
                serve(apps[0]) as first,
                serve(apps[1]) as second,
                connect(f"ws://{first}/ws") as one,
                connect(f"ws://{second}/ws") as two,
                connect(f"ws://{second}/ws") as three,
            ):
                for socket in (one, two, three):
                    await socket.send("[1]")
                    await answer(socket)
                async with client(apps[0]) as http:
                    status = (await http.get("/status?cluster=true")).json()
        assert (status["connections"], status["cluster"]) == (1, {"connections": 3})

    async def test_somebody_has_to_say_who_may_see_it(self, memory: ConnectionManager) -> None:
        with pytest.raises(ConfigurationError, match="public=True"):
            memory.status_router()

        def admin(request: Request) -> None:
            if request.headers.get("authorization") != "admin":
                raise HTTPException(401)

        with pytest.raises(ConfigurationError, match="public=True"):
            status_router(memory, dependencies=[Depends(admin)], public=True)
        app = application(memory, public=False, dependencies=[Depends(admin)])
        async with client(app) as http:
            assert (await http.get("/status")).status_code == 401
            assert (await http.get("/status?cluster=true")).status_code == 401
            headers = {"authorization": "admin"}
            assert (await http.get("/status", headers=headers)).status_code == 200
            # A load balancer has no token.
            assert (await http.get("/health/live")).json() == {"status": "alive"}
            assert (await http.get("/health/ready")).status_code == 200

    async def test_a_guard_that_returns_false_refuses(self, memory: ConnectionManager) -> None:
        """FastAPI looks at no result: the same function as for admin_router() would let all in."""

        def is_admin(request: Request) -> bool:
            return request.headers.get("authorization") == "admin"

        app = application(memory, public=False, dependencies=[Depends(is_admin)])
        async with client(app) as http:
            assert (await http.get("/status")).status_code == 403
            headers = {"authorization": "admin"}
            assert (await http.get("/status", headers=headers)).status_code == 200

    async def test_clients_do_not_choose_how_long_it_is(self, memory: ConnectionManager) -> None:
        """They may close with any of two thousand codes."""
        memory._counts.closed.update([1000, 1008, *range(3000, 5000), 65535])
        async with client(application(memory)) as http:
            closed = (await http.get("/status")).json()["closed"]
        assert len(closed) < 10
        assert sum(closed.values()) == 2003
        assert (closed["1000"], closed["4xxx"], closed["other"]) == (1, 1000, 1)

    async def test_the_database_is_away(self, database_url: str) -> None:
        async with TcpProxy(database_url) as proxy, PostgresLayer(proxy.url) as layer:
            await proxy.cut(refuse=True)
            async with client(application(ConnectionManager(layer))) as http:
                response = await http.get("/status?cluster=true")
                assert (await http.get("/status")).status_code == 200
        assert response.status_code == 503
        assert response.json()["detail"]["code"] == "unavailable"


class TestReady:
    async def test_a_process_in_memory(self, memory: ConnectionManager) -> None:
        assert await ready(application(memory)) == (200, [])

    async def test_on_postgresql(self, database_url: str) -> None:
        async with PostgresLayer(database_url) as layer:
            await eventually(lambda: layer.is_listening, timeout=30)
            assert await ready(application(ConnectionManager(layer), grace=0)) == (200, [])

    async def test_while_it_shuts_down(self, memory: ConnectionManager) -> None:
        await memory.drain()
        assert await ready(application(memory)) == (503, ["draining"])

    async def test_without_its_layer(self, database_url: str) -> None:
        for layer in (MemoryLayer(), PostgresLayer(database_url)):
            app = application(ConnectionManager(layer), grace=0)
            assert await ready(app) == (503, ["closed"])

    @pytest.mark.parametrize("how", ["refuse", "stall"])
    async def test_without_its_database(
        self, database_url: str, how: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with TcpProxy(database_url) as proxy, PostgresLayer(proxy.url) as layer:
            # Its patience is of no matter here; that it has one is.
            app = application(ConnectionManager(layer), timeout=0.5, grace=3600)
            if how == "refuse":
                await proxy.cut(refuse=True)
            else:
                proxy.stall()
            assert await ready(app) == (503, ["database"])
            async with client(app) as http:
                assert (await http.get("/health/live")).status_code == 200
            assert "the database does not answer" in caplog.text
            proxy.resume()

            async def is_ready() -> Any:
                return (await ready(app)) == (200, [])

            await eventually(is_ready, timeout=60)

    async def test_a_database_that_never_answers(self) -> None:
        class Silent(MemoryLayer):
            async def _count_connections(self, user_id: str | None) -> int:
                await asyncio.Event().wait()
                raise AssertionError

        async with Silent() as layer, asyncio.timeout(60):
            health = Health(ConnectionManager(layer), timeout=0.01)
            assert await health.problems() == ["database"]

    async def test_while_nothing_is_heard(self, database_url: str) -> None:
        async with PostgresLayer(database_url) as layer:
            await eventually(lambda: layer.is_listening, timeout=30)
            now = 0.0
            health = Health(ConnectionManager(layer), grace=10, clock=lambda: now)
            listener = layer._opened.listener
            assert await health.problems() == []
            listener.healthy = False
            assert await health.problems() == []
            now = 9.9
            assert await health.problems() == []
            now = 10
            assert await health.problems() == ["listener"]
            listener.healthy = True
            assert await health.problems() == []
            listener.healthy = False  # anew
            now = 15
            assert await health.problems() == []

    async def test_the_database_is_asked_once_a_second_at_most(self) -> None:
        asked = 0

        class Counting(MemoryLayer):
            async def _count_connections(self, user_id: str | None) -> int:
                nonlocal asked
                asked += 1
                await asyncio.sleep(0)
                return await super()._count_connections(user_id)

        async with Counting() as layer:
            now = 100.0
            health = Health(ConnectionManager(layer), clock=lambda: now)
            await asyncio.gather(*(health.problems() for _ in range(50)))
            assert asked == 1
            now = 100.9
            await health.problems()
            assert asked == 1
            now = 101
            await asyncio.gather(*(health.problems() for _ in range(50)))
            assert asked == 2

    async def test_what_it_says_has_nothing_of_the_error_in_it(
        self, database_url: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.CRITICAL)
        async with TcpProxy(database_url) as proxy, PostgresLayer(proxy.url) as layer:
            await proxy.cut(refuse=True)
            async with client(application(ConnectionManager(layer), grace=3600)) as http:
                response = await http.get("/health/ready")
        assert response.json() == {"status": "not ready", "problems": ["database"]}

    @pytest.mark.parametrize(
        "options",
        [{"grace": -1}, {"timeout": 0}, {"grace": float("nan")}, {"timeout": float("nan")}],
    )
    def test_numbers_out_of_range(
        self, memory: ConnectionManager, options: dict[str, float]
    ) -> None:
        with pytest.raises(ConfigurationError):
            memory.status_router(public=True, **options)
