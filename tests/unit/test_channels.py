"""Names of channels: which are valid, which are ours, and that no two mean the same."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgchannels.channels import (
    DIRECT,
    EVERYONE,
    MEMBERS,
    RESERVED,
    check_channel,
    is_connection,
    new_name,
    presence_channel,
    user_channel,
)
from pgchannels.errors import InvalidChannel, InvalidUser

NODE = UUID("12345678123456781234567812345678")


class TestChannelNames:
    @pytest.mark.parametrize(
        "name",
        [
            "a",
            "room:1",
            "a/b/c",
            "100%",
            "ünïcödé",
            "日本語",
            "🚀",
            "?&=",
            "'\"\\",
            "$SYS",
            "a" * 200,
            "🚀" * 200,
        ],
    )
    def test_valid(self, name: str) -> None:
        assert check_channel(name) is name

    @pytest.mark.parametrize(
        "character",
        [
            *" \t\n\r\0\x1f\x7f\x85\xa0",
            *"+#*",
            "\u00ad",  # soft hyphen
            "\u200b",  # zero width space
            "\u200d",  # zero width joiner
            "\u2028",
            "\u202e",  # right-to-left override
            "\u2060",
            "\u3000",
            "\ufeff",
            "\uffff",
            "\U000e0041",  # a tag
            chr(0xD800),
            chr(0xDFFF),
        ],
    )
    @pytest.mark.parametrize("where", ["{}", "a{}", "{}a", "a{}a"])
    def test_forbidden_characters(self, character: str, where: str) -> None:
        with pytest.raises(InvalidChannel) as raised:
            check_channel(where.format(character))
        str(raised.value).encode()  # fit for a log, whatever was given

    @pytest.mark.parametrize("name", ["", "a" * 201, "🚀" * 201])
    def test_length(self, name: str) -> None:
        with pytest.raises(InvalidChannel, match="1 to 200"):
            check_channel(name)

    @pytest.mark.parametrize("name", [None, 5, b"room", ["room"], object()])
    def test_not_a_text(self, name: object) -> None:
        with pytest.raises(InvalidChannel, match="must be a str") as raised:
            check_channel(name)
        assert raised.value.channel is name

    @pytest.mark.parametrize("name", [["room"], ("room",), {"room"}])
    def test_several_in_one_get_a_hint(self, name: object) -> None:
        with pytest.raises(InvalidChannel, match="as several arguments"):
            check_channel(name)

    @pytest.mark.parametrize("name", [DIRECT, MEMBERS, user_channel("u"), RESERVED, RESERVED + "x"])
    def test_reserved(self, name: str) -> None:
        with pytest.raises(InvalidChannel, match="reserved"):
            check_channel(name)

    @pytest.mark.parametrize("name", [EVERYONE, RESERVED[:-1], "x" + RESERVED, RESERVED.upper()])
    def test_not_reserved(self, name: str) -> None:
        assert check_channel(name) is name


class TestNewNames:
    def test_its_parts(self) -> None:
        prefix, node, random = new_name("ws:1", NODE).split(".")
        assert (prefix, node) == ("ws:1", NODE.hex)
        assert len(random) == 16

    @given(st.uuids())
    def test_they_are_valid_and_known_as_connections(self, node: UUID) -> None:
        for prefix in ("a", "a.b", "x" * 150, "\U0001f680" * 150):
            name = new_name(prefix, node)
            assert check_channel(name) == name
            assert is_connection(name)

    def test_no_two_are_the_same(self) -> None:
        assert len({new_name("ws", NODE) for _ in range(1000)}) == 1000

    @pytest.mark.parametrize("prefix", ["", "a b", "a+", RESERVED + "x", "x" * 151, None, 5])
    def test_bad_prefixes(self, prefix: Any) -> None:
        with pytest.raises(InvalidChannel):
            new_name(prefix, NODE)

    @pytest.mark.parametrize(
        "name",
        [
            "jobs",
            "7b4ad0b0d4dd406d989151cf1953be1d",
            f"ws.{NODE.hex}",
            f"ws.{NODE.hex}.abc",
            f"ws.{NODE.hex}.{'0' * 17}",
            f"ws.{NODE.hex}.{'g' * 16}",
            f"ws.{NODE.hex.upper()}.{'A' * 16}",
            f"{NODE.hex}.{'0' * 16}",
            f"ws.{NODE.hex}.{'0' * 16}\n",
            f"ws.{NODE.hex}.{'0' * 16}.x",
        ],
    )
    def test_ordinary_ones(self, name: str) -> None:
        assert not is_connection(name)


users = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=300)


class TestUserChannels:
    @given(users)
    def test_any_text_has_a_valid_one_that_is_ours(self, user: str) -> None:
        name = user_channel(user)
        assert name.startswith(RESERVED + "user:")
        assert len(name) <= 200
        assert name.isascii()
        check_channel("x" + name[len(RESERVED) :])  # but for being reserved
        assert user_channel(user) == name

    @given(st.lists(users, min_size=2, max_size=5, unique=True))
    def test_no_two_users_share_one(self, users: list[str]) -> None:
        assert len({user_channel(user) for user in users}) == len(users)

    @pytest.mark.parametrize("user", ["x" * 185, "ü" * 40, "%" * 100, "💥" * 90])
    def test_nor_do_those_with_long_names(self, user: str) -> None:
        name = user_channel(user)
        assert len(name) <= 200
        assert name != user_channel(user + "x")
        # What stands for a long one is nobody's id.
        assert name != user_channel(name.removeprefix(RESERVED + "user:"))

    def test_as_they_are_for_as_long_as_they_fit(self) -> None:
        assert user_channel("x" * 184) == RESERVED + "user:" + "x" * 184

    @pytest.mark.parametrize(
        "user", ["", None, 5, b"u", ["u"], "a\0", "\ud800", "x" * 1001, "漢" * 634]
    )
    def test_no_user(self, user: Any) -> None:
        with pytest.raises(InvalidUser, match="user"):
            user_channel(user)


class TestPresenceChannels:
    @pytest.mark.parametrize("group", ["room", "a:b", "x" * 191, EVERYONE])
    def test_they_are_valid(self, group: str) -> None:
        assert check_channel(presence_channel(group)) == "presence:" + group

    @pytest.mark.parametrize("group", ["x" * 192, "", "a b", DIRECT, None])
    def test_bad_groups(self, group: Any) -> None:
        with pytest.raises(InvalidChannel):
            presence_channel(group)
