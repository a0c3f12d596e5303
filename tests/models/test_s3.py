"""Objects of a store: every request signed as the store wants it, every object verified as far as it can be."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from aiohttp import web

from controller.models.errors import ContentError, LastingError, TransientError
from controller.models.sources.sigv4 import Credentials, encoded_path, signed_headers
from controller.models.sources.xml import texts
from tests.models.origin import CUT, WRONG, Origin, noise
from tests.models.stores import KEY_ID, SECRET, Store, Stored

KEYS = {"AWS_ACCESS_KEY_ID": KEY_ID, "AWS_SECRET_ACCESS_KEY": SECRET}
VECTORS = json.loads((Path(__file__).parent / "sigv4_vectors.json").read_text())["vectors"]


@pytest.fixture
async def store():
    server = await Store().start()
    server.objects = {
        "qwen/config.json": Stored(b"{}"),
        "qwen/empty": Stored(b""),
        "qwen/model.safetensors": Stored(noise(700_000, 1), part_bytes=300_000),
        "qwen/sub/a b+c=ü&(1)~.bin": Stored(noise(5000, 2), sha256=True),
        "qwen/folder/": Stored(b""),
        "qwen2/other.bin": Stored(b"not ours"),
    }
    yield server
    await server.stop()


def source(store, **more):
    return {
        "kind": "s3",
        "bucket": store.bucket,
        "prefix": "qwen",
        "endpoint": store.origin.url,
        "pathStyle": True,
        **more,
    }


def expected(store):
    return {
        key.removeprefix("qwen/"): one.content
        for key, one in store.objects.items()
        if key.startswith("qwen/") and not key.endswith("/")
    }


@pytest.mark.parametrize("vector", VECTORS, ids=lambda one: one["path"])
def test_signature_is_the_one_that_amazon_s_own_client_makes(vector):
    headers = signed_headers(
        vector["method"],
        vector["host"],
        vector["path"],
        [tuple(pair) for pair in vector["query"]],
        vector["headers"],
        Credentials("AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY", vector["session_token"]),
        vector["region"],
        datetime.strptime(vector["date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC),
    )
    assert headers["Authorization"] == vector["authorization"]


async def test_prefix_is_loaded_whole_and_verified(store, loader):
    marker = await loader(source(store), environment=KEYS)
    assert loader.files() == expected(store)
    digests = {file.path: file.digest.partition(":")[0] for file in marker.files}
    assert digests == {
        "config.json": "md5",
        "empty": "md5",
        "model.safetensors": "md5-parts",
        "sub/a b+c=ü&(1)~.bin": "sha256",
    }
    assert marker.revision.startswith("listing-")
    assert SECRET not in loader.said()


async def test_a_whole_bucket(store, loader):
    await loader(source(store, prefix=""), environment=KEYS)
    assert set(loader.files()) == {key for key in store.objects if not key.endswith("/")}


async def test_pages_of_the_list(store, loader):
    store.page = 1
    await loader(source(store), environment=KEYS)
    assert loader.files() == expected(store)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "sub/a b+c=ü&(1)~.bin"])
async def test_wrong_content_is_noticed(store, loader, name):
    store.origin.forever = True

    class Wrong(dict):
        def get(self, key, default=None):
            return [(WRONG,)] if key == f"qwen/{name}" else None

    store.origin.faults = Wrong()
    with pytest.raises(ContentError):
        await loader(source(store), environment=KEYS)
    assert name not in loader.files()


async def test_cut_connection_goes_on(store, loader):
    await loader(source(store, include=["nothing", "config.json"]), environment=KEYS)
    # Counted from here: HEAD requests send no bytes, but use up faults.
    store.origin.faults["qwen/model.safetensors"] = [None, None, (CUT, 70_000)]
    before = store.origin.sent["qwen/model.safetensors"]
    await loader(source(store), environment=KEYS)
    assert loader.files() == expected(store)
    assert store.origin.sent["qwen/model.safetensors"] - before == 700_000


async def test_an_object_that_is_replaced_meanwhile_is_listed_again(store, loader):
    replaced = iter([True, True])
    original = store.objects["qwen/config.json"]

    async def send(request, name, content, headers=None, real=store.origin.send):
        answer = await real(request, name, content, headers)
        if request.method == "HEAD" and name.endswith("config.json") and next(replaced, False):
            store.objects["qwen/config.json"] = Stored(original.content + b" ")
        return answer

    store.origin.send = send
    await loader(source(store), environment=KEYS)
    assert loader.files()["config.json"] == b"{} "


async def test_two_versions_of_an_object_are_never_mixed(store, loader):
    # No digest tells here, and the size is the same.
    versions = [Stored(noise(700_000, seed), kms=True, etag=f"{seed}" * 32) for seed in (1, 2)]
    store.objects = {"qwen/a.bin": versions[0]}

    async def send(request, name, content, headers=None, real=store.origin.send):
        answer = await real(request, name, content, headers)
        if request.method == "GET":
            store.objects["qwen/a.bin"] = versions[1]
        return answer

    store.origin.send = send
    await loader(source(store), environment=KEYS, connections=1)
    assert loader.files() == {"a.bin": versions[1].content}


async def test_objects_encrypted_with_a_key_keep_their_size(store, loader):
    store.objects = {"qwen/a.bin": Stored(noise(1000), kms=True, etag="0" * 32)}
    marker = await loader(source(store), environment=KEYS)
    assert marker.files[0].digest == ""
    assert loader.files() == expected(store)


async def test_public_bucket_needs_no_keys(store, loader):
    store.keys = {}
    await loader(source(store))
    assert loader.files() == expected(store)
    assert all("Authorization" not in headers for _, _, headers in store.origin.requests)


@pytest.mark.parametrize(
    ("environment", "more", "reason", "field"),
    [
        ({}, {}, "Unauthorized", "spec.source.s3.credentialsSecretRef"),
        ({**KEYS, "AWS_SECRET_ACCESS_KEY": "wrong"}, {}, "AccessDenied", "spec.source.s3.credentialsSecretRef"),
        (KEYS, {"region": "eu-west-1"}, "WrongRegion", "spec.source.s3.region"),
        (KEYS, {"bucket": "other"}, "NotFound", "spec.source.s3.bucket"),
        (KEYS, {"bucket": "../x"}, "InvalidRequest", "spec.source.s3.bucket"),
        (KEYS, {"endpoint": "http://user:pass@host"}, "InvalidRequest", "spec.source.s3.endpoint"),
        (KEYS, {"prefix": "nothing"}, "NothingToLoad", "spec.source"),
    ],
)
async def test_refusals_name_the_field(store, loader, environment, more, reason, field):
    with pytest.raises(LastingError) as failed:
        await loader(source(store, **more), environment=environment)
    assert (failed.value.reason, failed.value.field) == (reason, field)


@pytest.mark.parametrize(
    ("status", "text", "reason", "field", "told"),
    [
        (400, "<Error><Code>ExpiredToken</Code></Error>", "AccessDenied", ".credentialsSecretRef", "renew all three"),
        (400, "<Error><Code>InvalidToken</Code></Error>", "AccessDenied", ".credentialsSecretRef", "belong together"),
        (403, "<Error><Code>RequestTimeTooSkewed</Code></Error>", "ClockSkewed", "", "clock"),
        (
            400,
            "<Error><Code>AuthorizationHeaderMalformed</Code><Region>eu-west-1</Region></Error>",
            "WrongRegion",
            ".region",
            "eu-west-1, not us-east-1",
        ),
        (301, "<Error><Code>PermanentRedirect</Code></Error>", "WrongRegion", ".region", "another region"),
        (404, "<Error><Code>OfTheirOwn</Code></Error>", "SourceRefused", "", "404 (OfTheirOwn)"),
        (418, "<html>secret</html>", "SourceRefused", "", "h answers 418"),
    ],
)
def test_a_store_s_own_code_says_more_than_the_status(status, text, reason, field, told):
    from controller.models.http import Answer, Http
    from controller.models.request import S3, Settings
    from controller.models.sources.s3 import S3Store

    found = S3Store(Http(Settings()), S3(bucket="weights"), KEYS).refusal(Answer(status, "h", {}, text))
    assert (found.reason, found.field) == (reason, f"spec.source.s3{field}")
    assert told in found.message
    assert "secret<" not in found.message


async def test_a_refusal_whose_body_never_comes_is_a_refusal(store, loader):
    async def withheld(request):
        response = web.StreamResponse(status=403, headers={"Content-Length": "100"})
        await response.prepare(request)
        await asyncio.sleep(60)
        return response

    origin = Origin()
    await origin.start(withheld)
    try:
        with pytest.raises(LastingError) as failed:
            await loader(source(store, endpoint=origin.url), environment=KEYS)
    finally:
        await origin.stop()
    assert failed.value.reason == "AccessDenied"


async def test_session_token_is_signed(store, loader):
    store.keys = {KEY_ID: (SECRET, "session")}
    await loader(source(store), environment={**KEYS, "AWS_SESSION_TOKEN": "session"})
    assert loader.files() == expected(store)


async def test_the_pod_s_own_identity(store, loader, tmp_path):
    token = tmp_path / "token"
    token.write_text("the-pod\n")
    store.keys, store.web_identity = {"nobody": ("x", "")}, "the-pod"
    environment = {
        "AWS_ROLE_ARN": "arn:aws:iam::1:role/models",
        "AWS_WEB_IDENTITY_TOKEN_FILE": str(token),
        "AWS_ENDPOINT_URL_STS": store.origin.url + "/sts",
    }
    await loader(source(store), environment=environment)
    assert loader.files() == expected(store)
    token.write_text("another")
    with pytest.raises(LastingError) as failed:
        await loader(source(store), folder="second", environment=environment)
    assert failed.value.field == "spec.instanceSpec.serviceAccountName"


def test_bucket_as_part_of_the_host_name():
    from controller.models.http import Http
    from controller.models.request import S3, Settings
    from controller.models.sources.s3 import S3Store

    def address(**more):
        store = S3Store(Http(Settings()), S3(bucket="weights", **more), {})
        return f"{store._scheme}://{store._host}{store._base}"

    assert address() == "https://weights.s3.us-east-1.amazonaws.com"
    assert address(region="eu-west-1") == "https://weights.s3.eu-west-1.amazonaws.com"
    assert address(endpoint="https://oss.example.org:443") == "https://weights.oss.example.org"
    assert address(endpoint="https://oss.example.org", path_style=True) == "https://oss.example.org/weights"
    assert address(endpoint="http://10.0.0.1:9000") == "http://10.0.0.1:9000/weights"
    assert address(endpoint="http://minio:9000/") == "http://minio:9000/weights"


def test_xml_that_defines_entities_is_refused():
    bomb = b'<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><x><AccessKeyId>&b;</AccessKeyId></x>'
    with pytest.raises(TransientError):
        texts(bomb, ("AccessKeyId",))
    assert encoded_path("/a b/ü") == "/a%20b/%C3%BC"
