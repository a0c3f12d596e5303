"""Credentials for S3: from the Secret, else the pod's own identity, else none (a public bucket).

The pod's identity is what the cluster gives by environment: a web identity token to be exchanged at STS (EKS service
account roles), or a credentials endpoint with an authorisation token (EKS pod identities). Both expire and are asked
for again in time. The machine's own metadata service is not asked: a pod is not its node.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import msgspec

from controller.models.errors import LastingError, TransientError
from controller.models.http import Http, HttpRequest, RefusedError, persistently
from controller.models.sources.sigv4 import Credentials
from controller.models.sources.xml import texts

_EARLY_S = 300.0
_FIELD = "spec.instanceSpec.serviceAccountName"


class _Given(msgspec.Struct, rename="pascal"):
    access_key_id: str
    secret_access_key: str
    token: str = ""
    expiration: str = ""


class AwsIdentity:
    def __init__(self, http: Http, environment: Mapping[str, str], region: str) -> None:
        self._http = http
        self._environment = environment
        self._region = region
        self._now: Credentials | None = None
        self.named = self._source()

    def _source(self) -> str:
        env = self._environment
        if env.get("AWS_ACCESS_KEY_ID") and env.get("AWS_SECRET_ACCESS_KEY"):
            return "keys"
        if env.get("AWS_ROLE_ARN") and env.get("AWS_WEB_IDENTITY_TOKEN_FILE"):
            return "web identity"
        if env.get("AWS_CONTAINER_CREDENTIALS_FULL_URI"):
            return "pod identity"
        return ""

    async def credentials(self) -> Credentials | None:
        """None: sign nothing. Raises LoadError."""
        now = self._now
        if now is not None and (not now.expires_at or now.expires_at - _EARLY_S > time.time()):
            return now
        if self.named == "keys":
            env = self._environment
            token = env.get("AWS_SESSION_TOKEN", "").strip()
            self._now = Credentials(env["AWS_ACCESS_KEY_ID"].strip(), env["AWS_SECRET_ACCESS_KEY"].strip(), token)
        elif self.named == "web identity":
            self._now = await self._web_identity()
        elif self.named == "pod identity":
            self._now = await self._pod_identity()
        return self._now

    async def _web_identity(self) -> Credentials:
        env = self._environment
        endpoint = env.get("AWS_ENDPOINT_URL_STS") or f"https://sts.{self._region}.amazonaws.com"
        form = {
            "Action": "AssumeRoleWithWebIdentity",
            "Version": "2011-06-15",
            "RoleArn": env["AWS_ROLE_ARN"],
            "RoleSessionName": env.get("AWS_ROLE_SESSION_NAME") or "arks-models",
            "WebIdentityToken": _file(env["AWS_WEB_IDENTITY_TOKEN_FILE"]),
        }
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        body = await self._ask(HttpRequest(endpoint, headers, "POST", urlencode(form).encode(), follow=False))
        found = texts(body, ("AccessKeyId", "SecretAccessKey", "SessionToken", "Expiration"))
        return _credentials(
            _Given(found["AccessKeyId"], found["SecretAccessKey"], found["SessionToken"], found["Expiration"])
        )

    async def _pod_identity(self) -> Credentials:
        env = self._environment
        url = env["AWS_CONTAINER_CREDENTIALS_FULL_URI"]
        token = env.get("AWS_CONTAINER_AUTHORIZATION_TOKEN", "")
        if file := env.get("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"):
            token = _file(file)
        if urlsplit(url).scheme not in {"http", "https"}:
            raise LastingError("InvalidRequest", "AWS_CONTAINER_CREDENTIALS_FULL_URI is not a URL", field=_FIELD)
        body = await self._ask(HttpRequest(url, {"Authorization": token} if token else {}, follow=False))
        try:
            return _credentials(msgspec.json.decode(body, type=_Given))
        except msgspec.DecodeError:
            raise TransientError("UnusableAnswer", "the pod's identity endpoint does not give credentials") from None

    async def _ask(self, request: HttpRequest) -> bytes:
        try:
            body, _ = await persistently(self._http.settings, lambda: self._http.document(request))
        except RefusedError as refused:
            told = f"{refused.answer.host} gives the pod's {self.named} no credentials ({refused.answer.status})"
            raise LastingError("AccessDenied", told, field=_FIELD) from None
        return body


def _credentials(given: _Given) -> Credentials:
    if not given.access_key_id or not given.secret_access_key:
        raise TransientError("UnusableAnswer", "the pod's identity endpoint does not give credentials")
    try:
        expires_at = datetime.fromisoformat(given.expiration).timestamp() if given.expiration else 0.0
    except ValueError:
        expires_at = time.time() + 900.0
    return Credentials(given.access_key_id, given.secret_access_key, given.token, expires_at)


def _file(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        raise LastingError("AccessDenied", "the pod's identity token cannot be read", field=_FIELD) from None
