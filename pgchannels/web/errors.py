"""What goes wrong with a socket, and what its client is told of it. Pure.

::

    SocketError                      said to the client; the socket stays open, or is closed by it
     ├─ AuthenticationError          who is it?                        3000  HTTP 401
     │   ├─ TokenExpired             it was somebody once              3000  HTTP 401
     │   └─ AuthenticationTimeout    did not say in time               3008  HTTP 408
     ├─ AuthorizationError           may not do that                   stays HTTP 403
     ├─ ValidationFailed             not what was expected             stays HTTP 422
     │   └─ FrameTooLarge            longer than is read               1009  HTTP 413
     ├─ UnexpectedMessage            nothing takes it                  stays HTTP 422
     ├─ RateLimitExceeded            too often; retry_after says when  stays HTTP 429
     ├─ TooManyChannels              as many as one connection reads   stays HTTP 429
     ├─ ConnectionRefused            a socket that is not to be        1008  HTTP 403
     └─ Draining                     this server shuts down            1012  HTTP 503

:func:`describe` says of any exception, ours or not, what a client may hear of it. Internal details
never are: an unexpected exception is an ``internal_error`` with an ``error_id``, which the log has
too. Close codes are those of :mod:`pgchannels.web.codes`; 1005 and 1006 cannot be among them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field

from pgchannels.errors import (
    ChannelFull,
    ChannelLayerClosed,
    DatabaseUnavailable,
    GroupFull,
    InvalidFilter,
    InvalidMessage,
    InvalidPosition,
    InvalidUser,
    MessageTooLarge,
    PGChannelsError,
    SlowConsumer,
    TooManyConnections,
    UnknownPosition,
)
from pgchannels.web.codes import (
    FORBIDDEN,
    GONE,
    INTERNAL_ERROR,
    POLICY_VIOLATION,
    SENDABLE,
    SERVICE_RESTART,
    TIMEOUT,
    TOO_BIG,
    TRY_AGAIN_LATER,
    UNAUTHORIZED,
)

if TYPE_CHECKING:
    from pgchannels.web.connection import Connection

__all__ = [
    "AuthenticationError",
    "AuthenticationTimeout",
    "AuthorizationError",
    "Category",
    "ConnectionRefused",
    "Draining",
    "ErrorResponse",
    "FrameTooLarge",
    "Problem",
    "RateLimitExceeded",
    "Severity",
    "SocketError",
    "TokenExpired",
    "TooManyChannels",
    "UnexpectedMessage",
    "ValidationFailed",
    "describe",
    "new_error_id",
]

# Characters of a sentence about what a client sent, which may repeat some of it.
MAX_DETAIL = 500


class Category(StrEnum):
    """What kind of thing went wrong."""

    AUTHENTICATION = "authentication"
    AUTHORIZATION = "authorization"
    VALIDATION = "validation"
    RATE_LIMIT = "rate_limit"
    CONNECTION = "connection"
    BACKEND = "backend"
    MESSAGE = "message"
    SYSTEM = "system"
    UNKNOWN = "unknown"


class Severity(StrEnum):
    """Whose business it is: the client's alone (info), or more and more the operator's."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"
    CRITICAL = "critical"


class ErrorResponse(BaseModel):
    """What a client is told, over a socket or as the body of an HTTP response.

    ``{"type": "error", "code": …, "detail": …, "category": …}``, and what else there is to say.
    """

    model_config = ConfigDict(frozen=True)

    type: str = "error"
    code: str = Field(
        description="for programs; listed in the documentation", examples=["forbidden"]
    )
    detail: str = Field(description="a sentence for people")
    category: Category
    retry_after: float | None = Field(
        None, description="seconds after which it may be tried again; left out where that is vain"
    )
    errors: list[dict[str, Any]] | None = Field(
        None, description="of `invalid_content`: what does not fit, by `loc` and `msg`"
    )
    error_id: str | None = Field(None, description="finds the error in the server's log")
    context: dict[str, Any] | None = Field(None, description="what the detail speaks of, as data")

    def encode(self) -> str:
        """As JSON text, without what there is nothing to say of."""
        return self.model_dump_json(exclude_none=True)


