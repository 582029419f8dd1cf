"""Names of channels: which are valid, and which are ours. Pure."""

from __future__ import annotations

import re
from hashlib import sha256
from urllib.parse import quote
from uuid import UUID, uuid4

from pgchannels.errors import InvalidChannel, InvalidUser

__all__ = [
    "COMMANDS",
    "DIRECT",
    "EVERYONE",
    "MAX_CHANNEL_LENGTH",
    "MEMBERS",
    "check_channel",
    "check_user",
    "is_connection",
    "new_name",
    "presence_channel",
    "user_channel",
]

MAX_CHANNEL_LENGTH = 200
# An entry of a btree has 2704 bytes; the one of who is present holds a group's name, too: 191
# characters, for it has a channel that tells of that, of up to four bytes.
_MAX_USER_BYTES = 1900

RESERVED = "pgchannels:"

EVERYONE = RESERVED + "everyone"
"""What is broadcast; every connection reads it."""

DIRECT = RESERVED + "direct"
"""What is sent to several connections at once; each reads what names it."""

MEMBERS = RESERVED + "members"
"""News for nodes: these channels' memberships have changed, look at them."""

COMMANDS = RESERVED + "commands"
"""What nodes are to do with their connections. Clients neither read it nor write to it."""

_USER = RESERVED + "user:"
PRESENCE = "presence:"

# White space, control and invisible formatting characters, and the wildcards of MQTT. The SQL
# function is_channel() has the same class; a test compares the two over all code points.
_FORBIDDEN = re.compile(
    r"[\u0000-\u0020\u007f-\u00a0\u00ad\u061c\u1680\u180e\u2000-\u200f\u2028-\u202f\u205f-\u206f"
    r"\u3000\ud800-\udfff\ufeff\ufff9-\uffff\U000e0000-\U000e0fff+#*]"
)
_MAX_PREFIX_LENGTH = MAX_CHANNEL_LENGTH - 50
# As new_name() makes them; change_memberships() has the same.
_CONNECTION = re.compile(r"\.[0-9a-f]{32}\.[0-9a-f]{16}\Z")


def check_channel(channel: object) -> str:
    """Return *channel* if it is a valid name.

    1 to 200 characters; no white space, no control or invisible formatting characters, none of
    ``+ # *`` (they are wildcards in topic filters). Names that begin with ``pgchannels:`` are the
    library's own; of these, only :data:`EVERYONE` is for users.

    Raises:
        InvalidChannel: if it is not.
    """
    if not isinstance(channel, str):
        several = isinstance(channel, (list, tuple, set))
        hint = "; give several channels as several arguments" if several else ""
        raise InvalidChannel(channel, f"it must be a str{hint}")
    if not 1 <= len(channel) <= MAX_CHANNEL_LENGTH:
        raise InvalidChannel(channel, f"it must have 1 to {MAX_CHANNEL_LENGTH} characters")
    if match := _FORBIDDEN.search(channel):
        raise InvalidChannel(channel, f"it must not contain {match.group()!a}")
    if channel.startswith(RESERVED) and channel != EVERYONE:
        raise InvalidChannel(channel, f"names that begin with {RESERVED!r} are reserved")
    return channel


def new_name(prefix: str, node: UUID) -> str:
    """A name that nobody else has: ``<prefix>.<node>.<random>``.

    Raises:
        InvalidChannel: if the prefix is no good, or longer than 150 characters.
    """
    if len(check_channel(prefix)) > _MAX_PREFIX_LENGTH:
        raise InvalidChannel(prefix, f"as a prefix it may have {_MAX_PREFIX_LENGTH} characters")
    return f"{prefix}.{node.hex}.{uuid4().hex[:16]}"


def is_connection(channel: str) -> bool:
    """Whether *channel* is a name that ``new_name()`` has made."""
    return _CONNECTION.search(channel) is not None


def check_user(user_id: object) -> str:
    """Return *user_id* if it can be one: 1 to 1000 characters, at most 1900 bytes as UTF-8.

    Raises:
        InvalidUser: if not.
    """
    if not isinstance(user_id, str):
        raise InvalidUser(f"a user's id must be a str, not {type(user_id).__name__}")
    if not 1 <= len(user_id) <= 1000:
        raise InvalidUser(f"a user's id has 1 to 1000 characters, not {len(user_id)}")
    try:
        size = len(user_id.encode())
    except UnicodeEncodeError as error:
        raise InvalidUser("a user's id must not hold lone surrogates") from error
    if size > _MAX_USER_BYTES:
        raise InvalidUser(f"a user's id has at most {_MAX_USER_BYTES} bytes as UTF-8, not {size}")
    if "\0" in user_id:
        raise InvalidUser("a user's id must not hold NUL")
    return user_id


def user_channel(user_id: str) -> str:
    """The channel that all connections of a user read. Any text will do as an id.

    Raises:
        InvalidUser: it cannot be a user's id.
    """
    # Not every id would be a valid name. A colon does not come out of quote().
    name = _USER + quote(check_user(user_id), safe="")
    if len(name) <= MAX_CHANNEL_LENGTH:
        return name
    return f"{_USER}:{sha256(user_id.encode()).hexdigest()}"


def presence_channel(group: str) -> str:
    """The channel that tells who joins and leaves *group*.

    Raises:
        InvalidChannel: if the group's name is no good, or longer than 191 characters.
    """
    if len(check_channel(group)) > MAX_CHANNEL_LENGTH - len(PRESENCE):
        limit = MAX_CHANNEL_LENGTH - len(PRESENCE)
        raise InvalidChannel(group, f"a group with presence may have {limit} characters")
    return PRESENCE + group
