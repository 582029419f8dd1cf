"""Middleware: what stands between sockets and whoever serves them."""

from pgchannels.web.middleware.chain import Chain, Middleware, inbound, outbound

__all__ = ["Chain", "Middleware", "inbound", "outbound"]
