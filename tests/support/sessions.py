"""Sessions of every shape, and what the tests of publishing from them look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import psycopg
import sqlalchemy as sa
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from pgchannels import PostgresLayer, Settings
from pgchannels.orm import install
from pgchannels.payloads import JSONSerializer, Serializer


class WakeCounter:
    """Stands where a layer does: it has settings, a serialiser, and can be woken."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.serializer: Serializer = JSONSerializer()
        self.woken = 0
        self.error: Exception | None = None

    def wake(self) -> None:
        self.woken += 1
        if self.error is not None:
            raise self.error

    @property
    def layer(self) -> PostgresLayer:
        return cast(PostgresLayer, self)


class Log:
    """What readers would get, in order. It has a connection, to be closed."""

    def __init__(self, url: str, schema: str = "pgchannels") -> None:
        self._connection = psycopg.connect(url, autocommit=True)
        self._schema = schema

    def close(self) -> None:
        self._connection.close()

    def messages(self) -> list[tuple[str, Any]]:
        """Channels and payloads."""
        self._connection.execute(f"select {self._schema}.seal()")
        return self._connection.execute(
            f"select channel, payload from {self._schema}.messages order by id"
        ).fetchall()

    def payloads(self) -> list[Any]:
        return [payload for _, payload in self.messages()]

    def read(self) -> list[Any]:
        """The ``n`` of each payload."""
        return [payload.get("n") for payload in self.payloads()]

    def orders(self) -> int:
        row = self._connection.execute("select count(*) from orders").fetchone()
        assert row is not None
        return int(row[0])


# Shapes of sessions. Each is a context manager that gives a function to make sessions with.

Make = Callable[[], Session]


@contextmanager
def plain(engine: sa.Engine, layer: PostgresLayer) -> Iterator[Make]:
    maker = sessionmaker(engine)
    install(maker, layer)
    yield maker


@contextmanager
def without_autoflush(engine: sa.Engine, layer: PostgresLayer) -> Iterator[Make]:
    maker = sessionmaker(engine, autoflush=False)
    install(maker, layer)
    yield maker


@contextmanager
def subclass(engine: sa.Engine, layer: PostgresLayer) -> Iterator[Make]:
    class Mine(Session):
        pass

    install(Mine, layer)
    yield lambda: Mine(engine)


@contextmanager
def scoped(engine: sa.Engine, layer: PostgresLayer) -> Iterator[Make]:
    registry = scoped_session(sessionmaker(engine))
    install(registry, layer)
    yield lambda: cast(Session, registry)
    registry.remove()


@contextmanager
def in_a_connection(engine: sa.Engine, layer: PostgresLayer) -> Iterator[Make]:
    """The session works in savepoints of a transaction that is somebody else's."""
    with engine.connect() as connection, connection.begin():
        maker = sessionmaker(connection, join_transaction_mode="create_savepoint")
        install(maker, layer)
        yield maker


SHAPES = [plain, without_autoflush, subclass, scoped, in_a_connection]


# More of them. An outer transaction is committed, unless the session has ended it.


def end(transaction: sa.Transaction) -> None:
    if transaction.is_active:
        transaction.commit()


def joined(mode: Any, *, in_savepoint: bool = False) -> Callable[..., Any]:
    @contextmanager
    def shape(engine: sa.Engine, layer: PostgresLayer) -> Iterator[Make]:
        with ExitStack() as stack:

            def make() -> Session:
                connection = stack.enter_context(engine.connect())
                transaction = connection.begin()
                stack.callback(end, transaction)
                if in_savepoint:
                    savepoint = connection.begin_nested()
                    stack.callback(end, savepoint)
                maker = sessionmaker(connection, join_transaction_mode=mode)
                install(maker, layer)
                return maker()

            yield make

    shape.__name__ = f"joined_{mode}{'_in_savepoint' if in_savepoint else ''}"
    return shape


@contextmanager
def not_expiring(engine: sa.Engine, layer: PostgresLayer) -> Iterator[Make]:
    maker = sessionmaker(engine, expire_on_commit=False)
    install(maker, layer)
    yield maker


@contextmanager
def two_subclasses(engine: sa.Engine, layer: PostgresLayer) -> Iterator[Make]:
    class Parent(Session):
        pass

    class Child(Parent):
        pass

    install(Parent, layer)
    install(Child, layer)
    yield lambda: Child(engine)


ALL_SHAPES = [
    *SHAPES,
    not_expiring,
    two_subclasses,
    joined("conditional_savepoint"),
    joined("conditional_savepoint", in_savepoint=True),
    joined("rollback_only"),
    joined("control_fully"),
    joined("create_savepoint"),
]
