"""Messages and positions: what crosses every boundary here. Pure: no I/O, no clock.

A payload travels as the text of a JSON object. It is encoded once, by its publisher, checked here
before anything is written, and from then on passed through: :attr:`Message.envelope` splices that
text into what a socket gets, and only a reader that looks inside pays for parsing it.

Readers of one process share a message, whose text does not change. Parsed content can be changed,
so each reader outside of this library gets a message of its own: :meth:`Message.own`.
"""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import orjson
from pydantic import TypeAdapter, ValidationError

from pgchannels.channels import DIRECT
from pgchannels.errors import InvalidMessage, InvalidPayload, InvalidPosition, PGChannelsError
from pgchannels.payloads import DEFAULT, Serializer, attach, encode_payload, loads

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler
    from pydantic_core import CoreSchema

__all__ = ["BEGINNING", "Message", "Position", "check_ttl", "parse_start", "validated"]

T = TypeVar("T")

# Of a failed validation, as much as a log line can take.
_MAX_PROBLEMS = 3
_MAX_PROBLEM = 200

_POSITION = re.compile(r"([1-9][0-9]{0,8})-(0|[1-9][0-9]{0,18})", re.ASCII)
_MAX_ID = 2**63 - 1
_MAX_TTL = timedelta(days=36525)

# Headers of our own: which channel does not get the message, which alone do (JSON), where the
# attachments belong (JSON), and that it is a frame to be unwrapped.
OWN_HEADERS = "pgchannels-"
EXCEPT = OWN_HEADERS + "except"
ONLY = OWN_HEADERS + "only"
ATTACHMENTS = OWN_HEADERS + "attachments"
FRAME = OWN_HEADERS + "frame"


def check_ttl(ttl: float | timedelta | None) -> timedelta | None:
    """Return a time to live as a ``timedelta``; numbers are seconds.

    Raises:
        InvalidMessage: if it is not positive, or longer than a century.
    """
    if ttl is None:
        return None
    given: object = ttl  # it may come from anywhere
    seconds = given.total_seconds() if isinstance(given, timedelta) else given
    if isinstance(seconds, (int, float)) and 0 < seconds <= _MAX_TTL.total_seconds():
        rounded = timedelta(seconds=seconds)
        if rounded:  # to microseconds, as PostgreSQL counts
            return rounded
    raise InvalidMessage(f"invalid ttl {ttl!r}: expected seconds, more than 0, at most 100 years")


class Position(NamedTuple):
    """A place in the log, opaque to clients: "everything after here" is a complete answer.

    ``str()`` gives ``"<epoch>-<id>"``; ``"0"`` (:data:`BEGINNING`) stands for the
    beginning of what is retained. Pydantic models write and read it as this text. Where there is
    no model to say what it is, JSON has it as the tuple that it also is: write ``str(position)``.
    """

    epoch: int
    id: int

    def __str__(self) -> str:
        return f"{self.epoch}-{self.id}" if self.epoch else "0"

    @classmethod
    def parse(cls, text: Position | str) -> Position:
        """Read what ``str()`` wrote.

        Raises:
            InvalidPosition: for anything else. Whether the log knows it shows when it is used.
        """
        given: object = text  # it may come from anywhere
        if isinstance(given, Position):
            return given
        if given == "0":
            return BEGINNING
        match = _POSITION.fullmatch(given) if isinstance(given, str) else None
        if match is None or int(match[2]) > _MAX_ID:
            raise InvalidPosition(given)
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        # Pydantic need not be loaded where nobody has a model.
        from pydantic_core import core_schema

        return core_schema.json_or_python_schema(
            core_schema.no_info_after_validator_function(cls.parse, core_schema.str_schema()),
            core_schema.no_info_plain_validator_function(cls.parse),
            serialization=core_schema.to_string_ser_schema(),
        )


BEGINNING = Position(0, 0)


def parse_start(after: Position | str | None, since: datetime | None) -> Position | datetime | None:
    """Where a reader is to begin: after a position, or at a time, which comes in UTC.

    Raises:
        InvalidPosition: for a text that is none.
        ValueError: both are given, or *since* has no time zone.
    """
    if since is None:
        return None if after is None else Position.parse(after)
    if after is not None:
        raise ValueError("a reader begins either after= a position or since= a time, not both")
    given: object = since  # it may come from anywhere
    if not isinstance(given, datetime) or given.utcoffset() is None:
        raise ValueError(f"since must be a datetime with a time zone, not {given!r}")
    try:
        return given.astimezone(UTC)
    except OverflowError as error:  # the first hours of the year 1, the last ones of 9999
        raise ValueError(f"since is out of range: {given}") from error


