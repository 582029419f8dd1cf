"""What a client has sent: one text or binary frame, parsed when somebody asks."""

from __future__ import annotations

from typing import Any, overload

from pgchannels.payloads import loads
from pgchannels.web.errors import ValidationFailed
from pgchannels.web.frames import encode_json

__all__ = ["ANSWERED", "HEARTBEATS", "Frame", "size_of"]

# Types of what a connection may answer itself. Whether it does, it says: ``answers_itself()``.
HEARTBEATS = frozenset({"ping", "pong"})
ANSWERED = HEARTBEATS | {"auth.refresh"}

_NOTHING: Any = object()


def size_of(raw: str | bytes) -> int:
    """Bytes, of a text in UTF-8. What is ASCII, which a str knows of itself, is not encoded."""
    if not isinstance(raw, str) or raw.isascii():
        return len(raw)
    # Half of a pair counts as three bytes. A server lets none in (RFC 6455, 8.1); an application or
    # a test may make one.
    return len(raw.encode(errors="surrogatepass"))


class Frame:
    """One frame of a client. It does not change; :meth:`replace` makes another one.

    Equal to frames with the same text or the same bytes.
    """

    __slots__ = ("_content", "_error", "_raw", "_size")

    def __init__(self, raw: str | bytes) -> None:
        self._raw = raw
        self._content: Any = _NOTHING
        self._error: str | None = None
        self._size: int | None = None

    @property
    def raw(self) -> str | bytes:
        """As it was sent: a str for a text frame, bytes for a binary one."""
        return self._raw

    @property
    def is_text(self) -> bool:
        return isinstance(self._raw, str)

    @property
    def size(self) -> int:
        """Bytes, of a text in UTF-8."""
        if self._size is None:
            self._size = size_of(self._raw)
        return self._size

    def json(self) -> Any:
        """The content, of text or bytes in UTF-8, parsed for each call.

        Changing it changes nothing for the middleware and the application behind:
        :meth:`replace` does that.

        Integers are exact, however large. What is not JSON by RFC 8259 is refused: NaN, a number
        that is infinite as a double, half of a surrogate pair, arrays and objects that are more
        than 1024 levels deep.

        Raises:
            ValidationFailed: ``invalid_json``.
        """
        if self._error is None:
            try:
                return loads(self._raw)
            except ValueError as error:
                self._error = str(error)
        raise ValidationFailed(self._error, code="invalid_json")

    def shared_json(self) -> Any:
        """As :meth:`json`, parsed once, for readers that change nothing and for the last one."""
        if self._content is _NOTHING:
            self._content = self.json()
        return self._content

    @property
    def type(self) -> str | None:
        """The content's ``"type"``, if it is an object and that is a string. Parses the content."""
        try:
            content = self.shared_json()
        except ValidationFailed:
            return None
        kind = content.get("type") if isinstance(content, dict) else None
        return kind if isinstance(kind, str) else None

    @overload
    def replace(self, raw: str | bytes) -> Frame: ...

    @overload
    def replace(self, *, content: Any) -> Frame: ...

    def replace(self, raw: str | bytes | None = None, *, content: Any = _NOTHING) -> Frame:
        """Another frame in the place of this one.

        Args:
            raw: what it is; or
            content: what it says, as JSON, also with pydantic models in it. It becomes a text frame
                if this is one, else a binary one.

        Raises:
            TypeError: both, or neither; or a *content* that JSON cannot carry.
            InvalidPayload: a *content* that is nested too deep.
        """
        if (raw is None) == (content is _NOTHING):
            raise TypeError("replace() takes either raw or content=")
        if raw is None:
            text = encode_json(content)
            raw = text if self.is_text else text.encode()
        return Frame(raw)

    def __eq__(self, other: object) -> bool:
        return self._raw == other._raw if isinstance(other, Frame) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._raw)

    def __repr__(self) -> str:
        # Not what is in it: that is nobody's business who reads a log.
        return f"<Frame {'text' if self.is_text else 'binary'} {self.size} bytes>"
