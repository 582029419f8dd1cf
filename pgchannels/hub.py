"""One reader of the log for all subscribers of a node.

The hub's promise, on which :mod:`pgchannels.subscription` builds: every message with an id above
:attr:`Hub.cursor` will be offered, in order, to each subscriber that is registered for its channel
when the cursor passes it. Each is read and encoded once, however many get it, and none is ever
waited for.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from pgchannels.backoff import Backoff
from pgchannels.budget import Budget
from pgchannels.errors import ChannelLayerClosed, DatabaseError, DatabaseUnavailable
from pgchannels.messages import Position
from pgchannels.records import NOTHING_SEEN, Head, LogPage, Seen
from pgchannels.stream import offer_to
from pgchannels.waiting import set_within

if TYPE_CHECKING:
    from datetime import datetime

    from pgchannels.messages import Message
    from pgchannels.settings import Settings
    from pgchannels.store import Session, Store
    from pgchannels.stream import Subscriber

__all__ = ["Hub"]

logger = logging.getLogger("pgchannels.hub")

# Up to here the log is read by channel, one index probe each; above, as a whole.
_FEW_CHANNELS = 32
# Offers made before the event loop gets a turn: about two milliseconds. A socket that is woken for
# several messages sends them at a fraction of the cost of each by itself.
_OFFERS_AT_A_TIME = 5000
_NOBODY: dict[Subscriber, None] = {}
# Bytes that all who replay may hold, before pages get small; of such a page; and of each message
# beside its text.
_MAX_HELD = 128 * 1024 * 1024
_SMALL_PAGE = 64 * 1024
_MESSAGE_BYTES = 500
# Seconds to wait after a hint at messages that are not there.
_AFTER_FALSE_HINT = 0.05
_INSUFFICIENT_PRIVILEGE = "42501"


class Hub:
    """Reads what is new and hands it out. ``run()`` is its whole life; cancelling it ends it.

    Args:
        settings: how often to look without a hint, and how much at a time.
        session: reads the log, on a connection of its own.
        store: reads pages for subscribers that replay.
        on_rewritten: called with the position that was reached in a log which is no more, because
            a backup was restored, or a standby promoted that had not received all of it.
    """

    def __init__(
        self,
        settings: Settings,
        session: Session,
        store: Store,
        *,
        on_rewritten: Callable[[Position], None],
    ) -> None:
        self._on_rewritten = on_rewritten
        self._settings = settings
        self._session = session
        self._store = store
        self._index: dict[str, dict[Subscriber, None]] = {}
        self._grown = False
        self._look = asyncio.Event()
        self._replays: dict[tuple[tuple[str, ...], int], asyncio.Task[LogPage]] = {}
        self._budget = Budget(_MAX_HELD)
        self._listening = False
        # The highest id that was hinted at since the last look.
        self._hinted = 0
        self.cursor = 0
        self._epoch = 1
        # The newest batch at the last look. As long as the log has it, the log is the same.
        self._seen = NOTHING_SEEN
        self._closed = False

    async def open(self) -> None:
        """Begin at the end of the log. LISTEN may come later: ``connected()`` looks."""
        await self._begin_at_the_end()

    async def _begin_at_the_end(self) -> Head:
        head, mark = await self._session.head_after(NOTHING_SEEN)
        self.cursor, self._epoch, self._seen = head.id, head.epoch, _seen(head, mark)
        return head

    @property
    def position(self) -> Position:
        """The last message that has been offered."""
        return Position(self._epoch, self.cursor)

    def refuse(self) -> None:
        """Register nobody any more."""
        self._closed = True

    def check_open(self) -> None:
        """Raise :class:`ChannelLayerClosed` after ``refuse()``."""
        if self._closed:
            raise ChannelLayerClosed("the channel layer has been closed")

    async def close(self) -> None:
        """Wait for the reads that are under way; the store, closed before, has cut them short."""
        await asyncio.gather(*self._replays.values(), return_exceptions=True)
        await self._session.close()

    def register(self, channel: str, subscriber: Subscriber) -> None:
        """From now on, offer the channel's messages above :attr:`cursor` to *subscriber*.

        Raises:
            ChannelLayerClosed: after ``refuse()``.
        """
        self.check_open()
        subscribers = self._index.get(channel)
        if subscribers is None:
            subscribers = self._index[channel] = {}
            self._grown = True
        subscribers[subscriber] = None

    def unregister(self, channel: str, subscriber: Subscriber) -> None:
        subscribers = self._index.get(channel)
        if subscribers is not None:
            subscribers.pop(subscriber, None)
            if not subscribers:
                del self._index[channel]

    def hint(self, payload: str) -> None:
        """A notification came. Anyone can send one, so it is at most a reason to look."""
        if not (payload.isascii() and payload.isdecimal() and len(payload) <= 19):
            logger.debug("a notification that is no hint: %.40r", payload)
        else:
            self.reached(int(payload))

    def reached(self, head: int) -> None:
        """The log may have grown to *head*."""
        if head > self.cursor:
            self._hinted = max(self._hinted, head)
            self._look.set()

    def connected(self) -> None:
        """Hints come in from now on; those before now may have been lost, so look."""
        self._listening = True
        self.reached(self.cursor + 1)

    def disconnected(self) -> None:
        """No hint can be counted on."""
        self._listening = False
        # What has silenced the listener may have silenced this connection too, and a read would
        # wait for an answer far longer than the listener waits for a heartbeat.
        self._session.abort()
        self.reached(self.cursor + 1)  # from then on, at a shorter interval

    async def head(self) -> Head:
        """The end of the log now.

        Raises:
            DatabaseUnavailable: no connection; or the log may have been rewritten, and this has
                still to be found out.
        """
        seen = self._seen
        head, mark = await self._store.head_after(seen)
        self._check_same(seen, mark)
        self._saw(head, mark)
        return head

    async def position_before(self, time: datetime) -> Position:
        """How far the log had come before *time*."""
        (row,) = await self._store.fetch("position_before", time)
        return Position(*row)

    async def replay(self, channels: tuple[str, ...], after: int) -> LogPage:
        """Read a page for a subscriber. Those who ask for the same one share it.

        After the loss of a node its clients come back together, most with the same position.
        """
        task = self._replays.get((channels, after))
        if task is None:
            key = (channels, after)
            task = asyncio.create_task(self._replay(channels, after))
            self._replays[key] = task
            task.add_done_callback(lambda done: self._replay_done(key, done))
        # Shielded: one who gives up must not take the page from the others.
        return await asyncio.shield(task)

    async def _replay(self, channels: tuple[str, ...], after: int) -> LogPage:
        seen = self._seen
        size = _SMALL_PAGE if self._budget.is_used_up else None
        page = await self._store.read_channels(channels, after, size=size, seen=seen)
        self._check_same(seen, page.mark)
        if page.head.epoch != self._epoch:
            # Another node has found the log rewritten, and this one has still to end its streams.
            self._look_at_once()
        self._saw(page.head, page.mark)
        held = sum(message.size + _MESSAGE_BYTES for message in page.messages)
        return page._replace(held=self._budget.hold(held))

    def _check_same(self, seen: Seen, mark: int | None) -> None:
        """Nothing counts that was read where the batch is missing that was seen before."""
        if seen.id and mark is None:
            self._look_at_once()

    def _look_at_once(self) -> NoReturn:
        self.reached(self.cursor + 1)
        raise DatabaseUnavailable("the log may have been rewritten; this is being looked at")

    def _saw(self, head: Head, mark: int | None) -> None:
        """Remember the newest batch that any read of this node has seen: streams may be ahead."""
        if head.epoch == self._epoch and mark is not None and head.id >= self._seen.id:
            self._seen = Seen(head.id, mark)

    def _replay_done(self, key: tuple[tuple[str, ...], int], task: asyncio.Task[LogPage]) -> None:
        del self._replays[key]
        if not task.cancelled() and task.exception() is not None:
            # Those who wait get it; this marks it as seen where nobody does any more.
            logger.debug("a replay failed: %s", task.exception())

    async def run(self) -> None:
        """Look at every hint, and every poll interval without one."""
        backoff = Backoff()
        while True:
            interval = self._settings.poll_interval
            hinted = await self._hinted_within(interval if self._listening else interval / 10)
            if hinted is not None and hinted <= self.cursor:
                continue  # read already, along with what came before it
            try:
                await self._catch_up()
                backoff.reset()
            except DatabaseError as error:
                delay = backoff.next()
                logger.log(error.level, "cannot read the log, retry in %.1f s: %s", delay, error)
                await asyncio.sleep(delay)
                self.reached(self.cursor + 1)
            else:
                if hinted is not None and hinted > self.cursor:
                    # It promised more than there is. A flood of such must not become one of reads.
                    await asyncio.sleep(_AFTER_FALSE_HINT)

    async def _hinted_within(self, seconds: float) -> int | None:
        """The id that was hinted at, as soon as there is one; None if none came."""
        if not await set_within(self._look, seconds):
            return None
        self._look.clear()
        hinted, self._hinted = self._hinted, 0
        return hinted

    async def _catch_up(self) -> None:
        everything = False
        while True:
            self._grown = False
            channels = None if everything or len(self._index) > _FEW_CHANNELS else [*self._index]
            page = await self._read(channels)
            # A page of some channels is no answer for one that was registered while it was read.
            # Then nothing of it counts: read again, everything, which nobody can outrun.
            everything = channels is not None and self._grown
            if everything:
                continue
            if await self._is_rewritten(page):
                await self._begin_again()
                return
            if self._seen.id and page.mark is None:
                self._seen = NOTHING_SEEN  # thinned out or pruned: the same log nevertheless
                continue
            self._saw(page.head, page.mark)
            if page.head.floor > self.cursor:
                self._tell_missed(page.head.floor)
            everything = await self._hand_out(page, complete=channels is None)
            if not page.full and not everything:
                return

    def _tell_missed(self, floor: int) -> None:
        for subscriber in {s for each in self._index.values() for s in each}:
            try:
                subscriber.missed(floor)
            except Exception:  # there are others, and a node's reading must not end by one
                logger.exception("a subscriber failed at being told of what it has missed")

    async def _is_rewritten(self, page: LogPage) -> bool:
        """Whether the log is another one than the one that was read before."""
        if page.head.epoch != self._epoch or page.head.id < self.cursor:
            return True
        if not self._seen.id or page.mark is not None:
            return False
        (row,) = await self._session.fetch("was_thinned", *self._seen)
        return not row["is_same"]

    async def _begin_again(self) -> None:
        """Go on at the end of a log that has been rewritten, in an epoch that nobody has read in.

        What was read before has no position in it. The first node that finds this out begins the
        epoch; until then no stream ends, so that no client comes back with a position of the old
        one while that still counts.
        """
        reached = self.position
        try:
            await self._session.fetch("begin_epoch", self._epoch)
        except DatabaseError as error:
            if error.sqlstate != _INSUFFICIENT_PRIVILEGE:
                raise
            logger.warning("this role only reads, and a node must begin the new epoch: %s", error)
        head = await self._begin_at_the_end()
        logger.error("the log has been rewritten: it ends at %s, %s had been read", head, reached)
        self._on_rewritten(reached)

    async def _read(self, channels: list[str] | None) -> LogPage:
        if channels is None:
            return await self._session.read_log(self.cursor, seen=self._seen)
        if not channels:
            head, mark = await self._session.head_after(self._seen)
            return LogPage([], head, full=False, mark=mark)
        return await self._session.read_channels(channels, self.cursor, seen=self._seen)

    def offer(self, message: Message) -> int:
        """Offer a message to who reads its channel, or to those it was sent to; how many those are.

        For an ephemeral one, which is in no page, call this yourself.
        """
        subscribers = self._index.get(message.channel, _NOBODY)
        if not message.is_plain and (recipients := message.recipients) is not None:
            subscribers = {s: None for name in recipients for s in self._index.get(name, _NOBODY)}
        return offer_to(subscribers, message)

    async def _hand_out(self, page: LogPage, *, complete: bool) -> bool:
        """Offer a page's messages. True if it had to stop because the page lacks a channel."""
        offers = 0
        for message in page.messages:
            offers += self.offer(message)
            self.cursor = message.id
            if offers >= _OFFERS_AT_A_TIME:
                offers = 0
                await asyncio.sleep(0)
                if self._grown and not complete:
                    return True
        self.cursor = max(self.cursor, page.upto)
        return False


def _seen(head: Head, mark: int | None) -> Seen:
    return NOTHING_SEEN if mark is None else Seen(head.id, mark)
