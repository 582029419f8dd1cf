"""Whatever clients send: no exception leaves the application, no task dies, nobody is left deaf."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Literal

from fastapi import FastAPI
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from starlette.websockets import WebSocket

from pgchannels import InvalidMessage, InvalidPosition, MemoryLayer, Settings
from pgchannels.control import Command
from pgchannels.messages import Position
from pgchannels.web import (
    Authentication,
    AuthenticationError,
    BytesConsumer,
    Capabilities,
    Connection,
    ConnectionManager,
    CookieToken,
    FirstMessageToken,
    HeaderToken,
    Heartbeat,
    Identity,
    JsonConsumer,
    Limits,
    Logging,
    QueryToken,
    RateLimit,
    SubprotocolToken,
    TokenBucket,
    Validation,
    receives,
)
from tests.support.asgi import Socket

# What one example may take, on a machine that is busy with others.
PATIENCE = 30.0

TOKENS = ("good", "better", "another's")


async def verify(token: str) -> Identity:
    if token not in TOKENS:
        raise AuthenticationError(code="invalid_token")
    user = "eve" if token == "another's" else "ada"
    return Identity(user, capabilities={"room:*": ["subscribe", "publish", "history"]})


# Applications: each does what its client says, by fields that may be anything.


async def do(connection: Connection, content: Any) -> None:
    field: Callable[[str], Any] = content.get if isinstance(content, dict) else (lambda name: None)
    match content:
        case {"type": "subscribe", "channel": channel}:
            await connection.join(channel, after=field("after"))
        case {"type": "add", "channel": channel}:
            await connection.group_add(channel, after=field("after"))
        case {"type": "leave", "channel": channel}:
            await connection.leave(channel)
        case {"type": "publish", "channel": channel, "data": data}:
            await connection.publish(channel, data)
        case {"type": "history", "channel": channel}:
            page = await connection.history(channel, after=field("after"))
            await connection.send_json(len(page.messages))
        case {"type": "identify"}:
            await connection.identify("ada", field("metadata"), after=field("after"))
        case _:
            await connection.send_json({"got": content})


class Said(BaseModel):
    text: str
    to: list[int] | None = None
    kind: Literal["a", "b"] = "a"


class Room(JsonConsumer):
    @receives("said")
    async def on_said(self, said: Said) -> None:
        await self.publish("room:1", said.model_dump())

    async def receive_json(self, content: Any) -> None:
        await do(self, content)


class Wire(BytesConsumer):
    async def connect(self) -> None:
        await self.accept()
        await self.join("room:1")

    async def receive_bytes(self, data: bytes) -> None:
        if data == b'"ping"':  # the connection answers none in JSON here: this is its own
            await self.send_text('{"type": "pong"}')
        else:
            await self.publish("room:1", {"size": len(data)})


def application(kind: str, connections: ConnectionManager) -> FastAPI:
    app = FastAPI()
    if kind == "function":

        @app.websocket("/")
        async def endpoint(websocket: WebSocket) -> None:
            async with connections.connect(websocket) as connection:
                async for content in connection:
                    await do(connection, content)

    else:
        consumer = {"json": Room, "bytes": Wire}[kind]
        app.add_api_websocket_route("/", consumer.as_endpoint(connections))
    return app


def manager(layer: MemoryLayer, *, middleware: bool, authenticated: bool) -> ConnectionManager:
    chain = (
        Logging()
        >> RateLimit(TokenBucket(1e6, 10**6))
        >> Validation(max_bytes=4000, max_depth=20, ttl=60, models={"said": Said})
    )
    return ConnectionManager(
        layer,
        limits=Limits(per_user=3, groups=3, group_members=2),
        heartbeat=Heartbeat(by="json"),
        max_frame_size=8000,
        middleware=chain if middleware else None,
        authentication=Authentication(verify, FirstMessageToken()) if authenticated else None,
        authorize=Capabilities() if authenticated else None,
    )


# What clients send.

channels = st.sampled_from(["room:1", "room:2", "other", "pgchannels:all", "pgchannels:x", "", "#"])
positions = st.sampled_from(["0", "0-1", "1-1", "1-99999999999999999999", "-1-1", "", "٣-٣"])
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=20)
    | channels
    | positions
    | st.sampled_from(TOKENS)
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=10,
)
types = st.sampled_from(
    [
        "auth",
        "auth.refresh",
        "ping",
        "pong",
        "subscribe",
        "add",
        "leave",
        "publish",
        "history",
        "identify",
        "said",
    ]
)
FIELDS = ("channel", "token", "data", "after", "metadata", "text", "to", "created_at")
fields = {
    "channel": channels | values,
    "token": st.sampled_from(TOKENS) | values,
    "after": positions | values,
}
messages = st.builds(
    lambda kind, given: {**({} if kind is None else {"type": kind}), **given},
    st.none() | types | types | values,
    st.fixed_dictionaries({}, optional={name: fields.get(name, values) for name in FIELDS}),
)


def encoded(content: Any) -> str:
    return json.dumps(content)  # also NaN, and halves of surrogate pairs


nested = st.builds(
    lambda depth, kind, inner: (
        f'{{"type": "{kind}", "channel": "room:1", "data": {"[" * depth}{inner}{"]" * depth}}}'
    ),
    st.sampled_from([18, 19, 200, 254, 255, 1022, 1023, 1024, 3000]),
    types,
    st.sampled_from(["", "1", "{}"]),
)
texts = (messages | values).map(encoded) | nested | st.text(max_size=50)
frames = (
    texts
    | texts.map(lambda text: text.encode(errors="surrogatepass"))
    | st.binary(max_size=60)
    | st.sampled_from(["x" * 8000, "x" * 8001, "é" * 4001, b"\xff" * 9000, "{", b"\xff\xfe{"])
)
PING = '{"type": "ping", "n": 1}'
AUTH = '{"type": "auth", "token": "good"}'


class Errors(logging.Handler):
    """What is logged as an error while it is entered."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def __enter__(self) -> Errors:
        logging.getLogger().addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger().removeHandler(self)


