"""An S3 server of its own project: it checks our signatures, pages, parts, ranges and conditions by its own rules."""

from __future__ import annotations

import asyncio
import contextlib
import signal

import pytest

from controller.models.errors import LastingError
from controller.models.report import parse_report
from tests.harness.go_build import NoGoError
from tests.harness.tcp_proxy import TcpProxy
from tests.models.origin import noise
from tests.models.s3_server import KEY_ID, REGION, SECRET, S3Server, program
from tests.models.test_process import ended, kept

KEYS = {"AWS_ACCESS_KEY_ID": KEY_ID, "AWS_SECRET_ACCESS_KEY": SECRET}
PART_BYTES = 5 << 20  # the least that S3 takes for a part that is not the last
OBJECTS = {
    "config.json": b"{}",
    "empty": b"",
    "model.safetensors": noise(12 << 20, 1),
    "sub/a b+c=ü&(1)~.bin": noise(5000, 2),
}
SIZE = sum(map(len, OBJECTS.values()))


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    try:
        program()
    except NoGoError as error:
        pytest.skip(f"the S3 server cannot be built: {error}")
    with S3Server(tmp_path_factory.mktemp("s3")) as one:
        one.make_bucket("weights")
        for key, content in OBJECTS.items():
            if len(content) > PART_BYTES:
                one.put_in_parts("weights", f"qwen/{key}", content, PART_BYTES)
            else:
                one.put("weights", f"qwen/{key}", content, sha256="sub" in key)
        one.put("weights", "qwen2/other.bin", b"not ours")
        yield one


def source(server, port=None, **more):
    endpoint = f"http://127.0.0.1:{port or server.port}"
    settings = {"endpoint": endpoint, "pathStyle": True, "region": REGION}
    return {"kind": "s3", "bucket": "weights", "prefix": "qwen", **settings, **more}


async def test_a_prefix_is_loaded_whole_each_object_by_the_best_promise_that_the_server_gives(s3_server, loader):
    marker = await loader(source(s3_server), environment=KEYS)
    assert loader.files() == OBJECTS
    assert {file.path: file.digest.partition(":")[0] for file in marker.files} == {
        "config.json": "md5",
        "empty": "md5",
        "model.safetensors": "md5-parts",
        "sub/a b+c=ü&(1)~.bin": "sha256",
    }
    assert SECRET not in loader.said()


async def test_the_server_s_pages_are_followed_to_their_end(s3_server, loader):
    names = [f"{number:04}.txt" for number in range(1003)]  # a page has 1000
    for name in names:
        s3_server.put("weights", f"many/{name}", b"")
    await loader(source(s3_server, prefix="many"), environment=KEYS)
    assert sorted(loader.files()) == names


async def test_killed_in_the_middle_it_asks_for_the_missing_ranges_alone(s3_server, loader):
    async with TcpProxy(s3_server.port) as proxy:
        proxy.delay_s = 0.02
        process = await loader.process(source(s3_server, proxy.port), environment=KEYS)
        async with asyncio.timeout(60):
            while not (loader.volume / ".arks-cache").exists() or kept(loader) < 3 << 20:  # noqa: ASYNC110 - its doing
                await asyncio.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            await ended(process)
            while proxy.open:  # noqa: ASYNC110 - what was under way is over
                await asyncio.sleep(0.01)
        assert loader.marker() is None
        proxy.delay_s, written, before = 0.0, kept(loader), proxy.answered_bytes
        assert 3 << 20 <= written < SIZE
        code, out, _ = await ended(await loader.process(source(s3_server, proxy.port), environment=KEYS))
        assert (code, parse_report(out).state) == (0, "ready")
        assert loader.files() == OBJECTS
        # The missing bytes, and a few heads.
        assert SIZE - written <= proxy.answered_bytes - before <= SIZE - written + (256 << 10)


async def test_a_connection_that_breaks_again_and_again_costs_no_byte_that_was_written(s3_server, loader):
    async with TcpProxy(s3_server.port) as proxy:
        proxy.delay_s = 0.01

        async def trouble():
            """After each further 256 KiB, so that however slow it all is there is progress in between."""
            while True:
                before = proxy.answered_bytes
                while proxy.answered_bytes < before + (256 << 10):  # noqa: ASYNC110 - what comes over the network
                    await asyncio.sleep(0.01)
                proxy.reset()

        task = asyncio.create_task(trouble())
        try:
            await loader(source(s3_server, proxy.port), environment=KEYS, retries=1000)
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        assert loader.files() == OBJECTS


async def test_an_object_that_is_replaced_meanwhile_is_never_mixed(s3_server, loader):
    first, second = noise(8 << 20, 3), noise(8 << 20, 4)
    s3_server.put("weights", "moving/a.bin", first)
    async with TcpProxy(s3_server.port) as proxy:
        proxy.delay_s = 0.01
        load = asyncio.create_task(
            loader(source(s3_server, proxy.port, prefix="moving"), environment=KEYS, connections=1)
        )
        async with asyncio.timeout(60):
            while proxy.answered_bytes < 1 << 20:  # noqa: ASYNC110 - what comes over the network
                await asyncio.sleep(0.005)
        await asyncio.to_thread(s3_server.put, "weights", "moving/a.bin", second)
        proxy.delay_s = 0.0
        await load
    assert loader.files() == {"a.bin": second}


@pytest.mark.parametrize(
    ("environment", "more", "reason", "field", "told"),
    [
        ({}, {}, "Unauthorized", "credentialsSecretRef", "asks for credentials"),
        ({**KEYS, "AWS_SECRET_ACCESS_KEY": "wrong"}, {}, "AccessDenied", "credentialsSecretRef", "secret access key"),
        ({**KEYS, "AWS_ACCESS_KEY_ID": "AKIANOBODY"}, {}, "AccessDenied", "credentialsSecretRef", "access key id"),
        (KEYS, {"region": "us-west-2"}, "WrongRegion", "region", "not us-west-2"),
        (KEYS, {"bucket": "other"}, "NotFound", "bucket", "no bucket other"),
    ],
    ids=["no-keys", "wrong-secret", "unknown-key", "region", "bucket"],
)
async def test_its_refusals_name_the_field_and_the_cause(s3_server, loader, environment, more, reason, field, told):
    with pytest.raises(LastingError) as failed:
        await loader(source(s3_server, **more), environment=environment)
    assert (failed.value.reason, failed.value.field) == (reason, f"spec.source.s3.{field}")
    assert told in failed.value.message
    assert "<" not in failed.value.message


async def test_nothing_below_the_prefix_is_said(s3_server, loader):
    with pytest.raises(LastingError) as failed:
        await loader(source(s3_server, prefix="nothing"), environment=KEYS)
    assert failed.value.reason == "NothingToLoad"
