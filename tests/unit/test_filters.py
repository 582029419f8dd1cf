"""Filters: what they mean, by RFC 9535, and what is none."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgchannels import InvalidFilter, Message
from pgchannels.filters import MAX_COMPARED, MAX_DEPTH, MAX_FILTER_LENGTH, MAX_TESTS, Filter
from pgchannels.messages import ATTACHMENTS
from pgchannels.payloads import JSONSerializer


def message(payload: str, **options: Any) -> Message:
    return Message(1, "room", payload, datetime.now(UTC), len(payload.encode()), 1, **options)


def matches(text: str, data: Any) -> bool:
    return Filter.parse(text).matches(message(json.dumps(data)))


# RFC 9535, table 11, over the value of table 10; its paths are relative there.
RFC_VALUE = {"obj": {"x": "y"}, "arr": [2, 3]}
RFC_COMPARISONS = [
    ("$.absent1 == $.absent2", True),
    ("$.absent1 <= $.absent2", True),
    ("$.absent == 'g'", False),
    ("$.absent1 != $.absent2", False),
    ("$.absent != 'g'", True),
    ("1 <= 2", True),
    ("1 > 2", False),
    ("13 == '13'", False),
    ("'a' <= 'b'", True),
    ("'a' > 'b'", False),
    ("$.obj == $.arr", False),
    ("$.obj != $.arr", True),
    ("$.obj == $.obj", True),
    ("$.obj != $.obj", False),
    ("$.arr == $.arr", True),
    ("$.arr != $.arr", False),
    ("$.obj == 17", False),
    ("$.obj != 17", True),
    ("$.obj <= $.arr", False),
    ("$.obj < $.arr", False),
    ("$.obj <= $.obj", True),
    ("$.arr <= $.arr", True),
    ("1 <= $.arr", False),
    ("1 >= $.arr", False),
    ("1 > $.arr", False),
    ("1 < $.arr", False),
    ("true <= true", True),
    ("true > true", False),
]

DATA = {
    "status": "paid",
    "total": 250,
    "ratio": 0.5,
    "test": False,
    "none": None,
    "one": 1,
    "yes": True,
    "customer": {"id": 7, "tags": ["a", {"deep": [1, 2]}], "": "empty"},
    "same": {"": "empty", "tags": ["a", {"deep": [1.0, 2]}], "id": 7},
    "like": {"id": 7, "tags": ["a", {"deep": [True, 2]}], "": "empty"},
    "shorter": {"id": 7, "tags": ["a"], "": "empty"},
    "renamed": {"id": 7, "tags": ["a"], "x": "empty"},
    "any name": 1,
    "it's": 2,
    'say "hi"': 3,
    "back\\slash": 4,
    "é日😀": 5,
    "tab\t": 6,
    "big": 9007199254740993,
    "0": "zero",
}

EXAMPLES = [
    ('$.status == "paid" && ($.total >= 100 || !$.test)', True),
    ('$.status == "open" && ($.total >= 100 || !$.test)', False),
    ('$.status == "paid" && ($.total < 100 || !$.test)', False),  # there is a test: false
    # paths
    ("$", True),
    ("$ == $", True),
    ("$.customer.id == 7", True),
    ("$['customer']['id'] == 7", True),
    ('$["customer"].id == 7', True),
    ("$ .customer\n[ 'id' ]\t== 7", True),
    ("$.customer.tags[0] == 'a'", True),
    ("$.customer.tags[-2] == 'a'", True),
    ("$.customer.tags[-3] || $.customer.tags[2]", False),
    ("$.customer.tags[1].deep[-1] == 2", True),
    ("$.customer['tags'][1]['deep'][0] == 1", True),
    ("$.customer[''] == 'empty'", True),
    ("$['any name'] == 1 && $['it\\'s'] == 2 && $[\"it's\"] == 2", True),
    ('$[\'say "hi"\'] == 3 && $["say \\"hi\\""] == 3', True),
    ("$['back\\\\slash'] == 4", True),
    ("$.é日😀 == 5 && $['\\u00e9\\u65e5\\uD83D\\uDE00'] == 5", True),
    ("$['tab\\t'] == 6", True),
    ("$[0]", False),  # an index is for arrays, a name for objects
    ("$['0'] == 'zero'", True),
    ("$.customer.tags['0']", False),
    ("$.customer.tags.length", False),
    ("$.status[0]", False),
    ("$.status.x", False),
    ("$.none.x", False),
    # tests for existence
    ("$.test", True),
    ("$.none", True),
    ("!$.none", False),
    ("$.missing", False),
    ("!$.missing", True),
    ("! $.missing", True),
    ("!(!$.missing)", False),
    ("$.none == null", True),
    ("$.missing == null", False),
    ("$.missing != null", True),
    # types
    ("$.one == true", False),
    ("$.yes == 1", False),
    ("$.yes == true", True),
    ("$.test == 0", False),
    ("$.test == null", False),
    ("$.test == ''", False),
    ("$.one == $.yes", False),
    ("$.one != $.yes", True),
    ("$.yes >= $.yes", True),
    ("$.yes > $.test", False),
    ("$.yes >= 1", False),
    ("$.yes > 0", False),
    ("$.one < true", False),
    ("$.none <= null", True),
    ("$.none < 1", False),
    ("$.total > '1'", False),
    ("$.status > 1", False),
    ("$.missing < 1 || $.missing > 1 || $.missing >= 1", False),
    # whole values
    ("$.customer == $.same", True),
    ("$.customer != $.same", False),
    ("$.customer == $.like", False),
    ("$.customer == $.shorter", False),
    ("$.shorter == $.customer", False),
    ("$.shorter == $.renamed", False),
    ("$.shorter != $.renamed", True),
    ("$.customer.tags == $.same.tags", True),
    ("$.customer.tags == $.customer", False),
    ("$.customer >= $.same", True),
    ("$.customer > $.same", False),
    # numbers
    ("$.one == 1.0", True),
    ("$.ratio == 5e-1", True),
    ("$.ratio == 0.05E+1", True),
    ("$.total == 250 && $.total == 2.5e2 && $.total != 2.5", True),
    ("-0 == 0 && -1 < 0", True),
    ("$.big == 9007199254740993 && $.big != 9007199254740992", True),
    ("0 == 1e-999", True),
    # strings, by code points
    ("'b' > 'B' && 'B' > 'A' && 'aa' > 'a' && 'a' > ''", True),
    ("'\\uffff' < '😀'", True),  # UTF-16 has it the other way round
    ("'\\/\\b\\f\\n\\r\\t\\\\' == \"\\/\\b\\f\\n\\r\\t\\\\\"", True),
    # precedence
    ("$.one || $.one && $.missing", True),
    ("($.one || $.one) && $.missing", False),
    ("!$.missing && $.one", True),
    ("!($.missing && $.one)", True),
    ("((($.one)))", True),
    ("$.one==1&&$.total>=250||$.missing", True),
    (" \t\n\r$.one == 1 ", True),
]

INVALID = [
    ("", 0),
    ("   ", 3),
    ("$.a ==", 6),
    ("$.a == ", 7),
    ("== 1", 0),
    ("1", 1),
    ("true", 4),
    ("'a'", 3),
    ("!true", 5),
    ("$.a = 1", 4),
    ("$.a === 1", 6),
    ("$.a => 1", 4),
    ("$.a <> 1", 5),
    ("$.a & $.b", 4),
    ("$.a and $.b", 4),
    ("$.a && ", 7),
    ("&& $.a", 0),
    ("$.a || || $.b", 7),
    ("!!$.a", 1),
    ("!$.a == 1", 5),
    ("!($.a) == 1", 7),
    ("($.a) == 1", 6),
    ("($.a == 1", 9),
    ("$.a == 1)", 8),
    ("()", 1),
    ("$.a < 1 < 2", 8),
    ("$.a == TRUE", 7),
    ("$.a == nullx", 7),
    ("$.a == True", 7),
    ("$.a == undefined", 7),
    # paths that lead to more than one value, or from elsewhere
    ("@.a", 0),
    ("a == 1", 0),
    ("$a", 1),
    ("$.", 2),
    ("$..a", 2),
    ("$.*", 2),
    ("$.1a", 2),
    ("$.a-b == 1", 3),
    ("$[*]", 2),
    ("$[]", 2),
    ("$[1:2]", 3),
    ("$['a', 'b']", 5),
    ("$['a'", 5),
    ("$[a]", 2),
    ("$[01]", 3),
    ("$[-0]", 2),
    ("$[+1]", 2),
    ("$[1.0]", 3),
    ("$[9007199254740992]", 2),
    ("$[-9007199254740992]", 2),
    ("$[?$.a]", 2),
    # functions
    ("length($.a) == 1", 0),
    ("$.a.length() == 1", 10),
    ("match($.a, 'x')", 0),
    ("$.a =~ /x/", 4),
    # numbers
    ("$.a == 01", 8),
    ("$.a == +1", 7),
    ("$.a == .5", 7),
    ("$.a == 1.", 8),
    ("$.a == 1e", 8),
    ("$.a == 0x1", 8),
    ("$.a == NaN", 7),
    ("$.a == -", 7),
    ("$.a == 1e999", 7),
    ("$.a == -1e999", 7),
    ("$.a == ١", 7),
    # strings
    ("$.a == 'b", 7),
    ('$.a == "b', 7),
    ("$.a == 'b\\'", 7),
    ("$.a == 'b\"", 7),
    ("$.a == '\\x'", 8),
    ("$.a == '\\\"'", 8),
    ('$.a == "\\\'"', 8),
    ("$.a == '\n'", 8),
    ("$.a == '\x00'", 8),
    ("$.a == '\\u12'", 8),
    ("$.a == '\\u12g4'", 8),
    ("$.a == '\\ud83d'", 8),
    ("$.a == '\\ud83d\\u0041'", 8),
    ("$.a == '\\ude00'", 8),
    ("$.a == '\\ude00\\ud83d'", 8),
    ("$.a == '\ud83d'", 8),
    ("$.\ud83d", 2),
    ("$.a == [1]", 7),
    ("$.a == {}", 7),
    # other white space
    ("$.a ==\u00a01", 6),
    ("$.a == 1\v", 8),
    # more than can be
    ("$" + ".a" * 300, MAX_FILTER_LENGTH),
    (" || ".join(["$.a"] * (MAX_TESTS + 1)), 7 * MAX_TESTS),
    ("(" * (MAX_DEPTH + 1) + "$.a" + ")" * (MAX_DEPTH + 1), MAX_DEPTH),
    ("(" * MAX_FILTER_LENGTH, MAX_DEPTH),
]


@pytest.mark.parametrize(("text", "expected"), RFC_COMPARISONS)
def test_comparisons_of_the_rfc(text: str, expected: bool) -> None:
    assert matches(text, RFC_VALUE) is expected


@pytest.mark.parametrize(("text", "expected"), EXAMPLES)
def test_examples(text: str, expected: bool) -> None:
    assert matches(text, DATA) is expected
    assert matches(f"!({text})", DATA) is not expected


@pytest.mark.parametrize(("text", "offset"), INVALID)
def test_what_is_no_filter(text: str, offset: int) -> None:
    with pytest.raises(InvalidFilter) as caught:
        Filter.parse(text)
    assert (caught.value.filter, caught.value.offset) == (text, offset)
    assert str(offset) in str(caught.value)
    assert len(str(caught.value)) < 150


@pytest.mark.parametrize("given", [None, 1, b"$.a", ["$.a"]])
def test_other_types_are_no_filters(given: Any) -> None:
    with pytest.raises(InvalidFilter, match=type(given).__name__) as caught:
        Filter.parse(given)
    assert caught.value.filter == given


def test_what_an_error_says() -> None:
    with pytest.raises(InvalidFilter) as caught:
        Filter.parse("$.status = 'paid' && $.total > 100")
    expected = (
        "invalid filter: expected '&&', '||' or the end, at offset 9: \"= 'paid' && $.total…\""
    )
    assert str(caught.value) == expected
    copied = pickle.loads(pickle.dumps(caught.value))
    assert (str(copied), copied.offset, copied.reason) == (
        expected,
        9,
        "expected '&&', '||' or the end",
    )
    with pytest.raises(InvalidFilter, match="offset 6: the end"):
        Filter.parse("$.a ==")


def test_as_much_as_can_be() -> None:
    tests = " || ".join(["$.a"] * (MAX_TESTS - 1) + ["$.b == 1"])
    assert matches("(" * MAX_DEPTH + tests + ")" * MAX_DEPTH, {"b": 1})
    assert matches("$['" + "x" * (MAX_FILTER_LENGTH - 5) + "']", {"x" * (MAX_FILTER_LENGTH - 5): 0})
    # Depth is that of parentheses within each other, not how many there are.
    assert matches(" && ".join(["($.b)"] * MAX_TESTS), {"b": 1})


def test_repr() -> None:
    assert repr(Filter.parse("$.a")) == "<Filter '$.a'>"


class TestPayloads:
    """What a filter sees."""

    def test_what_is_deeper_than_pythons_stack(self) -> None:
        deep = "[" * 1000 + "]" * 1000
        payload = f'{{"a": {deep}, "b": {deep}, "c": {deep.replace("[]", "[1]")}}}'
        found = message(payload)
        assert Filter.parse("$.a == $.b").matches(found)
        assert not Filter.parse("$.a == $.c").matches(found)

    @pytest.mark.parametrize(
        "value",
        [
            lambda n: [1] * n,
            lambda n: {str(i): i for i in range(n)},
            lambda n: [[1] * (n // 2 - 1), {str(i): i for i in range(n - n // 2 - 1)}],
        ],
        ids=["an array", "an object", "within"],
    )
    def test_what_is_too_large_to_compare_matches_nothing(
        self, value: Callable[[int], Any]
    ) -> None:
        """Whatever anybody asks for, a message takes but a moment."""

        def payload(count: int) -> Message:
            return message(json.dumps({"a": value(count), "b": value(count), "c": [1]}))

        large = payload(MAX_COMPARED + 1)
        for text in ("$.a == $.b", "$.a != $.b", "!($.a == $.b)", "$.a <= $.b", "$.b >= $.a"):
            assert Filter.parse(text).matches(payload(MAX_COMPARED)) == ("!" not in text)
            assert not Filter.parse(text).matches(large)
        twice = Filter.parse("$.a != $.b || $.b == $.a")
        assert twice.matches(payload(MAX_COMPARED // 2))
        assert not twice.matches(payload(MAX_COMPARED))
        # What is different at a glance is not looked into.
        assert Filter.parse("$.a != $.c && $.a && $.c == $.c && $.a != 1").matches(large)

    @pytest.mark.parametrize("payload", ['{"a": 1}', '{"a": 1e999}'])
    def test_it_is_parsed_once(self, monkeypatch: pytest.MonkeyPatch, payload: str) -> None:
        count = 0

        class Counting(JSONSerializer):
            def loads(self, text: str) -> dict[str, Any]:
                nonlocal count
                count += 1
                return super().loads(text)

        counting = Counting()
        monkeypatch.setattr("pgchannels.messages.DEFAULT", counting)
        found = message(payload, serializer=counting)
        for _ in range(10):
            assert Filter.parse("$.a == 1 && $.a < 2").matches(found) == (payload == '{"a": 1}')
        assert count == 1

    def test_no_serialiser_of_ones_own_is_asked(self) -> None:
        class Shouting:
            def dumps(self, payload: Any) -> str:
                raise NotImplementedError

            def loads(self, text: str) -> dict[str, Any]:
                return {key.upper(): None for key in orjson.loads(text)}

        found = message('{"a": 1}', serializer=Shouting())
        assert dict(found) == {"A": None}
        assert Filter.parse("$.a == 1 && !$.A").matches(found)

    def test_bytes_are_null(self) -> None:
        headers = json.dumps({ATTACHMENTS: '["/file"]'})
        found = message('{"file": null, "n": 1}', headers=headers, attachments=[b"content"])
        for _ in range(2):
            assert Filter.parse("$.file == null && $.n == 1").matches(found)
            assert found["file"] == b"content"
        assert found.document is found.document

    @pytest.mark.parametrize("payload", ['{"a": 1e999}', '{"a": ' + "[" * 2000 + "]" * 2000 + "}"])
    def test_what_cannot_be_parsed_matches_nothing(self, payload: str) -> None:
        found = message(payload)
        for text in ("$.a", "!$.a", "1 == 1"):
            assert not Filter.parse(text).matches(found)

    def test_large_integers(self) -> None:
        found = message('{"a": 123456789012345678901234567890}')
        assert Filter.parse("$.a == 123456789012345678901234567890").matches(found)
        assert Filter.parse("$.a > 1e29").matches(found)


# Any expression, as a tree; how it may be written; and what it means, by the words of the RFC.


@dataclass(frozen=True)
class Path:
    steps: tuple[str | int, ...]


@dataclass(frozen=True)
class Literal:
    value: Any


@dataclass(frozen=True)
class Comparison:
    left: Path | Literal
    operator: str
    right: Path | Literal


@dataclass(frozen=True)
class Not:
    operand: Any


@dataclass(frozen=True)
class Junction:
    operator: str
    operands: tuple[Any, ...]


NAMES = ["a", "b", "c", "é", "_x1", "", "any name", "'", '"', "\\", "\n", "\u0000", "😀"]
SCALARS = (
    st.none()
    | st.booleans()
    | st.sampled_from([0, 1, -1, 2, 10**15, 0.0, -0.0, 1.0, 0.5, 1e300, -2.5e-7])
    | st.sampled_from(["", "a", "b", "B", "aa", "1", "'\"\\/\n\u0000é😀\uffff"])
)
VALUES = st.recursive(
    SCALARS,
    lambda values: (
        st.lists(values, max_size=3) | st.dictionaries(st.sampled_from(NAMES), values, max_size=3)
    ),
    max_leaves=8,
)
DOCUMENTS = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=5)
PATHS = st.builds(
    Path, st.lists(st.sampled_from(NAMES) | st.integers(-3, 3), max_size=3).map(tuple)
)
OPERANDS = PATHS | st.builds(Literal, SCALARS)
OPERATORS = st.sampled_from(["==", "!=", "<", "<=", ">", ">="])
EXPRESSIONS = st.recursive(
    PATHS | st.builds(Comparison, OPERANDS, OPERATORS, OPERANDS),
    lambda inner: (
        st.builds(Not, inner)
        | st.builds(
            Junction,
            st.sampled_from(["&&", "||"]),
            st.lists(inner, min_size=2, max_size=3).map(tuple),
        )
    ),
    max_leaves=8,
)


def render(node: Any, rng: random.Random) -> str:
    """One of the ways in which an expression can be written."""
    blank = rng.choice(["", "", " ", "\t \n\r"])
    match node:
        case Path(steps):
            return blank + "$" + "".join(_step(step, rng) for step in steps)
        case Literal(str(value)):
            return blank + _quoted(value, rng)
        case Literal(value):
            return blank + json.dumps(value) + blank
        case Comparison(left, operator, right):
            return f"{render(left, rng)}{blank}{operator}{render(right, rng)}"
        case Not(operand):
            if isinstance(operand, Path) and rng.random() < 0.5:
                return f"{blank}!{render(operand, rng)}"
            return f"{blank}!{blank}({render(operand, rng)})"
        case Junction(operator, operands):
            parts = [
                f"({render(each, rng)}{blank})"
                if isinstance(each, Junction) and (operator == "&&" or rng.random() < 0.5)
                else render(each, rng)
                for each in operands
            ]
            return f"{blank}{operator}".join(parts)
    raise AssertionError(node)


def _step(step: str | int, rng: random.Random) -> str:
    blank = rng.choice(["", "", " "])
    if isinstance(step, int):
        return f"{blank}[{blank}{step}]"
    if step.isidentifier() and rng.random() < 0.5:
        return f"{blank}.{step}"
    return f"{blank}[{_quoted(step, rng)}{blank}]"


def _quoted(text: str, rng: random.Random) -> str:
    quoted = json.dumps(text, ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.5:
        return quoted
    pieces = {'\\"': '"', "'": "\\'"}
    content, inner = "", quoted[1:-1]
    while inner:
        piece = inner[:2] if inner[0] == "\\" else inner[0]
        content += pieces.get(piece, piece)
        inner = inner[len(piece) :]
    return f"'{content}'"


def nodes(path: Path, value: Any) -> list[Any]:
    """The nodelist of a singular query: one value or none."""
    found = [value]
    for step in path.steps:
        if isinstance(step, str):
            found = [each[step] for each in found if isinstance(each, dict) and step in each]
        else:
            found = [
                each[step]
                for each in found
                if isinstance(each, list) and step in range(-len(each), len(each))
            ]
    return found


def kind(value: Any) -> str:
    return "number" if type(value) in (int, float) else type(value).__name__


def are_equal(left: Any, right: Any) -> bool:
    if kind(left) != kind(right):
        return False
    match left:
        case list():
            return len(left) == len(right) and all(map(are_equal, left, right))
        case dict():
            return set(left) == set(right) and all(are_equal(left[k], right[k]) for k in left)
    return bool(left == right)


def compare(left: list[Any], operator: str, right: list[Any]) -> bool:
    """Section 2.3.5.2.2."""
    match operator:
        case "==":
            if not left or not right:
                return not left and not right
            return are_equal(left[0], right[0])
        case "!=":
            return not compare(left, "==", right)
        case "<":
            if not left or not right:
                return False
            kinds = {kind(left[0]), kind(right[0])}
            return kinds in ({"number"}, {"str"}) and bool(left[0] < right[0])
        case "<=":
            return compare(left, "<", right) or compare(left, "==", right)
        case ">":
            return compare(right, "<", left)
        case ">=":
            return compare(left, ">", right) or compare(left, "==", right)
    raise AssertionError(operator)


def evaluate(node: Any, document: Any) -> bool:
    match node:
        case Path():
            return bool(nodes(node, document))
        case Comparison(left, operator, right):
            found = [
                nodes(side, document) if isinstance(side, Path) else [side.value]
                for side in (left, right)
            ]
            return compare(found[0], operator, found[1])
        case Not(operand):
            return not evaluate(operand, document)
        case Junction("&&", operands):
            return all(evaluate(each, document) for each in operands)
        case Junction("||", operands):
            return any(evaluate(each, document) for each in operands)
    raise AssertionError(node)


@given(EXPRESSIONS, st.lists(DOCUMENTS, min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_what_is_written_means_what_the_rfc_says(
    expression: Any, documents: list[Any], rng: random.Random
) -> None:
    text = render(expression, rng)
    if len(text) > MAX_FILTER_LENGTH:
        return
    wanted = Filter.parse(text)
    for document in documents:
        assert wanted.matches(message(json.dumps(document))) is evaluate(expression, document)


PIECES = [
    *("$", "$.a", ".a", "['a']", "[0]", "[", "]", "(", ")", "!", "&&", "||", "&", "|"),
    *(
        "==",
        "!=",
        "<",
        "<=",
        ">",
        ">=",
        "=",
        "1",
        "-",
        "1e5",
        "1e999",
        "0",
        ".",
        "e",
        "true",
        "null",
    ),
    *("'", '"', "\\", "\\u", "d83d", "a", " ", "\n", "\x00", "é", "\ud83d", "@", "*", ","),
]


def parsed(text: str) -> Filter | InvalidFilter:
    try:
        return Filter.parse(text)
    except InvalidFilter as error:
        return error


@given(st.text(max_size=50) | st.lists(st.sampled_from(PIECES), max_size=30).map("".join))
def test_whatever_is_given_is_a_filter_or_not(text: str) -> None:
    found = parsed(text)
    if isinstance(found, Filter):
        assert found.matches(message(json.dumps(DATA))) in (True, False)
    else:
        assert 0 <= found.offset <= len(text)
        assert str(found)
