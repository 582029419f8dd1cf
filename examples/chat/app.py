"""A chat: rooms, private messages, files, who is typing, who is there, history.

Whoever says to be Ada is Ada here: examples/rooms shows how to find out who somebody is.

To run it without a database: `pip install 'pgchannels[demo]'`, and in this directory
`PGCHANNELS_BACKEND=memory uvicorn app:app`. With one, on any number of nodes: set
PGCHANNELS_DATABASE_URL, `pgchannels migrate`, `uvicorn app:app`.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from fastapi import FastAPI
from fastapi.responses import FileResponse
from pydantic import (
    AfterValidator,
    Base64Bytes,
    BaseModel,
    Field,
    StringConstraints,
    model_validator,
)

from pgchannels import get_channel_layer, presence_channel
from pgchannels.web import (
    AuthorizationError,
    ConnectionManager,
    Heartbeat,
    JsonConsumer,
    Limits,
    Origins,
    RateLimit,
    TokenBucket,
    Validation,
    channels_router,
    lifespan,
    receives,
)

PAGE = Path(__file__).parent / "page"
MAX_FILE = 200_000  # bytes
MAX_FRAME = 300_000  # the same in base64, and the rest of the message

# --- How sockets are admitted, and what passes through them --------------------

layer = get_channel_layer()  # as PGCHANNELS_… variables say
connections = ConnectionManager(
    layer,
    # Over all nodes. Of each room, a socket reads two channels: the room, and who is there.
    limits=Limits(per_user=10, total=10_000, group_members=1000, groups=40),
    # By messages, so that the page, too, finds out that nobody is there any more.
    heartbeat=Heartbeat(interval=15, timeout=40, by="json"),
    origins=Origins(),  # pages of this host only, which is also the default
    max_frame_size=MAX_FRAME,
    middleware=Validation(max_bytes=MAX_FRAME, max_depth=4)
    >> RateLimit(TokenBucket(rate=5, burst=40), by="user"),
)
app = FastAPI(title="pgchannels chat", lifespan=lifespan(connections))

# --- What a page sends ---------------------------------------------------------


def safe_name(name: str) -> str:
    """A file's name that is harmless on any system: no path, no control or bidi characters."""
    last = re.split(r"[/\\]", name)[-1]
    return re.sub(r"[^\w.() -]", "_", last).strip(" .")[-80:] or "file"


UserName = Annotated[
    str, StringConstraints(pattern=r"^[^\x00-\x20\x7f]([^\x00-\x1f\x7f]{0,38}[^\x00-\x20\x7f])?$")
]
RoomName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")]


class Room(BaseModel):
    """For ``room.leave`` and ``typing``."""

    room: RoomName


class OpenRoom(Room):
    """*after* the last position that the page has had of it."""

    after: str | None = None


class SentFile(BaseModel):
    name: Annotated[str, Field(max_length=255), AfterValidator(safe_name)]
    data: Annotated[Base64Bytes, Field(max_length=MAX_FILE)]


class Say(BaseModel):
    """*id* is the page's own: it may send a message again when unsure, and it is stored once."""

    id: Annotated[str, StringConstraints(pattern=r"^[0-9a-f-]{36}$")]
    text: str = Field("", max_length=2000)
    file: SentFile | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.text.strip() and self.file is None:
            raise ValueError("there is neither a text nor a file")
        return self


class SayInRoom(Say):
    room: RoomName


class SayTo(Say):
    to: UserName


# --- The socket ----------------------------------------------------------------


class Chat(JsonConsumer):
    """``/live?name=Ada&after=<position>``: all rooms, and what is sent to Ada, by one socket."""

    name: str

    async def connect(self, name: UserName, after: str | None = None) -> None:
        self.name = name
        # First, for a page is not told why a socket is refused, but why it is closed.
        await self.accept()
        # What was sent to Ada while she was not here comes now.
        await self.identify(name, {"name": name}, after=after or "0")
        await self.send_json({"type": "welcome", "name": name, "max_file": MAX_FILE})

    @receives("room.open")
    async def on_open(self, content: OpenRoom) -> None:
        group = f"room:{content.room}"
        # Who comes and goes; before asking who is there, so that nobody slips in between.
        await self.join(presence_channel(group))
        await self.group_add(group, after=content.after, presence="user")
        present = [each.user_id for each in await self.presence(group)]
        await self.send_json({"type": "room.opened", "room": content.room, "present": present})

    @receives("room.leave")
    async def on_leave(self, content: Room) -> None:
        group = f"room:{content.room}"
        await self.group_discard(group)
        await self.leave(presence_channel(group))

    @receives("room.say")
    async def on_say(self, content: SayInRoom) -> None:
        await self.layer.group_send(
            self.opened(content), self.message(content), key=self.key(content)
        )

    @receives("private.say")
    async def on_say_to(self, content: SayTo) -> None:
        # To all devices of both, now or when they are back. Should this fail between the two, the
        # page sends it again, and who has it already does not get another one.
        for user in (content.to, self.name):
            message = {**self.message(content), "to": content.to}
            await self.layer.send_to_user(user, message, key=self.key(content))

    @receives("typing")
    async def on_typing(self, content: Room) -> None:
        message = {"type": "typing", "from": self.name}
        await self.layer.send_ephemeral(self.opened(content), message, exclude=self.channel_name)

    def opened(self, content: Room | SayInRoom) -> str:
        group = f"room:{content.room}"
        if group not in self.groups:
            raise AuthorizationError("open the room first", context={"room": content.room})
        return group

    def message(self, content: Say) -> dict[str, Any]:
        message: dict[str, Any] = {"type": "said", "from": self.name, "id": content.id}
        message["text"] = content.text
        if content.file is not None:
            # Bytes may be anywhere in a message. Pages get them in base64, beside the data.
            data = content.file.data
            message["file"] = {"name": content.file.name, "size": len(data), "data": data}
        return message

    def key(self, content: Say) -> str:
        return f"{content.id}:{self.name}"


app.add_api_websocket_route("/live", Chat.as_endpoint(connections))

# --- History: GET /channels/room:lobby/messages --------------------------------


def may_read(channel: str) -> bool:
    return channel.startswith("room:")  # your application asks who is asking


app.include_router(channels_router(layer, authorize=may_read), prefix="/channels")

# --- The page ------------------------------------------------------------------

# Whatever somebody might smuggle into the page: it is not run, not shown, not sent anywhere.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'",
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
