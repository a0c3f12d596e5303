"""One HTTP request's life, from its headers to its settlement, as Envoy's messages tell it.

    request headers ─▶ who and what path ─▶ (no body: answered here)
    request body    ─▶ admission ─▶ header and body mutation, engine pinned
    response headers ─▶ status, standing of the limits; Envoy's own failures become our errors
    response body   ─▶ usage tap, chunk by chunk, passed on untouched unless the usage event must be hidden
    end, or close   ─▶ settled exactly once: exact where the engine told its usage, else estimated from what went out

No I/O of its own. The stream's close says nothing about why: Envoy resets the stream on ordinary ends too, so whether a
client left is read from our own state (was the answer's end seen?).
"""

import struct
import time
from typing import Final

from msgspec.structs import replace

from extproc import messages
from extproc.access_log import CLIENT_DISCONNECTED, ENGINE_LOST, STREAM_TIMEOUT, Abandoned
from extproc.admission import Admission, Admitted
from extproc.endpoints import Metered, ModelList, route
from extproc.errors import ANTHROPIC_APIS, ANTHROPIC_REQUEST_ID, Refused, refused
from extproc.identity import identify, secret_of
from extproc.ledger.model import BROKEN_OFF, GATEWAY_RESTARTED, Accuracy, Ledger, UsageRecord
from extproc.limits.context import encode_context
from extproc.limits.model import Amounts, LimitStore
from extproc.messages import Attribute, HeaderNames
from extproc.observe.metrics import GatewayMetrics
from extproc.picking import Outcome, Picker
from extproc.replies import Replies
from extproc.snapshot.index import LiveIndex, Principal
from extproc.transport.core import CloseReason, GrpcError
from extproc.usage.model import Api, Tap, Usage
from extproc.usage.shapes import read_usual_body
from extproc.usage.taps import make_tap

_REQUEST: Final = HeaderNames(":method", ":path", "authorization", "x-request-id")
_API_KEY: Final = HeaderNames("x-api-key")
_LENGTH: Final = HeaderNames("content-length")
_ENCODING: Final = HeaderNames("content-encoding")
_RESPONSE: Final = HeaderNames(":status", "content-type")
_ENCODED: Final = b"content-encoding"
_OPENAI: Final = frozenset({"chat", "completions", "embeddings"})
_UPSTREAM: Final = Attribute("upstream.address")
_ATTEMPTS: Final = Attribute("upstream.request_attempt_count")
_NEVER: Final = b"\x11" + struct.pack("<d", 0.0)
_ONCE: Final = b"\x11" + struct.pack("<d", 1.0)
_DETAILS: Final = Attribute("response.code_details")
_BY_ENGINE: Final = b"\x1a\x0cvia_upstream"
"""the details of an answer that an engine gave; every other says why Envoy answered itself. `upstream.address` does not
tell: it also names an engine that was lost before it answered"""
_OVERFLOW: Final = b"{overflow}"
"""of an answer that Envoy gave because its circuit breaker lets no more requests to an engine"""

_REQUEST_HEADERS: Final = messages.REQUEST_HEADERS << 3 | 2
_RESPONSE_HEADERS: Final = messages.RESPONSE_HEADERS << 3 | 2
_REQUEST_BODY: Final = messages.REQUEST_BODY << 3 | 2
_RESPONSE_BODY: Final = messages.RESPONSE_BODY << 3 | 2
_NOTHING: Final = Usage(0, 0)
FIRST_RATIO: Final = 0.25
"""prompt tokens per byte of an endpoint that has not answered yet"""
_LEARN_MASK: Final = 7
"""one request in eight teaches its endpoint's ratio: those admitted in a millisecond divisible by eight"""
REQUEST_ID_MOST: Final = 256
"""characters of x-request-id that the ledger keeps: clients choose it, and may send 60 KiB with every request"""
INVALID_ARGUMENT: Final = 3
CLIENT_CLOSED_REQUEST: Final = 499
_ENGINE_FAULTS: Final = frozenset({"engine_error", "engine_overloaded", "engine_bad_encoding"})
_FAILURES: Final = {"engine_unreachable": Outcome.UNREACHABLE}
"""the engine's record of a request that failed. A timeout is none: who asks for long answers would close it to all"""
_ENDINGS: Final = {
    CLIENT_DISCONNECTED: (CLIENT_CLOSED_REQUEST, Outcome.ABANDONED),
    # Not UNREACHABLE: requests that make an engine break off must not close it to all. A probe asks now if it died.
    ENGINE_LOST: (502, Outcome.FAILED),
    STREAM_TIMEOUT: (504, Outcome.FAILED),
}
"""status and engine's record of a request that broke off, by reason"""


