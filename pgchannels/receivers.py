"""Who waits to receive, and what has been claimed for them.

However many wait in this process, for however many channels, one task claims for all of them: up
to as many messages as there are waiting, in one statement for many channels. So waiting costs no
connection, and no message is taken that nobody has asked for. What a receiver that was cancelled
can no longer take goes to the next one here, or back.

A claim or a handing back that fails with the connection may have been done all the same. Each has a
number, and is repeated with that number until it is answered; the database does it once. A claim
is repeated for half as many channels, so that a channel whose claims fail does not stop the others.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple, TypeVar
from uuid import uuid4

from pgchannels.backoff import Backoff
from pgchannels.channels import DIRECT, is_connection
from pgchannels.errors import (
    ChannelLayerClosed,
    DatabaseError,
    DatabaseUnavailable,
    InvalidChannel,
)
from pgchannels.messages import Message
from pgchannels.waiting import set_within

if TYPE_CHECKING:
    from pgchannels.settings import Settings
    from pgchannels.store import Claim, Claims, Session
    from pgchannels.stream import Source

__all__ = ["Receivers"]

logger = logging.getLogger("pgchannels.receivers")

T = TypeVar("T")

# Channels that one statement claims for, and messages that it takes for each.
_CHANNELS_AT_A_TIME = 500
_MESSAGES_AT_A_TIME = 100
# Where many messages of a channel are for others, a claim looks at more and more of them.
_FEWEST_LOOKED_AT = 16
_MOST_LOOKED_AT = 1000
_MOST_LOOKED_AT_TOGETHER = 20_000
# Claims by one row of the database, before another one takes its place.
_CLAIMS_BY_ROW = 200
# Seconds that close() leaves for handing back.
_CLOSING_TIME = 5.0
# Seconds for which a channel is remembered that nobody receives from any more.
_IDLE_TIME = 30.0
# Seconds that a receiver which takes what is there now waits for the answer to that question.
_PATIENCE = 2.0
# A membership in use is renewed so many times within its expiry, or every minute.
_RENEWALS = 4


class _Waiter:
    """One call of ``receive()``."""

    def __init__(self, *, impatient: bool) -> None:
        self.future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self.impatient = impatient  # it takes what is there now, or nothing

    def time_out(self) -> None:
        if not self.future.done():
            self.future.set_exception(TimeoutError("no message came in time"))


class _Inbox:
    """A channel that is received from here. Registered with the hub, as a reason to look."""

    def __init__(self, name: str, ask: Callable[[_Inbox], None]) -> None:
        self.name = name
        self.waiters: OrderedDict[_Waiter, None] = OrderedDict()
        self.watched: set[str] = set()
        self.idle_since = 0.0
        # A claim for this channel only has timed out. Until one succeeds, no other channel is asked
        # for together with it, and not at once.
        self.alone = False
        self.delay = Backoff(base=1.0, cap=30.0)
        self._looking = 0
        self._ask = ask

    def offer(self, message: Message) -> None:
        if not message.ephemeral and message.is_for(self.name):
            self.look()

    def missed(self, floor: int) -> None:
        self.look()

    def look(self) -> None:
        if self.waiters:
            self._ask(self)

    def wanted(self) -> tuple[int, int]:
        """How many messages to take, and at how many to look for that."""
        count = min(len(self.waiters), _MESSAGES_AT_A_TIME)
        return count, max(count, self._looking)

    def looked(self, *, at_too_few: bool) -> None:
        """Look at more messages the next time, or at fewer."""
        if at_too_few:
            self._looking = min(max(4 * self._looking, _FEWEST_LOOKED_AT), _MOST_LOOKED_AT)
        else:
            self._looking //= 2

    def next_waiter(self) -> _Waiter | None:
        """Take the one that has waited longest."""
        self.idle_since = asyncio.get_running_loop().time()
        while self.waiters:
            waiter, _ = self.waiters.popitem(last=False)
            if not waiter.future.done():
                return waiter
        return None


class _Asked(NamedTuple):
    """What one claim asks for, by channel."""

    wanted: dict[str, tuple[int, int]]
    waiters: dict[str, list[_Waiter]]


def _timed_out(error: DatabaseUnavailable) -> bool:
    return isinstance(error.__cause__, TimeoutError) or error.sqlstate == "57014"


class Receivers:
    """``run()`` serves all that wait in this process, until ``close()``.

    Args:
        settings: how long memberships last that are not used.
        session: claims, on a connection of its own.
        source: tells when there is something to claim.
        wake: something was published; sequence it.
    """

    def __init__(
        self, settings: Settings, session: Session, source: Source, wake: Callable[[], None]
    ) -> None:
        self._settings = settings
        self._session = session
        self._source = source
        self._wake_sequencer = wake
        self._id = uuid4()
        self._token = 0
        self._claims = 0
        self._inboxes: dict[str, _Inbox] = {}
        self._due: dict[str, None] = {}
        self._returning: list[tuple[str, Message]] = []
        self._wakeup = asyncio.Event()
        self._closed = False
        self._finished = asyncio.Event()
        self._finished.set()
        self._swept_at = asyncio.get_running_loop().time()
        self._at_a_time = _CHANNELS_AT_A_TIME
        self._refused = Backoff(base=0.1, cap=5.0)

    async def receive(self, channel: str, timeout: float | None) -> Message:
        """See :meth:`pgchannels.layer.ChannelLayer.receive`."""
        if self._closed:
            raise ChannelLayerClosed
        waiter = _Waiter(impatient=timeout is not None and timeout <= 0)
        if waiter.impatient:
            timeout = _PATIENCE
        inbox = self._inbox(channel)
        inbox.waiters[waiter] = None
        if not self._give_returned(inbox):
            self._ask_for(inbox)
        timer = (
            asyncio.get_running_loop().call_later(timeout, waiter.time_out)
            if timeout is not None
            else None
        )
        try:
            return await waiter.future
        except asyncio.CancelledError:
            # It may have been given a message in the very moment in which it was cancelled.
            future = waiter.future
            if future.done() and not future.cancelled() and future.exception() is None:
                self._pass_on(inbox, future.result())
            raise
        finally:
            if timer is not None:
                timer.cancel()
            inbox.waiters.pop(waiter, None)
            inbox.idle_since = asyncio.get_running_loop().time()

    def look(self, channels: Iterable[str] | None = None) -> None:
        """Something about these channels has changed, their groups say; or about any."""
        for name in self._inboxes if channels is None else channels:
            if (inbox := self._inboxes.get(name)) is not None:
                inbox.look()

    def end(self, channel: str) -> None:
        """The channel has been deleted: its waiting receivers get :class:`InvalidChannel`."""
        inbox = self._inboxes.get(channel)
        while inbox is not None and (waiter := inbox.next_waiter()) is not None:
            waiter.future.set_exception(InvalidChannel(channel, "it has been deleted"))

    async def run(self) -> None:
        self._finished.clear()
        while not self._closed:
            await set_within(self._wakeup, self._housekeeping_interval)
            self._wakeup.clear()
            while self._due or self._returning:
                await self._hand_back()
                await self._claim()
                await self._housekeeping()
            await self._housekeeping()
        await self._hand_back()
        self._finished.set()
        await asyncio.Event().wait()  # until cancelled

    def refuse(self) -> None:
        """End all waiting."""
        self._closed = True
        for inbox in self._inboxes.values():
            while (waiter := inbox.next_waiter()) is not None:
                waiter.future.set_exception(ChannelLayerClosed("the channel layer has been closed"))
        self._wakeup.set()

    async def close(self) -> None:
        """End all waiting, and hand back what nobody has taken, within a few seconds."""
        self.refuse()
        if not await set_within(self._finished, _CLOSING_TIME) and self._returning:
            logger.error("%d messages could not be handed back", len(self._returning))

    async def disconnect(self) -> None:
        """Close the connection. ``run()`` must have ended."""
        await self._session.close()

    def _inbox(self, channel: str) -> _Inbox:
        inbox = self._inboxes.get(channel)
        if inbox is None:
            inbox = self._inboxes[channel] = _Inbox(channel, self._ask_for)
            self._watch(inbox, {channel, DIRECT})
        return inbox

    def _watch(self, inbox: _Inbox, channels: set[str]) -> bool:
        """Be told of messages of these channels; say whether one is new."""
        if self._closed:
            return False
        new = channels - inbox.watched
        for channel in new:
            self._source.register(channel, inbox)
        for channel in inbox.watched - channels:
            self._source.unregister(channel, inbox)
        inbox.watched = channels
        return bool(new)

    def _ask_for(self, inbox: _Inbox) -> None:
        self._due[inbox.name] = None
        self._wakeup.set()

    def _pass_on(self, inbox: _Inbox, message: Message) -> None:
        waiter = inbox.next_waiter()
        if waiter is not None:
            waiter.future.set_result(message)
        else:
            self._returning.append((inbox.name, message))
            self._wakeup.set()

    def _give_returned(self, inbox: _Inbox) -> bool:
        """Give a receiver what another one here could not take, before it has been handed back."""
        for place, (name, message) in enumerate(self._returning):
            if name == inbox.name and (waiter := inbox.next_waiter()) is not None:
                del self._returning[place]
                waiter.future.set_result(message)
                return True
        return False

    def _next_asked(self) -> _Asked:
        """Take the channels whose turn it is, as many as one claim is for now."""
        asked = _Asked({}, {})
        for name in list(islice(self._due, self._at_a_time)):
            inbox = self._inboxes.get(name)
            alone = inbox is not None and inbox.alone
            if alone and asked.wanted:
                break
            del self._due[name]
            if inbox is not None and inbox.waiters:
                asked.wanted[name] = inbox.wanted()
                asked.waiters[name] = list(inbox.waiters)
                if alone:
                    break
        share = _MOST_LOOKED_AT_TOGETHER // max(1, len(asked.wanted))
        for name, (count, looking) in asked.wanted.items():
            asked.wanted[name] = count, max(count, min(looking, share))
        return asked

    async def _claim(self) -> None:
        asked = self._next_asked()
        if not asked.wanted:
            return
        self._token += 1
        backoff = Backoff()
        answered = True
        answer: Claims | None = None
        while answer is None:
            try:
                answer = await self._session.claim(
                    asked.wanted, claimant=self._id, token=self._token
                )
                break
            except DatabaseUnavailable as error:
                delay = backoff.next()
                logger.log(error.level, "cannot claim, retry in %.1f s: %s", delay, error)
                answered = False
                self._put_off(asked, len(asked.wanted) // 2, timed_out=_timed_out(error))
            except DatabaseError as error:
                # Refused, which nobody expects. Each by itself, so that a channel that cannot be
                # claimed for does not stop the others; and behind all others.
                logger.error("a claim for %d channels was refused: %s", len(asked.wanted), error)
                delay = self._refused.next()
                self._put_off(asked, 1, timed_out=False)
            await asyncio.sleep(delay)
            if answered:
                return
            # The claim that had no answer may have been done. Then its number brings the answer,
            # whichever channels are asked for now, even none.
            asked = self._next_asked()
        try:
            await self._take_in(answer)
        except DatabaseError as error:
            logger.error("a claim for %d channels was refused: %s", len(asked.wanted), error)
            self._put_off(asked, 1, timed_out=False)
            await asyncio.sleep(self._refused.next())
            return
        self._refused.reset()
        self._at_a_time = min(2 * self._at_a_time, _CHANNELS_AT_A_TIME)
        self._ask_again(asked, answer)

    def _put_off(self, asked: _Asked, at_a_time: int, *, timed_out: bool) -> None:
        """Claim for these behind all others, and for so many channels at a time."""
        self._at_a_time = max(1, at_a_time)
        if timed_out and len(asked.wanted) == 1:
            # Each attempt holds up the other channels until it times out.
            (name,) = asked.wanted
            inbox = self._inbox(name)
            inbox.alone = True
            asyncio.get_running_loop().call_later(inbox.delay.next(), inbox.look)
        else:
            self._due.update(dict.fromkeys(asked.wanted))

    async def _take_in(self, answer: Claims) -> None:
        # All messages first, before anything that may fail: they are taken, and nothing that
        # happens with one channel may cost another's.
        for name, claim in answer.channels.items():
            for message in claim.messages:
                self._pass_on(self._inbox(name), message)
        self._claims += any(claim.messages for claim in answer.channels.values())
        if not answer.may_claim:
            await self._insist(lambda: self._session.fetch("add_claimant", self._id))
        # That of a connection which is gone is not made again: it would begin anew.
        unknown = [
            name
            for name, claim in answer.channels.items()
            if not claim.is_known and not is_connection(name)
        ]
        if unknown:
            await self._insist(lambda: self._session.fetch("add_receiver", unknown))
        if self._claims >= _CLAIMS_BY_ROW:
            new = uuid4()
            await self._insist(lambda: self._session.fetch("replace_claimant", self._id, new))
            self._id, self._claims = new, 0

    def _ask_again(self, asked: _Asked, answer: Claims) -> None:
        """Claim for channels that may have more; end calls for the others that do not wait."""
        # Channels that got nothing come first, for a claim brings a limited number of bytes.
        for name in sorted(asked.wanted, key=lambda name: bool(answer.channels[name].messages)):
            claim, inbox = answer.channels[name], self._inbox(name)
            lacking = claim.may_have_more and len(claim.messages) < asked.wanted[name][0]
            inbox.looked(at_too_few=lacking and claim.passed_by > 0)
            inbox.alone = False
            inbox.delay.reset()
            incomplete = answer.incomplete or not answer.may_claim or not claim.is_known
            if self._has_news(name, claim) or claim.may_have_more or incomplete:
                if inbox.waiters:
                    self._ask_for(inbox)
                continue
            for waiter in asked.waiters[name]:
                if waiter.impatient:
                    waiter.time_out()

    def _has_news(self, name: str, claim: Claim) -> bool:
        # Messages of a group that was not watched may have come before it was.
        return self._watch(self._inbox(name), {name, DIRECT, *claim.groups})

    async def _hand_back(self) -> None:
        # Whoever has begun to wait meanwhile comes first.
        kept, self._returning = self._returning, []
        for name, message in kept:
            self._pass_on(self._inbox(name), message)
        returning, self._returning = self._returning, []
        if not returning:
            return
        self._token += 1
        token = self._token
        names = [name for name, _ in returning]
        ids = [message.id for _, message in returning]
        try:
            await self._insist(
                lambda: self._session.fetch("hand_back", names, ids, self._id, token)
            )
        except BaseException:
            self._returning += returning  # refused, by a deadlock, say, and so not done
            self._wakeup.set()
            raise
        self._wake_sequencer()
        for name in dict.fromkeys(names):
            if self._inbox(name).waiters:
                self._ask_for(self._inbox(name))

    async def _insist(self, do: Callable[[], Awaitable[T]]) -> T:
        """Do it until there is an answer."""
        backoff = Backoff()
        while True:
            try:
                return await do()
            except DatabaseUnavailable as error:
                delay = backoff.next()
                logger.log(error.level, "cannot claim, retry in %.1f s: %s", delay, error)
                await asyncio.sleep(delay)

    @property
    def _housekeeping_interval(self) -> float:
        expiry = self._settings.group_expiry or float("inf")
        return min(_IDLE_TIME, expiry / _RENEWALS)

    async def _housekeeping(self) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._swept_at < self._housekeeping_interval:
            return
        self._swept_at = now
        for inbox in list(self._idle(now)):
            self._watch(inbox, set())
            del self._inboxes[inbox.name]
        waited_for = [name for name, inbox in self._inboxes.items() if inbox.waiters]
        if waited_for:
            # Also should anything have been missed that was a reason to look.
            self._due.update(dict.fromkeys(waited_for))
            try:
                await self._session.fetch("touch_channels", waited_for)
            except DatabaseError as error:
                logger.log(error.level, "cannot renew memberships, will try again: %s", error)

    def _idle(self, now: float) -> Iterator[_Inbox]:
        returning = {name for name, _ in self._returning}
        for inbox in self._inboxes.values():
            is_idle = not inbox.waiters and now - inbox.idle_since > _IDLE_TIME
            if is_idle and inbox.name not in returning:
                yield inbox
