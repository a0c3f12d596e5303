"""Recorder: the last requests as they arrived, for tests that prove byte-exact pass-through."""

import base64
import hashlib
from collections import deque

import msgspec

from simengine.connection import Exchange


class Recorder:
    """Keeps the last `capacity` requests; 0 keeps none and costs nothing."""

    def __init__(self, capacity: int) -> None:
        self.enabled = capacity > 0
        self._kept: deque[Exchange] = deque(maxlen=capacity)

    def add(self, exchange: Exchange) -> None:
        self._kept.append(exchange)

    def clear(self) -> None:
        self._kept.clear()

    def to_json(self) -> bytes:
        """Oldest first. Header names in lower case; header values as latin-1; bodies as base64 and as SHA-256."""
        return msgspec.json.encode(
            [
                {
                    "method": exchange.method.decode("latin-1"),
                    "target": exchange.target.decode("latin-1"),
                    "headers": [[name.decode("latin-1"), value.decode("latin-1")] for name, value in exchange.headers],
                    "body_sha256": hashlib.sha256(exchange.body).hexdigest(),
                    "body_base64": base64.b64encode(exchange.body).decode(),
                }
                for exchange in self._kept
            ]
        )
