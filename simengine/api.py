"""Routes: from a parsed HTTP request to its handler, through record, key and faults."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

import msgspec

from simengine import metrics
from simengine.answers import pooling
from simengine.answers.chat_forms import chat_answer
from simengine.answers.completions import CompletionAnswer
from simengine.answers.messages import MessagesAnswer
from simengine.answers.plan import Answer, Plan
from simengine.answers.responses import ResponsesAnswer
from simengine.bodies import (
    ChatBody,
    CompletionBody,
    CountTokensBody,
    EmbeddingBody,
    Generation,
    MessagesBody,
    RerankBody,
    ResponsesBody,
    ScoreBody,
    inputs,
)
from simengine.connection import Exchange
from simengine.engine import Engine
from simengine.errors import ApiError, bad_request, queue_full
from simengine.faults import NO_FAULTS, Faults, faults_from_json, overlay, parse_faults
from simengine.generation import api_error_reply, generate, make_plan, pool, request_id
from simengine.memo import Memo
from simengine.reply import reply
from simengine.vocabulary import count_tokens

_T = TypeVar("_T")
_Post = Callable[[Exchange, Faults], None]
_ANTHROPIC = b"/v1/messages"
_NOT_FOUND = b'{"detail":"Not Found"}'
_NOT_ALLOWED = b'{"detail":"Method Not Allowed"}'


class Api:
    """One per process; `handle` is every connection's handler."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._posts: dict[bytes, _Post] = {
            b"/v1/chat/completions": self._generating(ChatBody, chat_answer),
            b"/v1/completions": self._generating(CompletionBody, CompletionAnswer),
            b"/v1/responses": self._generating(ResponsesBody, ResponsesAnswer),
            b"/v1/messages": self._generating(MessagesBody, MessagesAnswer),
            b"/v1/messages/count_tokens": self._count_tokens,
            b"/v1/embeddings": self._embeddings,
            b"/v1/score": self._score,
            b"/score": self._score,
            b"/v1/rerank": self._rerank,
            b"/v2/rerank": self._rerank,
            b"/rerank": self._rerank,
        }
        self._gets: dict[bytes, Callable[[Exchange], None]] = {
            b"/health": self._health,
            b"/ping": self._health,
            b"/v1/models": self._models,
            b"/version": self._version,
            b"/metrics": self._metrics,
            b"/load": self._load,
            b"/sim/requests": self._recorded,
            b"/sim/faults": self._faults,
        }
        if engine.settings.flavor == "sglang":
            self._gets[b"/ready"] = self._gets[b"/health_generate"] = self._health
            self._gets[b"/v1/loads"] = self._loads

    def handle(self, exchange: Exchange) -> None:
        path = exchange.target.partition(b"?")[0]
        if exchange.method == b"POST":
            post = self._posts.get(path)
            if post is not None:
                self._post(exchange, path, post)
                return
            if path == b"/sim/faults":
                self._set_faults(exchange)
                return
        elif exchange.method == b"GET":
            get = self._gets.get(path)
            if get is not None:
                if path.startswith(b"/v1/") and not self._authorized(exchange):
                    return
                get(exchange)
                return
        elif exchange.method == b"DELETE" and path == b"/sim/requests":
            # What is forgotten is told, so that nothing that comes between a look and this is lost.
            self._recorded(exchange)
            self._engine.recorder.clear()
            return
        known = path in self._posts or path in self._gets
        exchange.reply(405 if known else 404, _NOT_ALLOWED if known else _NOT_FOUND)

    # Generating and pooling requests

    def _post(self, exchange: Exchange, path: bytes, post: _Post) -> None:
        engine = self._engine
        engine.counters.requests += 1
        if engine.recorder.enabled:
            engine.recorder.add(exchange)
        if not self._authorized(exchange):
            return
        faults = engine.faults.current
        if faults is not NO_FAULTS:
            faults = engine.faults.take()
        try:
            if engine.settings.allow_fault_headers:
                asked = exchange.header(b"x-sim-fault")
                if asked is not None:
                    faults = overlay(faults, parse_faults(asked.decode("latin-1")))
            if faults is not NO_FAULTS and self._refused_by_fault(exchange, faults, path, post):
                return
        except ValueError as error:
            exchange.reply(400, bad_request(str(error)).body(engine.settings.flavor))
            return
        self._answer(exchange, path, post, faults)

    def _answer(self, exchange: Exchange, path: bytes, post: _Post, faults: Faults) -> None:
        engine = self._engine
        status = 200
        try:
            post(exchange, faults)
        except ApiError as error:
            status = error.status
            api_error_reply(exchange, error, engine.settings.flavor, path.startswith(_ANTHROPIC))
        key = (path.decode("ascii"), status)
        http = engine.counters.http
        http[key] = http.get(key, 0) + 1

    def _refused_by_fault(self, exchange: Exchange, faults: Faults, path: bytes, post: _Post) -> bool:
        """Whether a fault has taken the request over."""
        if faults.first_byte_delay_ms or faults.hold:
            rest = msgspec.structs.replace(faults, first_byte_delay_ms=0.0, hold=False)

            def later() -> None:
                if not exchange.ended and not self._refused_by_fault(exchange, rest, path, post):
                    self._answer(exchange, path, post, rest)

            if faults.hold:
                self._engine.faults.hold(exchange, later)
                exchange.on_lost = lambda: self._engine.faults.forget(exchange)
            else:
                timer = self._loop.call_later(faults.first_byte_delay_ms / 1e3, later)
                exchange.on_lost = timer.cancel
            return True
        flavor = self._engine.settings.flavor
        if faults.close:
            exchange.close()
        elif faults.queue_full:
            self._engine.counters.rejected += 1
            exchange.reply(503, queue_full(flavor).body(flavor, path.startswith(_ANTHROPIC)))
        elif faults.status:
            error = ApiError(faults.status, "InternalServerError", "Simulated failure")
            exchange.reply(faults.status, error.body(flavor, path.startswith(_ANTHROPIC)))
        else:
            return False
        return True

    def _generating(self, body_type: type[Generation], answer_type: Callable[[Plan], Answer]) -> _Post:
        decode = msgspec.json.Decoder(body_type).decode
        engine = self._engine

        memo = Memo() if engine.memorable else None

        def post(exchange: Exchange, faults: Faults) -> None:
            use = memo if faults is NO_FAULTS else None
            if use is not None and exchange.header(b"content-type") == b"application/json":
                known = use.find(exchange.body)
                if known is not None and engine.scheduler.try_at_once(
                    known.prompt_tokens, known.completion_tokens, known.ending
                ):
                    extra = engine.load_header(exchange)
                    exchange.reply(200, known.body(request_id(exchange)), b"application/json", extra)
                    return
            body = _decoded(exchange, decode)
            generate(engine, exchange, body, engine.model_name(body.model), answer_type, faults, use)

        return post

    def _count_tokens(self, exchange: Exchange, faults: Faults) -> None:
        body = self._body(exchange, CountTokensBody)
        self._engine.model_name(body.model)
        text, media = body.prompt()
        reply(exchange, 200, b'{"input_tokens":%d}' % count_tokens(len(text), media), faults)

    def _embeddings(self, exchange: Exchange, faults: Faults) -> None:
        body = self._body(exchange, EmbeddingBody)
        texts = inputs(body.input)
        plan = self._pooling_plan(exchange, body.model, texts, faults)

        def render() -> bytes:
            seed = self._engine.settings.seed
            vectors = [pooling.vector(text, seed, body.dimensions) for text in texts]
            return pooling.embeddings(plan, vectors, body.encoding_format)

        pool(self._engine, exchange, plan, render, faults, b"".join(texts))

    def _score(self, exchange: Exchange, faults: Faults) -> None:
        body = self._body(exchange, ScoreBody)
        lefts, rights = _texts(body.text_1), _texts(body.text_2)
        if len(lefts) == 1:
            lefts *= len(rights)
        if len(lefts) != len(rights):
            raise bad_request("text_1 must be one text or as many as text_2", "text_1")
        pairs = list(zip(lefts, rights, strict=True))
        plan = self._pooling_plan(exchange, body.model, [left + right for left, right in pairs], faults)

        def render() -> bytes:
            seed = self._engine.settings.seed
            return pooling.scores(plan, [pooling.score(left, right, seed) for left, right in pairs])

        pool(self._engine, exchange, plan, render, faults, b"")

    def _rerank(self, exchange: Exchange, faults: Faults) -> None:
        body = self._body(exchange, RerankBody)
        query = body.query.encode()
        documents = [item if isinstance(item, str) else str(item.get("text", "")) for item in body.documents]
        plan = self._pooling_plan(exchange, body.model, [query + text.encode() for text in documents], faults)

        def render() -> bytes:
            seed = self._engine.settings.seed
            rated = [(pos, text, pooling.score(query, text.encode(), seed)) for pos, text in enumerate(documents)]
            rated.sort(key=lambda item: -item[2])
            return pooling.ranking(plan, rated[: body.top_n] if body.top_n else rated)

        pool(self._engine, exchange, plan, render, faults, query)

    def _pooling_plan(self, exchange: Exchange, model: str | None, texts: list[bytes], faults: Faults) -> Plan:
        tokens = sum([count_tokens(len(text)) for text in texts])
        return make_plan(self._engine, exchange, self._engine.model_name(model), tokens, faults)

    def _body(self, exchange: Exchange, body_type: type[_T]) -> _T:
        return _decoded(exchange, msgspec.json.Decoder(body_type).decode)

    def _authorized(self, exchange: Exchange) -> bool:
        key = self._engine.settings.api_key
        if not key or exchange.header(b"authorization") == b"Bearer " + key.encode():
            return True
        exchange.reply(401, b'{"error":"Unauthorized"}')
        return False

    # Information

    def _health(self, exchange: Exchange) -> None:
        exchange.reply(self._engine.faults.current.health_status or 200, b"")

    def _models(self, exchange: Exchange) -> None:
        settings = self._engine.settings
        cards = [
            {
                "id": name,
                "object": "model",
                "created": 0,
                "owned_by": settings.flavor,
                "root": settings.models[0],
                "parent": None,
                "max_model_len": settings.max_model_len,
            }
            for name in settings.models
        ]
        exchange.reply(200, msgspec.json.encode({"object": "list", "data": cards}))

    def _version(self, exchange: Exchange) -> None:
        exchange.reply(
            200, b'{"version":"0.32.0"}' if self._engine.settings.flavor == "vllm" else b'{"version":"0.5.23"}'
        )

    def _metrics(self, exchange: Exchange) -> None:
        exchange.reply(200, metrics.render(self._engine), metrics.CONTENT_TYPE)

    def _load(self, exchange: Exchange) -> None:
        scheduler = self._engine.scheduler
        exchange.reply(200, b'{"server_load":%d}' % (scheduler.running + scheduler.waiting))

    def _loads(self, exchange: Exchange) -> None:
        settings, scheduler = self._engine.settings, self._engine.scheduler
        load = {
            "dp_rank": 0,
            "num_running_reqs": scheduler.running,
            "num_waiting_reqs": scheduler.waiting,
            "num_used_tokens": scheduler.held_tokens,
            "token_usage": scheduler.kv_usage,
            "max_total_num_tokens": settings.kv_blocks * settings.block_size_tokens,
        }
        exchange.reply(200, msgspec.json.encode({"loads": [load]}))

    # The simulator's own

    def _recorded(self, exchange: Exchange) -> None:
        exchange.reply(200, self._engine.recorder.to_json())

    def _faults(self, exchange: Exchange) -> None:
        exchange.reply(200, msgspec.json.encode(self._engine.faults.current))

    def _set_faults(self, exchange: Exchange) -> None:
        """Replace the process's faults; an empty object ends them."""
        try:
            faults = faults_from_json(exchange.body)
        except ValueError as error:
            exchange.reply(400, msgspec.json.encode({"detail": str(error)}))
            return
        self._engine.faults.set(faults if faults != NO_FAULTS else NO_FAULTS)
        exchange.reply(200, msgspec.json.encode(faults))


def _texts(given: str | list[str]) -> list[bytes]:
    return [given.encode()] if isinstance(given, str) else [text.encode() for text in given]


def _decoded(exchange: Exchange, decode: Callable[[bytes], _T]) -> _T:
    media_type = (exchange.header(b"content-type") or b"").partition(b";")[0].strip().lower()
    if media_type != b"application/json":
        raise bad_request("Unsupported Media Type: only 'application/json' is allowed", kind="Bad Request")
    try:
        return decode(exchange.body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise bad_request(str(error), kind="Bad Request") from error
