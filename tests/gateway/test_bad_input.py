"""Garbage at every listener: a clear error or a closed connection, bounded memory, and other requests go on."""

import asyncio
import contextlib
import json
import os
import random
import struct
from pathlib import Path
from typing import Self

import h2.config
import h2.connection
import h2.events
import pytest

from apis.wire import ext_proc_pb2
from tests.harness.client import CHAT, RawClient, bearer, chat, events, head
from tests.harness.gateway import endpoint, policy, running_engine, running_gateway, token

POLICY = policy(endpoint(maxOutputTokens=1_000_000), token("alice", "sk-alice", rates={"rpm": 10**6}))
ALICE = bearer("sk-alice")
MOST_GROWTH_BYTES = 96 * 1024 * 1024
PROCESS = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"


@pytest.fixture(scope="module")
def engine():
    with running_engine("--itl-ms", "1", "--max-model-len", "2000000") as one:
        yield one


@pytest.fixture(scope="module", params=["h2", "grpc_aio"])
def gateway(request, engine, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    with running_gateway(folder, POLICY, [engine], "--transport", request.param) as one:
        # A broken exchange on extproc's own socket is none of Envoy's, so its counters stay clean here too.
        yield one


def resident_bytes(gateway) -> int:
    status = Path(f"/proc/{gateway.extproc_pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


@pytest.fixture(autouse=True)
async def nobody_else_notices(gateway, session):
    """While the test runs ordinary requests go on; extproc neither dies nor swells, nor leaves anything open."""
    before, over, failures = resident_bytes(gateway), asyncio.Event(), []

    async def ordinary() -> None:
        while not over.is_set():
            async with session.post(gateway.url + CHAT, json=chat(max_tokens=1), headers=ALICE) as answer:
                await answer.read()
                if answer.status != 200:
                    failures.append(answer.status)
            await asyncio.sleep(0.02)

    task = asyncio.create_task(ordinary())
    yield
    over.set()
    async with asyncio.timeout(60):
        await task
    assert failures == []
    os.kill(gateway.extproc_pid, 0)
    assert resident_bytes(gateway) - before < MOST_GROWTH_BYTES
    await gateway.until_metric(session, "arks_open_leases", lambda leases: leases == 0)
    assert "Traceback" not in gateway.log()


async def post(gateway, body: bytes, headers=ALICE):
    async with RawClient(gateway.url) as client:
        return await client.request(body, headers=headers)


# --- the clients' side ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1_000, 100_000])
async def test_too_many_headers(gateway, count):
    lines = b"".join(b"x-%d: y\r\n" % number for number in range(count))
    try:
        async with RawClient(gateway.url) as client:
            await client.send(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n" + lines + b"\r\n")
            answer = await client.answer()
    except (ConnectionError, asyncio.IncompleteReadError):
        return  # closed while we were still talking
    assert (answer.status, answer.code) == (431, "headers_too_large")


@pytest.mark.parametrize("field", ["user", "messages", "stream_options", "model", "max_tokens", "stream"])
@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
async def test_json_nested_deeply(gateway, field, opening):
    """At no depth does a body break anything: it is refused, or it passes."""
    closing = b"]" if opening == b"[" else b"}"
    for depth in (100, 300, *range(900, 1_030, 4), 10_000):
        nested = opening * depth + b"1" + closing * depth
        body = b'{"model":"qwen-7b","stream":true,"max_tokens":1,"messages":[]'
        body = body.replace(b'"%s":' % field.encode(), b'"other":') + b',"%s":%s}' % (field.encode(), nested)
        answer = await post(gateway, body)
        assert answer.status in (200, 400), (depth, answer)
        if depth == 10_000:
            assert (answer.status, answer.code) == (400, "invalid_json")


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (chat(model="x" * 2**20), "invalid_field"),
        (chat(model=""), "missing_model"),
        (chat(model=None), "invalid_field"),
        (chat(model=["qwen-7b"]), "invalid_field"),
        (chat(model="qwen-7b\x00"), "model_not_found"),
        (chat(max_tokens=0), "invalid_field"),
        (chat(max_tokens=-(2**63)), "invalid_field"),
        (chat(max_tokens=2**64), "invalid_field"),
        (chat(max_tokens=10**4000), "invalid_field"),
        (chat(max_tokens="5"), "invalid_field"),
        (chat(max_tokens=True), "invalid_field"),
        (chat(max_tokens=1.0), "invalid_field"),
        (chat(n=10**9), "invalid_field"),
        (chat(best_of=-1), "invalid_field"),
        (chat(stream="yes"), "invalid_field"),
        (chat(stream=1), "invalid_field"),
        (chat(stream=True, stream_options="usage"), "invalid_field"),
        (chat(stream=True, stream_options={"include_usage": "yes"}), "invalid_field"),
        (b"", "body_required"),
        (b" ", "invalid_json"),
        (b"null", "invalid_json"),
        (b"0", "invalid_json"),
        (b'"text"', "invalid_json"),
        (b"[]", "invalid_json"),
        (b"{}", "missing_model"),
        (b'{"model":"qwen-7b"', "invalid_json"),
        (b'{"model":"qwen-7b"}{"model":"qwen-7b"}', "invalid_json"),
        (b'{"model":"qwen-7b",}', "invalid_json"),
        (b"{'model':'qwen-7b'}", "invalid_json"),
        (b'\xef\xbb\xbf{"model":"qwen-7b"}', "invalid_json"),
        (json.dumps(chat()).encode("utf-16"), "invalid_json"),
        (b'{"model":"qwen-7b","x":"\xff"}', "invalid_json"),
        (b'{"model":"qwen-7b","x":"\xed\xa0\x80"}', "invalid_json"),
        (b'{"model":"qwen-7b","model":"qwen-7b"}', "duplicate_field"),
        (b'{"model":"qwen-7b","max_tokens":1,"max_tokens":1000}', "duplicate_field"),
        (b'{"model":"qwen-7b","mod\\u0065l":"other"}', "duplicate_field"),
        (b'{"model":"\\ud800"}', "invalid_json"),
        (b'{"model":NaN}', "invalid_json"),
        (b"\x00" * 1000, "invalid_json"),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value)[:60],
)
async def test_odd_body(gateway, body, code):
    answer = await post(gateway, body if isinstance(body, bytes) else json.dumps(body).encode())
    assert answer.code == code, answer
    assert answer.status in (400, 404)
    assert len(answer.body) < 600


@pytest.mark.parametrize(
    "value", [b'"\\ud800"', b'{"x":"\\ud800"}', b'{"include_usage":true,"x":"\\ud800\\u0041"}', b"1e999"]
)
async def test_odd_stream_options_break_nothing(gateway, value):
    body = json.dumps(chat(stream=True, max_tokens=1))[:-1].encode() + b',"stream_options":' + value + b"}"
    answer = await post(gateway, body)
    assert answer.status in (200, 400), answer


async def test_random_bodies_break_nothing(gateway):
    """Valid bodies with a few bytes changed."""
    dice = random.Random(7)
    good = json.dumps(chat(stream=True, max_tokens=1, stream_options={"include_usage": False}, n=1)).encode()
    for _ in range(300):
        body = bytearray(good)
        for _ in range(dice.randrange(1, 4)):
            body[dice.randrange(len(body))] = dice.choice(b'{}[]",:\\0-\x00\xff\xc3 nt')
        answer = await post(gateway, bytes(body), {**ALICE, "content-type": "application/json"})
        assert answer.status in (200, 400, 404), (bytes(body), answer)
        assert answer.status != 400 or answer.json()["error"]["message"]


async def test_no_http_at_all(gateway):
    dice = random.Random(8)
    for data in (
        b"\x00" * 100,
        b"\x16\x03\x01\x02\x00" + b"x" * 500,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 100,
        dice.randbytes(5000),
    ):
        async with RawClient(gateway.url, timeout_s=60) as client:
            await client.send(data)
            with contextlib.suppress(ConnectionError):
                async with asyncio.timeout(60):
                    await client.reader.read()  # to its end: an error, then the connection's close


async def test_slow_reader_holds_up_nobody_and_swells_nothing(gateway, session):
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(RawClient(gateway.url)) for _ in range(10)]
        body = json.dumps(chat(stream=True, max_tokens=100_000)).encode()
        for client in clients:
            await client.send(head("POST", CHAT, {**ALICE, "content-type": "application/json"}, body) + body)
        await asyncio.sleep(2)  # nobody reads; the autouse fixture goes on asking


