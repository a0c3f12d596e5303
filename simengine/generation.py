"""Generation: one generating request, from its decoded body to its last byte.

Builds the plan, submits the job, and turns the scheduler's steps into a whole body or an event stream. The client's
leaving aborts the job; faults halt it. Nothing outlives the exchange.
"""

import random
import time
from collections.abc import Callable
from typing import Any

from simengine.answers.messages import MessagesAnswer
from simengine.answers.plan import Answer, Choice, Plan
from simengine.bodies import CompletionBody, Generation
from simengine.connection import Exchange
from simengine.engine import Engine
from simengine.errors import ApiError, bad_request, internal, queue_full
from simengine.event_stream import EventStream, FaultyEventStream
from simengine.faults import NO_FAULTS, Faults
from simengine.memo import Memo
from simengine.reply import reply
from simengine.scheduler import Job, QueueFull
from simengine.vocabulary import count_tokens, quoted

_STREAM_ERROR = (
    b'data: {"error":{"message":"Internal server error","type":"InternalServerError","param":null,"code":500}}\n\n'
)
_ANTHROPIC_STREAM_ERROR = (
    b'event: error\ndata: {"type":"error","error":{"type":"internal_error","message":"Internal server error"}}\n\n'
)
_STREAM_QUEUE_FULL = (
    b'data: {"error":{"object":"error","message":"The request queue is full.","type":"SERVICE_UNAVAILABLE",'
    b'"param":null,"code":503}}\n\n'
)
_DONE = b"data: [DONE]\n\n"
_BYTE_FAULTS = ("cut_every_bytes", "cut_at", "gzip", "crlf", "comments")


def request_id(exchange: Exchange) -> bytes:
    """x-request-id, ready for the inside of a JSON string; a random one where the client sent none."""
    given = exchange.header(b"x-request-id")
    if given:
        return quoted(given.decode("latin-1"))
    return b"%032x" % random.getrandbits(128)


def make_plan(engine: Engine, exchange: Exchange, model: bytes, prompt_tokens: int, faults: Faults) -> Plan:
    """A plan without choices."""
    settings = engine.settings
    return Plan(
        request_id=request_id(exchange),
        model=model,
        created_s=int(time.time()),
        flavor=settings.flavor,
        prompt_tokens=prompt_tokens,
        cached_tokens=0,
        choices=[],
        usage=faults.usage or settings.usage,
        include_usage=False,
        details=settings.prompt_tokens_details,
        block_size_tokens=settings.block_size_tokens,
        no_usage=faults.no_usage,
    )


