"""Scheduler: which requests run, which wait, and when each one's tokens are there.

A job runs when a slot and enough KV blocks are free, else it waits in order of arrival. Its first token comes after the
time to first token, the others after the inter-token latency. A job that ends or is aborted gives its slot to the next.
All counting happens before a token is handed on: a scrape made after an answer sees that answer.
"""

import asyncio
import zlib
from collections import deque
from collections.abc import Callable
from typing import Literal, TypeAlias

from simengine.counters import Counters
from simengine.settings import Settings
from simengine.wheel import Wheel

_MAX_LAG_S = 0.1
"""a stream that is later than this does not try to catch up"""
Ending: TypeAlias = Literal["stop", "length", "abort", "error", ""]


class Job:
    """One request's generation. `on_tokens(first, last)` gets each new half-open range of token positions."""

    __slots__ = (
        "aborted",
        "arrived_s",
        "blocks",
        "cached_tokens",
        "done",
        "due_s",
        "ending",
        "first_token_s",
        "halt_at",
        "held_tokens",
        "last_token_s",
        "lengths",
        "on_done",
        "on_halt",
        "on_tokens",
        "plain",
        "position",
        "prompt_tokens",
        "running",
        "scale",
        "scheduler",
        "started_s",
        "stream",
        "total",
    )

    def __init__(
        self,
        scheduler: "Scheduler",
        prompt_tokens: int,
        cached_tokens: int,
        lengths: tuple[int, ...],
        ending: Ending,
        stream: bool,
        on_tokens: Callable[[int, int], None] | None,
        on_done: Callable[[], None],
    ) -> None:
        self.scheduler = scheduler
        self.prompt_tokens = prompt_tokens
        self.cached_tokens = cached_tokens
        self.lengths = lengths
        """tokens of each choice"""
        self.total = max(lengths, default=0)
        self.ending = ending
        self.stream = stream
        self.on_tokens = on_tokens
        self.on_done = on_done
        self.halt_at: int | None = None
        """stop after so many tokens without ending, and call `on_halt`"""
        self.on_halt: Callable[[], None] | None = None
        self.position = 0
        self.plain = False
        """one choice, one token a step, no halt"""
        self.running = False
        self.done = False
        self.aborted = False
        self.scale = 1.0
        self.blocks = 0
        self.held_tokens = 0
        self.arrived_s = self.started_s = self.first_token_s = self.last_token_s = self.due_s = 0.0

    def step(self) -> None:
        if self.running:
            self.scheduler.step(self)

    def produced(self, position: int) -> int:
        """Tokens of all choices up to a position."""
        if len(self.lengths) == 1:
            return position
        return sum(min(position, length) for length in self.lengths)


class QueueFull(Exception):  # noqa: N818 - it names the engine's state
    """The bound on running and waiting requests is reached."""


