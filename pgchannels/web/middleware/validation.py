"""Looks at what clients send before anybody else has to deal with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ValidationError

from pgchannels.errors import ConfigurationError
from pgchannels.web.errors import FrameTooLarge, UnexpectedMessage, ValidationFailed
from pgchannels.web.incoming import Frame
from pgchannels.web.middleware.chain import Middleware, overrides
from pgchannels.web.validation import problems

if TYPE_CHECKING:
    from pgchannels.web.connection import Connection

__all__ = ["Validation"]


class Validation(Middleware):
    """Refuses what is too large, too deep, or not what its type says; drops what is stale.

    What passes is passed on as it was sent. The checks are made in the order of the arguments; the
    first asks for no parsing. If only that is asked for (``max_depth=None``, and nothing else),
    frames need not be JSON.

    **Stale.** With *ttl*, a message that says by ``"created_at"`` when it was made (ISO 8601 with
    an offset, or seconds since 1970) is dropped without an answer when that is longer ago than
    *ttl* seconds, or than the ``"ttl"`` seconds that it gives itself, whichever is less. One
    without ``"created_at"`` is never stale. The time is by the client's clock, and the client's
    word: it can always say that a message is new.

    Args:
        max_bytes: of a frame, a text in UTF-8; None for whatever the server lets in. The error is
            ``frame_too_large``.
        close_too_large: close the socket by a frame that is larger, with 1009, instead of going on.
        max_depth: arrays and objects within each other, 1 to 1024; 1 for an object of plain values.
            None for 1024. The error is ``invalid_content``, ``invalid_json`` for what is not JSON.
        ttl: seconds, see above; None to let it all pass.
        models: a pydantic model for each ``"type"``. The content must be valid for that of its
            type, whether or not the model has a field ``type``. The error is ``invalid_content``.
        unknown: what becomes of content of another type, or of none: ``"pass"``, or ``"refuse"`` by
            the error ``unexpected_message``. What the connection answers itself passes in any case:
            ``ping``, ``pong`` and ``auth.refresh``, but not where they are the application's.
        clock: seconds since 1970.

    Raises:
        ConfigurationError: a limit below 1, or something that is no model.
    """

    def __init__(
        self,
        max_bytes: int | None = 64 * 1024,
        max_depth: int | None = 32,
        ttl: float | None = None,
        models: Mapping[str, type[BaseModel]] | None = None,
        *,
        unknown: Literal["pass", "refuse"] = "pass",
        close_too_large: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if max_bytes is not None and not max_bytes >= 1:
            raise ConfigurationError(f"max_bytes must be at least 1, not {max_bytes!r}")
        if max_depth is not None and not 1 <= max_depth <= 1024:
            raise ConfigurationError(f"max_depth must be 1 to 1024, not {max_depth!r}")
        if ttl is not None and not ttl > 0:
            raise ConfigurationError(f"ttl must be above 0 seconds, not {ttl!r}")
        if unknown not in ("pass", "refuse"):
            raise ConfigurationError(f'unknown must be "pass" or "refuse", not {unknown!r}')
        self.max_bytes = max_bytes
        self.max_depth = max_depth
        self.ttl = ttl
        self.models = dict(models or {})
        self.unknown = unknown
        self.close_too_large = close_too_large
        for kind, model in self.models.items():
            given: object = model
            if not (isinstance(given, type) and issubclass(given, BaseModel)):
                raise ConfigurationError(f"the model of {kind!r} is none: {model!r}")
        self._clock = clock
        self._parses = (max_depth, ttl) != (None, None) or bool(self.models) or unknown == "refuse"

    @property
    def is_immediate(self) -> bool:
        return not overrides(self.inbound, Validation.inbound)

    async def inbound(self, connection: Connection, frame: Frame) -> Frame | None:
        if self.max_bytes is not None and frame.size > self.max_bytes:
            raise FrameTooLarge(
                f"the frame has {frame.size} bytes; at most {self.max_bytes} are read",
                context={"size": frame.size, "limit": self.max_bytes},
                disconnect=self.close_too_large,
            )
        if not self._parses:
            return frame
        content = frame.shared_json()
        if self.max_depth is not None and _is_deeper(frame.raw, content, self.max_depth):
            raise ValidationFailed(
                f"it is nested more than {self.max_depth} levels deep",
                context={"limit": self.max_depth},
            )
        if self.ttl is not None and isinstance(content, dict) and self._is_stale(content, self.ttl):
            return None
        self._check_model(connection, frame.type, content)
        return frame

    def _check_model(self, connection: Connection, kind: str | None, content: Any) -> None:
        model = None if kind is None else self.models.get(kind)
        if model is None:
            if self.unknown == "refuse" and not connection.answers_itself(kind):
                raise UnexpectedMessage
            return
        try:
            model.model_validate(content)
        except ValidationError as error:
            raise ValidationFailed(f"not a valid {kind!r}", errors=problems(error)) from error

    def _is_stale(self, content: dict[str, Any], ttl: float) -> bool:
        created_at, own = content.get("created_at"), content.get("ttl")
        if created_at is None:
            return False
        if own is not None:
            if not _is_number(own) or own < 0:
                raise _misfit("ttl", "a number of seconds, 0 or more")
            ttl = min(ttl, own)
        return self._clock() - _seconds(created_at) > ttl

    def __repr__(self) -> str:
        return f"<Validation max_bytes={self.max_bytes} max_depth={self.max_depth}>"


def _is_deeper(raw: str | bytes, content: Any, limit: int) -> bool:
    # It cannot be deeper than it has brackets, which most messages have few of.
    if isinstance(raw, str):
        brackets = raw.count("[") + raw.count("{")
    else:
        brackets = raw.count(b"[") + raw.count(b"{")
    if brackets <= limit:
        return False
    # Level by level, without recursion; all of one level at once, which is no more than there is.
    level = [content]
    for _ in range(limit + 1):
        below: list[Any] = []
        nested = False
        for value in level:
            if isinstance(value, dict):
                nested = True
                below += value.values()
            elif isinstance(value, list):
                nested = True
                below += value
        if not nested:
            return False
        level = below
    return True


def _seconds(created_at: object) -> float:
    """Since 1970."""
    if _is_number(created_at):
        return float(created_at)  # type: ignore[arg-type]
    try:
        parsed = datetime.fromisoformat(created_at)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        parsed = None
    if parsed is None or parsed.utcoffset() is None:
        raise _misfit("created_at", "a time with an offset, or seconds since 1970")
    return parsed.timestamp()


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _misfit(name: str, expected: str) -> ValidationFailed:
    return ValidationFailed(errors=[{"loc": [name], "msg": f"Should be {expected}"}])
