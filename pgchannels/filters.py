"""Which messages a reader wants, as a logical expression over their payloads. Pure.

The expressions are JSONPath's filters (RFC 9535, section 2.3.5) over absolute singular queries::

    $.status == "paid" && ($.total >= 100 || !$.test)

Clients may choose them, so that nothing in them can take long: a path leads to one value at most,
there are no functions, regular expressions or wildcards, and their length, their depth, the number
of their comparisons and what these may look into are bounded. A parser by recursive descent makes
closures of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeAlias

import orjson

from pgchannels.errors import InvalidFilter
from pgchannels.payloads import loads

if TYPE_CHECKING:
    from pgchannels.messages import Message

__all__ = ["MAX_COMPARED", "MAX_DEPTH", "MAX_FILTER_LENGTH", "MAX_TESTS", "Filter"]

MAX_FILTER_LENGTH = 500
MAX_TESTS = 20
"""Comparisons and tests for existence."""
MAX_DEPTH = 10
"""Parentheses within each other."""
MAX_COMPARED = 1000
"""Values in objects and arrays that all comparisons for one message may look at."""

_MAX_INDEX = 2**53 - 1

_Find: TypeAlias = Callable[[dict[str, Any]], Any]
_Test: TypeAlias = Callable[[dict[str, Any]], bool]


class Filter:
    """A filter that has been parsed.

    - Paths: ``$.name``, ``$['any name']``, ``$.items[0]``, ``$.items[-1].id``. ``$`` is all of it.
    - Literals: strings in single or double quotes, numbers, ``true``, ``false``, ``null``.
    - Comparisons of paths and literals: ``==``, ``!=``, ``<``, ``<=``, ``>``, ``>=``.
    - A path alone tests whether there is a value, be it ``null`` or ``false``.
    - ``!`` before a path or a parenthesis, ``&&``, ``||``, in this order of precedence.

    Values compare as in section 2.3.5.2.2. What is missing equals only what is missing. Values of
    different types are unequal, ``true`` and 1 too; objects and arrays are equal if all in them is.
    ``<`` and ``>`` hold between two numbers or two strings (by code points) only, ``<=`` and ``>=``
    also where ``==`` does.

    A filter sees the JSON of the payload as it is in the log and as clients get it, whatever the
    layer's serialiser: ``null`` where bytes were lifted out. Integers beyond 64 bits count as
    floating-point numbers. A payload that cannot be parsed matches no filter, nor does one of which
    more than 1000 values in objects and arrays would have to be compared.
    """

    __slots__ = ("_test", "text")

    def __init__(self, text: str, test: _Test) -> None:
        self.text = text
        self._test = test

    @classmethod
    def parse(cls, text: str) -> Filter:
        """Read a filter of up to 500 characters, 20 comparisons and tests, 10 nested parentheses.

        Raises:
            InvalidFilter: if it is none.
        """
        given: object = text  # it may come from anywhere
        if not isinstance(given, str):
            raise InvalidFilter(given, 0, "expected a str")
        return cls(given, _compiled(given))

    def matches(self, message: Message) -> bool:
        """Whether *message* is wanted. Never raises."""
        document = message.document
        return document is not None and self._test(document)

    def __repr__(self) -> str:
        return f"<Filter {self.text!r}>"


# Comparing values

_NOTHING = object()


class _TooMuch(Exception):
    """More values would have to be compared than for a filter that anybody may have chosen."""


class _Allowance:
    """How many values in objects and arrays may still be looked at for one message."""

    __slots__ = ("left",)

    def __init__(self) -> None:
        self.left = 0

    def take(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise _TooMuch


def _equal(left: Any, right: Any, allowance: _Allowance) -> bool:
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right  # Python's True is 1
    if isinstance(left, (dict, list)):
        return left is right or _deeply_equal(left, right, allowance)
    return bool(left == right)


def _deeply_equal(left: Any, right: Any, allowance: _Allowance) -> bool:
    # Not recursive: what is parsed can be deeper than Python's stack.
    pairs = [(left, right)]
    while pairs:
        left, right = pairs.pop()
        if isinstance(left, (dict, list)):
            if type(left) is not type(right) or len(left) != len(right):
                return False
            allowance.take(len(left))
        if isinstance(left, dict):
            if left.keys() != right.keys():
                return False
            pairs += [(value, right[name]) for name, value in left.items()]
        elif isinstance(left, list):
            pairs += zip(left, right, strict=True)
        elif not _equal(left, right, allowance):
            return False
    return True


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _less(left: Any, right: Any) -> bool:
    if isinstance(left, str):
        return isinstance(right, str) and left < right
    return _is_number(left) and _is_number(right) and left < right


_COMPARISONS: dict[str, Callable[[Any, Any, _Allowance], bool]] = {
    "==": _equal,
    "!=": lambda left, right, allowance: not _equal(left, right, allowance),
    "<": lambda left, right, _: _less(left, right),
    "<=": lambda left, right, allowance: _less(left, right) or _equal(left, right, allowance),
    ">": lambda left, right, _: _less(right, left),
    ">=": lambda left, right, allowance: _less(right, left) or _equal(left, right, allowance),
}


# Closures


class _Operand(NamedTuple):
    find: _Find
    is_literal: bool


def _path(steps: Sequence[str | int]) -> _Find:
    if len(steps) == 1 and isinstance(steps[0], str):
        name = steps[0]
        return lambda document: document.get(name, _NOTHING)  # like most

    def find(document: dict[str, Any]) -> Any:
        value: Any = document
        for step in steps:
            if isinstance(step, str):
                if not isinstance(value, dict):
                    return _NOTHING
                value = value.get(step, _NOTHING)
            elif isinstance(value, list) and -len(value) <= step < len(value):
                value = value[step]
            else:
                return _NOTHING
        return value

    return find


def _exists(find: _Find) -> _Test:
    return lambda document: find(document) is not _NOTHING


def _compared(left: _Operand, operator: str, right: _Operand, allowance: _Allowance) -> _Test:
    compare, find, find_other = _COMPARISONS[operator], left.find, right.find
    if right.is_literal:
        literal = find_other({})
        return lambda document: compare(find(document), literal, allowance)
    return lambda document: compare(find(document), find_other(document), allowance)


def _bounded(test: _Test, allowance: _Allowance) -> _Test:
    def test_within(document: dict[str, Any]) -> bool:
        allowance.left = MAX_COMPARED
        try:
            return test(document)
        except _TooMuch:
            return False

    return test_within


def _not(test: _Test) -> _Test:
    return lambda document: not test(document)


def _all(tests: Sequence[_Test]) -> _Test:
    if len(tests) == 1:
        return tests[0]

    def test_all(document: dict[str, Any]) -> bool:
        for test in tests:  # noqa: SIM110 - all() would cost as much again
            if not test(document):
                return False
        return True

    return test_all


def _any(tests: Sequence[_Test]) -> _Test:
    if len(tests) == 1:
        return tests[0]

    def test_any(document: dict[str, Any]) -> bool:
        for test in tests:  # noqa: SIM110
            if test(document):
                return True
        return False

    return test_any


# Reading the text: the names of the grammar's rules are those of RFC 9535, appendix A

_BLANKS = re.compile(r"[ \t\n\r]*")
_NAME_FIRST = r"A-Za-z_\u0080-\ud7ff\ue000-\U0010ffff"
_MEMBER_NAME = re.compile(f"[{_NAME_FIRST}][0-9{_NAME_FIRST}]*")
_INDEX = re.compile(r"0|-?[1-9][0-9]*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_WORD = re.compile(f"(?:true|false|null)(?![0-9{_NAME_FIRST}])")
_OPERATOR = re.compile(r"==|!=|<=|>=|<|>")
# A string but for its end. Surrogates come in pairs, as escapes.
_STRING = (
    r"""{quote}(?:[^{quote}\\\x00-\x1f\ud800-\udfff]|\\(?:[{quote}\\/bfnrt]|u(?:{hexchar})))*"""
)
_HEXCHAR = (
    r"(?![dD][89a-fA-F])[0-9a-fA-F]{4}|[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)
_STRINGS = {
    quote: re.compile(_STRING.format(quote=quote, hexchar=_HEXCHAR)) for quote in ('"', "'")
}
_WORDS = {"true": True, "false": False, "null": None}


@lru_cache(maxsize=1000)
def _compiled(text: str) -> _Test:
    # Many readers have the same filter, and share what is made of it: parsing it costs more than
    # using it, and so does running through as many copies as there are readers.
    return _Parser(text).parse()


class _Parser:
    """Reads one filter, from left to right, and never goes back."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._tests = 0
        self._allowance = _Allowance()
        self._compares_paths = False

    def parse(self) -> _Test:
        if len(self._text) > MAX_FILTER_LENGTH:
            self._fail(f"it has more than {MAX_FILTER_LENGTH} characters", MAX_FILTER_LENGTH)
        test = self._logical_or(0)
        if self._at < len(self._text):
            self._fail("expected '&&', '||' or the end")
        # Literals are neither objects nor arrays.
        return _bounded(test, self._allowance) if self._compares_paths else test

    def _logical_or(self, depth: int) -> _Test:
        tests = [self._logical_and(depth)]
        while self._take("||"):
            tests.append(self._logical_and(depth))
        return _any(tests)

    def _logical_and(self, depth: int) -> _Test:
        tests = [self._basic(depth)]
        while self._take("&&"):
            tests.append(self._basic(depth))
        return _all(tests)

    def _basic(self, depth: int) -> _Test:
        negated = self._take("!")
        start = self._skip_blanks()
        if self._take("("):
            if depth == MAX_DEPTH:
                self._fail(f"more than {MAX_DEPTH} parentheses within each other", start)
            test = self._logical_or(depth + 1)
            if not self._take(")"):
                self._fail("expected '&&', '||' or ')'")
        else:
            test = self._comparison_or_test(negated=negated)
        return _not(test) if negated else test

    def _comparison_or_test(self, *, negated: bool) -> _Test:
        start = self._skip_blanks()
        self._tests += 1
        if self._tests > MAX_TESTS:
            self._fail(f"more than {MAX_TESTS} comparisons and tests", start)
        left = self._comparable()
        place = self._skip_blanks()
        operator = self._match(_OPERATOR)
        if operator is None:
            if left.is_literal:
                self._fail("expected a comparison")
            return _exists(left.find)
        if negated:
            self._fail("'!' before a comparison needs parentheses: !(… == …)", place)
        right = self._comparable()
        self._compares_paths |= not (left.is_literal or right.is_literal)
        return _compared(left, operator, right, self._allowance)

    def _comparable(self) -> _Operand:
        start = self._skip_blanks()
        if self._take("$"):
            return _Operand(_path(self._segments()), is_literal=False)
        value: Any
        if self._next in _STRINGS:
            value = self._string()
        elif (word := self._match(_WORD)) is not None:
            value = _WORDS[word]
        elif (number := self._match(_NUMBER)) is not None:
            try:
                value = loads(number)  # so that it is read as those in payloads are
            except orjson.JSONDecodeError:
                self._fail("the number is too large", start)
        else:
            self._fail("expected a path that begins with '$', or a literal")
        return _Operand(lambda _: value, is_literal=True)

    def _segments(self) -> list[str | int]:
        steps: list[str | int] = []
        while True:
            if self._take("."):
                name = self._match(_MEMBER_NAME)
                if name is None:
                    self._fail("expected a name")
                steps.append(name)
            elif self._take("["):
                self._skip_blanks()
                steps.append(self._string() if self._next in _STRINGS else self._index())
                if not self._take("]"):
                    self._fail("expected ']'")
            else:
                return steps

    def _index(self) -> int:
        start = self._at
        digits = self._match(_INDEX)
        if digits is None:
            self._fail("expected a name in quotes or an index")
        index = int(digits)
        if abs(index) > _MAX_INDEX:
            self._fail("the index is too large", start)
        return index

    def _string(self) -> str:
        start, quote = self._at, self._next
        content = (self._match(_STRINGS[quote]) or "")[1:]
        if self._next != quote:
            if self._at == len(self._text):
                self._fail("the string does not end", start)
            self._fail("a character that has to be escaped, or an escape that is none")
        self._at += 1
        if quote == "'":
            content = re.sub(r"""\\.|\"""", _in_double_quotes, content)
        decoded: str = orjson.loads(f'"{content}"')
        return decoded

    @property
    def _next(self) -> str:
        """The next character; empty at the end."""
        return self._text[self._at : self._at + 1]

    def _skip_blanks(self) -> int:
        """Go to what comes next, and say where that is."""
        self._match(_BLANKS)
        return self._at

    def _take(self, token: str) -> bool:
        self._skip_blanks()
        found = self._text.startswith(token, self._at)
        if found:
            self._at += len(token)
        return found

    def _match(self, pattern: re.Pattern[str]) -> str | None:
        match = pattern.match(self._text, self._at)
        if match is None:
            return None
        self._at = match.end()
        return match[0]

    def _fail(self, reason: str, at: int | None = None) -> NoReturn:
        raise InvalidFilter(self._text, self._at if at is None else at, reason)


def _in_double_quotes(match: re.Match[str]) -> str:
    """An escape, or a double quote, of a string in single quotes."""
    return {"\\'": "'", '"': '\\"'}.get(match[0], match[0])
