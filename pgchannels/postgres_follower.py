"""Durable readers on PostgreSQL: a lease says who reads, a guarded update that nobody reads twice.

A row of ``followers`` holds a name's *position* and its *holder*, who has taken it over last. The
lease, a row of ``leases``, only sees to it that one works and the others wait. It may fail: a
process can be paused for longer than its lease. What must not fail is the move of the position,
and for that nobody looks at a clock. An ack is one update, in the transaction of the effects::

    position := end of the batch    where holder = me and position = where I left it

Why each message takes effect once and only once, if all effects are in such transactions:

- Who takes over makes itself the holder and reads the position by one statement, which has the
  row's lock. So it reads from a position that no open transaction is about to move, and from then
  on no earlier holder's update finds the row any more. Nor does an earlier one of its own: it takes
  the position anew, too, when it begins anew.
- Updates are serialised by the row's lock, which is held until the effects commit or roll back. One
  that has waited for it looks again, at what the other has left. One that finds the position
  elsewhere already in its snapshot does not even wait, and fails.
- "Where I left it" is what the previous ack has moved it to, whether its transaction has committed
  or not; that cannot be known here. If it was rolled back, the position is not there, the ack of
  the *next* batch fails, and reading begins anew with the batch that was rolled back. Nothing is
  skipped.
- The ack of the *same* batch in a new transaction claims that the previous one was rolled back, and
  demands the position before it. If that one has committed after all (the answer to COMMIT was
  lost), this one fails, and its effects are rolled back.

So the committed moves are a chain without gaps, each link committed with the effects of the
messages between its ends. Renewing the lease does not touch the row: an open transaction does not
hold it up, and no transaction of a higher isolation level fails because of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, overload
from uuid import uuid4

from pgchannels.backoff import Backoff
from pgchannels.channels import check_channel
from pgchannels.errors import (
    ChannelLayerClosed,
    DatabaseError,
    DatabaseUnavailable,
    FollowerLost,
    UnknownPosition,
)
from pgchannels.follower import Batch, Follower
from pgchannels.messages import Message, Position
from pgchannels.records import FollowerStatus, Move, Moved
from pgchannels.waiting import set_within

if TYPE_CHECKING:
    from pgchannels.settings import Settings
    from pgchannels.store import Queries
    from pgchannels.stream import Stream

__all__ = ["MAX_LAG", "PostgresFollower", "Progress", "follower_statuses", "forget_follower"]

logger = logging.getLogger("pgchannels.follower")

MAX_LAG = 100_000
"""Up to here a follower's lag is counted."""

_LEASE = "follower:"
# Seconds that it may take to let go of a lease.
_RELEASE_TIME = 2.0


async def follower_statuses(queries: Queries) -> list[FollowerStatus]:
    """All durable readers, by name."""
    return [
        FollowerStatus(
            name=row["name"],
            channels=tuple(row["channels"]),
            position=Position(row["epoch"], row["position"]),
            lag=row["lag"],
            active=row["is_active"],
            moved_at=row["moved_at"],
        )
        for row in await queries.fetch("followers", MAX_LAG)
    ]


async def forget_follower(queries: Queries, name: str) -> bool:
    """Remove a durable reader's position; False if there was none."""
    (row,) = await queries.fetch("forget_follower", check_channel(name))
    return bool(row["count"])


class Progress:
    """Where a follower has left its position, as far as it can know. Pure.

    The first id has been committed. The others were saved after it in the caller's transaction,
    which may have committed since, or have been rolled back.
    """

    def __init__(self, committed: int) -> None:
        self._saved = [committed]
        # Those that were saved and then rolled back, and have not been saved again.
        self._undone: set[int] = set()
        self.transaction: str | None = None
        """In which the ids after the first were saved."""

    @property
    def newest(self) -> int:
        return self._saved[-1]

    @property
    def is_committed(self) -> bool:
        """Whether nothing depends on a transaction of the caller's."""
        return len(self._saved) == 1

    def before(self, id: int) -> int | None:
        """Where the position must be to be moved to *id*; None if it has been there, for sure."""
        before = max((saved for saved in self._saved if saved < id), default=None)
        if before is None:
            return None
        # What is undone must be done again first. The position is not there, so nothing is skipped.
        return max([before, *(undone for undone in self._undone if undone < id)])

    def covering(self, id: int) -> list[int]:
        """Where else the position may be if *id* has been acknowledged."""
        return [saved for saved in self._saved if saved > id]

    def commit(self, id: int) -> None:
        """The position is at *id*, and that has been committed."""
        self._saved, self.transaction = [id], None
        self._done_again(id)

    def move(self, before: int, moved: Moved) -> None:
        """The position was moved from *before*, in a transaction that is still open."""
        if moved.transaction == self.transaction:
            kept = [saved for saved in self._saved if saved < moved.position]
        else:
            kept = [before]  # seen from another transaction, so it has been committed
            self._undone.update(self._saved)
        self._saved, self.transaction = [*kept, moved.position], moved.transaction
        self._done_again(moved.position)

    def _done_again(self, position: int) -> None:
        self._undone = {undone for undone in self._undone if undone > position}


