"""Which methods become handlers, and what of a message's text makes it worth parsing."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import pytest
from fastapi import Query
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from pgchannels import ConfigurationError
from pgchannels.messages import Message
from pgchannels.web import BytesConsumer, JsonConsumer, WebSocketConsumer, handles, receives
from pgchannels.web.annotations import Unresolved
from pgchannels.web.handlers import EventHandlers, Handler

if TYPE_CHECKING:
    from somewhere import Nothing  # type: ignore[import-not-found]

    from pgchannels import messages as unseen


def message(payload: str) -> Message:
    return Message(1, "room", payload, datetime.now(UTC), len(payload), 1)


def types(consumer: type[WebSocketConsumer]) -> dict[str, str]:
    return {kind: h.function.__name__ for kind, h in consumer._events.by_type.items()}


def received(consumer: type[WebSocketConsumer]) -> dict[str, str]:
    return {kind: h.function.__name__ for kind, h in consumer._receivers.items()}


class Text(BaseModel):
    text: str


class TestFinding:
    def test_declared(self) -> None:
        class Room(JsonConsumer):
            @handles("chat.message", "chat.edited")
            async def on_chat(self, message: Message) -> None: ...

            @handles("a")
            @handles("b")
            async def _private(self, anything: Message) -> None: ...

        assert types(Room) == {
            "chat.message": "on_chat",
            "chat.edited": "on_chat",
            "a": "_private",
            "b": "_private",
        }

    def test_in_the_style_of_channels(self) -> None:
        class Mixin:
            async def from_mixin(self, event: dict[str, Any]) -> None: ...

        class Room(Mixin, JsonConsumer):
            async def chat_message(self, message: Message) -> None: ...
            async def user_is_typing(self, event: Any) -> None: ...
            async def plain_event(self, event) -> None: ...  # type: ignore[no-untyped-def]

            # None of these
            async def message(self, message: Message) -> None: ...
            async def _chat_secret(self, message: Message) -> None: ...
            async def __chat_secret(self, message: Message) -> None: ...
            async def chat_other(self, content: Message) -> None: ...
            async def chat_two(self, message: Message, more: int = 0) -> None: ...
            async def chat_many(self, *message: Message) -> None: ...
            async def chat_none(self) -> None: ...
            async def save_text(self, message: str) -> None: ...
            async def receive_json(self, message: Any) -> None: ...
            def chat_plain(self, message: Message) -> None: ...
            @staticmethod
            async def chat_static(message: Message) -> None: ...
            @classmethod
            async def chat_class(cls, message: Message) -> None: ...

            chat_value = 5

        assert types(Room) == {
            "from.mixin": "from_mixin",
            "chat.message": "chat_message",
            "user.is.typing": "user_is_typing",
            "plain.event": "plain_event",
        }

    @pytest.mark.parametrize("consumer", [WebSocketConsumer, JsonConsumer, BytesConsumer])
    def test_nothing_of_ours(self, consumer: type[WebSocketConsumer]) -> None:
        class Room(consumer):  # type: ignore[misc, valid-type]
            async def connect(self) -> None: ...
            async def disconnect(self, code: int) -> None: ...

        assert types(consumer) == types(Room) == {}
        assert received(consumer) == received(Room) == {}

    def test_no_method_of_ours_can_be_declared(self) -> None:
        with pytest.raises(ConfigurationError, match=r"Room\.disconnect .*another meaning"):

            class Room(JsonConsumer):
                @handles("bye")
                async def disconnect(self, code: Any) -> None: ...

    def test_inherited_and_overridden(self) -> None:
        class Base(JsonConsumer):
            @handles("a")
            async def on_a(self, message: Message) -> None: ...
            @handles("b")
            async def on_b(self, message: Message) -> None: ...
            @handles("c")
            async def on_c(self, message: Message) -> None: ...
            async def d_d(self, message: Message) -> None: ...

        class Room(Base):
            async def on_a(self, message: Message) -> None: ...
            @handles("other")
            async def on_b(self, message: Message) -> None: ...

            on_c = None  # type: ignore[assignment]

        assert types(Base) == {"a": "on_a", "b": "on_b", "c": "on_c", "d.d": "d_d"}
        assert types(Room) == {"a": "on_a", "other": "on_b", "d.d": "d_d"}
        assert Room._events.by_type["a"].function is Room.on_a
        assert Base._events.by_type["a"].function is Base.on_a

    def test_two_for_one_type(self) -> None:
        with pytest.raises(ConfigurationError) as raised:

            class Room(JsonConsumer):
                @handles("chat.message")
                async def on_chat(self, message: Message) -> None: ...
                async def chat_message(self, message: Message) -> None: ...

        assert "'chat.message'" in str(raised.value)
        assert "Room.on_chat" in str(raised.value)
        assert "Room.chat_message" in str(raised.value)

    def test_two_receivers_for_one_type(self) -> None:
        with pytest.raises(ConfigurationError, match=r"'send'.*Room\.one.*Room\.two"):

            class Room(JsonConsumer):
                @receives("send")
                async def one(self, content: Any) -> None: ...
                @receives("send")
                async def two(self, content: Any) -> None: ...

    def test_receivers_are_declared_only(self) -> None:
        class Room(JsonConsumer):
            @receives("chat.send")
            async def chat_send(self, message: Any) -> None: ...
            async def chat_message(self, message: Any) -> None: ...

        assert received(Room) == {"chat.send": "chat_send"}
        # And one that is for clients is not reached from a group.
        assert types(Room) == {"chat.message": "chat_message"}

    @pytest.mark.parametrize("consumer", [WebSocketConsumer, BytesConsumer])
    def test_only_json_is_received_by_type(self, consumer: type[WebSocketConsumer]) -> None:
        with pytest.raises(ConfigurationError, match=r"Room\.on_send.*JsonConsumer"):

            class Room(consumer):  # type: ignore[misc, valid-type]
                @receives("chat.send")
                async def on_send(self, content: Any) -> None: ...

    @pytest.mark.parametrize("decorator", [handles, receives])
    def test_without_types(self, decorator: Any) -> None:
        for wrong in ((), ("",), (5,), (lambda: None,)):
            with pytest.raises(ConfigurationError, match=decorator.__name__):
                decorator(*wrong)

    def test_what_cannot_be_one(self) -> None:
        def plain(self: Any, message: Any) -> None: ...
        async def two(self: Any, message: Any, more: int = 0) -> None: ...
        async def none(self: Any) -> None: ...
        async def number(self: Any, message: int) -> None: ...
        async def unknown(self: Any, message: Nothing) -> None: ...

        for method in (plain, two, none, number, unknown):
            for decorator in (handles, receives):
                declared: Any = decorator("x")
                with pytest.raises(ConfigurationError, match=r"Room\.it"):
                    type("Room", (JsonConsumer,), {"it": declared(method)})
                for attribute in vars(method).copy():
                    delattr(method, attribute)


class TestArguments:
    def test_of_messages(self) -> None:
        class Local(BaseModel):
            at: datetime

        class Room(JsonConsumer):
            class Nested(BaseModel):
                number: int

            @handles("message")
            async def on_message(self, it: Message) -> None: ...
            @handles("hidden")
            async def on_hidden(self, it: unseen.Message) -> None: ...
            @handles("mapping")
            async def on_mapping(self, it: Mapping[str, Any]) -> None: ...
            @handles("dict")
            async def on_dict(self, it: dict[str, Any]) -> None: ...
            @handles("text")
            async def on_text(self, it: Text) -> None: ...
            @handles("local")
            async def on_local(self, it: Local) -> None: ...
            @handles("nested")
            async def on_nested(self, it: Nested) -> None: ...

        convert = {kind: handler.convert for kind, handler in Room._events.by_type.items()}
        given = message('{"text":"hello","at":"2026-01-01T00:00:00Z","number":5}')
        for kind in ("message", "mapping"):
            assert convert[kind](given) is given
        assert type(convert["dict"](given)) is dict
        assert convert["dict"](given) == given.data
        assert convert["dict"](given) is not given.data
        assert convert["text"](given) == Text(text="hello")
        assert convert["local"](given) == Local(at=datetime(2026, 1, 1, tzinfo=UTC))
        with pytest.raises(ValidationError):
            convert["text"](message('{"text":5}'))

    def test_a_subclass_elsewhere_knows_the_names_of_its_base(self) -> None:
        def make() -> type[JsonConsumer]:
            class Local(BaseModel):
                number: int

            class Base(JsonConsumer):
                @handles("x")
                async def on_x(self, it: Local) -> None: ...
                @receives("y")
                async def on_y(self, it: Local) -> None: ...
                async def connect(self, it: Annotated[Local, Query()]) -> None: ...

            return Base

        base = make()

        class Room(base):  # type: ignore[misc, valid-type]
            pass

        assert Room._events.by_type == base._events.by_type
        assert Room._receivers == base._receivers
        assert Room._connect is base._connect

    def test_of_clients(self) -> None:
        class Room(JsonConsumer):
            @receives("any")
            async def on_any(self, content: Any) -> None: ...
            @receives("dict")
            async def on_dict(self, content: dict[str, Any]) -> None: ...
            @receives("text")
            async def on_text(self, content: Text) -> None: ...

        content = {"text": "hello"}
        assert Room._receivers["any"].convert(content) is content
        assert Room._receivers["dict"].convert(content) is content
        assert Room._receivers["text"].convert(content) == Text(text="hello")


async def nothing(self: Any, message: Any) -> None: ...


def handlers(*types: str) -> EventHandlers:
    return EventHandlers({kind: Handler(nothing, lambda value: value) for kind in types})


class TestLooking:
    @pytest.mark.parametrize(
        "payload",
        [
            "{}",
            '{"type":"other"}',
            '{"type":"chat.messages"}',
            '{"type":"chatxmessage"}',
            '{"text":"chat.message"}',
            '{"type":"chat.message","type":"other"}',
            '{"type":["chat.message"]}',
            '{"type":null,"a":"chat.message"}',
            '{"inner":{"type":"chat.message"}}',
            # as text it is fine, and cannot be parsed
            '{"type":"chat.message","a":1e999}',
            '{"type":"chat.message","a":' + "[" * 2000 + "]" * 2000 + "}",
        ],
    )
    def test_for_nobody(self, payload: str) -> None:
        assert handlers("chat.message").find(message(payload)) is None

    @pytest.mark.parametrize(
        "payload",
        [
            '{"type":"chat.message"}',
            ' {"a":1,\n"type" :\t"chat.message" } ',
            '{"type":"ch\\u0061t.message"}',
            '{"\\u0074ype":"chat.message"}',
            '{"type":"\\u0063hat\\u002Emessage"}',
            '{"type":"other","type":"chat.message"}',
        ],
    )
    def test_found(self, payload: str) -> None:
        found = handlers("other.one", "chat.message").find(message(payload))
        assert found is not None
        assert found.name == "nothing"

    @pytest.mark.parametrize(
        ("kind", "written"),
        [
            ("a/b", r"a\/b"),
            ('a"b', r"a\"b"),
            ("a\\b", r"a\\b"),
            ("a\nb", r"a\nb"),
            ("é", r"\u00e9"),
        ],
    )
    def test_found_where_the_type_is_escaped(self, kind: str, written: str) -> None:
        assert handlers(kind).find(message(f'{{"type":"{written}"}}')) is not None

    @given(st.text(min_size=1), st.booleans(), st.data())
    def test_any_type_is_found_however_it_is_written(
        self, kind: str, ascii: bool, data: st.DataObject
    ) -> None:
        written = json.dumps(kind, ensure_ascii=ascii)
        if data.draw(st.booleans()):
            written = '"' + "".join(f"\\u{ord(c):04x}" if ord(c) < 65536 else c for c in kind) + '"'
        try:
            json.loads(written).encode()
        except UnicodeEncodeError:
            return  # half a surrogate pair is no text
        assert handlers(kind, "x").find(message(f'{{"type":{written}}}')) is not None

    def test_what_cannot_matter_is_not_parsed(self) -> None:
        class Unparsed(Message):
            @property
            def data(self) -> dict[str, Any]:
                raise AssertionError("parsed")

        def unparsed(payload: str) -> Message:
            return Unparsed(1, "room", payload, datetime.now(UTC), len(payload), 1)

        assert handlers().find(unparsed('{"type":"chat.message"}')) is None
        plain = '{"type":"other","text":"new\\nline, \\"chat.message\\", é","n":1}'
        assert handlers("chat.message").find(unparsed(plain)) is None
        with pytest.raises(AssertionError, match="parsed"):
            handlers("chat.message").find(unparsed('{"type":"chat.message"}'))


class TestOverriding:
    """A name of ours that is taken by accident is found out when the class is made."""

    def define(self, base: type = JsonConsumer, **names: Any) -> type:
        return type("Room", (base,), {"__module__": __name__, **names})

    @pytest.mark.parametrize(
        ("name", "given", "sentence"),
        [
            ("groups", ["news"], r"call self\.group_add\('news'\) in connect\(\)"),
            ("user_id", "ada", "identify"),
            ("channel_name", "mine", "another name"),
            ("state", "idle", "another name"),
            ("run", nothing, r"override serve\(\)"),
            ("_handle", nothing, "another name"),
        ],
    )
    def test_what_is_not_to_be_overridden(self, name: str, given: Any, sentence: str) -> None:
        with pytest.raises(ConfigurationError, match=rf"Room\.{name} would take.*{sentence}"):
            self.define(JsonConsumer, **{name: given})

    def test_a_method_called_start_is_ones_own(self) -> None:
        self.define(start=nothing, error="none", life_of_brian=1)

    @pytest.mark.parametrize(
        "name", ["connect", "disconnect", "forward", "receive_json", "serve", "close", "send_json"]
    )
    def test_what_is_not_async(self, name: str) -> None:
        def method(self: Any, *args: Any, **kwargs: Any) -> None: ...

        with pytest.raises(ConfigurationError, match=rf"Room\.{name} must be an async method"):
            self.define(JsonConsumer, **{name: method})

    def test_other_parameters(self) -> None:
        async def no_parameter(self: Any) -> None: ...

        async def of_channels(self: Any, text_data: Any = None, bytes_data: Any = None) -> None: ...

        async def of_two(self: Any, content: Any, also: Any) -> None: ...

        async def wider(self: Any, *args: Any, **kwargs: Any) -> None: ...

        for name in ("disconnect", "forward", "receive_json", "dispatch", "truncated", "serve"):
            given = of_two if name in ("truncated", "serve") else no_parameter
            for each in (given, of_two):
                with pytest.raises(ConfigurationError, match=rf"Room\.{name} has other parameters"):
                    self.define(JsonConsumer, **{name: each})
            self.define(JsonConsumer, **{name: wider})
        says = r"async def receive\(self, text: str \| None = None, bytes: bytes \| None = None\)"
        with pytest.raises(ConfigurationError, match=says):
            self.define(WebSocketConsumer, receive=of_channels)
        with pytest.raises(ConfigurationError, match=r"receive_bytes\(self, data: bytes\)"):
            self.define(BytesConsumer, receive_bytes=no_parameter)

    def test_a_mixin(self) -> None:
        class News:
            groups: ClassVar[list[str]] = ["news"]

        with pytest.raises(ConfigurationError, match=r"Room\.groups"):
            type("Room", (News, JsonConsumer), {"__module__": __name__})
        type("Room", (JsonConsumer, News), {"__module__": __name__})

    def test_what_may_be_overridden(self) -> None:
        class Base(WebSocketConsumer):
            async def forward(self, message: Any) -> None: ...

            @property
            def resume_position(self) -> str | None:
                return None

        class Room(Base, JsonConsumer):
            async def accept(self, *args: Any, **options: Any) -> None: ...

            async def close(self, code: int = 1000, reason: str | None = None) -> None: ...

        class Nested(Room):
            async def receive_json(self, content: Any) -> None: ...

        assert Nested._is_selective

    def test_a_decorated_method(self) -> None:
        def decorated(function: Any) -> Any:
            @functools.wraps(function)
            def called(*args: Any) -> Any:
                return function(*args)

            return called

        class Room(JsonConsumer):
            @decorated
            async def receive_json(self, content: Any) -> None: ...

        assert Room.receive_json


class TestSignatures:
    def test_what_is_defined_below_the_class(self) -> None:
        (parameter,) = Early._connect.parameters
        assert isinstance(parameter.annotation, Unresolved)
        signature = Early.as_endpoint().__signature__  # type: ignore[attr-defined]
        assert signature.parameters["it"].annotation is Late

    def test_what_is_not_there(self) -> None:
        class Room(JsonConsumer):
            async def connect(self, it: Nothing) -> None: ...

        with pytest.raises(ConfigurationError, match=r"Room\.connect.*'it'.*'Nothing'"):
            Room.as_endpoint()

    def test_by_place(self) -> None:
        class Room(JsonConsumer):
            async def connect(self, room: str, /) -> None: ...

        with pytest.raises(ConfigurationError, match="'room' by place"):
            Room.as_endpoint()

    def test_names_and_order(self) -> None:
        class Room(JsonConsumer):
            """A room."""

            async def connect(
                self, room: str, *args: Any, after: str | None = None, number: int, **kwargs: Any
            ) -> None: ...

        endpoint: Any = Room.as_endpoint()
        assert endpoint.__name__ == "Room"
        assert endpoint.__doc__ == "A room."
        assert [*endpoint.__signature__.parameters] == ["websocket", "room", "after", "number"]


class Early(JsonConsumer):
    async def connect(self, it: Late) -> None: ...


class Late(BaseModel):
    pass
