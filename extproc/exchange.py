"""One HTTP request's life, from its headers to its settlement, as Envoy's messages tell it.

    request headers ─▶ who and what path ─▶ (no body: answered here)
    request body    ─▶ admission ─▶ header and body mutation, engine pinned
    response headers ─▶ status, standing of the limits; Envoy's own failures become our errors
    response body   ─▶ usage tap, chunk by chunk, passed on untouched unless the usage event must be hidden
    end, or close   ─▶ settled exactly once: exact where the engine told its usage, else estimated from what went out

No I/O of its own. The stream's close says nothing about why: Envoy resets the stream on ordinary ends too, so whether a
client left is read from our own state (was the answer's end seen?).
"""

import time
from typing import Final

from extproc import messages
from extproc.access_log import CLIENT_DISCONNECTED, ENGINE_LOST, STREAM_TIMEOUT, Abandoned
from extproc.admission import Admission, Admitted
from extproc.endpoints import ModelList, route
from extproc.errors import Refused, refused
from extproc.identity import secret_of
from extproc.ledger.model import Accuracy, Ledger, UsageRecord
from extproc.limits.model import Amounts, LimitStore
from extproc.messages import Attribute, HeaderNames
from extproc.observe.metrics import GatewayMetrics
from extproc.picking import Outcome, Picker
from extproc.replies import Replies
from extproc.snapshot.index import Principal
from extproc.transport.core import CloseReason, GrpcError
from extproc.usage.model import Api, Tap, Usage
from extproc.usage.taps import make_tap

_REQUEST: Final = HeaderNames(":method", ":path", "authorization", "x-request-id")
_API_KEY: Final = HeaderNames("x-api-key")
_LENGTH: Final = HeaderNames("content-length")
_ENCODING: Final = HeaderNames("content-encoding")
_RESPONSE: Final = HeaderNames(":status", "content-type", "content-encoding")
_UPSTREAM: Final = Attribute("upstream.address")
_DETAILS: Final = Attribute("response.code_details")
_BY_ENGINE: Final = b"\x1a\x0cvia_upstream"
"""the details of an answer that an engine gave; every other says why Envoy answered itself. `upstream.address` does not
tell: it also names an engine that was lost before it answered"""

_RESPONSE_BODY_TAG: Final = messages.RESPONSE_BODY << 3 | 2
INVALID_ARGUMENT: Final = 3
CLIENT_CLOSED_REQUEST: Final = 499
_ENGINE_FAULTS: Final = frozenset({"engine_error", "engine_overloaded", "engine_bad_encoding"})
_ENDINGS: Final = {
    CLIENT_DISCONNECTED: (CLIENT_CLOSED_REQUEST, Outcome.ABANDONED),
    ENGINE_LOST: (502, Outcome.UNREACHABLE),
    STREAM_TIMEOUT: (504, Outcome.FAILED),
}
"""status and engine's record of a request that broke off, by reason"""


