"""FastAPI: sockets that follow channels, history over REST, and the layer's lifespan."""

from pgchannels.web.consumers import JsonConsumer
from pgchannels.web.history import channels_router
from pgchannels.web.lifespan import lifespan

__all__ = ["JsonConsumer", "channels_router", "lifespan"]
