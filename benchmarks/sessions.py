"""SQLAlchemy as an application has it: sessions that publish, a table with data of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
from sqlalchemy import BigInteger, Identity
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from pgchannels import PostgresLayer
from pgchannels.orm import install

__all__ = ["Order", "publishing_sessions"]


class Base(DeclarativeBase):
    pass


class Order(Base):
    """The business row of a transaction that publishes."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    customer: Mapped[int]
    note: Mapped[str]


@asynccontextmanager
async def publishing_sessions(
    url: str, layer: PostgresLayer, *, pool_size: int
) -> AsyncIterator[async_sessionmaker[AsyncSession]]:
    """Sessions that can publish through *layer*; the table of `Order` is there."""
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
        sessions = async_sessionmaker(engine, expire_on_commit=False)
        install(sessions, layer)
        yield sessions
    finally:
        await engine.dispose()
