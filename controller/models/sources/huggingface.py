"""Hugging Face's hub, or any server that speaks its API (a mirror).

Protocol: ``/api/models/{repo}/revision/{revision}`` gives the commit that a branch or tag stands for now;
``/api/models/{repo}/tree/{commit}?recursive=true`` lists files, in pages linked by the Link header, with a git blob's
SHA-1 for small files and the SHA-256 of LFS files; ``/{repo}/resolve/{commit}/{path}`` gives bytes, large ones by a
redirect to storage. Everything after the first request names the commit, so a branch that moves changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote, urlsplit

from controller.models.digest import Digest
from controller.models.errors import LastingError, TransientError
from controller.models.http import Answer, Http, HttpRequest
from controller.models.request import HuggingFace
from controller.models.sources.source import Listing, RemoteFile, Source

DEFAULT_ENDPOINT = "https://huggingface.co"
_NEXT = re.compile(r'<([^>]*)>\s*;\s*rel="?next"?')
_HEX40, _HEX64 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")
_PAGES = 10_000


class HuggingFaceHub(Source):
    spec = "spec.source.huggingface"

    def __init__(self, http: Http, model: str, source: HuggingFace, environment: Mapping[str, str]) -> None:
        super().__init__(http)
        self._endpoint = (source.endpoint or environment.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
        self._revision = source.revision or "main"
        self._token = environment.get("HF_TOKEN", "").strip()
        self._model = repository(model)
        self._headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        self._commit = ""

    async def listing(self, wanted: Callable[[str], bool]) -> Listing:
        api = f"{self._endpoint}/api/models/{self._model}"
        told, _ = await self.json(f"{api}/revision/{quote(self._revision, safe='')}", self._headers)
        commit = told.get("sha") if isinstance(told, dict) else None
        if not isinstance(commit, str) or not _HEX40.fullmatch(commit):
            raise TransientError("UnusableAnswer", "the hub does not say which commit the revision stands for")
        self._commit = commit
        files: list[RemoteFile] = []
        query = "recursive=true"
        for _ in range(_PAGES):
            page, headers = await self.json(f"{api}/tree/{commit}?{query}", self._headers)
            files.extend(self._files(page, wanted))
            match = _NEXT.search(headers.get("Link", ""))
            # A mirror may link to the hub itself: only the cursor is taken.
            query = urlsplit(match[1]).query if match else ""
            if not query:
                return Listing(commit, tuple(files))
        raise TransientError("UnusableAnswer", "the hub's list of files does not end")

    def _files(self, page: Any, wanted: Callable[[str], bool]) -> list[RemoteFile]:
        try:
            entries = [entry for entry in page if entry["type"] == "file" and wanted(entry["path"])]
            return [self._file(entry) for entry in entries]
        except (TypeError, KeyError, ValueError):
            raise TransientError("UnusableAnswer", "the hub's list of files is not what it should be") from None

    def _file(self, entry: Any) -> RemoteFile:
        path, lfs = str(entry["path"]), entry.get("lfs")
        if lfs:
            digest, size = Digest("sha256", str(lfs["oid"]).removeprefix("sha256:")), int(lfs["size"])
            if not _HEX64.fullmatch(digest.value):
                raise ValueError(path)
        else:
            digest, size = Digest("git-sha1", str(entry["oid"])), int(entry["size"])
            if not _HEX40.fullmatch(digest.value):
                raise ValueError(path)
        if size < 0:
            raise ValueError(path)
        return RemoteFile(path, size, digest, identity=f"{self._endpoint}/{self._model}")

    async def request(self, file: RemoteFile, span: str) -> HttpRequest:
        url = f"{self._endpoint}/{self._model}/resolve/{self._commit}/{quote(file.path)}"
        return HttpRequest(url, {**self._headers, "Range": span} if span else self._headers)

    def refusal(self, answer: Answer) -> LastingError:
        code = answer.headers.get("X-Error-Code", "")
        host, token = answer.host, f"{self.spec}.tokenSecretRef"
        if code == "GatedRepo":
            who = "the token's account has not been given it" if self._token else "no token is given"
            return LastingError(
                "AccessDenied",
                f"{host}: access to {self._model} is restricted and {who}; accept the repository's terms on the hub, "
                "and put that account's token under HF_TOKEN into the Secret",
                field=token,
            )
        if code == "RevisionNotFound":
            return LastingError(
                "NotFound", f"{host}: {self._model} has no such revision", field=f"{self.spec}.revision"
            )
        if answer.status == 404 or code == "RepoNotFound":
            hint = "" if self._token else "; if it is private, a token is needed"
            return LastingError(
                "NotFound", f"{host} has no repository {self._model} (or no such revision){hint}", field="spec.model"
            )
        if answer.status == 401:
            said = "refuses the token; renew HF_TOKEN in the Secret" if self._token else "asks for a token"
            return LastingError("Unauthorized", f"{host} {said}", field=token)
        if answer.status == 403:
            said = "the token may not read it" if self._token else "a token is needed"
            return LastingError("AccessDenied", f"{host} denies access to {self._model}: {said}", field=token)
        return LastingError("SourceRefused", f"{host} answers {answer.status}", field=self.spec)


def repository(model: str) -> str:
    """A repository's name as part of a URL; raises LastingError."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)?", model) or ".." in model:
        raise LastingError("InvalidRequest", "spec.model is not the name of a repository", field="spec.model")
    return model
