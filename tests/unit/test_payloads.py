"""Payloads: what becomes JSON, what is refused, and bytes that come out as they went in."""

from __future__ import annotations

import inspect
import ipaddress
import json
import math
import sys
from collections import OrderedDict, UserDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import Enum
from types import MappingProxyType
from typing import Any, ClassVar
from uuid import UUID

import orjson
import pytest
from hypothesis import given
from pydantic import VERSION, AnyUrl, BaseModel, ConfigDict, Field, RootModel, computed_field

from pgchannels.envelopes import websocket_bytes_message, websocket_json_message
from pgchannels.errors import InvalidPayload, MessageTooLarge
from pgchannels.memory import MemoryLayer
from pgchannels.messages import Message
from pgchannels.payloads import JSONSerializer, attach, encode_payload, loads
from pgchannels.web.frames import encode_json, unwrapped
from pgchannels.web.incoming import Frame
from tests.support.payloads import payloads, payloads_with_bytes

NAN = float("nan")
INFINITY = float("inf")


@dataclass
class Point:
    x: float
    nested: Any = None


@dataclass(slots=True)
class Slotted:
    x: float


@dataclass
class Marked:
    x: float
    unset: None = None
    worst: ClassVar[float] = NAN
    _cache: float = field(default=NAN)


class Limit(Enum):
    NONE = INFINITY
    ZERO = 0.0
    BOTH = (1.0, NAN)


class TestEncodePayload:
    @given(payloads)
    def test_what_was_sent_can_be_read(self, payload: dict[str, Any]) -> None:
        encoded = encode_payload(payload, max_size=2**20)
        assert json.loads(encoded.text) == payload
        assert orjson.loads(encoded.text) == payload
        assert (encoded.attachments, encoded.pointers) == ((), ())

    @pytest.mark.parametrize(
        "payload",
        [
            MappingProxyType({"a": 1}),
            OrderedDict(a=1),
            UserDict({"a": 1}),
            Message(7, "room", '{"a": 1}', datetime.now(UTC), 8, 1),
        ],
    )
    def test_any_mapping(self, payload: object) -> None:
        assert encode_payload(payload, max_size=100).text == '{"a":1}'

    def test_the_order_of_keys_is_kept(self) -> None:
        assert encode_payload({"b": 1, "a": 2}, max_size=100).text == '{"b":1,"a":2}'

    def test_values_beyond_json(self) -> None:
        payload = {
            "at": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
            "id": UUID(int=1),
            "point": Point(1.5),
        }
        assert json.loads(encode_payload(payload, max_size=200).text) == {
            "at": "2026-01-02T03:04:05+00:00",
            "id": "00000000-0000-0000-0000-000000000001",
            "point": {"x": 1.5, "nested": None},
        }

    @pytest.mark.parametrize("payload", [None, [], [("a", 1)], "{}", b"{}", 1, 1.5, Point(1)])
    def test_not_a_mapping(self, payload: object) -> None:
        with pytest.raises(InvalidPayload, match=type(payload).__name__):
            encode_payload(payload, max_size=100)

    @pytest.mark.parametrize(
        "value",
        [
            object(),
            iter([1]),
            int,
            "\ud800",
            "a\udfffb",
            "\ud83d\ude80",  # two halves do not make a character in a Python string
            2**64,
            -(2**63) - 1,
            10**400,
        ],
    )
    @pytest.mark.parametrize("depth", [0, 1, 5])
    def test_what_json_cannot_carry(self, value: object, depth: int) -> None:
        for _ in range(depth):
            value = [{"in": value}]
        with pytest.raises(InvalidPayload):
            encode_payload({"value": value}, max_size=1000)

    @pytest.mark.parametrize("key", [1, None, True, 1.5, b"a", ("a",), "\ud800"])
    def test_keys_that_json_cannot_carry(self, key: Any) -> None:
        with pytest.raises(InvalidPayload):
            encode_payload({key: 1}, max_size=100)
        with pytest.raises(InvalidPayload):
            encode_payload({"a": [{key: 1}]}, max_size=100)

    @pytest.mark.parametrize(
        "value",
        [
            NAN,
            INFINITY,
            -INFINITY,
            [1, [NAN]],
            (1.0, (INFINITY,)),
            {"a": {"b": [{"c": -INFINITY}]}},
            Point(NAN),
            Point(1.0, nested=[Point(2.0, nested=NAN)]),
            Slotted(INFINITY),
            (Slotted(1.0), [{"a": Point(NAN)}]),
            Limit.NONE,
            [Limit.BOTH],
        ],
    )
    def test_floats_that_json_cannot_express(self, value: object) -> None:
        with pytest.raises(InvalidPayload, match="NaN or an infinity"):
            encode_payload({"ok": None, "value": value}, max_size=1000)

    def test_a_null_is_no_nan(self) -> None:
        payload = {"a": None, "b": "null", "null": [1.5, Limit.ZERO], "c": Marked(1.0)}
        assert encode_payload(payload, max_size=100).text == (
            '{"a":null,"b":"null","null":[1.5,0.0],"c":{"x":1.0,"unset":null}}'
        )

    @pytest.mark.parametrize("content", [None, b"bytes"])
    def test_endless_nesting(self, content: object) -> None:
        mapping: dict[str, Any] = {"content": content}
        mapping["self"] = mapping
        items: list[Any] = [content]
        items.append((items,))
        for payload in (mapping, {"items": items}):
            with pytest.raises(InvalidPayload):
                encode_payload(payload, max_size=100)

    @pytest.mark.parametrize("content", [None, b"bytes"])
    @pytest.mark.parametrize("depth", [1000, 100_000])
    def test_deep_nesting(self, depth: int, content: object) -> None:
        payload: Any = {"content": content}
        for n in range(depth):
            payload = {"in": payload} if n % 2 else {"in": [payload]}
        with pytest.raises(InvalidPayload, match="nested too deep"):
            encode_payload(payload, max_size=2**20)

    def test_wherever_it_is_called_from(self) -> None:
        # With next to nothing left of the stack, it is still a matter of the payload.
        payload: Any = {"content": b"bytes"}
        for _ in range(200):
            payload = {"in": payload}

        def call(frames: int) -> None:
            if frames:
                call(frames - 1)
            else:
                encode_payload(payload, max_size=2**20)

        left = sys.getrecursionlimit() - len(inspect.stack())
        with pytest.raises(InvalidPayload, match="nested too deep"):
            call(left - 100)

    @pytest.mark.parametrize("character", ["a", "é", "日", "🚀", "\n", "\0"])
    def test_the_size_limit_is_exact_and_in_bytes(self, character: str) -> None:
        payload = {"text": character * 10}
        size = len(orjson.dumps(payload))
        assert len(encode_payload(payload, max_size=size).text.encode()) == size
        with pytest.raises(MessageTooLarge) as raised:
            encode_payload(payload, max_size=size - 1)
        assert (raised.value.size, raised.value.limit) == (size, size - 1)

    def test_the_smallest(self) -> None:
        assert encode_payload({}, max_size=2).text == "{}"


