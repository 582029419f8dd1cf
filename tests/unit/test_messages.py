"""Positions, times to live and messages: the laws that every other module relies on."""

from __future__ import annotations

import json
from base64 import b64decode
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, Literal

import orjson
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from pgchannels.channels import DIRECT
from pgchannels.errors import InvalidMessage, InvalidPayload, InvalidPosition
from pgchannels.messages import (
    ATTACHMENTS,
    BEGINNING,
    EXCEPT,
    FRAME,
    ONLY,
    Message,
    Position,
    check_ttl,
)
from pgchannels.payloads import attach, encode_payload
from tests.support.payloads import payloads, payloads_with_bytes, texts

NAN = float("nan")
INFINITY = float("inf")
CREATED = datetime(2026, 3, 29, 1, 30, 0, 123456, tzinfo=timezone(timedelta(hours=2)))


class Page(BaseModel):
    position: Position


positions = st.builds(
    Position,
    st.integers(min_value=1, max_value=999_999_999),
    st.integers(min_value=0, max_value=2**63 - 1),
)


def message(
    payload: str = '{"text": "hello"}',
    *,
    id: int = 7,
    epoch: int = 1,
    channel: str = "room:1",
    headers: dict[str, Any] | str | None = None,
    **options: Any,
) -> Message:
    text = json.dumps(headers) if isinstance(headers, dict) else headers
    return Message(id, channel, payload, CREATED, len(payload.encode()), epoch, text, **options)


def with_bytes(payload: dict[str, Any], **options: Any) -> Message:
    """As it comes back after *payload* was sent."""
    encoded = encode_payload(payload, max_size=2**20)
    headers = {ATTACHMENTS: json.dumps(encoded.pointers)} if encoded.pointers else None
    return message(encoded.text, headers=headers, attachments=encoded.attachments, **options)


class TestPosition:
    @given(positions)
    def test_parse_reads_what_str_wrote(self, position: Position) -> None:
        assert Position.parse(str(position)) == position

    def test_the_beginning_is_0(self) -> None:
        assert str(BEGINNING) == "0"
        assert Position.parse("0") == BEGINNING

    @given(positions)
    def test_a_position_is_taken_as_it_is(self, position: Position) -> None:
        assert Position.parse(position) is position

    @given(st.text())
    def test_any_text_is_a_position_of_its_own_or_refused(self, text: str) -> None:
        try:
            position = Position.parse(text)
        except InvalidPosition:
            return
        assert str(position) == text  # one spelling only, so that texts can be compared

    @given(st.just(BEGINNING) | positions)
    def test_a_model_has_it_as_its_text(self, position: Position) -> None:
        written = Page(position=position).model_dump_json()
        assert json.loads(written) == {"position": str(position)}
        for read in (Page.model_validate_json(written), Page.model_validate(json.loads(written))):
            assert read.position == position
            assert isinstance(read.position, Position)

    @pytest.mark.parametrize("value", ["1", "1-", [1, 32], (1, 32), 7, None])
    def test_a_model_takes_nothing_else(self, value: object) -> None:
        with pytest.raises(ValidationError):
            Page.model_validate({"position": value})
        with pytest.raises(ValidationError):
            Page.model_validate_json(json.dumps({"position": value}))

    @pytest.mark.parametrize("mode", ["validation", "serialization"])
    def test_a_model_describes_it_as_text(
        self, mode: Literal["validation", "serialization"]
    ) -> None:
        described = Page.model_json_schema(mode=mode)["properties"]["position"]
        assert described["type"] == "string"

    def test_an_endpoint_returns_what_after_takes(self) -> None:
        app = FastAPI()

        @app.get("/")
        async def state() -> Page:
            return Page(position=Position(1, 32))

        with TestClient(app) as client:
            assert client.get("/").json() == {"position": "1-32"}

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "1",
            "00",
            "-",
            "0-5",
            "1-",
            "-5",
            "01-5",
            "1-05",
            "1-5 ",
            " 1-5",
            "1-5\n",
            "1--5",
            "1-5-5",
            "+1-5",
            "1-5.0",
            "1e3-5",
            "1_0-5",
            "1-\u0665",  # a digit, but not ASCII
            "1\u20105",  # a hyphen, but not ASCII
            "1000000000-1",
            f"1-{2**63}",
            "1-" + "9" * 5000,
        ],
    )
    def test_malformed(self, text: str) -> None:
        with pytest.raises(InvalidPosition) as raised:
            Position.parse(text)
        assert raised.value.position == text

    @pytest.mark.parametrize("given", [None, 5, 1.5, b"1-5", True, (1, 5), ["1-5"]])
    def test_not_a_text(self, given: Any) -> None:
        with pytest.raises(InvalidPosition):
            Position.parse(given)

    def test_the_last_id(self) -> None:
        assert Position.parse(f"1-{2**63 - 1}") == Position(1, 2**63 - 1)


