"""With which codes sockets are closed. Pure."""

from __future__ import annotations

__all__ = [
    "ABNORMAL",
    "INTERNAL_ERROR",
    "NORMAL",
    "OURS",
    "POLICY_VIOLATION",
    "SERVICE_RESTART",
    "TRY_AGAIN_LATER",
]

# RFC 6455, section 7.4.1, and the registry that it founds. 1005 and 1006 may not be sent.
NORMAL = 1000
ABNORMAL = 1006
POLICY_VIOLATION = 1008
INTERNAL_ERROR = 1011
SERVICE_RESTART = 1012
TRY_AGAIN_LATER = 1013

OURS = frozenset({POLICY_VIOLATION, INTERNAL_ERROR, SERVICE_RESTART, TRY_AGAIN_LATER})
"""Those that are a consumer's own to close with, without its subclass having asked for it."""
