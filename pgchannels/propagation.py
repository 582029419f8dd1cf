"""What messages carry of the context that they are published in, as headers of theirs.

Nothing, unless somebody gives a source: :func:`pgchannels.telemetry.instrument` does. It is one for
the whole process, as the context's own machinery is: sessions without a layer publish, too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TypeAlias

from pgchannels.messages import OWN_HEADERS

__all__ = ["Source", "context_headers", "set_source"]

logger = logging.getLogger("pgchannels.telemetry")

Source: TypeAlias = Callable[[], Mapping[str, str]]

_source: Source | None = None
_has_failed = False


def set_source(source: Source | None) -> None:
    """Have *source* say what is added to a message's headers when it is made; None for nothing.

    It is called in whatever thread publishes.
    """
    global _source, _has_failed
    _source, _has_failed = source, False


def context_headers() -> Mapping[str, str]:
    """What the source says now, as far as it can be headers. Never raises: publishing goes on."""
    global _has_failed  # noqa: PLW0603
    if _source is None:
        return {}
    try:
        return {name: value for name, value in _source().items() if _is_header(name, value)}
    except Exception:
        if not _has_failed:  # once is enough: every message would say it again
            _has_failed = True
            logger.exception("the context of messages is lost, and will be until this is mended")
        return {}


def _is_header(name: object, value: object) -> bool:
    return (
        isinstance(name, str)
        and isinstance(value, str)
        and name.isascii()
        and value.isascii()
        and f"{name}{value}".isprintable()
        and not name.lower().startswith(OWN_HEADERS)
    )
