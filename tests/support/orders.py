"""Orders that publish, in a table that writes down by itself what has become of its rows.

A trigger does, in the same transaction. So the log can be compared with what really happened.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import psycopg
import sqlalchemy as sa
from psycopg.rows import dict_row
from sqlalchemy import orm
from sqlalchemy.orm import Mapped, Session, mapped_column, relationship, sessionmaker

from pgchannels.orm import publish, publishes
from tests.support.sessions import Log


class Base(orm.DeclarativeBase):
    pass


class Customer(Base):
    __tablename__ = "customers"

    id: Mapped[int] = mapped_column(primary_key=True)
    orders: Mapped[list[Order]] = relationship(
        back_populates="customer", cascade="all, delete-orphan"
    )


@publishes("customers:{customer_id}")
class Order(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    customer_id: Mapped[int] = mapped_column(sa.ForeignKey("customers.id"))
    name: Mapped[str] = mapped_column(unique=True)
    count: Mapped[int] = mapped_column(default=1)
    customer: Mapped[Customer] = relationship(back_populates="orders")


HISTORY = """
    create table history (n bigserial, operation text, id int, customer_id int);
    create function write_history() returns trigger language plpgsql as $$
    begin
        if tg_op = 'DELETE' then
            insert into history (operation, id, customer_id)
            values ('deleted', old.id, old.customer_id);
        elsif tg_op = 'INSERT' then
            insert into history (operation, id, customer_id)
            values ('inserted', new.id, new.customer_id);
        elsif old is distinct from new then
            insert into history (operation, id, customer_id)
            values ('updated', new.id, new.customer_id);
        end if;
        return null;
    end $$;
    create trigger history after insert or update or delete on orders
        for each row execute function write_history();
"""

names = (f"order {n}" for n in itertools.count(1))


def order(**values: Any) -> Order:
    return Order(**{"name": next(names), **values})


class Rows:
    """The table's own account of what was committed. It has a connection, to be closed."""

    def __init__(self, url: str) -> None:
        self._connection = psycopg.connect(url, autocommit=True)

    def close(self) -> None:
        self._connection.close()

    def history(self) -> list[tuple[str, int]]:
        return self._connection.execute("select operation, id from history order by n").fetchall()

    def beside(self) -> int:
        """How many orders are there that something was published beside."""
        return self._connection.execute("select from orders where name like 'beside %'").rowcount

    def table(self) -> dict[int, dict[str, Any]]:
        with self._connection.cursor(row_factory=dict_row) as cursor:
            return {row["id"]: row for row in cursor.execute("select * from orders")}


def told(log: Log) -> list[tuple[str, int]]:
    """The log, in the words of the history."""
    messages = [message for message in log.messages() if message[0].startswith("customers:")]
    return [
        (payload["type"].removeprefix("orders."), payload["key"]["id"])
        # To where an object was and to where it has moved go two of the same.
        for (_, payload), (_, following) in itertools.pairwise([*messages, ("", None)])
        if payload != following
    ]


def replayed(log: Log) -> dict[int, dict[str, Any]]:
    """The table, as one makes it of messages."""
    table: dict[int, dict[str, Any]] = {}
    for channel, payload in log.messages():
        if not channel.startswith("customers:"):
            continue
        key = payload["key"]["id"]
        match payload["type"]:
            case "orders.inserted":
                table[key] = payload["new"]
            case "orders.updated":
                table[key] |= payload["new"]
            case "orders.deleted":
                del table[key]
    return table


def prepare(url: str) -> sa.Engine:
    engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    Base.metadata.create_all(engine)
    with psycopg.connect(url) as connection:
        connection.execute(HISTORY)
    return engine


# What is done in a session, with a customer who has four orders.

Act = Callable[[Session, int], None]


def insert(session: Session, customer: int) -> None:
    session.add_all([order(customer_id=customer), order(customer_id=customer)])


def insert_by_relationship(session: Session, customer: int) -> None:
    found = session.get_one(Customer, customer)
    found.orders.append(order())


def update(session: Session, customer: int) -> None:
    orders = session.get_one(Customer, customer).orders
    orders[0].count = 7
    orders[1].count = orders[1].count  # no change
    orders[2].count = cast(Any, Order.count + 1)


def move(session: Session, customer: int) -> None:
    other = Customer()
    session.add(other)
    session.get_one(Customer, customer).orders[0].customer = other


def delete(session: Session, customer: int) -> None:
    session.delete(session.get_one(Customer, customer).orders[0])


def delete_by_cascade(session: Session, customer: int) -> None:
    session.delete(session.get_one(Customer, customer))


def delete_an_orphan(session: Session, customer: int) -> None:
    found = session.get_one(Customer, customer)
    found.orders.pop()


def bulk_insert(session: Session, customer: int) -> None:
    session.bulk_save_objects([order(customer_id=customer) for _ in range(3)])


def bulk_update(session: Session, customer: int) -> None:
    orders = list(session.scalars(sa.select(Order).filter_by(customer_id=customer)))
    session.expunge_all()
    orders[0].count = 8
    orders[1].count = 9
    session.bulk_save_objects(orders)


def publish_beside(session: Session, customer: int) -> None:
    name = next(names)
    publish(session, "beside", {"name": name})
    session.add(order(customer_id=customer, name=f"beside {name}"))


ACTS = [
    insert,
    insert_by_relationship,
    update,
    move,
    delete,
    delete_by_cascade,
    delete_an_orphan,
    bulk_insert,
    bulk_update,
    publish_beside,
]


class Checked:
    """Runs what is to be tested, and compares the log with the table's history afterwards."""

    def __init__(self, engine: sa.Engine, log: Log, rows: Rows) -> None:
        self.log = log
        self.rows = rows
        # Without publishing anything.
        self._unprepared = sessionmaker(engine)

    def customer(self) -> int:
        with self._unprepared() as session:
            customer = Customer(orders=[order() for _ in range(4)])
            session.add(customer)
            session.commit()
            return customer.id

    @contextmanager
    def expecting(self, happening: bool) -> Iterator[int]:
        customer = self.customer()
        history, known, beside = len(self.rows.history()), len(told(self.log)), self._beside()
        yield customer
        happened = self.rows.history()[history:]
        # A flush takes objects in an order of its own, but transactions follow each other.
        assert sorted(told(self.log)[known:]) == sorted(happened)
        assert bool(happened) == happening
        assert self._beside() == self.rows.beside() >= beside

    def _beside(self) -> int:
        return [channel for channel, _ in self.log.messages()].count("beside")
