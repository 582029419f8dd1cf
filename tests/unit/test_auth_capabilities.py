"""What a token says that its bearer may do."""

from __future__ import annotations

import gc
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgchannels.channels import EVERYONE
from pgchannels.web.auth import (
    ACTIONS,
    Action,
    Capabilities,
    Grants,
    Identity,
    is_allowed,
    require,
)
from pgchannels.web.errors import AuthorizationError
from tests.support.tokens import HIDDEN, says_nothing


def ada(table: object, **options: Any) -> Identity:
    return Identity("ada", claims={"cap": table}, **options)


TABLE = {
    "room:*": ["subscribe", "history"],
    "room:tea": ["publish"],
    "room:t*": ("presence",),
    "news": ["*"],
}


PRESENCE = "presence:room:tea"
CONNECTION = f"ws.{'0' * 32}.{'1' * 16}"


@pytest.mark.parametrize(
    ("pattern", "channel", "expected"),
    [
        ("*", PRESENCE, False),
        ("p*", PRESENCE, False),
        ("presence*", PRESENCE, False),
        ("presence:*", PRESENCE, True),
        ("presence:room:*", PRESENCE, True),
        ("presence:news:*", PRESENCE, False),
        (PRESENCE, PRESENCE, True),
        ("*", CONNECTION, False),
        ("ws.*", CONNECTION, False),
        (CONNECTION[:-1] + "*", CONNECTION, False),
        (CONNECTION, CONNECTION, True),
        ("ws.*", "ws.news", True),
    ],
)
def test_a_star_reaches_no_connection_and_no_presence_unless_named(
    pattern: str, channel: str, expected: bool
) -> None:
    """Who may publish everywhere writes to no other client alone, and makes up no presence."""
    for action in ACTIONS:
        assert Grants({pattern: ["*"]}).allow(action, channel) is expected


@pytest.mark.parametrize(
    ("action", "channel", "allowed"),
    [
        ("subscribe", "room:tea", True),
        ("history", "room:tea", True),
        ("publish", "room:tea", True),
        ("presence", "room:tea", True),
        ("presence", "room:x", False),
        ("publish", "room:teapot", False),
        ("presence", "room:teapot", True),
        ("subscribe", "room:", True),
        ("subscribe", "room", False),
        ("subscribe", "rooms:1", False),
        ("subscribe", "Room:1", False),
        ("subscribe", "x.room:1", False),
        ("publish", "news", True),
        ("subscribe", "news:1", False),
        ("subscribe", "", False),
        ("subscribe", "room:a b", False),
        ("subscribe", "room:*", False),
        ("subscribe", "room:" + "x" * 200, False),
        ("subscribe", "pgchannels:members", False),
        ("delete", "news", False),
        ("*", "news", False),
    ],
)
async def test_the_union_of_all_that_match(action: Action, channel: str, allowed: bool) -> None:
    assert await is_allowed(Capabilities(), ada(TABLE), action, channel) is allowed


async def test_everything_is_no_more_than_channels() -> None:
    everything = ada({"*": ["*"]})
    for action in ACTIONS:
        assert await is_allowed(Capabilities(), everything, action, "any.thing")
        assert not await is_allowed(Capabilities(), everything, action, "pgchannels:user:bob")
        for pattern in ("*", "p*", "pgchannels:*", EVERYONE):
            assert not await is_allowed(Capabilities(), ada({pattern: ["*"]}), action, EVERYONE)
        assert not await Capabilities()(everything, action, "pgchannels:user:bob")


