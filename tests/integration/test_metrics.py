"""Metrics, as Prometheus reads them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from functools import partial
from typing import Any

import httpx2
import pytest
from fastapi import Depends, FastAPI, HTTPException
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families
from starlette.websockets import WebSocket
from websockets.asyncio.client import connect

from pgchannels import ConfigurationError, MemoryLayer, PostgresLayer
from pgchannels.web import ConnectionManager, SocketError
from pgchannels.web.metrics import ConnectionsCollector, metrics_router
from pgchannels.web.statistics import Counts
from tests.support.eventually import eventually
from tests.support.sockets import answer, closed, serve
from tests.support.tcp_proxy import TcpProxy


@pytest.fixture
async def connections() -> AsyncIterator[ConnectionManager]:
    async with MemoryLayer() as layer:
        yield ConnectionManager(layer)


def application(connections: ConnectionManager, **options: Any) -> FastAPI:
    app = FastAPI()
    app.include_router(connections.metrics_router(**{"public": True, **options}))

    @app.websocket("/ws")
    async def endpoint(socket: WebSocket, user: str | None = None) -> None:
        async with connections.connect(socket, user_id=user) as connection:
            await connection.join("room")
            async for content in connection:
                if content == "fail":
                    raise SocketError(code="odd_order")
                await connection.send_json(content)

    return app


def client(app: FastAPI) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test")


def samples(families: Iterable[Metric]) -> dict[str, float]:
    """Values by names with labels: ``name{code="1000"}``."""
    found = {}
    for family in families:
        assert family.documentation
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sample.labels.items())
            key = f"{sample.name}{{{labels}}}" if labels else sample.name
            assert key not in found
            found[key] = sample.value
    return found


async def scrape(app: FastAPI) -> dict[str, float]:
    async with client(app) as http:
        response = await http.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    return samples(text_string_to_metric_families(response.text))


class TestConnections:
    async def test_of_a_process_that_has_just_begun(self, connections: ConnectionManager) -> None:
        assert await scrape(application(connections)) == {
            "pgchannels_connections": 0,
            "pgchannels_users": 0,
            "pgchannels_pending_messages": 0,
            "pgchannels_draining": 0,
            "pgchannels_listening": 1,
            "pgchannels_connections_opened_total": 0,
            "pgchannels_received_frames_total": 0,
            "pgchannels_received_bytes_total": 0,
            "pgchannels_sent_frames_total": 0,
            "pgchannels_sent_bytes_total": 0,
        }

    async def test_what_happened_is_counted(self, connections: ConnectionManager) -> None:
        app = application(connections)
        async with serve(app) as address:
            async with (
                connect(f"ws://{address}/ws?user=ada") as ada,
                connect(f"ws://{address}/ws?user=ada"),
                connect(f"ws://{address}/ws") as bob,
            ):
                await ada.send('"hello"')
                assert await answer(ada) == "hello"
                await bob.send('"fail"')
                assert (await answer(bob))["code"] == "odd_order"
                assert await closed(bob) == 1008
                await eventually(lambda: len(connections) == 2)
                now = await scrape(app)
            await eventually(lambda: len(connections) == 0)
            after = await scrape(app)
        assert now["pgchannels_connections"] == 2
        assert now["pgchannels_users"] == 1
        assert now["pgchannels_connections_opened_total"] == 3
        assert now['pgchannels_connections_closed_total{code="1008"}'] == 1
        assert now['pgchannels_errors_total{code="odd_order"}'] == 1
        assert now["pgchannels_received_frames_total"] == 2
        assert now["pgchannels_received_bytes_total"] == len('"hello""fail"')
        assert now["pgchannels_sent_bytes_total"] >= len('"hello"')
        assert after["pgchannels_connections"] == 0
        assert after['pgchannels_connections_closed_total{code="1000"}'] == 2
        assert after["pgchannels_received_frames_total"] == 2

    async def test_refusals(self, connections: ConnectionManager) -> None:
        app = application(connections)
        connections.is_draining = True
        async with serve(app) as address:
            with pytest.raises(Exception, match="503"):
                await connect(f"ws://{address}/ws")
            found = await scrape(app)
        assert found["pgchannels_draining"] == 1
        assert found['pgchannels_connections_refused_total{code="draining"}'] == 1

    async def test_the_listener(self, database_url: str) -> None:
        async with TcpProxy(database_url) as proxy, PostgresLayer(proxy.url) as layer:
            app = application(ConnectionManager(layer))

            async def listening(value: int) -> Any:
                return (await scrape(app))["pgchannels_listening"] == value

            await eventually(partial(listening, 1), timeout=30)
            await proxy.cut(refuse=True)
            await eventually(partial(listening, 0), timeout=30)


class TestLabels:
    def test_clients_cannot_make_any_number_of_them(self, connections: ConnectionManager) -> None:
        counts = Counts()
        counts.closed.update([*range(5000), 4000, 65535])
        counts.errors.update(f"code_{n}" for n in range(1000))
        connections._counts = counts
        registry = CollectorRegistry()
        registry.register(ConnectionsCollector(connections))
        first = samples(text_string_to_metric_families(generate_latest(registry).decode()))
        closed_by = {k: v for k, v in first.items() if "connections_closed" in k}
        assert len(closed_by) < 30
        assert sum(closed_by.values()) == 5002
        assert closed_by['pgchannels_connections_closed_total{code="4xxx"}'] == 1001
        assert closed_by['pgchannels_connections_closed_total{code="3000"}'] == 1
        errors = {k: v for k, v in first.items() if "errors" in k}
        assert len(errors) == 101
        assert errors['pgchannels_errors_total{code="other"}'] == 900
        # Counters never go down, whatever comes after.
        counts.errors.update(f"code_{n}" for n in range(900, 2000))
        second = samples(text_string_to_metric_families(generate_latest(registry).decode()))
        assert all(second[key] >= value for key, value in first.items())


class TestRouter:
    async def test_openmetrics_for_who_asks_for_it(self, connections: ConnectionManager) -> None:
        async with client(application(connections)) as http:
            accept = {"accept": "application/openmetrics-text; version=1.0.0"}
            response = await http.get("/metrics", headers=accept)
        assert response.headers["content-type"].startswith("application/openmetrics-text")
        families = parse_openmetrics(response.text)  # type: ignore[no-untyped-call]
        found = samples(families)
        assert found["pgchannels_connections_opened_total"] == 0

    async def test_a_registry_of_ones_own(self, connections: ConnectionManager) -> None:
        registry = CollectorRegistry()
        Counter("orders", "Orders.", registry=registry).inc()
        found = await scrape(application(connections, registry=registry))
        assert (found["orders_total"], found["pgchannels_connections"]) == (1, 0)

    async def test_somebody_has_to_say_who_may_see_it(self, connections: ConnectionManager) -> None:
        with pytest.raises(ConfigurationError, match="public=True"):
            connections.metrics_router()

        def nobody() -> None:
            raise HTTPException(403)

        with pytest.raises(ConfigurationError, match="public=True"):
            metrics_router(connections, dependencies=[Depends(nobody)], public=True)
        app = application(connections, public=False, dependencies=[Depends(nobody)])
        async with client(app) as http:
            assert (await http.get("/metrics")).status_code == 403


class TestFollowers:
    async def test_how_far_they_lag_behind(self, database_url: str) -> None:
        async with PostgresLayer(database_url) as layer:
            async with layer.follow("orders", name="billing", after="0"):
                for n in range(3):
                    await layer.send("orders", {"n": n})
                assert (await layer.followers())[0].name == "billing"

                async def lag() -> Any:
                    # A new router each time: one asks every ten seconds.
                    found = await scrape(application(ConnectionManager(layer), followers=True))
                    key = 'pgchannels_follower_lag_messages{follower="billing"}'
                    return found if found.get(key) == 3 else None

                found: dict[str, float] = await eventually(lag)
                assert found['pgchannels_follower_active{follower="billing"}'] == 1
            plain = await scrape(application(ConnectionManager(layer)))
        assert not any("follower" in key for key in plain)

    async def test_the_database_is_away(self, database_url: str) -> None:
        async with TcpProxy(database_url) as proxy, PostgresLayer(proxy.url) as layer:
            await proxy.cut(refuse=True)
            found = await scrape(application(ConnectionManager(layer), followers=True))
        assert found["pgchannels_connections"] == 0
        assert not any("follower" in key for key in found)
