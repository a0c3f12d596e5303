"""Engine: the parts that all requests of one process share."""

import asyncio

import msgspec

from simengine.connection import Exchange
from simengine.counters import Counters
from simengine.errors import unknown_model
from simengine.faults import ActiveFaults
from simengine.prefixes import PrefixCache
from simengine.recorder import Recorder
from simengine.scheduler import Scheduler
from simengine.settings import Settings
from simengine.vocabulary import Vocabulary, quoted


class Engine:
    """Made on the running loop, closed by the server."""

    def __init__(self, settings: Settings, loop: asyncio.AbstractEventLoop) -> None:
        self.settings = settings
        self.counters = Counters()
        self.scheduler = Scheduler(settings, self.counters, loop)
        self.vocabulary = Vocabulary(settings.seed, settings.awkward_text)
        self.prefixes = PrefixCache(settings.kv_blocks, settings.block_size_tokens) if settings.prefix_cache else None
        self.faults = ActiveFaults(settings.faults)
        self.recorder = Recorder(settings.record)
        self.memorable = self.scheduler.immediate and self.prefixes is None
        """plain answers depend on the body alone, and need no time"""
        self._answered_name = quoted(settings.models[0])

    def model_name(self, asked: str | None) -> bytes:
        """The name that the answer carries, JSON-escaped.

        Raises:
            ApiError: 404, with the names that are served. SGLang accepts and echoes any name.
        """
        if asked is None or asked in self.settings.models:
            return self._answered_name if self.settings.flavor == "vllm" or asked is None else quoted(asked)
        if self.settings.flavor == "sglang":
            return quoted(asked)
        raise unknown_model(asked, self.settings.models)

    def load_header(self, exchange: Exchange) -> bytes:
        """ORCA's header line, for a plain request that asked for it."""
        wanted = exchange.header(b"endpoint-load-metrics-format")
        if not wanted or self.settings.flavor != "vllm":
            return b""
        load = {
            "num_requests_waiting": float(self.scheduler.waiting),
            "kv_cache_usage_perc": self.scheduler.kv_usage,
        }
        if wanted.upper() == b"TEXT":
            pairs = ", ".join(f"named_metrics.{name}={value}" for name, value in load.items())
            return f"endpoint-load-metrics: TEXT {pairs}\r\n".encode()
        return b"endpoint-load-metrics: JSON " + msgspec.json.encode({"named_metrics": load}) + b"\r\n"

    def close(self) -> None:
        self.scheduler.close()
