"""FastAPI: sockets that follow channels, history over REST, and the layer's lifespan."""

from pgchannels.web.bytes_consumer import BytesConsumer
from pgchannels.web.consumer import WebSocketConsumer
from pgchannels.web.handlers import handles, receives
from pgchannels.web.history import channels_router
from pgchannels.web.incoming import Frame
from pgchannels.web.json_consumer import JsonConsumer
from pgchannels.web.lifespan import lifespan
from pgchannels.web.middleware import (
    Chain,
    Logging,
    Middleware,
    RateLimit,
    Validation,
    inbound,
    outbound,
)

__all__ = [
    "BytesConsumer",
    "Chain",
    "Frame",
    "JsonConsumer",
    "Logging",
    "Middleware",
    "RateLimit",
    "Validation",
    "WebSocketConsumer",
    "channels_router",
    "handles",
    "inbound",
    "lifespan",
    "outbound",
    "receives",
]
