"""OpenTelemetry: the context of who publishes travels with the message. Needs the extra ``otel``.

:func:`instrument` has every message that is published in a span carry the span's context in its
headers, as W3C Trace Context has it (``traceparent``, ``tracestate``). It does not matter how it is
published: by a layer or by a session of SQLAlchemy. Clients do not get headers.

:func:`context_of` is the way back. For sockets, :class:`pgchannels.web.tracing.Tracing` does it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pgchannels.extras import needs_extra
from pgchannels.propagation import set_source

with needs_extra("otel"):
    from opentelemetry import trace
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

if TYPE_CHECKING:
    from opentelemetry.propagators.textmap import TextMapPropagator

    from pgchannels.messages import Message

__all__ = ["context_of", "instrument", "span_context_of", "uninstrument"]

_W3C = TraceContextTextMapPropagator()
_PARENT = "traceparent"


def instrument(propagator: TextMapPropagator = _W3C) -> None:
    """Have messages carry the context that they are published in, from now on, in this process.

    What is published outside of any span stays as it is. A message keeps its context in the log,
    for as long as it is retained. It takes room in the message's headers, up to their usual bound;
    where there is none left, or the publisher gave headers of these names, the context is left out.
    A propagator that fails does not keep messages from being published; the log says so once.

    Args:
        propagator: what makes headers of a context. The default carries traces only. One that
            carries baggage puts that into the log, too.
    """

    def carried() -> dict[str, str]:
        carrier: dict[str, str] = {}
        propagator.inject(carrier)  # pyright: ignore[reportArgumentType] - the setter's default
        return carrier

    set_source(carried)


def uninstrument() -> None:
    """Have messages carry no context any more."""
    set_source(None)


def context_of(message: Message, propagator: TextMapPropagator = _W3C) -> Context:
    """The context in which *message* was published; an empty one if it does not say.

    For a span that continues the publisher's trace::

        with tracer.start_as_current_span("bill", context=context_of(message)):
            ...

    Who may publish may say what they like there, as with the headers of a request.
    """
    return propagator.extract(message.headers, Context())


def span_context_of(message: Message) -> trace.SpanContext | None:
    """The span in which *message* was published, to link to; None if it does not say."""
    if message.is_plain or _PARENT not in message.headers:
        return None
    found = trace.get_current_span(context_of(message)).get_span_context()
    return found if found.is_valid else None
