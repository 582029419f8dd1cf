"""What objects publish: contents, channels and conditions, for classes mapped in every way."""

from __future__ import annotations

import decimal
import enum
import json
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import psycopg
import pytest
import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import event, orm
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import IntegrityError, PendingRollbackError, SAWarning
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Mapped, Session, mapped_column, relationship, sessionmaker
from sqlalchemy.pool import NullPool

from pgchannels import ConfigurationError, InvalidChannel, InvalidPayload, Settings
from pgchannels.channels import user_channel
from pgchannels.errors import InvalidUser
from pgchannels.orm import Change, install, publish, publishes
from pgchannels.payloads import JSONSerializer
from pgchannels.waker import waker_for
from tests.support.sessions import Log, WakeCounter


@pytest.fixture
def base() -> type[orm.DeclarativeBase]:
    """One whose classes no other test knows."""

    class Base(orm.DeclarativeBase):
        pass

    return Base


@pytest.fixture
def settings(database_url: str) -> Settings:
    return Settings(database_url=database_url)


@pytest.fixture
def counter(settings: Settings) -> WakeCounter:
    return WakeCounter(settings)


@pytest.fixture
def engine(database_url: str) -> Iterator[sa.Engine]:
    url = database_url.replace("postgresql:", "postgresql+psycopg:")
    engine = sa.create_engine(url, poolclass=NullPool)
    yield engine
    engine.dispose()


@pytest.fixture
async def async_engine(database_url: str) -> AsyncIterator[AsyncEngine]:
    url = database_url.replace("postgresql:", "postgresql+asyncpg:")
    created = create_async_engine(url, poolclass=NullPool)
    yield created
    await created.dispose()


@pytest.fixture
def make(engine: sa.Engine, counter: WakeCounter) -> sessionmaker[Session]:
    maker = sessionmaker(engine)
    install(maker, counter.layer)
    return maker


@pytest.fixture
def log(database_url: str) -> Iterator[Log]:
    with closing(Log(database_url)) as log:
        yield log


@pytest.fixture
def inserts(engine: sa.Engine) -> list[str]:
    """Statements that write to the outbox."""
    statements: list[str] = []

    def count(_: Any, cursor: Any, statement: str, *rest: Any) -> None:
        if "outbox" in statement:
            statements.append(statement)

    event.listen(engine, "before_cursor_execute", count)
    return statements


class Base(orm.DeclarativeBase):
    pass


class Customer(Base):
    __tablename__ = "customers"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(default="somebody")


class Status(enum.Enum):
    OPEN = "open"
    PAID = "paid"


