"""Programs as users write them, for mypy and pyright to check; nothing here runs.

What a type checker refuses here, it refuses in an application.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Annotated, Any, assert_type

from fastapi import Depends, FastAPI, WebSocket
from pydantic import BaseModel, TypeAdapter
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker
from starlette.requests import HTTPConnection

from pgchannels import (
    ChannelLayer,
    MemoryLayer,
    Message,
    PostgresLayer,
    Receipt,
    Settings,
    get_channel_layer,
    presence_channel,
)
from pgchannels.orm import install, publish, publishes
from pgchannels.web import (
    ConnectionManager,
    FixedWindow,
    Heartbeat,
    JsonConsumer,
    Limits,
    Middleware,
    Origins,
    RateLimit,
    TokenBucket,
    Validation,
    channels_router,
    handles,
    lifespan,
    receives,
)
from pgchannels.web.auth import (
    JWT,
    Authentication,
    Capabilities,
    CookieToken,
    FirstMessageToken,
    HeaderToken,
    Identity,
    QueryToken,
    SubprotocolToken,
)

layer: ChannelLayer = get_channel_layer()
memory: ChannelLayer = MemoryLayer(Settings(capacity=100))
postgres = PostgresLayer("postgresql://localhost/shop")


# --- Authentication ------------------------------------------------------------


class HeaderOfOurs:
    """A place for tokens that the application has made."""

    ambient = False

    def find(self, connection: HTTPConnection) -> str | None:
        return connection.headers.get("x-token")


async def verify(token: str) -> Identity:
    return Identity(user_id=token)


all_sources = Authentication(
    JWT("secret" * 8, algorithms=["HS256"]),
    HeaderToken(),
    CookieToken("session"),
    SubprotocolToken(),
    QueryToken(),
    FirstMessageToken(deadline=5),
    HeaderOfOurs(),
    origins=Origins("https://shop.example"),
)
one_source = Authentication(verify, HeaderToken())

connections = ConnectionManager(
    layer,
    limits=Limits(per_user=5),
    authentication=all_sources,
    authorize=Capabilities(),
    heartbeat=Heartbeat(interval=15, timeout=40, by="json"),
    origins=Origins(),
    middleware=Validation(max_depth=20) >> RateLimit(TokenBucket(rate=10, burst=20)),
)


class Count(Middleware):
    """Middleware of the application's own, chained with ours."""


chain = Count() >> RateLimit(FixedWindow(10, window=60)) >> Validation()

# --- Applications --------------------------------------------------------------

app = FastAPI(lifespan=lifespan(connections))
app.include_router(channels_router(layer, authorize=lambda channel: channel == "news"))


@asynccontextmanager
async def own_lifespan(app: FastAPI) -> AsyncIterator[Any]:
    async with lifespan(connections)(app) as state:
        yield state


class User(BaseModel):
    id: int
    name: str


class Say(BaseModel):
    text: str


def current_user() -> User:
    return User(id=1, name="Ada")


class Room(JsonConsumer):
    async def connect(
        self, room: str, user: Annotated[User, Depends(current_user)], after: str | None = None
    ) -> None:
        await self.accept()
        await self.identify(str(user.id), {"name": user.name})
        await self.join(presence_channel(room), after=after)
        await self.group_add(room, after=after, presence="user")

    @receives("chat.send")
    async def chat_send(self, content: Say) -> None:
        await self.layer.group_send("room", {"type": "chat.message", "text": content.text})

    @handles("room.closed")
    async def room_closed(self, message: Message) -> None:
        await self.close(4000, str(message["why"]))

    async def receive_json(self, content: Any) -> None:
        await self.send_json(content)


app.add_api_websocket_route("/rooms/{room}", Room.as_endpoint(connections))
app.add_api_websocket_route("/others/{room}", Room.as_endpoint(layer))


@app.websocket("/ws/{room}")
async def chat(socket: WebSocket, room: str) -> None:
    async with connections.connect(socket) as connection:
        await connection.join(f"room:{room}", after=connection.resume_position)
        async for content in connection:
            await connection.publish(f"room:{room}", {"content": content})


# --- The layer -----------------------------------------------------------------


async def use() -> None:
    assert_type(await layer.send("a", {"n": 1}, ttl=60, key="k"), Receipt)
    await layer.group_send("g", Say(text="hello"), exclude="ws.1")
    assert_type(await layer.receive("a", timeout=5), Message)
    async with layer.subscribe("a", "b", after="0") as messages:
        async for message in messages:
            assert_type(message, Message)
            assert_type(message.parse(Say), Say)
            assert_type(message.parse(dict[str, int]), dict[str, int])
            assert_type(message.parse(TypeAdapter(Say)), Say)
    page = await layer.history("a", since=datetime.now(UTC), limit=10, order="desc")
    assert_type(page.messages, list[Message])
    async with layer.follow("a", name="billing", after="0") as batches:
        async for batch in batches:
            async with async_sessions() as session, session.begin():
                await batch.ack(session)


# --- Sessions ------------------------------------------------------------------

engine = create_async_engine("postgresql+asyncpg://")
async_sessions = async_sessionmaker(engine)
sessions = sessionmaker()
install(async_sessions, postgres)
install(sessions, postgres)


class Base(DeclarativeBase): ...


@publishes("orders:{customer_id}")
@publishes("paid", on="update", changed="status", when=lambda c: c.object.status == "paid")
@publishes(user="{customer_id}", on="insert")
@publishes("audit", user=lambda c: [str(c.object.customer_id), "auditor"], on="delete")
class Order(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    customer_id: Mapped[int]
    status: Mapped[str]


async def order(session: AsyncSession) -> None:
    publish(session, "orders", {"n": 1}, ttl=60)
    publish(session, "orders", Say(text="hello"), exclude="channel", key="k")
    publish(session, {"n": 1}, user="42", key="k", ttl=60)
    publish(session, Say(text="hello"), everyone=True, exclude="channel")
    publish(session, payload={"n": 1}, to=["channel"])
    assert_type(Order(id=1).status, str)


def order_in_a_thread(session: Session) -> None:
    publish(session, "orders", {"n": 1})
