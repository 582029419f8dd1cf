"""What ``layer.follow()`` gives: a durable, named reader."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from pgchannels.messages import Message, Position

__all__ = ["Batch", "Follower"]


class Batch(Sequence[Message]):
    """Messages to be worked on, in order, and then acknowledged."""

    @property
    @abstractmethod
    def position(self) -> Position:
        """The last message's."""

    @abstractmethod
    async def ack(self, transaction: Any = None) -> None:
        """Save that everything up to the end of this batch is done.

        That includes earlier batches which were not acknowledged. Without a transaction it waits
        while the database is away, and for a batch that has been covered it does nothing.

        One after the other: while a transaction is open in which one batch was acknowledged, the
        next can be acknowledged only in the same.

        With one, the same batch can be acknowledged again in a new transaction after a rollback,
        or if it is not known what became of a commit: if it has succeeded, FollowerLost says so.
        To go on with the next batch instead, after a rollback, is safe too: its ``ack`` raises
        FollowerLost, or what was rolled back comes again before. A batch whose effects failed
        before its ``ack`` does *not* come again to a loop that goes on: do it again, or leave.

        Args:
            transaction: an asyncpg connection, or a SQLAlchemy ``AsyncSession``,
                ``AsyncConnection``, ``Session`` or ``Connection``, in the transaction of the
                effects: position and effects commit together, and each message takes effect exactly
                once. The synchronous ones block the event loop. From here to the end of the
                transaction nobody else can take over, so let the ack come last. None: in a
                transaction of its own, at once; a crash before it repeats the batch.

        Raises:
            FollowerLost: another reader has taken over, or the position is not where this one has
                left it. Roll the transaction back. The iteration can go on, from the saved
                position; batches that were handed out before are void.
            ConfigurationError: *transaction* is no such thing, or commits each statement by itself.
            ChannelLayerClosed: the layer was closed, and there is no transaction.
        """


class Follower(ABC):
    """A durable reader of some channels: an async context manager and iterator of batches.

    ::

        async with layer.follow("orders", name="billing") as batches:
            async for batch in batches:
                async with session.begin():
                    for message in batch:
                        ...
                    await batch.ack(session)

    Of all readers with one name, in any process, one is active; the others wait. Its lease is
    renewed in the background for as long as it is entered, and when it is gone, the next one goes
    on from the saved position. What was not acknowledged is read again. While the database is away
    it waits. Iteration ends when the layer is closed.

    Readers with one name should read the same channels. One that is added later is read from the
    saved position on.
    """

    truncated: bool = False
    """Retention may have removed messages that were still to come. Stays true until set to false.
    The batch that comes after it is known may be empty."""

    @abstractmethod
    async def __aenter__(self) -> Self:
        """Begin. A name that is new has its position from now on.

        Raises:
            UnknownPosition: the name is new, and ``after`` a position that this log never reached.
            DatabaseUnavailable: it cannot be known whether the name is new.
            ChannelLayerClosed: the layer is not open.
        """

    @abstractmethod
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

    def __aiter__(self) -> Self:
        return self

    @abstractmethod
    async def __anext__(self) -> Batch:
        """Wait for messages, and while another reader is active for the name.

        Raises:
            UnknownPosition: the saved position is of another log; ``forget_follower()`` ends it.
        """
