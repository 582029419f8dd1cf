"""Connections, as operators deal with them: list, write to, send away, shut out."""

# No postponed annotations here: FastAPI resolves those of the endpoints, which name what is local.

import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self
from uuid import UUID

from fastapi import APIRouter, Depends, HTTPException, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from pgchannels.channels import check_channel, check_user, is_connection
from pgchannels.control import Command, check_token_id
from pgchannels.errors import ConfigurationError
from pgchannels.layer import MAX_CONNECTIONS
from pgchannels.web.codes import NORMAL, SENDABLE
from pgchannels.web.error_handlers import answering

if TYPE_CHECKING:
    from starlette.types import Message

    from pgchannels.records import ConnectionInfo, Receipt
    from pgchannels.web.connections import ConnectionManager

__all__ = ["admin_router"]

logger = logging.getLogger("pgchannels.web.admin")

MAX_REASON = 123
_BODY_OVERHEAD = 64 * 1024
# Seconds. A timedelta counts microseconds: of less, nothing would be left.
MIN_KEEP = 1e-6
MAX_KEEP = 10 * 365 * 86_400


def _check_code(code: int) -> int:
    if code not in SENDABLE:
        raise ValueError("such a code cannot be sent (RFC 6455, section 7.4)")
    return code


def _check_reason(reason: str) -> str:
    if len(reason.encode()) > MAX_REASON:
        raise ValueError(f"a reason has up to {MAX_REASON} bytes")
    return reason


def _check_connection(id: str) -> str:
    if not is_connection(check_channel(id)):
        raise ValueError("this is not a connection's id")
    return id


Channel = Annotated[str, AfterValidator(check_channel)]
ConnectionId = Annotated[str, AfterValidator(_check_connection)]
User = Annotated[str, AfterValidator(check_user)]
TokenId = Annotated[str, AfterValidator(check_token_id)]


class _Body(BaseModel):
    # What is misspelt must not be left out: "usr_id" would make "everyone" of somebody.
    model_config = ConfigDict(extra="forbid")