class Deps:
    """What all exchanges share."""

    __slots__ = ("abandoned", "admission", "ledger", "live", "metrics", "open", "picker", "ratios", "replies", "store")

    def __init__(
        self,
        live: LiveIndex,
        store: LimitStore,
        ledger: Ledger,
        picker: Picker,
        metrics: GatewayMetrics,
    ) -> None:
        self.live = live
        self.admission = Admission(live, store, picker)
        self.store = store
        self.ledger = ledger
        self.picker = picker
        self.metrics = metrics
        self.open = 0
        """requests at an engine now"""
        self.ratios: dict[tuple[str, str], float] = {}
        """per endpoint: real prompt tokens per token of upper bound, learned from exact answers"""
        self.replies = Replies()
        self.abandoned = Abandoned()


class Exchange:
    """The ext_proc call that accompanies one HTTP request (`transport.core.Call`).

    Its state begins as class attributes: a request sets what it reaches, and one that is refused sets little.
    """

    _principal: Principal | None = None
    _api: Api = "chat"
    _head: tuple[bytes, int, int] | None = None
    """the request's headers, until the body has come"""
    _admitted: Admitted | None = None
    _answer: tuple[bytes, bytes] | None = None
    """content type and encoding of an answer that is to be followed"""
    _tap: Tap | None = None
    _settled = False
    _status = 0
    _failed_by_envoy = ""
    """stable reason of an answer that Envoy gave in the engine's place"""
    _asked = True
    """whether an engine was; a route without one (here, or yet) or full says nothing about those that there are"""
    _request_id = b""
    _engine = ""
    _attempt = 1
    _started_s = 0.0
    """monotonic"""
    _time_s = 0.0
    """Unix time"""
    _ttft_s: float | None = None

    def __init__(self, deps: Deps) -> None:
        self._deps = deps

    # --- messages -------------------------------------------------------------------------------------------------

    def on_message(self, message: bytes) -> bytes | None:
        try:
            kind = message[0] if message else 0
            if kind == _RESPONSE_BODY:
                return self._response_body(message)
            if kind == _REQUEST_HEADERS:
                return self._request_headers(message)
            if kind == _REQUEST_BODY:
                return self._request_body(message)
            if kind == _RESPONSE_HEADERS:
                return self._response_headers(message)
            return self._other(message)
        except (messages.BadMessage, IndexError):
            raise GrpcError(INVALID_ARGUMENT, "not an ext_proc message") from None

    def _other(self, message: bytes) -> bytes | None:
        """Trailers; kinds that newer Envoys may send, which await no reply; and fields in an order of their own."""
        kind, at, end = messages.kind_of(message)
        if kind == messages.REQUEST_TRAILERS:
            return messages.CONTINUE_REQUEST_TRAILERS
        if kind == messages.RESPONSE_TRAILERS:
            if self._tap is not None:
                self._tap.feed(b"", True)
            self._settle_complete()
            return messages.CONTINUE_RESPONSE_TRAILERS
        if kind == 0 or message[0] >> 3 == kind:
            return None
        ordered = messages.field(kind, message[at:end])
        attributes = messages.attributes_of(message, 0)
        return self.on_message(ordered + messages.field(messages.ATTRIBUTES, message[slice(*attributes)]))

    def on_half_close(self) -> None:
        """Envoy has no more to send; what is to be settled is settled at the close."""

    def on_deadline(self) -> bool:
        """An admitted request goes on without us rather than not at all; it is charged for what it had so far."""
        admitted, tap = self._admitted, self._tap
        if admitted is None or (tap is not None and not tap.dispensable()):
            return False
        if not self._settled:
            if self._all_seen():
                self._settle_complete()
            else:
                usage, accuracy = self._so_far(admitted)
                self._settle(usage, accuracy, GATEWAY_RESTARTED, Outcome.ABANDONED)
        return True

    def on_close(self, reason: CloseReason) -> None:
        if self._admitted is not None and not self._settled:
            self._settle_abandoned()

    # --- request --------------------------------------------------------------------------------------------------

    def _request_headers(self, message: bytes) -> bytes:
        if self._principal is not None:
            raise GrpcError(INVALID_ARGUMENT, "request headers out of turn")
        at, end, no_body, _ = messages.headers_of(message)
        method, path, authorization, request_id = _REQUEST.find(message, at, end)
        self._started_s = time.monotonic()
        self._time_s = now_s = time.time()
        if request_id:
            self._request_id = request_id
        secret = secret_of(authorization) or _API_KEY.find(message, at, end)[0]
        principal = identify(self._deps.live.current, secret, now_s)
        asked = route(method or b"", path or b"")
        if isinstance(asked, Metered):
            self._api = asked.api
        if isinstance(principal, Refused):
            return self._refuse(principal)
        self._principal = principal
        if isinstance(asked, Refused):
            return self._refuse(asked)
        if isinstance(asked, ModelList):
            return self._list_models(principal, asked.model)
        if no_body:
            return self._refuse(refused("body_required", "Send a JSON body."))
        self._head = (message, at, end)
        return messages.CONTINUE_REQUEST_HEADERS

    def _list_models(self, principal: Principal, model: str | None) -> bytes:
        listing = self._deps.admission.model_list(principal, model)
        if isinstance(listing, Refused):
            return self._refuse(listing)
        return messages.immediate_response(200, _JSON, listing, "arks_models")

    def _request_body(self, message: bytes) -> bytes:
        body, _ = messages.body_of(message)
        principal, head, deps = self._principal, self._head, self._deps
        if principal is None or head is None:
            raise GrpcError(INVALID_ARGUMENT, "a request body out of turn; is request_body_mode BUFFERED?")
        self._head = None
        admitted = deps.admission.admit(principal, self._api, body, self._lease_context)
        if isinstance(admitted, Refused):
            if admitted.reason.code == "invalid_json" and (_ENCODING.find(*head)[0] or b"identity") != b"identity":
                admitted = refused("unsupported_encoding", "Send the request body uncompressed.")
            return self._refuse(admitted)
        self._admitted = admitted
        engines = admitted.pick.addresses
        self._engine = engine = engines[0]
        deps.picker.begin(engine)
        deps.open += 1
        token, endpoint, changed = principal.token, admitted.endpoint, admitted.body
        who = (token.namespace, token.name, endpoint.model, endpoint.name)
        resize = changed is not None and _LENGTH.find(*head)[0] is not None
        return deps.replies.admitted(who, engines, changed, resize=resize)

    def _lease_context(self) -> bytes:
        """What the ledger is told if nobody settles the lease: asked for by the journal, from its own thread."""
        if self._admitted is None:
            return b""
        return encode_context(self._record(self._engine, 0, _NOTHING, "estimated", ""))

    def _refuse(self, answer: Refused) -> bytes:
        principal = self._principal
        namespace = principal.token.namespace if principal is not None else ""
        self._deps.metrics.refused(namespace, answer.reason.code)
        if answer.limited is not None and principal is not None:
            self._deps.metrics.rate_limited(namespace, *answer.limited, principal.token.name)
        return answer.reply(self._api, self._request_id)

    # --- response -------------------------------------------------------------------------------------------------

    def _response_headers(self, message: bytes) -> bytes:
        if self._settled:
            return messages.CONTINUE_RESPONSE_HEADERS  # a drain let go of it, and Envoy has not heard that yet
        at, end, no_body, behind = messages.headers_of(message)
        status, content_type = _RESPONSE.find(message, at, end)
        encoding = None if message.find(_ENCODED, at, end) < 0 else _ENCODING.find(message, at, end)[0]
        self._status = int(status) if status and status.isdigit() else 0
        admitted, replies = self._admitted, self._deps.replies
        # The usual answer is the picked engine's own: two looks for what Envoy then says, instead of reading it.
        if message.find(replies.served_by(self._engine), behind) < 0 or message.find(_BY_ENGINE, behind) < 0:
            attributes = messages.attributes_of(message, behind)
            served = _UPSTREAM.text(message, *attributes)
            attempts = _ATTEMPTS.find(message, *attributes)
            if admitted is not None and served is not None and served != self._engine:
                self._moved_to(served, retried=attempts != _ONCE)
            details = _DETAILS.find(message, *attributes)
            if details is not None and details != _BY_ENGINE:
                return self._answered_by_envoy(details, routed=attempts != _NEVER)
        if admitted is None:
            return messages.CONTINUE_RESPONSE_HEADERS
        if no_body:
            self._settle_complete()
        elif self._status < 300:
            self._answer = answer = (content_type or b"", encoding or b"")
            if admitted.stream or content_type != b"application/json" or encoding:
                self._tap = self._new_tap(admitted, answer)
        mutation = replies.standing(admitted.lease)
        if self._api in ANTHROPIC_APIS:
            mutation += messages.set_header(ANTHROPIC_REQUEST_ID, self._request_id)
        if admitted.hide_usage:
            mutation += _CHANGED_LENGTH
            if self._tap is not None and self._tap.decodes:
                mutation += _DECODED
        return messages.response_headers_reply(mutation) if mutation else messages.CONTINUE_RESPONSE_HEADERS

    def _answered_by_envoy(self, details: bytes, *, routed: bool) -> bytes:
        """Envoy's own answer (no engine reached, body over the buffer limit, a timeout) in words of ours."""
        self._asked = routed and _OVERFLOW not in details
        status = self._status
        if status == 413:
            answer = refused("body_too_large", "The request body is larger than the gateway accepts.")
        elif status == 504:
            answer = refused("engine_timeout", "The engine did not answer in time.")
        elif status >= 500:
            text = "The engine could not be reached." if routed else "The model has no route to an engine here yet."
            answer = refused("engine_unreachable", f"{text} Try again shortly.", headers=(("retry-after", "1"),))
        else:
            return messages.CONTINUE_RESPONSE_HEADERS
        self._status = answer.reason.status
        self._failed_by_envoy = answer.reason.code
        if self._admitted is None:
            return self._refuse(answer)
        self._settle_complete()
        return answer.reply(self._api, self._request_id)

    def _moved_to(self, served: str, *, retried: bool) -> None:
        """Another engine than the picked one answered.

        Either Envoy lost the first before it answered a byte, or asked another at once: a new engine is known to us
        before its control plane has told Envoy, which says nothing about the engine.
        """
        deps = self._deps
        first = self._engine
        deps.picker.end(first, Outcome.UNREACHABLE if retried else Outcome.ABANDONED)
        if retried:
            deps.ledger.append(self._record(first, 503, _NOTHING, "exact", "engine_unreachable"))
            self._attempt = 2
        deps.picker.begin(served)
        self._engine = served

    def _new_tap(self, admitted: Admitted, answer: tuple[bytes, bytes]) -> Tap:
        content_type, encoding = answer
        return make_tap(
            self._api,
            stream=admitted.stream,
            content_type=content_type.decode("latin-1"),
            content_encoding=encoding.decode("latin-1"),
            hide_usage=admitted.hide_usage,
        )

    def _response_body(self, message: bytes) -> bytes:
        chunk, end_of_stream = messages.body_of(message)
        tap = self._tap
        if tap is None:
            admitted, answer = self._admitted, self._answer
            if answer is None or admitted is None or self._settled:
                if end_of_stream:
                    self._settle_complete()
                return messages.CONTINUE_RESPONSE_BODY
            # A JSON answer. Most come whole in one piece, and their usage is read without following them.
            if end_of_stream and self._api in _OPENAI and (usage := read_usual_body(chunk)) is not None:
                self._ttft_s = time.monotonic() - self._started_s
                self._settle(usage, "exact", "", Outcome.OK)
                return messages.CONTINUE_RESPONSE_BODY
            tap = self._tap = self._new_tap(admitted, answer)
        changed = tap.feed(chunk, end_of_stream)
        if self._ttft_s is None and tap.started:
            self._ttft_s = time.monotonic() - self._started_s
        if end_of_stream:
            self._settle_complete()
        return messages.CONTINUE_RESPONSE_BODY if changed is None else messages.response_body_reply(changed)

    # --- settlement -----------------------------------------------------------------------------------------------

    def _settle_complete(self) -> None:
        """The answer's end was seen."""
        admitted = self._admitted
        if admitted is None or self._settled:
            return
        tap, status = self._tap, self._status
        if self._failed_by_envoy or status >= 500:
            # No work that anyone could use was done: neither tokens nor the request itself are charged.
            outcome = _FAILURES.get(self._failed_by_envoy, Outcome.FAILED) if self._asked else Outcome.ABANDONED
            self._settle(_NOTHING, "exact", self._failed_by_envoy or "engine_error", outcome, charge=False)
        elif tap is None:
            self._settle(_NOTHING, "exact", "" if status < 400 else "engine_refused", Outcome.OK)
        else:
            outcome = Outcome.FAILED if tap.error in _ENGINE_FAULTS else Outcome.OK
            if tap.usage is not None and tap.final:
                self._settle(tap.usage, "exact", tap.error, outcome)
            elif tap.error and not tap.delivered_tokens():
                self._settle(_NOTHING, "exact", tap.error, outcome, charge=False)
            else:
                self._settle(self._estimate(admitted), "estimated", tap.error, outcome)

    def _settle_abandoned(self) -> None:
        """The stream is gone and the answer's end was not seen: the client left, or the engine was lost on the way.

        Charged at once; the row tells the reason as soon as it is known.
        """
        admitted, tap = self._admitted, self._tap
        assert admitted is not None
        if self._all_seen():
            self._settle_complete()
            return
        usage, accuracy = self._so_far(admitted)
        self._settled = True
        deps = self._deps
        deps.store.settle(admitted.lease, Amounts(1, usage.prompt, usage.completion))
        deps.picker.suspect(self._engine)
        # A crash in the next moment must not leave a charge without a row.
        row = self._record(self._engine, CLIENT_CLOSED_REQUEST, usage, accuracy, BROKEN_OFF)
        deps.ledger.append(row)
        error = tap.error if tap is not None else ""

        def told(reason: str) -> None:
            status, outcome = _ENDINGS[reason]
            self._book(replace(row, status=status, error=error or reason), outcome)

        deps.abandoned.wait(self._request_id.decode("latin-1"), told)

    def _all_seen(self) -> bool:
        """Nothing is missing but the end itself: many clients read no further than [DONE]."""
        tap = self._tap
        return self._status >= 300 or (tap is not None and tap.done and tap.final)

    def _so_far(self, admitted: Admitted) -> tuple[Usage, Accuracy]:
        tap = self._tap
        if tap is not None and tap.usage is not None and tap.final:
            return tap.usage, "exact"
        return self._estimate(admitted), "estimated"

    def _estimate(self, admitted: Admitted) -> Usage:
        """The prompt by the endpoint's learned ratio to its upper bound, the answer by what was delivered."""
        endpoint = admitted.endpoint
        ratio = self._deps.ratios.get((endpoint.namespace, endpoint.name), FIRST_RATIO)
        prompt = min(admitted.reserved.prompt, int(admitted.reserved.prompt * ratio) + 1)
        tap = self._tap
        if tap is None:
            return Usage(prompt, 0)
        seen = tap.usage
        delivered = tap.delivered_tokens()
        if admitted.reserved.response < endpoint.max_output_tokens:
            # The client's own bound, which engines keep; an estimate from bytes does not. The endpoint's is for
            # reserving alone: engines generate what they are asked for.
            delivered = min(delivered, admitted.reserved.response)
        if seen is None:
            return Usage(prompt, delivered)
        return seen._replace(completion=max(seen.completion, delivered))

    def _settle(self, usage: Usage, accuracy: Accuracy, error: str, outcome: Outcome, *, charge: bool = True) -> None:
        self._settled = True
        admitted, store = self._admitted, self._deps.store
        assert admitted is not None
        if charge:
            store.settle(admitted.lease, Amounts(1, usage.prompt, usage.completion))
        else:
            store.release(admitted.lease)
        self._book(self._record(self._engine, self._status, usage, accuracy, error), outcome)

    def _book(self, row: UsageRecord, outcome: Outcome) -> None:
        """What is settled goes into the books."""
        admitted, deps = self._admitted, self._deps
        assert admitted is not None
        deps.open -= 1
        deps.picker.end(self._engine, outcome)
        deps.ledger.append(row)
        deps.metrics.ended.append(row)
        bound = admitted.reserved.prompt
        if row.accuracy == "exact" and row.prompt_tokens and bound and not row.time_ms & _LEARN_MASK:
            key = (row.namespace, row.endpoint)
            known = deps.ratios.get(key)
            seen = row.prompt_tokens / bound
            deps.ratios[key] = seen if known is None else 0.9 * known + 0.1 * seen

    def _record(self, engine: str, status: int, usage: Usage, accuracy: Accuracy, error: str) -> UsageRecord:
        admitted, principal = self._admitted, self._principal
        assert admitted is not None
        assert principal is not None
        token, endpoint, ttft_s = principal.token, admitted.endpoint, self._ttft_s
        return UsageRecord(
            admitted.lease.id,
            self._attempt,
            self._request_id[:REQUEST_ID_MOST].decode("latin-1"),
            int(self._time_s * 1000),
            token.name,
            token.namespace,
            endpoint.model,
            endpoint.name,
            engine,
            status,
            usage.prompt,
            usage.completion,
            usage.cached,
            usage.reasoning,
            accuracy,
            admitted.stream,
            int((time.monotonic() - self._started_s) * 1000),
            None if ttft_s is None else int(ttft_s * 1000),
            error,
            self._api,
        )


_JSON: Final = messages.set_header("content-type", b"application/json")
_CHANGED_LENGTH: Final = messages.remove_header("content-length")
_DECODED: Final = messages.remove_header("content-encoding")
