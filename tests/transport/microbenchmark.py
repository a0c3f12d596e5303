"""What the HTTP/2 end costs by itself: recorded bytes of Envoy's kind fed to the protocol, no socket, no real call.

    python -m tests.transport.microbenchmark [another_protocol.py]

Per stream: HEADERS and two DATA frames in, response HEADERS and two DATA frames out, RST_STREAM in; 64 streams a read.
Per message: one more DATA frame in and out on an open stream. Another protocol, given by a file that defines
`Conn(asyncio.Protocol)` with `on_msg(connection, stream, payload)`, runs in turn with ours in the same process.
"""

import asyncio
import importlib.util
import statistics
import sys
import time

from extproc.transport.connection import Connection
from extproc.transport.frames import PREFACE, frame
from extproc.transport.link import Limits
from extproc.transport.register import Register
from extproc.transport.routing import Router

PATH = b"/envoy.service.ext_proc.v3.ExternalProcessor/Process"
BLOCK = (
    b"\x83\x86\x44"
    + bytes((len(PATH),))
    + PATH
    + b"\x41\x07extproc\x0f\x10\x10application/grpc\x00\x02te\x08trailers\x00\x10x-envoy-internal\x04true"
)
STREAMS_PER_READ = 64
REPLY = b"r" * 120


class Wire:
    """A transport that counts what it is given."""

    def __init__(self):
        self.written = 0

    def write(self, data):
        self.written += len(data)

    def get_extra_info(self, name):
        return None

    def is_closing(self):
        return False

    def close(self):
        raise AssertionError("the connection was ended")

    abort = close


class Answer:
    __slots__ = ()

    def __init__(self, stream):
        pass

    def on_message(self, message):
        return REPLY

    def on_half_close(self):
        pass

    def on_close(self, reason):
        pass


def data(sid, size):
    return frame(0, 0, sid, b"\0" + size.to_bytes(4, "big") + b"m" * size)


def reads(first, count, messages):
    """Each: a read that opens streams and says all, and one that resets them."""
    made = []
    for start in range(first, first + 2 * STREAMS_PER_READ * count, 2 * STREAMS_PER_READ):
        sids = range(start, start + 2 * STREAMS_PER_READ, 2)
        made.append(b"".join(frame(1, 4, sid, BLOCK) + data(sid, 400) * messages for sid in sids))
        made.append(b"".join(frame(3, 0, sid, b"\0\0\0\x08") for sid in sids))
    return made


def ours(loop):
    connection = Connection(Router({PATH.decode(): Answer}), Limits(), Register(), loop)
    connection.connection_made(Wire())
    connection.data_received(PREFACE + frame(4, 0, 0) + frame(4, 1, 0) + frame(8, 0, 0, (1 << 30).to_bytes(4, "big")))
    return connection, lambda: connection.data_received(frame(8, 0, 0, (1 << 20).to_bytes(4, "big")))


def other(path):
    spec = importlib.util.spec_from_file_location("other_protocol", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def make(loop):
        connection = module.Conn()
        connection.on_msg = lambda _connection, _sid, _payload: REPLY
        connection.connection_made(Wire())
        connection.data_received(PREFACE + frame(4, 0, 0) + frame(8, 0, 0, (1 << 30).to_bytes(4, "big")))
        return connection, lambda: connection.data_received(frame(8, 0, 0, (1 << 20).to_bytes(4, "big")))

    return make


def once(make, loop, messages, count=60):
    connection, widen = make(loop)
    warm = reads(1, 4, messages)
    timed = reads(1 + 2 * STREAMS_PER_READ * 4, count, messages)
    for piece in warm:
        connection.data_received(piece)
    spent = 0.0
    for piece in timed:
        widen()
        started = time.perf_counter()
        connection.data_received(piece)
        spent += time.perf_counter() - started
    return spent / (count * STREAMS_PER_READ) * 1e6


async def main(paths):
    loop = asyncio.get_running_loop()
    ends = {"ours": ours, **{path: other(path) for path in paths}}
    figures = {name: ([], []) for name in ends}
    for _ in range(25):
        for name, make in ends.items():
            per_stream = once(make, loop, 2)
            figures[name][0].append(per_stream)
            figures[name][1].append((once(make, loop, 12) - per_stream) / 10)
    for name, (streams, messages) in figures.items():
        print(
            f"{name}: per stream {statistics.median(streams):.2f} us (best {min(streams):.2f}), "
            f"per further message {statistics.median(messages):.2f} us (best {min(messages):.2f})"
        )


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