def run(example: Callable[[], Awaitable[None]]) -> None:
    """In an event loop of its own; nothing may be left of it, or be logged as an error."""

    async def main() -> None:
        async with asyncio.timeout(PATIENCE):
            await example()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, left

    with Errors() as errors:
        asyncio.run(main())
    assert [record.getMessage() for record in errors.records] == []


async def until_done(
    socket: Socket, serving: asyncio.Task[None], is_done: Callable[[], bool]
) -> None:
    """Wait until the application has done something, or has ended."""
    while not serving.done() and not is_done():
        news = asyncio.ensure_future(socket.news())
        await asyncio.wait([news, serving], return_when=asyncio.FIRST_COMPLETED)
        news.cancel()
        with suppress(asyncio.CancelledError):
            await news


async def converse(
    kind: str, first: list[str | bytes], frames: list[str | bytes], **options: bool
) -> None:
    """Send these, and see that the socket is closed or alive."""
    async with MemoryLayer(Settings(max_message_size=2000, presence_grace=0)) as layer:
        connections = manager(layer, **options)
        socket = Socket()
        app = application(kind, connections)
        serving = asyncio.create_task(socket.serve(app))
        for frame in first + frames:
            socket.give(frame)
        ping: str | bytes = b'"ping"' if kind == "bytes" else PING
        socket.give(ping)
        # It answers, once it has come through what was before; or it has ended.
        await until_done(socket, serving, lambda: pongs(socket, kind))
        if serving.done():
            assert socket.code is not None
        else:
            assert socket.is_open
            socket.leave()
        await serving  # raises what it has raised
        assert len(connections) == 0
        assert await layer.count_connections() == 0
        for frame in socket.sent:
            if isinstance(frame, str):
                assert "internal_error" not in frame


def pongs(socket: Socket, kind: str) -> bool:
    wanted = {"type": "pong"} if kind == "bytes" else {"type": "pong", "n": 1}
    return any(isinstance(sent, str) and json.loads(sent) == wanted for sent in socket.sent)


kinds = st.sampled_from(["function", "json", "bytes"])


@settings(max_examples=300, deadline=None)
@given(kind=kinds, frames=st.lists(frames, max_size=8), middleware=st.booleans())
@example(
    kind="json", frames=['{"type":"ping","data":' + "[" * 300 + "]" * 300 + "}"], middleware=False
)
@example(kind="function", frames=['{"type":"subscribe","channel":[[]]}'], middleware=True)
@example(kind="json", frames=['{"type":"auth.refresh","token":{"a":1}}'], middleware=True)
@example(kind="json", frames=['{"type":"auth.refresh","token":"another\'s"}'], middleware=True)
@example(kind="bytes", frames=["text", b"\xff"], middleware=True)
def test_after_authentication(kind: str, frames: list[str | bytes], middleware: bool) -> None:
    run(lambda: converse(kind, [AUTH], frames, middleware=middleware, authenticated=True))