async def test_slow_writers_hold_up_nobody(gateway):
    async with contextlib.AsyncExitStack() as stack:
        for number in range(100):
            client = await stack.enter_async_context(RawClient(gateway.url))
            whole = head("POST", CHAT, {**ALICE, "Content-Length": "100000"}) + b'{"model":"qwen-7b"'
            await client.send(whole[: len(whole) - number])
        await asyncio.sleep(1)


# --- extproc's own socket ------------------------------------------------------------------------------------------


class Socket:
    """One connection to extproc's socket, as bytes and as HTTP/2."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.http2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
        self.reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter

    async def __aenter__(self) -> Self:
        self.reader, self.writer = await asyncio.open_unix_connection(self._path)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.transport.abort()

    async def closed(self, timeout_s: float) -> None:
        """Read to the peer's end; TimeoutError where it keeps the connection."""
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(timeout_s):
                while await self.reader.read(65536):
                    pass

    def call(self, path: str = PROCESS) -> int:
        stream = self.http2.get_next_available_stream_id()
        names = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "x", "te": "trailers"}
        self.http2.send_headers(stream, [*names.items(), ("content-type", "application/grpc")])
        return stream

    async def flush(self) -> None:
        self.writer.write(self.http2.data_to_send())
        await self.writer.drain()

    async def status_of(self, stream: int) -> int | None:
        """grpc-status of a call, None where its stream was reset or the connection closed."""
        async with asyncio.timeout(60):
            while True:
                await self.flush()
                data = await self.reader.read(65536)
                if not data:
                    return None
                for event in self.http2.receive_data(data):
                    headers = dict(getattr(event, "headers", None) or [])
                    if "grpc-status" in headers and event.stream_id == stream:
                        return int(headers["grpc-status"])
                    if isinstance(event, h2.events.StreamReset | h2.events.ConnectionTerminated):
                        return None