class _Term:
    """From one takeover to the next: what was read, handed out and saved in between."""

    def __init__(self, position: int, epoch: int) -> None:
        self.epoch = epoch
        self.progress = Progress(position)
        self.lost = False
        """It can save nothing any more."""
        self.ended = False
        """It reads no more."""
        self.stream: Stream | None = None
        self.waiting: list[Message] = []
        """Read, and not handed out yet."""
        self.has_news = False
        """Something is to be handed out, if only that messages are missing."""
        self.handed_out = position
        self.saving = asyncio.Lock()
        """One at a time of the acks in a transaction of their own."""
        self.advancing = asyncio.Lock()
        """While the position moves without an ack; acks wait. It never waits for anybody."""

    @property
    def position(self) -> Position:
        return Position(self.epoch, self.handed_out)

    @property
    def is_idle(self) -> bool:
        """Whether all that was read has been handed out and acknowledged, for all we know."""
        return not self.waiting and self.handed_out <= self.progress.newest

    def end(self) -> None:
        self.ended = True
        if self.stream is not None:
            self.stream.close()

    def hand_out(self) -> list[Message]:
        messages, self.waiting, self.has_news = self.waiting, [], False
        if messages:
            self.handed_out = messages[-1].id
        return messages


class PostgresBatch(Batch):
    """See :class:`~pgchannels.follower.Batch`."""

    def __init__(self, follower: PostgresFollower, term: _Term, messages: list[Message]) -> None:
        self._follower = follower
        self._term = term
        self._messages = messages
        self._position = term.position

    @property
    def position(self) -> Position:
        return self._position

    async def ack(self, transaction: Any = None) -> None:
        # An empty one has no effects that could be lost with their transaction.
        if self._messages or self._position.id > self._term.progress.newest:
            await self._follower.ack(self._term, self._position.id, transaction)

    def __len__(self) -> int:
        return len(self._messages)

    @overload
    def __getitem__(self, index: int) -> Message: ...
    @overload
    def __getitem__(self, index: slice) -> list[Message]: ...
    def __getitem__(self, index: int | slice) -> Message | list[Message]:
        return self._messages[index]

    def __repr__(self) -> str:
        return f"<Batch of {len(self)} up to {self._position}>"


