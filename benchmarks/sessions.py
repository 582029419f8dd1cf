"""SQLAlchemy as an application has it: sessions that publish, a table with data of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
from sqlalchemy import BigInteger, Identity
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from pgchannels import PostgresLayer
from pgchannels.orm import install, publishes

__all__ = ["Order", "PublishingOrder", "WatchedOrder", "publishing_sessions"]


class Base(DeclarativeBase):
    pass


class OrderColumns:
    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    customer: Mapped[int]
    note: Mapped[str]


class Order(OrderColumns, Base):
    """The business row of a transaction that publishes."""

    __tablename__ = "orders"


@publishes("orders:{customer}")
class PublishingOrder(OrderColumns, Base):
    """One that publishes itself."""

    __tablename__ = "publishing_orders"


class WatchedOrder(OrderColumns, Base):
    """One whose table publishes it."""

    __tablename__ = "watched_orders"


_WATCH = "select pgchannels.watch('watched_orders', 'orders:{customer}')"


@asynccontextmanager
async def publishing_sessions(
    url: str, layer: PostgresLayer, *, pool_size: int
) -> AsyncIterator[async_sessionmaker[AsyncSession]]:
    """Sessions that can publish through *layer*; the tables of the orders are there."""
    engine = create_async_engine(
        # By a function, because the URL is libpq's.
        "postgresql+asyncpg://",
        async_creator=lambda: asyncpg.connect(url),
        pool_size=pool_size,
        max_overflow=0,
    )
    try:
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
            await connection.exec_driver_sql(_WATCH)
        sessions = async_sessionmaker(engine, expire_on_commit=False)
        install(sessions, layer)
        yield sessions
    finally:
        await engine.dispose()
