"""Durable messaging for FastAPI, inside the PostgreSQL that the application already has."""

from pgchannels.errors import (
    ChannelLayerClosed,
    ConfigurationError,
    DatabaseError,
    DatabaseUnavailable,
    InvalidChannel,
    InvalidMessage,
    InvalidPayload,
    InvalidPosition,
    MessageTooLarge,
    PGChannelsError,
    SchemaError,
    UnknownPosition,
)
from pgchannels.layer import HistoryPage, PostgresLayer
from pgchannels.messages import BEGINNING, Message, Position
from pgchannels.settings import Settings
from pgchannels.stream import Stream

__all__ = [
    "BEGINNING",
    "ChannelLayerClosed",
    "ConfigurationError",
    "DatabaseError",
    "DatabaseUnavailable",
    "HistoryPage",
    "InvalidChannel",
    "InvalidMessage",
    "InvalidPayload",
    "InvalidPosition",
    "Message",
    "MessageTooLarge",
    "PGChannelsError",
    "Position",
    "PostgresLayer",
    "SchemaError",
    "Settings",
    "Stream",
    "UnknownPosition",
]
