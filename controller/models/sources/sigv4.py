"""AWS Signature Version 4 for requests without a body, as S3 and its likes want it.

Source of the rules: AWS General Reference, "Signature Version 4 signing process", and the Amazon S3 API Reference,
"Authenticating Requests (AWS Signature Version 4)". S3 differs from other services in that a path is encoded once and
never normalised.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from urllib.parse import quote

EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()


@dataclass(frozen=True, slots=True, repr=False)
class Credentials:
    """``expires_at``: Unix time, 0 for never."""

    access_key_id: str
    secret_access_key: str
    session_token: str = ""
    expires_at: float = 0.0


def encoded_path(path: str) -> str:
    return quote(path, safe="/-_.~")


def encoded_query(pairs: Sequence[tuple[str, str]]) -> str:
    return "&".join(sorted(f"{quote(name, safe='-_.~')}={quote(value, safe='-_.~')}" for name, value in pairs))


def signed_headers(
    method: str,
    host: str,
    path: str,
    query: Sequence[tuple[str, str]],
    headers: Mapping[str, str],
    credentials: Credentials,
    region: str,
    now: datetime,
    service: str = "s3",
) -> dict[str, str]:
    """``headers`` with those that sign them. ``host`` has the port where it is not the scheme's own; ``path`` is not
    encoded yet.
    """
    at = now.astimezone(UTC).strftime("%Y%m%dT%H%M%SZ")
    told = {**headers, "x-amz-content-sha256": EMPTY_SHA256, "x-amz-date": at}
    if credentials.session_token:
        told["x-amz-security-token"] = credentials.session_token
    # Range may be changed by a proxy on the way; what it means is checked by the answer.
    covered = {name.lower(): " ".join(value.split()) for name, value in told.items() if name.lower() != "range"}
    covered["host"] = host
    names = ";".join(sorted(covered))
    canonical = "\n".join(
        (
            method,
            encoded_path(path),
            encoded_query(query),
            *(f"{name}:{covered[name]}" for name in sorted(covered)),
            "",
            names,
            EMPTY_SHA256,
        )
    )
    scope = f"{at[:8]}/{region}/{service}/aws4_request"
    to_sign = "\n".join(("AWS4-HMAC-SHA256", at, scope, hashlib.sha256(canonical.encode()).hexdigest()))
    key = f"AWS4{credentials.secret_access_key}".encode()
    for step in (at[:8], region, service, "aws4_request"):
        key = hmac.digest(key, step.encode(), "sha256")
    signature = hmac.digest(key, to_sign.encode(), "sha256").hex()
    told["Authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={credentials.access_key_id}/{scope}, SignedHeaders={names}, Signature={signature}"
    )
    return told