class TestBytes:
    @given(payloads_with_bytes)
    def test_they_come_out_as_they_went_in(self, payload: dict[str, Any]) -> None:
        encoded = encode_payload(payload, max_size=2**20)
        assert len(encoded.pointers) == len(encoded.attachments)
        data = orjson.loads(encoded.text)
        attach(data, encoded.pointers, encoded.attachments)
        assert data == payload

    @pytest.mark.parametrize(
        ("payload", "text", "pointers"),
        [
            ({"a": b"1"}, '{"a":null}', ("/a",)),
            ({"a": {"b": [0, b"1"]}}, '{"a":{"b":[0,null]}}', ("/a/b/1",)),
            ({"": b"1"}, '{"":null}', ("/",)),
            ({"~": {"/": b"1"}}, '{"~":{"/":null}}', ("/~0/~1",)),
            ({"~1": b"1", "~01": b"2"}, '{"~1":null,"~01":null}', ("/~01", "/~001")),
            ({"0": ((b"1",),)}, '{"0":[[null]]}', ("/0/0/0",)),
            ({"é": b"1"}, '{"é":null}', ("/é",)),
        ],
    )
    def test_pointers(self, payload: Any, text: str, pointers: tuple[str, ...]) -> None:
        encoded = encode_payload(payload, max_size=100)
        assert (encoded.text, encoded.pointers) == (text, pointers)

    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
    def test_all_kinds(self, kind: Callable[[bytes], Any]) -> None:
        encoded = encode_payload({"a": kind(b"\0\xff")}, max_size=100)
        assert encoded.attachments == (b"\0\xff",)
        assert type(encoded.attachments[0]) is bytes

    def test_what_was_given_is_left_alone(self) -> None:
        payload = {"a": [b"1"], "b": {"c": b"2"}}
        encode_payload(payload, max_size=100)
        assert payload == {"a": [b"1"], "b": {"c": b"2"}}

    def test_they_count(self) -> None:
        payload = {"a": b"12345"}
        size = len('{"a":null}') + 5
        assert encode_payload(payload, max_size=size).attachments == (b"12345",)
        with pytest.raises(MessageTooLarge) as raised:
            encode_payload(payload, max_size=size - 1)
        assert raised.value.size == size

    @pytest.mark.parametrize(
        "value",
        [object(), NAN, 2**64, "\ud800", {1: b"1"}, {"\ud800": b"1"}, Point(b"1")],  # type: ignore[arg-type]
    )
    def test_beside_what_json_cannot_carry(self, value: object) -> None:
        with pytest.raises(InvalidPayload):
            encode_payload({"ok": b"1", "value": value}, max_size=1000)

    @pytest.mark.parametrize(
        ("data", "pointers", "attachments"),
        [
            ({"a": None}, ["/b/c"], [b"1"]),
            ({"a": [None]}, ["/a/1"], [b"1"]),
            ({"a": [None]}, ["/a/x"], [b"1"]),
            ({"a": 5}, ["/a/b"], [b"1"]),
            ({"a": "text"}, ["/a/0"], [b"1"]),
            ({"a": None}, [""], [b"1"]),
            ({"a": None}, ["a"], [b"1"]),
            ({"a": None}, ["/a"], []),
            ({"a": None}, [], [b"1"]),
        ],
    )
    def test_pointers_that_lead_nowhere(
        self, data: Any, pointers: list[str], attachments: list[bytes]
    ) -> None:
        with pytest.raises(InvalidPayload, match="no place"):
            attach(data, pointers, attachments)


