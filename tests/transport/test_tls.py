"""TLS and client certificates on both ends, with certificates made on the spot."""

import shutil
import socket
import ssl
import subprocess

import grpc
import pytest

from extproc.transport.listening import Tls

pytestmark = pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl to make certificates with")


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    """A folder with ca, server, client and stranger, .pem and .key each."""
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments):
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    new = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    for name in ("ca", "stranger"):
        openssl(*new, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.pem")
    for name in ("server", "client"):
        openssl(
            *new, "-subj", f"/CN={name}", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
            "-CA", "ca.pem", "-CAkey", "ca.key", "-keyout", f"{name}.key", "-out", f"{name}.pem",
        )  # fmt: skip
    return folder


def files(folder, *, mutual):
    return Tls(folder / "server.pem", folder / "server.key", folder / "ca.pem" if mutual else None)


def credentials(folder, client=None):
    pair = {}
    if client:
        pair = {
            "private_key": (folder / f"{client}.key").read_bytes(),
            "certificate_chain": (folder / f"{client}.pem").read_bytes(),
        }
    return grpc.ssl_channel_credentials((folder / "ca.pem").read_bytes(), **pair)


async def talk(channel, size=500_000):
    call = channel.stream_stream("/t/Call")(timeout=60)
    await call.write(b"m" * size)
    await call.done_writing()
    replies = [len(reply) async for reply in call]
    assert replies == [size]


async def test_tls(end, start, connect, certificates):
    server = await start(end, tls=files(certificates, mutual=False))
    await talk(connect(server, credentials(certificates)))


async def test_mutual_tls_admits_the_known_and_nobody_else(end, start, connect, certificates, book):
    server = await start(end, tls=files(certificates, mutual=True))
    await talk(connect(server, credentials(certificates, "client")))
    for client in (None, "stranger"):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await talk(connect(server, credentials(certificates, client)), 1)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert len(book) == 1


async def test_plain_text_on_a_tls_port_gets_nowhere(end, start, connect, certificates, book):
    server = await start(end, tls=files(certificates, mutual=False))
    with pytest.raises(grpc.aio.AioRpcError):
        await talk(connect(server), 1)
    assert book == []


async def test_a_peer_that_does_not_agree_on_http2_is_dropped(start, certificates, book):
    import asyncio

    server = await start("h2", tls=files(certificates, mutual=False))
    host, port = server.address.rsplit(":", 1)
    context = ssl.create_default_context(cafile=str(certificates / "ca.pem"))

    def hear():
        with (
            socket.create_connection((host, int(port)), 60) as plain,
            context.wrap_socket(plain, server_hostname=host) as s,
        ):
            try:
                return s.recv(100)
            except OSError:
                return b""

    assert await asyncio.to_thread(hear) == b""
    assert book == []


async def test_files_that_cannot_be_read_are_an_error(end, start, tmp_path):
    with pytest.raises((OSError, ssl.SSLError)):
        await start(end, tls=Tls(tmp_path / "no.pem", tmp_path / "no.key"))
