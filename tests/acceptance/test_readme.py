"""The README's first program, run as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy.engine import make_url

README = Path(__file__).parents[2] / "README.md"

PRELUDE = """
from fastapi import FastAPI
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import NullPool

class Base(DeclarativeBase): ...

class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[str]

engine = create_async_engine(SQLALCHEMY_URL, poolclass=NullPool)
Session = async_sessionmaker(engine)

def may_read(channel: str) -> bool:
    return channel == "orders"
"""


@pytest.fixture
def program(database_url: str) -> SimpleNamespace:
    match = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert match is not None
    source = match[1].replace("postgresql://localhost/shop", database_url)
    assert database_url in source
    url = make_url(database_url).set(drivername="postgresql+asyncpg")
    names: dict[str, Any] = {"__name__": "program", "SQLALCHEMY_URL": url}
    for name, text in (("prelude", PRELUDE), ("README.md", source)):
        exec(compile(text, name, "exec", dont_inherit=True), names)

    async def make_tables() -> None:
        async with names["engine"].begin() as connection:
            await connection.run_sync(names["Base"].metadata.create_all)

    names["app"].add_api_route("/tables", make_tables, methods=["POST"])
    return SimpleNamespace(**names)


def test_an_order_reaches_the_socket_and_the_history(program: SimpleNamespace) -> None:
    with TestClient(program.app) as client:
        client.post("/tables").raise_for_status()
        with client.websocket_connect("/board") as board:
            client.post("/orders", params={"item": "tea"}).raise_for_status()
            live = board.receive_json()
        with client.websocket_connect("/board?after=0") as board:
            replayed = board.receive_json()
        page = client.get("/channels/orders/messages").raise_for_status().json()

    assert live["data"] == {"type": "order.placed", "id": 1, "item": "tea"}
    assert page["messages"] == [live] == [replayed]
