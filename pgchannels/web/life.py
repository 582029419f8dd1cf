"""How a socket is served from its beginning to its end, whatever comes in between.

Its life is a block of code: it is admitted before the block begins, and however the block ends, the
client is told, the socket is closed with a code, and nothing of it is left. It is never left open
and deaf. Who serves it says, in a subclass, what admitting and letting go are.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import anyio.lowlevel
from starlette.exceptions import HTTPException, WebSocketException
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from pgchannels.errors import PGChannelsError
from pgchannels.web.codes import ABNORMAL, INTERNAL_ERROR, SENDABLE, SERVICE_RESTART
from pgchannels.web.errors import Problem, SocketError, describe
from pgchannels.web.liveness import Heartbeat
from pgchannels.web.wire import SocketClosed, Wire

__all__ = ["Life", "Refused", "Unserved"]

logger = logging.getLogger("pgchannels.web")


class Refused(Exception):
    """A socket was not accepted, for this reason. The client is still to be told."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        super().__init__(problem.code)


class Unserved(Exception):
    """A socket was at its end before its block began. A client that is there has been told.

    Attributes:
        code: what it is to be closed with, if whoever serves it has left that to do; None if the
            client is gone, and nothing can be sent.
        reason: likewise.
    """

    def __init__(self, code: int | None, reason: str) -> None:
        self.code = code
        self.reason = reason
        super().__init__(reason)


class Life(Wire):
    """A socket that is served. See :class:`Wire` for the arguments."""

    def __init__(
        self, websocket: WebSocket, heartbeat: Heartbeat, send_timeout: float | None
    ) -> None:
        super().__init__(websocket, heartbeat, send_timeout)
        self.failed_with: Exception | None = None
        """The error that has ended it, known or not; None if none has."""

    # For a subclass to say

    def _reading(self) -> AbstractAsyncContextManager[None]:
        """A block in which it is there for others, and others for it."""
        raise NotImplementedError

    def _tasks_run(self) -> None:
        """It has been admitted, and tasks may be spawned from now on."""

    def _note(self, error: Exception, *, raised: bool = False, refuses: bool = False) -> Problem:
        """Count and log an error, and say what a client may hear of it.

        With *raised*, an unexpected error is raised again, and the server logs its traceback.
        """
        raise NotImplementedError

    async def _left(self, code: int) -> None:
        """The socket is closed. Called once, whether it was admitted or not."""

    async def _let_go(self) -> None:
        """Leave nothing behind. Called once, at last."""
        raise NotImplementedError

    # From its beginning to its end

    @asynccontextmanager
    async def _live(
        self, admitting: Awaitable[None], begin: Callable[[], Awaitable[None]] | None = None
    ) -> AsyncIterator[None]:
        """The block. With *begin*, which comes before it, it may be somebody else's.

        That one's block cannot be left out: if it is not to begin, :class:`Unserved` is raised
        where it would have been, and whoever answers that closes the socket.
        """
        # If it is cancelled, by a server that ends or by a timeout around it: come again.
        code = SERVICE_RESTART
        raised: Exception | None = None
        has_begun = False
        try:
            await admitting
            async with self._reading(), self._tasks.running():
                self._watch()
                self._begin_to_read()
                self._tasks_run()
                if begin is not None:
                    await begin()
                # Whoever has been sent away meanwhile is not served for a moment first.
                await anyio.lowlevel.checkpoint_if_cancelled()
                has_begun = True
                yield
            code = self._gone or self._asked_to_close or self._tasks.code
        except Exception as error:  # noqa: BLE001 - raised again, if it was not expected
            code = INTERNAL_ERROR  # should even what follows fail
            code, raised = self._ended_by(error)
        finally:
            closes = (has_begun or begin is None) and not isinstance(raised, Refused)
            await self._finish(code, closes=closes)
        if raised is not None:
            raise raised
        if not has_begun:
            raise Unserved(code if self._gone is None else None, self._reason)

    def _ended_by(self, error: Exception) -> tuple[int, Exception | None]:
        """What to close the socket with because of *error*, and what is then to be raised."""
        is_early = self.websocket.application_state is WebSocketState.CONNECTING
        if all(self._is_end(each) for each in _leaves(error)):
            return self._note_end(error), None
        error = self._the_one(error)
        self.failed_with = error
        if isinstance(error, WebSocketException):
            self._part(error.reason, None)
            return (error.code if error.code in SENDABLE else INTERNAL_ERROR), None
        if isinstance(error, HTTPException) and is_early:
            self._log_refusal(error.status_code)
            return ABNORMAL, error  # whoever serves the application answers it
        problem = self._note(error, raised=not is_early, refuses=is_early)
        if is_early:
            refused = Refused(problem)
            refused.__cause__ = error
            return problem.ws_code, refused
        self._part(problem.code, problem.response().encode())
        raised = None if problem.error_id is None else error
        return self._asked_to_close or problem.ws_code, raised

    def _is_end(self, error: Exception) -> bool:
        """Whether *error* says no more than that this socket has ended, and not another one."""
        if isinstance(error, SocketClosed):
            return error.wire is self  # once it has been closed, sending to it fails as it should
        # StopAsyncIteration is that of anext(), which nobody has caught.
        return isinstance(error, WebSocketDisconnect | StopAsyncIteration) and self._is_gone

    def _note_end(self, error: Exception) -> int:
        """Note that the socket has ended, and by which code."""
        if self._asked_to_close is not None:
            return self._gone or self._asked_to_close
        if self._gone is None:
            found = next(_leaves(error))
            self._gone = found.code if isinstance(found, WebSocketDisconnect) else ABNORMAL
        return self._gone

    def _the_one(self, error: Exception) -> Exception:
        """What a group of exceptions comes down to, if that is one that has a meaning here.

        Where several tasks serve a socket, the end of the client may reach each of them.
        """
        if not isinstance(error, ExceptionGroup):
            return error
        others = [each for each in _leaves(error) if not self._is_end(each)]
        known = (PGChannelsError, WebSocketException, HTTPException)
        return others[0] if len(others) == 1 and isinstance(others[0], known) else error

    async def _finish(self, code: int, *, closes: bool) -> None:
        try:
            # Who is refused is told by whoever has asked for the socket.
            await self._take_leave(code, closes=closes)
        finally:
            self.close_code = code
            try:
                await self._left(code)
            finally:
                await self._let_go()

    # Errors that do not end it

    async def _guarded(self, doing: Awaitable[None]) -> Problem | None:
        """Tell the client of an error that is its own, and say what it was."""
        try:
            await doing
        except Exception as error:  # noqa: BLE001 - what is not for the client is raised again
            return await self._tell_or_raise(error)
        return None

    async def _tell_or_raise(self, error: Exception) -> Problem:
        self._tasks.forget_cancellation()
        error = self._the_one(error)
        problem = describe(error)
        # Before it is accepted, there is a better answer than a socket that is then closed.
        is_early = self.websocket.application_state is WebSocketState.CONNECTING
        if problem.disconnects or (is_early and isinstance(error, SocketError)):
            raise error
        await self.tell(error)
        return problem

    async def tell(self, error: Exception) -> None:
        """Tell the client of an error, as if it had been raised, and go on.

        Of one that nobody expected, the client gets the id under which the log has it.
        """
        await self._send_error(self._note(error))


def _leaves(error: Exception) -> Iterator[Exception]:
    if isinstance(error, ExceptionGroup):
        for each in error.exceptions:
            yield from _leaves(each)
    else:
        yield error