class Standard:
    """The standard library's JSON, which writes and reads what is none, and escapes surrogates."""

    def dumps(self, payload: Mapping[str, Any]) -> str:
        return json.dumps(payload)

    def loads(self, text: str) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads(text)
        return loaded


class TestSerializers:
    @given(payloads_with_bytes)
    def test_ones_own(self, payload: dict[str, Any]) -> None:
        encoded = encode_payload(payload, max_size=2**20, serializer=Standard())
        data = Standard().loads(encoded.text)
        attach(data, encoded.pointers, encoded.attachments)
        assert data == payload

    def test_types_of_ones_own(self) -> None:
        class Decimals(Standard):
            def dumps(self, payload: Mapping[str, Any]) -> str:
                return json.dumps(payload, default=str)

        payload = {"price": Decimal("1.10")}
        assert encode_payload(payload, max_size=99).text == '{"price":"1.10"}'
        assert (
            encode_payload(payload, max_size=99, serializer=Decimals()).text == '{"price": "1.10"}'
        )

    def test_bytes_that_it_can_encode_stay_in_the_text(self) -> None:
        class Hexadecimal(Standard):
            def dumps(self, payload: Mapping[str, Any]) -> str:
                return json.dumps(payload, default=bytes.hex)

        encoded = encode_payload({"a": b"\xff"}, max_size=99, serializer=Hexadecimal())
        assert (encoded.text, encoded.attachments) == ('{"a": "ff"}', ())

    @pytest.mark.parametrize("text", ["", "[]", '"text"', "{", "{'a': 1}", "{}}", b"{}", None, {}])
    def test_what_it_makes_must_be_an_object(self, text: Any) -> None:
        class Broken(Standard):
            def dumps(self, payload: Mapping[str, Any]) -> str:
                return text  # type: ignore[no-any-return]

        with pytest.raises(InvalidPayload, match="serialiser"):
            encode_payload({}, max_size=99, serializer=Broken())

    @pytest.mark.parametrize("value", [NAN, INFINITY, "\ud800", 10**400])
    def test_what_only_it_can_read_is_refused(self, value: object) -> None:
        with pytest.raises(InvalidPayload, match="not JSON"):
            encode_payload({"a": value}, max_size=1000, serializer=Standard())

    @pytest.mark.parametrize("depth", [1500, 100_000])
    def test_its_recursion_ends(self, depth: int) -> None:
        payload: Any = {}
        for _ in range(depth):
            payload = {"in": payload}
        with pytest.raises(InvalidPayload):
            encode_payload(payload, max_size=2**24, serializer=Standard())

    def test_what_it_raises_of_its_own_passes(self) -> None:
        class Failing(Standard):
            def dumps(self, payload: Mapping[str, Any]) -> str:
                raise LookupError("no such plan")

        with pytest.raises(LookupError, match="no such plan"):
            encode_payload({}, max_size=99, serializer=Failing())


