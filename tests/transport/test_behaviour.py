"""What every server end must do, seen by a stock grpcio client."""

import asyncio
import contextlib
import logging
import socket
import stat

import grpc
import pytest

from extproc.transport.core import CloseReason
from extproc.transport.health import Health
from tests.transport.conftest import eventually

SERVING, NOT_SERVING, SERVICE_UNKNOWN = b"\x08\x01", b"\x08\x02", b"\x08\x03"


async def exchange(channel, messages, path="/t/Call", **options):
    """Say everything, then hear everything."""
    call = channel.stream_stream(path)(**options)
    for message in messages:
        await call.write(message)
    await call.done_writing()
    return [reply async for reply in call], call


async def status_of(call):
    return (await call.code()).value[0], await call.details()


async def test_replies_come_in_order_then_status_ok(end, start, connect, book):
    channel = connect(await start(end))
    replies, call = await exchange(channel, [b"a", b"", b"b" * 1000])
    assert replies == [b"a", b"", b"b" * 1000]
    assert await status_of(call) == (0, "")
    assert book[0].half_closed
    assert await book[0].over is CloseReason.DONE
    assert book[0].ends == [CloseReason.DONE]


@pytest.mark.parametrize("size", [1 << 10, 16 << 10, 16379, 16380, 65536, 200 << 10, 20 << 20])
async def test_messages_of_any_size_pass_both_ways(end, start, connect, size):
    channel = connect(await start(end))
    message = bytes(range(256)) * (size // 256) + b"z" * (size % 256)
    replies, _ = await exchange(channel, [message, b"after"])
    assert replies == [message, b"after"]


async def test_replies_may_come_later_or_never(end, start, connect):
    channel = connect(await start(end))
    call = channel.stream_stream("/t/Call")()
    await call.write(b"nothing")
    await call.write(b"later")
    assert await call.read() == b"it is later"
    await call.write(b"push 5")
    assert [await call.read() for _ in range(5)] == [b"0", b"1", b"2", b"3", b"4"]
    await call.done_writing()
    assert await call.code() is grpc.StatusCode.OK


async def test_finish_ends_the_stream_with_its_status(end, start, connect, book):
    channel = connect(await start(end))
    call = channel.stream_stream("/t/Call")()
    await call.write(b"finish")
    assert await status_of(call) == (7, "föö 100%")
    assert await book[0].over is CloseReason.DONE
    book[0].stream.send(b"into the void")
    book[0].stream.finish()
    assert book[0].ends == [CloseReason.DONE]


async def test_finish_waits_for_what_was_sent_before(end, start, connect):
    channel = connect(await start(end))
    call = channel.stream_stream("/t/Call")()
    await call.write(b"last word")
    assert [len(reply) async for reply in call] == [300_000]
    assert await call.code() is grpc.StatusCode.OK


async def test_a_call_that_stays_answers_after_half_close(end, start, connect, book):
    channel = connect(await start(end))
    call = channel.stream_stream("/t/Call")()
    await call.write(b"stay")
    await call.done_writing()
    assert await call.read() == b"stay"
    await eventually(lambda: book[0].half_closed)
    book[0].stream.send(b"more")
    assert await call.read() == b"more"
    book[0].stream.finish(0)
    assert await call.code() is grpc.StatusCode.OK
    assert book[0].ends == [CloseReason.DONE]


async def test_a_call_that_raises_ends_its_stream_only_and_tells_nothing(end, start, connect, book, caplog):
    channel = connect(await start(end))
    other = channel.stream_stream("/t/Call")()
    await other.write(b"before")
    assert await other.read() == b"before"
    call = channel.stream_stream("/t/Call")()
    with caplog.at_level(logging.DEBUG):
        await call.write(b"raise")
        assert await status_of(call) == (13, "internal error")
    assert await book[1].over is CloseReason.ERROR
    assert "KeyError" in caplog.text
    assert "secret-token" not in caplog.text
    await other.write(b"after")
    assert await other.read() == b"after"
    assert book[1].ends == [CloseReason.ERROR]


@pytest.mark.parametrize("words", [b"raise at end", b"raise at close"])
async def test_a_call_that_raises_at_its_end_hurts_nobody(end, start, connect, book, words):
    channel = connect(await start(end))
    call = channel.stream_stream("/t/Call")()
    await call.write(words)
    await call.done_writing()
    assert await call.read() == words
    assert await call.code() is (grpc.StatusCode.INTERNAL if words == b"raise at end" else grpc.StatusCode.OK)
    assert (await exchange(channel, [b"on"]))[0] == [b"on"]
    assert len(book[0].ends) == 1


async def test_a_status_of_choice_reaches_the_client(end, start, connect, book):
    channel = connect(await start(end))
    call = channel.stream_stream("/t/Call")()
    await call.write(b"refuse")
    assert await status_of(call) == (14, "store is down")
    assert await book[0].over is CloseReason.ERROR


async def test_a_service_that_raises_ends_the_stream(end, start, connect):
    def refuse(stream):
        raise RuntimeError

    channel = connect(await start(end, services={"/t/Refuse": refuse}))
    call = channel.stream_stream("/t/Refuse")()
    assert await call.code() is grpc.StatusCode.INTERNAL


async def test_an_unknown_method_is_unimplemented(end, start, connect):
    channel = connect(await start(end))
    call = channel.stream_stream("/t/Other")()
    assert await call.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_message_over_the_limit_is_refused(end, start, connect, book):
    channel = connect(await start(end, max_message_bytes=1000))
    call = channel.stream_stream("/t/Call")()
    await call.write(b"x" * 1000)
    assert await call.read() == b"x" * 1000
    await call.write(b"x" * 1001)
    assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await book[0].over
    assert book[0].messages == [b"x" * 1000]
    assert len(book[0].ends) == 1


async def test_cancel_is_heard_as_a_reset(end, start, connect, book):
    channel = connect(await start(end))
    call = channel.stream_stream("/t/Call")()
    await call.write(b"hello")
    assert await call.read() == b"hello"
    call.cancel()
    assert await book[0].over is CloseReason.RESET
    assert book[0].ends == [CloseReason.RESET]


async def test_a_deadline_of_the_client_ends_the_stream(end, start, connect, book):
    channel = connect(await start(end))
    for timeout_s in (0.3, 3, 30):  # on a busy machine it may be over before the server has heard of it
        call = channel.stream_stream("/t/Call")(timeout=timeout_s)
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await call.write(b"nothing")
        assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        if book:
            break
    # grpcio may read the end of a stream that hits its deadline as a half-close.
    assert await book[0].over in ({CloseReason.RESET} if end == "h2" else {CloseReason.RESET, CloseReason.DONE})
    assert len(book[0].ends) == 1


async def test_five_hundred_streams_at_once_keep_apart(end, start, connect, book):
    channel = connect(await start(end))

    async def one(number):
        size = (1 << 10, 16 << 10, 200 << 10)[number % 3]
        messages = [b"%06d" % number + bytes([part]) * size for part in range(3)]
        replies, call = await exchange(channel, messages)
        assert replies == messages
        assert await call.code() is grpc.StatusCode.OK

    await asyncio.gather(*(one(number) for number in range(500)))
    assert len(book) == 500
    assert {reason for call in book for reason in call.ends} == {CloseReason.DONE}
    assert all(len(call.ends) == 1 for call in book)


async def test_a_client_that_reads_late_gets_everything(end, start, connect):
    channel = connect(await start(end))
    call = channel.stream_stream("/t/Call")()
    sizes = [300_000] * 40
    for size in sizes:
        await call.write(b"size %d" % size)
    await asyncio.sleep(0.2)
    await call.done_writing()
    assert [len(reply) async for reply in call] == sizes


async def test_metadata_of_any_kind_is_accepted(end, start, connect):
    channel = connect(await start(end))
    for number in range(3):
        metadata = [
            ("x-text", "täxt".encode().decode("latin-1") if number < 0 else "v" * 300),
            ("x-bin-bin", b"\0\xff"),
        ]
        assert (await exchange(channel, [b"m"], metadata=metadata))[0] == [b"m"]


async def test_a_lost_connection_ends_its_calls(end, start, connect, book):
    server = await start(end)
    channel = connect(server)
    call = channel.stream_stream("/t/Call")()
    await call.write(b"hello")
    assert await call.read() == b"hello"
    await channel.close()
    assert await book[0].over in {CloseReason.LOST, CloseReason.RESET}
    assert len(book[0].ends) == 1


async def test_close_ends_open_calls_and_listening(end, start, connect, book):
    server = await start(end)
    channel = connect(server)
    call = channel.stream_stream("/t/Call")()
    await call.write(b"hello")
    assert await call.read() == b"hello"
    await server.close()
    # grpcio may read the end of a stream that is cut as a half-close.
    expected = {CloseReason.LOST} if end == "h2" else {CloseReason.RESET, CloseReason.DONE}
    assert await book[0].over in expected
    assert await call.code() is grpc.StatusCode.UNAVAILABLE
    await server.close()  # again does nothing


def refuses(address):
    """Whether nobody listens there any more."""
    host, port = address.rsplit(":", 1)
    try:
        socket.create_connection((host, int(port)), 5).close()
    except OSError:
        return True
    return False


async def test_drain_serves_what_is_open_and_nothing_new(end, start, connect, book):
    server = await start(end)
    channel = connect(server)
    call = channel.stream_stream("/t/Call")()
    await call.write(b"hello")
    assert await call.read() == b"hello"
    draining = asyncio.ensure_future(server.drain(60))
    await eventually(lambda: refuses(server.address))
    assert not draining.done()
    late = connect(server).stream_stream("/t/Call")()
    assert await late.code() is grpc.StatusCode.UNAVAILABLE
    await call.write(b"still here")
    assert await call.read() == b"still here"
    await call.done_writing()
    assert await call.code() is grpc.StatusCode.OK
    await asyncio.wait_for(draining, 60)
    assert len(book) == 1


async def test_drain_gives_up_at_its_timeout(end, start, connect, book):
    server = await start(end)
    call = connect(server).stream_stream("/t/Call")()
    await call.write(b"hello")
    assert await call.read() == b"hello"
    await asyncio.wait_for(server.drain(0.1), 60)
    await server.close()
    assert len(book[0].ends) == 1


async def test_after_its_timeout_a_drain_ends_with_ok_what_may_go_and_cuts_the_rest(end, start, connect, book):
    server = await start(end)
    calls = {}
    for word in (b"may go", b"may go soon", b"stay", b"raise at the deadline"):
        calls[word] = connect(server).stream_stream("/t/Call")()
        await calls[word].write(word)
        assert await calls[word].read() == word
    draining = asyncio.ensure_future(server.drain(0.1))
    for word in (b"may go", b"may go soon"):
        assert await calls[word].read() is grpc.aio.EOF
        assert await calls[word].code() is grpc.StatusCode.OK
    await draining
    await server.close()
    for word in (b"stay", b"raise at the deadline"):
        assert await calls[word].code() is not grpc.StatusCode.OK
    assert {call.messages[0]: call.ends for call in book if call.messages[0].startswith(b"may")} == {
        b"may go": [CloseReason.DONE],
        b"may go soon": [CloseReason.DONE],
    }
    assert all(len(call.ends) == 1 for call in book)
    ended_s = {call.messages[0]: call.ended_s for call in book}
    assert ended_s[b"may go"] < ended_s[b"may go soon"] < ended_s[b"stay"], "the rest is cut at last"


async def test_no_call_is_asked_to_go_before_the_timeout(end, start, connect, book):
    server = await start(end)
    call = connect(server).stream_stream("/t/Call")()
    await call.write(b"may go")
    assert await call.read() == b"may go"
    draining = asyncio.ensure_future(server.drain(20))
    await asyncio.sleep(0.1)
    assert not book[0].asked
    await call.done_writing()
    await asyncio.wait_for(draining, 60)


async def test_unix_socket_is_private_replaces_a_stale_file_and_goes_away(end, start, connect, tmp_path):
    path = tmp_path / "s"
    first = await start(end, f"unix:{path}")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert first.address == f"unix:{path}"
    with pytest.raises(OSError, match="listens"):
        await start(end, f"unix:{path}")
    assert (await exchange(connect(first), [b"over unix"]))[0] == [b"over unix"]
    await first.close()
    assert not path.exists()


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1", "127.0.0.1:99999", "127.0.0.1:http"])
async def test_an_address_that_cannot_be_read_is_an_error(end, start, address):
    with pytest.raises(ValueError, match="HOST:PORT"):
        await start(end, address)


async def test_a_port_in_use_is_an_error(end, start):
    server = await start("h2")
    with pytest.raises(OSError):
        await start(end, server.address)


# --- health ---

EXT_PROC = "envoy.service.ext_proc.v3.ExternalProcessor"


def ask(name):
    return b"" if not name else b"\x0a" + bytes((len(name),)) + name.encode()


async def test_health_check_knows_each_service(end, start, connect):
    health = Health([EXT_PROC], serving=False)
    channel = connect(await start(end, health=health))
    check = channel.unary_unary("/grpc.health.v1.Health/Check")
    assert await check(ask(EXT_PROC)) == NOT_SERVING
    health.set(EXT_PROC, serving=True)
    health.set("", serving=True)
    assert await check(ask(EXT_PROC)) == SERVING
    assert await check(ask("")) == SERVING
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await check(ask("nobody"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await check(b"\x0a\x7fbroken")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_health_agrees_with_the_stock_messages(end, start, connect):
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    stub = health_pb2_grpc.HealthStub(connect(await start(end, health=Health([EXT_PROC]))))
    answer = await stub.Check(health_pb2.HealthCheckRequest(service=EXT_PROC))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_health_watch_hears_changes_and_the_drain(end, start, connect):
    health = Health([EXT_PROC])
    server = await start(end, health=health)
    watch = connect(server).unary_stream("/grpc.health.v1.Health/Watch")(ask(EXT_PROC))
    unknown = connect(server).unary_stream("/grpc.health.v1.Health/Watch")(ask("later"))
    assert await watch.read() == SERVING
    assert await unknown.read() == SERVICE_UNKNOWN
    health.set(EXT_PROC, serving=False)
    assert await watch.read() == NOT_SERVING
    health.set("later", serving=True)
    assert await unknown.read() == SERVING
    health.set(EXT_PROC, serving=True)
    assert await watch.read() == SERVING
    await asyncio.wait_for(server.drain(10), 60)
    assert await watch.read() == NOT_SERVING
    assert await watch.code() is grpc.StatusCode.UNAVAILABLE
    health.set(EXT_PROC, serving=True)
    assert health.status(EXT_PROC) == NOT_SERVING
