"""Names of channels with places for an object's attributes: ``"orders:{customer_id}"``. Pure."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from string import Formatter
from typing import Any

from pgchannels.channels import RESERVED, check_channel
from pgchannels.errors import ConfigurationError, InvalidChannel

__all__ = ["Template"]


class Template:
    """A parsed template.

    ``{name}`` is the place of an attribute's value; ``{{`` and ``}}`` are braces. That is all:
    there are no format specifications, conversions, dots or brackets. It begins with a word of its
    own, lest who writes the values could name any channel, one of the library's too.

    Attributes:
        text: as it was written.
        attributes: names of those that have a place in it.

    Raises:
        ConfigurationError: it is not such a text, or no value could make it a channel's name.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            fields = list(Formatter().parse(text))
        except ValueError as error:
            raise ConfigurationError(f"the channel {text!r} is no template: {error}") from error
        self._parts: list[tuple[str, str | None]] = []
        for literal, name, specification, conversion in fields:
            if name is not None and (specification or conversion or not name.isidentifier()):
                raise ConfigurationError(
                    f"the channel {text!r} is no template: a place is {{attribute}}, by its name "
                    "alone; for more, give a function"
                )
            self._parts.append((literal, name))
        self.attributes = frozenset(name for _, name in self._parts if name is not None)
        if self.attributes and RESERVED.startswith(self._beginning()):
            raise ConfigurationError(
                f"the channel {text!r} is no template: it must begin with a word of its own: "
                "orders:{id}, not {id}; for any channel at all, give a function"
            )
        try:
            check_channel(self.render(lambda _: "x"))
        except InvalidChannel as error:
            raise ConfigurationError(f"the channel {text!r} is no template: {error}") from error

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

    def _beginning(self) -> str:
        """What is before the first place."""
        places = [number for number, (_, name) in enumerate(self._parts) if name is not None]
        return "".join(literal for literal, _ in self._parts[: places[0] + 1])

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
