"""An artifact of a registry: by tag or digest, with and without a pull secret, files and archives."""

from __future__ import annotations

import gzip
import io
import json
import tarfile

import pytest

from controller.models.errors import ContentError, LastingError
from controller.models.sources.oci import parsed_reference
from tests.models.origin import CUT, WRONG, noise
from tests.models.stores import Registry

WEIGHTS = noise(600_000, 1)
FILES = {"config.json": b"{}", "shards/model.safetensors": WEIGHTS}


@pytest.fixture
async def registry():
    server = await Registry().start()
    yield server
    await server.stop()


@pytest.fixture
def secret(registry, tmp_path):
    folder = tmp_path / "docker"
    folder.mkdir()

    def write(auths):
        (folder / "config.json").write_text(json.dumps({"auths": auths}))
        return {"DOCKER_CONFIG": str(folder)}

    return write


@pytest.fixture
def opened(registry, secret):
    return secret({registry.name: {"auth": registry.authorization.removeprefix("Basic ")}})


def source(registry, reference="v1"):
    mark = "@" if reference.startswith("sha256:") else ":"
    return {"kind": "oci", "reference": f"{registry.name}/{registry.repository}{mark}{reference}", "plainHttp": True}


def files(registry):
    return [registry.layer(content, name) for name, content in FILES.items()]


def archive(entries, compressed=True):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for entry, content in entries:
            info = entry if isinstance(entry, tarfile.TarInfo) else tarfile.TarInfo(entry)
            if content is not None:
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content) if content is not None else None)
    return gzip.compress(out.getvalue()) if compressed else out.getvalue()


async def test_files_of_an_artifact(registry, loader, opened):
    digest = registry.push(files(registry))
    marker = await loader(source(registry), environment=opened)
    assert loader.files() == FILES
    assert marker.revision == digest
    assert all("Authorization" not in headers for _, _, headers in registry.storage.requests)
    assert "registry-password" not in loader.said()
    assert "registry-token" not in loader.said()


async def test_artifact_by_digest(registry, loader, opened):
    digest = registry.push(files(registry))
    registry.push([], tag="v1")
    await loader(source(registry, digest), environment=opened)
    assert loader.files() == FILES


async def test_manifest_that_is_not_the_digest_s_is_refused(registry, loader, opened):
    digest = registry.push(files(registry))
    registry.manifests[digest] = registry.manifests["v1"].replace(b"config", b"confog")
    with pytest.raises(ContentError):
        await loader(source(registry, digest), environment=opened)


async def test_blob_that_is_not_its_digest_s_is_refused(registry, loader, opened):
    registry.push(files(registry))
    registry.storage.forever = True
    for digest in registry.blobs:
        registry.storage.faults[digest] = [(WRONG,)]
    with pytest.raises(ContentError):
        await loader(source(registry), environment=opened)
    assert loader.files() == {}


async def test_model_specification_s_names_and_index(registry, loader, opened):
    layer = registry.layer(
        WEIGHTS, media="application/vnd.cncf.model.weight.v1.raw", **{"org.cncf.model.filepath": "w/a.gguf"}
    )
    digest = registry.push([layer])
    other = {"digest": "sha256:" + "0" * 64, "platform": {"os": "windows", "architecture": "amd64"}}
    index = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [other, {"digest": digest}],
    }
    registry.put(json.dumps(index).encode(), "v1")
    marker = await loader(source(registry), environment=opened)
    assert loader.files() == {"w/a.gguf": WEIGHTS}
    assert marker.revision == digest


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("cache", [None, ""])
async def test_archives_are_unpacked(registry, loader, opened, compressed, cache):
    media = "application/vnd.oci.image.layer.v1.tar" + ("+gzip" if compressed else "")
    tar = archive([("./config.json", b"{}"), ("shards/model.safetensors", WEIGHTS)], compressed)
    registry.push([registry.layer(tar, media=media)])
    marker = await loader(source(registry), environment=opened, cache=cache)
    assert loader.files() == FILES
    assert {file.path for file in marker.files} == set(FILES)
    await registry.storage.stop()
    await loader(source(registry), environment=opened, cache=cache)


def linked(name, kind, target):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "entries",
    [
        [("../evil", b"x")],
        [("/etc/evil", b"x")],
        [("a/../../evil", b"x")],
        [(linked("link", tarfile.SYMTYPE, "/etc"), None), ("link/evil", b"x")],
        [(linked("hard", tarfile.LNKTYPE, "/etc/passwd"), None)],
        [(linked("device", tarfile.CHRTYPE, ""), None)],
        [(".arks-ready.json", b"{}")],
    ],
)
async def test_archives_that_lead_out_are_refused(registry, loader, opened, entries, tmp_path):
    media = "application/vnd.oci.image.layer.v1.tar+gzip"
    registry.push([registry.layer(archive(entries), media=media)])
    with pytest.raises(LastingError):
        await loader(source(registry), environment=opened)
    assert not any(path.name == "evil" for path in tmp_path.rglob("*"))
    assert loader.marker() is None


