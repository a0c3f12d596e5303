"""Active health against real engine processes: killed, frozen, ill, and strangers with other paths."""

import asyncio
import contextlib
import json
import signal
import sys
import time
from collections.abc import AsyncIterator

import aiohttp
import pytest

from apis.policy import Endpoint, Route
from extproc.picking import HealthSettings, Outcome, Picker
from tests.harness.gateway import until

FAST = HealthSettings(interval_s=0.05, down_interval_s=0.03, timeout_s=60.0, ejection_s=0.2)
"""however late an answer is on a busy machine, it comes"""
IMPATIENT = HealthSettings(interval_s=0.05, down_interval_s=0.03, timeout_s=0.2)


class Process:
    def __init__(self, process: asyncio.subprocess.Process, url: str) -> None:
        self.process = process
        self.url = url
        self.address = url.removeprefix("http://")

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def faults(self, **faults: object) -> None:
        async with aiohttp.ClientSession() as session, session.post(f"{self.url}/sim/faults", json=faults) as answer:
            assert answer.status == 200


@contextlib.asynccontextmanager
async def engine(port: int = 0, *flags: str) -> AsyncIterator[Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "simengine",
        "--listen",
        f"127.0.0.1:{port}",
        *flags,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        ready = json.loads(await asyncio.wait_for(process.stdout.readline(), 60))
        yield Process(process, ready["url"])
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@contextlib.asynccontextmanager
async def probing(picker: Picker) -> AsyncIterator[None]:
    task = asyncio.create_task(picker.run())
    try:
        yield
        assert not task.done()
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def fleet(*addresses: str, health: HealthSettings = FAST) -> tuple[Picker, Endpoint]:
    picker = Picker(health, seed=1)
    target = Endpoint("ns", "m", "m", (Route("a", 1, addresses),))
    picker.set_policy([target])
    return picker, target


def healthy(picker: Picker) -> dict[str, bool]:
    return {state.address: state.healthy for state in picker.snapshot()}


def errors(picker: Picker) -> set[str]:
    return {state.last_error for state in picker.snapshot()}


async def test_a_killed_engine_goes_and_its_successor_on_the_port_is_used():
    async with engine() as first:
        picker, target = fleet(first.address)
        async with probing(picker):
            first.signal(signal.SIGKILL)
            await first.process.wait()
            # One that was under way at the kill breaks, the next are refused.
            await until(lambda: picker.pick(target) is None and errors(picker) == {"refused"})
            async with engine(first.port):
                await until(lambda: picker.pick(target) is not None)


async def test_a_frozen_engine_goes_after_two_timeouts_and_comes_back():
    async with engine() as frozen, engine() as other:
        picker, target = fleet(frozen.address, other.address, health=IMPATIENT)
        async with probing(picker):
            frozen.signal(signal.SIGSTOP)
            await until(lambda: healthy(picker) == {frozen.address: False, other.address: True})
            assert "timeout" in errors(picker)
            assert picker.pick(target).addresses == (other.address,)
            frozen.signal(signal.SIGCONT)
            await until(lambda: all(healthy(picker).values()))


async def test_a_gateway_that_is_held_up_itself_blames_no_engine():
    seen: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        seen.append("asked")
        time.sleep(2 * IMPATIENT.timeout_s)  # noqa: ASYNC251 - nothing runs meanwhile, the prober neither
        writer.write(b"HTTP/1.1 200 X\r\ncontent-length: 0\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        picker, target = fleet(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", health=IMPATIENT)
        async with probing(picker):
            await until(lambda: len(seen) >= 4)
            assert picker.pick(target) is not None
            assert errors(picker) == {""}


async def test_an_engine_that_says_it_is_ill_is_not_used():
    async with engine() as ill:
        picker, target = fleet(ill.address)
        async with probing(picker):
            await ill.faults(health_status=503)
            await until(lambda: picker.pick(target) is None)
            assert errors(picker) == {"status_503"}
            await ill.faults()
            await until(lambda: picker.pick(target) is not None)


async def test_an_engine_lost_by_a_request_comes_back_by_a_probe_alone():
    async with engine() as flaky:
        # Probes of a fit engine are an hour apart: only the loss itself can bring the one that helps.
        picker, target = fleet(flaky.address, health=HealthSettings(interval_s=3600.0, down_interval_s=0.05))
        async with probing(picker):
            await asyncio.sleep(0.1)
            picker.begin(flaky.address)
            picker.end(flaky.address, Outcome.UNREACHABLE)
            assert picker.pick(target) is None
            await until(lambda: picker.pick(target) is not None)


async def test_an_ejected_engine_is_back_only_after_its_time():
    async with engine() as failing, engine() as other:
        picker, target = fleet(failing.address, other.address)
        async with probing(picker):
            loop = asyncio.get_running_loop()
            for _ in range(FAST.failures_until_ejection):
                picker.begin(failing.address)
                picker.end(failing.address, Outcome.FAILED)
            ejected_s = loop.time()
            await until(lambda: healthy(picker)[failing.address])
            assert loop.time() - ejected_s >= FAST.ejection_s - 0.01
            assert len(picker.pick(target).addresses) == 2
            assert healthy(picker)[other.address]


@contextlib.asynccontextmanager
async def stranger(statuses: dict[str, int], seen: list[str], host: str = "127.0.0.1") -> AsyncIterator[str]:
    """A server of which only status lines are known."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        path = head.split(b" ")[1].decode()
        seen.append(path)
        status = statuses.get(path, 404)
        extra = b"location: /elsewhere\r\n" if status == 302 else b""
        if status:
            writer.write(b"HTTP/1.1 %d X\r\n%bcontent-length: 0\r\n\r\n" % (status, extra))
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    server = await asyncio.start_server(serve, host, 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        await server.wait_closed()


@pytest.mark.parametrize(
    ("statuses", "asked"),
    [
        ({"/ready": 200}, ["/ready", "/ready"]),
        ({"/health": 200}, ["/ready", "/health", "/health"]),
        ({"/v1/models": 401}, ["/ready", "/health", "/v1/models", "/v1/models"]),
        ({"/ready": 302}, ["/ready", "/ready"]),
    ],
)
async def test_the_path_that_a_server_knows_is_found_once_and_kept(statuses, asked):
    seen: list[str] = []
    async with stranger(statuses, seen) as address:
        picker, target = fleet(address)
        async with probing(picker):
            await until(lambda: len(seen) >= len(asked))
        assert seen[: len(asked)] == asked
        assert picker.pick(target) is not None


async def test_a_server_that_knows_none_of_the_paths_counts_as_alive():
    seen: list[str] = []
    async with stranger({}, seen) as address:
        picker, target = fleet(address)
        async with probing(picker):
            await until(lambda: len(seen) >= 6)
            assert picker.pick(target) is not None


async def test_a_connection_closed_without_an_answer_is_no_life():
    async with stranger({"/ready": 0}, []) as address:
        picker, target = fleet(address)
        async with probing(picker):
            await until(lambda: picker.pick(target) is None)
            assert errors(picker) == {"broken"}


async def test_an_address_that_is_none_does_not_end_the_probing():
    async with engine() as good:
        picker, target = fleet("not an address", "[::1", good.address)
        async with probing(picker):
            await until(lambda: healthy(picker) == {"not an address": False, "[::1": False, good.address: True})
            assert picker.pick(target).addresses == (good.address,)


async def test_an_engine_that_left_the_policy_is_not_asked_any_more():
    seen: list[str] = []
    async with stranger({"/ready": 200}, seen) as address:
        picker, _ = fleet(address)
        async with probing(picker):
            await until(lambda: len(seen) >= 2)
            [known] = picker._engines.values()
            picker.set_policy([])
            await until(lambda: not known.probing)
            asked = len(seen)
            await asyncio.sleep(0.3)
            assert len(seen) == asked
            picker.set_policy([Endpoint("ns", "m", "m", (Route("a", 1, (address,)),))])
            await until(lambda: len(seen) > asked)


async def test_more_engines_than_probes_at_once_are_all_asked():
    seen: list[str] = []
    health = HealthSettings(interval_s=0.05, down_interval_s=0.05, timeout_s=60.0, concurrency=2)
    async with contextlib.AsyncExitStack() as stack:
        addresses = [await stack.enter_async_context(stranger({"/ready": 503}, seen)) for _ in range(9)]
        picker, _ = fleet(*addresses, health=health)
        async with probing(picker):
            await until(lambda: not any(healthy(picker).values()))


async def test_a_large_fleet_is_probed_no_faster_than_agreed():
    seen: list[str] = []
    # Each address of the loopback network is another engine of one server.
    async with stranger({"/ready": 200}, seen, host="0.0.0.0") as address:
        port = address.rpartition(":")[2]
        fleet_size, each_s = 100, 200
        addresses = [f"127.0.0.{number}:{port}" for number in range(1, fleet_size + 1)]
        picker, _ = fleet(*addresses, health=HealthSettings(interval_s=0.01, timeout_s=60.0, probes_per_s=each_s))
        loop = asyncio.get_running_loop()
        async with probing(picker):
            began_s = loop.time()
            await until(lambda: len(seen) >= 4 * fleet_size)
            took_s = loop.time() - began_s
        rounds = 4 - 1  # the first one is at once
        assert took_s > 0.8 * rounds * fleet_size / each_s


async def test_answers_that_break_off_all_the_time_bring_no_more_probes_than_a_down_engine_gets():
    """Any tenant can open streams and leave them, hundreds of times a second."""
    seen: list[str] = []
    each_s = 0.1
    async with stranger({"/ready": 200}, seen) as address:
        picker, _ = fleet(address, health=HealthSettings(interval_s=3600.0, down_interval_s=each_s, timeout_s=60.0))
        loop = asyncio.get_running_loop()
        async with probing(picker):
            await until(lambda: len(seen) == 1)
            began_s = loop.time()
            while len(seen) < 4 and loop.time() - began_s < 60:
                picker.suspect(address)
                await asyncio.sleep(0.001)
            took_s = loop.time() - began_s
    assert len(seen) == 4
    assert took_s > 2 * each_s


async def test_many_new_engines_are_usable_before_their_first_probe():
    picker, target = fleet("127.0.0.1:9", "127.0.0.1:10")
    assert picker.pick(target) is not None
