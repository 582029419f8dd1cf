"""Names of channels, and ids of users, with places for an object's attributes. Pure.

``"orders:{customer_id}"`` is a channel's, ``"{customer_id}"`` a user's.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from string import Formatter
from typing import Any

from pgchannels.channels import RESERVED, check_channel, user_channel
from pgchannels.errors import ConfigurationError, InvalidChannel, InvalidMessage

__all__ = ["Template", "UserTemplate"]


class Template:
    """A parsed template of a channel's name.

    ``{name}`` is the place of an attribute's value; ``{{`` and ``}}`` are braces. That is all:
    there are no format specifications, conversions, dots or brackets. It begins with a word of its
    own, or a value in a row could be the name of any channel, one of the library's too.

    Attributes:
        text: as it was written.
        attributes: names of those that have a place in it.

    Raises:
        ConfigurationError: it is not such a text, or no value could make it a channel's name.
    """

    _subject = "channel"

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            fields = list(Formatter().parse(text))
        except ValueError as error:
            raise ConfigurationError(
                f"the {self._subject} {text!r} is no template: {error}"
            ) from error
        self._parts: list[tuple[str, str | None]] = []
        for literal, name, specification, conversion in fields:
            if name is not None and (specification or conversion or not name.isidentifier()):
                raise ConfigurationError(
                    f"the {self._subject} {text!r} is no template: a place is {{attribute}}, by "
                    "its name alone; for more, give a function"
                )
            self._parts.append((literal, name))
        self.attributes = frozenset(name for _, name in self._parts if name is not None)
        self._check_beginning()
        try:
            self.channel(self.render(lambda _: "x") or "")
        except InvalidMessage as error:
            raise ConfigurationError(
                f"the {self._subject} {text!r} is no template: {error}"
            ) from error

    def channel(self, rendered: str) -> str:
        """Return the name of the channel that *rendered*, the result of :meth:`render`, stands for.

        Raises:
            InvalidMessage: there is none.
        """
        return check_channel(rendered)

    def render(self, value_of: Callable[[str], Any]) -> str | None:
        """The name with the values that *value_of* gives; None if one of them is None.

        Raises:
            InvalidChannel: a value is bytes, which are no text.
        """
        rendered: list[str] = []
        for literal, name in self._parts:
            rendered.append(literal)
            if name is None:
                continue
            value = value_of(name)
            if value is None:
                return None
            rendered.append(self._text(name, value))
        return "".join(rendered)

    def _check_beginning(self) -> None:
        places = [number for number, (_, name) in enumerate(self._parts) if name is not None]
        if not places:
            return
        beginning = "".join(literal for literal, _ in self._parts[: places[0] + 1])
        if RESERVED.startswith(beginning):
            raise ConfigurationError(
                f"the channel {self.text!r} is no template: it must begin with a word of its own: "
                "orders:{id}, not {id}; for any channel at all, give a function"
            )

    def _text(self, name: str, value: Any) -> str:
        # As JSON has it, so that a channel's name and the payload agree.
        match value:
            case Enum():
                return self._text(name, value.value)
            case bool():
                return "true" if value else "false"
            case bytes() | bytearray() | memoryview():
                raise InvalidChannel(self.text, f"{name!r} is bytes, which are no text")
            case _:
                return str(value)


class UserTemplate(Template):
    """A parsed template of a user's id, which may be a value alone."""

    _subject = "user"

    def channel(self, rendered: str) -> str:
        return user_channel(rendered)

    def _check_beginning(self) -> None:
        pass  # a user's channel is the only one that it can lead to
