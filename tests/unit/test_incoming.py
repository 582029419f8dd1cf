"""What a client has sent, whatever it is: its content, or an error, and nothing else."""

from __future__ import annotations

import json
import math
from typing import Any

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel

from pgchannels.web.errors import ValidationFailed
from pgchannels.web.incoming import Frame

contents = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)
# Every code point, halves of pairs too.
texts = st.text(st.characters())


@given(raw=st.binary() | texts | contents.map(json.dumps))
@example(raw="")
@example(raw=b"")
@example(raw=b"\xff\xfe")
@example(raw="\ud800")
@example(raw='"\\ud800"')
@example(raw='"\ud800"')
@example(raw="NaN")
@example(raw="[Infinity]")
@example(raw="1e999")
@example(raw="9" * 5000)
@example(raw="\ufeff{}")
@example(raw=b"\xef\xbb\xbf{}")
@example(raw='{"type": 1}')
@example(raw='{"type": "a", "type": null}')
def test_whatever_it_is_it_is_parsed_or_refused(raw: str | bytes) -> None:
    frame = Frame(raw)
    if isinstance(raw, bytes):
        assert frame.size == len(raw)
    else:
        assert frame.size == len(raw.encode(errors="surrogatepass"))
    refused: ValidationFailed | None = None
    content: Any = None
    try:
        content = frame.json()
    except ValidationFailed as error:
        refused = error
    if refused is None:
        assert frame.json() == content
        assert frame.type is None or frame.type == content["type"]
    else:
        assert refused.code == "invalid_json"
        assert refused.describe().response().encode()
        assert frame.type is None
        with pytest.raises(ValidationFailed):
            frame.json()
    assert frame.raw is raw


def test_changing_the_content_changes_nothing_for_the_next_one() -> None:
    frame = Frame('{"type": "say", "text": "hello"}')
    frame.json().clear()
    assert frame.json() == frame.shared_json() == {"type": "say", "text": "hello"}
    assert frame.type == "say"


@given(content=contents, is_text=st.booleans())
def test_json_is_what_was_encoded(content: Any, is_text: bool) -> None:
    text = json.dumps(content)
    frame = Frame(text if is_text else text.encode())
    assert frame.json() == content
    assert frame.is_text is is_text


@pytest.mark.parametrize("raw", ["NaN", "-Infinity", "[1e999]", '"\\udfff"', "{'a': 1}", "01"])
def test_what_python_may_call_json_is_refused(raw: str) -> None:
    for sent in (raw, raw.encode()):
        with pytest.raises(ValidationFailed) as caught:
            Frame(sent).json()
        assert caught.value.describe().code == "invalid_json"


@pytest.mark.parametrize("levels", [1_100, 100_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
@pytest.mark.parametrize("closed", [True, False])
def test_depth_is_no_danger(levels: int, opening: str, closing: str, closed: bool) -> None:
    inner = "1" if closed else ""
    raw = opening * levels + inner + closing * levels * closed
    for sent in (raw, raw.encode()):
        frame = Frame(sent)
        with pytest.raises(ValidationFailed):
            frame.json()
        assert frame.type is None


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        ('{"type": "chat.send"}', "chat.send"),
        (b'{"type": "chat.send"}', "chat.send"),
        ('{"type": ""}', ""),
        ('{"type": 5}', None),
        ('{"type": null}', None),
        ('{"kind": "chat.send"}', None),
        ('["type"]', None),
        ('"type"', None),
        ("null", None),
        ("{", None),
    ],
)
def test_the_type_is_that_of_an_object(raw: str | bytes, kind: str | None) -> None:
    assert Frame(raw).type == kind


class Point(BaseModel):
    x: int


def test_replace_makes_another_one_of_the_same_kind() -> None:
    text, binary = Frame('{"a": 1}'), Frame(b'{"a": 1}')
    content = text.json()
    assert text.replace(content={"b": [Point(x=1)]}) == Frame('{"b":[{"x":1}]}')
    assert binary.replace(content={"b": None}) == Frame(b'{"b":null}')
    assert text.replace(content=None).json() is None
    assert text.replace(b"x") == Frame(b"x")
    assert text.replace(raw="") == Frame("")
    assert text == Frame('{"a": 1}')
    assert text.json() == content
    with pytest.raises(AttributeError):
        text.raw = "{}"  # type: ignore[misc]


@given(first=contents, content=contents)
def test_what_replaces_it_reads_as_it_was_given(first: Any, content: Any) -> None:
    replaced = Frame(json.dumps(first)).replace(content=content)
    assert replaced.json() == orjson.loads(orjson.dumps(content))


def test_replace_takes_one_of_two() -> None:
    frame = Frame("{}")
    with pytest.raises(TypeError):
        frame.replace()  # type: ignore[call-overload]
    with pytest.raises(TypeError):
        frame.replace("a", content=1)  # type: ignore[call-overload]
    with pytest.raises(TypeError):
        frame.replace(content=object())


def test_frames_are_values() -> None:
    assert Frame("a") == Frame("a") != Frame(b"a")
    assert len({Frame("a"), Frame("a"), Frame("b")}) == 2
    assert Frame("a") != "a"
    assert not math.isnan(Frame("1").json())


def test_what_it_says_of_itself_shows_no_content() -> None:
    assert repr(Frame('{"token": "secret"}')) == "<Frame text 19 bytes>"
    assert repr(Frame("é".encode())) == "<Frame binary 2 bytes>"