_NO_HEADERS: Mapping[str, str] = MappingProxyType({})

_UNREAD: Any = object()


class Message(Mapping[str, Any]):
    """One message of the log: a read-only mapping over its payload.

    ``message["text"]`` is the payload's; ``message.id`` and the other attributes are its own.
    Compares and hashes by identity in the log (:attr:`position`), never by content.

    An *ephemeral* message is in no log. Its id and position are those of the last message before
    it, so that resuming after it is right, and it equals nothing but itself.
    """

    __slots__ = (
        "_attachments",
        "_data",
        "_document",
        "_envelope",
        "_headers",
        "_headers_text",
        "_recipients",
        "_serializer",
        "_source",
        "_type",
        "channel",
        "created_at",
        "ephemeral",
        "epoch",
        "id",
        "is_plain",
        "payload",
        "size",
    )

    def __init__(
        self,
        id: int,
        channel: str,
        payload: str,
        created_at: datetime,
        size: int,
        epoch: int,
        headers: str | None = None,
        attachments: Sequence[bytes] | None = None,
        *,
        serializer: Serializer = DEFAULT,
        ephemeral: bool = False,
    ) -> None:
        self.id = id
        """Its place in the log: 1, 2, 3 … without holes."""
        self.channel = channel
        self.payload = payload
        """The text of a JSON object, to the letter as published; null where bytes belong."""
        self.created_at = created_at
        """When it was published, by the database's clock; with time zone."""
        self.size = size
        """Bytes: of :attr:`payload` in UTF-8, of the headers, of the attachments."""
        self.epoch = epoch
        self.ephemeral = ephemeral
        self.is_plain = headers is None and not ephemeral and channel != DIRECT
        """For whoever reads its channel, like most: nothing needs to be looked at."""
        self._headers_text = headers
        self._attachments = None if attachments is None else tuple(attachments)
        self._serializer = serializer
        self._source: Message | None = None
        self._type: str | None = _UNREAD
        self._headers: Mapping[str, str] | None = None
        self._recipients: frozenset[str] | None = None
        self._data: dict[str, Any] | None = None
        self._document: dict[str, Any] | None = _UNREAD
        self._envelope: str | None = None

    @property
    def position(self) -> Position:
        """Resume after this message by giving this to ``after=``."""
        return Position(self.epoch, self.id)

    def own(self) -> Message:
        """The same message for one more reader: parsed content is not shared with the others.

        The envelope is, which only has to be made once.
        """
        # Field by field, a quarter of a microsecond: each reader gets one of each message.
        own = object.__new__(type(self))
        own.id = self.id
        own.channel = self.channel
        own.payload = self.payload
        own.created_at = self.created_at
        own.size = self.size
        own.epoch = self.epoch
        own.ephemeral = self.ephemeral
        own.is_plain = self.is_plain
        own._headers_text = self._headers_text
        own._attachments = self._attachments
        own._serializer = self._serializer
        own._headers = self._headers
        own._recipients = self._recipients
        own._type = self._type
        own._envelope = self._envelope
        own._data = None
        own._document = _UNREAD
        own._source = self._source or self
        return own

    @property
    def data(self) -> dict[str, Any]:
        """The payload, parsed on first use. It is the reader's own, who may change it.

        Another reader of the process gets another one; :attr:`payload` and :attr:`envelope` stay as
        they are.

        Raises:
            InvalidPayload: if the text is valid for PostgreSQL but cannot be parsed here (nested
                deeper than 1024 levels, a number such as 1e999), or if the layer's serialiser
                raises anything; only SQL, or another serialiser, can have published it.
        """
        data = self._data
        if data is None:
            try:
                data = self._serializer.loads(self.payload)
                kind = data.get("type")
            except Exception as error:  # a serialiser of the application's may raise whatever
                raise InvalidPayload(
                    f"message {self.position} of {self.channel!r} cannot be parsed: {error!r}"
                ) from error
            if self._attachments:
                attach(data, self.pointers, self._attachments)
            self._data = data
            self._type = kind if isinstance(kind, str) else None  # kept, if data is changed
        return data

    def parse(self, model: type[T] | TypeAdapter[T]) -> T:
        """The payload, validated: as a pydantic model, or any type that a ``TypeAdapter`` takes.

        As JSON, so that a strict model takes what it was published as. With attachments, or by a
        serialiser of the application's, :attr:`data` is validated.

        Raises:
            InvalidPayload: it does not fit, or cannot be parsed. The sentence says which message it
                is and what is wrong; its cause is pydantic's ``ValidationError``.
        """
        try:
            return validated(self, model)
        except ValidationError as error:
            found = error.errors(include_url=False, include_context=False, include_input=False)
            problems = [_problem(each["loc"], each["msg"]) for each in found[:_MAX_PROBLEMS]]
            if len(found) > len(problems):
                problems.append(f"and {len(found) - len(problems)} more")
            raise InvalidPayload(
                f"message {self.position} of {self.channel!r} is no valid "
                f"{getattr(model, '__name__', model)}: {'; '.join(problems)}"
            ) from error

    @property
    def document(self) -> dict[str, Any] | None:
        """The payload as the JSON that it is, whatever the serialiser: null where bytes belong.

        Parsed on first use, and shared by all readers of the process, or with :attr:`data`: do not
        change it. None if it cannot be parsed.
        """
        if self._source is not None:
            return self._source.document
        if self._document is _UNREAD:
            is_data = self._serializer is DEFAULT and not self._attachments
            try:
                self._document = self.data if is_data else loads(self.payload)
            except ValueError:
                self._document = None
        return self._document

    @property
    def type(self) -> str | None:
        """The ``"type"`` that was published, if that is a string. Parses the payload, once."""
        if self._type is _UNREAD:
            if self._source is None:
                self.data  # noqa: B018 - parsing finds it
            else:
                self._type = self._source.type
        return self._type

    @property
    def headers(self) -> Mapping[str, str]:
        """What the publisher gave as ``headers=``; sockets do not get them.

        Names that begin with ``pgchannels-`` are the library's own.
        """
        if self._headers_text is None:
            return _NO_HEADERS
        if self._headers is None:
            try:
                parsed = orjson.loads(self._headers_text)
            except orjson.JSONDecodeError:  # only SQL can have published it: a number such as 1e999
                parsed = None
            known = parsed.items() if isinstance(parsed, dict) else ()
            self._headers = MappingProxyType({n: v for n, v in known if isinstance(v, str)})
        return self._headers

    @property
    def attachments(self) -> Sequence[bytes]:
        """The bytes that were in the payload, in the order of :attr:`pointers`."""
        return self._attachments or ()

    @property
    def pointers(self) -> Sequence[str]:
        """Where in the payload each attachment belongs: JSON pointers (RFC 6901)."""
        return _texts(self.headers.get(ATTACHMENTS)) or ()

    @property
    def recipients(self) -> frozenset[str] | None:
        """The channels that it was sent to, one stored message for all; None: whoever reads."""
        if self.is_plain or ONLY not in self.headers:
            return frozenset() if self.channel == DIRECT else None
        if self._recipients is None:
            self._recipients = frozenset(_texts(self.headers[ONLY]) or ())
        return self._recipients

    def is_for(self, member: str | None) -> bool:
        """Whether a reader gets it that reads for the channel *member*, or for none."""
        if self.is_plain:
            return True
        recipients = self.recipients
        if recipients is not None and member not in recipients:
            return False
        return member is None or self.headers.get(EXCEPT) != member

    @property
    def envelope(self) -> str:
        """What a socket gets: ``{"id", "position", "channel", "created_at", "data"}`` as JSON.

        Made once, however many sockets it goes to; the payload's text is not parsed for it.
        Attachments come as ``"attachments"``, an object of base64 by JSON pointer. An ephemeral
        message has no id and no position, but ``"ephemeral": true``.
        """
        if self._envelope is None and self._source is not None:
            self._envelope = self._source.envelope
        if self._envelope is None:
            created_at = self.created_at.astimezone(UTC).isoformat(timespec="microseconds")
            place = (
                '"ephemeral":true'
                if self.ephemeral
                else f'"id":{self.id},"position":"{self.epoch}-{self.id}"'
            )
            attachments = ""
            if self._attachments:
                encoded = (b64encode(content).decode() for content in self._attachments)
                by_pointer = dict(zip(self.pointers, encoded, strict=False))
                attachments = f',"attachments":{orjson.dumps(by_pointer).decode()}'
            self._envelope = (
                f'{{{place},"channel":{orjson.dumps(self.channel).decode()},'
                f'"created_at":"{created_at}","data":{self.payload}{attachments}}}'
            )
        return self._envelope

    def to_dict(self) -> dict[str, Any]:
        """The envelope as a dictionary, with bytes in their places in ``"data"``."""
        place = (
            {"ephemeral": True}
            if self.ephemeral
            else {"id": self.id, "position": str(self.position)}
        )
        return {
            **place,
            "channel": self.channel,
            "created_at": self.created_at.astimezone(UTC).isoformat(timespec="microseconds"),
            "data": self.data,
        }

    @classmethod
    def from_dict(cls, envelope: Mapping[str, Any]) -> Message:
        """Make a message of what a client got: the envelope, parsed, or a ``to_dict()``.

        Raises:
            InvalidMessage: if it is neither.
        """
        try:
            channel = envelope["channel"]
            if not isinstance(channel, str):
                raise TypeError("a channel's name must be a str")
            ephemeral = bool(envelope.get("ephemeral"))
            position = BEGINNING if ephemeral else Position.parse(envelope["position"])
            encoded = encode_payload(envelope["data"], max_size=2**63)
            lifted = envelope.get("attachments") or {}
            attachments = [*encoded.attachments, *map(b64decode, lifted.values())]
            pointers = [*encoded.pointers, *lifted]
            headers = {ATTACHMENTS: orjson.dumps(pointers).decode()} if pointers else None
            return cls(
                position.id,
                channel,
                encoded.text,
                datetime.fromisoformat(envelope["created_at"]),
                len(encoded.text.encode()),
                position.epoch,
                None if headers is None else orjson.dumps(headers).decode(),
                attachments or None,
                ephemeral=ephemeral,
            )
        except (KeyError, TypeError, ValueError, AttributeError, PGChannelsError) as error:
            raise InvalidMessage(f"this is not the envelope of a message: {error!r}") from error

    def __getitem__(self, key: str) -> Any:
        return self.data[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.data)

    def __len__(self) -> int:
        return len(self.data)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Message) or self.ephemeral or other.ephemeral:
            return self is other
        return self.id == other.id and self.epoch == other.epoch

    def __hash__(self) -> int:
        return hash((self.epoch, self.id))

    def __repr__(self) -> str:
        payload = self.payload if len(self.payload) <= 80 else self.payload[:77] + "..."
        return f"<Message {self.position} {self.channel!r} {payload!r}>"


