"""Both server ends, and calls that write down what happened to them."""

import asyncio
import contextlib

import grpc
import grpc.aio
import pytest

from extproc.transport import grpc_aio, h2
from extproc.transport.core import GrpcError

ENDS = {"h2": h2.serve, "grpc_aio": grpc_aio.serve}


async def eventually(condition):
    """Wait for what another task brings about."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - the condition is the server's state; nobody sets an event
            await asyncio.sleep(0.001)


class Recorded:
    """A call that obeys its messages and keeps the facts."""

    def __init__(self, book, stream):
        self.book = book
        self.stream = stream
        self.messages = []
        self.half_closed = False
        self.ends = []
        self.asked = 0
        self.ended_s = 0.0
        self.over = asyncio.get_running_loop().create_future()
        book.append(self)

    def on_message(self, message):
        self.messages.append(message)
        word = message[:16]
        if word == b"later":
            asyncio.get_running_loop().call_soon(self.stream.send, b"it is later")
            return None
        if word == b"nothing":
            return None
        if word == b"finish":
            self.stream.finish(7, "föö 100%")
            return b"too late"
        if word == b"last word":
            self.stream.send(b"x" * 300_000)
            self.stream.finish()
            return None
        if word == b"raise":
            raise KeyError("secret-token")
        if word == b"refuse":
            raise GrpcError(14, "store is down")
        if word.startswith(b"size "):
            return b"r" * int(word[5:])
        if word.startswith(b"push "):
            for number in range(int(word[5:])):
                self.stream.send(b"%d" % number)
            return None
        return message

    def on_half_close(self):
        self.half_closed = True
        if self.messages[-1:] == [b"raise at end"]:
            raise RuntimeError
        return self.messages[:1] == [b"stay"]

    def on_deadline(self):
        self.asked += 1
        if self.messages[-1:] == [b"raise at the deadline"]:
            raise RuntimeError
        return self.messages[-1:] == [b"may go"] or (self.messages[-1:] == [b"may go soon"] and self.asked > 2)

    def on_close(self, reason):
        self.ends.append(reason)
        self.ended_s = asyncio.get_running_loop().time()
        if not self.over.done():
            self.over.set_result(reason)
        if self.messages[-1:] == [b"raise at close"]:
            raise RuntimeError


@pytest.fixture
def book():
    """Every call made, in order."""
    return []


@pytest.fixture(params=ENDS)
def end(request):
    return request.param


@pytest.fixture
async def start(book):
    """`await start("h2", **options)` → a server of recorded calls at /t/Call; closed at the end."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(end, address="127.0.0.1:0", **options):
            services = {"/t/Call": lambda stream: Recorded(book, stream), **options.pop("services", {})}
            server = await ENDS[end](services, address, **options)
            stack.push_async_callback(server.close)
            return server

        yield start


@pytest.fixture
async def connect():
    """`connect(server)` → a stock grpcio channel."""
    async with contextlib.AsyncExitStack() as stack:

        def connect(server, credentials=None, options=()):
            everything = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1), *options]
            if credentials is None:
                channel = grpc.aio.insecure_channel(server.address, options=everything)
            else:
                channel = grpc.aio.secure_channel(server.address, credentials, options=everything)
            stack.push_async_callback(channel.close)
            return channel

        yield connect
