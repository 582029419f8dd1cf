"""Spans for messages on their way to clients. Needs the extra ``otel``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from starlette.websockets import WebSocketDisconnect

from pgchannels.extras import needs_extra
from pgchannels.telemetry import context_of, span_context_of
from pgchannels.web.middleware import Middleware

with needs_extra("otel"):
    from opentelemetry import trace
    from opentelemetry.trace import Link, SpanKind, Status, StatusCode

if TYPE_CHECKING:
    from pgchannels.messages import Message
    from pgchannels.web.connection import Connection

__all__ = ["Tracing"]

_NOTHING = nullcontext()


class Tracing(Middleware):
    """Makes a span of what a connection does with a message: ``ConnectionManager(middleware=…)``.

    It is the current span while a consumer's method handles the message, or it is forwarded. Its
    kind is CONSUMER, its name ``deliver``; it is linked to the span in which the message was
    published. Messages that do not say in which (:func:`pgchannels.telemetry.instrument` was not
    called where they were published, or they were so outside of any span) get none.

    Args:
        tracer_provider: the global one if None.
        as_child: make it a child of the publisher's span, rather than link it. A message to ten
            thousand sockets is a trace of ten thousand spans then.
    """

    def __init__(
        self, *, tracer_provider: trace.TracerProvider | None = None, as_child: bool = False
    ) -> None:
        self._tracer = trace.get_tracer("pgchannels", tracer_provider=tracer_provider)
        self._as_child = as_child

    def delivering(
        self, connection: Connection, message: Message
    ) -> AbstractContextManager[object]:
        published = span_context_of(message)
        return _NOTHING if published is None else self._span(connection, message, published)

    @contextmanager
    def _span(
        self, connection: Connection, message: Message, published: trace.SpanContext
    ) -> Iterator[None]:
        # Names and attributes are those of the semantic conventions for messaging.
        attributes: dict[str, str | int] = {
            "messaging.system": "pgchannels",
            "messaging.operation.type": "process",
            "messaging.operation.name": "deliver",
            "messaging.destination.name": message.channel,
            "messaging.message.body.size": len(message.payload),
            "pgchannels.connection": connection.id,
        }
        if not message.ephemeral:
            attributes["messaging.message.id"] = str(message.position)
        with self._tracer.start_as_current_span(
            "deliver",
            context=context_of(message) if self._as_child else None,
            kind=SpanKind.CONSUMER,
            attributes=attributes,
            links=() if self._as_child else (Link(published),),
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                yield
            except WebSocketDisconnect:
                raise  # clients go when they like
            except Exception as error:
                span.record_exception(error)
                span.set_status(Status(StatusCode.ERROR, type(error).__name__))
                raise
