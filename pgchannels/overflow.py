"""What becomes of messages that a consumer does not take as fast as they come. Pure.

A value that says so; :class:`~pgchannels.subscription.Subscription` does it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self, TypeAlias, get_args

from pgchannels.errors import ConfigurationError

if TYPE_CHECKING:
    from pgchannels.messages import Message

__all__ = ["Overflow", "Policy"]

Policy: TypeAlias = Literal["replay", "drop_oldest", "latest_by_key", "disconnect"]

_POLICIES: tuple[str, ...] = get_args(Policy)


@dataclass(frozen=True)
class Overflow:
    """What a stream does when more messages wait than may.

    - ``"replay"``: what waits is dropped from memory, and read again from the log at the consumer's
      pace. Nothing is lost; a consumer may be far behind.
    - ``"drop_oldest"``: the oldest that wait are dropped until the others fit. The consumer has the
      newest, and has lost some: ``stream.dropped`` counts them.
    - ``"latest_by_key"``: of the messages of a channel with the same key, only the newest waits, in
      the place that it has in the log; ``stream.replaced`` counts the others. If they still are too
      many, the oldest are dropped.
    - ``"disconnect"``: the stream ends, with :class:`~pgchannels.SlowConsumer`.

    All that is about live messages. Those that are read from the log, after a position, are read at
    the consumer's pace, and none of them is dropped or replaced; nor does a backlog end a stream.

    A burst reaches a stream before its consumer has had a turn, so that bounds below ``page_size``
    and ``page_bytes`` may be exceeded by a consumer that is quick. A single message that waits
    alone may exceed *max_bytes*; only ``"replay"`` reads it from the log then.

    Args:
        policy: one of these.
        max_messages: how many may wait, at least 1; ``buffer_size`` if None.
        max_bytes: bytes of theirs that may, at least 1; ``buffer_bytes`` if None.
        key: for ``"latest_by_key"``, and only there: gives a message's key, quickly, for it is
            called as the message comes. Messages with the key None are not replaced, nor is one for
            which it raises, or whose key cannot be hashed; the first time, that is logged.

    Raises:
        ConfigurationError: for anything else.
    """

    policy: Policy = "replay"
    max_messages: int | None = None
    max_bytes: int | None = None
    key: Callable[[Message], Hashable] | None = None

    def __post_init__(self) -> None:
        if self.policy not in _POLICIES:
            raise ConfigurationError(
                f"{self.policy!r} is no policy for overflow: expected one of {', '.join(_POLICIES)}"
            )
        for name in ("max_messages", "max_bytes"):
            bound: object = getattr(self, name)
            if bound is not None and (
                not isinstance(bound, int) or isinstance(bound, bool) or bound < 1
            ):
                raise ConfigurationError(f"{name} must be 1 or more, or None; not {bound!r}")
        if self.policy != "latest_by_key":
            if self.key is not None:
                raise ConfigurationError(f"overflow {self.policy!r} takes no key")
        elif not callable(self.key):
            raise ConfigurationError(
                "overflow 'latest_by_key' needs a key: Overflow('latest_by_key', key=…), a function"
                f" that gives the key of a message; not {self.key!r}"
            )

    @classmethod
    def parse(cls, given: Self | str | None) -> Self:
        """Return *given*; a text is a policy with default bounds, None is ``"replay"``.

        Raises:
            ConfigurationError: it is none of these.
        """
        if isinstance(given, cls):
            return given
        if given is None:
            return cls()
        return cls(given)  # type: ignore[arg-type] # it may be any text, and is checked there
