"""From which sites' pages sockets are opened: directly, and through proxies that rewrite names."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fastapi import FastAPI, WebSocket
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus
from websockets.typing import Origin

from pgchannels import MemoryLayer
from pgchannels.web import (
    Authentication,
    ConnectionManager,
    CookieToken,
    HeaderToken,
    Identity,
    JsonConsumer,
    Origins,
    lifespan,
)
from pgchannels.web.auth import origins as origins_module
from tests.integration.test_connections import refused
from tests.support.sockets import answer, serve


class Greeting(JsonConsumer):
    async def connect(self) -> None:
        await self.accept()
        await self.send_json({"ready": True})


async def verify(token: str) -> Identity:
    return Identity(token)


def application(connections: ConnectionManager, layer: MemoryLayer) -> FastAPI:
    """One socket for each way to be served."""
    app = FastAPI(lifespan=lifespan(layer))
    app.add_api_websocket_route("/manager", Greeting.as_endpoint(connections))
    app.add_api_websocket_route("/layer", Greeting.as_endpoint(layer))
    app.add_api_websocket_route("/lifespan", Greeting.as_endpoint())

    @app.websocket("/function")
    async def function(socket: WebSocket) -> None:
        async with connections.connect(socket) as connection:
            await connection.send_json({"ready": True})

    return app


async def opens(url: str, **options: Any) -> bool:
    """Whether a socket is opened; False if its origin is why not."""
    try:
        async with connect(url, **options) as socket:
            return bool(await answer(socket) == {"ready": True})
    except InvalidStatus:
        status, error = await refused(connect(url, **options))
        assert (status, error["code"]) == (403, "origin")
        return False


@asynccontextmanager
async def proxy(upstream: str, host: str | None = None, *more: str) -> AsyncIterator[str]:
    """A proxy that sends its upstream the header ``Host: {host}`` in place of its client's.

    Args:
        upstream: host and port.
        host: None to pass on what the client has sent.
        more: further lines of the head.
    """
    name, port = upstream.split(":")
    tasks: set[asyncio.Task[None]] = set()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        lines = head.removesuffix("\r\n\r\n").split("\r\n")
        if host is not None:
            lines = [line for line in lines if not line.lower().startswith("host:")]
            lines.append(f"Host: {host}")
        above, below = await asyncio.open_connection(name, int(port))
        below.write("\r\n".join([*lines, *more, "", ""]).encode())
        await asyncio.gather(copy(above, writer), copy(reader, below))

    async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class TestByDefault:
    @pytest.mark.parametrize("path", ["manager", "layer", "lifespan", "function"])
    async def test_pages_of_other_sites_open_no_socket(self, path: str) -> None:
        """The application may know its users by a cookie that nothing here knows of."""
        layer = MemoryLayer()
        async with serve(application(ConnectionManager(layer), layer)) as address:
            url = f"ws://{address}/{path}"
            cookie = {"Cookie": "session=ada"}
            port = int(address.split(":")[1])
            for origin in ("https://evil.example", f"http://127.0.0.1:{port + 1}", "null"):
                assert not await opens(url, origin=origin, additional_headers=cookie)
            assert await opens(url, origin=f"http://{address}", additional_headers=cookie)
            # A program that is no browser.
            assert await opens(url, additional_headers=cookie)

    async def test_listed_and_all_origins(self) -> None:
        layer = MemoryLayer()
        for origins in (Origins("https://shop.example"), Origins("*")):
            connections = ConnectionManager(layer, origins=origins)
            async with serve(application(connections, layer)) as address:
                url = f"ws://{address}/manager"
                assert await opens(url, origin="https://shop.example")
                assert await opens(url, origin="https://other.example") is origins.any

    def test_the_origins_of_the_authentication_are_those_of_its_manager(self) -> None:
        layer, shop = MemoryLayer(), Origins("https://shop.example")
        for source in (CookieToken("session"), HeaderToken()):
            authentication = Authentication(verify, source, origins=shop)
            assert ConnectionManager(layer, authentication=authentication).origins is shop
            other = Origins("https://other.example")
            connections = ConnectionManager(layer, authentication=authentication, origins=other)
            assert connections.origins is other


class TestBehindAProxy:
    @pytest.mark.parametrize("scheme", ["http", "https"])
    async def test_the_host_is_passed_on(self, scheme: str) -> None:
        """The encryption ends at the proxy: here both schemes are possible."""
        layer = MemoryLayer()
        async with (
            serve(application(ConnectionManager(layer), layer)) as address,
            proxy(address, "shop.example") as front,
        ):
            url = f"ws://{front}/manager"
            assert await opens(url, origin=f"{scheme}://shop.example")
            for origin in (f"{scheme}://evil.example", f"{scheme}://shop.example:8443"):
                assert not await opens(url, origin=origin)

    async def test_the_server_knows_that_the_page_was_encrypted(self) -> None:
        """uvicorn takes the scheme from a proxy that it trusts; http://shop.example is not ours."""
        layer = MemoryLayer()
        async with (
            serve(application(ConnectionManager(layer), layer)) as address,
            proxy(address, "shop.example", "X-Forwarded-Proto: https") as front,
        ):
            assert await opens(f"ws://{front}/manager", origin="https://shop.example")
            assert not await opens(f"ws://{front}/manager", origin="http://shop.example")

    async def test_the_host_is_the_upstreams(self, caplog: pytest.LogCaptureFixture) -> None:
        """It is refused, and the log names both origins; listing the page's allows it."""
        layer = MemoryLayer()
        for origins, is_allowed in ((Origins(), False), (Origins("https://shop.example"), True)):
            connections = ConnectionManager(layer, origins=origins)
            async with (
                serve(application(connections, layer)) as address,
                # Another header for the name is a client's word as much as the proxy's.
                proxy(address, "upstream:8000", "X-Forwarded-Host: shop.example") as front,
            ):
                url = f"ws://{front}/manager"
                with caplog.at_level(logging.WARNING, "pgchannels.web"):
                    for _ in range(2):
                        assert await opens(url, origin="https://shop.example") is is_allowed
        (warning,) = [each for each in caplog.messages if "may not connect" in each]
        for part in ("'https://shop.example'", "'http://upstream:8000'", "origins=", "header Host"):
            assert part in warning

    async def test_the_client_does_not_learn_the_upstreams_name(self) -> None:
        layer = MemoryLayer()
        async with (
            serve(application(ConnectionManager(layer), layer)) as address,
            proxy(address, "upstream:8000") as front,
        ):
            _, error = await refused(
                connect(f"ws://{front}/layer", origin=Origin("https://shop.example"))
            )
            assert "upstream" not in str(error)


async def test_strangers_cannot_fill_the_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(origins_module, "MAX_WARNINGS", 3)
    layer = MemoryLayer()
    async with serve(application(ConnectionManager(layer), layer)) as address:
        with caplog.at_level(logging.WARNING, "pgchannels.web"):
            for number in range(5):
                assert not await opens(
                    f"ws://{address}/manager", origin=f"https://{number}.example"
                )
    assert len([each for each in caplog.messages if "may not connect" in each]) == 3
