"""Every way the gateway refuses a request, as one table.

    Refused            an HTTP answer of ours: OpenAI's error JSON with a stable `code`
      .reason          one of REASONS; scripts, dashboards and docs/errors.md rely on it

`Refused` is a value, not an exception: refusing is an ordinary outcome of a decision. The text never holds a secret or
a piece of a body; a model's name is echoed only where it is short and printable.
"""

import re
from dataclasses import dataclass
from typing import Final

import msgspec

from extproc import messages


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
    Reason("quota_not_found", 503, _SERVER, "x-error-quota"),
    Reason("no_healthy_engine", 503, _SERVER, "x-error-routing"),
    Reason("engine_unreachable", 503, _SERVER, "x-error-routing"),
    Reason("engine_timeout", 504, _SERVER, "x-error-routing"),
    Reason("limits_unavailable", 503, _SERVER, "x-error-rate-limit"),
)

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

    def reply(self) -> bytes:
        """The ext_proc message that answers the client.

        The body carries Anthropic's outer `type` too, so that both kinds of SDK find their shape in it.
        """
        error = {"message": self.message, "type": self.reason.type, "param": self.param, "code": self.reason.code}
        mutation = b"".join(
            (
                _CONTENT_TYPE,
                messages.set_header(self.reason.arks_header, b"true"),
                *(messages.set_header(name, value.encode()) for name, value in self.headers),
            )
        )
        body = msgspec.json.encode({"type": "error", "error": error})
        return messages.immediate_response(self.reason.status, mutation, body, f"arks_{self.reason.code}")


_CONTENT_TYPE: Final = messages.set_header("content-type", b"application/json")


def refused(code: str, message: str, *, param: str | None = None, headers: tuple[tuple[str, str], ...] = ()) -> Refused:
    return Refused(REASONS[code], message, param, headers)
