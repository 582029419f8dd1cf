"""A channel's history over REST."""

# No postponed annotations here: FastAPI resolves those of the endpoint, which names what is local.

import logging
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlencode

import orjson
from fastapi import APIRouter, Depends, HTTPException, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import AwareDatetime, BaseModel, Field

from pgchannels.channels import check_channel
from pgchannels.errors import ConfigurationError, InvalidFilter, InvalidPosition, UnknownPosition
from pgchannels.layer import MAX_HISTORY
from pgchannels.messages import Position, parse_start
from pgchannels.web.error_handlers import answering

if TYPE_CHECKING:
    from pgchannels.layer import ChannelLayer
    from pgchannels.records import HistoryPage

__all__ = ["channels_router"]

logger = logging.getLogger("pgchannels.web")


class Envelope(BaseModel):
    """A message as clients get it, over REST and over sockets."""

    id: int = Field(examples=[4711])
    position: str = Field(examples=["1-4711"], description="opaque; `after=` it reads on from here")
    channel: str = Field(examples=["room:1"])
    created_at: datetime
    data: dict[str, Any]
    attachments: dict[str, str] = Field(
        default_factory=dict,
        description="bytes that were in the data, in base64 by JSON pointer; left out if none",
    )


class History(BaseModel):
    """A page of messages."""

    messages: list[Envelope]
    next: str | None = Field(
        description="`after=` it, instead of `since=`, for more (newest first: `before=` it); "
        "with a filter there may be more though this page is empty"
    )
    position: str = Field(description="the end of the log; subscribe after it to go on live")
    truncated: bool = Field(description="messages that were asked for are no longer retained")


def channels_router(
    layer: "ChannelLayer", *, authorize: Callable[..., Any], **options: Any
) -> APIRouter:
    """Make a router with ``GET /{channel}/messages``.

    Args:
        layer: where the messages are.
        authorize: a FastAPI dependency, with whatever parameters it needs (``channel: str`` is the
            channel that is asked for). It allows by returning True; anything else, a user too, is
            refused with 403. It may raise ``HTTPException`` itself. There is no default: who may
            read what is the application's to say.
        options: for :class:`fastapi.APIRouter`.

    Raises:
        ConfigurationError: if *authorize* cannot be called.
    """
    if not callable(authorize):
        raise ConfigurationError(
            "channels_router() needs authorize=, a dependency that says who may read a channel"
        )
    router = APIRouter(**{"tags": ["channels"], **options})

    # A channel's name may hold slashes; "messages" is what ends the path.
    @router.get("/{channel:path}/messages", response_model=History)
    async def messages(
        request: Request,
        channel: Annotated[str, Path(description="the channel's name")],
        allowed: Annotated[Any, Depends(authorize)],
        after: Annotated[str | None, Query(description="only messages after this position")] = None,
        before: Annotated[str | None, Query(description="only messages before it")] = None,
        since: Annotated[
            AwareDatetime | None,
            Query(
                description="instead of `after`: only messages from this time on, and perhaps some "
                "from shortly before it",
                examples=["2026-11-20T12:00:00Z"],
            ),
        ] = None,
        filter: Annotated[
            str | None,
            Query(
                description="only messages whose data match: a logical expression of JSONPath "
                "(RFC 9535) over paths and literals",
                examples=['$.status == "paid" && $.total >= 100'],
            ),
        ] = None,
        order: Annotated[
            Literal["asc", "desc"], Query(description="oldest first, or newest first")
        ] = "asc",
        limit: Annotated[int, Query(ge=1, le=MAX_HISTORY)] = 50,
    ) -> Response:
        """Read the messages that a channel retains.

        A message that has just been sent is among them some milliseconds later.
        """
        if allowed is not True:
            if allowed:
                logger.warning(
                    "refused: the history of a channel (only True allows; authorize= gave a %s)",
                    type(allowed).__name__,
                )
            raise HTTPException(403, "you may not read this channel")
        _check("path", "channel", check_channel, channel)
        for name, value in (("after", after), ("before", before)):
            if value is not None:
                _check("query", name, Position.parse, value)
        if since is not None:
            _check("query", "since", lambda time: parse_start(after, time), since)
        with answering():
            try:
                page = await layer.history(
                    channel,
                    after=after,
                    before=before,
                    since=since,
                    filter=filter,
                    order=order,
                    limit=limit,
                )
            except InvalidFilter as error:
                raise _unprocessable("query", "filter", error) from error
            except UnknownPosition:
                raise  # it is well-formed: the client is to begin from the state as it is now
            except InvalidPosition as error:
                name = "after" if str(error.position) == after else "before"
                raise _unprocessable("query", name, error) from error
        headers = {"Cache-Control": "no-store"}
        if page.next is not None:
            query = dict(request.query_params)
            query["after" if order == "asc" else "before"] = str(page.next)
            if order == "asc":
                query.pop("since", None)
            # Relative to the request's own URL, which a proxy may have rewritten, and whose path
            # is as the client encoded it (RFC 8288, section 3.1).
            headers["Link"] = f'<?{urlencode(query)}>; rel="next"'
        return Response(_body(page), media_type="application/json", headers=headers)

    return router


def _body(page: "HistoryPage") -> str:
    # Put together as text, so that the payloads pass through unparsed.
    messages = ",".join(message.envelope for message in page.messages)
    rest = {
        "next": None if page.next is None else str(page.next),
        "position": str(page.position),
        "truncated": page.truncated,
    }
    return f'{{"messages":[{messages}],{orjson.dumps(rest).decode()[1:]}'


def _check(where: str, name: str, check: Callable[[Any], object], value: object) -> None:
    try:
        check(value)
    except ValueError as error:
        raise _unprocessable(where, name, error) from error


def _unprocessable(where: str, name: str, error: ValueError) -> RequestValidationError:
    # As FastAPI itself says it, so that clients need one way to read what was wrong.
    return RequestValidationError(
        [{"type": "value_error", "loc": (where, name), "msg": str(error), "input": None}]
    )
