"""A socket by itself: frames in and out, whether the other end is there, how it is closed.

It knows nothing of channels. What goes on beside each other on one socket are its tasks, and
:meth:`Wire.close_soon` ends them all, from wherever it is called.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Coroutine, Iterable, MutableMapping
from enum import Enum
from math import inf
from typing import TYPE_CHECKING, Any, Literal

import anyio
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from pgchannels.web.abort import (
    Writing,
    abort,
    abort_later,
    abort_unless_written,
    is_lost,
    unwritten,
)
from pgchannels.web.codes import (
    ABNORMAL,
    INTERNAL_ERROR,
    NORMAL,
    SENDABLE,
    TRY_AGAIN_LATER,
    cut,
)
from pgchannels.web.errors import Problem, TokenExpired
from pgchannels.web.frames import encode_json
from pgchannels.web.inbox import Inbox
from pgchannels.web.incoming import Frame, size_of
from pgchannels.web.liveness import Heartbeat, Liveness, Verdict
from pgchannels.web.tasks import SocketTasks

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["CLOSING_TIME", "ConnectionState", "SocketClosed", "Wire"]

logger = logging.getLogger("pgchannels.web")

# Seconds that saying goodbye may take: to the client, in disconnect(), and to the database, each.
CLOSING_TIME = 5.0
# Seconds for a client that still takes what was sent to it before, on a slow link.
SLOW_CLOSING_TIME = 60.0
# Seconds that a socket is kept which was closed before it was admitted.
REFUSING_TIME = 1.0
# Seconds that the block which serves a socket has to end by itself once the client is gone.
LEAVING_TIME = 3.0
# Seconds after which the end of a client is looked for where no code waits for its frames.
LOOK_EVERY = 5.0


_ACCEPTED = (WebSocketState.CONNECTED, WebSocketState.DISCONNECTED)


class ConnectionState(Enum):
    """How far a connection has come."""

    CONNECTING = "connecting"
    OPEN = "open"
    CLOSING = "closing"
    CLOSED = "closed"


class SocketClosed(RuntimeError):
    """A frame was sent to a socket after :meth:`Wire.close`, by the code that serves it.

    Attributes:
        wire: the socket.
    """

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        super().__init__(f"{wire!r} has been closed, and sends nothing any more")


class Wire:
    """One socket of Starlette's.

    Args:
        websocket: the socket, not accepted yet.
        heartbeat: how it is found out that the client is gone.
        send_timeout: seconds that sending may go without progress, or slower than 2 KiB a second;
            None for ever.
    """

    def __init__(
        self, websocket: WebSocket, heartbeat: Heartbeat, send_timeout: float | None
    ) -> None:
        self.websocket = websocket
        self.messages_in = self.bytes_in = self.messages_out = self.bytes_out = 0
        self.close_code: int | None = None
        """What it was closed with, by either side; None while it is open."""
        self._tasks = SocketTasks()
        self._inbox = Inbox(self._next_frame, self._tasks.spawn)
        self._receive = websocket.receive
        self._is_read = self._ends = False
        self._loop = asyncio.get_running_loop()
        self._liveness = Liveness(heartbeat, send_timeout, self._loop.time())
        self._liveness.deaf()
        self._timer: asyncio.TimerHandle | None = None
        self._asked_to_close: int | None = None
        self._gone: int | None = None
        self._farewell: str | None = None
        self._reason = ""

    @property
    def path_params(self) -> Mapping[str, Any]:
        return self.websocket.path_params

    @property
    def query_params(self) -> Mapping[str, str]:
        return self.websocket.query_params

    @property
    def state(self) -> ConnectionState:
        if self.close_code is not None:
            return ConnectionState.CLOSED
        if (self._tasks.ended, self._gone, self._asked_to_close) != (None, None, None):
            return ConnectionState.CLOSING
        if self.websocket.application_state is WebSocketState.CONNECTING:
            return ConnectionState.CONNECTING
        return ConnectionState.OPEN

    @property
    def idle_time(self) -> float:
        """Seconds since the client last sent something."""
        return self._loop.time() - self._liveness.heard_at

    async def accept(
        self, subprotocol: str | None = None, headers: Iterable[tuple[bytes, bytes]] | None = None
    ) -> None:
        """Accept the socket, unless that has been done.

        Raises:
            WebSocketDisconnect: the client has not waited for it.
        """
        if self.websocket.application_state is WebSocketState.CONNECTING:
            try:
                await self.websocket.accept(subprotocol, headers)
            except OSError:
                # As Starlette has it of sends, but for this one.
                self._gone = self._gone or ABNORMAL
                raise WebSocketDisconnect(ABNORMAL) from None
        self._begin_to_read()

    async def close(self, code: int = NORMAL, reason: str | None = None) -> None:
        """Close the socket. Before it was accepted, this refuses it with HTTP 403.

        Does nothing if it is closed, by either side.

        Args:
            code: 1000 to 4999, but those that may not be sent, as 1005 and 1006.
            reason: up to 123 bytes; what is more is cut off.

        Raises:
            ValueError: the code may not be sent.
        """
        if code not in SENDABLE:
            raise ValueError(f"{code} cannot be sent as a close code")
        if self.websocket.application_state is not WebSocketState.DISCONNECTED:
            self._asked_to_close = code
            if self.websocket.application_state is WebSocketState.CONNECTING:
                self._log_refusal(code)
            try:
                await self._for_a_moment(self.websocket.close(code, cut(reason or "")))
            except (WebSocketDisconnect, RuntimeError):
                state: object = self.websocket.application_state  # mypy takes it for unchanged
                if state is not WebSocketState.DISCONNECTED:
                    raise
                logger.debug("the client was gone before the socket could be closed")

    def _log_refusal(self, code: int) -> None:
        logger.info("%r is refused with %d", self, code, extra={"code": code})

    def close_soon(self, code: int, reason: str = "", farewell: object = None) -> None:
        """Close the socket soon, from outside of its tasks. At once; never raises.

        Args:
            code: what it is closed with; 1011 in place of one that may not be sent.
            reason: up to 123 bytes; what is more is cut off.
            farewell: what is sent before that, as JSON.
        """
        if self._tasks.ended is None:
            self._part(reason, None if farewell is None else encode_json(farewell))
            self._tasks.end(code if code in SENDABLE else INTERNAL_ERROR)

    async def send_text(self, text: str) -> None:
        """Send a text frame, past the log.

        Raises:
            WebSocketDisconnect: the client is gone. This ends the block that serves the socket. For
                code that does not serve it, sending to a socket that has ended does nothing.
        """
        await self._send("text", text)

    async def send_bytes(self, data: bytes) -> None:
        """Send a binary frame, past the log. Raises as :meth:`send_text`."""
        await self._send("bytes", data)

    async def send_json(self, content: Any) -> None:
        """Send *content*, which may be or hold pydantic models and messages, as a text frame."""
        await self.send_text(encode_json(content))

    def spawn(self, coroutine: Coroutine[Any, Any, object]) -> None:
        """Run *coroutine* beside the socket, until it returns or the socket ends.

        If it raises, the socket is closed with 1011, or with 1013 where the database is away:
        something that it was open for is missing.

        Raises:
            RuntimeError: the socket is not open any more.
        """
        self._tasks.spawn(coroutine)

    def _send_frame(self, frame: str | bytes) -> Awaitable[None]:
        # Not by send_text() and send_bytes(), nor a coroutine of its own: it is on the hot path.
        return self._send("text" if isinstance(frame, str) else "bytes", frame)

    async def _send(self, kind: Literal["text", "bytes"], data: str | bytes) -> None:
        liveness, time = self._liveness, self._loop.time
        liveness.sending(time())
        try:
            # As send_text() and send_bytes() of Starlette's do it, one call less on a hot path.
            await self.websocket.send({"type": "websocket.send", kind: data})
        except (WebSocketDisconnect, RuntimeError) as error:
            self._not_sent(error)
            return
        finally:
            liveness.sent(time())
        self.messages_out += 1
        self.bytes_out += size_of(data)

    def _not_sent(self, error: WebSocketDisconnect | RuntimeError) -> None:
        """Note that the socket takes nothing any more. Raises for the code that serves it."""
        state = self.websocket.application_state
        if isinstance(error, RuntimeError):
            # Starlette refuses what comes after a close. A server that has given up on the client
            # and not said so yet refuses it by itself.
            is_over = state is WebSocketState.DISCONNECTED or type(error) is RuntimeError
            if not is_over or state is WebSocketState.CONNECTING:
                raise error
        if self._asked_to_close is None:
            self._gone = self._gone or ABNORMAL
        if not self._tasks.is_current:
            logger.debug("%r has ended, and is sent nothing", self)
        elif self._asked_to_close is not None:
            raise SocketClosed(self) from error
        else:
            raise WebSocketDisconnect(self._gone or ABNORMAL) from error

    @property
    def _is_gone(self) -> bool:
        """Whether the client of this socket is known to be gone, by whatever has been tried."""
        # Also by what an application has received or sent past this, by Starlette's own socket.
        return (
            self._gone is not None
            or self.websocket.client_state is WebSocketState.DISCONNECTED
            or (
                self.websocket.application_state is WebSocketState.DISCONNECTED
                and self._asked_to_close is None
            )
        )

    def _begin_to_read(self) -> None:
        """Learn of the end of the client, from the time on that the socket is accepted."""
        is_accepted = self.websocket.application_state is WebSocketState.CONNECTED
        if is_accepted and self._tasks.are_running and not self._is_read:
            self._is_read = True
            # An application may read past the connection, and must not miss what was read ahead.
            self.websocket.receive = self._receive_event  # type: ignore[method-assign]
            self._inbox.read_ahead()
            self._watch()

    async def _receive_event(self) -> MutableMapping[str, Any]:
        """What Starlette's own socket gives to those who read it."""
        try:
            raw = (await self._inbox.take(_as_it_is)).raw
        except StopAsyncIteration:
            self.websocket.client_state = WebSocketState.DISCONNECTED
            return {"type": "websocket.disconnect", "code": self._gone or ABNORMAL, "reason": ""}
        return {"type": "websocket.receive", "text" if isinstance(raw, str) else "bytes": raw}

    async def _end_block(self) -> None:
        """End the block that serves the socket, unless it does so itself: the client is gone."""
        self._ends = True
        await asyncio.sleep(LEAVING_TIME)
        self._tasks.end(self._gone or ABNORMAL)

    async def _next_frame(self) -> Frame | None:
        """Read what the client sends; None when it is gone."""
        if self._gone is not None:
            return None
        self._liveness.listens(self._loop.time())
        try:
            received = await self._receive()
        finally:
            self._liveness.deaf()
        if received["type"] == "websocket.disconnect":
            # Of a close of our own, some servers say 1005.
            self._gone = self._asked_to_close or int(received.get("code") or ABNORMAL)
            if self._tasks.are_running:
                self._tasks.spawn(self._end_block())
            return None
        text: str | None = received.get("text")
        frame = Frame(received.get("bytes") or b"" if text is None else text)
        self.messages_in += 1
        self.bytes_in += frame.size
        self._liveness.heard(self._loop.time())
        return frame

    async def _send_error(self, problem: Problem) -> None:
        if self.websocket.application_state is WebSocketState.CONNECTING:
            await self.accept()
        if self.websocket.application_state is WebSocketState.CONNECTED:
            await self.send_text(problem.response().encode())

    def _watch(self) -> None:
        """Look after the client, and again when there may be something to see."""
        self._watch_no_more()
        now = self._loop.time()
        taken = self.bytes_out - unwritten(self.websocket)
        verdict, again = self._liveness.check(now, taken)
        if self._is_read and verdict in (Verdict.FINE, Verdict.PING):
            again = min(again, now + LOOK_EVERY)
            self._look_for_end()
        # First: should what follows fail, it is looked at again.
        if again < inf and self._tasks.ended is None:
            self._timer = self._loop.call_at(again, self._watch)
        match verdict:
            case Verdict.PING if self.state is ConnectionState.OPEN:
                self._tasks.spawn(self.send_json({"type": "ping"}))
            case Verdict.GONE:
                self.close_soon(INTERNAL_ERROR, "no answer to pings")
            case Verdict.STUCK:
                self.close_soon(TRY_AGAIN_LATER, "nothing is taken of what is sent")
            case Verdict.EXPIRED if (more := self._extension()) > 0:
                self._liveness.expire_at(now + more)
                self._timer = self._loop.call_at(now + more, self._watch)
            case Verdict.EXPIRED:
                self._tasks.end(TokenExpired())

    def _extension(self) -> float:
        """Seconds for which a token that has run out is still good."""
        return 0.0

    def _look_for_end(self) -> None:
        """Learn of the end of a client whose frames no code waits for: a handler is busy, say."""
        if self._inbox.ahead is None:
            self._inbox.read_ahead()
        elif is_lost(self.websocket) and not self._ends:
            # It is behind the frame that waits.
            self._tasks.spawn(self._end_block())

    def _watch_no_more(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _part(self, reason: str, farewell: str | None) -> None:
        """With which words the socket is to be closed."""
        self._reason, self._farewell = reason, farewell

    async def _take_leave(self, code: int, *, closes: bool = True) -> None:
        """Close the socket with *code*, if it is still open; not for longer than a moment.

        A client that takes nothing meanwhile is dropped, and does not hear the code. Without
        *closes*, somebody else closes it, and it is only sent what comes before that.
        """
        self._watch_no_more()
        if self._gone is None and code in SENDABLE:
            # Also when the server cancels: a client must know why, and whether to come back.
            with anyio.CancelScope(shield=True):
                if await self._for_a_moment(self._say_goodbye(code, closes=closes)):
                    abort_unless_written(self.websocket, CLOSING_TIME, SLOW_CLOSING_TIME)
        if not self._is_admitted and self.websocket.application_state in _ACCEPTED:
            # Some servers wait for the client's answer to a close, for longer.
            abort_later(self.websocket, REFUSING_TIME)

    @property
    def _is_admitted(self) -> bool:
        """Whether it is known whose socket it is."""
        return True

    async def _for_a_moment(self, sending: Awaitable[None]) -> bool:
        """Wait while it is being sent; drop the connection if the client takes nothing of it."""
        with anyio.CancelScope() as scope:
            writing = Writing(self.websocket, CLOSING_TIME, SLOW_CLOSING_TIME, scope.cancel)
            try:
                await sending
            finally:
                writing.stop()
        if scope.cancelled_caught:
            abort(self.websocket)
        return not scope.cancelled_caught

    async def _say_goodbye(self, code: int, *, closes: bool) -> None:
        try:
            if self._farewell and self.websocket.application_state is WebSocketState.CONNECTED:
                await self.websocket.send_text(self._farewell)
            if closes:
                await self.close(code, self._reason)
        except (RuntimeError, WebSocketDisconnect):
            logger.debug("the socket was gone before it could be closed")


def _as_it_is(frame: Frame) -> Frame:
    return frame