@publishes("customers:{customer_id}")
@publishes(
    "statuses", on="update", changed="status", payload=lambda change: {"was": change.old("status")}
)
class Order(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    customer_id: Mapped[int | None] = mapped_column(sa.ForeignKey("customers.id"))
    status: Mapped[Status] = mapped_column(default=Status.OPEN)
    total: Mapped[decimal.Decimal] = mapped_column(server_default="0")
    note: Mapped[str | None]
    customer: Mapped[Customer | None] = relationship()


@pytest.fixture
def orders(engine: sa.Engine, make: sessionmaker[Session]) -> sessionmaker[Session]:
    """Sessions, with three customers in the database."""
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(sa.insert(Customer), [{"name": name} for name in "abc"])
    return make


class TestDefaultPayload:
    def test_of_each_operation(self, orders: sessionmaker[Session], log: Log) -> None:
        with orders() as session:
            order = Order(customer_id=1, total=decimal.Decimal("1.10"))
            session.add(order)
            session.commit()
            order.note = "x"
            session.commit()
            session.delete(order)
            session.commit()
        new = {"id": 1, "customer_id": 1, "status": "open", "total": "1.10", "note": None}
        assert log.messages() == [
            ("customers:1", {"type": "orders.inserted", "key": {"id": 1}, "new": new}),
            ("customers:1", {"type": "orders.updated", "key": {"id": 1}, "new": {"note": "x"}}),
            ("customers:1", {"type": "orders.deleted", "key": {"id": 1}}),
        ]

    def test_what_the_server_has_filled_in(self, orders: sessionmaker[Session], log: Log) -> None:
        with orders() as session:
            session.add(Order(customer_id=1))
            session.commit()
            session.bulk_save_objects([Order(customer_id=1)])
            session.commit()
        flushed, saved = (payload["new"] for payload in log.payloads())
        # By an INSERT's RETURNING; the other one returns keys, and there is no query for more.
        assert flushed == {
            "id": 1,
            "customer_id": 1,
            "status": "open",
            "total": "0",
            "note": None,
        }
        assert saved == {"id": 2, "customer_id": 1, "status": "open", "note": None}

    def test_of_every_type(
        self, engine: sa.Engine, make: sessionmaker[Session], log: Log, base: Any
    ) -> None:
        class Value(base):  # type: ignore[misc]
            __tablename__ = "values"
            id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
            at: Mapped[datetime] = mapped_column(sa.DateTime(timezone=True))
            takes: Mapped[timedelta]
            status: Mapped[Status]
            prices: Mapped[list[decimal.Decimal]] = mapped_column(sa.ARRAY(sa.Numeric))
            data: Mapped[dict[str, Any]] = mapped_column(postgresql.JSONB)
            address: Mapped[Any] = mapped_column(postgresql.INET)
            span: Mapped[Any] = mapped_column(postgresql.INT4RANGE)

        publishes("values:{id}")(Value)
        base.metadata.create_all(engine)
        with make() as session:
            session.add(
                Value(
                    id=uuid.UUID(int=1),
                    at=datetime(2024, 1, 2, tzinfo=UTC),
                    takes=timedelta(minutes=1),
                    status=Status.PAID,
                    prices=[decimal.Decimal("1.5")],
                    data={"a": [1, None]},
                    address="127.0.0.1",
                    span=postgresql.Range(1, 2),
                )
            )
            session.commit()
            session.execute(sa.text("select 1"))
            (value,) = session.scalars(sa.select(Value))
            session.expire(value)
            session.delete(value)
            session.commit()
        inserted, deleted = log.payloads()
        assert inserted["new"] == {
            "id": "00000000-0000-0000-0000-000000000001",
            "at": "2024-01-02T00:00:00+00:00",
            "takes": "PT1M",
            "status": "paid",
            "prices": ["1.5"],
            "data": {"a": [1, None]},
            "address": "127.0.0.1",
            "span": {"lower": 1, "upper": 2, "bounds": "[)", "empty": False},
        }
        assert deleted["key"] == {"id": "00000000-0000-0000-0000-000000000001"}

    def test_a_serialiser_of_ones_own(
        self, orders: sessionmaker[Session], counter: WakeCounter, log: Log
    ) -> None:
        class Cents(JSONSerializer):
            def dumps(self, payload: Mapping[str, Any]) -> str:
                return json.dumps(payload, default=lambda value: f"{value!r}")

        counter.serializer = Cents()
        with orders() as session:
            session.add(Order(customer_id=1, total=decimal.Decimal("1.10")))
            session.commit()
        assert log.payloads()[0]["new"]["total"] == "Decimal('1.10')"

    def test_bytes(
        self, engine: sa.Engine, make: sessionmaker[Session], database_url: str, base: Any
    ) -> None:
        @publishes("files")
        class File(base):  # type: ignore[misc]
            __tablename__ = "files"
            id: Mapped[int] = mapped_column(primary_key=True)
            content: Mapped[bytes]

        base.metadata.create_all(engine)
        with make() as session:
            session.add(File(content=b"\0\xff"))
            session.commit()
        with psycopg.connect(database_url) as connection:
            row = connection.execute(
                "select payload->'new'->'content', attachments from pgchannels.outbox"
            ).fetchone()
        assert row == (None, [b"\0\xff"])

    @pytest.mark.parametrize("value", [{1: 2}, {"a": object()}, float("nan"), 2**70])
    def test_a_value_that_cannot_be_encoded(
        self, engine: sa.Engine, make: sessionmaker[Session], log: Log, base: Any, value: Any
    ) -> None:
        class Anything(sa.TypeDecorator[Any]):
            impl = sa.Text
            cache_ok = True

            def process_bind_param(self, value: Any, dialect: Any) -> str:
                return repr(value)

        @publishes("things")
        class Thing(base):  # type: ignore[misc]
            __tablename__ = "things"
            id: Mapped[int] = mapped_column(primary_key=True)
            odd: Mapped[Any] = mapped_column(Anything)

        base.metadata.create_all(engine)
        with make() as session:
            session.add(Thing(odd=value))
            with pytest.raises(InvalidPayload, match=r"Thing\.odd cannot be published"):
                session.commit()
            session.rollback()
            assert session.scalar(sa.select(sa.func.count()).select_from(Thing)) == 0
        assert log.messages() == []

    def test_a_key_that_changes(self, orders: sessionmaker[Session], log: Log) -> None:
        with orders() as session:
            order = Order(id=5, customer_id=1)
            session.add(order)
            session.commit()
            order.id = 6
            session.commit()
            order.id = 7
            session.delete(order)
            session.commit()
        assert [
            (payload["key"], payload.get("new", {}).get("id")) for payload in log.payloads()
        ] == [
            ({"id": 5}, 5),
            ({"id": 5}, 6),  # which row it is that has another key now
            ({"id": 6}, None),
        ]

    @pytest.mark.parametrize("expired", [True, False])
    def test_a_part_of_a_key_changes(
        self, base: Any, engine: sa.Engine, counter: WakeCounter, log: Log, expired: bool
    ) -> None:
        @publishes("seats")
        class Seat(base):  # type: ignore[misc]
            __tablename__ = "seats"

            row: Mapped[int] = mapped_column(primary_key=True)
            place: Mapped[str] = mapped_column(primary_key=True)

        base.metadata.create_all(engine)
        maker = sessionmaker(engine, expire_on_commit=expired)
        install(maker, counter.layer)
        with maker() as session:
            seat = Seat(row=1, place="A")
            session.add(seat)
            session.commit()
            seat.place = "B"
            session.commit()
            session.refresh(seat)
            session.expunge(seat)
            seat.row = 2
            session.bulk_save_objects([seat])
            session.commit()
        assert [(payload["key"], payload["new"]) for payload in log.payloads()[1:]] == [
            ({"row": 1, "place": "A"}, {"place": "B"}),
            ({"row": 1, "place": "B"}, {"row": 2}),
        ]


class TestUpdates:
    @pytest.fixture
    def order(self, orders: sessionmaker[Session]) -> Iterator[Order]:
        """One that is stored, in a session of its own, and expired."""
        with orders() as session:
            order = Order(customer_id=1)
            session.add(order)
            session.commit()
            yield order

    def new(self, log: Log) -> list[Any]:
        return [
            (channel, payload["new"])
            for channel, payload in log.messages()
            if payload.get("type") == "orders.updated"
        ]

    def commit(self, order: Order) -> None:
        session = orm.object_session(order)
        assert session is not None
        session.commit()

    def test_no_change_is_none(self, order: Order, log: Log) -> None:
        assert order.note is None
        order.note = "x"
        order.note = None
        order.customer_id = 1
        self.commit(order)
        assert self.new(log) == []

    def test_set_to_the_same_while_expired(self, order: Order, log: Log) -> None:
        # Both are asked for: one by a template, the other by changed=.
        order.customer_id = 1
        order.status = Status.OPEN
        self.commit(order)
        assert log.payloads()[1:] == []

    def test_by_an_expression(self, order: Order, log: Log) -> None:
        order.total = cast(Any, Order.total + 5)
        order.status = cast(Any, sa.cast(sa.literal("PAID", sa.Text), Order.status.type))
        self.commit(order)
        assert self.new(log) == [("customers:1", {"status": "paid", "total": "5"})]
        assert log.payloads()[-1] == {"was": "open"}

    def test_by_a_relationship(self, order: Order, log: Log) -> None:
        session = orm.object_session(order)
        assert session is not None
        order.customer = session.get(Customer, 2)
        self.commit(order)
        assert self.new(log) == [
            ("customers:1", {"customer_id": 2}),
            ("customers:2", {"customer_id": 2}),
        ]

    @pytest.mark.parametrize("expired", [True, False])
    def test_to_another_channel(self, order: Order, log: Log, expired: bool) -> None:
        if not expired:
            assert order.customer_id == 1
        for customer in (2, 3, None, 1):
            order.customer_id = customer
            self.commit(order)
        assert [channel for channel, _ in self.new(log)] == [
            "customers:1",
            "customers:2",
            "customers:2",
            "customers:3",
            "customers:3",
            "customers:1",
        ]

    def test_only_what_is_asked_for(self, order: Order, log: Log) -> None:
        order.note = "x"
        self.commit(order)
        order.status = Status.PAID
        self.commit(order)
        assert [payload for channel, payload in log.messages() if channel == "statuses"] == [
            {"was": "open"}
        ]

    def test_from_a_listener(self, order: Order, log: Log) -> None:
        def note(mapper: Any, connection: Any, target: Order) -> None:
            target.note = "touched"
            target.status = Status.OPEN  # as it was

        event.listen(Order, "before_update", note)
        try:
            order.total = decimal.Decimal(3)
            order.status = Status.PAID
            self.commit(order)
        finally:
            event.remove(Order, "before_update", note)
        assert self.new(log) == [("customers:1", {"total": "3", "note": "touched"})]

    def test_a_row_that_has_gone(self, order: Order, log: Log, engine: sa.Engine) -> None:
        assert order.customer_id == 1
        with engine.begin() as connection:
            connection.execute(sa.delete(Order))
        order.status = Status.PAID
        with pytest.raises(orm.exc.StaleDataError):
            self.commit(order)
        assert self.new(log) == []

    async def test_what_has_expired_can_be_set_without_a_query(
        self, orders: Any, async_engine: AsyncEngine, counter: WakeCounter, log: Log
    ) -> None:
        maker = async_sessionmaker(async_engine)
        install(maker, counter.layer)
        async with maker() as session:
            order = Order(customer_id=1)
            session.add(order)
            await session.commit()
            order.customer_id = 2
            order.status = Status.PAID
            await session.commit()
        assert log.messages()[1:] == [
            (channel, {"type": "orders.updated", "key": {"id": 1}, "new": new})
            for new in [{"customer_id": 2, "status": "paid"}]
            for channel in ("customers:1", "customers:2")
        ] + [("statuses", {"was": "open"})]

    def test_what_an_update_fills_in(
        self, engine: sa.Engine, make: sessionmaker[Session], log: Log, base: Any
    ) -> None:
        @publishes("things", on="update")
        @publishes(
            "things",
            on="update",
            payload=lambda change: {"was": change.old("version")},
        )
        class Thing(base):  # type: ignore[misc]
            __tablename__ = "things"
            id: Mapped[int] = mapped_column(primary_key=True)
            name: Mapped[str]
            version: Mapped[int] = mapped_column()
            edited: Mapped[str] = mapped_column(default="no", onupdate="yes")
            __mapper_args__ = {"version_id_col": version}  # noqa: RUF012

        base.metadata.create_all(engine)
        with make() as session:
            thing = Thing(name="a")
            session.add(thing)
            session.commit()
            assert thing.version == 1
            thing.name = "b"
            session.commit()
        first, second = log.payloads()
        assert first["new"] == {"name": "b", "version": 2, "edited": "yes"}
        assert second == {"was": 1}

    @pytest.mark.parametrize(
        "state", ["loaded", "expired", "deferred", "set to what it is", "merged"]
    )
    def test_what_an_update_fills_in_of_whatever_object(
        self, engine: sa.Engine, make: sessionmaker[Session], log: Log, base: Any, state: str
    ) -> None:
        """The same messages, whether or not the former values had been loaded."""

        def was(change: Change[Any]) -> dict[str, Any]:
            return {"was": [change.old("version"), change.old("count")]}

        @publishes("versions", on="update", changed="version", payload=was)
        @publishes("counts", on="update", changed="count", payload=was)
        @publishes("edits", on="update", changed="edited")
        @publishes("same", on="update", changed="same")
        class Thing(base):  # type: ignore[misc]
            __tablename__ = "things"
            id: Mapped[int] = mapped_column(primary_key=True)
            name: Mapped[str]
            version: Mapped[int] = mapped_column()
            count: Mapped[int] = mapped_column(default=0, onupdate=lambda: 7)
            same: Mapped[str] = mapped_column(default="same", onupdate="same")
            edited: Mapped[datetime | None] = mapped_column(onupdate=sa.func.now())
            __mapper_args__ = {"version_id_col": version}  # noqa: RUF012

        base.metadata.create_all(engine)
        with make() as session:
            thing = Thing(name="a")
            session.add(thing)
            session.commit()
            if state == "loaded":
                session.refresh(thing)
            elif state == "deferred":
                session.expunge_all()
                thing = session.scalars(sa.select(Thing).options(orm.load_only(Thing.name))).one()
            elif state == "set to what it is":
                for name in ("version", "count", "same", "edited"):
                    setattr(thing, name, getattr(thing, name))
            elif state == "merged":
                session.refresh(thing)
                session.expunge(thing)
                # Sets each attribute of the object in the session.
                thing = session.merge(thing)
            thing.name = "b"
            session.commit()
        assert log.messages() == [
            ("versions", {"was": [1, 0]}),
            ("counts", {"was": [1, 0]}),
            (
                "edits",
                {
                    "type": "things.updated",
                    "key": {"id": 1},
                    "new": {"name": "b", "version": 2, "count": 7},
                },
            ),
        ]

    @pytest.mark.parametrize("state", ["loaded", "expired"])
    def test_what_an_update_fills_in_costs_no_query(
        self, engine: sa.Engine, make: sessionmaker[Session], log: Log, base: Any, state: str
    ) -> None:
        class Thing(base):  # type: ignore[misc]
            __tablename__ = "things"
            id: Mapped[int] = mapped_column(primary_key=True)
            name: Mapped[str]
            count: Mapped[int] = mapped_column(default=0, onupdate=lambda: 7)
            edited: Mapped[datetime | None] = mapped_column(onupdate=sa.func.now())

        base.metadata.create_all(engine)
        statements: list[str] = []
        event.listen(
            engine, "before_cursor_execute", lambda *args: statements.append(args[2].split()[0])
        )

        def write(session: Session, id: int) -> list[str]:
            things = [Thing(id=id, name="a"), Thing(id=id + 1, name="a")]
            session.add_all(things)
            session.commit()
            for thing in things:
                if state == "loaded":
                    session.refresh(thing)
                thing.name = "b"
            statements.clear()
            session.commit()
            return statements.copy()

        with Session(engine) as session:
            plain = write(session, 1)
        publishes("things", on="update")(Thing)
        publishes("edits", on="update", changed=["edited", "count"])(Thing)
        with make() as session:
            publishing = write(session, 3)
        assert sorted(publishing) == sorted([*plain, "INSERT"])
        assert [payload["new"] for payload in log.payloads()] == [{"name": "b", "count": 7}] * 4

    def test_a_deferred_value_that_no_rule_names(
        self, engine: sa.Engine, make: sessionmaker[Session], log: Log, base: Any
    ) -> None:
        """It is told of where its table has been updated, and not read before."""

        class Thing(base):  # type: ignore[misc]
            __tablename__ = "things"
            id: Mapped[int] = mapped_column(primary_key=True)
            kind: Mapped[str]
            name: Mapped[str]
            count: Mapped[int] = mapped_column(default=0, onupdate=lambda: 7)
            __mapper_args__ = {"polymorphic_on": "kind"}  # noqa: RUF012

        @publishes("tools", on="update")
        class Tool(Thing):
            __tablename__ = "tools"
            id: Mapped[int] = mapped_column(sa.ForeignKey(Thing.id), primary_key=True)
            size: Mapped[int]
            uses: Mapped[int] = mapped_column(default=0, onupdate=lambda: 8)
            __mapper_args__ = {"polymorphic_identity": "tool"}  # noqa: RUF012

        base.metadata.create_all(engine)
        with make() as session:
            session.add(Tool(id=1, name="a", size=1))
            session.commit()
            for changes in ({"name": "b"}, {"size": 2}, {"name": "c", "size": 3}, {"size": 3}):
                session.expunge_all()
                some = orm.load_only(Tool.name, Tool.size)
                tool = session.scalars(sa.select(Tool).options(some)).one()
                for name, value in changes.items():
                    setattr(tool, name, value)
                session.commit()
        assert [payload["new"] for payload in log.payloads()] == [
            {"name": "b", "count": 7},
            {"size": 2, "uses": 8},
            {"name": "c", "count": 7, "size": 3, "uses": 8},
        ]

    def test_an_update_that_only_fills_in(
        self, engine: sa.Engine, make: sessionmaker[Session], log: Log, base: Any
    ) -> None:
        """Set to what it is, without being loaded, it is written, and the version changes."""

        @publishes("names", on="update", changed=["name"])
        @publishes("versions", on="update", changed="version")
        class Thing(base):  # type: ignore[misc]
            __tablename__ = "things"
            id: Mapped[int] = mapped_column(primary_key=True)
            name: Mapped[str]
            version: Mapped[int] = mapped_column()
            __mapper_args__ = {"version_id_col": version}  # noqa: RUF012

        base.metadata.create_all(engine)
        with make() as session:
            thing = Thing(name="a")
            session.add(thing)
            session.commit()
            thing.name = "a"
            session.commit()
            assert thing.version == 2
            thing.name = "a"  # it is loaded by now, and there is nothing to do
            session.commit()
        assert log.messages() == [
            ("versions", {"type": "things.updated", "key": {"id": 1}, "new": {"version": 2}})
        ]

    def test_many_to_many_is_for_watch(
        self, engine: sa.Engine, make: sessionmaker[Session], log: Log, base: Any
    ) -> None:
        """Rows of an association table are no objects, so only watch() tells of them."""
        tagged = sa.Table(
            "tagged",
            base.metadata,
            sa.Column("thing_id", sa.ForeignKey("things.id"), primary_key=True),
            sa.Column("tag_id", sa.ForeignKey("tags.id"), primary_key=True),
        )

        class Tag(base):  # type: ignore[misc]
            __tablename__ = "tags"
            id: Mapped[int] = mapped_column(primary_key=True)

        @publishes("things:{id}", on="update")
        class Thing(base):  # type: ignore[misc]
            __tablename__ = "things"
            id: Mapped[int] = mapped_column(primary_key=True)
            tags: Mapped[list[Tag]] = orm.relationship(secondary=tagged)

        base.metadata.create_all(engine)
        with make() as session:
            session.execute(sa.text("select pgchannels.watch('tagged', 'things:{thing_id}')"))
            session.add(thing := Thing(id=1))
            session.commit()
            thing.tags.append(Tag(id=7))
            session.commit()
            thing.tags.clear()
            session.commit()
        assert [(channel, payload["type"]) for channel, payload in log.messages()] == [
            ("things:1", "tagged.inserted"),
            ("things:1", "tagged.deleted"),
        ]

    def test_composites_and_synonyms(
        self, engine: sa.Engine, make: sessionmaker[Session], log: Log, base: Any
    ) -> None:
        @dataclass
        class Point:
            x: int
            y: int

        @publishes("moved", on="update", changed="at", payload=lambda change: {"n": "at"})
        @publishes("renamed", on="update", changed=["label"], payload=lambda change: {"n": "name"})
        class Thing(base):  # type: ignore[misc]
            __tablename__ = "things"
            id: Mapped[int] = mapped_column(primary_key=True)
            name: Mapped[str]
            label: Mapped[str] = orm.synonym("name")
            at: Mapped[Any] = orm.composite(
                Point, mapped_column("x", sa.Integer), mapped_column("y", sa.Integer)
            )

        base.metadata.create_all(engine)
        with make() as session:
            thing = Thing(name="a", at=Point(1, 2))
            session.add(thing)
            session.commit()
            thing.at = Point(1, 3)
            session.commit()
            thing.label = "b"
            session.commit()
        assert log.read() == ["at", "name"]


class TestUsers:
    """``user=``: to all connections of a user."""

    @pytest.fixture
    def invoices(self, engine: sa.Engine, base: Any) -> Any:
        @publishes("invoices", user="{owner}")
        @publishes(
            user=[lambda change: ["auditor", "boss"], lambda change: None],
            on="delete",
            payload=lambda change: {"type": "gone"},
        )
        class Invoice(base):  # type: ignore[misc]
            __tablename__ = "invoices"
            id: Mapped[int] = mapped_column(primary_key=True)
            owner: Mapped[str | None]

        base.metadata.create_all(engine)
        return Invoice

    def test_is_told_who_is_named_in_the_row(
        self, make: sessionmaker[Session], log: Log, invoices: Any
    ) -> None:
        with make() as session:
            session.add_all([mine := invoices(id=1, owner="a:b"), nobodys := invoices(id=2)])
            session.commit()
            mine.owner = "c"
            session.commit()
            mine.owner = None
            session.commit()
            session.delete(nobodys)
            session.commit()
        assert [(channel, payload["type"]) for channel, payload in log.messages()] == [
            ("invoices", "invoices.inserted"),
            (user_channel("a:b"), "invoices.inserted"),
            ("invoices", "invoices.inserted"),
            ("invoices", "invoices.updated"),
            (user_channel("a:b"), "invoices.updated"),
            (user_channel("c"), "invoices.updated"),
            ("invoices", "invoices.updated"),
            (user_channel("c"), "invoices.updated"),
            ("invoices", "invoices.deleted"),
            (user_channel("auditor"), "gone"),
            (user_channel("boss"), "gone"),
        ]

    def test_an_id_that_cannot_be_fails_the_flush(
        self, make: sessionmaker[Session], log: Log, invoices: Any, engine: sa.Engine
    ) -> None:
        with make() as session:
            session.add(invoices(id=1, owner=""))
            with pytest.raises(InvalidUser):
                session.commit()
        # What something else has written can be repaired: it was nobody's.
        with engine.begin() as connection:
            connection.exec_driver_sql("insert into invoices values (1, '')")
        with make() as session:
            session.get_one(invoices, 1).owner = "a"
            session.commit()
        assert [channel for channel, _ in log.messages()] == ["invoices", user_channel("a")]


class TestDeletes:
    def test_goes_to_where_the_row_was(self, orders: sessionmaker[Session], log: Log) -> None:
        with orders() as session:
            kept, expired = Order(customer_id=1), Order(customer_id=1)
            session.add_all([kept, expired])
            session.commit()
            assert kept.customer_id == 1
            kept.customer_id = expired.customer_id = 2
            session.delete(kept)
            session.delete(expired)
            session.commit()
        assert [(channel, payload["type"]) for channel, payload in log.messages()[2:]] == [
            ("customers:1", "orders.deleted"),
            ("customers:1", "orders.deleted"),
        ]

    def test_somebody_else_was_first(
        self, orders: sessionmaker[Session], log: Log, engine: sa.Engine
    ) -> None:
        with orders() as session:
            order = Order(customer_id=1)
            session.add(order)
            session.commit()
            assert order.customer_id == 1
            session.delete(order)
            session.expire(order)
            with engine.begin() as connection:
                connection.execute(sa.delete(Order))
            with pytest.raises((orm.exc.ObjectDeletedError, SAWarning)):
                session.commit()
        assert len(log.messages()) == 1

    @pytest.mark.parametrize("expired", [True, False])
    def test_another_object_takes_over_the_row(
        self, orders: sessionmaker[Session], log: Log, expired: bool
    ) -> None:
        with orders() as session:
            first = Order(id=1, customer_id=1)
            session.add(first)
            session.commit()
            if not expired:
                assert first.customer_id == 1
            session.delete(first)
            session.add(Order(id=1, customer_id=2))
            session.commit()
        assert [(channel, payload["type"]) for channel, payload in log.messages()[1:]] == [
            ("customers:1", "orders.deleted"),
            ("customers:2", "orders.inserted"),
        ]

    def test_an_object_takes_over_the_row_of_an_orphan(
        self, engine: sa.Engine, make: sessionmaker[Session], log: Log, base: Any
    ) -> None:
        class House(base):  # type: ignore[misc]
            __tablename__ = "houses"
            id: Mapped[int] = mapped_column(primary_key=True)
            rooms: Mapped[list[Any]] = relationship("Room", cascade="all, delete-orphan")

        @publishes("rooms:{name}")
        class Room(base):  # type: ignore[misc]
            __tablename__ = "rooms"
            id: Mapped[int] = mapped_column(primary_key=True)
            house_id: Mapped[int] = mapped_column(sa.ForeignKey("houses.id"))
            name: Mapped[str]

        base.metadata.create_all(engine)
        with make() as session:
            house = House(rooms=[Room(id=1, name="old"), Room(id=2, name="kept")])
            session.add(house)
            session.commit()
            house.rooms = [house.rooms[1], Room(id=1, name="new"), Room(id=3, name="more")]
            session.commit()
        assert [(channel, payload["type"]) for channel, payload in log.messages()[2:]] == [
            ("rooms:old", "rooms.deleted"),
            ("rooms:new", "rooms.inserted"),
            ("rooms:more", "rooms.inserted"),
        ]

    def test_a_deferred_column_in_the_channel(
        self, engine: sa.Engine, make: sessionmaker[Session], log: Log, base: Any
    ) -> None:
        @publishes("things:{place}", on="delete")
        class Thing(base):  # type: ignore[misc]
            __tablename__ = "things"
            id: Mapped[int] = mapped_column(primary_key=True)
            place: Mapped[str] = mapped_column(deferred=True)

        base.metadata.create_all(engine)
        with make() as session:
            session.add(Thing(place="here"))
            session.commit()
            session.expunge_all()
            session.delete(session.scalars(sa.select(Thing)).one())
            session.commit()
        assert [channel for channel, _ in log.messages()] == ["things:here"]


class OrderOut(BaseModel):
    model_config = ConfigDict(title="an order")

    id: int
    total: decimal.Decimal
    customer: CustomerOut | None


class CustomerOut(BaseModel):
    name: str


class Camel(BaseModel):
    model_config = ConfigDict(from_attributes=True, serialize_by_alias=True)

    id: int
    total: decimal.Decimal = Field(decimal.Decimal("1.10"), alias="grandTotal")


def test_a_model_has_one_text_however_it_is_published(
    engine: sa.Engine, base: Any, make: sessionmaker[Session], log: Log
) -> None:
    @publishes("rows", payload=Camel, on="insert")
    @publishes("rows", payload=lambda change: Camel(id=change.object.id), on="insert")
    @publishes("rows", payload=lambda change: {"in": [Camel(id=1)]}, on="insert")
    class Thing(base):  # type: ignore[misc]
        __tablename__ = "things"
        id: Mapped[int] = mapped_column(primary_key=True)

    base.metadata.create_all(engine)
    with make() as session:
        publish(session, "rows", Camel(id=1))
        publish(session, "rows", {"in": [Camel(id=1)]})
        session.add(Thing())
        session.commit()
    text = {"id": 1, "grandTotal": "1.10"}
    assert sorted(log.payloads(), key=repr) == [text, text, text, {"in": [text]}, {"in": [text]}]


class TestFunctions:
    """Channels, payloads and conditions of one's own."""

    @pytest.fixture
    def declare(self, engine: sa.Engine, base: Any) -> Callable[..., Any]:
        def declare(*targets: Any, **options: Any) -> Any:
            @publishes(*targets, **options)
            class Thing(base):  # type: ignore[misc]
                __tablename__ = "things"
                id: Mapped[int] = mapped_column(primary_key=True)
                name: Mapped[str | None]

            base.metadata.create_all(engine)
            return Thing

        return declare

    @pytest.mark.parametrize(
        ("channel", "expected"),
        [
            (lambda change: None, []),
            (lambda change: [], []),
            (lambda change: f"thing-{change.object.id}", ["thing-1"]),
            (lambda change: ("b", "a", "b"), ["b", "a"]),
            (lambda change: (name for name in "ab"), ["a", "b"]),
            (["a", lambda change: change.operation, "a", "things:{name}"], ["a", "insert"]),
            (("things:{id}", "all"), ["things:1", "all"]),
        ],
    )
    def test_channels(
        self,
        declare: Callable[..., Any],
        make: sessionmaker[Session],
        log: Log,
        channel: Any,
        expected: list[str],
    ) -> None:
        thing = declare(channel)
        with make() as session:
            session.add(thing())
            session.commit()
        assert [name for name, _ in log.messages()] == expected

    @pytest.mark.parametrize(
        "channel",
        [lambda change: "no channel", lambda change: [["a"]], lambda change: 1, "a:{name}"],
    )
    def test_no_channel(
        self, declare: Callable[..., Any], make: sessionmaker[Session], log: Log, channel: Any
    ) -> None:
        thing = declare(channel)
        with make() as session:
            session.add(thing(name="not good"))
            with pytest.raises(InvalidChannel):
                session.commit()
            session.rollback()
            assert session.scalar(sa.select(sa.func.count()).select_from(thing)) == 0
            session.commit()
        assert log.messages() == []

    def test_a_row_whose_channel_cannot_be(
        self,
        declare: Callable[..., Any],
        make: sessionmaker[Session],
        engine: sa.Engine,
        log: Log,
    ) -> None:
        thing = declare(["all", "things:{name}"])
        with engine.begin() as connection:
            connection.execute(sa.insert(thing), [{"name": "no name"}, {"name": "not one"}])
        with make() as session:
            repaired, deleted = session.scalars(sa.select(thing).order_by(thing.id))
            repaired.name = "name"
            session.commit()
            session.delete(deleted)
            session.commit()
            repaired.name = "again not"
            with pytest.raises(InvalidChannel, match="again not"):
                session.commit()
        assert [(channel, payload["type"]) for channel, payload in log.messages()] == [
            ("all", "things.updated"),
            ("things:name", "things.updated"),
            ("all", "things.deleted"),
        ]

    @pytest.mark.parametrize("place", ["channel", "payload", "when"])
    def test_an_exception_fails_the_flush(
        self, declare: Callable[..., Any], make: sessionmaker[Session], log: Log, place: str
    ) -> None:
        def fail(change: Change[Any]) -> Any:
            if change.object.name == "bad":
                raise RuntimeError("not now")
            given: dict[str, Any] = {
                "channel": "things",
                "payload": {"n": change.object.name},
                "when": True,
            }
            return given[place]

        thing = declare(**{"channel": "things", "payload": lambda _: {"n": "good"}, place: fail})
        with make() as session:
            session.add(thing(name="good"))
            session.flush()
            savepoint = session.begin_nested()
            session.add(thing(name="bad"))
            with pytest.raises(RuntimeError, match="not now"):
                session.flush()
            with pytest.raises(PendingRollbackError):
                session.scalars(sa.select(thing)).all()
            savepoint.rollback()
            session.commit()
            assert session.scalars(sa.select(thing.name)).all() == ["good"]
        assert log.read() == ["good"]

    def test_what_a_change_tells(
        self, declare: Callable[..., Any], make: sessionmaker[Session], log: Log
    ) -> None:
        changes: list[Change[Any]] = []

        def note(change: Change[Any]) -> None:
            changes.append(change)

        thing = declare("things", payload=note)
        with make() as session:
            added = thing()
            session.add(added)
            session.commit()
            assert added.name is None
            added.name = "x"
            session.commit()
            added.name = "y"
            session.commit()
            session.delete(added)
            session.commit()
        assert [(change.operation, set(change.changed)) for change in changes] == [
            ("insert", {"id", "name"}),
            ("update", {"name"}),
            ("update", {"name"}),
            ("delete", set()),
        ]
        assert all(change.object is added for change in changes)
        assert changes[1].old("name") is None
        with pytest.raises(LookupError, match="not known"):
            changes[2].old("name")
        assert log.messages() == []

    def test_ttl_and_headers(
        self,
        declare: Callable[..., Any],
        make: sessionmaker[Session],
        database_url: str,
    ) -> None:
        thing = declare("things", ttl=timedelta(hours=1), headers={"trace": "x"})
        with make() as session:
            session.add(thing())
            session.commit()
        with psycopg.connect(database_url) as connection:
            row = connection.execute(
                "select extract(epoch from expires_at - created_at)::int, headers"
                " from pgchannels.outbox"
            ).fetchone()
        assert row == (3600, {"trace": "x"})

    def declare_orders(self, base: Any, engine: sa.Engine) -> tuple[Any, Any]:
        class Customer(base):  # type: ignore[misc]
            __tablename__ = "customers"
            id: Mapped[int] = mapped_column(primary_key=True)
            name: Mapped[str]

        @publishes("orders", payload=OrderOut, on=("insert", "update"))
        class Order(base):  # type: ignore[misc]
            __tablename__ = "orders"
            id: Mapped[int] = mapped_column(primary_key=True)
            total: Mapped[decimal.Decimal | None]
            customer_id: Mapped[int] = mapped_column(sa.ForeignKey("customers.id"))
            customer = relationship(Customer)

        base.metadata.create_all(engine)
        with engine.begin() as connection:
            connection.execute(sa.insert(Customer), [{"id": 1, "name": "Ann"}])
        return Customer, Order

    async def test_a_pydantic_model(
        self,
        base: Any,
        engine: sa.Engine,
        async_engine: AsyncEngine,
        counter: WakeCounter,
        log: Log,
    ) -> None:
        _, order = self.declare_orders(base, engine)
        maker = async_sessionmaker(async_engine)
        install(maker, counter.layer)
        async with maker() as session:
            # Which customer that is, has to be read at the end of the flush.
            session.add(order(customer_id=1, total=decimal.Decimal("2.50")))
            await session.commit()
        assert log.payloads() == [{"id": 1, "total": "2.50", "customer": {"name": "Ann"}}]

    def test_an_object_that_does_not_fit(
        self, base: Any, engine: sa.Engine, make: sessionmaker[Session], log: Log
    ) -> None:
        _, order = self.declare_orders(base, engine)
        with make() as session:
            session.add(order(customer_id=1))
            with pytest.raises(InvalidPayload, match="Order does not fit OrderOut"):
                session.commit()
        assert log.messages() == []


class TestMappings:
    """Classes that are mapped in other ways, and their subclasses."""

    def save(self, make: sessionmaker[Session], *objects: object) -> None:
        with make() as session:
            session.add_all(objects)
            session.commit()

    def seen(self, log: Log) -> list[tuple[str, str]]:
        return [(channel, payload["type"]) for channel, payload in log.messages()]

    def test_stacked_in_the_order_that_one_reads(
        self, base: Any, engine: sa.Engine, make: sessionmaker[Session], log: Log
    ) -> None:
        @publishes("first")
        @publishes("second")
        @publishes("third", on="delete")
        class Thing(base):  # type: ignore[misc]
            __tablename__ = "things"
            id: Mapped[int] = mapped_column(primary_key=True)

        base.metadata.create_all(engine)
        self.save(make, Thing(), Thing())
        assert [name for name, _ in self.seen(log)] == ["first", "second"] * 2

    @pytest.mark.parametrize("above", [True, False])
    def test_dataclasses(
        self, engine: sa.Engine, make: sessionmaker[Session], log: Log, above: bool
    ) -> None:
        registry = orm.registry()

        class Thing:
            __tablename__ = "things"
            id: Mapped[int] = mapped_column(primary_key=True, init=False)
            name: Mapped[str] = mapped_column(default="x")

        tell: Any = publishes("things:{name}")
        decorators = [registry.mapped_as_dataclass, tell]
        decorated: Any = Thing
        for decorator in decorators if above else reversed(decorators):
            decorated = decorator(decorated)
        registry.metadata.create_all(engine)
        self.save(make, decorated(name="y"))
        assert self.seen(log) == [("things:y", "things.inserted")]

    def test_a_dataclass_base(
        self, engine: sa.Engine, make: sessionmaker[Session], log: Log
    ) -> None:
        class Data(orm.MappedAsDataclass, orm.DeclarativeBase):
            pass

        @publishes("things:{name}")
        class Thing(Data):
            __tablename__ = "things"
            id: Mapped[int] = mapped_column(primary_key=True, init=False)
            name: Mapped[str] = mapped_column(default="x")

        Data.metadata.create_all(engine)
        self.save(make, Thing())
        assert self.seen(log) == [("things:x", "things.inserted")]

    @pytest.mark.parametrize("before", [True, False])
    def test_imperative(
        self, engine: sa.Engine, make: sessionmaker[Session], log: Log, before: bool
    ) -> None:
        registry = orm.registry()
        table = sa.Table("Things", registry.metadata, sa.Column("ID", sa.Integer, primary_key=True))

        class Thing:
            id: int

        if before:
            publishes("things:{id}")(Thing)
        registry.map_imperatively(Thing, table, properties={"id": table.c.ID})
        if not before:
            publishes("things:{id}")(Thing)
        registry.metadata.create_all(engine)
        self.save(make, Thing())
        assert log.messages() == [
            ("things:1", {"type": "Things.inserted", "key": {"id": 1}, "new": {"id": 1}})
        ]

    @pytest.mark.parametrize("mapping", ["joined", "single", "concrete"])
    @pytest.mark.parametrize("late", [False, True])
    def test_inheritance(
        self,
        base: Any,
        engine: sa.Engine,
        make: sessionmaker[Session],
        log: Log,
        mapping: str,
        late: bool,
    ) -> None:
        class Animal(base):  # type: ignore[misc]
            __tablename__ = "animals"
            id: Mapped[int] = mapped_column(primary_key=True)
            name: Mapped[str]
            kind: Mapped[str] = mapped_column(default="?")
            if mapping != "concrete":
                __mapper_args__: Any = {"polymorphic_on": "kind"}

        if not late:
            publishes("animals:{name}")(Animal)

        class Dog(Animal):
            if mapping == "joined":
                __tablename__ = "dogs"
                id: Mapped[int] = mapped_column(sa.ForeignKey("animals.id"), primary_key=True)
                tricks: Mapped[int] = mapped_column(default=0)
                __mapper_args__ = {"polymorphic_identity": "dog"}
            elif mapping == "single":
                tricks: Mapped[int | None]  # type: ignore[no-redef]
                __mapper_args__ = {"polymorphic_identity": "dog"}
            else:
                __tablename__ = "dogs"
                id: Mapped[int] = mapped_column(primary_key=True)  # type: ignore[no-redef]
                name: Mapped[str]
                kind: Mapped[str] = mapped_column(default="?")
                tricks: Mapped[int | None]  # type: ignore[no-redef]
                __mapper_args__ = {"concrete": True}

        if late:
            base.registry.configure()
            publishes("animals:{name}")(Animal)
        publishes("tricks", on="update", changed="tricks")(Dog)

        base.metadata.create_all(engine)
        with make() as session:
            dog = Dog(name="Rex")
            session.add(dog)
            session.commit()
            dog.tricks = 3
            session.commit()
            session.delete(dog)
            session.commit()
            session.bulk_save_objects([Dog(name="Bello")])
            session.commit()
        own = {"joined": "dogs", "single": "animals", "concrete": "dogs"}[mapping]
        inherited = "dogs" if mapping == "concrete" else "animals"
        assert self.seen(log) == [
            ("animals:Rex", f"{inherited}.inserted"),
            ("tricks", f"{own}.updated"),
            ("animals:Rex", f"{inherited}.updated"),
            ("animals:Rex", f"{inherited}.deleted"),
            ("animals:Bello", f"{inherited}.inserted"),
        ]

    def test_a_mixin(
        self, base: Any, engine: sa.Engine, make: sessionmaker[Session], log: Log
    ) -> None:
        @publishes("tenants:{tenant}")
        class Tells:
            tenant: Mapped[str]

        @publishes("all")
        class Apple(Tells, base):  # type: ignore[misc]
            __tablename__ = "apples"
            id: Mapped[int] = mapped_column(primary_key=True)

        class Pear(Tells, base):  # type: ignore[misc]
            __tablename__ = "pears"
            id: Mapped[int] = mapped_column(primary_key=True)

        base.metadata.create_all(engine)
        self.save(make, Apple(tenant="a"), Pear(tenant="b"))
        assert self.seen(log) == [
            ("all", "apples.inserted"),
            ("tenants:a", "apples.inserted"),
            ("tenants:b", "pears.inserted"),
        ]


class TestFlushes:
    @pytest.mark.parametrize("count", [1, 1000])
    def test_one_insert(
        self,
        orders: sessionmaker[Session],
        log: Log,
        inserts: list[str],
        counter: WakeCounter,
        count: int,
    ) -> None:
        with orders() as session:
            session.add_all([Order(customer_id=n % 3 + 1) for n in range(count)])
            session.commit()
            assert (len(inserts), counter.woken) == (1, 1)
            for order in session.scalars(sa.select(Order)):
                order.note = "x"
            session.commit()
            assert (len(inserts), counter.woken) == (2, 2)
            for order in session.scalars(sa.select(Order)):
                session.delete(order)
            session.commit()
            assert (len(inserts), counter.woken) == (3, 3)
            session.bulk_save_objects([Order(customer_id=1) for n in range(count)])
            session.commit()
            assert (len(inserts), counter.woken) == (4, 4)
        assert len(log.messages()) == 4 * count

    def test_nothing_to_tell_costs_nothing(
        self, orders: sessionmaker[Session], inserts: list[str], counter: WakeCounter
    ) -> None:
        with orders() as session:
            session.add_all([Order(), Customer()])
            session.commit()
        assert inserts == []
        assert counter.woken == 0

    def test_after_what_was_published_before_the_flush(
        self, orders: sessionmaker[Session], log: Log
    ) -> None:
        with orders() as session:
            session.add(Order(customer_id=1))
            publish(session, "room", {"n": 1})
            session.flush()
            publish(session, "room", {"n": 2})
            session.commit()
        assert [channel for channel, _ in log.messages()] == ["room", "customers:1", "room"]

    def test_by_the_same_insert_as_what_was_published(
        self, orders: sessionmaker[Session], inserts: list[str], log: Log
    ) -> None:
        with orders() as session:
            session.add(Order(customer_id=1))
            publish(session, "room", {"n": 1})
            publish(session, "room", {"n": 2})
            session.commit()
        assert len(inserts) == 1
        assert [channel for channel, _ in log.messages()] == ["room", "room", "customers:1"]

    def test_by_connections_of_their_own(
        self, orders: sessionmaker[Session], engine: sa.Engine, counter: WakeCounter, log: Log
    ) -> None:
        other = sa.create_engine(engine.url, poolclass=NullPool)
        maker = sessionmaker(engine, binds={Base: other})
        install(maker, counter.layer)
        with maker() as session:
            session.add(Order(customer_id=1))
            publish(session, "room", {"n": 1})
            session.commit()
        assert sorted(channel for channel, _ in log.messages()) == ["customers:1", "room"]

    def test_sessions_that_were_not_prepared(
        self, orders: sessionmaker[Session], engine: sa.Engine, log: Log
    ) -> None:
        with Session(engine) as session:
            session.add(Order(customer_id=1))
            session.bulk_save_objects([Order(customer_id=1)])
            session.commit()
            assert not session.info
        assert log.messages() == []

    @pytest.mark.parametrize("end", [Session.rollback, Session.close, Session.invalidate])
    def test_nothing_leaks_into_the_next_transaction(
        self,
        orders: sessionmaker[Session],
        log: Log,
        end: Callable[[Session], None],
        counter: WakeCounter,
    ) -> None:
        session = orders()
        for _ in range(2):
            session.add(Order(customer_id=1))
            session.flush()
            end(session)
            session.add_all([Order(customer_id=1), Order(customer_id=9)])
            with pytest.raises(IntegrityError):
                session.flush()
            end(session)
            session.bulk_save_objects([Order(customer_id=1)])
            end(session)
        assert counter.woken == 0
        session.add(Customer(id=9))
        session.commit()
        assert counter.woken == 0
        session.add(Order(customer_id=9))
        session.commit()
        session.close()
        assert [channel for channel, _ in log.messages()] == ["customers:9"]

    def test_a_flush_that_failed_holds_nothing(self, orders: sessionmaker[Session]) -> None:
        with orders() as session:
            session.add(Order(customer_id=99))
            with pytest.raises(IntegrityError):
                session.flush()
            session.rollback()
            assert session.info.keys() == {"pgchannels.transaction"}

    def test_autocommit_is_refused_before_anything_is_written(
        self, orders: sessionmaker[Session], engine: sa.Engine, counter: WakeCounter, log: Log
    ) -> None:
        maker = sessionmaker(engine.execution_options(isolation_level="AUTOCOMMIT"))
        install(maker, counter.layer)
        with maker() as session:
            session.add(Order(customer_id=1))
            with pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
                session.commit()
            session.rollback()
            with pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
                session.bulk_save_objects([Order(customer_id=1)])
        assert log.messages() == []
        assert log.orders() == 0

    def test_sqlite_is_refused(self, base: Any, counter: WakeCounter) -> None:
        @publishes("things")
        class Thing(base):  # type: ignore[misc]
            __tablename__ = "things"
            id: Mapped[int] = mapped_column(primary_key=True)

        engine = sa.create_engine("sqlite://")
        base.metadata.create_all(engine)
        maker = sessionmaker(engine)
        install(maker, counter.layer)
        with maker() as session:
            session.add(Thing())
            with pytest.raises(ConfigurationError, match="sqlite"):
                session.commit()
        engine.dispose()

    def test_without_a_layer_nodes_are_told(
        self, orders: sessionmaker[Session], engine: sa.Engine, settings: Settings
    ) -> None:
        maker = sessionmaker(engine)
        install(maker, settings=settings)
        try:
            with psycopg.connect(settings.dsn, autocommit=True) as listening:
                listening.execute(f"listen {settings.schema_name}")
                with maker() as session:
                    session.add(Order(customer_id=1))
                    session.commit()
                assert list(listening.notifies(timeout=20, stop_after=1))
        finally:
            waker_for(settings).close(10)


class TestBulkSave:
    def test_a_message_that_fails_takes_the_rows_with_it(
        self, base: Any, engine: sa.Engine, make: sessionmaker[Session], log: Log
    ) -> None:
        @publishes("things:{name}")
        class Thing(base):  # type: ignore[misc]
            __tablename__ = "things"
            id: Mapped[int] = mapped_column(primary_key=True)
            name: Mapped[str]

        base.metadata.create_all(engine)
        with make() as session:
            session.add(Thing(name="first"))
            savepoint = session.begin_nested()
            with pytest.raises(InvalidChannel):
                session.bulk_save_objects([Thing(name="good"), Thing(name="not good")])
            with pytest.raises(PendingRollbackError):
                session.commit()
            savepoint.rollback()
            session.bulk_save_objects([Thing(name="last")])
            session.commit()
            assert session.scalars(sa.select(Thing.name)).all() == ["first", "last"]
        assert [channel for channel, _ in log.messages()] == ["things:first", "things:last"]

    def test_after_what_was_published_before(
        self, orders: sessionmaker[Session], inserts: list[str], log: Log
    ) -> None:
        with orders() as session:
            publish(session, "room", {"n": 1})
            session.bulk_save_objects([Order(customer_id=1)])
            assert len(inserts) == 1
            publish(session, "room", {"n": 2})
            # It has to come after this one, which may have to wait for the row.
            session.get_one(Customer, 1).name = "c"
            publish(session, "room", {"n": 3})
            session.bulk_save_objects([Order(customer_id=2)])
            session.commit()
        assert [payload.get("n", channel) for channel, payload in log.messages()] == [
            1,
            "customers:1",
            2,
            "customers:2",
            3,
        ]

    def test_what_was_published_before_goes_with_the_rows(
        self, orders: sessionmaker[Session], log: Log
    ) -> None:
        with orders() as session:
            publish(session, "room", {"n": 1})
            savepoint = session.begin_nested()
            publish(session, "room", {"n": 2})
            session.bulk_save_objects([Order(customer_id=1)])
            savepoint.rollback()
            session.commit()
        assert log.read() == [1]

    def test_rows_that_fail(self, orders: sessionmaker[Session], log: Log) -> None:
        with orders() as session:
            with pytest.raises(IntegrityError):
                session.bulk_save_objects([Order(customer_id=1), Order(customer_id=9)])
            with pytest.raises(PendingRollbackError):
                session.commit()
            session.rollback()
            session.bulk_save_objects([Order(customer_id=1)])
            session.commit()
        assert len(log.messages()) == log.orders() == 1

    def test_of_what_the_object_does_not_know(
        self, base: Any, engine: sa.Engine, make: sessionmaker[Session], log: Log
    ) -> None:
        @publishes("things:{tenant}:{place}")
        class Thing(base):  # type: ignore[misc]
            __tablename__ = "things"
            id: Mapped[int] = mapped_column(primary_key=True)
            tenant: Mapped[str] = mapped_column(default=lambda: "ours")
            place: Mapped[str] = mapped_column(server_default="here")

        base.metadata.create_all(engine)
        with make() as session:
            session.bulk_save_objects([Thing()])
            session.commit()
        assert [channel for channel, _ in log.messages()] == ["things:ours:here"]

    def test_updates(self, orders: sessionmaker[Session], log: Log) -> None:
        with orders() as session:
            session.add_all([Order(customer_id=1), Order(customer_id=1)])
            session.commit()
            first, second = session.scalars(sa.select(Order))
            session.expunge_all()
            first.customer_id = 2
            session.bulk_save_objects([first, second])
            session.commit()
            assert [channel for channel, _ in log.messages()[2:]] == ["customers:1", "customers:2"]
            # All is written now, whatever it was.
            session.bulk_save_objects([second], update_changed_only=False)
            session.commit()
        assert log.payloads()[4]["new"].keys() == {"total", "note"}

    def test_an_override_of_ones_own(
        self, orders: sessionmaker[Session], engine: sa.Engine, counter: WakeCounter, log: Log
    ) -> None:
        calls: list[Any] = []

        class Parent(Session):
            def bulk_save_objects(self, objects: Any, *args: Any, **options: Any) -> None:
                calls.append(options.pop("mine", None))
                super().bulk_save_objects(objects, *args, **options)

        class Child(Parent):
            pass

        install(Child, counter.layer)
        install(Parent, counter.layer)
        with Child(engine) as session:
            session.bulk_save_objects([Order(customer_id=1)], mine=1)
            session.bulk_save_objects(iter([Customer()]), False, True, False)
            session.commit()
        assert calls == [1, None]
        assert len(log.messages()) == 1