@settings(max_examples=150, deadline=None)
@given(kind=kinds, frames=st.lists(frames, max_size=8), middleware=st.booleans())
@example(kind="json", frames=['{"type":"subscribe","channel":[]}'], middleware=False)
@example(kind="function", frames=['{"type":"add","channel":{}}'], middleware=False)
@example(kind="json", frames=['{"type":"leave","channel":[]}'], middleware=False)
def test_without_authentication(kind: str, frames: list[str | bytes], middleware: bool) -> None:
    run(lambda: converse(kind, [], frames, middleware=middleware, authenticated=False))


@settings(max_examples=200, deadline=None)
@given(kind=kinds, first=frames, frames=st.lists(frames, max_size=3), middleware=st.booleans())
@example(kind="json", first='{"type": "auth", "token": ["good"]}', frames=[], middleware=True)
@example(kind="json", first="x" * 8001, frames=[], middleware=True)
def test_instead_of_authentication(
    kind: str, first: str | bytes, frames: list[str | bytes], middleware: bool
) -> None:
    run(lambda: converse(kind, [first], frames, middleware=middleware, authenticated=True))


@settings(deadline=None)
@given(
    kind=kinds,
    frames=st.lists(frames, max_size=3),
    authenticated=st.booleans(),
    code=st.integers(0, 5000),
)
def test_a_client_that_leaves_at_any_time(
    kind: str, frames: list[str | bytes], authenticated: bool, code: int
) -> None:
    async def leaving() -> None:
        async with MemoryLayer(Settings(max_message_size=2000)) as layer:
            connections = manager(layer, middleware=True, authenticated=authenticated)
            socket = Socket()
            for frame in frames:
                socket.give(frame)
            socket.leave(code)
            await socket.serve(application(kind, connections))
            assert len(connections) == 0

    run(leaving)


header_values = st.binary(max_size=30) | st.sampled_from(
    [
        b"Bearer good",
        b"bearer  good",
        b"Basic good",
        b"token=good",
        b'token="good"; token=bad',
        b"https://shop.example",
        b"null",
        b"ws://[::1]:99999",
    ]
)


@settings(max_examples=300, deadline=None)
@given(
    kind=kinds,
    headers=st.lists(
        st.tuples(
            st.sampled_from([b"authorization", b"cookie", b"origin", b"host", b"x"]), header_values
        ),
        max_size=4,
    ),
    query=st.binary(max_size=20)
    | st.sampled_from([b"token=good", b"token=good&token=bad", b"token=%ff", b"after=x", b"token"]),
    subprotocols=st.lists(st.sampled_from(["bearer", "good", "x", "é", ""]), max_size=3),
    has_responses=st.booleans(),
)
def test_any_handshake(
    kind: str,
    headers: list[tuple[bytes, bytes]],
    query: bytes,
    subprotocols: list[str],
    has_responses: bool,
) -> None:
    async def shaking_hands() -> None:
        async with MemoryLayer(Settings(presence_grace=0)) as layer:
            sources = (HeaderToken(), CookieToken(), SubprotocolToken(), QueryToken())
            connections = ConnectionManager(layer, authentication=Authentication(verify, *sources))
            socket = Socket(
                query=query, headers=headers, subprotocols=subprotocols, has_responses=has_responses
            )
            serving = asyncio.create_task(socket.serve(application(kind, connections)))
            await until_done(socket, serving, lambda: socket.accepted)
            if socket.accepted:
                assert socket.subprotocol in (None, *subprotocols)
                socket.leave()
            elif has_responses:
                assert socket.status in (401, 403)
            else:
                assert socket.code is not None
            await serving

    run(shaking_hands)


class TestParsers:
    """Those that have no such test beside their others."""

    @given(values | positions)
    def test_positions(self, given: Any) -> None:
        try:
            position = Position.parse(given)
        except InvalidPosition:
            return
        assert Position.parse(str(position)) == position

    @given(
        st.fixed_dictionaries(
            {},
            optional={
                "action": st.sampled_from(["close", "reauthorize"]) | values,
                "channel": channels | values,
                "user_id": values,
                "token_id": values,
                "group": channels | values,
                "everyone": values,
                "code": st.integers(900, 5100) | values,
                "reason": values,
                "of a later version": values,
            },
        )
    )
    def test_commands(self, payload: dict[str, Any]) -> None:
        try:
            command = Command.parse(payload)
        except InvalidMessage:
            return
        assert Command.parse(json.loads(json.dumps(command.to_dict()))) == command
