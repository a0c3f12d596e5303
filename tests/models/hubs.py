"""Hugging Face's and ModelScope's hubs as the loader meets them: an API server and a storage server beside it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from urllib.parse import parse_qs, unquote, urlsplit

from aiohttp import web

from tests.models.origin import Origin

TOKEN = "hf_secret-token-of-the-test"
SIGNATURE = "X-Signature=very-secret-signature"


def commit_of(name):
    return hashlib.sha1(name.encode()).hexdigest()


@dataclass
class Hub:
    """``commits[commit][path]`` is content; paths in ``lfs`` are redirected to storage. ``branches`` move."""

    model: str = "org/model"
    commits: dict = field(default_factory=dict)
    branches: dict = field(default_factory=dict)
    lfs_from_bytes: int = 1000
    token: str | None = None
    gated: bool = False
    page: int = 1000
    next_link_base: str | None = None
    api: Origin = field(default_factory=Origin)
    storage: Origin = field(default_factory=Origin)
    lie_sizes: dict = field(default_factory=dict)
    on_resolved: object = None
    on_listed: object = None
    extra_entries: list = field(default_factory=list)

    def push(self, files, branch="main"):
        commit = commit_of(f"{branch}{len(self.commits)}")
        self.commits[commit] = files
        self.branches[branch] = commit
        return commit

    async def start(self):
        await self.api.start(self._api)
        await self.storage.start(self._storage)
        return self

    async def stop(self):
        await self.api.stop()
        await self.storage.stop()

    @property
    def sent(self):
        return self.api.total_sent + self.storage.total_sent

    async def _api(self, request):
        path = unquote(urlsplit(request.raw_path).path)
        fault = self.api.fault("api")
        if fault:
            return web.Response(status=fault[1], headers=fault[2] if len(fault) > 2 else {})
        authorised = self.token is None or request.headers.get("Authorization") == f"Bearer {self.token}"
        base = f"/api/models/{self.model}/"
        if path.startswith(base):
            if not authorised and not self.gated:
                return web.Response(status=401, headers={"X-Error-Code": "RepoNotFound"})
            return self._listing(request, path.removeprefix(base))
        base = f"/{self.model}/resolve/"
        if path.startswith(base):
            if not authorised:
                code = {"X-Error-Code": "GatedRepo"} if self.gated else {}
                return web.Response(status=401 if "Authorization" not in request.headers else 403, headers=code)
            commit, _, name = path.removeprefix(base).partition("/")
            content = self.commits.get(commit, {}).get(name)
            if content is None:
                return web.Response(status=404, headers={"X-Error-Code": "EntryNotFound"})
            if len(content) < self.lfs_from_bytes:
                return await self.api.send(request, name, content)
            location = f"{self.storage.url}/{commit}/{name}?{SIGNATURE}"
            return web.Response(status=302, headers={"Location": location})
        return web.Response(status=404, headers={"X-Error-Code": "RepoNotFound"})

    def _listing(self, request, rest):
        what, _, revision = rest.partition("/")
        commit = self.branches.get(revision, revision)
        if commit not in self.commits:
            return web.Response(status=404, headers={"X-Error-Code": "RevisionNotFound"})
        if what == "revision":
            if self.on_resolved:
                self.on_resolved()
            return web.json_response({"id": self.model, "sha": commit})
        entries = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": "folder"}]
        for path, content in self.commits[commit].items():
            size = self.lie_sizes.get(path, len(content))
            entry = {"type": "file", "path": path, "size": size}
            if len(content) >= self.lfs_from_bytes:
                entry["oid"] = "1" * 40
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": size, "pointerSize": 130}
            else:
                entry["oid"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            entries.append(entry)
        entries += self.extra_entries
        cursor = int(parse_qs(urlsplit(request.raw_path).query).get("cursor", ["0"])[0])
        headers = {}
        if cursor + self.page < len(entries):
            base = self.next_link_base or self.api.url
            link = f"{base}/api/models/{self.model}/tree/{commit}?recursive=true&cursor={cursor + self.page}"
            headers["Link"] = f'<{link}>; rel="next"'
        if self.on_listed:
            self.on_listed()
        return web.json_response(entries[cursor : cursor + self.page], headers=headers)

    async def _storage(self, request):
        parts = urlsplit(request.raw_path)
        if parts.query != SIGNATURE or "Authorization" in request.headers:
            return web.Response(status=400)
        commit, _, name = unquote(parts.path).strip("/").partition("/")
        return await self.storage.send(request, name, self.commits[commit][name], {"ETag": f'"{commit}"'})


@dataclass
class Scope:
    """ModelScope's hub: ``files`` at one commit; bytes by redirect."""

    model: str = "org/model"
    files: dict = field(default_factory=dict)
    token: str | None = None
    answer_code: int = 200
    api: Origin = field(default_factory=Origin)

    async def start(self):
        await self.api.start(self._handle)
        return self

    async def stop(self):
        await self.api.stop()

    async def _handle(self, request):
        parts = urlsplit(request.raw_path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            return web.Response(status=401)
        if parts.path == f"/api/v1/models/{self.model}/repo/files":
            if self.answer_code != 200:
                return web.json_response({"Code": self.answer_code, "Success": False, "Data": None})
            entries = [{"Path": "folder", "Type": "tree", "Size": 0, "Revision": commit_of("x")}]
            entries += [
                {
                    "Path": path,
                    "Name": path.rpartition("/")[2],
                    "Type": "blob",
                    "Size": len(content),
                    "Sha256": hashlib.sha256(content).hexdigest(),
                    "Revision": commit_of(path),
                }
                for path, content in self.files.items()
            ]
            return web.Response(body=json.dumps({"Code": 200, "Success": True, "Data": {"Files": entries}}))
        if parts.path == f"/api/v1/models/{self.model}/repo":
            name = query["FilePath"]
            if query["Revision"] != commit_of(name):
                return web.Response(status=404)
            return await self.api.send(request, name, self.files[name])
        return web.Response(status=404)
