"""The loader of the queries, and the splitter of the migration scripts."""

from __future__ import annotations

import re

import pytest

from pgchannels.bundled import bundled
from pgchannels.sql import in_schema, load_queries, statements


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("", []),
        (" \n ;; ; \n", []),
        ("select 1", ["select 1"]),
        ("select 1;\nselect 2;\n", ["select 1", "select 2"]),
        ("select ';';select 2", ["select ';'", "select 2"]),
        ("select 'it''s; here';select 2", ["select 'it''s; here'", "select 2"]),
        (
            "do $$ begin a; b; end $$; select 2",
            ["do $$ begin a; b; end $$", "select 2"],
        ),
        ("do $$ -- don't; \n select ';' $$;", ["do $$ -- don't; \n select ';' $$"]),
        ("select 1 -- one; it's\n;select 2", ["select 1 -- one; it's", "select 2"]),
        ("-- only a comment; nothing to run\n", []),
        ("-- about it\nselect 1;\n-- the end\n", ["-- about it\nselect 1"]),
        ("select '--'; select 2", ["select '--'", "select 2"]),
        ("select '$$'; select '$$'", ["select '$$'", "select '$$'"]),
        ("select $1; select 5 - 3 - -2", ["select $1", "select 5 - 3 - -2"]),
        ("select $1 $$ ; $$; select 2", ["select $1 $$ ; $$", "select 2"]),
        ('select 1 as "a;b"; select 2', ['select 1 as "a;b"', "select 2"]),
        ("select ':x', 10 % 3;", ["select ':x', 10 % 3"]),
    ],
)
def test_statements(script: str, expected: list[str]) -> None:
    assert statements(script) == expected


def test_a_long_script_is_split_in_no_time() -> None:
    # A regular expression that backtracks would take for ever here.
    script = "select $$ a ; b $$ - 1 -- don't\n, 'x'" * 2000 + ";" + "- $ -" * 2000
    assert len(statements(script)) == 2


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("select * from pgchannels.log", 'select * from "other".log'),
        ("'pgchannels.messages'::regclass", "'\"other\".messages'::regclass"),
        ("pgchannels.a pgchannels.b", '"other".a "other".b'),
        ("-- pgchannels is a name", "-- pgchannels is a name"),
        ("my_pgchannels.a pgchannels2.b", "my_pgchannels.a pgchannels2.b"),
        ("-- see pgchannels/messages.py", "-- see pgchannels/messages.py"),
    ],
)
def test_in_schema(sql: str, expected: str) -> None:
    assert in_schema(sql, "other") == expected


def test_a_schema_is_quoted() -> None:
    assert in_schema("pgchannels.a", 'o"; drop') == '"o""; drop".a'
    assert in_schema("pgchannels.a", r"o\1\g<0>") == '"o\\1\\g<0>".a'


# Comments first, in which an apostrophe is no quote.
_LITERAL = re.compile(r"""--[^\n]*|(\b[eE])?('(?:[^'\\]|\\.|'')*')""")


def test_no_literal_depends_on_how_backslashes_are_read() -> None:
    """It would not be the same with ``standard_conforming_strings = off``."""
    scripts = [*load_queries("pgchannels").values()]
    scripts += [path.read_text() for path in (bundled("migrations") / "versions").glob("*.sql")]
    assert len(scripts) > 8
    for script in scripts:
        found = [match for match in _LITERAL.finditer(script) if match[2] is not None]
        assert [match[2] for match in found if match[1] is None and "\\" in match[2]] == []


def test_queries() -> None:
    queries = load_queries("other")
    assert {"head", "insert", "seal", "read_channels", "read_log", "take_lease"} <= set(queries)
    for name, sql in queries.items():
        assert "pgchannels." not in sql, name
        assert not sql.endswith(";"), name
        assert len(statements(sql)) == 1, name


def test_parameters_are_counted_without_a_gap() -> None:
    for name, sql in load_queries("pgchannels").items():
        numbers = {int(number) for number in re.findall(r"\$(\d+)", re.sub(r"--.*", "", sql))}
        assert numbers == set(range(1, len(numbers) + 1)), name


def test_no_query_is_left_without_use() -> None:
    from pathlib import Path

    import pgchannels

    package = Path(pgchannels.__file__).parent
    source = "\n".join(path.read_text() for path in package.rglob("*.py"))
    for name in load_queries("pgchannels"):
        assert f'"{name}"' in source, f"{name} is used nowhere"