@dataclass(frozen=True)
class Problem:
    """An exception as a client is concerned by it.

    Attributes:
        code: for programs, such as ``"rate_limited"``.
        detail: a sentence that a client may read.
        category: what kind it is.
        severity: whose business it is.
        http_status: where it is answered over HTTP, or refuses a handshake.
        ws_code: what a socket is closed with, if it is closed by this.
        disconnects: whether it is.
        retry_after: seconds after which it may be tried again; None where that is vain.
        errors: what does not fit a model.
        context: data for the client.
        error_id: finds it in the log.
    """

    code: str
    detail: str
    category: Category = Category.UNKNOWN
    severity: Severity = Severity.INFO
    http_status: int = 400
    ws_code: int = POLICY_VIOLATION
    disconnects: bool = False
    retry_after: float | None = None
    errors: Sequence[dict[str, Any]] = ()
    context: Mapping[str, Any] = field(default_factory=dict)
    error_id: str | None = None

    def __post_init__(self) -> None:
        if self.ws_code not in SENDABLE:
            raise ValueError(f"{self.ws_code} cannot be sent as a close code")

    def should_disconnect(self) -> bool:
        return self.disconnects

    def response(self) -> ErrorResponse:
        return ErrorResponse(
            code=self.code,
            detail=self.detail[:MAX_DETAIL],
            category=self.category,
            retry_after=self.retry_after,
            errors=list(self.errors) or None,
            error_id=self.error_id,
            context=dict(self.context) or None,
        )


class SocketError(PGChannelsError):
    """Raise one of these, or one of your own, in whatever serves a socket: the client is told.

    Args:
        detail: a sentence that the client may read; the class' own if None.
        code: instead of the class' own.
        retry_after: seconds after which it may be tried again.
        context: data for the client, JSON.
        disconnect: whether the socket is closed by it; as the class says if None.
        connection: whose socket it is. Set when it is caught, if it was not before.
    """

    problem: ClassVar[Problem] = Problem("error", "this cannot be done")

    def __init__(
        self,
        detail: str | None = None,
        *,
        code: str | None = None,
        retry_after: float | None = None,
        context: Mapping[str, Any] | None = None,
        disconnect: bool | None = None,
        connection: Connection | None = None,
    ) -> None:
        self.detail = self.problem.detail if detail is None else detail
        self.code = code or self.problem.code
        self.retry_after = self.problem.retry_after if retry_after is None else retry_after
        self.context = dict(context or {})
        self.disconnects = self.problem.disconnects if disconnect is None else disconnect
        self.connection = connection
        super().__init__(self.detail)

    @property
    def category(self) -> Category:
        return self.problem.category

    @property
    def severity(self) -> Severity:
        return self.problem.severity

    @property
    def ws_code(self) -> int:
        return self.problem.ws_code

    @property
    def http_status(self) -> int:
        return self.problem.http_status

    def should_disconnect(self) -> bool:
        """Whether the socket is closed by it."""
        return self.disconnects

    def describe(self) -> Problem:
        return replace(
            self.problem,
            code=self.code,
            detail=self.detail,
            retry_after=self.retry_after,
            context=self.context,
            disconnects=self.disconnects,
        )


class AuthenticationError(SocketError):
    """Nobody knows who this is: no token, or one that is none."""

    problem = Problem(
        "unauthenticated",
        "no valid token was given",
        Category.AUTHENTICATION,
        http_status=401,
        ws_code=UNAUTHORIZED,
        disconnects=True,
    )


class TokenExpired(AuthenticationError):
    """The token was valid once. A client gets a new one, and connects again."""

    problem = replace(
        AuthenticationError.problem, code="token_expired", detail="the token has expired"
    )


class AuthenticationTimeout(AuthenticationError):
    """The first message was to say who it is, and none came in time."""

    problem = replace(
        AuthenticationError.problem,
        code="authentication_timeout",
        detail="no token came in time",
        http_status=408,
        ws_code=TIMEOUT,
    )


class AuthorizationError(SocketError):
    """It is known who this is, and that they may not do that."""

    problem = Problem(
        "forbidden",
        "this is not allowed",
        Category.AUTHORIZATION,
        http_status=403,
        ws_code=FORBIDDEN,
    )


class ValidationFailed(SocketError):
    """What was sent is not what was expected. *errors* says where, as pydantic does."""

    problem = Problem(
        "invalid_content",
        "this is not what was expected",
        Category.VALIDATION,
        http_status=422,
    )

    def __init__(
        self, detail: str | None = None, *, errors: Sequence[dict[str, Any]] = (), **options: Any
    ) -> None:
        super().__init__(detail, **options)
        self.errors = tuple(errors)

    def describe(self) -> Problem:
        return replace(super().describe(), errors=self.errors)


class FrameTooLarge(ValidationFailed):
    """What was sent is longer than is read at all."""

    problem = replace(
        ValidationFailed.problem,
        code="frame_too_large",
        detail="the frame is too large",
        http_status=413,
        ws_code=TOO_BIG,
    )