class TestTtl:
    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            (None, None),
            (5, timedelta(seconds=5)),
            (0.25, timedelta(milliseconds=250)),
            (1e-6, timedelta(microseconds=1)),
            (timedelta(days=3), timedelta(days=3)),
            (timedelta(days=36525), timedelta(days=36525)),
        ],
    )
    def test_valid(self, given: float | timedelta | None, expected: timedelta | None) -> None:
        assert check_ttl(given) == expected

    @pytest.mark.parametrize(
        "ttl",
        [
            0,
            -1,
            NAN,
            INFINITY,
            -INFINITY,
            1e-9,  # less than PostgreSQL's resolution, and so nothing
            1e12,
            10**400,
            timedelta(0),
            timedelta(seconds=-1),
            timedelta(days=36526),
            timedelta.max,
        ],
    )
    def test_invalid(self, ttl: float | timedelta) -> None:
        with pytest.raises(InvalidMessage, match="ttl"):
            check_ttl(ttl)


class TestMessage:
    def test_is_a_mapping_over_its_payload(self) -> None:
        m = message('{"text": "hello", "n": [1, 2]}')
        assert m["text"] == "hello"
        assert dict(m) == {"text": "hello", "n": [1, 2]}
        assert list(m) == ["text", "n"]
        assert len(m) == 2
        assert "text" in m
        assert "id" not in m
        assert m.get("id") is None
        with pytest.raises(KeyError):
            m["id"]

    def test_is_read_only(self) -> None:
        with pytest.raises(TypeError):
            message()["text"] = "changed"  # type: ignore[index]

    def test_is_true_when_empty_only_as_a_mapping_is(self) -> None:
        assert len(message("{}")) == 0
        assert dict(message("{}")) == {}

    def test_compares_by_its_place_in_the_log(self) -> None:
        assert message('{"a": 1}') == message('{"b": 2}')
        assert message(id=7) != message(id=8)
        assert message(epoch=1) != message(epoch=2)
        assert message('{"a": 1}') != {"a": 1}
        assert {message(), message(), message(id=8)} == {message(), message(id=8)}

    def test_position(self) -> None:
        assert message(id=7, epoch=3).position == Position(3, 7)

    @given(
        payload=payloads, channel=texts, indent=st.sampled_from([None, 0, 3]), ascii=st.booleans()
    )
    def test_envelope(
        self, payload: dict[str, Any], channel: str, indent: int | None, ascii: bool
    ) -> None:
        text = json.dumps(payload, indent=indent, ensure_ascii=ascii)
        m = Message(7, channel, text, CREATED, len(text.encode()), 2)
        assert json.loads(m.envelope) == {
            "id": 7,
            "position": "2-7",
            "channel": channel,
            "created_at": "2026-03-28T23:30:00.123456+00:00",
            "data": payload,
        }
        assert m.envelope.endswith(f'"data":{text}}}')

    @pytest.mark.parametrize(
        "payload",
        [
            ' {\t"a" :\r\n1 } ',
            r'{"a": "é\/😀"}',
            '{"a": 1.0e2, "a": 1}',
            '{"n": 123456789012345678901234567890}',
        ],
    )
    def test_the_payload_stays_as_it_was_published(self, payload: str) -> None:
        m = message(payload)
        assert m.payload == payload
        assert payload in m.envelope
        assert json.loads(m.envelope)["data"] == json.loads(payload)

    def test_the_envelope_is_made_once_and_without_parsing(self) -> None:
        m = message('{"deep": ' + "[" * 2000 + "]" * 2000 + "}")
        assert m.envelope is m.envelope
        with pytest.raises(InvalidPayload, match="message 1-7 of 'room:1'"):
            m["deep"]

    def test_created_at_always_has_microseconds(self) -> None:
        m = Message(1, "c", "{}", datetime(2026, 1, 1, tzinfo=UTC), 2, 1)
        assert json.loads(m.envelope)["created_at"] == "2026-01-01T00:00:00.000000+00:00"

    def test_repr_is_short(self) -> None:
        assert repr(message()) == """<Message 1-7 'room:1' '{"text": "hello"}'>"""
        assert "\n" not in repr(message('{"a":\n1}'))
        assert len(repr(message('{"a": "' + "x" * 10_000 + '"}'))) < 150

    def test_its_type(self) -> None:
        assert message('{"type": "chat"}').type == "chat"
        for payload in ("{}", '{"type": null}', '{"type": 5}', '{"type": ["chat"]}'):
            assert message(payload).type is None

    def test_to_dict(self) -> None:
        assert message('{"a": [1]}').to_dict() == {
            "id": 7,
            "position": "1-7",
            "channel": "room:1",
            "created_at": "2026-03-28T23:30:00.123456+00:00",
            "data": {"a": [1]},
        }

    @given(payloads)
    def test_the_envelope_is_its_json(self, payload: dict[str, Any]) -> None:
        m = with_bytes(payload)
        assert orjson.loads(m.envelope) == m.to_dict()

    def test_a_serializer_of_ones_own_reads_it(self) -> None:
        class Loud:
            def dumps(self, payload: Any) -> str:
                raise NotImplementedError

            def loads(self, text: str) -> dict[str, Any]:
                loaded: dict[str, Any] = json.loads(text.upper())
                return loaded

        assert dict(message('{"a": "b"}', serializer=Loud())) == {"A": "B"}

    @pytest.mark.parametrize(
        "error", [TypeError("a"), KeyError("a"), ArithmeticError("a"), RuntimeError("a")]
    )
    def test_whatever_it_raises_is_told_as_one_error(self, error: Exception) -> None:
        class Broken:
            def dumps(self, payload: Any) -> str:
                raise NotImplementedError

            def loads(self, text: str) -> dict[str, Any]:
                raise error

        broken = message('{"a": "b"}', serializer=Broken())
        with pytest.raises(InvalidPayload, match="message 1-7 of 'room:1'") as raised:
            broken["a"]
        assert raised.value.__cause__ is error
        assert broken.document == {"a": "b"}

    def test_one_that_recurses_too_deep_is_told_of(self) -> None:
        class Standard:
            def dumps(self, payload: Any) -> str:
                raise NotImplementedError

            def loads(self, text: str) -> dict[str, Any]:
                loaded: dict[str, Any] = json.loads(text)
                return loaded

        deep = message('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", serializer=Standard())
        with pytest.raises(InvalidPayload, match="message 1-7 of 'room:1'"):
            deep["a"]


class TestOwn:
    def test_its_data_and_type_are_its_own_and_the_envelope_is_not_made_again(self) -> None:
        shared = with_bytes({"type": "a", "deep": {"x": 1, "bytes": b"y"}})
        own, other = shared.own(), shared.own().own()
        assert own == shared
        assert repr(own) == repr(shared)
        assert own.to_dict() == shared.to_dict()
        own["deep"]["x"] = 2
        own.data.pop("type")
        for each in (own, other, shared):
            assert each.type == "a"
        for each in (other, shared):
            assert each.data == {"type": "a", "deep": {"x": 1, "bytes": b"y"}}
        assert own.envelope is other.envelope is shared.envelope
        assert own.document is other.document is shared.document

    def test_the_type_is_the_published_one_whatever_becomes_of_the_data(self) -> None:
        read = message('{"type": "a"}')
        read.data["type"] = "b"
        assert read.type == read.own().type == "a"


class TestHeaders:
    def test_none(self) -> None:
        for m in (message(), message(headers={})):
            assert dict(m.headers) == {}
            assert m.recipients is None
            assert m.pointers == ()

    def test_texts_by_name(self) -> None:
        m = message(headers={"trace": "ä", "x": "", "n": 5, "none": None, "list": ["a"]})
        assert dict(m.headers) == {"trace": "ä", "x": ""}

    def test_sockets_do_not_get_them(self) -> None:
        m = message(headers={"secret": "trace", EXCEPT: "ws.1", FRAME: "json"})
        for hidden in ("secret", "trace", "ws.1", "pgchannels"):
            assert hidden not in m.envelope
            assert hidden not in str(m.to_dict())

    @pytest.mark.parametrize(
        "text", ["[]", "null", "5", '"text"', '{"a": 1e999}', "[" * 2000 + "]" * 2000]
    )
    def test_whatever_sql_has_published(self, text: str) -> None:
        m = message(headers=text)
        assert dict(m.headers) == {}
        assert m.is_for(None)
        assert m.is_for("ws.1")

    @pytest.mark.parametrize("value", ["", "x", "{}", '"a"', "[1, null]", "5"])
    def test_lists_that_are_none(self, value: str) -> None:
        m = message(headers={ATTACHMENTS: value, ONLY: value})
        assert list(m.pointers) == []
        assert m.recipients is not None
        assert not m.recipients
        assert not m.is_for("a")


class TestRecipients:
    def test_whoever_reads(self) -> None:
        for m in (message(), message(headers={"a": "b"})):
            assert m.recipients is None
            assert m.is_for(None)
            assert m.is_for("ws.1")

    def test_all_but_one(self) -> None:
        m = message(headers={EXCEPT: "ws.1"})
        assert m.recipients is None
        assert m.is_for(None)  # who reads without being a member
        assert m.is_for("ws.2")
        assert not m.is_for("ws.1")

    def test_several(self) -> None:
        m = message(channel=DIRECT, headers={ONLY: '["ws.1", "ws.2"]'})
        assert m.recipients is not None
        assert sorted(m.recipients) == ["ws.1", "ws.2"]
        assert m.is_for("ws.1")
        assert m.is_for("ws.2")
        assert not m.is_for("ws.3")
        assert not m.is_for(None)

    @pytest.mark.parametrize("headers", [None, {}, {"a": "b"}, "[]", '{"a": 1e999}'])
    def test_nobody(self, headers: Any) -> None:
        m = message(channel=DIRECT, headers=headers)
        assert m.recipients is not None
        assert not m.recipients
        assert not m.is_for(None)
        assert not m.is_for("ws.1")


class Strict(BaseModel):
    model_config = ConfigDict(strict=True)

    at: datetime
    tags: set[str] = set()
    picture: bytes = b""


class TestParse:
    def test_a_strict_model_takes_what_it_was_published_as(self) -> None:
        model = Strict(at=CREATED, tags={"a"})
        assert message(encode_payload(model, max_size=999).text.replace("null", '""')).parse(
            Strict
        ) == Strict(at=CREATED, tags={"a"})

    def test_types_and_adapters(self) -> None:
        m = message('{"a": 1, "b": 36893488147419103232}')
        assert m.parse(dict[str, int]) == {"a": 1, "b": 2**65}
        adapter: TypeAdapter[dict[str, int] | None] = TypeAdapter(dict[str, int] | None)
        assert m.parse(adapter) == {"a": 1, "b": 2**65}

    def test_with_attachments(self) -> None:
        class Post(BaseModel):
            picture: bytes

        assert with_bytes({"picture": b"\xff"}).parse(Post) == Post(picture=b"\xff")

    def test_deeper_than_pydantic_parses(self) -> None:
        deep = "[" * 300 + "]" * 300
        assert message(f'{{"a": {deep}}}').parse(dict[str, Any]) == {"a": json.loads(deep)}

    def test_the_error_names_the_message_and_quotes_little(self) -> None:
        text = json.dumps({"secret" * 1000: "x" * 10_000, **{str(n): "text" for n in range(50)}})
        with pytest.raises(InvalidPayload) as raised:
            message(text).parse(dict[str, int])
        assert "message 1-7 of 'room:1' is no valid dict" in str(raised.value)
        assert "and 48 more" in str(raised.value)
        assert len(str(raised.value)) < 1000
        assert "xxxx" not in str(raised.value)
        assert isinstance(raised.value.__cause__, ValidationError)

    def test_what_cannot_be_parsed(self) -> None:
        with pytest.raises(InvalidPayload, match="cannot be parsed"):
            message('{"a": ' + "[" * 1100 + "]" * 1100 + "}").parse(dict[str, Any])


class TestAttachments:
    @given(payloads_with_bytes)
    def test_they_come_out_as_they_went_in(self, payload: dict[str, Any]) -> None:
        m = with_bytes(payload)
        assert dict(m) == payload
        assert m.to_dict()["data"] == payload

    @given(payloads_with_bytes)
    def test_a_socket_can_put_them_back(self, payload: dict[str, Any]) -> None:
        m = with_bytes(payload)
        received = json.loads(m.envelope)
        attachments = received.get("attachments", {})
        assert set(received) - {"attachments"} == set(m.to_dict())
        attach(received["data"], [*attachments], [b64decode(a) for a in attachments.values()])
        assert received["data"] == payload

    def test_the_envelope(self) -> None:
        m = with_bytes({"a/b": [b"\xff", {"~": b""}]})
        assert json.loads(m.envelope)["data"] == {"a/b": [None, {"~": None}]}
        assert json.loads(m.envelope)["attachments"] == {"/a~1b/0": "/w==", "/a~1b/1/~0": ""}

    def test_without_them_there_is_no_such_key(self) -> None:
        assert set(json.loads(message().envelope)) == {
            "id",
            "position",
            "channel",
            "created_at",
            "data",
        }

    def test_a_place_that_is_not_there(self) -> None:
        m = message('{"a": 1}', headers={ATTACHMENTS: '["/b/c"]'}, attachments=[b"x"])
        with pytest.raises(InvalidPayload, match="no place"):
            m["a"]
        assert json.loads(m.envelope)["attachments"] == {"/b/c": "eA=="}


class TestEphemeral:
    def test_it_has_no_place_of_its_own(self) -> None:
        m = message('{"a": 1}', ephemeral=True)
        assert m.position == Position(1, 7)  # of the last one before it
        expected = {
            "ephemeral": True,
            "channel": "room:1",
            "created_at": "2026-03-28T23:30:00.123456+00:00",
            "data": {"a": 1},
        }
        assert json.loads(m.envelope) == m.to_dict() == expected

    def test_it_equals_nothing_but_itself(self) -> None:
        m, same = message(ephemeral=True), message(ephemeral=True)
        assert m == m
        assert m != same
        assert m != message()
        assert message() != m
        assert len({m, same, message()}) == 3

    def test_it_can_be_for_some_only(self) -> None:
        m = message(ephemeral=True, headers={EXCEPT: "ws.1"})
        assert not m.is_for("ws.1")
        assert m.is_for("ws.2")
        assert message(ephemeral=True).is_for(None)


class TestFromDict:
    @pytest.mark.parametrize("ephemeral", [False, True])
    def test_what_to_dict_gave(self, ephemeral: bool) -> None:
        m = message('{"a": [1, null]}', ephemeral=ephemeral)
        again = Message.from_dict(m.to_dict())
        assert again.to_dict() == m.to_dict()
        assert (again == m) is not ephemeral

    def test_what_a_client_got(self) -> None:
        m = message(
            '{"a": null, "b": {"c": null}}',
            headers={ATTACHMENTS: '["/a", "/b/c"]'},
            attachments=[b"x", b"\0"],
        )
        again = Message.from_dict(json.loads(m.envelope))
        assert again.data == {"a": b"x", "b": {"c": b"\0"}}
        assert json.loads(again.envelope) == json.loads(m.envelope)
        assert Message.from_dict(m.to_dict()).data == again.data

    @pytest.mark.parametrize(
        "change",
        [
            {"position": "7"},
            {"position": None},
            {"channel": None},
            {"created_at": "yesterday"},
            {"data": []},
            {"attachments": {"/a": 5}},
            {"attachments": ["/a"]},
        ],
    )
    def test_anything_else(self, change: dict[str, Any]) -> None:
        envelope = {**message().to_dict(), **change}
        with pytest.raises(InvalidMessage):
            Message.from_dict(envelope)
        with pytest.raises(InvalidMessage):
            Message.from_dict({})
