"""Every way the gateway refuses a request, as one table.

    Refused            an HTTP answer of ours: OpenAI's error JSON with a stable `code`, Anthropic's on its paths
      .reason          one of REASONS; scripts, dashboards and docs/errors.md rely on it

`Refused` is a value, not an exception: refusing is an ordinary outcome of a decision. The text never holds a secret or
a piece of a body; a model's name is echoed only where it is short and printable.
"""

import re
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from extproc import messages
from extproc.usage.model import Api

PATIENCE_S: Final = 60
"""A refusal that lasts longer tells SDKs not to try again by themselves (`x-should-retry`). Of OpenAI's and Anthropic's
some sleep as long as `retry-after` says, be it a day, others overlook more than a minute and are back at once."""
ANTHROPIC_REQUEST_ID: Final = "request-id"
"""Anthropic's name for x-request-id; its SDK reads no other"""
ANTHROPIC_APIS: Final[frozenset[Api]] = frozenset({"messages", "count_tokens"})


@dataclass(frozen=True, slots=True)
class Reason:
    """One row of docs/errors.md."""

    code: str
    """stable, in the answer's `error.code`, in metrics and in the ledger"""
    status: int
    type: str
    """OpenAI's error type"""
    arks_header: str
    """the x-error-* header that Arks' users match on; its value is `true`, never a secret"""
    lasting: bool = False
    """to try again soon does not help"""

    @property
    def anthropic_type(self) -> str:
        """Anthropic's error type: of its few words the one for this status, where OpenAI's is none of them."""
        return _ANTHROPIC_TYPES.get(self.code) or _ANTHROPIC_TYPES.get(self.status) or self.type


def _table(*rows: Reason) -> dict[str, Reason]:
    return {row.code: row for row in rows}


_AUTH: Final = "authentication_error"
_INVALID: Final = "invalid_request_error"
_LIMIT: Final = "rate_limit_error"
_SERVER: Final = "server_error"

REASONS: Final = _table(
    Reason("missing_token", 401, _AUTH, "x-error-token"),
    Reason("invalid_token", 401, _AUTH, "x-error-token"),
    Reason("token_expired", 401, _AUTH, "x-error-token"),
    Reason("token_disabled", 401, _AUTH, "x-error-token"),
    Reason("token_ambiguous", 401, _AUTH, "x-error-token"),
    Reason("model_not_allowed", 403, "permission_error", "x-error-token"),
    Reason("model_not_found", 404, _INVALID, "x-error-no-model-backends"),
    Reason("unknown_path", 404, _INVALID, "x-error-routing"),
    Reason("method_not_allowed", 405, _INVALID, "x-error-routing"),
    Reason("body_required", 400, _INVALID, "x-error-request-body-processing"),
    Reason("invalid_json", 400, _INVALID, "x-error-request-body-processing"),
    Reason("invalid_field", 400, _INVALID, "x-error-request-body-processing"),
    Reason("duplicate_field", 400, _INVALID, "x-error-request-body-processing"),
    Reason("missing_model", 400, _INVALID, "x-error-no-model-in-request"),
    Reason("unsupported_encoding", 415, _INVALID, "x-error-request-body-processing"),
    Reason("body_too_large", 413, _INVALID, "x-error-request-body-processing"),
    Reason("rate_limit_exceeded", 429, _LIMIT, "x-error-rate-limit"),
    Reason("concurrency_limit_exceeded", 429, _LIMIT, "x-error-rate-limit"),
    Reason("quota_exceeded", 429, "insufficient_quota", "x-error-quota"),
    Reason("quota_not_found", 503, _SERVER, "x-error-quota", lasting=True),
    Reason("no_healthy_engine", 503, _SERVER, "x-error-routing"),
    Reason("engine_unreachable", 503, _SERVER, "x-error-routing"),
    Reason("engine_timeout", 504, _SERVER, "x-error-routing"),
    Reason("limits_unavailable", 503, _SERVER, "x-error-rate-limit"),
)

_ANTHROPIC_TYPES: Final[dict[str | int, str]] = {
    404: "not_found_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    "quota_not_found": "api_error",
}

_ECHOED: Final = re.compile(r"[\w./:@+-]{1,128}\Z", re.ASCII)


def printable(name: str) -> str:
    """A client's name for something, fit for an answer's text: itself, or nothing where it is long or odd."""
    return name if _ECHOED.match(name) else "(not shown)"


@dataclass(frozen=True, slots=True)
class Refused:
    """An answer of our own instead of an engine's."""

    reason: Reason
    message: str
    param: str | None = None
    """the request field at fault"""
    headers: tuple[tuple[str, str], ...] = ()
    """beside content-type and the x-error-* header: retry-after, x-ratelimit-*, allow"""
    limited: tuple[str, str] | None = None
    """the endpoint's name and the kind of the limit that refused (rpm, ..., total, concurrency), for the metrics"""

    def reply(self, api: Api = "chat", request_id: bytes = b"") -> bytes:
        """The ext_proc message that answers the client.

        The body carries Anthropic's outer `type` always, so that both kinds of SDK find their shape in it. On
        Anthropic's paths it has its types, too, the code where its SDK looks for it, and the request's id by its name.
        """
        reason, headers = self.reason, self.headers
        error: dict[str, Any] = {"message": self.message, "type": reason.type, "param": self.param, "code": reason.code}
        body: dict[str, Any] = {"type": "error", "error": error}
        if api in ANTHROPIC_APIS:
            error |= {"type": reason.anthropic_type, "details": {"error_code": reason.code}}
            body["request_id"] = request_id.decode("latin-1")
            headers += ((ANTHROPIC_REQUEST_ID, body["request_id"]),)
        if reason.lasting or any(name == "retry-after" and int(value) > PATIENCE_S for name, value in headers):
            headers += (("x-should-retry", "false"),)
        mutation = b"".join(
            (
                _CONTENT_TYPE,
                messages.set_header(reason.arks_header, b"true"),
                *(messages.set_header(name, value.encode()) for name, value in headers),
            )
        )
        return messages.immediate_response(reason.status, mutation, msgspec.json.encode(body), f"arks_{reason.code}")


_CONTENT_TYPE: Final = messages.set_header("content-type", b"application/json")


def refused(code: str, message: str, *, param: str | None = None, headers: tuple[tuple[str, str], ...] = ()) -> Refused:
    return Refused(REASONS[code], message, param, headers)
