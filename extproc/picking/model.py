"""What the picker is told and tells."""

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class Outcome(Enum):
    """How one attempt on an engine ended."""

    OK = "ok"
    """the engine answered, below 500"""
    FAILED = "failed"
    """the engine answered 5xx, or broke off its answer"""
    UNREACHABLE = "unreachable"
    """no connection, or it was lost before a byte of the answer"""
    ABANDONED = "abandoned"
    """the client left, or the engine was never asked: says nothing about the engine"""


class Pick(NamedTuple):
    addresses: tuple[str, ...]
    """the chosen engine's `ip:port`, then up to two others for Envoy to retry on; all different, all fit"""
    route: str
    """name of the chosen route; empty for the process's default engines"""


@dataclass(frozen=True, slots=True)
class HealthSettings:
    """Passive ejection and active probes. Times in seconds."""

    paths: tuple[str, ...] = ("/ready", "/health", "/v1/models")
    """tried in order while the answer is 404, and the one that is not is remembered. SGLang's /health generates a token
    and takes a second, its /ready does not; vLLM has /health; many OpenAI-compatible servers have only /v1/models"""
    interval_s: float = 2.0
    """between two probes of a fit engine, ± jitter"""
    down_interval_s: float = 0.5
    """between two probes of an engine that is down or in doubt, ± jitter"""
    probes_per_s: int = 100
    """of all fit engines together: in a large fleet each is probed less often. Probes take the time in which requests
    are decided; two thousand engines every two seconds took half of a core"""
    jitter: float = 0.1
    timeout_s: float = 1.0
    concurrency: int = 32
    """probes under way at once"""
    timeouts_until_down: int = 2
    """one timeout may be a busy event loop; a refused connection or a 5xx is proof at once"""
    losses_until_ejection: int = 3
    """times in a row that an engine was lost to requests though probes found it well"""
    failures_until_ejection: int = 5
    """5xx answers in a row"""
    ejection_s: float = 5.0
    """the first ejection; each further one takes twice as long"""
    max_ejection_s: float = 60.0


class EngineState(NamedTuple):
    """One engine as /readyz and metrics show it."""

    address: str
    healthy: bool
    """may be picked"""
    in_flight: int
    ejected_for_s: float
    """until its ejection ends; 0: not ejected. It then still has to answer a probe."""
    last_error: str
    """stable reason of its last trouble: unreachable, failed, refused, timeout, status_503; empty: none yet"""
