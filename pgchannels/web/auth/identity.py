"""Who it is: what a verified token says of its bearer. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

from pgchannels.channels import check_user
from pgchannels.control import check_token_id
from pgchannels.errors import InvalidMessage

__all__ = ["Identity"]


@dataclass(frozen=True, repr=False)
class Identity:
    """Somebody whose token has been verified.

    Its ``repr()`` says nothing of whom: claims are personal data, and logs live long.

    Args:
        user_id: 1 to 1000 characters, at most 1900 bytes as UTF-8; the user that the connection
            will belong to.
        claims: all that the token says.
        token_id: the token's own id (``jti``), to revoke it by; 1 to 1000 characters.
        issued_at: when the token was made, with a time zone.
        expires_at: from when on it is not accepted, with a time zone; None if it always is.
        capabilities: what :class:`Capabilities` goes by, instead of a claim.

    Raises:
        InvalidUser: not what a user's id may be.
        ValueError: a time without a zone, or a token's id that nothing could be revoked by.
    """

    user_id: str
    claims: Mapping[str, Any] = field(default_factory=dict)
    token_id: str | None = None
    issued_at: datetime | None = None
    expires_at: datetime | None = None
    capabilities: Mapping[str, Collection[str]] | None = None

    def __post_init__(self) -> None:
        check_user(self.user_id)
        if self.token_id is not None:
            try:
                check_token_id(self.token_id)
            except InvalidMessage as error:
                # Nobody has sent a message: it is what a token says, or what was made of it.
                raise ValueError(str(error)) from None
        object.__setattr__(self, "claims", MappingProxyType(dict(self.claims)))
        for name in ("issued_at", "expires_at"):
            time: datetime | None = getattr(self, name)
            if time is not None:
                if time.tzinfo is None:
                    raise ValueError(f"{name} needs a time zone")
                object.__setattr__(self, name, time.astimezone(UTC))

    def __repr__(self) -> str:
        return "<Identity>"