@pytest.mark.parametrize(
    "table",
    [
        None,
        [],
        "room:*",
        7,
        True,
        {"room:*": "subscribe"},
        {"room:*": None},
        {"room:*": {"subscribe": 1}},
        {"room:*": ["subscribe", 1]},
        {"room:*": ["subscribe", ["publish"]]},
        {"room:*": ["Subscribe"]},
        {"room:*": ["subscribe", "delete"]},
        {"room:1": ["subscribe"], "": ["subscribe"]},
        {"room:1": ["subscribe"], "a b": ["subscribe"]},
        {"room:1": ["subscribe"], "**": ["subscribe"]},
        {"room:1": ["subscribe"], "*:x": ["subscribe"]},
        {"room:1": ["subscribe"], "room:*:x": ["subscribe"]},
        {"room:1": ["subscribe"], "room:#": ["subscribe"]},
        {"room:1": ["subscribe"], "pgchannels:*": ["subscribe"]},
        {"room:1": ["subscribe"], "pgchannels:members": ["subscribe"]},
        {"room:1": ["subscribe"], "x" * 201: ["subscribe"]},
        {"room:1": ["subscribe"], 7: ["subscribe"]},
        {"room:1": ["subscribe"], **{f"room:{i}": ["publish"] for i in range(1001)}},
    ],
    ids=lambda table: repr(table)[:60],
)
async def test_a_malformed_claim_allows_nothing(
    table: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for action in ACTIONS:
        assert not await is_allowed(Capabilities(), ada(table), action, "room:1")
    assert "room:" not in caplog.text


async def test_no_identity_and_no_claim_allow_nothing() -> None:
    assert not await is_allowed(Capabilities(), None, "subscribe", "a")
    assert not await is_allowed(Capabilities(), Identity("ada"), "subscribe", "a")


async def test_an_identitys_own_go_first() -> None:
    identity = ada({"*": ["*"]}, capabilities={"a": ["publish"]})
    assert await is_allowed(Capabilities(), identity, "publish", "a")
    assert not await is_allowed(Capabilities(), identity, "publish", "b")
    assert not await is_allowed(Capabilities(), ada({}, capabilities={}), "publish", "b")


async def test_a_table_is_read_once_for_each_identity() -> None:
    class Counted(dict[str, Any]):
        read = 0

        def items(self) -> Any:
            self.read += 1
            return super().items()

    table = Counted({"a": ["publish"]})
    capabilities = Capabilities()
    first = Identity("ada", capabilities=table)
    for _ in range(100):
        assert await capabilities(first, "publish", "a")
        assert not await capabilities(first, "publish", "b")
    assert table.read == 1
    # An equal one is another one: its table may have changed since.
    table["b"] = table.pop("a")
    second = Identity("ada", capabilities=table)
    assert first == second
    assert await capabilities(second, "publish", "b")
    assert not await capabilities(second, "publish", "a")


async def test_nothing_is_kept_of_who_is_gone() -> None:
    capabilities = Capabilities()
    for n in range(1000):
        channel = f"room:{n}"
        assert await capabilities(ada({channel: ["publish"]}), "publish", channel)
    gc.collect()
    assert not capabilities._parsed


async def test_a_malformed_claim_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    capabilities, identity = Capabilities(), ada([])
    for _ in range(10):
        assert not await capabilities(identity, "publish", "a")
    assert len(caplog.records) == 1


async def test_another_claim() -> None:
    identity = Identity("ada", claims={"https://chat.example/cap": {"a": ["publish"]}})
    assert await is_allowed(Capabilities("https://chat.example/cap"), identity, "publish", "a")


@pytest.mark.parametrize("answer", [None, 1, "yes", [True]])
async def test_only_true_is_yes(answer: Any) -> None:
    async def authorize(identity: Identity | None, action: Action, channel: str) -> bool:
        return answer  # type: ignore[no-any-return]

    assert not await is_allowed(authorize, None, "publish", "a")
    with pytest.raises(AuthorizationError) as caught:
        await require(authorize, Identity(HIDDEN[0]), "publish", "a")
    assert caught.value.http_status == 403
    assert caught.value.context == {"action": "publish", "channel": "a"}
    says_nothing(str(caught.value))


def test_many_patterns_are_no_problem() -> None:
    """No pattern takes time that grows with more than its length."""
    grants = Grants({"a" * n + "*": ["publish"] for n in range(1, 190)})
    started = time.monotonic()
    for _ in range(100):
        assert not grants.allow("subscribe", "a" * 200)
    assert time.monotonic() - started < 10


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.just("subscribe"),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.text(max_size=5) | st.just("a*"), inner, max_size=3)
        ),
    ),
    st.text(max_size=10),
)
async def test_any_claim_and_any_channel_has_an_answer(table: object, channel: str) -> None:
    for action in ACTIONS:
        assert await is_allowed(Capabilities(), ada(table), action, channel) in (True, False)