class Deps:
    """What all exchanges share."""

    __slots__ = ("abandoned", "admission", "ledger", "metrics", "open", "picker", "ratios", "replies", "store")

    def __init__(
        self, admission: Admission, store: LimitStore, ledger: Ledger, picker: Picker, metrics: GatewayMetrics
    ) -> None:
        self.admission = admission
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
    """The ext_proc call that accompanies one HTTP request (`transport.core.Call`)."""

    __slots__ = (
        "_admitted",
        "_api",
        "_attempt",
        "_deps",
        "_engine",
        "_failed_by_envoy",
        "_head",
        "_principal",
        "_request_id",
        "_settled",
        "_started_s",
        "_status",
        "_tap",
        "_time_ms",
        "_ttft_s",
    )

    def __init__(self, deps: Deps) -> None:
        self._deps = deps
        self._principal: Principal | None = None
        self._api: Api = "chat"
        self._admitted: Admitted | None = None
        self._tap: Tap | None = None
        self._settled = False
        self._status = 0
        self._failed_by_envoy = ""
        self._request_id = ""
        self._engine = ""
        self._attempt = 1
        self._head: tuple[bytes, int, int] | None = None
        self._started_s = 0.0
        self._ttft_s: float | None = None
        self._time_ms = 0

    # --- messages -------------------------------------------------------------------------------------------------

    def on_message(self, message: bytes) -> bytes | None:
        try:
            if message[0] == _RESPONSE_BODY_TAG:
                return self._response_body(*messages.body_of(message))
            kind, at, end = messages.kind_of(message)
            if kind == messages.REQUEST_HEADERS:
                return self._request_headers(message, at, end)
            if kind == messages.REQUEST_BODY:
                return self._request_body(messages.body_of(message)[0])
            if kind == messages.RESPONSE_HEADERS:
                return self._response_headers(message, at, end)
            if kind == messages.RESPONSE_BODY:
                return self._response_body(*messages.body_of(message))
        except (messages.BadMessage, IndexError):
            raise GrpcError(INVALID_ARGUMENT, "not an ext_proc message") from None
        if kind == messages.REQUEST_TRAILERS:
            return messages.CONTINUE_REQUEST_TRAILERS
        if kind == messages.RESPONSE_TRAILERS:
            self._settle_complete()
            return messages.CONTINUE_RESPONSE_TRAILERS
        return None  # a message without a kind we know: newer Envoys may send such, and await no reply

    def on_half_close(self) -> None:
        """Envoy has no more to send; what is to be settled is settled at the close."""

    def on_close(self, reason: CloseReason) -> None:
        if self._admitted is not None and not self._settled:
            self._settle_abandoned()

    # --- request --------------------------------------------------------------------------------------------------

    def _request_headers(self, message: bytes, at: int, end: int) -> bytes:
        at, end, no_body = messages.headers_of(message, at, end)
        self._started_s = time.monotonic()
        self._time_ms = int(time.time() * 1000)
        method, path, authorization, request_id = _REQUEST.find(message, at, end)
        if request_id is not None:
            self._request_id = request_id.decode("latin-1")
        secret = secret_of(authorization) or _API_KEY.find(message, at, end)[0]
        principal = self._deps.admission.identify(secret)
        if isinstance(principal, Refused):
            return self._refuse(principal)
        self._principal = principal
        asked = route(method or b"", path or b"")
        if isinstance(asked, Refused):
            return self._refuse(asked)
        if isinstance(asked, ModelList):
            return self._list_models(principal, asked.model)
        if no_body:
            return self._refuse(refused("body_required", "Send a JSON body."))
        self._api = asked.api
        # Kept for the two headers that matter with some bodies only.
        self._head = (message, at, end)
        return messages.CONTINUE_REQUEST_HEADERS

    def _list_models(self, principal: Principal, model: str | None) -> bytes:
        listing = self._deps.admission.model_list(principal, model)
        if isinstance(listing, Refused):
            return self._refuse(listing)
        return messages.immediate_response(200, _JSON, listing, "arks_models")

    def _request_body(self, body: bytes) -> bytes:
        principal = self._principal
        if principal is None or self._admitted is not None:
            raise GrpcError(INVALID_ARGUMENT, "a request body out of turn; is request_body_mode BUFFERED?")
        deps = self._deps
        admitted = deps.admission.admit(principal, self._api, body, b"")
        head, self._head = self._head, None
        assert head is not None
        if isinstance(admitted, Refused):
            if admitted.reason.code == "invalid_json" and (_ENCODING.find(*head)[0] or b"identity") != b"identity":
                admitted = refused("unsupported_encoding", "Send the request body uncompressed.")
            return self._refuse(admitted)
        self._admitted = admitted
        pick = admitted.pick
        self._engine = pick.addresses[0]
        deps.picker.begin(self._engine)
        deps.open += 1
        token, endpoint, changed = principal.token, admitted.endpoint, admitted.body
        who = (token.namespace, token.name, endpoint.model, endpoint.name, pick.addresses)
        if changed is None:
            return deps.replies.admitted(who)
        return deps.replies.changed(who, changed, resize=_LENGTH.find(*head)[0] is not None)

    def _refuse(self, answer: Refused) -> bytes:
        principal = self._principal
        namespace = principal.token.namespace if principal is not None else ""
        self._deps.metrics.refused(namespace, answer.reason.code)
        return answer.reply()

    # --- response -------------------------------------------------------------------------------------------------

    def _response_headers(self, message: bytes, at: int, end: int) -> bytes:
        attributes = messages.attributes_of(message, end)
        at, end, no_body = messages.headers_of(message, at, end)
        status, content_type, encoding = _RESPONSE.find(message, at, end)
        self._status = int(status) if status and status.isdigit() else 0
        admitted = self._admitted
        served = _UPSTREAM.text(message, *attributes)
        if admitted is not None and served is not None and served != self._engine:
            self._moved_to(served)
        details = _DETAILS.find(message, *attributes)
        if details is not None and details != _BY_ENGINE:
            return self._answered_by_envoy()
        if admitted is None:
            return messages.CONTINUE_RESPONSE_HEADERS
        if no_body:
            self._settle_complete()
        elif self._status < 300:
            self._tap = make_tap(
                self._api,
                stream=admitted.stream,
                content_type=(content_type or b"").decode("latin-1"),
                content_encoding=(encoding or b"").decode("latin-1"),
                hide_usage=admitted.hide_usage,
            )
        mutation = self._deps.replies.standing(admitted.lease)
        if admitted.hide_usage:
            mutation += _CHANGED_LENGTH
            if self._tap is not None and self._tap.decodes:
                mutation += _DECODED
        return messages.response_headers_reply(mutation) if mutation else messages.CONTINUE_RESPONSE_HEADERS

    def _answered_by_envoy(self) -> bytes:
        """Envoy's own answer (no engine reached, body over the buffer limit, a timeout) in words of ours."""
        status = self._status
        if status == 413:
            answer = refused("body_too_large", "The request body is larger than the gateway accepts.")
        elif status == 504:
            answer = refused("engine_timeout", "The engine did not answer in time.")
        elif status >= 500:
            answer = refused(
                "engine_unreachable",
                "The engine could not be reached. Try again shortly.",
                headers=(("retry-after", "1"),),
            )
        else:
            return messages.CONTINUE_RESPONSE_HEADERS
        self._status = answer.reason.status
        self._failed_by_envoy = answer.reason.code
        if self._admitted is None:
            return self._refuse(answer)
        self._settle_complete()
        return answer.reply()

    def _moved_to(self, served: str) -> None:
        """Envoy retried on another engine of the list: the first one was lost before it answered a byte."""
        deps = self._deps
        first = self._engine
        deps.picker.end(first, Outcome.UNREACHABLE)
        self._write(first, 503, Usage(0, 0), "exact", "engine_unreachable")
        deps.picker.begin(served)
        self._engine = served
        self._attempt = 2

    def _response_body(self, body: bytes, end_of_stream: bool) -> bytes:
        tap = self._tap
        if tap is None:
            if end_of_stream:
                self._settle_complete()
            return messages.CONTINUE_RESPONSE_BODY
        changed = tap.feed(body, end_of_stream)
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
            outcome = Outcome.UNREACHABLE if self._failed_by_envoy else Outcome.FAILED
            self._finish(Usage(0, 0), "exact", self._failed_by_envoy or "engine_error", outcome, charge=False)
        elif tap is None:
            self._finish(Usage(0, 0), "exact", "" if status < 400 else "engine_refused")
        else:
            outcome = Outcome.FAILED if tap.error in _ENGINE_FAULTS else Outcome.OK
            if tap.usage is not None and tap.final:
                self._learn(admitted, tap.usage)
                self._finish(tap.usage, "exact", tap.error, outcome)
            elif tap.error and not tap.delivered_tokens():
                self._finish(Usage(0, 0), "exact", tap.error, outcome, charge=False)
            else:
                self._finish(self._estimate(admitted), "estimated", tap.error, outcome)

    def _settle_abandoned(self) -> None:
        """The stream is gone and the answer's end was not seen: the client left, or the engine was lost on the way.

        Charged at once; the row waits for the reason.
        """
        admitted, tap = self._admitted, self._tap
        assert admitted is not None
        if self._status >= 300:
            self._settle_complete()
            return
        accuracy: Accuracy = "exact"
        if tap is not None and tap.usage is not None and tap.final:
            usage = tap.usage
        else:
            usage, accuracy = self._estimate(admitted), "estimated"
        self._settled = True
        deps = self._deps
        deps.store.settle(admitted.lease, Amounts(1, usage.prompt, usage.completion))
        deps.picker.suspect(self._engine)

        def told(reason: str) -> None:
            self._status, outcome = _ENDINGS[reason]
            self._close(usage, accuracy, (tap.error if tap is not None else "") or reason, outcome)

        deps.abandoned.wait(self._request_id, told)

    def _estimate(self, admitted: Admitted) -> Usage:
        """The prompt by the endpoint's learned ratio to its upper bound, the answer by what was delivered."""
        endpoint = admitted.endpoint
        ratio = self._deps.ratios.get((endpoint.namespace, endpoint.name), 0.25)
        prompt = min(admitted.reserved.prompt, int(admitted.reserved.prompt * ratio) + 1)
        tap = self._tap
        if tap is None:
            return Usage(prompt, 0)
        seen = tap.usage
        # The engine cannot have generated more than was reserved; an estimate from bytes can say so.
        delivered = min(tap.delivered_tokens(), admitted.reserved.response)
        if seen is None:
            return Usage(prompt, delivered)
        return seen._replace(completion=max(seen.completion, delivered))

    def _learn(self, admitted: Admitted, usage: Usage) -> None:
        bound = admitted.reserved.prompt
        if bound > 0 and usage.prompt > 0:
            endpoint = admitted.endpoint
            key = (endpoint.namespace, endpoint.name)
            ratios = self._deps.ratios
            ratios[key] = 0.95 * ratios.get(key, 0.25) + 0.05 * usage.prompt / bound

    def _finish(
        self, usage: Usage, accuracy: Accuracy, error: str, outcome: Outcome = Outcome.OK, *, charge: bool = True
    ) -> None:
        self._settled = True
        admitted, store = self._admitted, self._deps.store
        assert admitted is not None
        if charge:
            store.settle(admitted.lease, Amounts(1, usage.prompt, usage.completion))
        else:
            store.release(admitted.lease)
        self._close(usage, accuracy, error, outcome)

    def _close(self, usage: Usage, accuracy: Accuracy, error: str, outcome: Outcome) -> None:
        """What is settled goes into the books."""
        admitted, deps = self._admitted, self._deps
        assert admitted is not None
        deps.open -= 1
        deps.picker.end(self._engine, outcome)
        duration_s = self._write(self._engine, self._status, usage, accuracy, error)
        endpoint = admitted.endpoint
        deps.metrics.request_done(
            (endpoint.namespace, endpoint.name),
            self._status,
            error,
            duration_s,
            self._ttft_s,
            usage.prompt,
            usage.completion,
            usage.cached,
            accuracy,
            admitted.stream,
            self._api,
            self._principal.token.name if self._principal is not None else "",
        )

    def _write(self, engine: str, status: int, usage: Usage, accuracy: Accuracy, error: str) -> float:
        """Append the attempt's row; returns its duration in seconds."""
        admitted, principal = self._admitted, self._principal
        assert admitted is not None
        assert principal is not None
        duration_s = time.monotonic() - self._started_s
        token, endpoint = principal.token, admitted.endpoint
        ttft_s = self._ttft_s
        self._deps.ledger.append(
            UsageRecord(
                admitted.lease.id,
                self._attempt,
                self._request_id,
                self._time_ms,
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
                int(duration_s * 1000),
                None if ttft_s is None else int(ttft_s * 1000),
                error,
            )
        )
        return duration_s


_JSON: Final = messages.set_header("content-type", b"application/json")
_CHANGED_LENGTH: Final = messages.remove_header("content-length")
_DECODED: Final = messages.remove_header("content-encoding")
