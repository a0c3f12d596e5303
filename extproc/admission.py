"""The decision on one request: may it go, what does it reserve, where does it go, and in what words.

identify (at the headers) → scope → fields → reserve → pick. Each step either refuses or goes on; only `reserve` takes
anything, and whatever refuses after it gives it back. No step waits: with the embedded store a decision is one
uninterrupted piece of work on the event loop, which is also what makes it exact under concurrency.
"""

import fnmatch
import hashlib
import itertools
import math
import os
import time
from dataclasses import dataclass, replace
from typing import Any, Final

import msgspec

from apis.policy import Endpoint
from extproc import body as bodies
from extproc.errors import Refused, printable, refused
from extproc.limits.model import (
    QUOTA_RETRY_AFTER_S,
    Amounts,
    Context,
    Lease,
    LimitStore,
    Refusal,
    Standing,
    StoreUnavailable,
)
from extproc.picking import Pick, Picker
from extproc.snapshot.index import Grant, LiveIndex, Principal
from extproc.usage.bounds import prompt_upper_bound, requested_output
from extproc.usage.model import Api

LEASE_TTL_S: Final = 900.0
"""A lease outlives a crash by this much. A longer request loses nothing: its settling sets the expired charge right."""

_ENGINE_FIELDS: Final = (
    "kv_transfer_params",
    "ec_transfer_params",
    "bootstrap_*",
    "session_id",
    "session_params",
    "vllm_xargs",
    "priority",
    "cache_salt",
    "custom_logit_processor",
    "data_parallel_rank",
    "routed_dp_rank",
    "disagg_prefill_dp_rank",
    "extra_key",
    "rid",
    "lora_path",
    "nvext",
)
"""Fields by which a client could steer an engine's inside: engines believe stale transfer parameters and dial the host
they name, unpickle logit processors, jump queues, answer with another adapter than the model that was allowed (SGLang's
`lora_path`). `*` as in file names."""
_STATEFUL_FIELDS: Final = ("background", "conversation", "previous_response_id")
"""The Responses API's fields that make an engine work on without a reader, whose tokens nobody would count, or speak of
what it has stored, which it does not keep apart by tenant (vLLM 0.32 with VLLM_ENABLE_RESPONSES_API_STORE). Taking them
away would change what is asked for, so they are refused, unless the endpoint allows them."""
_ENGINE_NAMES: Final = frozenset(name for name in _ENGINE_FIELDS if "*" not in name)
_ENGINE_STEMS: Final = tuple(name[:-1] for name in _ENGINE_FIELDS if "*" in name)


@dataclass(slots=True)
class Admitted:
    """A request that goes to an engine."""

    endpoint: Endpoint
    lease: Lease
    pick: Pick
    body: bytes | None
    """the engine's body where it differs from the client's"""
    stream: bool
    hide_usage: bool
    """we asked the engine for the usage event, the client did not"""
    reserved: Amounts


class Admission:
    """Decides, by the policy that is current when it is asked."""

    def __init__(self, live: LiveIndex, store: LimitStore, picker: Picker) -> None:
        self._live = live
        self._store = store
        self._picker = picker
        # Unique over restarts and replicas, and growing with time, in which order the ledger keeps its rows; a counter
        # behind a random prefix costs less than a random id per request.
        self._ids = itertools.count()
        self._prefix = f"{int(time.time() * 1000):012x}{os.urandom(5).hex()}"
        self._plans: dict[tuple[str, str], _FieldPlan] = {}

    def model_list(self, principal: Principal, model: str | None) -> bytes | Refused:
        """OpenAI's model list as this token may see it, or one entry of it."""
        entries = [
            {"id": name, "object": "model", "created": 0, "owned_by": principal.token.namespace}
            for name in principal.grants
        ]
        if model is None:
            return msgspec.json.encode({"object": "list", "data": entries})
        for entry in entries:
            if entry["id"] == model:
                return msgspec.json.encode(entry)
        return self._no_grant(principal, model)

    def admit(self, principal: Principal, api: Api, body: bytes, context: Context) -> Admitted | Refused:
        """Judge a whole request. `context` makes what the lease's journal keeps (see `LimitStore.reserve`)."""
        fields = bodies.parse(body)
        if isinstance(fields, Refused):
            return fields
        model = bodies.text(fields, "model")
        if isinstance(model, Refused):
            return model
        if not model:
            return refused("missing_model", "Name a model in the body's 'model' field.", param="model")
        if len(model) > bodies.MAX_MODEL_CHARS:
            return refused(
                "invalid_field", f"'model' must have at most {bodies.MAX_MODEL_CHARS} characters.", param="model"
            )
        grant = principal.grants.get(model)
        if grant is None:
            return self._no_grant(principal, model)
        if grant.problem:
            return refused("quota_not_found", grant.problem)
        if (fault := bodies.check_counts(fields)) is not None:
            return fault
        stream = bodies.flag(fields, "stream")
        if isinstance(stream, Refused):
            return stream
        endpoint = grant.endpoint
        if api == "responses" and (name := self._plan(endpoint).stateful(fields)):
            return refused(
                "invalid_field", f"'{name}' is not allowed here: send the whole conversation in 'input'.", param=name
            )
        changed, hide_usage = None, False
        if stream and api in ("chat", "completions"):
            wants = bodies.wants_usage(fields)
            if isinstance(wants, Refused):
                return wants
            hide_usage = not wants
        if hide_usage or self._plan(endpoint).touches(fields):
            changed = self._rewrite(endpoint, fields, body, hide_usage=hide_usage)

        amounts = Amounts(
            1,
            prompt_upper_bound(api, fields, endpoint.media_tokens),
            requested_output(api, fields, endpoint.max_output_tokens),
        )
        lease = self._reserve(grant, amounts, context)
        if isinstance(lease, Refused):
            return lease
        pick = self._picker.pick(endpoint)
        if pick is None:
            self._store.release(lease)
            return refused(
                "no_healthy_engine",
                f"No engine that serves '{printable(model)}' is healthy now. Try again shortly.",
                headers=(("retry-after", "2"),),
            )
        return Admitted(endpoint, lease, pick, changed, stream, hide_usage, amounts)

    def _no_grant(self, principal: Principal, model: str) -> Refused:
        if model in self._live.current.models.get(principal.token.namespace, {}):
            return refused(
                "model_not_allowed", f"This token may not use the model '{printable(model)}'.", param="model"
            )
        return refused("model_not_found", f"The model '{printable(model)}' does not exist.", param="model")

    def _reserve(self, grant: Grant, amounts: Amounts, context: Context) -> Lease | Refused:
        lease_id = f"{self._prefix}{next(self._ids):010x}"
        try:
            answer = self._store.reserve(lease_id, grant.rules, amounts, ttl_s=LEASE_TTL_S, context=context)
        except StoreUnavailable:
            return refused(
                "limits_unavailable",
                "The gateway cannot account for requests now. Try again shortly.",
                headers=(("retry-after", "2"),),
            )
        if isinstance(answer, Lease):
            return answer
        return replace(_limited(answer), limited=(grant.name, answer.rule.kind))

    def _plan(self, endpoint: Endpoint) -> "_FieldPlan":
        key = (endpoint.namespace, endpoint.name)
        plan = self._plans.get(key)
        if plan is None or plan.endpoint is not endpoint:
            if len(self._plans) > 10_000:
                self._plans.clear()  # endpoints that went; rebuilt on demand
            plan = self._plans[key] = _FieldPlan(endpoint)
        return plan

    def _rewrite(self, endpoint: Endpoint, fields: bodies.Fields, body: bytes, *, hide_usage: bool) -> bytes:
        plan = self._plan(endpoint)
        put: dict[str, Any] = {}
        if hide_usage:
            put["stream_options"] = bodies.stream_options_with_usage(fields)
        if plan.cache_salt:
            put["cache_salt"] = plan.cache_salt
        return bodies.edit(body, fields, remove=plan.forbidden(fields), put=put)


