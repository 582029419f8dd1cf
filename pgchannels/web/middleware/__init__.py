"""Middleware: what stands between sockets and whoever serves them."""

from pgchannels.web.middleware.chain import Chain, Middleware, inbound, outbound
from pgchannels.web.middleware.logging import Logging
from pgchannels.web.middleware.rate_limit import RateLimit
from pgchannels.web.middleware.validation import Validation

__all__ = ["Chain", "Logging", "Middleware", "RateLimit", "Validation", "inbound", "outbound"]