def validated(message: Message, model: type[T] | TypeAdapter[T]) -> T:
    """As :meth:`Message.parse`, but raises pydantic's ``ValidationError`` itself."""
    adapter: TypeAdapter[T] = model if isinstance(model, TypeAdapter) else _adapter(model)
    if not message.attachments and message._serializer is DEFAULT:  # noqa: SLF001
        try:
            return adapter.validate_json(message.payload)
        except ValidationError as error:
            # Pydantic's parser does not go as deep as ours.
            if error.errors(include_url=False, include_input=False)[0]["type"] != "json_invalid":
                raise
    return adapter.validate_python(message.data)


def _adapter(model: Any) -> TypeAdapter[Any]:
    try:
        return _kept_adapter(model)
    except TypeError:  # an annotation that cannot be hashed
        return TypeAdapter(model)


@lru_cache(maxsize=256)
def _kept_adapter(model: Any) -> TypeAdapter[Any]:
    return TypeAdapter(model)


def _problem(place: tuple[int | str, ...], reason: str) -> str:
    # Keys are the publisher's, and some sentences repeat a value.
    return f"{'.'.join(map(str, place)) or 'payload'}: {reason}"[:_MAX_PROBLEM]


def _texts(header: str | None) -> list[str] | None:
    """A header's value that is a list of texts, as JSON."""
    if header is None:
        return None
    try:
        values = orjson.loads(header)
    except orjson.JSONDecodeError:
        return []
    return [value for value in values if isinstance(value, str)] if isinstance(values, list) else []
