"""``@publishes``: what it takes, templates of channels, and changes. No database."""

from __future__ import annotations

import enum
import uuid
from dataclasses import dataclass
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.orm import Mapped, mapped_column

from pgchannels import ConfigurationError, InvalidChannel
from pgchannels.channels import user_channel
from pgchannels.errors import InvalidUser
from pgchannels.orm import Change, publishes
from pgchannels.orm.template import Template, UserTemplate


class Colour(enum.Enum):
    RED = "red"


class TestTemplate:
    @pytest.mark.parametrize(
        ("text", "rendered"),
        [
            ("orders", "orders"),
            ("orders:{a}", "orders:1"),
            ("x{a}{b}{a}", "x1two1"),
            ("{{{a}}}", "{1}"),
            ("{{a}}", "{a}"),
            ("x-{flag}-{colour}", "x-true-red"),
            ("id:{id}", "id:12345678-1234-5678-1234-567812345678"),
            ("x:{none}:{a}", None),
            ("pgchannels-{a}", "pgchannels-1"),
            ("pgchannels:everyone", "pgchannels:everyone"),
        ],
    )
    def test_rendered(self, text: str, rendered: str | None) -> None:
        values = {
            "a": 1,
            "b": "two",
            "flag": True,
            "colour": Colour.RED,
            "id": uuid.UUID("12345678123456781234567812345678"),
            "none": None,
        }
        assert Template(text).render(values.__getitem__) == rendered

    def test_a_users_may_be_a_value_alone(self) -> None:
        template = UserTemplate("{a}")
        assert template.attributes == {"a"}
        assert template.channel(template.render(lambda _: "x:é") or "") == user_channel("x:é")
        assert UserTemplate("pgchannels:{a}").render(lambda _: 1) == "pgchannels:1"
        with pytest.raises(InvalidUser):
            template.channel("")

    @pytest.mark.parametrize("text", ["", "{", "{a!r}", "{a.b}", "x" * 1001, "\0"])
    def test_that_no_user_can_be(self, text: str) -> None:
        with pytest.raises(ConfigurationError, match=r"^the user .* is no template"):
            UserTemplate(text)

    def test_attributes(self) -> None:
        assert Template("x:{a}:{b}:{{c}}:{a}").attributes == {"a", "b"}

    @pytest.mark.parametrize(
        "text",
        [
            "{}",
            "{0}",
            "{a.b}",
            "{a[0]}",
            "{a!r}",
            "{a:>10}",
            "{a:{b}}",
            "{a",
            "a}",
            "{ a }",
            "",
            "orders {a}",
            "orders:*",
            "pgchannels:{a}",
            "x" * 201,
        ],
    )
    def test_refused(self, text: str) -> None:
        with pytest.raises(ConfigurationError, match="template"):
            Template(text)

    @pytest.mark.parametrize(
        "text", ["{a}", "{a}:x", "{a}{b}", "p{a}", "pg{a}:x", "pgchannels{a}", "pgchannels:{a}"]
    )
    def test_does_not_begin_with_a_word_of_its_own(self, text: str) -> None:
        with pytest.raises(ConfigurationError, match="begin with a word of its own"):
            Template(text)

    @pytest.mark.parametrize("value", [b"x", bytearray(b"x"), memoryview(b"x")])
    def test_bytes_are_no_text(self, value: Any) -> None:
        with pytest.raises(InvalidChannel, match="bytes"):
            Template("x{a}").render(lambda _: value)


class TestChange:
    @dataclass
    class Order:
        status: str = "paid"
        name: str = "x"

    def test_old(self) -> None:
        change = Change(self.Order(), "update", frozenset({"status", "total"}), {"status": "open"})
        assert change.old("status") == "open"
        assert change.old("name") == "x"
        with pytest.raises(LookupError, match=r"'total'.*changed="):
            change.old("total")
        with pytest.raises(AttributeError):
            change.old("nothing")

    def test_an_insert_has_no_old_values(self) -> None:
        with pytest.raises(LookupError, match="inserted"):
            Change(self.Order(), "insert", frozenset({"status"}), {}).old("name")

    def test_a_deleted_one_has_those_of_its_row(self) -> None:
        change = Change(self.Order(), "delete", frozenset(), {"status": "open"})
        assert (change.old("status"), change.old("name")) == ("open", "x")


