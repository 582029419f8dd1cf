"""Metrics for Prometheus. Needs the extra ``metrics``.

Labels have few values, whatever clients do: close codes and error codes are folded where there
could be any number of them; ids of users and names of channels are not among them.
"""

# No postponed annotations here: FastAPI resolves those of the endpoint.

import asyncio
import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from time import monotonic
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response

from pgchannels.errors import PGChannelsError
from pgchannels.extras import needs_extra
from pgchannels.waiting import LoopLock
from pgchannels.web.codes import by_label
from pgchannels.web.health import is_listening
from pgchannels.web.status import guarded

with needs_extra("metrics"):
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
    from prometheus_client.exposition import choose_encoder
    from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from pgchannels.layer import ChannelLayer
    from pgchannels.records import FollowerStatus
    from pgchannels.web.connections import ConnectionManager

__all__ = ["ConnectionsCollector", "FollowersCollector", "metrics_router"]

logger = logging.getLogger("pgchannels.web")

# Error codes that are told apart; an application's own are among them.
_MAX_CODES = 100
_OTHER = "other"
# Seconds for which what was found out about durable readers is good: it costs some counting.
_FRESH = 10.0


class ConnectionsCollector(Collector):
    """What a manager has counted: for a registry of your own. One manager in each registry.

    ::

        REGISTRY.register(ConnectionsCollector(connections))

    It may be collected in any thread, and asks nobody.
    """

    def __init__(self, connections: "ConnectionManager") -> None:
        self._connections = connections

    def collect(self) -> Iterator[Metric]:
        now = self._connections.statistics()
        yield _gauge("connections", "Open connections.", now.connections)
        yield _gauge("users", "Users that the open connections belong to.", now.users)
        yield _gauge("pending_messages", "Messages that wait to be sent to clients.", now.pending)
        yield _gauge("draining", "Whether new connections are refused.", now.is_draining)
        yield _gauge("listening", "Whether notifications come in.", is_listening(self._connections))
        yield _counter("connections_opened", "Connections that were admitted.", now.opened)
        yield _counters(
            "connections_closed",
            "Connections that were closed, by close code.",
            by_label(now.closed),
        )
        yield _counters(
            "connections_refused",
            "Connections that were not admitted, by error code.",
            _bounded(now.refused),
        )
        yield _counters(
            "errors", "Errors that clients were told of, by error code.", _bounded(now.errors)
        )
        yield _counter("received_frames", "Frames of clients.", now.messages_in)
        yield _counter("received_bytes", "Bytes of the frames of clients.", now.bytes_in)
        yield _counter("sent_frames", "Frames to clients.", now.messages_out)
        yield _counter("sent_bytes", "Bytes of the frames to clients.", now.bytes_out)


class FollowersCollector(Collector):
    """How far durable readers lag behind, as of the last :meth:`update`.

    Args:
        layer: whose readers.
        timeout: seconds that the database may take to say so.
    """

    def __init__(self, layer: "ChannelLayer", *, timeout: float = 5.0) -> None:
        self._layer = layer
        self._timeout = timeout
        self._updating = LoopLock()
        self._updated_at: float | None = None
        self._statuses: Sequence[FollowerStatus] = ()

    async def update(self) -> None:
        """Ask the database, if that was not done in the last ten seconds. Never raises.

        If it does not answer, there is nothing to collect until it does.
        """
        async with self._updating.here():
            if self._updated_at is not None and monotonic() - self._updated_at < _FRESH:
                return
            try:
                async with asyncio.timeout(self._timeout):
                    self._statuses = await self._layer.followers()
            except (PGChannelsError, TimeoutError) as error:
                reason = "not in time" if isinstance(error, TimeoutError) else error
                logger.warning("no metrics of durable readers: %s", reason)
                self._statuses = ()
            self._updated_at = monotonic()

    def collect(self) -> Iterator[Metric]:
        lag = GaugeMetricFamily(
            "pgchannels_follower_lag_messages",
            "Messages that a durable reader has still to get done, counted up to 100000.",
            labels=["follower"],
        )
        active = GaugeMetricFamily(
            "pgchannels_follower_active",
            "Whether somebody reads for a durable reader.",
            labels=["follower"],
        )
        # Their names are in the application's code.
        for status in self._statuses:
            lag.add_metric([status.name], status.lag)
            active.add_metric([status.name], status.active)
        yield lag
        yield active


def metrics_router(
    connections: "ConnectionManager",
    *,
    dependencies: Sequence[Any] = (),
    public: bool = False,
    registry: CollectorRegistry | None = None,
    followers: bool = False,
    **options: Any,
) -> APIRouter:
    """Make a router with ``GET /metrics``, in the format of Prometheus, or OpenMetrics if asked.

    Args:
        connections: the manager that it is about.
        dependencies: FastAPI's, which refuse who may not see it by raising an ``HTTPException``, or
            by returning False.
        public: instead: anybody may.
        registry: what is collected besides: ``prometheus_client.REGISTRY``, say. The manager's
            collector is registered there. One of its own if None.
        followers: whether to say how far durable readers lag behind. That asks the database, every
            ten seconds at most; of all processes, let one do it.
        options: for :class:`fastapi.APIRouter`.

    Raises:
        ConfigurationError: neither *dependencies* nor *public*, or both.
    """
    guards = guarded("metrics_router", dependencies, public)
    collected = CollectorRegistry() if registry is None else registry
    collected.register(ConnectionsCollector(connections))
    readers = FollowersCollector(connections.layer) if followers else None
    if readers is not None:
        collected.register(readers)
    router = APIRouter(**{"tags": ["status"], **options})

    @router.get("/metrics", dependencies=guards, response_class=Response)
    async def metrics(request: Request) -> Response:
        """Metrics for Prometheus."""
        if readers is not None:
            await readers.update()
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(
            encode(collected), headers={"Content-Type": content_type, "Cache-Control": "no-store"}
        )

    return router


def _gauge(name: str, documentation: str, value: float) -> Metric:
    return GaugeMetricFamily(f"pgchannels_{name}", documentation, value)


def _counter(name: str, documentation: str, value: float) -> Metric:
    return CounterMetricFamily(f"pgchannels_{name}", documentation, value)


def _counters(name: str, documentation: str, values: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(f"pgchannels_{name}", documentation, labels=["code"])
    for code, value in values.items():
        family.add_metric([code], value)
    return family


def _bounded(counts: Mapping[str, int]) -> Mapping[str, int]:
    """The codes that came first; those that came later as one, so that no series ever ends."""
    items = iter(counts.items())
    first = dict(islice(items, _MAX_CODES))
    return _summed([*first.items(), *((_OTHER, count) for _, count in items)])


def _summed(counts: Any) -> dict[str, int]:
    summed: dict[str, int] = {}
    for name, count in counts:
        summed[name] = summed.get(name, 0) + count
    return summed