async def test_a_layer_that_is_no_archive_is_told(registry, loader, opened):
    registry.push([registry.layer(noise(5000), media="application/vnd.oci.image.layer.v1.tar+gzip")])
    with pytest.raises(ContentError):
        await loader(source(registry), environment=opened)


async def test_a_layer_that_nobody_can_read_is_told(registry, loader, opened):
    registry.push([registry.layer(noise(5000), media="application/vnd.oci.image.layer.v1.tar+zstd")])
    with pytest.raises(LastingError) as failed:
        await loader(source(registry), environment=opened)
    assert failed.value.reason == "UnsupportedArtifact"


async def test_token_that_expires_while_loading_is_renewed(registry, loader, opened):
    registry.push(files(registry))
    registry.uses = 2
    await loader(source(registry), environment=opened)
    assert loader.files() == FILES
    assert registry.given > 1


async def test_basic_authentication(registry, loader, opened):
    registry.push(files(registry))
    registry.basic = True
    await loader(source(registry), environment=opened)
    assert loader.files() == FILES


async def test_secret_with_user_and_password(registry, loader, secret):
    registry.push(files(registry))
    name, password = registry.user
    await loader(
        source(registry), environment=secret({f"http://{registry.name}/v2/": {"username": name, "password": password}})
    )
    assert loader.files() == FILES


async def test_anonymous_pull(registry, loader):
    registry.push(files(registry))
    registry.user = None
    await loader(source(registry))
    assert loader.files() == FILES


@pytest.mark.parametrize(
    ("auths", "reference", "reason", "field"),
    [
        ({}, "v1", "Unauthorized", "spec.source.oci.pullSecretRef"),
        ({"NAME": {"auth": "d3Jvbmc6cGFzc3dvcmQ="}}, "v1", "Unauthorized", "spec.source.oci.pullSecretRef"),
        ({"NAME": {"auth": "%%%"}}, "v1", "InvalidPullSecret", "spec.source.oci.pullSecretRef"),
        ({"NAME": {"auth": "AUTH"}}, "v2", "NotFound", "spec.source.oci.reference"),
    ],
)
async def test_refusals_name_the_field(registry, loader, secret, auths, reference, reason, field):
    registry.push(files(registry))
    right = registry.authorization.removeprefix("Basic ")
    auths = json.loads(json.dumps(auths).replace("NAME", registry.name).replace("AUTH", right))
    with pytest.raises(LastingError) as failed:
        await loader(source(registry, reference), environment=secret(auths))
    assert (failed.value.reason, failed.value.field) == (reason, field)


async def test_another_registry_s_password_is_not_sent(registry, loader, secret):
    registry.push(files(registry))
    environment = secret({"other.example.org": {"auth": registry.authorization.removeprefix("Basic ")}})
    with pytest.raises(LastingError):
        await loader(source(registry), environment=environment)
    assert all("Authorization" not in headers for _, _, headers in registry.tokens_origin.requests)


async def test_cut_blob_goes_on(registry, loader, opened):
    registry.push(files(registry))
    digest = registry.blob(WEIGHTS)
    registry.storage.faults[digest] = [(CUT, 100_000)]
    await loader(source(registry), environment=opened)
    assert registry.storage.sent[digest] == len(WEIGHTS)


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("registry.example.org/a/b:v1", ("registry.example.org", "a/b", "v1")),
        ("localhost:5000/a@sha256:" + "a" * 64, ("localhost:5000", "a", "sha256:" + "a" * 64)),
        ("registry.example.org/a:v1@sha256:" + "b" * 64, ("registry.example.org", "a", "sha256:" + "b" * 64)),
        ("org/model", ("docker.io", "org/model", "latest")),
        ("model:v1", ("docker.io", "library/model", "v1")),
        ("docker.io/model", ("docker.io", "library/model", "latest")),
    ],
)
def test_references(text, parsed):
    assert parsed_reference(text) == parsed


@pytest.mark.parametrize(
    "text", ["", "Registry.org/UPPER", "a/../b", "host/a:b:c", "https://host/a", "host/a@sha256:1", "host/a?x"]
)
def test_references_that_are_none(text):
    with pytest.raises(LastingError):
        parsed_reference(text)
