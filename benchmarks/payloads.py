"""The payload of every benchmark: 200 bytes as JSON."""

from __future__ import annotations

import orjson

__all__ = ["PAYLOAD", "PAYLOAD_TEXT"]

_SIZE = 200
_PAYLOAD = {
    "type": "order.paid",
    "order": 123456,
    "customer": "Ada Lovelace",
    "total": 99.5,
    "note": "",
}

PAYLOAD = {**_PAYLOAD, "note": "x" * (_SIZE - len(orjson.dumps(_PAYLOAD)))}
PAYLOAD_TEXT = orjson.dumps(PAYLOAD).decode()
