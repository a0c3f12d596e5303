"""An artifact of an OCI registry: a manifest by tag or digest, files as its layers.

Protocol: OCI distribution specification 1.1 (manifests, blobs), image specification (descriptors, index, annotations).
A layer is a file named by the annotation ``org.opencontainers.image.title`` (as ORAS writes) or
``org.cncf.model.filepath`` (as the model specification has it), or a tar archive, plain or gzip, of files. Every
document and blob is verified by the digest that names it.
"""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Callable, Mapping
from typing import Any

from controller.models.digest import Digest
from controller.models.errors import ContentError, LastingError, TransientError
from controller.models.http import Answer, Http, HttpRequest
from controller.models.request import Oci
from controller.models.sources.registry_token import RegistryToken
from controller.models.sources.source import Listing, RemoteFile, Source, Unpack, decoded

_MANIFESTS = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.oci.artifact.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
_INDEXES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
_NAMES = ("org.cncf.model.filepath", "org.opencontainers.image.title")
_REFERENCE = re.compile(
    r"(?:(?P<registry>[A-Za-z0-9.-]+(?::\d{1,5})?|\[[0-9a-fA-F:]+\](?::\d{1,5})?)/)?"
    r"(?P<repository>[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*)"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{0,127}))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)
_SHA256 = re.compile(r"sha256:[0-9a-f]{64}")
_DOCKER = "docker.io"


class OciArtifact(Source):
    spec = "spec.source.oci"

    def __init__(self, http: Http, source: Oci, environment: Mapping[str, str]) -> None:
        super().__init__(http)
        registry, self._repository, self._reference = parsed_reference(source.reference)
        self._scheme = "http" if source.plain_http else "https"
        self._host = "registry-1.docker.io" if registry == _DOCKER else registry
        self._token = RegistryToken(http, registry, self._repository, environment, secure=not source.plain_http)

    async def listing(self, wanted: Callable[[str], bool]) -> Listing:
        manifest, digest = await self._manifest(self._reference)
        if manifest.get("mediaType") in _INDEXES or "manifests" in manifest:
            manifest, digest = await self._manifest(_chosen(manifest))
        layers = manifest.get("layers") or manifest.get("blobs") or []
        try:
            files = [self._file(layer) for layer in layers]
        except (KeyError, TypeError, ValueError, AttributeError):
            raise TransientError("UnusableAnswer", "the artifact's manifest is not what it should be") from None
        kept = tuple(file for file in files if file.unpack or wanted(file.path))
        return Listing(digest, kept)

    async def _manifest(self, reference: str) -> tuple[dict[str, Any], str]:
        async def make() -> HttpRequest:
            url = f"{self._scheme}://{self._host}/v2/{self._repository}/manifests/{reference}"
            return HttpRequest(url, {"Accept": ", ".join((*_MANIFESTS, *_INDEXES)), **self._token.headers()})

        body, _ = await self.document(make)
        digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
        if reference.startswith("sha256:") and digest != reference:
            raise ContentError("the registry's manifest is not the one that its digest names")
        told = decoded(body)
        if not isinstance(told, dict):
            raise TransientError("UnusableAnswer", "the artifact's manifest is not what it should be")
        return told, digest

    def _file(self, layer: Mapping[str, Any]) -> RemoteFile:
        digest, size, media = str(layer["digest"]), int(layer["size"]), str(layer.get("mediaType", ""))
        if not _SHA256.fullmatch(digest) or size < 0:
            raise ValueError(digest)
        notes = layer.get("annotations") or {}
        name = next((str(notes[one]) for one in _NAMES if notes.get(one)), "")
        unpack = _archive(media, unpack=str(notes.get("io.deis.oras.content.unpack", "")) == "true", named=bool(name))
        return RemoteFile(
            name if not unpack else digest,
            size,
            Digest("sha256", digest.removeprefix("sha256:")),
            address=digest,
            unpack=unpack,
        )

    async def request(self, file: RemoteFile, span: str) -> HttpRequest:
        url = f"{self._scheme}://{self._host}/v2/{self._repository}/blobs/{file.address}"
        return HttpRequest(url, {**self._token.headers(), **({"Range": span} if span else {})})

    async def renew(self, answer: Answer) -> bool:
        return answer.status == 401 and await self._token.renew(answer.headers.get("WWW-Authenticate", ""))

    def refusal(self, answer: Answer) -> LastingError:
        where = f"{answer.host}/{self._repository}"
        if answer.status == 404:
            return LastingError("NotFound", f"{where} has no such artifact", field=f"{self.spec}.reference")
        if answer.status in (401, 403):
            said = "the pull secret does not open it" if self._token.has_credentials else "a pull secret is needed"
            reason = "Unauthorized" if answer.status == 401 else "AccessDenied"
            return LastingError(reason, f"{where} denies access: {said}", field=f"{self.spec}.pullSecretRef")
        return LastingError("SourceRefused", f"{answer.host} answers {answer.status}", field=self.spec)


def parsed_reference(text: str) -> tuple[str, str, str]:
    """(registry, repository, digest or tag); raises LastingError."""
    match = _REFERENCE.fullmatch(text)
    if match is None:
        told = "this is not registry/repository:tag or registry/repository@sha256:digest"
        raise LastingError("InvalidRequest", told, field="spec.source.oci.reference")
    registry, repository = match["registry"] or "", match["repository"]
    if registry and not ("." in registry or ":" in registry or registry == "localhost"):
        registry, repository = "", f"{registry}/{repository}"
    if not registry or registry == "index.docker.io":
        registry = _DOCKER
    if registry == _DOCKER and "/" not in repository:
        repository = f"library/{repository}"
    return registry, repository, match["digest"] or match["tag"] or "latest"


def _archive(media: str, *, unpack: bool, named: bool) -> Unpack:
    if named and not unpack and not media.endswith((".tar", ".tar+gzip", ".tar.gzip")):
        return ""
    if media.endswith(("tar+gzip", "tar.gzip")) or (unpack and media.endswith("gzip")):
        return "tar+gzip"
    if media.endswith(("tar", "+tar")):
        return "tar"
    if unpack:
        return "tar+gzip"
    told = "a layer of the artifact has neither a file name nor a tar archive, plain or gzip"
    raise LastingError("UnsupportedArtifact", told, field="spec.source.oci.reference")


def _chosen(index: Mapping[str, Any]) -> str:
    """The digest of the one manifest that is for this machine, or for any."""
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    entries = [one for one in index.get("manifests") or [] if isinstance(one, dict)]
    for one in entries:
        where = one.get("platform") or {}
        digest = str(one.get("digest", ""))
        fits = where.get("os", "linux") in {"linux", ""} and where.get("architecture", machine) in {machine, ""}
        if _SHA256.fullmatch(digest) and (fits or len(entries) == 1):
            return digest
    told = f"the artifact's index has no manifest for linux/{machine}"
    raise LastingError("UnsupportedArtifact", told, field="spec.source.oci.reference")