@pytest.fixture
def sock(gateway):
    return Socket(gateway.state / "run" / "extproc.sock")


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def ours(gateway) -> bool:
    """Whether the server end is the lean one of this package."""
    return "grpc_aio" not in gateway.process.args


BROKEN_HTTP2 = {
    "no preface": b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
    "zeroes": b"\x00" * 4096,
    "frame too long": PREFACE + b"\xff\xff\xff\x00\x00\x00\x00\x00\x01",
    "data before headers": PREFACE + frame(0, 0, 1, b"x"),
    "broken header block": PREFACE + frame(1, 4, 1, b"\xff" * 50),
    "settings on a stream": PREFACE + frame(4, 0, 1, b""),
    "settings of odd size": PREFACE + frame(4, 0, 0, b"12345"),
    "window update of nothing": PREFACE + frame(8, 0, 0, b"\x00\x00\x00\x00"),
    "continuation alone": PREFACE + frame(9, 4, 1, b"x"),
    "endless header block": PREFACE
    + frame(1, 0, 1, b"\x82")
    + frame(9, 0, 1, b"\x40\x01a\x7f\xff\x7f" + b"x" * 16000) * 300,
    "ping of odd size": PREFACE + frame(6, 0, 0, b"123"),
    "even stream": PREFACE + frame(1, 4, 2, b"\x82"),
}


@pytest.mark.parametrize("fault", BROKEN_HTTP2)
async def test_broken_http2_on_extprocs_socket(gateway, sock, fault):
    async with sock:
        with contextlib.suppress(ConnectionError):
            sock.writer.write(BROKEN_HTTP2[fault])
            await sock.writer.drain()
        if ours(gateway):
            await sock.closed(60)
        else:
            # grpcio's own server keeps some broken connections open: only that it outlives them is asked of it.
            with contextlib.suppress(TimeoutError):
                await sock.closed(0.3)


async def test_random_bytes_on_extprocs_socket(gateway):
    dice = random.Random(9)
    for number in range(100):
        async with Socket(gateway.state / "run" / "extproc.sock") as sock:
            data = dice.randbytes(dice.randrange(1, 3000))
            sock.writer.write(data if number % 2 else PREFACE + data)
            with contextlib.suppress(ConnectionError):
                await sock.writer.drain()
                sock.writer.write_eof()


