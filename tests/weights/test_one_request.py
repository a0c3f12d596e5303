"""One GET by hand: what servers answer, and what broken ones do, byte by byte."""

import asyncio
import contextlib

import pytest

from controller.weights.http import get

MOST = 1000


@contextlib.asynccontextmanager
async def answering(*pieces: bytes, closes: bool = True, seen: list[bytes] | None = None):
    """A server that says this, piece by piece, to whatever it is asked, and then hangs up or does not."""

    async def serve(reader, writer):
        served.append(asyncio.current_task())
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            if seen is not None:
                seen.append(head)
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.005)  # so that they do not arrive in one
            if not closes:
                await reader.read()
        except ConnectionError:
            pass  # the client had enough
        finally:
            writer.close()

    served: list[asyncio.Task] = []
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with asyncio.timeout(60):  # the client has left each connection
            await asyncio.gather(*served)


async def ask(address: str) -> tuple[int, bytes]:
    async with asyncio.timeout(60):
        return await get(address, "/metrics", MOST)


@pytest.mark.parametrize("closes", [True, False])
async def test_an_answer_that_tells_its_length_ends_there(closes):
    seen: list[bytes] = []
    whole = b"HTTP/1.1 200 OK\r\ncontent-LENGTH: 4\r\n\r\na 1\nleft over"
    async with answering(whole, closes=closes, seen=seen) as address:
        assert await ask(address) == (200, b"a 1\n")
        request = f"GET /metrics HTTP/1.0\r\nHost: {address}\r\nConnection: close\r\n\r\n"
        assert seen == [request.encode()]


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
async def test_an_answer_without_a_length_ends_with_the_connection(version):
    async with answering(b"HTTP/%s 404 Not Found\r\nX: y\r\n\r\n" % version, b"a ", b"1\n") as address:
        assert await ask(address) == (404, b"a 1\n")


async def test_a_head_that_comes_in_crumbs_is_read():
    whole = b"HTTP/1.1 503 x\r\nContent-Length: 3\r\n\r\nabc"
    async with answering(*(whole[at : at + 1] for at in range(len(whole))), closes=False) as address:
        assert await ask(address) == (503, b"abc")


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (b"", OSError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc", OSError),
        (b"HTTP/1.1 200 OK\r\nContent-Le", ValueError),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", ValueError),
        (b"HTTP/1.1 20 OK\r\n\r\n", ValueError),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * MOST, ValueError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n" + b"x" * MOST, ValueError),
    ],
)
async def test_what_is_no_whole_answer_is_an_error(said, error):
    async with answering(said) as address:
        with pytest.raises(error) as found:
            await ask(address)
        assert not isinstance(found.value, TimeoutError)


async def test_nobody_there_is_an_error():
    with pytest.raises(ConnectionRefusedError):
        await ask("127.0.0.1:1")


async def test_who_waits_no_longer_leaves_no_connection_behind():
    async with answering(b"HTTP/1.1 200 OK\r\n", closes=False) as address:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await get(address, "/", MOST)
