"""ModelScope's hub.

Protocol: ``/api/v1/models/{repo}/repo/files?Revision=…&Recursive=true`` lists files with size, SHA-256 and the commit
that last touched each; ``/api/v1/models/{repo}/repo?Revision=…&FilePath=…`` gives bytes, by a redirect for large
ones. Each file is asked for at its own commit, so a branch that moves changes nothing. Errors may come with HTTP 200
and a ``Code`` in the body.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlencode

from controller.models.digest import Digest
from controller.models.errors import LastingError, TransientError
from controller.models.http import Answer, Http, HttpRequest
from controller.models.request import ModelScope
from controller.models.sources.huggingface import repository
from controller.models.sources.source import Listing, RemoteFile, Source, listing_revision

DEFAULT_ENDPOINT = "https://modelscope.cn"
_HEX40, _HEX64 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")


class ModelScopeHub(Source):
    spec = "spec.source.modelscope"

    def __init__(self, http: Http, model: str, source: ModelScope, environment: Mapping[str, str]) -> None:
        super().__init__(http)
        self._endpoint = (source.endpoint or environment.get("MODELSCOPE_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
        self._revision = source.revision or "master"
        token = environment.get("MODELSCOPE_API_TOKEN", "").strip()
        self._token = token
        self._model = repository(model)
        # The hub takes a token as a bearer, and older deployments only as the session's cookie.
        self._headers = {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"} if token else {}

    async def listing(self, wanted: Callable[[str], bool]) -> Listing:
        query = urlencode({"Revision": self._revision, "Recursive": "true"})
        told, _ = await self.json(f"{self._endpoint}/api/v1/models/{self._model}/repo/files?{query}", self._headers)
        try:
            if told.get("Code") != 200 or told.get("Success") is False:
                raise self._refused(told)
            entries = [
                entry for entry in told["Data"]["Files"] or [] if entry["Type"] != "tree" and wanted(entry["Path"])
            ]
            files = tuple(self._file(entry) for entry in entries)
        except (TypeError, KeyError, ValueError, AttributeError):
            raise TransientError("UnusableAnswer", "the hub's list of files is not what it should be") from None
        if _HEX40.fullmatch(self._revision):
            return Listing(self._revision, files)
        return Listing(listing_revision(files), files)

    def _file(self, entry: Any) -> RemoteFile:
        sha256, size = str(entry.get("Sha256") or ""), int(entry["Size"])
        if size < 0 or (sha256 and not _HEX64.fullmatch(sha256)):
            raise ValueError
        commit = str(entry.get("Revision") or "")
        at = commit if _HEX40.fullmatch(commit) else self._revision
        digest = Digest("sha256", sha256) if sha256 else Digest()
        path = str(entry["Path"])
        return RemoteFile(path, size, digest, f"{self._endpoint}/{self._model}/{at}/{path}", address=at)

    def _refused(self, told: Mapping[str, Any]) -> Exception:
        code = told.get("Code")
        if code == 404:
            return LastingError("NotFound", f"the hub has no {self._model} at this revision", field="spec.model")
        if code in {401, 403}:
            return LastingError(
                "AccessDenied", f"the hub denies access to {self._model}", field=f"{self.spec}.tokenSecretRef"
            )
        return TransientError(
            "SourceUnavailable", f"the hub answers with code {code if isinstance(code, int) else '?'}"
        )

    async def request(self, file: RemoteFile, span: str) -> HttpRequest:
        query = urlencode({"Revision": file.address, "FilePath": file.path})
        url = f"{self._endpoint}/api/v1/models/{self._model}/repo?{query}"
        return HttpRequest(url, {**self._headers, "Range": span} if span else self._headers)

    def refusal(self, answer: Answer) -> LastingError:
        token = f"{self.spec}.tokenSecretRef"
        if answer.status in (401, 403):
            said = "refuses the token; renew MODELSCOPE_API_TOKEN in the Secret" if self._token else "asks for a token"
            reason = "Unauthorized" if answer.status == 401 else "AccessDenied"
            return LastingError(reason, f"{answer.host} {said}", field=token)
        if answer.status == 404:
            told = f"{answer.host} has no repository {self._model}, or not this revision"
            return LastingError("NotFound", told, field="spec.model")
        return LastingError("SourceRefused", f"{answer.host} answers {answer.status}", field=self.spec)