def generate(
    engine: Engine,
    exchange: Exchange,
    body: Generation,
    model: bytes,
    answer_type: Callable[[Plan], Answer],
    faults: Faults,
    memo: Memo | None,
) -> None:
    """Answer now or later. `memo` remembers a plain answer.

    Raises:
        ApiError: for what the engine refuses before any header.
    """
    prompt, media = body.prompt()
    if isinstance(body, CompletionBody):
        prompts = body.prompts()
        prompt_tokens = sum([count_tokens(len(each)) for each in prompts])
    else:
        prompts = [prompt]
        prompt_tokens = count_tokens(len(prompt), media)
    output_tokens = _output_tokens(engine, body, max(prompt_tokens // len(prompts), 1) if prompts else 1)
    if not prompts:
        raise bad_request("prompt must not be empty", "prompt")
    plan = make_plan(engine, exchange, model, prompt_tokens, faults)
    if engine.prefixes is not None:
        plan.cached_tokens = sum([engine.prefixes.look_up(each, count_tokens(len(each))) for each in prompts])
    options = body.stream_options
    if options is not None and options.include_usage:
        plan.include_usage = True
        if options.continuous_usage_stats and plan.usage == "own":
            plan.usage = "continuous"
    limited = body.output_tokens() is not None
    stops = body.stops()
    plan.tool = quoted(body.called_tool())
    plan.top_logprobs = body.logprobs_asked()
    for each in prompts:
        for index in range(_copies(engine, body)):
            start = engine.vocabulary.start(each, body.seed, index)
            if stops:
                plan.choices.append(_until_stop(engine, start, output_tokens, stops, limited))
            else:
                pieces = engine.vocabulary.quoted_words(start, output_tokens)
                plan.choices.append(Choice(pieces, b"length" if limited else b"stop"))
    if memo is not None and not body.stream:
        memo.keep(exchange.body, plan, answer_type)
    _Run(engine, exchange, plan, answer_type(plan), bool(body.stream), faults).begin(prompt)


class _Run:
    """The callbacks between a job and its exchange."""

    __slots__ = ("_answer", "_engine", "_exchange", "_faults", "_job", "_opened", "_out", "_plan")

    def __init__(
        self, engine: Engine, exchange: Exchange, plan: Plan, answer: Answer, stream: bool, faults: Faults
    ) -> None:
        self._engine = engine
        self._exchange = exchange
        self._plan = plan
        self._answer = answer
        self._faults = faults
        self._opened = False
        self._out: EventStream | None = None
        lengths = tuple([len(choice.pieces) for choice in plan.choices])
        job = Job(
            engine.scheduler,
            plan.prompt_tokens,
            plan.cached_tokens,
            lengths,
            "stop" if plan.choices[0].finish_reason == b"stop" else "length",
            stream,
            self._on_tokens if stream else None,
            self._on_stream_done if stream else self._on_done,
        )
        self._job = job
        if faults is not NO_FAULTS:
            self._arm(job, faults)
        if stream:
            broken = faults is not NO_FAULTS and any(getattr(faults, name) for name in _BYTE_FAULTS)
            self._out = FaultyEventStream(exchange, faults) if broken else EventStream(exchange)

    def begin(self, prompt: bytes) -> None:
        out = self._out
        self._exchange.on_lost = self._on_lost
        if out is not None:
            if self._engine.scheduler.full:
                self._engine.counters.rejected += 1
                self._refuse_stream(out)
                return
            # As real engines do: status and headers leave at once, even while the request is queued.
            out.open()
        self._submit(prompt)

    def _submit(self, prompt: bytes) -> None:
        try:
            self._engine.scheduler.submit(self._job, prompt)
        except QueueFull:
            raise queue_full(self._plan.flavor) from None

    def _refuse_stream(self, out: EventStream) -> None:
        if self._plan.flavor == "vllm":
            raise queue_full("vllm")
        out.open()
        out.send([_STREAM_QUEUE_FULL, _DONE])
        out.end()

    def _arm(self, job: Job, faults: Faults) -> None:
        for after, halt in (
            (faults.reset_after_chunks, self._reset),
            (faults.stall_after_chunks, self._stall),
            (faults.error_after_chunks, self._error),
        ):
            if after is not None and after <= job.total:
                job.halt_at = after
                job.on_halt = halt
                return

    def _on_tokens(self, first: int, last: int) -> None:
        out = self._out
        if out is None:
            return
        if self._opened:
            out.send(self._answer.tokens(first, last))
        else:
            # In this order: some APIs number their events.
            self._opened = True
            events = self._answer.opening()
            events += self._answer.tokens(first, last)
            out.send(events)

    def _on_stream_done(self) -> None:
        out = self._out
        if out is not None:
            out.send(self._answer.closing())
            out.end()

    def _on_done(self) -> None:
        reply(self._exchange, 200, self._answer.whole(), self._faults, self._engine.load_header(self._exchange))

    def _on_lost(self) -> None:
        self._engine.scheduler.abort(self._job)

    def _stall(self) -> None:
        """Nothing: the job keeps its slot until the client leaves."""

    def _reset(self) -> None:
        self._engine.scheduler.abort(self._job)
        if self._out is not None:
            self._out.reset()
            return
        body = self._answer.whole()
        framing = b"content-length: %d\r\n" % len(body)
        if self._job.halt_at:
            self._exchange.write(
                self._exchange.head(200, b"application/json", framing) + body[: len(body) // 2],
            )
        self._exchange.reset()

    def _error(self) -> None:
        self._engine.scheduler.fail(self._job)
        anthropic = isinstance(self._answer, MessagesAnswer)
        if self._out is not None:
            self._out.send([_ANTHROPIC_STREAM_ERROR] if anthropic else [_STREAM_ERROR, _DONE])
            self._out.end()
        else:
            self._exchange.reply(500, internal("Internal server error").body(self._plan.flavor, anthropic))


def _copies(engine: Engine, body: Generation) -> int:
    copies = 1 if body.n is None else body.n
    if copies == 1:
        return 1
    if not 1 <= copies <= 128:
        raise bad_request(f"n must be between 1 and 128, got {copies}", "n")
    if engine.settings.flavor == "vllm" and body.temperature == 0:
        raise bad_request("n must be 1 when using greedy sampling", "n")
    return copies


def _output_tokens(engine: Engine, body: Generation, prompt_tokens: int) -> int:
    settings = engine.settings
    room = settings.max_model_len - prompt_tokens
    if room < 1:
        raise bad_request(
            f"This model's maximum context length is {settings.max_model_len} tokens; "
            f"the prompt contains {prompt_tokens} input tokens",
            "input_tokens",
        )
    asked = body.output_tokens()
    if asked is None:
        return min(settings.default_output_tokens, room)
    param = body.output_param()
    if asked < 1:
        raise bad_request(f"{param} must be at least 1, got {asked}", param)
    if asked > (room if settings.flavor == "sglang" else settings.max_model_len):
        raise bad_request(f"{param} is too large: {asked}", param)
    return min(asked, room)


def _until_stop(engine: Engine, start: int, count: int, stops: list[str], limited: bool) -> Choice:
    """The tokens up to and including the one that completes a stop string; the string itself is cut from the text."""
    words = engine.vocabulary.words(start, count)
    text = "".join(words)
    found = min(
        ((text.find(stop), stop) for stop in stops if stop and stop in text),
        key=lambda hit: hit[0] + len(hit[1]),
        default=None,
    )
    if found is None:
        return Choice([quoted(word) for word in words], b"length" if limited else b"stop")
    at, stop = found
    pieces: list[bytes] = []
    begin = 0
    for word in words:
        if begin >= at + len(stop):
            break
        pieces.append(quoted(word[: max(0, at - begin)]))
        begin += len(word)
    return Choice(pieces, b"stop", b'"%b"' % quoted(stop))


def pool(
    engine: Engine, exchange: Exchange, plan: Plan, render: Callable[[], bytes], faults: Faults, spice: bytes
) -> None:
    """A request that generates nothing: one prefill, one answer.

    Raises:
        ApiError: the queue is full.
    """

    def done() -> None:
        reply(exchange, 200, render(), faults)

    job = Job(engine.scheduler, plan.prompt_tokens, 0, (), "stop", False, None, done)
    exchange.on_lost = lambda: engine.scheduler.abort(job)
    try:
        engine.scheduler.submit(job, spice)
    except QueueFull:
        raise queue_full(plan.flavor) from None


def api_error_reply(exchange: Exchange, error: ApiError, flavor: Any, anthropic: bool) -> None:
    """The engine's refusal."""
    exchange.on_lost = None
    exchange.reply(error.status, error.body(flavor, anthropic))