class UnexpectedMessage(SocketError):
    """Nothing takes what was sent."""

    problem = Problem(
        "unexpected_message",
        "nothing here takes this message",
        Category.MESSAGE,
        http_status=422,
    )


class RateLimitExceeded(SocketError):
    """Too much in too short a time. ``retry_after`` says when there is room again."""

    problem = Problem(
        "rate_limited",
        "too many messages; slow down",
        Category.RATE_LIMIT,
        http_status=429,
        ws_code=POLICY_VIOLATION,
    )


class TooManyChannels(SocketError):
    """One connection does not read any number of channels."""

    problem = Problem(
        "too_many_channels",
        "this connection reads as many channels as it may",
        Category.CONNECTION,
        http_status=429,
    )


class ConnectionRefused(SocketError):
    """A socket that is not to be: its origin, say, is none of ours."""

    problem = Problem(
        "refused",
        "this connection is refused",
        Category.CONNECTION,
        http_status=403,
        disconnects=True,
    )


class Draining(SocketError):
    """This server shuts down, and takes no new sockets. Another one does."""

    problem = Problem(
        "draining",
        "this server is shutting down; connect again",
        Category.CONNECTION,
        http_status=503,
        ws_code=SERVICE_RESTART,
        disconnects=True,
        retry_after=1.0,
    )


# Of our own and others' exceptions, in the order in which they are looked at. Where the detail is
# empty, the exception's own sentence is fit for clients.
_KNOWN: tuple[tuple[type[Exception], Problem], ...] = (
    (
        UnknownPosition,
        Problem("unknown_position", "", Category.VALIDATION, http_status=410, ws_code=GONE),
    ),
    (InvalidPosition, Problem("invalid_position", "", Category.VALIDATION, http_status=422)),
    (InvalidFilter, Problem("invalid_filter", "", Category.VALIDATION, http_status=422)),
    (MessageTooLarge, Problem("invalid_message", "", Category.MESSAGE, http_status=413)),
    (InvalidMessage, Problem("invalid_message", "", Category.MESSAGE, http_status=422)),
    (
        ChannelFull,
        Problem("channel_full", "", Category.MESSAGE, http_status=429, retry_after=1.0),
    ),
    (
        GroupFull,
        Problem("group_full", "", Category.CONNECTION, http_status=429, retry_after=30.0),
    ),
    (
        SlowConsumer,
        Problem(
            "slow_consumer",
            "messages came faster than they were taken",
            Category.CONNECTION,
            http_status=429,
            ws_code=TRY_AGAIN_LATER,
            disconnects=True,
            retry_after=1.0,
        ),
    ),
    (
        DatabaseUnavailable,
        Problem(
            "unavailable",
            # The server's address may stand in a driver's sentence; clients get one of our own.
            "the service is not available now",
            Category.BACKEND,
            Severity.ERROR,
            http_status=503,
            ws_code=TRY_AGAIN_LATER,
            retry_after=1.0,
        ),
    ),
    (
        ChannelLayerClosed,
        Problem(
            "draining",
            "this server is shutting down; connect again",
            Category.CONNECTION,
            http_status=503,
            ws_code=SERVICE_RESTART,
            disconnects=True,
            retry_after=1.0,
        ),
    ),
)

_UNKNOWN = Problem(
    "internal_error",
    "something went wrong",
    Category.SYSTEM,
    Severity.CRITICAL,
    http_status=500,
    ws_code=INTERNAL_ERROR,
    disconnects=True,
)


def describe(error: BaseException) -> Problem:
    """Say what a client may hear of *error*: of an unexpected one, no more than an id."""
    if isinstance(error, SocketError):
        return error.describe()
    if isinstance(error, TooManyConnections):
        # A user's other connections are the user's to close; a full server empties by itself.
        of_user = error.scope == "user"
        return Problem(
            "too_many_connections",
            str(error),
            Category.CONNECTION,
            Severity.INFO if of_user else Severity.WARNING,
            http_status=429 if of_user else 503,
            ws_code=POLICY_VIOLATION if of_user else TRY_AGAIN_LATER,
            disconnects=True,
            retry_after=30.0 if of_user else 5.0,
            context={"scope": error.scope, "limit": error.limit},
        )
    if not isinstance(error, InvalidUser):  # no client can help that
        for kind, problem in _KNOWN:
            if isinstance(error, kind):
                return problem if problem.detail else replace(problem, detail=str(error))
    return replace(_UNKNOWN, error_id=new_error_id())


def new_error_id() -> str:
    """What a client and the log have in common."""
    return uuid4().hex[:16]