class _Selection(_Body):
    def chosen(self, *names: str) -> tuple[str, str]:
        """The one of these fields that is given, and its value."""
        given = [(name, getattr(self, name)) for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of {', '.join(names)} is needed")
        return given[0]


class Announcement(_Body):
    """What everyone is told."""

    payload: dict[str, Any] = Field(examples=[{"type": "announcement", "text": "back at ten"}])
    ttl: float | None = Field(None, gt=0, description="seconds for which it can be read")
    headers: dict[str, str] | None = Field(None, description="for readers on servers")


class AdminMessage(Announcement, _Selection):
    """What somebody is told: exactly one of connection, user_id, group and room."""

    connection: ConnectionId | None = Field(None, description="a connection's id")
    user_id: User | None = None
    group: Channel | None = None
    room: Channel | None = Field(None, description="the same as `group`")

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        self.target()
        return self

    def target(self) -> tuple[str, str]:
        return self.chosen("connection", "user_id", "group", "room")


class Disconnection(_Selection):
    """Who is sent away: exactly one of connection, user_id, group and everyone."""

    connection: ConnectionId | None = Field(None, description="a connection's id")
    user_id: User | None = None
    group: Channel | None = Field(None, description="whoever reads it")
    everyone: Literal[True] | None = None
    code: Annotated[int, AfterValidator(_check_code)] = Field(
        NORMAL, description="the close code: one that may be sent"
    )
    reason: Annotated[str, AfterValidator(_check_reason)] = Field(
        "", description="up to 123 bytes; the client sees it"
    )

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        self.target()
        return self

    def target(self) -> tuple[str, str]:
        return self.chosen("connection", "user_id", "group", "everyone")


class Revocation(_Body):
    """Whose tokens are worth nothing any more: those of a user until now, one token, or both."""

    user_id: User | None = None
    token_id: TokenId | None = Field(None, description="a token's `jti`")
    keep: float = Field(
        86_400.0,
        ge=MIN_KEEP,
        le=MAX_KEEP,
        description="seconds for which that is remembered: at least as long as a token is good",
    )

    @model_validator(mode="after")
    def _check_any(self) -> Self:
        if self.user_id is None and self.token_id is None:
            raise ValueError("user_id, token_id, or both are needed")
        return self


class Sent(BaseModel):
    """The message is committed."""

    created_at: datetime


class ConnectionView(BaseModel):
    """A connection of any node."""

    id: str
    user_id: str | None
    metadata: dict[str, Any] | None
    connected_at: datetime = Field(description="by the database's clock")
    node: UUID
    host: str | None
    local: dict[str, Any] | None = Field(
        None,
        description="state, groups, counters: of a connection of the process that was asked, and "
        "of that only",
    )


class ConnectionPage(BaseModel):
    """Connections, by their ids."""

    connections: list[ConnectionView]
    next: str | None = Field(description="`after=` it for more; null: no more")


class _Route(APIRoute):
    """A route that reads bodies up to a limit, and describes what is wrong without ``input``.

    FastAPI reads and parses a body before it asks who sends it. The input is what was sent, and
    need not be anything that a response can hold: half of a surrogate pair, NaN, a thousand arrays
    in one another.
    """

    max_size: ClassVar[int]

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(_bounded(request, self.max_size))
            except RequestValidationError as error:
                found = [
                    {name: problem[name] for name in ("type", "loc", "msg")}
                    for problem in error.errors()
                ]
            # Not inside the except: the first one would be its context, and logs show that.
            raise RequestValidationError(found)

        return handle


def _bounded(request: Request, limit: int) -> Request:
    size = 0

    async def receive() -> "Message":
        nonlocal size
        message = await request.receive()
        size += len(message.get("body", b""))
        if size > limit:
            raise HTTPException(413, f"a body has at most {limit} bytes")
        return message

    return Request(request.scope, receive)


def admin_router(
    connections: "ConnectionManager",
    *,
    authorize: Callable[..., Any],
    who: Callable[..., Any] | None = None,
    **options: Any,
) -> APIRouter:
    """Make a router for operators, over the connections of all nodes.

    ====================  ==========================================================
    POST /announcements   tell everyone
    POST /messages        tell a room or group, a user, a connection
    GET /connections      list them, of a user too; in pages
    GET /connections/{id} one of them
    POST /disconnections  close one, those of a user or a group, or all
    POST /revocations     a user's tokens, or one, are worth nothing any more
    ====================  ==========================================================

    Each action is logged by ``pgchannels.web.admin``, with ``admin_action``, ``admin_target`` and
    ``admin`` as structured fields; payloads are not.

    Args:
        connections: the manager that it is about.
        authorize: a FastAPI dependency, with whatever parameters it needs. It allows by returning
            True; anything else is refused with 403, a user too, as one who has signed in need not
            be an administrator. It may raise ``HTTPException`` itself. There is no default: who
            may do this is the application's to say.
        who: a FastAPI dependency that gives the administrator's name, a str, for the log.
        options: for :class:`fastapi.APIRouter`.

    Raises:
        ConfigurationError: *authorize* or *who* cannot be called.
    """
    if not callable(authorize):
        raise ConfigurationError(
            "admin_router() needs authorize=, a dependency that says who may administer"
        )
    if who is not None and not callable(who):
        raise ConfigurationError(f"who= cannot be called: {who!r}")

    async def admitted(
        request: Request,
        allowed: Annotated[Any, Depends(authorize)],
        name: Annotated[Any, Depends(_nobody if who is None else who)],
    ) -> str | None:
        if allowed is not True:
            logger.warning(
                "refused: %s %r (only True allows; authorize= gave %s)",
                request.method,
                request.url.path,
                allowed if isinstance(allowed, bool | None) else f"a {type(allowed).__name__}",
            )
            raise HTTPException(403, "you may not do this")
        if who is not None and not isinstance(name, str):
            raise ConfigurationError(f"who= must give a str, not a {type(name).__name__}")
        return None if who is None else str(name)

    layer = connections.layer

    class Route(_Route):
        # A character may be escaped by six bytes; a payload that is too large is refused later.
        max_size = _BODY_OVERHEAD + 6 * layer.settings.max_message_size

    # Also in an application that takes any body for JSON: pages of other sites may send those.
    strict = {"strict_content_type": True}
    router = APIRouter(**{"tags": ["admin"], "route_class": Route, **strict, **options})

    @router.post("/announcements", status_code=201)
    async def announce(admin: Annotated[str | None, Depends(admitted)], body: Announcement) -> Sent:
        """Tell every connection."""
        with _logged("announce", "everyone", admin):
            sent = await connections.broadcast(body.payload, ttl=body.ttl, headers=body.headers)
        return _sent(sent)

    @router.post("/messages", status_code=201)
    async def message(admin: Annotated[str | None, Depends(admitted)], body: AdminMessage) -> Sent:
        """Tell a room or group, a user's connections, or one connection."""
        kind, target = body.target()
        send: Callable[..., Awaitable[Receipt]] = connections.send_group
        if kind == "connection":
            send = connections.send_personal
        elif kind == "user_id":
            send = connections.send_to_user
        with _logged("message", f"{kind} {target}", admin):
            sent = await send(target, body.payload, ttl=body.ttl, headers=body.headers)
        return _sent(sent)

    @router.get("/connections")
    async def list_connections(
        admin: Annotated[str | None, Depends(admitted)],
        response: Response,
        user_id: Annotated[User | None, Query(description="of this user only")] = None,
        after: Annotated[Channel | None, Query(description="of the page before: `next`")] = None,
        limit: Annotated[int, Query(ge=1, le=MAX_CONNECTIONS)] = 100,
    ) -> ConnectionPage:
        """The connections of all nodes, by their ids."""
        response.headers["Cache-Control"] = "no-store"
        with _logged("list", "everyone" if user_id is None else f"user_id {user_id}", admin):
            found = await layer.connections(user_id=user_id, after=after, limit=limit)
        return ConnectionPage(
            connections=[_view(info) for info in found],
            next=found[-1].channel if len(found) == limit else None,
        )

    @router.get("/connections/{id:path}")
    async def get_connection(
        admin: Annotated[str | None, Depends(admitted)],
        response: Response,
        id: Annotated[Channel, Path()],
    ) -> ConnectionView:
        """One connection of any node; what this process knows of it, if it is one of its own."""
        response.headers["Cache-Control"] = "no-store"
        with _logged("get", f"connection {id}", admin):
            info = await _find(connections, id)
        if info is None:
            raise HTTPException(404, "there is no such connection")
        local = connections.get(id)
        return _view(info, None if local is None else local.to_dict())

    @router.post("/disconnections", status_code=202)
    async def disconnect(
        admin: Annotated[str | None, Depends(admitted)], body: Disconnection
    ) -> None:
        """Close connections, on all nodes. Not an error if there are none."""
        kind, target = body.target()
        whom = kind if kind == "everyone" else f"{kind} {target}"
        with _logged("disconnect", whom, admin):
            if kind == "connection":
                await connections.disconnect(target, body.code, body.reason)
            else:
                selector: dict[str, Any] = {kind: target}
                await layer.command(
                    Command("close", code=body.code, reason=body.reason, **selector)
                )

    @router.post("/revocations", status_code=202)
    async def revoke(admin: Annotated[str | None, Depends(admitted)], body: Revocation) -> None:
        """Make tokens worthless, and close the connections that came with them."""
        given = {"user_id": body.user_id, "token_id": body.token_id}
        target = ", ".join(f"{name} {value}" for name, value in given.items() if value is not None)
        with _logged("revoke", target, admin):
            await connections.revoke(**given, keep=timedelta(seconds=body.keep))

    return router


def _nobody() -> None:
    """Nothing is known of who the administrator is."""


@contextmanager
def _logged(action: str, target: str, admin: str | None) -> Iterator[None]:
    """Log an action when it has been done, or has failed; then the client is answered that."""
    extra = {"admin": admin, "admin_action": action, "admin_target": target}
    # As repr: what may be a client's own text takes no lines of its own in the log.
    words = (admin, action, target)
    with answering():
        try:
            yield
        except Exception:
            logger.warning("%r: %s, %r: has failed", *words, extra=extra)
            raise
        logger.info("%r: %s, %r", *words, extra=extra)


async def _find(connections: "ConnectionManager", id: str) -> "ConnectionInfo | None":
    if not is_connection(id):
        return None
    # There is a query for what comes after a name, in the order of bytes. Of what comes after the
    # name without its last character, few come before it.
    after = id[:-1] or None
    while page := await connections.layer.connections(after=after):
        for info in page:
            if info.channel == id:
                return info
        after = page[-1].channel
        if after.encode() > id.encode():
            break
    return None


def _view(info: "ConnectionInfo", local: dict[str, Any] | None = None) -> ConnectionView:
    return ConnectionView(
        id=info.channel,
        user_id=info.user_id,
        metadata=None if info.metadata is None else dict(info.metadata),
        connected_at=info.connected_at,
        node=info.node,
        host=info.host,
        local=local,
    )


def _sent(receipt: "Receipt") -> Sent:
    return Sent(created_at=receipt.created_at)
