"""Counters: what the engine did, exactly. The metrics page is a rendering of these, nothing else is counted."""

from bisect import bisect_left


class Histogram:
    """Cumulative at rendering, not at observing."""

    __slots__ = ("bounds", "buckets", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.buckets = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        self.buckets[bisect_left(self.bounds, value)] += count
        self.total += value * count

    @property
    def count(self) -> int:
        return sum(self.buckets)


_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_ITL_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_E2E_S = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0)


class Counters:
    """Plain integers: one event loop writes and reads them."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        """of requests that reached their first token"""
        self.cached_tokens = 0
        self.generation_tokens = 0
        """handed to the connection"""
        self.requests = 0
        """that were asked for a generation or an embedding, refused ones included"""
        self.endings = {"stop": 0, "length": 0, "abort": 0, "error": 0, "repetition": 0}
        self.aborted = 0
        """clients that left before the end; vLLM shows these nowhere, SGLang does"""
        self.rejected = 0
        self.http: dict[tuple[str, int], int] = {}
        """(path, status) → responses begun"""
        self.ttft = Histogram(_TTFT_S)
        self.inter_token = Histogram(_ITL_S)
        self.e2e = Histogram(_E2E_S)
        self.queue = Histogram(_E2E_S)

    def first_token(self, prompt_tokens: int, cached_tokens: int, after_s: float) -> None:
        self.prompt_tokens += prompt_tokens
        self.cached_tokens += cached_tokens
        self.ttft.observe(after_s)

    def finished(self, ending: str, e2e_s: float, queued_s: float) -> None:
        self.endings[ending] += 1
        self.e2e.observe(e2e_s)
        self.queue.observe(queued_s)
