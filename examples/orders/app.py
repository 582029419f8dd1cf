"""An order board and a chat room: what an application with pgchannels looks like.

An order and the message that tells about it are committed together, or neither is. Every open page
gets every message once and in the same order, from whichever node it happens to be connected to.

`pgchannels demo` runs two nodes of this. To run one: `pip install 'pgchannels[demo]'`, set
PGCHANNELS_DATABASE_URL, `pgchannels migrate`, `uvicorn app:app`.
"""

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import asyncpg
from fastapi import Depends, FastAPI, Header, HTTPException, Query
from fastapi.middleware.cors import CORSMiddleware
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from pgchannels import PostgresLayer
from pgchannels.orm import install, publish
from pgchannels.web import ConnectionManager, JsonConsumer, Origins, channels_router
from pgchannels.web import lifespan as connections_lifespan

# Which node this is, and where all of them are.
NAME = os.environ.get("DEMO_NODE", "node 1")
URLS = os.environ.get("DEMO_URLS", "http://127.0.0.1:8000").split()
# The pages of all nodes: one that a node has served goes on with another one when that is killed.
ORIGINS = [*URLS, *(url.replace("127.0.0.1", "localhost") for url in URLS)]
PAGE = Path(__file__).parent / "page"

# --- The database: SQLAlchemy as always, and one line for pgchannels ----------

layer = PostgresLayer()  # its settings come from PGCHANNELS_… variables
# asyncpg reads the URL, rather than SQLAlchemy, so that it may be any that the layer takes.
connect = partial(asyncpg.connect, layer.settings.dsn)
engine = create_async_engine("postgresql+asyncpg://", async_creator=connect)
sessions = async_sessionmaker(engine, expire_on_commit=False)
install(sessions, layer)  # from here on, publish() works on these sessions
connections = ConnectionManager(layer, origins=Origins(*ORIGINS))


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "demo_orders"

    number: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[str]


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
    async with engine.begin() as connection:
        # Nodes may start at the same time: the second one waits here, and then finds the table.
        await connection.execute(text("select pg_advisory_xact_lock(hashtext('demo_orders'))"))
        await connection.run_sync(Base.metadata.create_all)
    async with connections_lifespan(connections)(app) as state:
        yield state
    await engine.dispose()


async def get_session() -> AsyncIterator[AsyncSession]:
    async with sessions() as session:
        yield session


app = FastAPI(title="pgchannels demo", lifespan=lifespan)


def from_our_page(origin: Annotated[str | None, Header()] = None) -> None:
    """Refuse the pages of other sites: nobody logs in here, so a browser would act for them."""
    if origin is not None and origin not in ORIGINS:
        raise HTTPException(403, f"requests from {origin} are not allowed")


FromOurPage = Depends(from_our_page)

# --- Orders: publish in the transaction that the message tells about ----------


class NewOrder(BaseModel):
    item: str = Field(min_length=1, max_length=80)


class PlacedOrder(NewOrder):
    model_config = ConfigDict(from_attributes=True)

    number: int


async def add_order(session: AsyncSession, item: str) -> Order:
    """Add an order to the session, and the message about it. Both wait for the commit."""
    order = Order(item=item)
    session.add(order)
    await session.flush()  # the database gives the order its number
    publish(session, "orders", {"number": order.number, "item": order.item, "node": NAME})
    return order


@app.post("/orders", status_code=201, response_model=PlacedOrder, dependencies=[FromOurPage])
async def place_order(
    new: NewOrder, session: Annotated[AsyncSession, Depends(get_session)]
) -> Order:
    order = await add_order(session, new.item)
    await session.commit()
    return order


class PaymentDeclined(Exception):
    """What may go wrong after an order has been written, and before it is committed."""


@app.post("/orders/rolled-back", dependencies=[FromOurPage])
async def place_order_and_fail(new: NewOrder) -> PlacedOrder:
    """The same, but something goes wrong: the order is rolled back, and its message with it."""
    try:
        async with sessions.begin() as session:
            order = await add_order(session, new.item)
            raise PaymentDeclined(order.number)
    except PaymentDeclined as declined:
        return PlacedOrder(number=declined.args[0], item=new.item)


@app.get("/orders", response_model=list[PlacedOrder])
async def list_orders(
    session: Annotated[AsyncSession, Depends(get_session)],
    after: int | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> list[Order]:
    """The orders in the table: the newest, or with *after*, the next ones after that number."""
    if after is None:
        query = select(Order).order_by(Order.number.desc())
    else:
        query = select(Order).where(Order.number > after).order_by(Order.number)
    return list(await session.scalars(query.limit(limit)))


# --- Live: one socket for both channels ---------------------------------------

CHANNELS = ("orders", "chat")


class ChatMessage(BaseModel):
    """What a page sends. *tab* and *seq* let it send again when unsure: readers drop repeats."""

    name: str = Field(min_length=1, max_length=40)
    text: str = Field(min_length=1, max_length=500)
    tab: str = Field(min_length=1, max_length=40)
    seq: int = Field(ge=1, le=2**31)


class Live(JsonConsumer):
    """``/live?orders=<position>&chat=<position>``: what came after those positions, then live."""

    async def connect(self) -> None:
        await self.accept()
        # Tells the page up to where it is being sent what it has missed.
        newest = {channel: await self.newest_id(channel) for channel in CHANNELS}
        await self.send_json(
            {"type": "welcome", "node": NAME, "pid": os.getpid(), "newest": newest}
        )
        for channel in CHANNELS:
            await self.join(channel, after=self.query_params.get(channel))

    async def receive_json(self, content: Any) -> None:
        try:
            message = ChatMessage.model_validate(content)
        except ValidationError:
            await self.send_json({"type": "error", "code": "invalid_chat", "detail": "not sent"})
        else:
            await self.layer.send("chat", message.model_dump())

    async def newest_id(self, channel: str) -> int:
        page = await self.layer.history(channel, order="desc", limit=1)
        return page.messages[0].id if page.messages else 0


app.add_api_websocket_route("/live", Live.as_endpoint(connections))

# --- History: GET /channels/{channel}/messages --------------------------------


def may_read(channel: str) -> bool:
    return channel in CHANNELS  # your application asks who is asking


app.include_router(channels_router(layer, authorize=may_read), prefix="/channels")

# --- For the demo only --------------------------------------------------------

app.add_middleware(
    CORSMiddleware,
    allow_origins=ORIGINS,
    allow_methods=["GET", "POST"],
    allow_headers=["Content-Type"],
)
# By no other name: one that leads here would make another site's page one of ours (DNS rebinding).
app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])


@app.get("/node")
async def node() -> dict[str, Any]:
    return {"name": NAME, "pid": os.getpid(), "urls": URLS}


@app.post("/node/kill", status_code=204, dependencies=[FromOurPage])
async def kill() -> None:
    """No farewell, nothing flushed: as if the power had failed."""
    os.kill(os.getpid(), signal.SIGKILL)


SOCKETS = [url.replace("http", "ws", 1) for url in ORIGINS]
# Whatever somebody might smuggle into the page: it is not run, not shown, not sent anywhere.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    f"connect-src 'self' {' '.join([*ORIGINS, *SOCKETS])}; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@app.get("/", include_in_schema=False)
@app.get("/{file}", include_in_schema=False)
async def page(
    file: Literal["page.html", "client.js", "style.css"] = "page.html",
) -> FileResponse:
    return FileResponse(PAGE / file, headers=HEADERS)