class PostgresFollower(Follower):
    """See :class:`~pgchannels.follower.Follower`.

    Args:
        channels: what to read.
        name: of the durable reader.
        after: where it begins if the name is new.
        store: where positions and leases are.
        make_stream: reads the channels after a position.
        settings: how long the lease lasts, and how often it is renewed or asked for.
        followers: those that are entered; whoever closes the layer closes them first.

    Raises:
        InvalidChannel, InvalidPosition: for bad arguments.
        ValueError: without channels.
    """

    def __init__(
        self,
        *,
        channels: tuple[str, ...],
        name: str,
        after: Position | str | None,
        store: Queries,
        make_stream: Callable[[Position], Stream],
        settings: Settings,
        followers: set[PostgresFollower],
    ) -> None:
        if not channels:
            raise ValueError("a follower needs one channel at least")
        self._channels = [*dict.fromkeys(check_channel(channel) for channel in channels)]
        self._name = check_channel(name)
        self._after = None if after is None else Position.parse(after)
        self._store = store
        self._make_stream = make_stream
        self._settings = settings
        self._followers = followers
        self._holder = uuid4()
        self._task: asyncio.Task[None] | None = None
        self._term: _Term | None = None
        # By the loop's clock; the lease was asked for before, so it ends later than that.
        self._active_until = 0.0
        self._error: UnknownPosition | None = None
        # A saved position that could not be read from.
        self._refused: Position | None = None
        self._asked = asyncio.Event()
        self._changed = asyncio.Event()
        self._iterating = False
        self._entered = False
        self._closed = False

    async def __aenter__(self) -> Self:
        if self._entered:
            raise RuntimeError("a follower can be entered once")
        # Here and not in the task: whatever is sent once this has been entered is to be read.
        await self._add()
        self._entered = True
        self._followers.add(self)
        self._task = asyncio.create_task(self._keep_lease(), name=f"pgchannels {self._name}")
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the iteration and let the next one take over at once. Again: does nothing.

        A batch that was handed out can still be acknowledged until somebody has taken over.
        """
        self._closed = True
        self._followers.discard(self)
        task, self._task = self._task, None
        if self._term is not None:
            self._term.end()
        self._changed.set()
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await self._release()

    async def __anext__(self) -> Batch:
        if not self._entered:
            raise RuntimeError("enter the follower first: async with layer.follow(…) as batches")
        if self._iterating:
            raise RuntimeError("another task iterates already")
        self._iterating = True
        try:
            while True:
                term = await self._until_active()
                if not term.has_news:
                    await self._read(term)
                # Reading has taken its time; somebody else may have taken over.
                if term.has_news and self._is_active(term):
                    return PostgresBatch(self, term, term.hand_out())
        finally:
            self._iterating = False

    async def _until_active(self) -> _Term:
        while True:
            if self._closed:
                raise StopAsyncIteration
            term = self._term
            if term is not None and self._is_active(term):
                return term
            if self._error is not None:
                raise self._error
            self._changed.clear()
            if term is not None:
                self._asked.set()  # the lease may have run out: not a moment to wait
            await self._changed.wait()

    def _is_active(self, term: _Term) -> bool:
        return (
            not term.lost
            and not self._closed
            and asyncio.get_running_loop().time() < self._active_until
        )

    async def _read(self, term: _Term) -> None:
        """Wait for messages, and keep them in *term*; return without if it has ended."""
        try:
            stream = term.stream or await self._open_stream(term)
            messages = await stream.batch()
        except ChannelLayerClosed:
            if term.lost:
                return
            raise StopAsyncIteration from None
        except UnknownPosition:
            # The log has been rewritten while we read. The saved position went back with it, and is
            # good in the new epoch: begin again there. One that is refused twice is another log's.
            position = Position(term.epoch, term.progress.newest)
            is_refused = term.stream is None and position == self._refused
            self._refused = position if term.stream is None else None
            self._lose(term)
            if is_refused:
                raise
            return
        except DatabaseUnavailable as error:
            logger.info("follower %s cannot read yet: %s", self._name, error)
            # Somebody else asks the database all the time, and then there is a change.
            await self._changed_within(self._settings.poll_interval)
            return
        # Nothing is awaited between the stream's letting go of them and this.
        term.waiting += (message for message in messages if not message.ephemeral)
        if stream.truncated:
            stream.truncated = False
            self.truncated = term.has_news = True
        term.has_news = term.has_news or bool(term.waiting)

    async def _open_stream(self, term: _Term) -> Stream:
        stream = self._make_stream(Position(term.epoch, term.progress.newest))
        await stream.__aenter__()
        # Not before: one that is not open yet has nothing to read either, and would count as read.
        term.stream = stream
        if term.ended:
            stream.close()
        return stream

    async def ack(self, term: _Term, id: int, transaction: Any) -> None:
        """For a batch: everything up to *id* is done."""
        async with term.advancing:
            pass  # while the position moves, it is neither here nor there
        if transaction is None:
            await self._save(term, id)
        else:
            await self._save_in(transaction, term, id)

    async def _save_in(self, transaction: Any, term: _Term, id: int) -> None:
        progress = term.progress
        while not term.lost and (before := progress.before(id)) is not None:
            move = Move(self._name, self._holder, term.epoch, [before], id, progress.transaction)
            # Here, for it brings SQLAlchemy with it, which not everybody needs.
            from pgchannels.transactions import move_in_transaction

            moved = await move_in_transaction(transaction, self._settings.schema_name, move)
            if moved is not None:
                progress.move(before, moved)
                return
            if progress.before(id) == before:
                break  # not because of another ack that has come first
        self._lose(term)
        raise FollowerLost(self._name)

    async def _save(self, term: _Term, id: int) -> None:
        progress = term.progress
        async with term.saving:
            backoff = Backoff()
            while not term.lost:
                if (before := progress.before(id)) is None:
                    return
                # One whose answer was lost may have succeeded, and what the caller has acknowledged
                # in a transaction may have covered it. Either is as good.
                allowed = [before, id, *progress.covering(id)]
                move = Move(self._name, self._holder, term.epoch, allowed, id)
                try:
                    rows = await self._store.fetch("save_follower", *move)
                except DatabaseUnavailable as error:
                    delay = backoff.next()
                    logger.info(
                        "follower %s cannot ack, retry in %.1f s: %s", self._name, delay, error
                    )
                    await asyncio.sleep(delay)
                    continue
                except asyncio.CancelledError:
                    self._lose(term)  # nobody knows where the position is
                    raise
                if rows:
                    progress.commit(rows[0]["position"])
                    return
                if progress.before(id) == before:
                    break
        self._lose(term)
        raise FollowerLost(self._name)

    # The lease

    async def _keep_lease(self) -> None:
        settings = self._settings
        backoff = Backoff(cap=settings.heartbeat_interval)
        while True:
            try:
                await self._renew()
                backoff.reset()
            except ChannelLayerClosed:
                self._closed = True
                self._changed.set()
                return
            except UnknownPosition as error:
                self._error = error
                self._changed.set()
                await asyncio.sleep(settings.poll_interval)
            except DatabaseError as error:
                delay = backoff.next()
                logger.log(
                    error.level,
                    "follower %s cannot ask for its lease, retry in %.1f s: %s",
                    self._name,
                    delay,
                    error,
                )
                await asyncio.sleep(delay)
            except Exception:
                delay = backoff.next()
                logger.exception("follower %s failed, retry in %.1f s", self._name, delay)
                await asyncio.sleep(delay)
            else:
                interval = settings.poll_interval
                await self._asked_within(
                    interval if self._term is None else settings.heartbeat_interval
                )

    async def _add(self) -> None:
        """Give the name its position if it is new."""
        id, epoch = (None, None) if self._after is None else (self._after.id, self._after.epoch)
        (row,) = await self._store.fetch("add_follower", self._name, self._channels, id, epoch)
        if not row["is_known"]:
            assert self._after is not None
            raise UnknownPosition(self._after)

    async def _renew(self) -> None:
        """Take the lease or renew it; and while there is nothing to do, move the position along."""
        term = self._term
        asked_at = asyncio.get_running_loop().time()
        lease = timedelta(seconds=self._settings.lease_time)
        rows = await self._store.fetch(
            "take_follower", self._name, self._holder, lease, self._channels, term is None
        )
        if term is not self._term:
            self._asked.set()  # it was lost meanwhile, so the question was the wrong one
            return
        if not rows or rows[0]["position"] is None:
            if term is not None:
                self._lose(term)
            if rows:
                await self._add()
            return
        self._error = None
        self._active_until = asked_at + self._settings.lease_time
        if rows[0]["begins"]:
            if term is not None:
                self._lose(term)
            self._term = _Term(rows[0]["position"], rows[0]["epoch"])
            logger.info("follower %s reads after %d", self._name, rows[0]["position"])
        self._changed.set()
        if term is not None and term is self._term:
            await self._advance(term)

    async def _advance(self, term: _Term) -> None:
        """Move the position past what is not of these channels, if everything else is done.

        It also shows whether the transaction of the last ack was rolled back, and then who waits
        for the next batch gets that one again.
        """
        reached = None if term.stream is None else term.stream.caught_up
        if reached is None or not term.is_idle:
            return
        progress = term.progress
        before = progress.newest
        after = max(before, reached)
        if after == before and progress.is_committed:
            return
        async with term.advancing:
            try:
                rows = await self._store.fetch(
                    "advance_follower", self._name, self._holder, term.epoch, before, after
                )
            except DatabaseError:
                self._lose(term)  # nobody knows where the position is
                raise
        if not rows:
            return
        position = rows[0]["position"]
        if position in (before, after):
            progress.commit(position)
        elif self._iterating:
            self._lose(term)

    def _lose(self, term: _Term) -> None:
        """Begin anew, from the saved position, as soon as the lease is held."""
        term.lost = True
        term.end()
        if term is self._term:
            logger.info("follower %s begins anew from its saved position", self._name)
            self._term = None
            self._asked.set()
            self._changed.set()

    async def _release(self) -> None:
        try:
            async with asyncio.timeout(_RELEASE_TIME):
                await self._store.fetch("drop_lease", _LEASE + self._name, self._holder)
        except (DatabaseError, ChannelLayerClosed, TimeoutError) as error:
            logger.info("the lease of follower %s was left to run out: %s", self._name, error)

    async def _asked_within(self, seconds: float) -> None:
        await set_within(self._asked, seconds)
        self._asked.clear()

    async def _changed_within(self, seconds: float) -> None:
        self._changed.clear()
        await set_within(self._changed, seconds)
