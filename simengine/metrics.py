"""The metrics page, in vLLM's and in SGLang's names and labels (versions 0.32 and 0.5.23), without their HELP prose."""

from collections.abc import Iterable

from simengine.counters import Counters, Histogram
from simengine.engine import Engine

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"


class _Page:
    __slots__ = ("_base", "_lines", "_typed")

    def __init__(self, base_labels: dict[str, str]) -> None:
        self._base = base_labels
        self._lines: list[str] = []
        self._typed: set[str] = set()

    def sample(self, kind: str, name: str, value: float, *, base: bool = True, **labels: str) -> None:
        # The classic text format types a counter under its full name, `_total` included.
        self._type(kind, name)
        self._lines.append(f"{name}{self._labels(labels, base=base)} {float(value)!r}")

    def histogram(self, name: str, histogram: Histogram, **labels: str) -> None:
        self._type("histogram", name)
        seen = 0
        for bound, count in zip((*map(str, histogram.bounds), "+Inf"), histogram.buckets, strict=True):
            seen += count
            self._lines.append(f"{name}_bucket{self._labels({**labels, 'le': bound})} {float(seen)!r}")
        self._lines.append(f"{name}_count{self._labels(labels)} {float(seen)!r}")
        self._lines.append(f"{name}_sum{self._labels(labels)} {histogram.total!r}")

    def render(self) -> bytes:
        return ("\n".join(self._lines) + "\n").encode()

    def _type(self, kind: str, name: str) -> None:
        if name not in self._typed:
            self._typed.add(name)
            self._lines.append(f"# HELP {name} Simulated.")
            self._lines.append(f"# TYPE {name} {kind}")

    def _labels(self, labels: dict[str, str], base: bool = True) -> str:
        pairs = {**self._base, **labels} if base else labels
        inner = ",".join(f'{name}="{_escaped(value)}"' for name, value in pairs.items())
        return f"{{{inner}}}" if inner else ""


def render(engine: Engine) -> bytes:
    """The whole page of the engine's flavor."""
    return _sglang(engine) if engine.settings.flavor == "sglang" else _vllm(engine)


def _vllm(engine: Engine) -> bytes:
    counters, scheduler, settings = engine.counters, engine.scheduler, engine.settings
    page = _Page({"engine": "0", "model_name": settings.models[0]})
    page.sample("gauge", "vllm:num_requests_running", scheduler.running)
    page.sample("gauge", "vllm:num_requests_waiting", scheduler.waiting)
    page.sample("gauge", "vllm:num_requests_waiting_by_reason", scheduler.waiting, reason="capacity")
    page.sample("gauge", "vllm:num_requests_waiting_by_reason", 0, reason="deferred")
    page.sample("gauge", "vllm:engine_sleep_state", 1, sleep_state="awake")
    page.sample("gauge", "vllm:engine_sleep_state", 0, sleep_state="weights_offloaded")
    page.sample("gauge", "vllm:engine_sleep_state", 0, sleep_state="discard_all")
    page.sample("gauge", "vllm:kv_cache_usage_perc", scheduler.kv_usage)
    page.sample("counter", "vllm:prefix_cache_queries_total", counters.prompt_tokens)
    page.sample("counter", "vllm:prefix_cache_hits_total", counters.cached_tokens)
    page.sample("counter", "vllm:num_preemptions_total", 0)
    page.sample("counter", "vllm:prompt_tokens_total", counters.prompt_tokens)
    by_source = {
        "local_compute": counters.prompt_tokens - counters.cached_tokens,
        "local_cache_hit": counters.cached_tokens,
        "external_kv_transfer": 0,
    }
    for source, tokens in by_source.items():
        page.sample("counter", "vllm:prompt_tokens_by_source_total", tokens, source=source)
    page.sample("counter", "vllm:prompt_tokens_cached_total", counters.cached_tokens)
    page.sample("counter", "vllm:generation_tokens_total", counters.generation_tokens)
    for reason, count in counters.endings.items():
        page.sample("counter", "vllm:request_success_total", count, finished_reason=reason)
    page.sample(
        "counter", "vllm:admission_rejections_total", counters.rejected, base=False, reason="max_num_queued_reqs"
    )
    page.histogram("vllm:time_to_first_token_seconds", counters.ttft)
    page.histogram("vllm:inter_token_latency_seconds", counters.inter_token)
    page.histogram("vllm:e2e_request_latency_seconds", counters.e2e)
    page.histogram("vllm:request_queue_time_seconds", counters.queue)
    page.sample(
        "gauge",
        "vllm:cache_config_info",
        1,
        base=False,
        block_size=str(settings.block_size_tokens),
        enable_prefix_caching=str(settings.prefix_cache),
        engine="0",
        kv_cache_size_tokens=str(settings.kv_blocks * settings.block_size_tokens),
        num_gpu_blocks=str(settings.kv_blocks),
    )
    _http(page, counters, "http_requests_total")
    return page.render()


def _sglang(engine: Engine) -> bytes:
    counters, scheduler, settings = engine.counters, engine.scheduler, engine.settings
    capacity = settings.kv_blocks * settings.block_size_tokens
    page = _Page(
        {"engine_type": "unified", "model_name": settings.models[0], "tp_rank": "0", "pp_rank": "0", "moe_ep_rank": "0"}
    )
    gauges = {
        "num_running_reqs": scheduler.running,
        "num_queue_reqs": scheduler.waiting,
        "num_used_tokens": scheduler.held_tokens,
        "token_usage": scheduler.kv_usage,
        "kv_available_tokens": capacity - scheduler.held_tokens,
        "kv_evictable_tokens": 0,
        "cache_hit_rate": counters.cached_tokens / counters.prompt_tokens if counters.prompt_tokens else 0.0,
        "max_total_num_tokens": capacity,
        "page_size": settings.block_size_tokens,
    }
    for name, value in gauges.items():
        page.sample("gauge", f"sglang:{name}", value)
    front = _Page({"engine_type": "unified", "model_name": settings.models[0]})
    front.histogram("sglang:time_to_first_token_seconds", counters.ttft, is_streaming="true")
    front.histogram("sglang:e2e_request_latency_seconds", counters.e2e, is_streaming="true")
    front.histogram("sglang:inter_token_latency_seconds", counters.inter_token)
    front.sample("counter", "sglang:prompt_tokens_total", counters.prompt_tokens, is_streaming="true")
    front.sample("counter", "sglang:generation_tokens_total", counters.generation_tokens, is_streaming="true")
    front.sample("counter", "sglang:cached_tokens_total", counters.cached_tokens, cache_source="device")
    front.sample("counter", "sglang:num_requests_total", counters.requests)
    front.sample("counter", "sglang:num_aborted_requests_total", counters.aborted)
    _http(front, counters, "http_requests_total")
    return page.render() + front.render()


def _http(page: _Page, counters: Counters, name: str) -> None:
    for (path, status), count in _sorted(counters.http.items()):
        page.sample("counter", name, count, base=False, handler=path, status=f"{status // 100}xx")


def _sorted(items: Iterable[tuple[tuple[str, int], int]]) -> list[tuple[tuple[str, int], int]]:
    """One sample per path and status class."""
    merged: dict[tuple[str, int], int] = {}
    for (path, status), count in items:
        key = (path, status // 100 * 100)
        merged[key] = merged.get(key, 0) + count
    return sorted(merged.items())


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