async def awaitable(change: Any) -> Any: ...


class TestDecorating:
    @pytest.mark.parametrize(
        ("channel", "options"),
        [
            ("orders:{a.b}", {}),
            ("{id}", {}),
            (["orders", "{id}"], {}),
            ([], {}),
            ([1], {}),
            (awaitable, {}),
            ("orders", {"on": ()}),
            ("orders", {"on": "inserted"}),
            ("orders", {"on": ("insert", "truncate")}),
            ("orders", {"payload": {"type": "x"}}),
            ("orders", {"payload": awaitable}),
            ("orders", {"when": True}),
            ("orders", {"when": awaitable}),
            ("orders", {"changed": ()}),
            ("orders", {"changed": [1]}),
            ("orders", {"ttl": 0}),
            ("orders", {"ttl": "soon"}),
            ("orders", {"headers": {"a": 1}}),
            ("orders", {"headers": [("a", "b")]}),
            ("orders", {"headers": {"pgchannels-x": "y"}}),
        ],
    )
    def test_refused(self, channel: Any, options: Any) -> None:
        with pytest.raises(ConfigurationError):
            publishes(channel, **options)

    @pytest.mark.parametrize("target", [None, "Order", 1, lambda: None])
    def test_no_class(self, target: Any) -> None:
        with pytest.raises(ConfigurationError, match="class"):
            publishes("orders")(target)

    @pytest.mark.parametrize(
        "options", [{"channel": "orders:{nothing}"}, {"channel": "orders", "changed": "nothing"}]
    )
    def test_an_attribute_that_is_not_there(self, options: Any) -> None:
        class Base(orm.DeclarativeBase):
            pass

        with pytest.raises(ConfigurationError, match="'nothing'"):

            @publishes(**options)
            class Order(Base):
                __tablename__ = "orders"
                id: Mapped[int] = mapped_column(primary_key=True)

    @pytest.mark.parametrize(
        "options",
        [
            {"channel": "orders:{label}"},
            {"channel": "orders:{method}"},
            {"channel": "orders:{label_length}"},
            {"channel": "orders", "changed": "label"},
            {"channel": "orders", "changed": "label_length"},
        ],
    )
    def test_an_attribute_that_is_no_column(self, options: Any) -> None:
        class Base(orm.DeclarativeBase):
            pass

        @publishes(**options)
        class Order(Base):
            __tablename__ = "orders"
            id: Mapped[int] = mapped_column(primary_key=True)
            name: Mapped[str]
            label_length: Mapped[int] = orm.column_property(sa.func.length("x"))

            @property
            def label(self) -> str:
                return self.name

            def method(self) -> None: ...

        with pytest.raises(ConfigurationError, match="column"):
            Base.registry.configure()

    def test_on_a_mixin_it_is_found_when_mapped(self) -> None:
        class Base(orm.DeclarativeBase):
            pass

        @publishes("orders:{nothing}")
        class Tells:
            pass

        class Order(Tells, Base):
            __tablename__ = "orders"
            id: Mapped[int] = mapped_column(primary_key=True)

        with pytest.raises(ConfigurationError, match="'nothing'"):
            Base.registry.configure()

    def test_after_configuration(self) -> None:
        class Base(orm.DeclarativeBase):
            pass

        class Order(Base):
            __tablename__ = "orders"
            id: Mapped[int] = mapped_column(primary_key=True)

            @property
            def label(self) -> str:
                return ""

        Base.registry.configure()
        assert publishes("orders:{id}")(Order) is Order
        with pytest.raises(ConfigurationError, match="'label'"):
            publishes("orders:{label}")(Order)
