"""Positions, channel names, payloads and messages: the laws that every other module relies on."""

from __future__ import annotations

import json
from collections import OrderedDict, UserDict
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, timezone
from enum import Enum
from types import MappingProxyType
from typing import Any, ClassVar
from uuid import UUID

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgchannels.errors import (
    InvalidChannel,
    InvalidMessage,
    InvalidPayload,
    InvalidPosition,
    MessageTooLarge,
)
from pgchannels.messages import (
    BEGINNING,
    Message,
    Position,
    check_channel,
    check_ttl,
    encode_payload,
)

NAN = float("nan")
INFINITY = float("inf")
CREATED = datetime(2026, 3, 29, 1, 30, 0, 123456, tzinfo=timezone(timedelta(hours=2)))

positions = st.builds(
    Position,
    st.integers(min_value=1, max_value=999_999_999),
    st.integers(min_value=0, max_value=2**63 - 1),
)
# What orjson and the standard library read and write alike: 64-bit integers, finite floats, text
# that UTF-8 can carry.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(min_value=-(2**63), max_value=2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3)
)
payloads = st.dictionaries(texts, values, max_size=4)


def message(payload: str = '{"text": "hello"}', *, id: int = 7, epoch: int = 1) -> Message:
    return Message(id, "room:1", payload, CREATED, len(payload.encode()), epoch)


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
        with pytest.raises(InvalidPayload, match="message 7"):
            m["deep"]

    def test_created_at_always_has_microseconds(self) -> None:
        m = Message(1, "c", "{}", datetime(2026, 1, 1, tzinfo=UTC), 2, 1)
        assert json.loads(m.envelope)["created_at"] == "2026-01-01T00:00:00.000000+00:00"

    def test_repr_is_short(self) -> None:
        assert repr(message()) == '<Message 1-7 \'room:1\' {"text": "hello"}>'
        assert len(repr(message('{"a": "' + "x" * 10_000 + '"}'))) < 150
