"""Inserts into the outbox what is published in this process, and ephemeral messages beside it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from pgchannels.coalesce import Coalescer
from pgchannels.errors import ChannelFull
from pgchannels.records import Outgoing, Receipt

if TYPE_CHECKING:
    from pgchannels.settings import Settings
    from pgchannels.store import Store

__all__ = ["Publisher"]

_MAX_MESSAGES = 2000
_MAX_CHARACTERS = 8 * 1024 * 1024
# Ephemeral messages that wait for one statement; those of a whole node take turns in it.
_MAX_EPHEMERAL = 500


class Publisher:
    """Coalesces the publishing of one process.

    Args:
        settings: how many messages may wait in a channel, how long keys are remembered.
        store: where to.
        published: called after each commit; must not raise.
    """

    def __init__(self, settings: Settings, store: Store, published: Callable[[], None]) -> None:
        self._settings = settings
        self._store = store
        self._published = published
        self._stored = Coalescer[Outgoing, Receipt](
            self._insert, max_items=_MAX_MESSAGES, max_size=_MAX_CHARACTERS, size=_size
        )
        self._ephemeral = Coalescer[Outgoing, None](
            self._insert_ephemeral, max_items=_MAX_EPHEMERAL, max_size=_MAX_CHARACTERS, size=_size
        )

    def publish(self, message: Outgoing) -> Awaitable[Receipt]:
        """The receipt, when *message* is committed; see :meth:`Coalescer.submit`.

        Raises:
            ChannelFull: as many messages wait in its channel as may.
        """
        return self._stored.submit(message)

    def publish_ephemeral(self, message: Outgoing) -> Awaitable[None]:
        """Done when *message* is on its way."""
        return self._ephemeral.submit(message)

    async def close(self) -> None:
        """Publish what is waiting, within a few seconds, and refuse more."""
        await self._ephemeral.close()
        await self._stored.close()

    async def _insert(self, messages: Sequence[Outgoing]) -> Sequence[Receipt | ChannelFull]:
        capacity = self._settings.capacity
        if capacity is None and all(map(_is_plain, messages)):
            created = await self._store.insert(messages)
            results: list[Receipt | ChannelFull] = [Receipt(at) for at in created]
        else:
            rows = await self._store.insert_checked(messages)
            results = [
                _result(message, *row, capacity)
                for message, row in zip(messages, rows, strict=True)
            ]
        self._published()
        return results

    async def _insert_ephemeral(self, messages: Sequence[Outgoing]) -> Sequence[None]:
        await self._store.insert_ephemeral(messages)
        return [None] * len(messages)


def _size(message: Outgoing) -> int:
    size = len(message.payload)
    return size + sum(map(len, message.attachments)) if message.attachments else size


def _is_plain(message: Outgoing) -> bool:
    return message.key is None and not message.attachments


def _result(
    message: Outgoing, created_at: datetime | None, fresh: bool, capacity: int | None
) -> Receipt | ChannelFull:
    if created_at is None:
        assert capacity is not None
        return ChannelFull(message.channel, capacity)
    return Receipt(created_at, repeated=not fresh)