class Author(BaseModel):
    name: str


class Post(BaseModel):
    author: Author
    at: datetime
    image: bytes = b""
    related: Any = None


class TestModels:
    def test_a_model(self) -> None:
        post = Post(author=Author(name="é"), at=datetime(2026, 1, 2, tzinfo=UTC), image=b"\xff")
        encoded = encode_payload(post, max_size=200)
        assert orjson.loads(encoded.text) == {
            "author": {"name": "é"},
            "at": "2026-01-02T00:00:00Z",
            "image": None,
            "related": None,
        }
        assert (encoded.pointers, encoded.attachments) == (("/image",), (b"\xff",))

    def test_a_class_is_none(self) -> None:
        with pytest.raises(InvalidPayload, match="must be a mapping"):
            encode_payload(Author, max_size=100)

    def test_one_that_is_no_object(self) -> None:
        with pytest.raises(InvalidPayload, match="must be a mapping"):
            encode_payload(RootModel[list[int]]([1]), max_size=100)

    def test_one_that_holds_itself(self) -> None:
        post = Post(author=Author(name="a"), at=datetime(2026, 1, 2, tzinfo=UTC))
        post.related = post
        with pytest.raises(InvalidPayload):
            encode_payload(post, max_size=100)


class Line(BaseModel):
    model_config = ConfigDict(serialize_by_alias=True)

    price: Decimal = Field(Decimal("1.10"), alias="unitPrice")
    secret: str = Field("hidden", exclude=True)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def double(self) -> Decimal:
        return 2 * self.price


class Order(BaseModel):
    lines: list[Line] = [Line()]
    tags: set[str] = {"a"}
    url: AnyUrl = AnyUrl("https://example.org/")
    at: datetime = datetime(2026, 1, 2, tzinfo=UTC)
    lasts: timedelta = timedelta(hours=1)


LINE = '{"unitPrice":"1.10","double":"2.20"}'
ORDER = (
    f'{{"lines":[{LINE}],"tags":["a"],"url":"https://example.org/","at":"2026-01-02T00:00:00Z",'
    '"lasts":"PT1H"}'
)

# Older versions of pydantic refuse one, as they do any type that they do not know.
DEQUE: list[tuple[Any, str]] = [(deque([1, Line()]), f"[1,{LINE}]")] if VERSION >= "2.14" else []

VALUES: list[tuple[Any, str]] = [
    (Order(), ORDER),
    ([Order(), {"in": (Line(),)}], f'[{ORDER},{{"in":[{LINE}]}}]'),
    (RootModel[list[Decimal]]([Decimal("0.10")]), '["0.10"]'),
    (RootModel[dict[str, Line]]({"a": Line()}), f'{{"a":{LINE}}}'),
    (Decimal("1.10"), '"1.10"'),
    ({"only"}, '["only"]'),
    (frozenset({Decimal(1)}), '["1"]'),
    *DEQUE,
    (AnyUrl("https://example.org/"), '"https://example.org/"'),
    (ipaddress.ip_address("::1"), '"::1"'),
    (timedelta(hours=1), '"PT1H"'),
    (UUID(int=1), '"00000000-0000-0000-0000-000000000001"'),
    (datetime(2026, 1, 2, tzinfo=UTC), '"2026-01-02T00:00:00+00:00"'),
    (2**64 - 1, "18446744073709551615"),
]