class _FieldPlan:
    """What has to be done to the bodies of one endpoint's requests."""

    __slots__ = ("_allowed", "_names", "cache_salt", "endpoint")

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._allowed = endpoint.allowed_engine_fields
        self._names = frozenset(name for name in _ENGINE_NAMES if not self._allows(name))
        self.cache_salt = ""
        if endpoint.cache_salt_per_tenant:
            self.cache_salt = hashlib.sha256(f"arks cache salt {endpoint.namespace}".encode()).hexdigest()[:32]

    def _allows(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self._allowed)

    def stateful(self, fields: bodies.Fields) -> str:
        """The first field by which a Responses request reaches beyond itself, where the endpoint does not allow it."""
        for name in _STATEFUL_FIELDS:
            if bytes(fields.get(name, b"null")) not in {b"null", b"false"} and not self._allows(name):
                return name
        return ""

    def touches(self, fields: bodies.Fields) -> bool:
        if self.cache_salt or not self._names.isdisjoint(fields):
            return True
        # One look at all names together; a match across two of them only costs the exact look.
        names = "\n".join(fields)
        return any(stem in names for stem in _ENGINE_STEMS) and bool(self.forbidden(fields))

    def forbidden(self, fields: bodies.Fields) -> frozenset[str]:
        return frozenset(
            name
            for name in fields
            if name in self._names or (name.startswith(_ENGINE_STEMS) and not self._allows(name))
        )


def _limited(refusal: Refusal) -> Refused:
    rule = refusal.rule
    headers = standing_headers(refusal.requests, refusal.tokens)
    if rule.unit == "concurrent":
        message = f"This token may have {rule.limit} requests in progress at a time."
        return refused("concurrency_limit_exceeded", message, headers=(("retry-after", "1"), *headers))
    numbers = f"limit {rule.limit}, used {refusal.used}, asked {refusal.asked}"
    if refusal.retry_after_s is None:
        message = f"The quota for {rule.kind} tokens does not cover this request: {numbers}."
        return refused("quota_exceeded", message, headers=(("retry-after", str(QUOTA_RETRY_AFTER_S)), *headers))
    retry_after_s = max(1, math.ceil(refusal.retry_after_s))
    message = f"Rate limit '{rule.kind}' reached: {numbers}. Try again in {retry_after_s} s."
    return refused("rate_limit_exceeded", message, headers=(("retry-after", str(retry_after_s)), *headers))


def standing_headers(requests: Standing | None, tokens: Standing | None) -> tuple[tuple[str, str], ...]:
    """x-ratelimit-* as OpenAI's clients read them; a family without a limit has none."""
    headers: list[tuple[str, str]] = []
    for family, standing in (("requests", requests), ("tokens", tokens)):
        if standing is not None:
            headers += (
                (f"x-ratelimit-limit-{family}", str(standing.limit)),
                (f"x-ratelimit-remaining-{family}", str(standing.remaining)),
                (f"x-ratelimit-reset-{family}", f"{standing.told_reset_s}s"),
            )
    return tuple(headers)
