"""Addresses of messages: the channel, and the headers that narrow down who gets them. Pure.

A layer's methods and :func:`pgchannels.orm.publish` share them. The SQL function ``publish()``
makes the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import orjson

from pgchannels.channels import DIRECT, EVERYONE, check_channel, user_channel
from pgchannels.errors import InvalidChannel, InvalidMessage
from pgchannels.messages import EXCEPT, ONLY

__all__ = [
    "MAX_RECIPIENTS",
    "Address",
    "address_of",
    "connections_address",
    "group_address",
    "user_address",
]

MAX_RECIPIENTS = 1000


class Address(NamedTuple):
    """A channel, and headers of our own."""

    channel: str
    headers: Mapping[str, str] | None = None


def group_address(group: str, exclude: str | None) -> Address:
    """All that read *group*, but for the member whose channel is *exclude*.

    Raises:
        InvalidChannel: one of the two is not a channel's name.
    """
    channel = check_channel(group)
    return Address(channel, _excluding(exclude))


def user_address(user_id: str, exclude: str | None) -> Address:
    """All connections of a user, but for the one whose channel is *exclude*.

    Raises:
        InvalidMessage: a bad id, or a bad name.
    """
    return Address(user_channel(user_id), _excluding(exclude))


def connections_address(channels: Iterable[str]) -> Address:
    """Several connections, by their channels.

    Raises:
        InvalidChannel: it is a text, or one of them is not a channel's name.
        InvalidMessage: there are none, or more than 1000.
    """
    if isinstance(channels, str):
        raise InvalidChannel(channels, "send_to() takes several channels, as a list")
    names = sorted({check_channel(channel) for channel in channels})
    if not 1 <= len(names) <= MAX_RECIPIENTS:
        raise InvalidMessage(f"it takes 1 to {MAX_RECIPIENTS} channels, not {len(names)}")
    return Address(DIRECT, {ONLY: orjson.dumps(names).decode()})


def address_of(
    channel: str | None,
    *,
    user: str | None,
    everyone: bool,
    to: Iterable[str] | None,
    exclude: str | None,
) -> Address:
    """The one of these that is given, without the connection *exclude*.

    Raises:
        InvalidMessage: none is given, or several are; or a bad name, user or list of channels.
    """
    given = {"channel": channel, "user": user, "everyone": everyone or None, "to": to}
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        raise InvalidMessage(
            "publish() needs an address: a channel, user=, everyone=True or to="
            if not names
            else f"publish() takes one address, not {' and '.join(names)}"
        )
    if to is not None:
        if exclude is not None:
            raise InvalidMessage("publish() takes no exclude= with to=: leave that channel out")
        return connections_address(to)
    if user is not None:
        return user_address(user, exclude)
    return group_address(EVERYONE if everyone else _required(channel), exclude)


def _required(channel: Any) -> str:
    name: str = channel  # check_channel() says what is wrong with it
    return name


def _excluding(exclude: str | None) -> Mapping[str, str] | None:
    return None if exclude is None else {EXCEPT: check_channel(exclude)}
