"""The tree of errors is the one that the module draws, and each says what is wrong."""

from __future__ import annotations

import copy
import inspect
import pickle
import re

import pytest

from pgchannels import errors
from pgchannels.errors import (
    ChannelLayerClosed,
    ConfigurationError,
    DatabaseError,
    DatabaseUnavailable,
    InvalidChannel,
    InvalidMessage,
    InvalidPosition,
    MessageTooLarge,
    PGChannelsError,
    SchemaError,
    UnknownPosition,
)
from pgchannels.messages import Position


def drawn() -> dict[str, str | None]:
    """Each class of the drawing with its parent, by indentation."""
    assert errors.__doc__ is not None
    tree: dict[str, str | None] = {}
    stack: list[tuple[int, str]] = []
    for line in errors.__doc__.splitlines():
        match = re.match(r"^([ │├└─]*)([A-Z]\w+)(?:  |$)", line)
        if match is None or not line.startswith("    "):
            continue
        indent, name = len(match[1]), match[2]
        while stack and stack[-1][0] >= indent:
            stack.pop()
        tree[name] = stack[-1][1] if stack else None
        stack.append((indent, name))
    return tree


def defined() -> dict[str, type[BaseException]]:
    return {
        name: value
        for name, value in vars(errors).items()
        if inspect.isclass(value)
        and issubclass(value, BaseException)
        and value.__module__ == errors.__name__
    }


def test_the_tree_is_the_one_drawn() -> None:
    classes = defined()
    parents = {
        name: next((b.__name__ for b in cls.__bases__ if b in classes.values()), None)
        for name, cls in classes.items()
    }
    assert drawn() == parents
    assert [name for name, parent in parents.items() if parent is None] == ["PGChannelsError"]


def test_all_names_them() -> None:
    assert sorted(errors.__all__) == sorted(defined())


def test_none_shadows_a_builtin() -> None:
    import builtins

    assert not set(errors.__all__) & set(dir(builtins))


def test_refusals_are_value_errors() -> None:
    # So that code which never heard of pgchannels treats them as what they are.
    assert issubclass(InvalidMessage, ValueError)
    assert issubclass(InvalidPosition, ValueError)
    assert not issubclass(DatabaseError, ValueError)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            SchemaError("pgchannels", None, "0001"),
            (
                "schema 'pgchannels' has not been migrated; revision 0001 is needed. "
                "Run: pgchannels migrate"
            ),
        ),
        (
            SchemaError("pgchannels", "0001", "0002"),
            (
                "schema 'pgchannels' is at revision 0001; revision 0002 is needed. "
                "Run: pgchannels migrate"
            ),
        ),
        (
            SchemaError("pgchannels", "0009", "0002", newer=True),
            (
                "schema 'pgchannels' is at revision 0009, which this version of pgchannels "
                "(revision 0002) does not know: a newer version has migrated it. "
                "Run: pip install --upgrade pgchannels"
            ),
        ),
        (ChannelLayerClosed(), "the channel layer is not open"),
        (ChannelLayerClosed("the stream has been closed"), "the stream has been closed"),
        (InvalidChannel("a b", "no"), "invalid channel name 'a b': no"),
        (
            MessageTooLarge(11, 10),
            "the payload has 11 bytes as JSON; at most 10 are allowed",
        ),
        (
            InvalidPosition("x"),
            "invalid position 'x': expected '0' or '<epoch>-<id>' as in a message",
        ),
        (
            UnknownPosition(Position(2, 5)),
            "unknown position '2-5': this log has never reached it",
        ),
        (DatabaseError("refused", "42501"), "refused"),
        (DatabaseUnavailable("gone"), "gone"),
        (ConfigurationError("no database"), "no database"),
    ],
)
def test_what_they_say(error: PGChannelsError, text: str) -> None:
    assert str(error) == text
    # Errors travel between processes (Celery, multiprocessing) and must say the same there.
    for copied in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert type(copied) is type(error)
        assert str(copied) == text
        assert vars(copied) == vars(error)


def test_long_input_is_cut() -> None:
    assert len(str(InvalidChannel("x" * 10_000, "too long"))) < 150
    assert len(str(InvalidPosition("x" * 10_000))) < 150


def test_a_database_error_has_its_code() -> None:
    assert DatabaseError("refused", "42501").sqlstate == "42501"
    assert DatabaseUnavailable("gone").sqlstate is None
