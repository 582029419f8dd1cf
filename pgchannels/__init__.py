"""Durable messaging for FastAPI, inside the PostgreSQL that the application already has."""

from pgchannels.channels import EVERYONE, presence_channel
from pgchannels.configuration import (
    forget_channel_layers,
    get_channel_layer,
    get_channel_layer_from_env,
)
from pgchannels.control import Command
from pgchannels.envelopes import websocket_bytes_message, websocket_json_message
from pgchannels.errors import (
    ChannelFull,
    ChannelLayerClosed,
    ConfigurationError,
    DatabaseError,
    DatabaseUnavailable,
    FollowerLost,
    GroupFull,
    InvalidChannel,
    InvalidFilter,
    InvalidMessage,
    InvalidPayload,
    InvalidPosition,
    InvalidUser,
    MessageTooLarge,
    PGChannelsError,
    SchemaError,
    SlowConsumer,
    TooManyConnections,
    UnknownPosition,
)
from pgchannels.follower import Batch, Follower
from pgchannels.layer import ChannelLayer
from pgchannels.limits import Limits
from pgchannels.memory import MemoryLayer
from pgchannels.messages import BEGINNING, Message, Position
from pgchannels.overflow import Overflow
from pgchannels.payloads import Serializer
from pgchannels.postgres import PostgresLayer
from pgchannels.rates import Admission, FixedWindow, TokenBucket
from pgchannels.records import ConnectionInfo, FollowerStatus, HistoryPage, Present, Receipt
from pgchannels.settings import Settings
from pgchannels.stream import Stream

__all__ = [
    "BEGINNING",
    "EVERYONE",
    "Admission",
    "Batch",
    "ChannelFull",
    "ChannelLayer",
    "ChannelLayerClosed",
    "Command",
    "ConfigurationError",
    "ConnectionInfo",
    "DatabaseError",
    "DatabaseUnavailable",
    "FixedWindow",
    "Follower",
    "FollowerLost",
    "FollowerStatus",
    "GroupFull",
    "HistoryPage",
    "InvalidChannel",
    "InvalidFilter",
    "InvalidMessage",
    "InvalidPayload",
    "InvalidPosition",
    "InvalidUser",
    "Limits",
    "MemoryLayer",
    "Message",
    "MessageTooLarge",
    "Overflow",
    "PGChannelsError",
    "Position",
    "PostgresLayer",
    "Present",
    "Receipt",
    "SchemaError",
    "Serializer",
    "Settings",
    "SlowConsumer",
    "Stream",
    "TokenBucket",
    "TooManyConnections",
    "UnknownPosition",
    "forget_channel_layers",
    "get_channel_layer",
    "get_channel_layer_from_env",
    "presence_channel",
    "websocket_bytes_message",
    "websocket_json_message",
]
