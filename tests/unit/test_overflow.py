"""What can be said about slow consumers, and what cannot."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest

from pgchannels import ConfigurationError, MemoryLayer, Message, Overflow, Settings
from pgchannels.overflow import Policy

UNKEYED: list[Policy] = ["replay", "drop_oldest", "disconnect"]


@pytest.mark.parametrize("policy", UNKEYED)
def test_a_name_alone_has_default_bounds(policy: Policy) -> None:
    assert Overflow.parse(policy) == Overflow(policy, max_messages=None, max_bytes=None, key=None)


def test_nothing_said_is_replay() -> None:
    assert Overflow.parse(None) == Overflow() == Overflow("replay")


def test_one_that_is_made_is_taken_as_it_is() -> None:
    overflow = Overflow("latest_by_key", max_messages=1, max_bytes=1, key=lambda m: m["id"])
    assert Overflow.parse(overflow) is overflow


@pytest.mark.parametrize("given", ["", "drop", "REPLAY", 5, ["replay"], True])
def test_no_policy(given: Any) -> None:
    with pytest.raises(ConfigurationError, match="expected one of replay, drop_oldest"):
        Overflow.parse(given)


@pytest.mark.parametrize("name", ["max_messages", "max_bytes"])
@pytest.mark.parametrize("bound", [0, -1, 1.5, True, "10"])
def test_bounds_that_are_none(name: str, bound: Any) -> None:
    with pytest.raises(ConfigurationError, match=name):
        Overflow("drop_oldest", **{name: bound})


@pytest.mark.parametrize("policy", UNKEYED)
def test_a_key_where_there_is_no_use_for_it(policy: Policy) -> None:
    with pytest.raises(ConfigurationError, match="takes no key"):
        Overflow(policy, key=lambda message: message.id)


@pytest.mark.parametrize("key", [None, "id"])
def test_latest_by_no_key(key: Any) -> None:
    with pytest.raises(ConfigurationError, match="needs a key"):
        Overflow("latest_by_key", key=key)


async def test_the_layer_refuses_at_once() -> None:
    async with MemoryLayer() as layer:
        with pytest.raises(ConfigurationError, match="needs a key"):
            layer.subscribe("room", overflow="latest_by_key")


async def test_bounds_are_those_of_the_settings() -> None:
    async with (
        MemoryLayer(Settings(buffer_size=3, buffer_bytes=1024)) as layer,
        layer.subscribe("room", overflow="drop_oldest") as stream,
        layer.subscribe("room", overflow=Overflow("drop_oldest", max_messages=5)) as other,
    ):
        for n in range(10):
            await layer.send("room", {"n": n})
        assert [message["n"] for message in await stream.batch()] == [7, 8, 9]
        assert [message["n"] for message in await other.batch()] == [5, 6, 7, 8, 9]
        for n in (10, 11):
            await layer.send("room", {"n": n, "text": "x" * 600})
        assert [message["n"] for message in await stream.batch()] == [11]
        await layer.send("room", {"n": 12, "text": "x" * 2000})
        assert [message["n"] for message in await stream.batch()] == [12]


def by_item(message: Message) -> Any:
    return message["key"]


def by_list(message: Message) -> Any:
    return [message.data.get("key")]


@pytest.mark.parametrize("key", [by_item, by_list])
async def test_a_key_that_cannot_be_had(
    key: Callable[[Message], Any], caplog: pytest.LogCaptureFixture
) -> None:
    async with MemoryLayer() as layer:
        overflow = Overflow("latest_by_key", max_messages=4, key=key)
        async with layer.subscribe("room", overflow=overflow) as stream:
            with caplog.at_level(logging.WARNING, "pgchannels.stream"):
                for n in range(5):
                    await layer.send("room", {"n": n})
            assert [message["n"] for message in await stream.batch()] == [1, 2, 3, 4]
            assert (stream.dropped, stream.replaced) == (1, 0)
    (record,) = caplog.records
    assert record.exc_info is not None