def message(data: bytes, *, flag: int = 0, size: int | None = None) -> bytes:
    """A gRPC message on the wire."""
    return bytes((flag,)) + struct.pack(">I", len(data) if size is None else size) + data


def headers_message(**headers: str) -> bytes:
    request = ext_proc_pb2.ProcessingRequest()
    for name, value in headers.items():
        request.request_headers.headers.headers.add(key=name.replace("__", ":"), raw_value=value.encode())
    return bytes(request.SerializeToString())


RESPONSE_FIRST = ext_proc_pb2.ProcessingRequest(response_body=ext_proc_pb2.HttpBody(body=b"x", end_of_stream=True))
BODY_FIRST = ext_proc_pb2.ProcessingRequest(request_body=ext_proc_pb2.HttpBody(body=b"{}", end_of_stream=True))
BROKEN_GRPC = {
    "compressed": message(b"\x12\x00", flag=1),
    "unknown flag": message(b"\x12\x00", flag=7),
    "4 GiB announced": message(b"x" * 100, size=0xFFFFFFFF),
    "60 MiB announced": message(b"x" * 100, size=60 * 1024 * 1024),
    "no protobuf": message(b"\xff" * 100),
    "field over the end": message(b"\x12\xff\xff\xff\x7f"),
    "endless varint": message(b"\x12" + b"\xff" * 30),
    "wire type 7": message(b"\x17\x17\x17"),
    "body before headers": message(BODY_FIRST.SerializeToString()),
}


@pytest.mark.parametrize("fault", BROKEN_GRPC)
async def test_broken_grpc_on_extprocs_socket(gateway, sock, fault):
    """Refused with a status or a reset; the connection's other calls go on."""
    async with sock:
        sock.http2.initiate_connection()
        broken = sock.call()
        sock.http2.send_data(broken, BROKEN_GRPC[fault], end_stream=False)
        if fault == "unknown flag" and not ours(gateway):
            return  # grpcio waits for more
        assert await sock.status_of(broken) not in (0, 2)  # neither OK nor UNKNOWN
        good = sock.call("/grpc.health.v1.Health/Check")
        sock.http2.send_data(good, message(b""), end_stream=True)
        assert await sock.status_of(good) == 0


@pytest.mark.parametrize("first", [RESPONSE_FIRST, ext_proc_pb2.ProcessingRequest()], ids=["response", "nothing"])
async def test_messages_out_of_turn_are_survived(gateway, sock, first):
    async with sock:
        sock.http2.initiate_connection()
        stream = sock.call()
        for _ in range(3):
            sock.http2.send_data(stream, message(first.SerializeToString()), end_stream=False)
        sock.http2.end_stream(stream)
        await sock.status_of(stream)


async def test_header_maps_of_any_size_and_kind(gateway, sock):
    many = {f"x-{number}": "y" * 50 for number in range(100_000)}
    async with sock:
        sock.http2.initiate_connection()
        stream = sock.call()
        data = message(headers_message(**many, authorization="Bearer sk-alice", __path=CHAT, __method="POST"))
        while data:
            room = min(sock.http2.local_flow_control_window(stream), 16_000)
            if room:
                sock.http2.send_data(stream, data[:room], end_stream=False)
                data = data[room:]
                await sock.flush()
            else:
                sock.http2.receive_data(await sock.reader.read(65536))
                await sock.flush()
        sock.http2.end_stream(stream)
        assert await sock.status_of(stream) in (0, 8)


async def test_thousands_of_calls_that_end_at_once(gateway, sock):
    """Opened and reset, over and over: nothing adds up."""
    async with sock:
        sock.http2.initiate_connection()
        await sock.flush()
        for _ in range(40):
            streams = [sock.call() for _ in range(50)]
            for stream in streams:
                sock.http2.reset_stream(stream)
            try:
                await sock.flush()
            except ConnectionError:
                return  # a flood of resets may be answered by a closed connection
            await asyncio.sleep(0.01)


async def test_answer_after_all_of_this_is_right(gateway, session):
    async with session.post(gateway.url + CHAT, json=chat(stream=True, max_tokens=5), headers=ALICE) as answer:
        assert events(await answer.read())[-1] == "[DONE]"
    assert (await gateway.row_of(answer.headers["x-request-id"]))["completion_tokens"] == 5