class TestAllWays:
    """The same text, in whichever way a value is published or sent."""

    @pytest.mark.parametrize(("value", "text"), VALUES)
    def test_inside_of_a_dictionary(self, value: Any, text: str) -> None:
        whole = f'{{"value":{text}}}'
        assert encode_payload({"value": value}, max_size=1000).text == whole
        assert encode_payload(RootModel({"value": value}), max_size=1000).text in (
            whole,
            whole.replace("+00:00", "Z"),  # pydantic's way, inside of a model
        )
        assert encode_json({"value": value}) == whole
        assert Frame("").replace(content={"value": value}).raw == whole

    @pytest.mark.parametrize(
        ("model", "text"),
        [(Order(), ORDER), (Line(), LINE), (RootModel({"a": Line()}), f'{{"a":{LINE}}}')],
    )
    async def test_whole_models(self, model: BaseModel, text: str) -> None:
        async with MemoryLayer() as layer, layer.subscribe("room") as stream:
            await layer.send("room", model)
            await layer.group_send("room", model)
            await layer.send_ephemeral("room", model)
            for _ in range(3):
                assert (await anext(stream)).payload == text
            await layer.send_json_message("room", model)
            assert unwrapped(await anext(stream)) == text
        assert encode_json(model) == text

    def test_bytes_in_a_model_are_attachments_wherever_it_is(self) -> None:
        post = Post(author=Author(name="a"), at=datetime(2026, 1, 2, tzinfo=UTC), image=b"\xff")
        post.related = {3: [b"text", Decimal("1.10")]}
        encoded = encode_payload({"posts": [post]}, max_size=1000)
        assert encoded.text == (
            '{"posts":[{"author":{"name":"a"},"at":"2026-01-02T00:00:00Z","image":null,'
            '"related":{"3":[null,"1.10"]}}]}'
        )
        assert encoded.pointers == ("/posts/0/image", "/posts/0/related/3/0")
        assert encoded.attachments == (b"\xff", b"text")

    @pytest.mark.parametrize("value", [NAN, {"a": {-math.inf}}, (NAN,), RootModel(NAN)])
    def test_no_number_becomes_null(self, value: Any) -> None:
        contents: list[Any] = [{"value": value}, {"value": [RootModel(value)]}]
        for content in contents:
            with pytest.raises(InvalidPayload, match="NaN"):
                encode_payload(content, max_size=1000)
            with pytest.raises(InvalidPayload, match="NaN"):
                encode_json(content)

    def test_an_integer_beyond_64_bits_is_refused_in_words_that_help(self) -> None:
        values: list[Any] = [2**64, -(2**63) - 1, RootModel(2**70)]
        for value in values:
            with pytest.raises(InvalidPayload, match="beyond 64 bits; send it as a text"):
                encode_payload({"value": value}, max_size=1000)
            with pytest.raises(InvalidPayload, match="beyond 64 bits; send it as a text"):
                encode_json({"value": value})


class TestLoads:
    @pytest.mark.parametrize(
        "number",
        [
            *(2**53 + 1, 2**63, 2**64 - 1, 2**64, 2**64 + 1, -(2**63), -(2**63) - 1),
            *(10**300 + 1, 10**18 + 1, 10**19 + 1),
        ],
    )
    def test_integers_are_exact(self, number: int) -> None:
        text = f'{{"n": [{number}, 1.5, "{number}"]}}'
        for raw in (text, text.encode()):
            loaded = loads(raw)
            assert loaded == {"n": [number, 1.5, str(number)]}
            assert type(loaded["n"][0]) is int
        assert Frame(text).json() == JSONSerializer().loads(text) == loads(text)

    @given(payloads)
    def test_reads_as_orjson(self, payload: dict[str, Any]) -> None:
        text = orjson.dumps(payload)
        assert loads(text) == loads(text.decode()) == orjson.loads(text)

    @pytest.mark.parametrize("text", ["[1e400]", "[NaN]", f"[{10**400}]", '["\\ud800"]', "[1"])
    def test_what_is_not_json(self, text: str) -> None:
        with pytest.raises(ValueError, match="line 1"):
            loads(text)

    def test_too_deep_for_pythons_own_parser(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def too_deep(text: str) -> Any:
            raise RecursionError

        monkeypatch.setattr(json, "loads", too_deep)
        assert loads("[1, 1844674407370955161]") == [1, 1844674407370955161]
        with pytest.raises(ValueError, match="too deep"):
            loads("[18446744073709551616]")


def test_the_default_reads_what_it_wrote() -> None:
    serializer = JSONSerializer()
    assert serializer.loads(serializer.dumps({"a": [1, None, "é"]})) == {"a": [1, None, "é"]}
    with pytest.raises(ValueError, match="NaN"):
        serializer.dumps({"a": NAN})


class TestEnvelopes:
    def test_text_frames(self) -> None:
        envelope = websocket_json_message([1, {"a": None}], trace="x", type="forged", mode="bytes")
        assert envelope == {
            "type": "websocket.send",
            "mode": "json",
            "body": [1, {"a": None}],
            "trace": "x",
        }
        assert envelope.mode == "json"

    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
    def test_binary_frames(self, kind: Callable[[bytes], Any]) -> None:
        envelope = websocket_bytes_message(kind(b"\xff"))
        assert envelope == {"type": "websocket.send", "mode": "bytes", "body": b"\xff"}
        assert encode_payload(envelope, max_size=100).attachments == (b"\xff",)

    @pytest.mark.parametrize("body", ["text", None, 5, [1]])
    def test_no_bytes(self, body: Any) -> None:
        with pytest.raises(InvalidPayload, match="must be bytes"):
            websocket_bytes_message(body)
