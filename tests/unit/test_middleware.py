"""Chains and their laws; validation, logging and rate limits by themselves."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, JsonValue

from pgchannels.errors import ChannelLayerClosed, ConfigurationError, DatabaseUnavailable
from pgchannels.messages import Message
from pgchannels.rates import Admission, FixedWindow, Limiter, Rate, TokenBucket
from pgchannels.web import (
    Chain,
    Frame,
    Logging,
    Middleware,
    RateLimit,
    Validation,
    inbound,
    outbound,
)
from pgchannels.web.errors import (
    FrameTooLarge,
    RateLimitExceeded,
    SocketError,
    UnexpectedMessage,
    ValidationFailed,
    describe,
)

SECOND = 10**9
NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)

_numbers = itertools.count()


@dataclass
class FakeLayer:
    """Where shared rates are counted: one for all nodes."""

    now: int = 0
    error: Exception | None = None
    limiters: dict[tuple[str, Rate], Limiter] = field(default_factory=dict)
    taken: list[tuple[str, Rate, int]] = field(default_factory=list)

    async def take(self, key: str, rate: Rate, cost: int = 1) -> Admission:
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        self.taken.append((key, rate, cost))
        return self.limiters.setdefault((key, rate), Limiter(rate)).take(key, self.now, cost)


@dataclass
class FakeConnection:
    id: str
    user_id: str | None = None
    layer: FakeLayer = field(default_factory=FakeLayer)
    answered: Collection[str] = ("ping", "pong", "auth.refresh")

    def answers_itself(self, kind: str | None) -> bool:
        return kind in self.answered


def connect(user_id: str | None = None, layer: FakeLayer | None = None, **more: Any) -> Any:
    return FakeConnection(f"ws.{next(_numbers)}", user_id, layer or FakeLayer(), **more)


def message(text: str = '{"type": "chat.message", "text": "hello"}') -> Message:
    return Message(7, "room:1", text, NOW, len(text), 1)


def chat(text: str = "hello", **more: Any) -> Frame:
    return Frame(json.dumps({"type": "chat.send", "text": text, **more}))


class Clock:
    """Nanoseconds and seconds that a test decides on."""

    def __init__(self) -> None:
        self.nanoseconds = 0

    def __call__(self) -> int:
        return self.nanoseconds

    def advance(self, seconds: float) -> None:
        self.nanoseconds += round(seconds * SECOND)


async def refused(middleware: Middleware, connection: Any, frame: Frame) -> SocketError:
    with pytest.raises(SocketError) as caught:
        await middleware.inbound(connection, frame)
    # Whatever it is, a client can be told of it.
    assert caught.value.describe().response().encode()
    return caught.value


# Chains


class Mark(Middleware):
    """Leaves its name on whatever passes, and drops what has *drops* on it."""

    def __init__(self, name: str, drops: str = "!") -> None:
        self.name = name
        self.drops = drops
        self.closed_for: list[str] = []

    async def inbound(self, connection: Any, frame: Frame) -> Frame | None:
        await asyncio.sleep(0)
        text = str(frame.raw)
        return None if self.drops in text else frame.replace(text + self.name)

    async def outbound(self, connection: Any, message: Message) -> Message | None:
        await asyncio.sleep(0)
        text = message.payload
        if self.drops in text:
            return None
        return Message(message.id, "room:1", text + self.name, NOW, len(text), 1)

    def closed(self, connection: Any) -> None:
        self.closed_for.append(connection.id)

    def __repr__(self) -> str:
        return self.name


names = st.sampled_from("abcdef")
marks = st.builds(Mark, names, st.sampled_from("!abc"))
chains = st.lists(marks, max_size=3).map(lambda links: Chain(*links))
parts = marks | chains


def through(middleware: Middleware, text: str = "") -> tuple[str | None, str | None]:
    async def both() -> tuple[str | None, str | None]:
        connection = connect()
        frame = await middleware.inbound(connection, Frame(text))
        sent = await middleware.outbound(connection, message(text))
        return (None if frame is None else str(frame.raw)), (None if sent is None else sent.payload)

    return asyncio.run(both())


@given(first=parts, second=parts, third=parts)
def test_chaining_is_associative(first: Middleware, second: Middleware, third: Middleware) -> None:
    left, right = (first >> second) >> third, first >> (second >> third)
    assert left == right
    assert hash(left) == hash(right)
    assert left.links == right.links
    assert not any(isinstance(link, Chain) for link in left.links)
    assert through(left, "x") == through(right, "x")


@given(part=parts)
def test_a_chain_without_links_changes_nothing(part: Middleware) -> None:
    alone = Chain(part)
    assert Chain() >> part == alone == part >> Chain()
    assert through(alone, "x") == through(part, "x")
    assert through(Chain(), "x") == ("x", "x")


@given(first=chains, second=parts)
def test_chaining_changes_neither(first: Chain, second: Middleware) -> None:
    links = first.links
    longer = first >> second
    assert first.links == links
    assert longer.links[: len(links)] == links
    with pytest.raises(AttributeError):
        longer.links = ()  # type: ignore[misc]


def test_inbound_from_left_to_right_and_outbound_from_right_to_left() -> None:
    chain = Mark("a") >> Mark("b") >> Mark("c")
    assert through(chain, "x") == ("xabc", "xcba")
    assert repr(chain) == "<Chain a >> b >> c>"


def test_those_behind_do_not_see_what_was_dropped() -> None:
    last = Mark("c")
    seen: list[Frame] = []

    @inbound
    async def see(_: Any, frame: Frame) -> Frame:
        seen.append(frame)
        return frame

    chain = Mark("a") >> Mark("b", drops="a") >> see >> last
    assert through(chain, "x") == (None, "xcba")
    assert seen == []


async def test_what_is_raised_stops_it() -> None:
    class Refusing(Middleware):
        async def inbound(self, connection: Any, frame: Frame) -> Frame | None:
            raise ValidationFailed("no")

    class Failing(Middleware):
        async def outbound(self, connection: Any, message: Message) -> Message | None:
            raise RuntimeError("a mistake")

    chain = Mark("a") >> Refusing() >> Failing() >> Mark("b")
    assert (await refused(chain, connect(), Frame("x"))).detail == "no"
    with pytest.raises(RuntimeError, match="a mistake"):
        await chain.outbound(connect(), message())


@pytest.mark.parametrize("other", [None, 1, Mark, "a", lambda: None])
def test_only_middleware_can_be_chained(other: Any) -> None:
    for one in (Mark("a"), Chain()):
        with pytest.raises(TypeError):
            one >> other
        with pytest.raises(TypeError):
            other >> one


def test_a_chain_says_whether_it_looks_at_messages() -> None:
    @inbound
    async def looks(connection: Any, frame: Frame) -> Frame:
        return frame

    @outbound
    async def looks_back(connection: Any, message: Message) -> Message:
        return message

    cases: list[tuple[Chain, bool]] = [
        (Chain(), False),
        (Chain(Middleware()), False),
        (Chain(looks), False),
        (Chain(looks_back), True),
        (Middleware() >> looks >> looks_back, True),
        (Validation() >> RateLimit(TokenBucket(1, 1)), False),
        (Chain(Logging()), True),
    ]
    for chain, expected in cases:
        assert chain.sees_outbound == expected


def test_functions_are_made_middleware() -> None:
    @inbound
    async def no_shouting(connection: Any, frame: Frame) -> Frame | None:
        return None if str(frame.raw).isupper() else frame

    @outbound
    async def only_of_rooms(connection: Any, message: Message) -> Message | None:
        return message if message.channel.startswith("room:") else None

    chain = no_shouting >> only_of_rooms
    assert through(chain, "hello") == ("hello", "hello")
    assert through(chain, "HELLO") == (None, "HELLO")
    assert "no_shouting" in repr(chain)


@pytest.mark.parametrize("lift", [inbound, outbound])
def test_functions_have_to_be_async(lift: Callable[[Any], Middleware]) -> None:
    with pytest.raises(ConfigurationError):
        lift(lambda connection, frame: frame)


async def test_one_chain_serves_many_connections_at_once() -> None:
    limit = RateLimit(FixedWindow(3, 3600), exclude=())
    chain = Mark("a") >> limit >> Mark("b")

    async def serve(connection: Any, number: int) -> list[str | None]:
        answers: list[str | None] = []
        for attempt in range(5):
            try:
                frame = await chain.inbound(connection, Frame(f"{number}.{attempt}:"))
                answers.append(None if frame is None else str(frame.raw))
            except RateLimitExceeded:
                answers.append("refused")
            await asyncio.sleep(0)
        return answers

    connections = [connect() for _ in range(100)]
    answers = await asyncio.gather(*(serve(c, number) for number, c in enumerate(connections)))
    for number, answer in enumerate(answers):
        assert answer == [f"{number}.{n}:ab" for n in range(3)] + ["refused"] * 2
    for connection in connections:
        chain.closed(connection)
    assert len(limit._limiter) == len(limit._refusals) == 0


def test_all_hear_that_a_connection_is_gone_even_if_one_fails() -> None:
    class Failing(Middleware):
        def closed(self, connection: Any) -> None:
            raise RuntimeError("a mistake")

    first, last, connection = Mark("a"), Mark("b"), connect()
    with pytest.raises(RuntimeError, match="a mistake"):
        (first >> Failing() >> last).closed(connection)
    assert first.closed_for == last.closed_for == [connection.id]


# Validation


class ChatSend(BaseModel):
    text: str = Field(min_length=1, max_length=500)


async def test_what_is_valid_passes_as_it_was_sent() -> None:
    validation = Validation(models={"chat.send": ChatSend}, ttl=60, unknown="refuse")
    for frame in (chat(), chat(extra=[[1]]), Frame(b'{"type": "chat.send", "text": "x"}')):
        assert await validation.inbound(connect(), frame) is frame


@pytest.mark.parametrize("text", ["a", "é", "€", "😀", "\ud800"])
async def test_one_byte_too_many_is_refused_before_parsing(text: str) -> None:
    size = len(text.encode(errors="surrogatepass"))
    validation = Validation(max_bytes=10 * size, max_depth=None)
    for fits in (text * 10, b"x" * 10 * size):
        frame = Frame(fits)
        assert await validation.inbound(connect(), frame) is frame
    for too_large in (text * 10 + "a", b"x" * (10 * size + 1)):
        for other in (validation, Validation(max_bytes=10 * size)):
            frame = Frame(too_large)
            error = await refused(other, connect(), frame)
            assert isinstance(error, FrameTooLarge)
            assert error.context == {"size": 10 * size + 1, "limit": 10 * size}
            assert not error.should_disconnect()
            assert frame._error is None, "parsed, though it is not to be"


async def test_what_is_too_large_closes_the_socket_on_demand() -> None:
    error = await refused(Validation(max_bytes=1, close_too_large=True), connect(), Frame("{}"))
    assert error.should_disconnect()
    assert error.ws_code == 1009


async def test_without_checks_of_content_frames_need_not_be_json() -> None:
    for raw in ("{", b"\xff", "NaN"):
        frame = Frame(raw)
        assert await Validation(max_depth=None).inbound(connect(), frame) is frame
        for validation in (
            Validation(),
            Validation(max_depth=None, ttl=1),
            Validation(max_depth=None, models={"a": ChatSend}),
            Validation(max_depth=None, unknown="refuse"),
        ):
            assert (await refused(validation, connect(), frame)).code == "invalid_json"


@pytest.mark.parametrize("levels", [33, 1_000, 1_024, 1_025, 10_000, 100_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}"), ('[0,{"a":[', "]}]")])
async def test_what_is_too_deep_is_refused(levels: int, opening: str, closing: str) -> None:
    raw = opening * levels + "1" + closing * levels
    for frame in (Frame(raw), Frame(raw.encode())):
        error = await refused(Validation(max_bytes=None), connect(), frame)
        assert isinstance(error, ValidationFailed)
        assert error.code in ("invalid_content", "invalid_json")


def depth(content: Any) -> int:
    if isinstance(content, dict):
        return 1 + max(map(depth, content.values()), default=0)
    return 1 + max(map(depth, content), default=0) if isinstance(content, list) else 0


@given(
    content=st.recursive(
        st.integers() | st.sampled_from(["[[[[[[", "{", ""]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=30,
    ),
    limit=st.integers(1, 6),
)
@example(content=[[[]]], limit=2)
@example(content=[[1, "[", []]], limit=3)
async def test_depth_is_counted_right(content: Any, limit: int) -> None:
    validation = Validation(max_depth=limit)
    frame = Frame(json.dumps(content))
    if depth(content) <= limit:
        assert await validation.inbound(connect(), frame) is frame
    else:
        error = await refused(validation, connect(), frame)
        assert error.context == {"limit": limit}


async def test_content_has_to_fit_the_model_of_its_type() -> None:
    validation = Validation(models={"chat.send": ChatSend})
    for sent in ({"type": "chat.send"}, {"type": "chat.send", "text": ""}):
        error = await refused(validation, connect(), Frame(json.dumps(sent)))
        problem = describe(error)
        assert (problem.code, problem.detail) == ("invalid_content", "not a valid 'chat.send'")
        assert [found["loc"] for found in problem.errors] == [["text"]]


UNKNOWN = ['{"type": "other"}', '{"type": 1}', "{}", "[]", "null", '"chat.send"']


@pytest.mark.parametrize("raw", UNKNOWN)
async def test_types_without_a_model_pass_or_are_refused(raw: str) -> None:
    models: dict[str, type[BaseModel]] = {"chat.send": ChatSend}
    frame = Frame(raw)
    assert await Validation(models=models).inbound(connect(), frame) is frame
    error = await refused(Validation(models=models, unknown="refuse"), connect(), frame)
    assert error.code == "unexpected_message"


@pytest.mark.parametrize("kind", ["ping", "pong", "auth.refresh"])
async def test_what_connections_answer_themselves_is_never_unknown(kind: str) -> None:
    frame = Frame(json.dumps({"type": kind}))
    validation = Validation(models={"chat.send": ChatSend}, unknown="refuse")
    assert await validation.inbound(connect(), frame) is frame
    error = await refused(validation, connect(answered=()), frame)
    assert error.code == "unexpected_message"


class Anything(BaseModel):
    content: JsonValue


async def test_a_model_of_anything_bears_any_depth() -> None:
    validation = Validation(max_bytes=None, max_depth=None, models={"a": Anything})
    for levels in (100, 500, 1_000, 100_000):
        raw = '{"type": "a", "content": ' + "[" * levels + "]" * levels + "}"
        try:
            await validation.inbound(connect(), Frame(raw))
        except ValidationFailed as error:
            assert describe(error).response().encode()  # noqa: PT017 - either will do


@given(
    created_at=st.one_of(
        st.integers(-(2**63), 2**64 - 1),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(),
        st.datetimes().map(datetime.isoformat),
        st.datetimes(timezones=st.just(UTC)).map(datetime.isoformat),
        st.none() | st.booleans() | st.lists(st.integers()),
    ),
    ttl=st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
)
@example(created_at="0001-01-01T00:00:00+14:00", ttl=None)
@example(created_at="9999-12-31T23:59:59-14:00", ttl=1e308)
async def test_whatever_time_it_says_it_passes_or_is_stale_or_refused(
    created_at: Any, ttl: Any
) -> None:
    raw = json.dumps({"created_at": created_at, "ttl": ttl})
    try:
        await Validation(ttl=60).inbound(connect(), Frame(raw))
    except ValidationFailed as error:
        assert error.errors[0]["loc"][0] in ("created_at", "ttl")  # noqa: PT017


@pytest.mark.parametrize(
    ("age", "own", "passes"),
    [
        (0, None, True),
        (60, None, True),
        (61, None, False),
        (11, 10, False),
        (10, 10, True),
        (61, 1000, False),
        (1, 0, False),
        (-1000, 10, True),  # of a clock that is ahead
    ],
)
async def test_what_is_stale_is_dropped(age: float, own: float | None, passes: bool) -> None:
    validation = Validation(ttl=60, clock=NOW.timestamp)
    made = NOW - timedelta(seconds=age)
    elsewhere = made.astimezone().isoformat()
    for created_at in (made.isoformat(), elsewhere, made.timestamp()):
        frame = chat(created_at=created_at, ttl=own)
        assert await validation.inbound(connect(), frame) is (frame if passes else None)
        assert await Validation().inbound(connect(), frame) is frame, "nobody asked for it"


async def test_what_does_not_say_when_it_was_made_is_never_stale() -> None:
    for frame in (chat(), chat(ttl=0), Frame("[1]"), chat(created_at=None, ttl=0)):
        assert await Validation(ttl=60).inbound(connect(), frame) is frame


@pytest.mark.parametrize(
    "more",
    [
        {"created_at": "yesterday"},
        {"created_at": "2026-01-31T12:00:00"},
        {"created_at": True},
        {"created_at": {}},
        {"created_at": NOW.isoformat(), "ttl": -1},
        {"created_at": NOW.isoformat(), "ttl": "10"},
        {"created_at": NOW.isoformat(), "ttl": True},
    ],
)
async def test_times_that_are_none_are_refused(more: dict[str, Any]) -> None:
    error = await refused(Validation(ttl=60), connect(), chat(**more))
    assert error.code == "invalid_content"
    assert describe(error).errors


@pytest.mark.parametrize(
    "make",
    [
        lambda: Validation(max_bytes=0),
        lambda: Validation(max_bytes=cast("Any", float("nan"))),
        lambda: Validation(max_depth=0),
        lambda: Validation(max_depth=1025),
        lambda: Validation(ttl=0),
        lambda: Validation(ttl=float("nan")),
        lambda: Validation(unknown=cast("Any", "drop")),
        lambda: Validation(models=cast("Any", {"a": dict})),
        lambda: Logging(sample=1.1),
        lambda: Logging(sample=-0.1),
        lambda: Logging(exclude="ping"),
        lambda: RateLimit(TokenBucket(1, 1), by=cast("Any", "group")),
        lambda: RateLimit(TokenBucket(1, 1), shared=True),
        lambda: RateLimit(TokenBucket(1, 1), max_refusals=0),
        lambda: RateLimit(TokenBucket(1, 1), max_refusals=cast("Any", float("nan"))),
        lambda: RateLimit(TokenBucket(1, 1), exclude="ping"),
        lambda: RateLimit(TokenBucket(1, 1), when_unavailable=cast("Any", "allow")),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_made(make: Callable[[], Middleware]) -> None:
    with pytest.raises(ConfigurationError):
        make()


@given(raw=st.binary() | st.text(st.characters()))
async def test_nothing_but_errors_for_clients_comes_of_any_bytes(raw: str | bytes) -> None:
    chain = (
        Logging()
        >> RateLimit(TokenBucket(1, 100))
        >> Validation(models={"chat.send": ChatSend}, ttl=1, unknown="refuse")
    )
    error = await refused(chain, connect(), Frame(raw))
    assert isinstance(error, (ValidationFailed, UnexpectedMessage))


# Logging


@pytest.fixture
def records(caplog: pytest.LogCaptureFixture) -> Callable[[], list[Any]]:
    caplog.set_level(logging.DEBUG, logger="pgchannels.messages")
    return lambda: [r for r in caplog.records if r.name == "pgchannels.messages"]


async def test_it_is_logged_that_something_was_sent_and_not_what(
    records: Callable[[], list[Any]], caplog: pytest.LogCaptureFixture
) -> None:
    log, connection = Logging(level=logging.DEBUG), connect("ada")
    frame = chat("a secret", token="another secret")
    sent = message('{"type": "chat.message", "text": "a secret"}')
    assert await log.inbound(connection, frame) is frame
    assert await log.outbound(connection, sent) is sent
    first, second = records()
    assert first.levelno == second.levelno == logging.DEBUG
    assert (first.direction, second.direction) == ("inbound", "outbound")
    assert (first.message_type, second.message_type) == ("chat.send", "chat.message")
    assert (first.size, second.size) == (frame.size, sent.size)
    assert (second.channel, second.position) == ("room:1", "1-7")
    for record in (first, second):
        assert (record.connection, record.user_id) == (connection.id, "ada")
        assert "secret" not in str(vars(record))
    assert "secret" not in caplog.text


async def test_what_the_client_chooses_stays_out_of_the_sentence(
    records: Callable[[], list[Any]],
) -> None:
    kind = "\n2026-01-31 CRITICAL: " + "x" * 1000
    await Logging().inbound(connect(), Frame(json.dumps({"type": kind})))
    (record,) = records()
    assert record.message_type == kind[:100]
    assert record.getMessage().count("\n") == 0
    assert len(record.getMessage()) < 100


async def test_what_cannot_be_parsed_is_logged_too(records: Callable[[], list[Any]]) -> None:
    log = Logging()
    large = Frame('{"type": "a", "text": "' + "x" * 70_000 + '"}')
    for frame in (Frame("{"), Frame(b"\xff"), Frame("[]"), large):
        assert await log.inbound(connect(), frame) is frame
    for sent in (message('{"type": 1}'), message("[" * 5000), message('{"a": 1e999}')):
        assert await log.outbound(connect(), sent) is sent
    assert [record.message_type for record in records()] == [None] * 7


async def test_a_sample_is_logged(records: Callable[[], list[Any]]) -> None:
    draws = itertools.cycle([0.0, 0.2499, 0.25, 0.9])
    log = Logging(sample=0.25, random=lambda: next(draws))
    for _ in range(8):
        await log.inbound(connect(), chat())
    assert len(records()) == 4
    for sample, expected in ((0.0, 4), (1.0, 12)):
        for _ in range(8):
            await Logging(sample=sample).inbound(connect(), chat())
        assert len(records()) == expected


async def test_excluded_types_and_levels_that_are_off_are_not_logged(
    records: Callable[[], list[Any]],
) -> None:
    log = Logging(exclude={"ping"})
    await log.inbound(connect(), Frame('{"type": "ping"}'))
    await log.outbound(connect(), message('{"type": "ping"}'))
    logging.getLogger("pgchannels.messages").setLevel(logging.WARNING)
    frame = chat()
    await log.inbound(connect(), frame)
    assert records() == []
    other = logging.getLogger("pgchannels.tests.of.messages")
    await Logging(logger=other, level=logging.ERROR).inbound(connect(), frame)
    assert records() == []


# Rate limits


async def test_a_burst_passes_and_then_the_rate() -> None:
    clock = Clock()
    limit, connection = RateLimit(TokenBucket(rate=2, burst=3), clock=clock), connect()
    for _ in range(3):
        frame = chat()
        assert await limit.inbound(connection, frame) is frame
    error = await refused(limit, connection, chat())
    assert isinstance(error, RateLimitExceeded)
    assert (error.code, error.retry_after) == ("rate_limited", 0.5)
    assert not error.should_disconnect()
    clock.advance(0.499)
    assert (await refused(limit, connection, chat())).retry_after == 0.001
    clock.advance(0.001)
    assert await limit.inbound(connection, chat()) is not None


@given(
    rate=st.builds(TokenBucket, st.floats(0.01, 1e5), st.integers(1, 5))
    | st.builds(FixedWindow, st.integers(1, 5), st.floats(0.001, 1e5)),
    pauses=st.lists(st.floats(0, 1), max_size=20),
)
async def test_who_waits_as_told_is_admitted(rate: Rate, pauses: list[float]) -> None:
    clock = Clock()
    limit, connection = RateLimit(rate, clock=clock), connect()
    for pause in pauses:
        clock.advance(pause)
        try:
            await limit.inbound(connection, chat())
        except RateLimitExceeded as error:
            clock.advance(error.retry_after or 0)
            await limit.inbound(connection, chat())


async def test_each_connection_has_its_own() -> None:
    limit, first, second = RateLimit(FixedWindow(1, 60)), connect("ada"), connect("ada")
    await limit.inbound(first, chat())
    await limit.inbound(second, chat())
    await refused(limit, first, chat())
    await refused(limit, second, chat())


async def test_all_connections_of_a_user_have_one_together() -> None:
    limit = RateLimit(FixedWindow(2, 60), by="user")
    first, second, other = connect("ada"), connect("ada"), connect("bob")
    await limit.inbound(first, chat())
    await limit.inbound(second, chat())
    await refused(limit, first, chat())
    await refused(limit, second, chat())
    await limit.inbound(other, chat())
    # Connecting anew does not help.
    limit.closed(first)
    limit.closed(second)
    await refused(limit, connect("ada"), chat())


async def test_connections_of_nobody_count_for_themselves() -> None:
    limit, first = RateLimit(FixedWindow(1, 60), by="user"), connect()
    await limit.inbound(first, chat())
    await refused(limit, first, chat())
    await limit.inbound(connect(), chat())
    # And no user can be called so that it takes what is another one's.
    await limit.inbound(connect(f"connection:{first.id}"), chat())


async def test_a_function_says_whose_it_is() -> None:
    def by_room(_: Any, frame: Frame) -> str:
        return str(frame.json()["room"])

    limit = RateLimit(FixedWindow(1, 60), by=by_room)
    await limit.inbound(connect(), chat(room=1))
    await limit.inbound(connect(), chat(room=2))
    await refused(limit, connect(), chat(room=1))


async def test_excluded_types_do_not_count_unless_they_are_large() -> None:
    limit, connection = RateLimit(FixedWindow(1, 60)), connect()
    for _ in range(5):
        for kind in ("ping", "pong"):
            assert await limit.inbound(connection, Frame(json.dumps({"type": kind}))) is not None
    await limit.inbound(connection, chat())
    await refused(limit, connection, chat())
    large = Frame(json.dumps({"type": "ping", "text": "x" * 5000}))
    await refused(limit, connection, large)
    other = RateLimit(FixedWindow(1, 60), exclude={"typing"})
    await other.inbound(connection, Frame('{"type": "typing"}'))
    await other.inbound(connection, Frame('{"type": "ping"}'))
    await refused(other, connection, Frame('{"type": "ping"}'))


async def test_a_flood_of_pings_counts_and_closes_the_socket() -> None:
    """Each is answered, by as much as it holds, so that some are free and the rest is not."""
    clock = Clock()
    limit = RateLimit(FixedWindow(2, 60), max_refusals=3, clock=clock)
    connection, other = connect(), connect()
    ping = Frame('{"type": "ping"}')
    for _ in range(12):  # ten are free, two are counted
        await limit.inbound(connection, ping)
    await limit.inbound(other, ping)
    await refused(limit, connection, ping)
    await refused(limit, connection, Frame('{"type": "pong"}'))
    clock.advance(0.1)
    await limit.inbound(connection, ping)
    assert (await refused(limit, connection, ping)).disconnects
    limit.closed(connection)
    limit.closed(other)
    assert len(limit._pings) == 0


async def test_large_pings_count() -> None:
    limit, connection = RateLimit(FixedWindow(1, 60)), connect()
    small, large = (Frame(json.dumps({"type": "ping", "at": "x" * n})) for n in (100, 110))
    assert (small.size, large.size) == (126, 136)
    await limit.inbound(connection, small)
    await limit.inbound(connection, large)
    await limit.inbound(connection, small)
    await refused(limit, connection, large)


@pytest.mark.parametrize("kind", ["ping", "pong", "auth.refresh"])
async def test_what_reaches_the_application_counts_by_whatever_name(kind: str) -> None:
    limit = RateLimit(FixedWindow(1, 3600), exclude={"ping", "pong", "auth.refresh", "typing"})
    frame = Frame(json.dumps({"type": kind}))
    connection = connect(answered=())
    await limit.inbound(connection, frame)
    await refused(limit, connection, frame)
    # What an application excludes of its own is its own affair.
    await limit.inbound(connection, Frame('{"type": "typing"}'))


async def test_what_is_no_json_counts() -> None:
    limit, connection = RateLimit(FixedWindow(2, 60)), connect()
    await limit.inbound(connection, Frame("{"))
    await limit.inbound(connection, Frame(b"\xff"))
    await refused(limit, connection, Frame("{"))


async def test_frames_may_cost_more_or_nothing() -> None:
    limit = RateLimit(FixedWindow(10, 60), cost=lambda _, frame: len(frame.json()["text"]))
    connection = connect()
    await limit.inbound(connection, chat("x" * 8))
    assert (await refused(limit, connection, chat("xxx"))).retry_after == pytest.approx(60, abs=10)
    await limit.inbound(connection, chat("xx"))
    await limit.inbound(connection, chat(""))
    error = await refused(limit, connection, chat("x" * 11))
    assert (error.code, error.retry_after) == ("rate_limited", None)
    wrong = RateLimit(FixedWindow(10, 60), cost=lambda _, frame: -1)
    with pytest.raises(ConfigurationError):
        await wrong.inbound(connection, chat())


async def test_several_rates_take_together_or_not_at_all() -> None:
    clock = Clock()
    limit = RateLimit(TokenBucket(1, burst=2), FixedWindow(5, 60), clock=clock)
    connection = connect()
    admitted, retry_after = 0, None
    for _ in range(20):
        for _ in range(3):
            try:
                await limit.inbound(connection, chat())
                admitted += 1
            except RateLimitExceeded as error:
                retry_after = error.retry_after
        clock.advance(1)
    assert admitted == 5
    assert retry_after == 41
    assert len(limit.rates) == 2


async def test_many_refusals_in_a_row_close_the_socket() -> None:
    clock = Clock()
    limit = RateLimit(TokenBucket(1, 1), max_refusals=3, clock=clock)
    connection, other = connect(), connect()
    for _ in range(2):
        await limit.inbound(connection, chat())
        for _ in range(2):
            assert not (await refused(limit, connection, chat())).should_disconnect()
            await limit.inbound(connection, Frame('{"type": "ping"}'))
        clock.advance(1)
    await limit.inbound(connection, chat())
    await limit.inbound(other, chat())
    for _ in range(2):
        await refused(limit, connection, chat())
        await refused(limit, other, chat())
    error = await refused(limit, connection, chat())
    assert error.should_disconnect()
    assert error.ws_code == 1008
    patient = RateLimit(TokenBucket(1, 1), max_refusals=None, clock=clock)
    await patient.inbound(connection, chat())
    for _ in range(1000):
        assert not (await refused(patient, connection, chat())).should_disconnect()


async def test_nothing_is_left_of_a_connection_that_is_gone() -> None:
    limit = RateLimit(FixedWindow(1, 3600))
    for _ in range(100):
        connection = connect()
        await limit.inbound(connection, chat())
        await refused(limit, connection, chat())
        limit.closed(connection)
        limit.closed(connect())  # one that has never sent anything
    assert len(limit._limiter) == len(limit._refusals) == 0


# Shared by all nodes


async def test_nodes_share_what_is_counted_in_the_layer() -> None:
    layer = FakeLayer()
    nodes = [RateLimit(FixedWindow(10, 60), by="user", shared=True) for _ in range(4)]

    async def send(limit: RateLimit) -> bool:
        try:
            await limit.inbound(connect("ada", layer), chat())
        except RateLimitExceeded as error:
            assert error.retry_after == 60  # noqa: PT017
            return False
        return True

    answers = await asyncio.gather(*(send(limit) for limit in nodes for _ in range(10)))
    assert sum(answers) == 10
    await nodes[0].inbound(connect("bob", layer), chat())


async def test_keys_of_limits_kinds_and_rates_do_not_meet() -> None:
    layer = FakeLayer()
    rates: tuple[Rate, Rate] = (TokenBucket(5, 10), FixedWindow(100, 60))
    by_user = RateLimit(*rates, by="user", shared=True, cost=lambda _, frame: 2)
    named = RateLimit(rates[0], by="user", shared=True, name="uploads")
    own = RateLimit(rates[0], by=lambda _, frame: "ada", shared=True)
    for limit in (by_user, named, own):
        await limit.inbound(connect("ada", layer), chat())
    assert layer.taken == [
        ("inbound.0:user:ada", rates[0], 2),
        ("inbound.1:user:ada", rates[1], 2),
        ("uploads.0:user:ada", rates[0], 1),
        ("inbound.0:key:ada", rates[0], 1),
    ]


async def test_a_connection_without_a_user_leaves_no_shared_rate_behind() -> None:
    """It is on one node, and counted there, also while the database is away."""
    layer = FakeLayer(error=DatabaseUnavailable("away"))
    limit = RateLimit(FixedWindow(2, 60), by="user", shared=True)
    anonymous = connect(None, layer)
    for _ in range(2):
        await limit.inbound(anonymous, chat())
    await refused(limit, anonymous, chat())
    await limit.inbound(connect(None, layer), chat())
    assert layer.taken == []
    limit.closed(anonymous)


async def test_a_rate_that_refuses_stands_for_those_behind_it() -> None:
    layer = FakeLayer()
    limit = RateLimit(FixedWindow(1, 60), FixedWindow(5, 60), by="user", shared=True)
    await limit.inbound(connect("ada", layer), chat())
    for _ in range(9):
        await refused(limit, connect("ada", layer), chat())
    assert [key for key, _, _ in layer.taken].count("inbound.1:user:ada") == 1


async def test_without_the_database_all_is_refused() -> None:
    layer = FakeLayer(error=DatabaseUnavailable("cannot connect to db.internal:5432"))
    limit = RateLimit(FixedWindow(5, 60), by="user", shared=True, max_refusals=1)
    for _ in range(3):
        error = await refused(limit, connect("ada", layer), chat())
        problem = describe(error)
        assert (problem.code, problem.http_status) == ("unavailable", 503)
        assert problem.retry_after
        assert not problem.disconnects
        assert "internal" not in problem.response().encode()
        assert isinstance(error.__cause__, DatabaseUnavailable)
    layer.error = None
    await limit.inbound(connect("ada", layer), chat())


async def test_without_the_database_it_is_counted_here_on_demand() -> None:
    layer = FakeLayer(error=DatabaseUnavailable("away"))
    limit = RateLimit(FixedWindow(2, 3600), by="user", shared=True, when_unavailable="local")
    for _ in range(2):
        await limit.inbound(connect("ada", layer), chat())
    assert isinstance(await refused(limit, connect("ada", layer), chat()), RateLimitExceeded)
    layer.error = None
    await limit.inbound(connect("ada", layer), chat())


async def test_other_errors_of_the_layer_are_not_hidden() -> None:
    for error in (ChannelLayerClosed(), RuntimeError("a mistake")):
        limit = RateLimit(FixedWindow(2, 60), by="user", shared=True, when_unavailable="local")
        with pytest.raises(type(error)):
            await limit.inbound(connect("ada", FakeLayer(error=error)), chat())


_: Callable[[str, Rate, int], Awaitable[Admission]] = FakeLayer().take
