"""What the Kubernetes API can answer, as one tree.

    KubeError                    every failure of this package; knows `reason` and whether trying again can help
    ├── UnreachableError         no answer: refused, reset, timed out
    ├── MalformedError           an answer that is not what its kind should be
    ├── CredentialsError         no usable kubeconfig, token or certificate
    ├── NotLeaderError           the lease is not held (any more): nothing was sent
    └── ApiError                 an answer from 400 on, with its `status`
        ├── UnauthorizedError    401, after credentials were read anew
        ├── ForbiddenError       403
        ├── NotFoundError        404
        ├── ConflictError        409: stale resourceVersion, or a field that another manager owns
        ├── AlreadyExistsError   409 of a create
        ├── GoneError            410: list again
        ├── InvalidError         400, 422, and 500 of a tree that server-side apply cannot take: permanent
        ├── TooManyRequestsError 429
        └── UnavailableError     500, 502, 503, 504

Messages of the API server quote rejected values, which may be secrets: they are struck out here, so that an error's
text may be logged and shown in a condition.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar

import msgspec

RETRY_AFTER_MAX_S = 30.0  # a server may ask for less haste, not for hours of blindness
_QUOTED = re.compile(
    r"((?:Invalid|Duplicate|Unsupported|Forbidden) value|Too long|Too many): "
    r'(?!must|may)("(?:[^"\\]|\\.)*"|\{.*?\}(?=: )|[^\s:"{][^:]*)(?=[:,\n]|$)'
)


class KubeError(Exception):
    """A failure; `permanent` means that the same request would fail for ever."""

    reason: str = "Unknown"
    permanent: bool = False
    retry_after_s: float = 0.0


class UnreachableError(KubeError):
    reason = "Unreachable"


class MalformedError(KubeError):
    reason = "Malformed"


class CredentialsError(KubeError):
    reason = "Credentials"


class NotLeaderError(KubeError):
    reason = "NotLeader"


class Cause(msgspec.Struct, frozen=True):
    """One cause of a refusal: the field and why."""

    reason: str = ""
    message: str = ""
    field: str = ""


class _Details(msgspec.Struct):
    causes: list[Cause] = []
    retry_after_s: float = msgspec.field(name="retryAfterSeconds", default=0.0)


class Status(msgspec.Struct):
    """Kubernetes' Status object, as far as it is used."""

    code: int = 0
    reason: str = ""
    message: str = ""
    details: _Details | None = None


class ApiError(KubeError):
    """The API server said no."""

    def __init__(
        self, status: int, message: str, *, reason: str = "", retry_after_s: float = 0.0, causes: tuple[Cause, ...] = ()
    ) -> None:
        self.status = status
        self.message = struck_out(message)
        self.reason = reason or type(self).reason
        self.retry_after_s = min(retry_after_s, RETRY_AFTER_MAX_S)
        self.causes = tuple(Cause(cause.reason, struck_out(cause.message), cause.field) for cause in causes)
        super().__init__(f"{status} {self.reason}: {self.message}")


class UnauthorizedError(ApiError):
    reason = "Unauthorized"


class ForbiddenError(ApiError):
    reason = "Forbidden"


class NotFoundError(ApiError):
    reason = "NotFound"


class ConflictError(ApiError):
    reason = "Conflict"


class AlreadyExistsError(ConflictError):
    reason = "AlreadyExists"


class GoneError(ApiError):
    reason = "Gone"


class InvalidError(ApiError):
    reason = "Invalid"
    permanent = True


class TooManyRequestsError(ApiError):
    reason = "TooManyRequests"


class UnavailableError(ApiError):
    reason = "Unavailable"


class _Kinds:
    by_status: ClassVar[dict[int, type[ApiError]]] = {
        400: InvalidError,
        401: UnauthorizedError,
        403: ForbiddenError,
        404: NotFoundError,
        409: ConflictError,
        410: GoneError,
        422: InvalidError,
        429: TooManyRequestsError,
    }


_decode_status = msgspec.json.Decoder(Status).decode


def described(error: Exception) -> str:
    """What is wrong with an object that does not decode, without quoting it (it may be a secret)."""
    if isinstance(error, msgspec.ValidationError):
        return str(error)
    listed = getattr(error, "errors", None)  # pydantic's
    if callable(listed):
        found = listed(include_url=False, include_input=False, include_context=False)
        return "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in found)
    return type(error).__name__


def struck_out(message: str) -> str:
    """The message without the values that it quotes from the refused object."""
    return _QUOTED.sub(r"\1: <hidden>", message)


def api_error(status: int, body: bytes, headers: Mapping[str, str] | None = None) -> ApiError:
    """The typed error of an HTTP answer; `body` is a Status in JSON, or whatever a proxy in between wrote."""
    try:
        said = _decode_status(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        said = Status(message=body[:300].decode(errors="replace"))
    try:
        retry_after_s = float((headers or {}).get("Retry-After", 0))
    except ValueError:
        retry_after_s = 0.0
    return status_error(status, said, retry_after_s)


def status_error(status: int, said: Status, retry_after_s: float = 0.0) -> ApiError:
    """The typed error of a Status object, as it also comes inside a watch."""
    details = said.details or _Details()
    kind = _Kinds.by_status.get(status, UnavailableError if status >= 500 else ApiError)
    if said.reason == "AlreadyExists":
        kind = AlreadyExistsError
    elif status == 500 and "failed to create typed patch object" in said.message:
        # Server-side apply reports an unknown field, or a list's key that comes twice, as an internal error; what we
        # sent is wrong, and stays wrong.
        kind = InvalidError
    return kind(
        status,
        said.message,
        reason=said.reason,
        retry_after_s=max(retry_after_s, details.retry_after_s),
        causes=tuple(details.causes),
    )
