"""Replies to Envoy whose bytes repeat: written once per grant, per pick of engines, or per number of digits.

A request's reply depends on who asks and which engine was picked, and on nothing else unless its body is changed; the
standing of its limits differs in a few digits only. Building these from scratch cost more than the decision itself.
"""

from typing import Final, TypeAlias

from apis.headers import DECIDED_HEADERS, PIN_HEADER
from extproc import messages
from extproc.limits.model import Lease, Standing

_UNSET: Final = (f"{PIN_HEADER}-subset", "x-arks-tenant", "x-arks-priority")
"""headers that are the gateway's word, too, but that a reply does not set: a client's copies never pass"""
_DYNAMO_ROUTING: Final = ("worker-instance-id", "prefill-instance-id", "dp-rank", "prefill-dp-rank")
_DYNAMO: Final = (
    *(f"x-{name}" for name in _DYNAMO_ROUTING),
    *(f"x-dynamo-{name}" for name in _DYNAMO_ROUTING),
    *("x-dynamo-request-priority", "x-dynamo-request-strict-priority", "x-dynamo-meta-policy-class"),
    *("x-dynamo-session-id", "x-dynamo-session-final", "x-dynamo-parent-session-id", "x-parent-session-id"),
    *("x-bypass-remote-prefill", "x-tenant-id"),
)
"""Dynamo 1.6.1: they overrule `nvext`"""
_ENGINE_HEADERS: Final = (
    *("x-vllm-priority", "x-session-id", "x-data-parallel-rank"),  # vLLM 0.32; the last one SGLang, too
    "x-smg-routing-key",  # SGLang 0.5.23: who shares a key with running requests is scheduled first
    *_DYNAMO,
)
"""Engines take these for the body's fields of the same purpose, which admission removes, or even before them."""

# Credentials stop here: engines need none of ours, and their logs are not ours to keep clean. A compressed answer could
# not have its usage event hidden in place, so engines are asked for plain ones. What was read and metered as plain JSON
# must be read as that by the engine, too: it is not told of an encoding.
_STRIPPED: Final = b"".join(
    messages.remove_header(name)
    for name in (
        *("authorization", "x-api-key", "accept-encoding", "content-encoding", *_ENGINE_HEADERS),
        *_UNSET,
    )
)
Who: TypeAlias = tuple[str, str, str, str]
"""namespace, token's name, model, endpoint"""
_MOST: Final = 50_000
"""entries of a cache before it is begun anew: grants and engines come and go"""


class Replies:
    """The caches. One per process."""

    __slots__ = ("_decisions", "_pins", "_served", "_standings")

    def __init__(self) -> None:
        self._decisions: dict[Who, tuple[bytes, bytes]] = {}
        self._pins: dict[tuple[str, ...], tuple[bytes, bytes]] = {}
        """of both: header mutations and dynamic metadata"""
        self._served: dict[str, bytes] = {}
        self._standings: dict[tuple[str, int, int, int], tuple[bytes, bytes, bytes]] = {}

    def admitted(self, who: Who, engines: tuple[str, ...], body: bytes | None, *, resize: bool) -> bytes:
        """Go on to one of these engines, in this order, with `body` where it is not None.

        `resize` where the request has a content-length: Envoy refuses a changed body that has not the size it says.
        """
        decision = self._decisions.get(who)
        if decision is None:
            if len(self._decisions) > _MOST:
                self._decisions.clear()
            decision = self._decisions[who] = _decision(*who)
        pin = self._pins.get(engines)
        if pin is None:
            if len(self._pins) > _MOST:
                self._pins.clear()
            pin = self._pins[engines] = _pin(engines)
        mutation = pin[0] + decision[0]
        if body is not None and resize:
            mutation += messages.set_header("content-length", b"%d" % len(body))
        return messages.request_body_reply(mutation, pin[1] + decision[1], body)

    def served_by(self, engine: str) -> bytes:
        """How Envoy's attribute says that this engine answered."""
        found = self._served.get(engine)
        if found is None:
            if len(self._served) > _MOST:
                self._served.clear()
            value = messages.field(3, engine.encode())
            found = self._served[engine] = messages.field(1, b"upstream.address") + messages.field(2, value)
        return found

    def standing(self, lease: Lease) -> bytes:
        """Header mutations that tell how much is left: x-ratelimit-*."""
        requests, tokens = lease.standings()
        return (self._family("requests", requests) if requests is not None else b"") + (
            self._family("tokens", tokens) if tokens is not None else b""
        )

    def _family(self, family: str, standing: Standing) -> bytes:
        limit, remaining, _ = standing
        left = b"%d" % remaining
        reset = b"%d" % standing.told_reset_s
        key = (family, limit, len(left), len(reset))
        pieces = self._standings.get(key)
        if pieces is None:
            if len(self._standings) > _MOST:
                self._standings.clear()
            pieces = self._standings[key] = _pieces(family, limit, len(left), len(reset))
        before, between, after = pieces
        return before + left + between + reset + after


def _decision(namespace: str, token: str, model: str, endpoint: str) -> tuple[bytes, bytes]:
    """`model`, `namespace` and `username` are the headers that Arks' routes match on: `model` there is the endpoint."""
    values = zip(DECIDED_HEADERS, (endpoint, namespace, token), strict=True)
    headers = b"".join(messages.set_header(name, value.encode()) for name, value in values)
    told = {"token": token, "namespace": namespace, "model": model, "endpoint": endpoint, "decision": "admitted"}
    return headers + _STRIPPED, messages.metadata("arks", messages.string_struct(told))


def _pin(engines: tuple[str, ...]) -> tuple[bytes, bytes]:
    pin = ",".join(engines)
    metadata = messages.metadata("envoy.lb", messages.string_struct({PIN_HEADER: pin}))
    return messages.set_header(PIN_HEADER, pin.encode()), metadata


def _pieces(family: str, limit: int, left_digits: int, reset_digits: int) -> tuple[bytes, bytes, bytes]:
    """The bytes around the two numbers that change, for numbers of so many digits."""
    text = (
        messages.set_header(f"x-ratelimit-limit-{family}", b"%d" % limit)
        + messages.set_header(f"x-ratelimit-remaining-{family}", b"\0" * left_digits)
        + messages.set_header(f"x-ratelimit-reset-{family}", b"\0" * reset_digits + b"s")
    )
    left = text.index(b"\0" * left_digits)
    reset = text.rindex(b"\0" * reset_digits)
    return text[:left], text[left + left_digits : reset], text[reset + reset_digits :]
