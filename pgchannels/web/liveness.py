"""Whether the other end of a socket is still there. Pure: no I/O, no clock.

By default the server asks, with the protocol's own pings (RFC 6455, section 5.5.2), which no
application can send through ASGI; :meth:`Heartbeat.server_options` tells it how. Where something
between the two answers pings by itself, or the client is to know that it is heard, a heartbeat can
be JSON: ``{"type": "ping"}``, and any frame counts as an answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import inf
from typing import Any, Literal

from pgchannels.errors import ConfigurationError

__all__ = ["MIN_PACE", "Heartbeat", "Liveness", "Verdict"]


@dataclass(frozen=True)
class Heartbeat:
    """How it is found out that a client is gone. Durations are seconds.

    Args:
        interval: after so long a silence the client is asked, and again each time as long.
        timeout: after so long a silence it counts as gone, and the socket is closed with 1011.
        missed: as many questions may stay without an answer; one more, and it counts as gone,
            even before the *timeout*.
        by: ``"protocol"`` leaves it to the server, ``"json"`` asks by messages, ``"off"`` not at
            all. A client's own ``{"type": "ping"}`` is answered by all three.

    Raises:
        ConfigurationError: for what is not positive, or a timeout not longer than the interval.
    """

    interval: float = 30.0
    timeout: float = 60.0
    missed: int = 2
    by: Literal["protocol", "json", "off"] = "protocol"

    def __post_init__(self) -> None:
        if self.by not in ("protocol", "json", "off"):
            raise ConfigurationError(f"a heartbeat is by 'protocol', 'json' or 'off': {self.by!r}")
        for name in ("interval", "timeout"):
            given: object = getattr(self, name)
            if not isinstance(given, (int, float)):
                raise ConfigurationError(f"a heartbeat's {name} is in seconds, not {given!r}")
        if not 0 < self.interval < self.timeout < inf:
            raise ConfigurationError(
                f"a heartbeat's timeout ({self.timeout:g} s) must be longer than its interval "
                f"({self.interval:g} s), and both positive"
            )
        if not self.missed >= 1:
            raise ConfigurationError(f"a heartbeat may miss one answer at least, not {self.missed}")

    def server_options(self) -> dict[str, Any]:
        """What uvicorn is to be given: ``uvicorn.run(app, **options)``.

        It pings every *interval*, and gives up when there is no answer within the rest of
        *timeout*, with 1011.
        """
        if self.by == "off":
            return {"ws_ping_interval": None, "ws_ping_timeout": None}
        return {
            "ws_ping_interval": self.interval,
            "ws_ping_timeout": self.timeout - self.interval,
        }


# Bytes a second that a client takes at least while something waits to be sent to it. Slow links do;
# a client that reads a little now and then, to keep what waits for it in memory, does not.
MIN_PACE = 2048


class Verdict(Enum):
    """What is to be done about a socket."""

    FINE = "fine"
    PING = "ask the client whether it is there"
    GONE = "the client does not answer"
    STUCK = "the client takes nothing of what is sent"
    EXPIRED = "its token has run out"


class Liveness:
    """What is known of one socket's life. Times are seconds of one monotonic clock.

    Args:
        heartbeat: how often to ask; what is not by ``"json"`` asks nothing.
        send_timeout: how long sending may go without progress, or slower than 2 KiB a second; None
            for ever.
        now: when the socket was accepted.
    """

    def __init__(self, heartbeat: Heartbeat, send_timeout: float | None, now: float) -> None:
        self._heartbeat = heartbeat
        self._asks = heartbeat.by == "json"
        self._send_timeout = inf if send_timeout is None else send_timeout
        self.heard_at = now
        """When the client last sent something."""
        self._silent_since = now
        self._listens = True
        self._asked = 0
        self._sending = 0
        self._progress_at = now
        self._taken = 0
        # Since when something waits at each look, and what had been taken by then.
        self._waits_since = now
        self._taken_before = 0
        self._expires_at = inf

    def heard(self, now: float) -> None:
        """The client has sent something."""
        self.heard_at = self._silent_since = now
        self._asked = 0

    def deaf(self) -> None:
        """Nobody waits for what the client sends: it may have answered, and is asked nothing."""
        self._listens = False

    def listens(self, now: float) -> None:
        """Somebody waits for it, from now on. What was sent before then is heard at once."""
        if not self._listens:
            self._listens = True
            self._silent_since = now
            self._asked = 0

    def sending(self, now: float) -> None:
        """Something is about to be sent."""
        if not self._sending:
            self._progress_at = now
        self._sending += 1

    def sent(self, now: float) -> None:
        """The connection has taken it."""
        self._sending -= 1
        self._progress_at = now

    def expire_at(self, when: float) -> None:
        """The client's token is good until then; :data:`math.inf` for ever."""
        self._expires_at = when

    def _is_stuck(self, now: float, taken: int) -> bool:
        if taken > self._taken:
            self._progress_at = now
        self._taken = taken
        waits = now - self._waits_since
        if not self._sending or not taken:
            self._waits_since, self._taken_before = now, taken
        elif waits >= self._send_timeout:
            pace = (taken - self._taken_before) / waits
            self._waits_since, self._taken_before = now, taken
            if pace < MIN_PACE:
                return True
        return self._sending > 0 and now - self._progress_at >= self._send_timeout

    def check(self, now: float, taken: int = 0) -> tuple[Verdict, float]:
        """What is to be done now, and when to look again at the latest; ``inf`` for never.

        Args:
            now: the time.
            taken: bytes that the client has taken since the beginning; always 0 if only whole sends
                are known of.
        """
        is_stuck = self._is_stuck(now, taken)
        if now >= self._expires_at:
            return Verdict.EXPIRED, inf
        if is_stuck:
            return Verdict.STUCK, inf
        # A send may begin at any time, and is to be noticed soon after its time is over.
        again = min(self._expires_at, now + self._send_timeout / 2)
        if self._sending:
            again = min(again, self._progress_at + self._send_timeout)
        if not self._asks:
            return Verdict.FINE, again
        heartbeat = self._heartbeat
        if not self._listens:
            return Verdict.FINE, min(again, now + heartbeat.interval)
        ask_at = self._silent_since + (self._asked + 1) * heartbeat.interval
        gone_at = self._silent_since + heartbeat.timeout
        if now >= gone_at or (now >= ask_at and self._asked >= heartbeat.missed):
            return Verdict.GONE, inf
        if now < ask_at:
            return Verdict.FINE, min(again, ask_at, gone_at)
        self._asked += 1
        return Verdict.PING, min(again, ask_at + heartbeat.interval, gone_at)
