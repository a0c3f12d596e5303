"""What a user can choose about the simulated engine; one immutable record, read everywhere, changed nowhere."""

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from simengine.faults import NO_FAULTS, Faults

Flavor: TypeAlias = Literal["vllm", "sglang"]
UsagePlacement: TypeAlias = Literal["own", "finish", "continuous", "never"]


@dataclass(frozen=True, slots=True)
class Settings:
    models: tuple[str, ...] = ("sim",)
    """served names; requests may use any, vLLM answers with the first"""
    flavor: Flavor = "vllm"
    seed: int = 0
    awkward_text: bool = False
    """tokens that look like usage, [DONE] and event borders, and tokens outside ASCII"""

    ttft_ms: float = 0.0
    """from the start of a request's prefill to its first token"""
    prefill_ms_per_1k_tokens: float = 0.0
    """added to the first token, for every 1000 prompt tokens that are not cached"""
    itl_ms: float = 0.0
    """between two tokens of one stream"""
    itl_ms_per_running: float = 0.0
    """added between two tokens for every other running request: an engine that slows down under load"""
    jitter: float = 0.0
    """0.2 draws each request's latencies from ±20 %, by seed and prompt"""
    tokens_per_step: int = 0
    """tokens that leave in one write; 0: one if there is an inter-token latency, else all"""

    max_running: int = 256
    max_queued_requests: int = 0
    """running and waiting together; one more is refused with 503; 0 is no bound"""
    kv_blocks: int = 65536
    block_size_tokens: int = 16
    prefix_cache: bool = False
    max_model_len: int = 131072
    default_output_tokens: int = 16
    """how long an answer is when the request sets no max_tokens"""

    usage: UsagePlacement = "own"
    prompt_tokens_details: bool = False
    """vLLM's --enable-prompt-tokens-details, SGLang's --enable-cache-report"""

    api_key: str = ""
    keep_alive_timeout_s: float = 5.0
    max_body_bytes: int = 64 * 1024 * 1024
    shutdown_timeout_s: float = 20.0
    allow_fault_headers: bool = False
    record: int = 0
    faults: Faults = field(default=NO_FAULTS)
