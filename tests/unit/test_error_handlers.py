"""Errors over HTTP, and functions with handlers of what they raise."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.testclient import WebSocketDenialResponse
from starlette.websockets import WebSocket

from pgchannels import (
    ChannelFull,
    ChannelLayerClosed,
    ConfigurationError,
    DatabaseError,
    DatabaseUnavailable,
    InvalidPayload,
    MemoryLayer,
    PGChannelsError,
)
from pgchannels.web import (
    AuthorizationError,
    Connection,
    ConnectionManager,
    JsonConsumer,
    RateLimitExceeded,
    SocketError,
    ahandle,
    exception_handlers,
    handle,
    install_error_handlers,
    lifespan,
    receives,
)

DSN = "postgresql://shop:s3cret@db.internal:5432/shop"
SECRETS = ("postgresql://", "s3cret", "db.internal", "select", "Traceback", "orders.py")


class InvalidOrder(SocketError):
    """There is no such article."""


def application(error: Exception, **options: Any) -> FastAPI:
    app = FastAPI(**options)

    @app.get("/orders")
    async def orders() -> None:
        raise error

    @app.websocket("/refused")
    async def refused(socket: WebSocket) -> None:
        raise error

    @app.websocket("/closed")
    async def closed(socket: WebSocket) -> None:
        await socket.accept()
        raise error

    return app


async def response_to(app: FastAPI) -> httpx2.Response:
    transport = httpx2.ASGITransport(app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.get("/orders")


def internal_error() -> DatabaseError:
    try:
        try:
            raise OSError(f"could not connect to {DSN}")
        except OSError as cause:
            raise DatabaseError(f"select * from orders failed at {DSN} in orders.py") from cause
    except DatabaseError as error:
        return error


class TestOverHTTP:
    @pytest.mark.parametrize("how", ["install", "argument"])
    async def test_an_error_is_answered_as_over_a_socket(self, how: str) -> None:
        error = RateLimitExceeded(retry_after=2.3, context={"limit": 5})
        if how == "install":
            app = application(error)
            install_error_handlers(app)
        else:
            app = application(error, exception_handlers=exception_handlers())
        response = await response_to(app)
        assert response.status_code == 429
        assert response.headers["retry-after"] == "3"
        assert response.json() == {
            "detail": {
                "type": "error",
                "code": "rate_limited",
                "detail": "too many messages; slow down",
                "category": "rate_limit",
                "retry_after": 2.3,
                "context": {"limit": 5},
            }
        }

    @pytest.mark.parametrize(
        ("error", "status", "code"),
        [
            (AuthorizationError(), 403, "forbidden"),
            (InvalidOrder("no such article"), 400, "error"),
            (InvalidPayload("the payload is nested too deep"), 422, "invalid_message"),
            (ChannelFull("jobs", 5), 429, "channel_full"),
            (DatabaseUnavailable(f"cannot reach {DSN}"), 503, "unavailable"),
            (ChannelLayerClosed(), 503, "draining"),
            (ConfigurationError(f"database_url={DSN} select"), 500, "internal_error"),
            (PGChannelsError(f"select {DSN}"), 500, "internal_error"),
            (internal_error(), 500, "internal_error"),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
    )
    async def test_statuses_and_codes(self, error: Exception, status: int, code: str) -> None:
        app = application(error)
        install_error_handlers(app)
        response = await response_to(app)
        assert response.status_code == status
        assert response.json()["detail"]["code"] == code
        told = response.text + str(response.headers)
        assert not any(secret in told for secret in SECRETS)

    async def test_the_log_has_what_the_client_has_the_id_of(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        app = application(internal_error())
        install_error_handlers(app)
        first, second = [(await response_to(app)).json()["detail"] for _ in range(2)]
        assert first["error_id"] != second["error_id"]
        found = {getattr(record, "error_id", None): record for record in caplog.records}
        record = found[first["error_id"]]
        assert first["error_id"] in record.getMessage()
        assert "s3cret" in caplog.text  # here it belongs

    async def test_what_is_the_clients_own_is_not_logged(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, "pgchannels")
        app = application(InvalidPayload("no"))
        install_error_handlers(app)
        await response_to(app)
        assert not [record for record in caplog.records if record.name.startswith("pgchannels")]

    async def test_other_exceptions_are_not_ours(self) -> None:
        app = application(KeyError("other"))
        install_error_handlers(app)
        with pytest.raises(KeyError):
            await response_to(app)


class TestOverASocket:
    def test_before_it_is_accepted_it_is_refused(self) -> None:
        app = application(AuthorizationError())
        install_error_handlers(app)
        with (
            pytest.raises(WebSocketDenialResponse) as raised,
            TestClient(app).websocket_connect("/refused"),
        ):
            pass
        assert raised.value.status_code == 403
        assert raised.value.json()["detail"]["code"] == "forbidden"

    def test_then_it_is_closed_with_the_code(self) -> None:
        app = application(internal_error())
        install_error_handlers(app)
        with TestClient(app).websocket_connect("/closed") as socket:
            closed = socket.receive()
        assert (closed["code"], closed["reason"]) == (1011, "internal_error")

    def test_what_a_manager_has_told_is_told_once(self, caplog: pytest.LogCaptureFixture) -> None:
        app = FastAPI()
        install_error_handlers(app)
        connections = ConnectionManager(MemoryLayer())

        @app.websocket("/ws")
        async def endpoint(socket: WebSocket) -> None:
            async with connections.layer, connections.connect(socket):
                raise internal_error()

        with TestClient(app).websocket_connect("/ws") as socket:
            error = socket.receive_json()
            assert socket.receive()["code"] == 1011
        ids = {record.error_id for record in caplog.records if hasattr(record, "error_id")}
        assert ids == {error["error_id"]}


def note(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


async def anote(error: Exception) -> str:
    await asyncio.sleep(0)
    return note(error)


class TestHandle:
    def test_what_the_function_returns(self) -> None:
        @handle(KeyError, note)
        def found(key: str, *, default: int = 0) -> int:
            """Says so."""
            return {"a": 1}[key] + default

        assert found("a", default=2) == 3
        assert found("b") == "KeyError: 'b'"
        assert (found.__name__, found.__doc__) == ("found", "Says so.")

    def test_subclasses_and_several_kinds(self) -> None:
        @handle((LookupError, ZeroDivisionError), note)
        def divide(numbers: list[int]) -> float:
            return numbers[0] / numbers[1]

        assert divide([1]) == "IndexError: list index out of range"
        assert divide([1, 0]) == "ZeroDivisionError: division by zero"

    def test_others_pass(self) -> None:
        @handle(KeyError, note)
        def fail() -> None:
            raise ValueError("other")

        with pytest.raises(ValueError, match="other"):
            fail()

    def test_a_handler_may_raise(self) -> None:
        def translate(error: KeyError) -> None:
            raise InvalidOrder("no such article") from error

        @handle(KeyError, translate)
        def fail() -> None:
            raise KeyError("a")

        with pytest.raises(InvalidOrder) as raised:
            fail()
        assert isinstance(raised.value.__cause__, KeyError)

    @pytest.mark.parametrize("decorate", [handle, ahandle])
    @pytest.mark.parametrize(
        "kinds",
        [
            BaseException,
            KeyboardInterrupt,
            asyncio.CancelledError,
            GeneratorExit,
            (KeyError, SystemExit),
            (),
            "KeyError",
            KeyError("a"),
            int,
        ],
    )
    def test_exceptions_only(self, decorate: Any, kinds: Any) -> None:
        with pytest.raises(ConfigurationError, match="Exception"):
            decorate(kinds, note)

    def test_what_cannot_be_decorated_or_called(self) -> None:
        async def coroutine() -> None: ...
        def function() -> None: ...
        def generator() -> Any:
            yield

        async def agenerator() -> AsyncIterator[None]:
            yield

        with pytest.raises(ConfigurationError, match="ahandle"):
            handle(KeyError, note)(coroutine)
        with pytest.raises(ConfigurationError, match="ahandle"):
            handle(KeyError, anote)
        with pytest.raises(ConfigurationError, match=r"use handle\(\)"):
            ahandle(KeyError, note)(function)  # type: ignore[arg-type]
        for made in (generator, agenerator):
            for decorate in (handle, ahandle):
                with pytest.raises(ConfigurationError, match="generator"):
                    decorate(KeyError, note)(made)  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match="cannot be called"):
            handle(KeyError, None)  # type: ignore[arg-type]


class TestAhandle:
    @pytest.mark.parametrize("handler", [note, anote])
    async def test_what_the_function_returns(self, handler: Any) -> None:
        @ahandle((KeyError, IndexError), handler)
        async def found(key: str) -> int:
            await asyncio.sleep(0)
            return {"a": 1}[key]

        assert await found("a") == 1
        assert await found("b") == "KeyError: 'b'"

    async def test_a_cancellation_is_none_of_its(self) -> None:
        handled: list[Exception] = []

        @ahandle(Exception, handled.append)
        async def wait() -> None:
            await asyncio.Event().wait()

        task = asyncio.create_task(wait())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not handled

    def test_in_a_consumer_the_error_has_its_connection(self) -> None:
        async def refuse(error: InvalidOrder) -> None:
            assert isinstance(error.connection, Orders)
            await error.connection.send_json({"refused": error.detail})

        class Orders(JsonConsumer):
            @receives("order.place")
            @ahandle(InvalidOrder, refuse)
            async def place(self, content: dict[str, Any]) -> None:
                if content["article"] != "tea":
                    raise InvalidOrder("there is tea only")
                await self.send_json({"placed": content["article"]})

        layer = MemoryLayer()
        app = FastAPI(lifespan=lifespan(layer))
        app.add_api_websocket_route("/ws", Orders.as_endpoint(layer))

        with TestClient(app) as client, client.websocket_connect("/ws") as socket:
            socket.send_json({"type": "order.place", "article": "coffee"})
            assert socket.receive_json() == {"refused": "there is tea only"}
            socket.send_json({"type": "order.place", "article": "tea"})
            assert socket.receive_json() == {"placed": "tea"}

    def test_in_a_function_too(self) -> None:
        async def refuse(error: InvalidOrder) -> None:
            assert error.connection is not None
            await error.connection.send_json({"refused": error.detail})

        @ahandle(InvalidOrder, refuse)
        async def place(article: str, *, connection: Connection) -> None:
            raise InvalidOrder(f"there is no {article}")

        layer = MemoryLayer()
        connections = ConnectionManager(layer)
        app = FastAPI(lifespan=lifespan(connections))

        @app.websocket("/ws")
        async def endpoint(socket: WebSocket) -> None:
            async with connections.connect(socket) as connection:
                async for content in connection:
                    await place(content, connection=connection)

        with TestClient(app) as client, client.websocket_connect("/ws") as socket:
            socket.send_json("coffee")
            assert socket.receive_json() == {"refused": "there is no coffee"}
