"""Rooms behind JSON Web Tokens: who may read, who may write, and for how long.

A token says who somebody is and what they may do (its claim "cap"). Sockets open with one, go on
with a new one, and end when it has expired or was revoked, on whichever node they are.

To run it without a database: `pip install 'pgchannels[demo,auth]'`, and in this directory
`PGCHANNELS_BACKEND=memory uvicorn app:app`. With one, on any number of nodes: set
PGCHANNELS_DATABASE_URL, the same ROOMS_SECRET for all, `pgchannels migrate`, `uvicorn app:app`.
"""

import hmac
import math
import os
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import jwt
from fastapi import Depends, FastAPI, HTTPException, Request, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from pydantic import BaseModel, Field, ValidationError

from pgchannels import get_channel_layer
from pgchannels.web import (
    JWT,
    Authentication,
    Capabilities,
    ConnectionManager,
    FirstMessageToken,
    FixedWindow,
    HeaderToken,
    Identity,
    Limits,
    Origins,
    SocketError,
    SubprotocolToken,
    ValidationFailed,
    channels_router,
    http_authorize,
    install_error_handlers,
    lifespan,
)

PAGE = Path(__file__).parent / "page"
# Without one of your own, tokens end with the process, and are good on this node only.
SECRET = os.environ.get("ROOMS_SECRET") or secrets.token_urlsafe(48)
LIFETIME = int(os.environ.get("ROOMS_TOKEN_SECONDS", "60"))
ISSUER = AUDIENCE = "rooms-demo"

# --- Who there is: FOR THE DEMO ONLY. Yours are in a database, with their passwords hashed ----


@dataclass(frozen=True)
class DemoUser:
    password: str
    cap: dict[str, list[str]] = field(default_factory=dict)
    is_admin: bool = False


READ = ["subscribe", "history"]
USERS = {
    "ada": DemoUser("ada", {"room:*": [*READ, "publish"]}),
    "bob": DemoUser("bob", {"room:lobby": [*READ, "publish"], "room:news": READ}),
    "eve": DemoUser("eve", {"room:news": READ}),
    "admin": DemoUser("admin", is_admin=True),
}

# --- Who is it, and what may they do? -----------------------------------------------------------

layer = get_channel_layer()  # as PGCHANNELS_… variables say


async def is_revoked(identity: Identity) -> bool:
    # For HTTP. Sockets ask this by themselves, when they open and when something is revoked.
    return await layer.is_revoked(
        user_id=identity.user_id, token_id=identity.token_id, issued_at=identity.issued_at
    )


authentication = Authentication(
    JWT(SECRET, algorithms=["HS256"], audience=AUDIENCE, issuer=ISSUER),
    HeaderToken(),  # HTTP, and clients that are no browsers
    SubprotocolToken(),  # new WebSocket(url, ["bearer", token])
    FirstMessageToken(deadline=5),  # {"type": "auth", "token": …}
    revoked=is_revoked,
)
authorize = Capabilities()  # as the token's "cap" says
connections = ConnectionManager(
    layer,
    limits=Limits(per_user=5),
    origins=Origins(),
    authentication=authentication,
    authorize=authorize,
)
app = FastAPI(title="pgchannels rooms", lifespan=lifespan(connections))
install_error_handlers(app)


@app.exception_handler(RequestValidationError)
async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    """FastAPI's own answer repeats the input, which may be what no response can hold."""
    found = [{name: each[name] for name in ("type", "loc", "msg")} for each in error.errors()]
    return JSONResponse({"detail": found}, 422)


Current = Annotated[Identity, Depends(authentication.dependency())]

# --- Tokens --------------------------------------------------------------------------------------


class SignIn(BaseModel):
    user: str = Field(max_length=40)
    password: str = Field(max_length=100)


class Token(BaseModel):
    token: str
    expires_in: int = Field(description="seconds")
    cap: dict[str, list[str]]


def issue(name: str) -> Token:
    user = USERS[name]
    now = time.time()
    claims = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": name,
        "jti": secrets.token_urlsafe(12),
        "iat": int(now),
        "exp": math.ceil(now) + LIFETIME,  # for not less than what the page is told
        "cap": user.cap,
        "admin": user.is_admin,
    }
    token = jwt.encode(claims, SECRET, "HS256")
    return Token(token=token, expires_in=LIFETIME, cap=user.cap)


@app.post("/token")
async def sign_in(given: SignIn) -> Token:
    # Ten attempts a minute for a user, on all nodes together.
    admission = await layer.take(f"sign-in:{given.user}", FixedWindow(10, window=60))
    if not admission.allowed:
        retry_after = {"Retry-After": str(int(admission.retry_after) + 1)}
        raise HTTPException(429, "too many attempts", retry_after)
    user = USERS.get(given.user)
    expected = user.password if user else ""
    is_right = hmac.compare_digest(given.password.encode(), expected.encode())
    if user is None or not is_right:
        raise HTTPException(401, "wrong name or password")
    return issue(given.user)


@app.post("/token/refresh")
async def refresh(current: Current) -> Token:
    """A new token for one that is still good. A socket takes it: no need to connect again."""
    return issue(current.user_id)


async def is_admin(current: Current) -> bool:
    return current.claims.get("admin") is True


async def name_of(current: Current) -> str:
    return current.user_id


# POST /admin/revocations: a user's tokens are worth nothing from now on, and their sockets close,
# on all nodes. And whatever else operators do with connections.
admin = connections.admin_router(authorize=is_admin, who=name_of)
app.include_router(admin, prefix="/admin")

# --- Rooms ---------------------------------------------------------------------------------------


class Say(BaseModel):
    text: str = Field(min_length=1, max_length=500)


@app.websocket("/rooms/{room}")
async def live(socket: WebSocket, room: str) -> None:
    """Who may not read the room is told so, and the socket is closed with 3003."""
    channel = f"room:{room}"
    async with connections.connect(socket) as connection:
        await connection.join(channel, after=connection.resume_position)
        await connection.send_json(
            {"type": "welcome", "room": room, "user": connection.user_id, "token": LIFETIME}
        )
        async for content in connection:
            # Raised out of the block, an error closes the socket. This one shall stay open for who
            # may read, but not write.
            try:
                said = parse(content)
                message = {"type": "said", "from": connection.user_id, "text": said.text}
                await connection.publish(channel, message)
            except SocketError as error:
                await connection.tell(error)


def parse(content: Any) -> Say:
    try:
        return Say.model_validate(content)
    except ValidationError as error:
        raise ValidationFailed("expected a text of 1 to 500 characters") from error


# GET /channels/room:lobby/messages, for who may read the room.
may_read = http_authorize(authorize, authentication.dependency(), "history")
app.include_router(channels_router(layer, authorize=may_read), prefix="/channels")

# --- The page ------------------------------------------------------------------------------------

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