class Scheduler:
    """Owned by the server; `close` at its end."""

    def __init__(self, settings: Settings, counters: Counters, loop: asyncio.AbstractEventLoop) -> None:
        self._settings = settings
        self._counters = counters
        self._loop = loop
        self.wheel = Wheel(loop)
        self._waiting: deque[Job] = deque()
        self._running: set[Job] = set()
        self._free_blocks = settings.kv_blocks
        self._held_tokens = 0
        self._admitting = False
        self._ttft_s = settings.ttft_ms / 1e3
        self._prefill_s_per_token = settings.prefill_ms_per_1k_tokens / 1e6
        self._itl_s = settings.itl_ms / 1e3
        self._itl_s_per_running = settings.itl_ms_per_running / 1e3
        paced = self._itl_s > 0 or self._itl_s_per_running > 0
        self._paced = paced
        self._step_tokens = settings.tokens_per_step or (1 if paced else 1 << 60)
        self.immediate = not paced and not settings.ttft_ms and not settings.prefill_ms_per_1k_tokens

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def full(self) -> bool:
        bound = self._settings.max_queued_requests
        return bool(bound) and len(self._running) + len(self._waiting) >= bound

    @property
    def kv_usage(self) -> float:
        """0..1"""
        return min(1.0, self._held_tokens / (self._settings.kv_blocks * self._settings.block_size_tokens))

    @property
    def held_tokens(self) -> int:
        return self._held_tokens

    def submit(self, job: Job, spice: bytes = b"") -> None:
        """Start or enqueue; may finish the job before it returns. `spice` seeds the job's jitter.

        Raises:
            QueueFull: nothing was counted but the refusal.
        """
        if self.full:
            self._counters.rejected += 1
            raise QueueFull
        tokens = job.prompt_tokens + sum(job.lengths)
        size = self._settings.block_size_tokens
        job.blocks = min(self._settings.kv_blocks, (tokens + size - 1) // size)
        job.plain = self._paced and self._step_tokens == 1 and len(job.lengths) == 1 and job.halt_at is None
        job.arrived_s = self._loop.time()
        if self._settings.jitter:
            drawn = zlib.crc32(spice, self._settings.seed & 0xFFFFFFFF) / 0xFFFFFFFF
            job.scale = 1.0 + self._settings.jitter * (2.0 * drawn - 1.0)
        self._waiting.append(job)
        self._admit()

    def try_at_once(self, prompt_tokens: int, generated_tokens: int, ending: str) -> bool:
        """Account for a request that needs no time, without a job. False: there is no free slot, submit one."""
        if len(self._running) >= self._settings.max_running or self._waiting or self.full:
            return False
        counters = self._counters
        counters.first_token(prompt_tokens, 0, 0.0)
        counters.generation_tokens += generated_tokens
        counters.finished(ending, 0.0, 0.0)
        return True

    def abort(self, job: Job) -> None:
        """The client left: stop at once. Not counted as an ending, as vLLM does not count it."""
        if job.done or job.aborted:
            return
        job.aborted = True
        self._counters.aborted += 1
        if job.running:
            self._release(job)
            self._admit()
        else:
            self._waiting.remove(job)

    def fail(self, job: Job) -> None:
        """The engine itself gave up on the job."""
        if not job.done and not job.aborted:
            job.done = True
            self._counters.endings["error"] += 1
            if job.running:
                self._release(job)
                self._admit()

    def step(self, job: Job) -> None:
        """The job's next tokens are there."""
        counters = self._counters
        now_s = self._loop.time()
        first = job.position
        if first and job.plain and first + 1 < job.total:
            # One token in the middle of one answer: nearly all steps of a paced engine, so written out.
            counters.inter_token.observe(now_s - job.last_token_s)
            counters.generation_tokens += 1
            job.held_tokens += 1
            self._held_tokens += 1
            job.last_token_s = now_s
            job.position = first + 1
            gap_s = self._itl_s + self._itl_s_per_running * (len(self._running) - 1)
            job.due_s = due_s = max(job.due_s + gap_s * job.scale, now_s - _MAX_LAG_S)
            self.wheel.at(due_s, job.step)
            if job.on_tokens is not None:
                job.on_tokens(first, first + 1)
            return
        last = first + self._step_tokens
        last = min(last, job.total)
        halt = job.halt_at
        if halt is not None and last >= halt:
            last = halt
        if first == 0:
            counters.first_token(job.prompt_tokens, job.cached_tokens, now_s - job.arrived_s)
            job.first_token_s = now_s
            # Everything after the first token of the first step came with it: no gaps to observe.
            self._hold(job, job.prompt_tokens)
        elif last > first:
            counters.inter_token.observe((now_s - job.last_token_s) / (last - first), last - first)
        job.last_token_s = now_s
        if last > first:
            produced = job.produced(last) - job.produced(first)
            counters.generation_tokens += produced
            self._hold(job, produced)
            job.position = last
        ended = last >= job.total and halt is None
        if ended:
            job.done = True
            counters.finished(job.ending, now_s - job.arrived_s, job.started_s - job.arrived_s)
            self._release(job)
        if job.on_tokens is not None and last > first:
            job.on_tokens(first, last)
        if ended:
            job.on_done()
            if self._waiting:
                self._admit()
        elif halt is not None and last >= halt:
            if job.on_halt is not None:
                job.on_halt()
        elif job.running:
            self._schedule_next(job, now_s)

    def close(self) -> None:
        self.wheel.close()
        self._waiting.clear()
        self._running.clear()

    def _schedule_next(self, job: Job, now_s: float) -> None:
        if not self._paced:
            self._loop.call_soon(job.step)
            return
        gap_s = self._itl_s + self._itl_s_per_running * (len(self._running) - 1)
        # From the last due time, not from now: the wheel's rounding must not add up over a stream.
        job.due_s = max(job.due_s + gap_s * job.scale, now_s - _MAX_LAG_S)
        self.wheel.at(job.due_s, job.step)

    def _admit(self) -> None:
        if self._admitting:
            return
        # A loop, not a recursion: a job without latency ends inside its own start.
        self._admitting = True
        try:
            while self._waiting and len(self._running) < self._settings.max_running:
                job = self._waiting[0]
                if job.blocks > self._free_blocks:
                    break
                self._waiting.popleft()
                self._start(job)
        finally:
            self._admitting = False

    def _start(self, job: Job) -> None:
        self._free_blocks -= job.blocks
        self._running.add(job)
        job.running = True
        if self.immediate:
            job.started_s = job.arrived_s
            self.step(job)
            return
        job.started_s = self._loop.time()
        computed = job.prompt_tokens - job.cached_tokens
        job.due_s = job.started_s + (self._ttft_s + self._prefill_s_per_token * computed) * job.scale
        self.wheel.at(job.due_s, job.step)

    def _hold(self, job: Job, tokens: int) -> None:
        job.held_tokens += tokens
        self._held_tokens += tokens

    def _release(self, job: Job) -> None:
        job.running = False
        self._running.discard(job)
        self._free_blocks += job.blocks
        self._held_tokens -= job.held_tokens
        job.held_tokens = 0
