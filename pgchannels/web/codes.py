"""With which codes sockets are closed. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

__all__ = [
    "ABNORMAL",
    "FORBIDDEN",
    "GONE",
    "INTERNAL_ERROR",
    "NORMAL",
    "OURS",
    "POLICY_VIOLATION",
    "SENDABLE",
    "SERVICE_RESTART",
    "TIMEOUT",
    "TOO_BIG",
    "TRY_AGAIN_LATER",
    "UNAUTHORIZED",
    "by_label",
    "cut",
]

# RFC 6455, section 7.4.1, and the registry that it founds. 1005 and 1006 may not be sent.
NORMAL = 1000
ABNORMAL = 1006
POLICY_VIOLATION = 1008
TOO_BIG = 1009
INTERNAL_ERROR = 1011
SERVICE_RESTART = 1012
TRY_AGAIN_LATER = 1013
# Registered with IANA by applications, with the meanings of HTTP's 401, 403 and 408.
UNAUTHORIZED = 3000
FORBIDDEN = 3003
TIMEOUT = 3008
# As they are, of HTTP's 410. Not registered: the client's position is not of this log.
GONE = 3010

OURS = frozenset(
    {
        POLICY_VIOLATION,
        TOO_BIG,
        INTERNAL_ERROR,
        SERVICE_RESTART,
        TRY_AGAIN_LATER,
        UNAUTHORIZED,
        FORBIDDEN,
        TIMEOUT,
        GONE,
    }
)
"""Those that are a consumer's own to close with, without its subclass having asked for it."""

SENDABLE = frozenset({*range(1000, 1004), *range(1007, 1012), 1012, 1013, 1014, *range(3000, 5000)})
"""What may be sent. Not 1004, 1005, 1006 and 1015, which are reserved (RFC 6455, 7.4.1)."""


def by_label(counts: Mapping[int, int]) -> dict[str, int]:
    """Sum up counts by close code: a client may close with any of thousands of codes.

    Codes of the protocol and of ours stand for themselves, others for their thousand.
    """
    summed: Counter[str] = Counter()
    for code, count in counts.items():
        if code in OURS or 1000 <= code <= 1015:
            summed[str(code)] += count
        else:
            summed[f"{code // 1000}xxx" if 3000 <= code <= 4999 else "other"] += count
    return dict(summed)


# RFC 6455, section 5.5: a control frame has 125 bytes, of which the code takes two.
_MAX_REASON = 123


def cut(reason: str) -> str:
    """What of *reason* there is room for; a server raises for what is longer."""
    encoded = reason.encode(errors="replace")
    return encoded[:_MAX_REASON].decode(errors="ignore")
