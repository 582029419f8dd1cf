"""What stands between a socket and whoever serves it, and how it is chained."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, TypeAlias

from pgchannels.errors import ConfigurationError
from pgchannels.messages import Message
from pgchannels.web.incoming import Frame

if TYPE_CHECKING:
    from pgchannels.web.connection import Connection

__all__ = ["Chain", "Middleware", "inbound", "outbound"]

Inbound: TypeAlias = "Callable[[Connection, Frame], Awaitable[Frame | None]]"
Outbound: TypeAlias = "Callable[[Connection, Message], Awaitable[Message | None]]"

_NOTHING = nullcontext()


class Middleware:
    """Sees what a client sends, and the messages that go to it. Override what you need.

    One object serves all connections at once. What it keeps of one it keeps by ``connection.id``,
    and drops in :meth:`closed`. A connection's frames come one after the other, and so do its
    messages; frames and messages come independently of each other.

    ``first >> second >> third`` makes a :class:`Chain` of several.
    """

    async def inbound(self, connection: Connection, frame: Frame) -> Frame | None:
        """The client has sent *frame*. Return it, or another one in its place, or None to drop it.

        Raises:
            SocketError: to refuse it. The client is told; the socket is closed if the error says
                so. By any other exception it is closed with 1011.
        """
        return frame

    async def outbound(self, connection: Connection, message: Message) -> Message | None:
        """*message* is about to go to the client. Return it, or another one, or None to drop it.

        Changing its data changes nothing for others, nor what the client gets. Be quick, because
        the messages after it wait. The client has asked for nothing here, and so there is nothing
        to refuse: an exception closes the socket.
        """
        return message

    def delivering(
        self, connection: Connection, message: Message
    ) -> AbstractContextManager[object]:
        """Around what becomes of *message*: a consumer's method handles it, or it is forwarded.

        It has passed :meth:`outbound` by then. The block is left when that is done, by the
        exception if it fails; an exception of this method's own closes the socket with 1011.
        """
        return _NOTHING

    def closed(self, connection: Connection) -> None:
        """The socket is gone; nothing of this connection comes after it. It must not raise.

        Called once, also for a socket that was refused.
        """

    @property
    def is_immediate(self) -> bool:
        """Whether :meth:`inbound` is known to wait for nothing, which costs less."""
        return not overrides(self.inbound, Middleware.inbound)

    def __rshift__(self, other: Middleware) -> Chain:
        given: object = other
        return Chain(self, other) if isinstance(given, Middleware) else NotImplemented


class Chain(Middleware):
    """Several, one after the other.

    What a client sends passes them from left to right, what goes to it from right to left: the
    leftmost is next to the socket. Whatever one of them drops or refuses, those behind it do not
    get to see.

    A chain does not change: ``>>`` makes another one, and ``(a >> b) >> c`` equals ``a >> (b >>
    c)``. Without links it passes everything on.
    """

    def __init__(self, *links: Middleware) -> None:
        self._links = tuple(
            part for link in links for part in (link.links if isinstance(link, Chain) else (link,))
        )
        # Nobody waits for methods that do nothing, which outbound are most.
        self._inbound = tuple(
            link.inbound for link in self._links if overrides(link.inbound, Middleware.inbound)
        )
        self._is_immediate = all(link.is_immediate for link in self._links)
        self._outbound = tuple(
            link.outbound
            for link in reversed(self._links)
            if overrides(link.outbound, Middleware.outbound)
        )
        self._delivering = tuple(
            link.delivering
            for link in self._links
            if overrides(link.delivering, Middleware.delivering)
        )

    @property
    def links(self) -> tuple[Middleware, ...]:
        """What it is made of, from left to right; no chains among them."""
        return self._links

    @property
    def is_immediate(self) -> bool:
        return self._is_immediate

    @property
    def sees_outbound(self) -> bool:
        """Whether any of them looks at messages. If not, they need not be handed to it."""
        return bool(self._outbound or self._delivering)

    async def inbound(self, connection: Connection, frame: Frame) -> Frame | None:
        for link in self._inbound:
            passed = await link(connection, frame)
            if passed is None:
                return None
            frame = passed
        return frame

    async def outbound(self, connection: Connection, message: Message) -> Message | None:
        for link in self._outbound:
            passed = await link(connection, message)
            if passed is None:
                return None
            message = passed
        return message

    def delivering(
        self, connection: Connection, message: Message
    ) -> AbstractContextManager[object]:
        return self._all_around(connection, message) if self._delivering else _NOTHING

    @contextmanager
    def _all_around(self, connection: Connection, message: Message) -> Iterator[None]:
        with ExitStack() as stack:
            for link in self._delivering:
                stack.enter_context(link(connection, message))
            yield

    def closed(self, connection: Connection) -> None:
        # All of them, from right to left, even if one fails.
        with ExitStack() as stack:
            for link in self._links:
                stack.callback(link.closed, connection)

    def __eq__(self, other: object) -> bool:
        return self.links == other.links if isinstance(other, Chain) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.links)

    def __repr__(self) -> str:
        return f"<Chain {' >> '.join(map(repr, self.links))}>"


def inbound(function: Inbound) -> Middleware:
    """Make a middleware of a function that gets what clients send::

        @inbound
        async def no_shouting(connection: Connection, frame: Frame) -> Frame | None:
            return None if str(frame.raw).isupper() else frame

    Raises:
        ConfigurationError: not an ``async`` function.
    """
    return _Inbound(function)


def outbound(function: Outbound) -> Middleware:
    """Make a middleware of a function that gets the messages for clients. See :func:`inbound`."""
    return _Outbound(function)


class _Lifted(Middleware):
    def __init__(self, function: Inbound | Outbound) -> None:
        if not iscoroutinefunction(function):
            raise ConfigurationError(f"a middleware is an async function, not {function!r}")
        self.function = function

    def __repr__(self) -> str:
        return getattr(self.function, "__qualname__", repr(self.function))


class _Inbound(_Lifted):
    def __init__(self, function: Inbound) -> None:
        super().__init__(function)
        self._inbound = function

    async def inbound(self, connection: Connection, frame: Frame) -> Frame | None:
        return await self._inbound(connection, frame)


class _Outbound(_Lifted):
    def __init__(self, function: Outbound) -> None:
        super().__init__(function)
        self._outbound = function

    async def outbound(self, connection: Connection, message: Message) -> Message | None:
        return await self._outbound(connection, message)


def types_of(types: Collection[str]) -> frozenset[str]:
    """Types of messages, as an option names them.

    Raises:
        ConfigurationError: it is one str, which is a collection of letters.
    """
    if isinstance(types, str):
        raise ConfigurationError(f"types come in a tuple or a set, not as {types!r}")
    return frozenset(types)


def overrides(method: object, original: object) -> bool:
    return getattr(method, "__func__", None) is not original
