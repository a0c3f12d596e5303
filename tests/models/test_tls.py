"""Nothing secret goes over a connection that was to be encrypted and is not."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
from types import SimpleNamespace

import pytest
from aiohttp import web

from controller.models.errors import LastingError
from controller.models.http import Http
from controller.models.request import Settings
from controller.models.sources.registry_token import RegistryToken
from tests.models.hubs import commit_of
from tests.models.origin import Origin

pytestmark = pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl to make certificates with")


@pytest.fixture
async def secure(tmp_path):
    """A hub behind TLS whose certificate only ``certificate`` vouches for, and which redirects to ``location``."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    names = ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    await asyncio.to_thread(subprocess.run, [*command, *names, *files], check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    asked = []
    told = SimpleNamespace(location="", certificate=certificate, asked=asked)

    async def handle(request):
        asked.append(request.path)
        if "/revision/" in request.path:
            return web.json_response({"sha": commit_of("x")})
        if "/tree/" in request.path:
            entry = {"type": "file", "path": "a.bin", "size": 5, "oid": "0" * 40}
            return web.json_response([entry])
        return web.Response(status=302, headers={"Location": told.location})

    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.2)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
    await site.start()
    told.url = f"https://localhost:{site._server.sockets[0].getsockname()[1]}"
    yield told
    await runner.cleanup()


async def test_a_certificate_that_nobody_vouches_for_is_told_with_its_cure(secure, loader):
    with pytest.raises(LastingError) as failed:
        await loader({"kind": "huggingface", "endpoint": secure.url})
    assert failed.value.reason == "CertificateRefused"
    assert "SSL_CERT_FILE" in failed.value.message
    assert secure.asked == []


async def test_a_redirect_out_of_tls_is_refused(secure, loader):
    plain = Origin()

    async def never(request):
        raise AssertionError

    await plain.start(never)
    secure.location = plain.url + "/a.bin"
    process = await loader.process(
        {"kind": "huggingface", "endpoint": secure.url},
        environment={"SSL_CERT_FILE": str(secure.certificate), "HF_TOKEN": "hf_secret"},
    )
    out, err = await asyncio.wait_for(process.communicate(), 90)
    await plain.stop()
    assert (process.returncode, err) == (3, b"")
    assert b"UnsafeRedirect" in out
    assert plain.requests == []


async def test_a_password_is_not_sent_in_the_clear_because_a_registry_says_so(tmp_path):
    (tmp_path / "config.json").write_text('{"auths": {"registry.example.org": {"auth": "YTpi"}}}')
    environment = {"DOCKER_CONFIG": str(tmp_path)}
    async with Http(Settings(retries=0)) as http:
        token = RegistryToken(http, "registry.example.org", "a", environment, secure=True)
        with pytest.raises(LastingError) as failed:
            await token.renew('Bearer realm="http://127.0.0.1:1/token",service="x"')
    assert failed.value.reason == "UnsafeRedirect"
