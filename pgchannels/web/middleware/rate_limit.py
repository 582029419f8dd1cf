"""Refuses what comes too often."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from hashlib import sha256
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

from pgchannels.errors import ConfigurationError, DatabaseUnavailable
from pgchannels.rates import Admission, Limiter, Rate, TokenBucket
from pgchannels.web.errors import Problem, RateLimitExceeded, SocketError, describe
from pgchannels.web.incoming import ANSWERED, HEARTBEATS, Frame
from pgchannels.web.middleware.chain import Middleware, overrides, types_of

if TYPE_CHECKING:
    from pgchannels.web.connection import Connection

__all__ = ["RateLimit"]

# Bytes of a frame that is parsed to see whether its type is an excluded one.
MAX_EXCLUDED = 4096
# Of pings and pongs, which are answered, and by as much as they hold: bytes, and how many a second.
MAX_PING = 128
PINGS = TokenBucket(rate=10, burst=10)
# Characters of whoever has a rate, that are shared as they are.
MAX_KEY = 800

By: TypeAlias = "Literal['connection', 'user'] | Callable[[Connection, Frame], str]"
Cost: TypeAlias = "Callable[[Connection, Frame], int]"


class RateLimit(Middleware):
    """Lets clients send so much in so much time, and refuses the rest by ``rate_limited``.

    ::

        RateLimit(TokenBucket(rate=5, burst=20))
        RateLimit(FixedWindow(1000, window=3600), by="user", shared=True)

    The error's ``retry_after`` says when there is room again. What was refused has cost nothing.

    **Where it is counted.** In this process; a user with sockets on several nodes has a rate on
    each of them. With ``shared=True`` it is counted in the database, for all nodes as one, at the
    price of a round trip for each frame.

    **Several rates** must all have room. In this process, a frame takes from all or from none of
    them. Shared, they are asked one after the other, and a later one that refuses does not give
    back what the earlier ones took: name the one first that refuses most.

    Args:
        rate: a :class:`~pgchannels.TokenBucket` or a :class:`~pgchannels.FixedWindow`.
        more: further ones.
        by: who has a rate: each connection, each user (with all connections; a connection without a
            user counts for itself, in this process), or whoever that function says.
        shared: see above. Not by connection, which is on one node anyway.
        name: of this limit, among those that are shared; two with one name count as one.
        exclude: types that are not counted, of frames up to 4 KiB. ``ping``, ``pong`` and
            ``auth.refresh`` are counted nevertheless where the connection does not answer them
            itself, but the application gets them; and so are pings and pongs of more than 128
            bytes, and those of a connection that are more than ten a second.
        cost: what a frame takes, 0 for nothing; 1 each if None. What costs more than can ever be
            there is refused, without a ``retry_after``.
        max_refusals: the socket is closed with 1008 by that many refusals in a row; None for never.
        when_unavailable: for a shared one while the database is away: ``"refuse"`` all by the error
            ``unavailable``, or count in this process (``"local"``), from zero.
        clock: nanoseconds, and does not go back.

    Raises:
        ConfigurationError: what cannot be.
    """

    def __init__(
        self,
        rate: Rate,
        *more: Rate,
        by: By = "connection",
        shared: bool = False,
        name: str = "inbound",
        exclude: Collection[str] = ("ping", "pong"),
        cost: Cost | None = None,
        max_refusals: int | None = 100,
        when_unavailable: Literal["refuse", "local"] = "refuse",
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        if not callable(by) and by not in ("connection", "user"):
            raise ConfigurationError(f'by must be "connection", "user" or a function, not {by!r}')
        if shared and by == "connection":
            raise ConfigurationError("a connection is on one node: its rate cannot be shared")
        if cost is not None and not callable(cost):
            raise ConfigurationError(f"cost is a function of connection and frame, not {cost!r}")
        if max_refusals is not None and not max_refusals >= 1:
            raise ConfigurationError(f"max_refusals must be at least 1, not {max_refusals!r}")
        if when_unavailable not in ("refuse", "local"):
            raise ConfigurationError(
                f'when_unavailable must be "refuse" or "local", not {when_unavailable!r}'
            )
        self.by = by
        self.shared = shared
        self.name = name
        self.exclude = types_of(exclude)
        self.max_refusals = max_refusals
        self.when_unavailable = when_unavailable
        self._cost = cost
        self._clock = clock
        self._limiter = Limiter(rate, *more)
        self._pings = Limiter(PINGS)
        # Of connections whose last frame was refused: how many were in a row.
        self._refusals: dict[str, int] = {}

    @property
    def rates(self) -> tuple[Rate, ...]:
        return self._limiter.rates

    @property
    def is_immediate(self) -> bool:
        return not (self.shared or overrides(self.inbound, RateLimit.inbound))

    async def inbound(self, connection: Connection, frame: Frame) -> Frame | None:
        if self._is_excluded(connection, frame):
            return frame
        cost = 1 if self._cost is None else self._cost(connection, frame)
        if cost == 0:
            return frame
        if cost > self._limiter.capacity:
            raise self._refusal(connection, "this message costs more than is ever allowed")
        key = self._key(connection, frame)
        # A connection is on one node: shared, each of nobody's would only leave a row behind.
        if self.shared and key != _of_connection(connection):
            admission = await self._take_shared(connection, key, cost)
        else:
            admission = self._limiter.take(key, self._clock(), cost)
        if not admission.allowed:
            # To the millisecond, upwards, for it must not be too early.
            raise self._refusal(
                connection, retry_after=math.ceil(admission.retry_after * 1000) / 1000
            )
        self._refusals.pop(connection.id, None)
        return frame

    def closed(self, connection: Connection) -> None:
        self._refusals.pop(connection.id, None)
        # Ids do not come again. Users do, and must not start anew by connecting anew.
        self._limiter.forget(_of_connection(connection))
        self._pings.forget(connection.id)

    def _is_excluded(self, connection: Connection, frame: Frame) -> bool:
        # Who is over the rate must not be able to have large frames parsed.
        if not self.exclude or frame.size > MAX_EXCLUDED:
            return False
        kind = frame.type
        if kind not in self.exclude:
            return False
        if kind not in ANSWERED:
            return True
        # Else whatever is called a ping would get past the rate, and to the application.
        if not connection.answers_itself(kind):
            return False
        if kind not in HEARTBEATS:
            return True
        return frame.size <= MAX_PING and self._pings.take(connection.id, self._clock()).allowed

    def _key(self, connection: Connection, frame: Frame) -> str:
        # The kind comes first, so that no user can be called as another one's connection is.
        if callable(self.by):
            return f"key:{self.by(connection, frame)}"
        if self.by == "user" and connection.user_id is not None:
            return f"user:{connection.user_id}"
        return _of_connection(connection)

    async def _take_shared(self, connection: Connection, key: str, cost: int) -> Admission:
        remaining = self._limiter.capacity
        if len(key) > MAX_KEY:
            # A user's id may be as long as a key is at most, and the limit's name comes before it.
            key = f"sha256:{sha256(key.encode(errors='surrogatepass')).hexdigest()}"
        try:
            for number, rate in enumerate(self.rates):
                shared_key = f"{self.name}.{number}:{key}"
                admission: Admission = await connection.layer.take(shared_key, rate, cost)
                if not admission.allowed:
                    return admission
                remaining = min(remaining, admission.remaining)
        except DatabaseUnavailable as error:
            if self.when_unavailable == "local":
                return self._limiter.take(key, self._clock(), cost)
            raise _Unavailable from error
        return Admission(allowed=True, remaining=remaining)

    def _refusal(
        self,
        connection: Connection,
        detail: str | None = None,
        *,
        retry_after: float | None = None,
    ) -> RateLimitExceeded:
        refusals = self._refusals.get(connection.id, 0) + 1
        self._refusals[connection.id] = refusals
        is_enough = self.max_refusals is not None and refusals >= self.max_refusals
        return RateLimitExceeded(detail, retry_after=retry_after, disconnect=is_enough)

    def __repr__(self) -> str:
        return f"<RateLimit {', '.join(map(repr, self.rates))}>"


class _Unavailable(SocketError):
    """Whether there is room cannot be said: the database is away. The socket stays open."""

    problem: ClassVar[Problem] = describe(DatabaseUnavailable("the database is away"))


def _of_connection(connection: Connection) -> str:
    return f"connection:{connection.id}"
