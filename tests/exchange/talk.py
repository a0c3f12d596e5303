"""Envoy's side of one request, message by message, before an exchange with a real store, picker and metrics."""

import hashlib
import json
from typing import Any

from apis.policy import Endpoint, Grant, Policy, RateLimit, Token
from apis.wire.ext_proc_pb2 import ProcessingRequest, ProcessingResponse
from extproc.exchange import Deps, Exchange
from extproc.ledger.model import UsageRecord
from extproc.limits.memory import MemoryStore
from extproc.observe.metrics import GatewayMetrics
from extproc.picking import Picker
from extproc.snapshot.index import LiveIndex
from tests.limits.ground import NOON

CHAT = "/v1/chat/completions"
JSON = "application/json"
SSE = "text/event-stream"
REQUEST_ID = "request-1"
ENGINES = ("10.0.0.1:8000", "10.0.0.2:8000")
BY_ENGINE = "via_upstream"
_PREFIX = "rate/team/alice/m/"


class Rows:
    """A ledger: the last row of each attempt, as the table keeps it."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, int], UsageRecord] = {}

    def append(self, record: UsageRecord) -> None:
        self.rows[record.id, record.attempt] = record


class World:
    """One process's parts, with a token that may do much."""

    def __init__(self, *engines: str, **endpoint: Any) -> None:
        served = Endpoint("team", "m", "m", None, **endpoint)
        rates = (RateLimit("rpd", 10**6), RateLimit("tpd", 10**12))
        digest = hashlib.sha256(b"sk-alice").digest()
        alice = Token("team", "alice", digest, (Grant("m", rates),), max_concurrent_requests=100)
        live = LiveIndex()
        live.replace(Policy({("team", "alice"): alice}, {}, {("team", "m"): served}))
        self.served = served
        self.store = MemoryStore(clock=lambda: NOON)  # the day does not end amid a test
        self.ledger = Rows()
        self.picker = Picker()
        self.picker.set_policy([served], engines or ENGINES)
        self.deps = Deps(live, self.store, self.ledger, self.picker, GatewayMetrics())

    def exchange(self) -> Exchange:
        return Exchange(self.deps)

    def admitted(self, *, path: str = CHAT, request_id: str = REQUEST_ID, **fields: Any) -> tuple[Exchange, str]:
        """An exchange whose request goes on to an engine, and which."""
        exchange = self.exchange()
        exchange.on_message(asks(path, request_id))
        reply = ProcessingResponse.FromString(exchange.on_message(says(**fields)) or b"")
        set_headers = reply.request_body.response.header_mutation.set_headers
        pins = [each.header.raw_value for each in set_headers if each.header.key == "x-gateway-destination-endpoint"]
        return exchange, pins[0].decode().partition(",")[0]

    @property
    def row(self) -> UsageRecord:
        """The only one."""
        (row,) = self.ledger.rows.values()
        return row

    @property
    def row_errors(self) -> set[str]:
        return {row.error for row in self.ledger.rows.values()}

    @property
    def fit(self) -> set[str]:
        return {state.address for state in self.picker.snapshot() if state.healthy}

    @property
    def held(self) -> dict[str, int]:
        """What requests that have ended may not hold."""
        return {
            "open": self.deps.open,
            "leases": self.store.open_leases,
            "slots": self.store.reserved("concurrent/team/alice"),
            "reserved": self.store.reserved(f"{_PREFIX}rpd") + self.store.reserved(f"{_PREFIX}tpd"),
            "in_flight": sum(state.in_flight for state in self.picker.snapshot()),
        }

    @property
    def charged(self) -> tuple[int, int]:
        """Requests and tokens."""
        return self.store.used(f"{_PREFIX}rpd"), self.store.used(f"{_PREFIX}tpd")


def asks(path: str = CHAT, request_id: str = REQUEST_ID) -> bytes:
    message = ProcessingRequest()
    for name, value in (
        (":method", "POST"),
        (":path", path),
        ("authorization", "Bearer sk-alice"),
        ("x-request-id", request_id),
    ):
        message.request_headers.headers.headers.add(key=name, raw_value=value.encode())
    return message.SerializeToString()


def says(**fields: Any) -> bytes:
    """The request's body."""
    message = ProcessingRequest()
    body = {"model": "m", "messages": [{"role": "user", "content": "Hello"}], **fields}
    message.request_body.body = json.dumps(body).encode()
    message.request_body.end_of_stream = True
    return message.SerializeToString()


def answers(
    engine: str | None,
    status: int = 200,
    content_type: str = JSON,
    *,
    details: str = BY_ENGINE,
    attempts: int = 1,
    end: bool = False,
) -> bytes:
    """Response headers: an engine's, or with other `details` Envoy's own."""
    message = ProcessingRequest()
    for name, value in ((":status", str(status)), ("content-type", content_type)):
        message.response_headers.headers.headers.add(key=name, raw_value=value.encode())
    message.response_headers.end_of_stream = end
    attributes = message.attributes["envoy.filters.http.ext_proc"].fields
    if engine is not None:
        attributes["upstream.address"].string_value = engine
    attributes["upstream.request_attempt_count"].number_value = attempts
    attributes["response.code_details"].string_value = details
    return message.SerializeToString()


def piece(body: bytes, *, end: bool = False) -> bytes:
    message = ProcessingRequest()
    message.response_body.body = body
    message.response_body.end_of_stream = end
    return message.SerializeToString()


def trailers() -> bytes:
    message = ProcessingRequest()
    message.response_trailers.SetInParent()
    return message.SerializeToString()


def event(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": 0, "delta": {"content": text}}]}).encode() + b"\n\n"


def usage_event(prompt: int, completion: int) -> bytes:
    usage = {"prompt_tokens": prompt, "completion_tokens": completion}
    return b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n"


def whole(prompt: int, completion: int) -> bytes:
    usage = {"prompt_tokens": prompt, "completion_tokens": completion}
    return json.dumps({"choices": [{"message": {"content": "Hi"}}], "usage": usage}).encode()


DONE = b"data: [DONE]\n\n"
