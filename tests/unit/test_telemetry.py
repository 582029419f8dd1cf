"""Traces: from who publishes, through the log, to sockets."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, suppress
from typing import Any

import pytest
from anyio import ClosedResourceError, EndOfStream
from fastapi import FastAPI
from fastapi.testclient import TestClient
from opentelemetry import trace
from opentelemetry.baggage import set_baggage
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.context import Context, attach, detach
from opentelemetry.propagators.textmap import TextMapPropagator
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from pgchannels import InvalidMessage, MemoryLayer, Message, PostgresLayer
from pgchannels.orm import install, publish, publishes
from pgchannels.telemetry import context_of, instrument, span_context_of, uninstrument
from pgchannels.web import (
    Connection,
    ConnectionManager,
    JsonConsumer,
    Middleware,
    handles,
    lifespan,
)
from pgchannels.web.tracing import Tracing


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def provider(exporter: InMemorySpanExporter) -> Iterator[TracerProvider]:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield provider
    provider.shutdown()


@pytest.fixture
def tracer(provider: TracerProvider) -> trace.Tracer:
    return provider.get_tracer("test")


@pytest.fixture(autouse=True)
def instrumented() -> Iterator[None]:
    instrument()
    yield
    uninstrument()


@asynccontextmanager
async def next_of(layer: MemoryLayer | PostgresLayer) -> AsyncIterator[asyncio.Future[Message]]:
    """The next message of any of the channels that are used here."""
    found: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
    async with layer.subscribe("room") as stream:
        yield found
        async with asyncio.timeout(10):
            found.set_result(await anext(stream))


async def published(layer: MemoryLayer, **options: Any) -> Message:
    async with next_of(layer) as found:
        await layer.send("room", {"n": 1}, **options)
    return await found


@pytest.fixture
async def layer() -> AsyncIterator[MemoryLayer]:
    async with MemoryLayer() as layer:
        yield layer


class TestPublishing:
    async def test_a_message_has_the_context_of_its_publisher(
        self, layer: MemoryLayer, tracer: trace.Tracer
    ) -> None:
        with tracer.start_as_current_span("request") as span:
            message = await published(layer, headers={"by": "ada"})
        context = span.get_span_context()
        assert message.headers["by"] == "ada"
        assert message.headers["traceparent"].split("-")[1:3] == [
            f"{context.trace_id:032x}",
            f"{context.span_id:016x}",
        ]
        found = span_context_of(message)
        assert found is not None
        assert (found.trace_id, found.span_id) == (context.trace_id, context.span_id)
        assert found.is_remote
        assert "traceparent" not in message.envelope

    async def test_the_state_of_a_trace_comes_too(self, layer: MemoryLayer) -> None:
        state = trace.TraceState([("vendor", "a:1"), ("other", "2")])
        context = trace.SpanContext(1, 2, is_remote=True, trace_state=state)
        with trace.use_span(trace.NonRecordingSpan(context)):
            message = await published(layer)
        assert message.headers["tracestate"] == "vendor=a:1,other=2"
        found = span_context_of(message)
        assert found is not None
        assert found.trace_state == state

    @pytest.mark.parametrize("how", ["group_send", "send_to", "send_to_user", "broadcast"])
    async def test_however_it_is_sent(
        self, layer: MemoryLayer, tracer: trace.Tracer, how: str
    ) -> None:
        name = await layer.new_channel("ws", user_id="7")
        async with layer.subscribe(member=name) as stream:
            await layer.group_add("room", name)
            with tracer.start_as_current_span("request"):
                match how:
                    case "group_send":
                        await layer.group_send("room", {}, exclude="other")
                    case "send_to":
                        await layer.send_to([name], {})
                    case "send_to_user":
                        await layer.send_to_user("7", {})
                    case "broadcast":
                        await layer.broadcast({"bytes": b"1"})
            async with asyncio.timeout(10):
                message = await anext(stream)
        assert span_context_of(message) is not None

    async def test_ephemeral_messages_too(self, layer: MemoryLayer, tracer: trace.Tracer) -> None:
        async with next_of(layer) as found:
            with tracer.start_as_current_span("request"):
                await layer.send_ephemeral("room", {})
        assert span_context_of(await found) is not None

    async def test_outside_of_a_span_nothing_is_added(self, layer: MemoryLayer) -> None:
        message = await published(layer)
        assert message.is_plain
        assert span_context_of(message) is None
        assert context_of(message) == Context()

    async def test_only_when_it_was_asked_for(
        self, layer: MemoryLayer, tracer: trace.Tracer
    ) -> None:
        uninstrument()
        with tracer.start_as_current_span("request"):
            assert (await published(layer)).is_plain

    async def test_what_the_publisher_says_holds(self, layer: MemoryLayer) -> None:
        own = {"traceparent": f"00-{1:032x}-{2:016x}-01"}
        # Its state would be one of another trace.
        state = trace.TraceState([("vendor", "a:1")])
        context = trace.SpanContext(3, 4, is_remote=True, trace_state=state)
        with trace.use_span(trace.NonRecordingSpan(context)):
            message = await published(layer, headers=own)
        assert message.headers == own

    @pytest.mark.parametrize("left", [0, 50, 200])
    async def test_headers_keep_their_bounds(
        self, layer: MemoryLayer, tracer: trace.Tracer, left: int
    ) -> None:
        own = {"x": "y" * (8192 - len('{"x":""}') - left)}
        with tracer.start_as_current_span("request"):
            message = await published(layer, headers=own)
            with pytest.raises(InvalidMessage, match="8192"):
                await layer.send("room", {}, headers={"x": own["x"] + "y" * (left + 1)})
        assert message.headers["x"] == own["x"]
        assert ("traceparent" in message.headers) == (left == 200)

    async def test_a_propagator_of_ones_own(self, layer: MemoryLayer, tracer: trace.Tracer) -> None:
        instrument(W3CBaggagePropagator())
        token = attach(set_baggage("shop", "tea"))
        try:
            message = await published(layer)
        finally:
            detach(token)
        assert message.headers == {"baggage": "shop=tea"}

    async def test_a_broken_propagator_breaks_nothing(
        self, layer: MemoryLayer, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Broken(W3CBaggagePropagator):
            def inject(self, *args: Any, **options: Any) -> None:
                raise RuntimeError("broken")

        instrument(Broken())
        for _ in range(3):
            assert (await published(layer)).is_plain
        assert len([r for r in caplog.records if r.levelno >= logging.ERROR]) == 1

    @pytest.mark.parametrize(
        "made",
        [
            {"pgchannels-except": "room"},
            {"trace": "\0"},
            {"trace": "ä"},
            {"trace": 1},
            {1: "trace"},
        ],
    )
    async def test_what_cannot_be_a_header_is_left_out(
        self, layer: MemoryLayer, made: dict[Any, Any]
    ) -> None:
        class Odd(W3CBaggagePropagator):
            def inject(self, carrier: Any, *args: Any, **options: Any) -> None:
                carrier.update(made)

        odd: TextMapPropagator = Odd()
        instrument(odd)
        assert (await published(layer)).is_plain

    def test_nothing_is_loaded_that_is_not_used(self) -> None:
        ours = {"pgchannels.telemetry", "pgchannels.web.tracing", "pgchannels.web.metrics"}
        for imported, others in (
            ("pgchannels, pgchannels.orm", {"opentelemetry", "prometheus_client"}),
            (
                "pgchannels.web",
                {"prometheus_client"},
            ),  # FastAPI loads the other one
        ):
            code = f"import sys, {imported}; print(*sys.modules)"
            run = subprocess.run(
                [sys.executable, "-c", code], check=True, capture_output=True, text=True
            )
            assert not (ours | others) & set(run.stdout.split())


class TestSessions:
    async def test_what_they_publish_has_the_context(
        self, database_url: str, tracer: trace.Tracer
    ) -> None:
        class Base(DeclarativeBase):
            pass

        @publishes("room")
        class Order(Base):
            __tablename__ = "orders"
            id: Mapped[int] = mapped_column(primary_key=True)

        url = database_url.replace("postgresql:", "postgresql+asyncpg:", 1)
        engine = create_async_engine(url)
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)

        class Session(AsyncSession):
            sync_session_class = sessionmaker().class_

        async with PostgresLayer(database_url) as layer:
            install(Session, layer)
            async with layer.subscribe("room") as stream:
                with tracer.start_as_current_span("request") as span:
                    async with Session(engine) as session, session.begin():
                        publish(session, "room", {"type": "placed"})
                        session.add(Order(id=1))
                async with asyncio.timeout(10):
                    messages = [await anext(stream) for _ in range(2)]
        await engine.dispose()
        assert {message["type"] for message in messages} == {"placed", "orders.inserted"}
        for message in messages:
            found = span_context_of(message)
            assert found is not None
            assert found.span_id == span.get_span_context().span_id


class Room(JsonConsumer):
    """Handles some messages, and forwards others."""

    async def connect(self) -> None:
        await self.accept()
        await self.join("room")

    @handles("answered")
    async def answered(self, message: Message) -> None:
        # What it publishes is a part of the same trace.
        await self.layer.send("answers", {"type": "answer"})
        await self.send_json({"handled": True})

    @handles("failing")
    async def failing(self, message: Message) -> None:
        raise RuntimeError("secret")


class TestSockets:
    @pytest.fixture
    def tracing(self, provider: TracerProvider) -> Tracing:
        return Tracing(tracer_provider=provider)

    @contextmanager
    def serving(
        self, middleware: Middleware, tracer: trace.Tracer
    ) -> Iterator[tuple[TestClient, Any]]:
        layer = MemoryLayer()
        connections = ConnectionManager(layer, middleware=middleware)
        app = FastAPI(lifespan=lifespan(connections))
        app.add_api_websocket_route("/ws", Room.as_endpoint())

        @app.post("/send/{kind}")
        async def send(kind: str, traced: bool = True) -> None:
            if not traced:
                await layer.send("room", {"type": kind})
                return
            with tracer.start_as_current_span("request"):
                await layer.send("room", {"type": kind})

        @app.get("/answers")
        async def answers() -> list[str | None]:
            page = await layer.history("answers", after="0")
            return [message.headers.get("traceparent") for message in page.messages]

        with TestClient(app) as client, client.websocket_connect("/ws") as socket:
            yield client, socket

    @staticmethod
    def spans(exporter: InMemorySpanExporter) -> tuple[ReadableSpan, ReadableSpan]:
        (request,) = (s for s in exporter.get_finished_spans() if s.name == "request")
        (deliver,) = (s for s in exporter.get_finished_spans() if s.name == "deliver")
        return request, deliver

    def test_a_forwarded_message_is_a_span_linked_to_the_publishers(
        self, exporter: InMemorySpanExporter, tracing: Tracing, tracer: trace.Tracer
    ) -> None:
        with self.serving(tracing, tracer) as (client, socket):
            client.post("/send/said")
            envelope = socket.receive_json()
        request, deliver = self.spans(exporter)
        assert deliver.kind is SpanKind.CONSUMER
        assert [link.context.span_id for link in deliver.links] == [request.context.span_id]
        assert deliver.context.trace_id != request.context.trace_id
        assert deliver.attributes is not None
        assert deliver.attributes["messaging.destination.name"] == "room"
        assert deliver.attributes["messaging.message.id"] == envelope["position"]
        assert deliver.status.status_code is StatusCode.UNSET

    def test_or_its_child(
        self, exporter: InMemorySpanExporter, provider: TracerProvider, tracer: trace.Tracer
    ) -> None:
        tracing = Tracing(tracer_provider=provider, as_child=True)
        with self.serving(tracing, tracer) as (client, socket):
            client.post("/send/said")
            socket.receive_json()
        request, deliver = self.spans(exporter)
        assert deliver.parent is not None
        assert deliver.parent.span_id == request.context.span_id
        assert not deliver.links

    def test_what_a_handler_publishes_goes_on_from_its_span(
        self, exporter: InMemorySpanExporter, tracing: Tracing, tracer: trace.Tracer
    ) -> None:
        with self.serving(tracing, tracer) as (client, socket):
            client.post("/send/answered")
            assert socket.receive_json() == {"handled": True}
            (parent,) = client.get("/answers").json()
        _, deliver = self.spans(exporter)
        assert parent.split("-")[2] == f"{deliver.context.span_id:016x}"

    def test_a_failure_is_the_spans(
        self, exporter: InMemorySpanExporter, tracing: Tracing, tracer: trace.Tracer
    ) -> None:
        def fail() -> None:
            with self.serving(tracing, tracer) as (client, socket):
                client.post("/send/failing")
                with suppress(ClosedResourceError, EndOfStream):
                    while True:  # until the test's client raises what the application has raised
                        socket.receive()

        with pytest.raises(RuntimeError, match="secret"):
            fail()
        _, deliver = self.spans(exporter)
        assert deliver.status.status_code is StatusCode.ERROR
        assert deliver.status.description == "RuntimeError"
        assert [event.name for event in deliver.events] == ["exception"]

    def test_other_messages_get_no_span(
        self, exporter: InMemorySpanExporter, tracing: Tracing, tracer: trace.Tracer
    ) -> None:
        with self.serving(tracing, tracer) as (client, socket):
            client.post("/send/said?traced=false")
            socket.receive_json()
        assert not exporter.get_finished_spans()

    def test_in_a_chain_all_are_around(
        self, exporter: InMemorySpanExporter, tracing: Tracing, tracer: trace.Tracer
    ) -> None:
        order = []

        class Around(Middleware):
            def __init__(self, name: str) -> None:
                self.name = name

            def delivering(
                self, connection: Connection, message: Message
            ) -> AbstractContextManager[object]:
                return self.noted()

            @contextmanager
            def noted(self) -> Iterator[None]:
                order.append(f"{self.name} begins")
                yield
                order.append(f"{self.name} ends")

        chain = Middleware() >> Around("a") >> tracing >> Around("b")
        with self.serving(chain, tracer) as (client, socket):
            client.post("/send/said")
            socket.receive_json()
        assert order == ["a begins", "b begins", "b ends", "a ends"]
        self.spans(exporter)
