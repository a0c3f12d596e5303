"""The loader as the Job runs it: exit codes, signals, death, and a volume that is full."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal

import pytest

from controller.models.report import parse_report
from tests.models.hubs import SIGNATURE, TOKEN
from tests.models.origin import CUT, STATUS, noise

BIG = {"config.json": b"{}", "a.safetensors": noise(6_000_000, 1), "b.safetensors": noise(2_000_000, 2)}
TOTAL = sum(map(len, BIG.values()))


def source(hub, **more):
    return {"kind": "huggingface", "endpoint": hub.api.url, **more}


async def ended(process):
    async with asyncio.timeout(120):
        out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


async def sent_at_least(hub, count):
    async with asyncio.timeout(60):
        while hub.sent < count:  # noqa: ASYNC110 - what another process has caused
            await asyncio.sleep(0.005)


async def over(hub):
    """What was being sent to a loader that is dead is sent, and counted, or given up."""
    async with asyncio.timeout(60):
        while hub.storage.at_once:  # noqa: ASYNC110 - the server's own doing
            await asyncio.sleep(0.005)


def kept(loader):
    """Bytes of finished files, and those that the parts' journals vouch for."""
    bytes_ = 0
    for path in (loader.volume / ".arks-cache").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a running loader ends journals and moves what is whole
            if path.suffix == ".journal":
                stretches = [line.split() for line in path.read_text().split("\n")[1:] if line.count(" ") == 1]
                bytes_ += sum(int(last) - int(first) + 1 for first, last in stretches)
            elif not path.suffix and path.name[0] != ".":
                bytes_ += path.stat().st_size
    return bytes_


async def test_ready_is_exit_0_and_the_termination_message_tells_the_revision(hub, loader, tmp_path):
    commit = hub.push({"config.json": b"{}"})
    log = tmp_path / "termination-log"
    log.touch()
    process = await loader.process(source(hub), environment={"ARKS_TERMINATION_LOG": str(log)})
    code, out, err = await ended(process)
    assert (code, err) == (0, "")
    assert parse_report(log.read_text()) == parse_report(out)
    assert (parse_report(out).state, parse_report(out).revision) == ("ready", commit)


@pytest.mark.parametrize(("status", "expected"), [(401, 3), (403, 3), (404, 3), (500, 1)])
async def test_exit_code_tells_whether_to_try_again(hub, loader, status, expected):
    hub.push({"config.json": b"{}"})
    hub.token = TOKEN
    hub.api.forever = True
    hub.api.faults["api"] = [(STATUS, status)]
    environment = {"HF_TOKEN": TOKEN, "ARKS_LOADER_RETRIES": "1"}
    code, out, err = await ended(await loader.process(source(hub), environment=environment))
    assert code == expected
    report = parse_report(out)
    assert report.state == "failed"
    assert report.message
    assert TOKEN not in out + err
    assert SIGNATURE not in out + err


@pytest.mark.parametrize(
    "argument", ["", "{", '{"model": "m"}', "[]", '{"model":"m","path":"/m","source":{"kind":"ftp"}}']
)
async def test_a_request_that_is_none_is_lasting(loader, argument):
    loader.argument = lambda *_: argument
    code, out, _ = await ended(await loader.process({}))
    assert code == 3
    assert parse_report(out).reason == "InvalidRequest"


async def test_killed_in_the_middle_it_goes_on_without_loading_twice(hub, loader):
    hub.push(BIG)
    hub.storage.pause_s = 0.01
    process = await loader.process(source(hub), environment={"ARKS_LOADER_CONNECTIONS": "4"})
    await sent_at_least(hub, 3_000_000)
    process.send_signal(signal.SIGKILL)
    await ended(process)
    assert loader.marker() is None
    await over(hub)
    hub.storage.pause_s = 0
    before, written = hub.sent, kept(loader)
    code, _, _ = await ended(await loader.process(source(hub)))
    assert code == 0
    assert loader.files() == BIG
    # What the kernel had been given is not asked for again; what was under way then is, and no more.
    assert written > 1_000_000
    assert hub.sent - before == TOTAL - written


async def test_killed_again_and_again_it_ends_right(hub, loader):
    hub.push(BIG)
    hub.storage.pause_s = 0.004
    for _ in range(4):
        process = await loader.process(source(hub))
        await sent_at_least(hub, hub.sent + 1_000_000)
        process.send_signal(signal.SIGKILL)
        await ended(process)
    hub.storage.pause_s = 0
    code, _, _ = await ended(await loader.process(source(hub)))
    assert code == 0
    assert loader.files() == BIG


async def test_told_to_stop_it_stops_at_once_and_keeps_what_it_has(hub, loader):
    hub.push(BIG)
    hub.storage.pause_s = 0.02
    process = await loader.process(source(hub))
    await sent_at_least(hub, 2_000_000)
    process.send_signal(signal.SIGTERM)
    code, out, err = await ended(process)
    assert hub.sent < TOTAL, "it loaded all of it first"
    assert (code, err) == (143, "")
    assert parse_report(out).state == loader.status().state == "stopped"
    assert loader.marker() is None
    await over(hub)
    hub.storage.pause_s = 0
    before = hub.sent
    code, _, _ = await ended(await loader.process(source(hub)))
    assert code == 0
    assert hub.sent - before < TOTAL - 1_000_000
    assert loader.files() == BIG


async def test_told_to_stop_while_it_backs_off_or_waits(hub, loader):
    hub.push(BIG)
    hub.api.forever = True
    hub.api.faults["api"] = [(STATUS, 429, {"Retry-After": "100"})]
    process = await loader.process(source(hub))
    async with asyncio.timeout(60):
        while not hub.api.requests:  # noqa: ASYNC110 - what another process has caused
            await asyncio.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    code, _, _ = await ended(process)
    assert code == 143


async def test_a_volume_that_fills_up_is_told_as_such(hub, loader):
    hub.push(BIG)

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    code, out, err = await ended(await loader.process(source(hub), preexec_fn=small_files))
    report = parse_report(out)
    assert (code, report.reason, report.field) == (3, "NoSpace", "spec.storage")
    assert "Traceback" not in err
    assert loader.marker() is None


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small tmpfs")
async def test_a_full_volume_is_told_and_goes_on_when_enlarged(hub, loader):
    hub.push(BIG)
    mount = await asyncio.create_subprocess_exec("mount", "-t", "tmpfs", "-o", "size=5m", "none", str(loader.volume))
    if await mount.wait() != 0:
        pytest.skip("this machine does not let us mount")
    try:
        code, out, _ = await ended(await loader.process(source(hub)))
        assert (code, parse_report(out).reason) == (3, "NoSpace")
        assert "are free" in parse_report(out).message
        assert hub.sent == 0, "found before the first byte"

        # Bytes that somebody else takes meanwhile are met while writing.
        async def eater():
            await sent_at_least(hub, 500_000)
            with (loader.volume / "other").open("wb") as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(1 << 16))
                    file.flush()

        await (await asyncio.create_subprocess_exec("mount", "-o", "remount,size=9m", str(loader.volume))).wait()
        hub.storage.pause_s = 0.02
        process = await loader.process(source(hub))
        eating = asyncio.create_task(asyncio.wait_for(eater(), 90))
        code, out, err = await ended(process)
        await eating
        assert (code, parse_report(out).reason) == (3, "NoSpace"), out + err
        assert "full" in parse_report(out).message
        (loader.volume / "other").unlink()
        hub.storage.pause_s = 0
        code, _, _ = await ended(await loader.process(source(hub)))
        assert code == 0
        assert loader.files() == BIG
    finally:
        await (await asyncio.create_subprocess_exec("umount", "-l", str(loader.volume))).wait()


async def test_two_loaders_of_one_folder_load_it_once(hub, loader):
    hub.push(BIG)
    hub.storage.gate = asyncio.Event()
    both = [await loader.process(source(hub)) for _ in range(2)]
    # One of them says that it waits; which one is chance.
    async with asyncio.timeout(60):
        lines = [asyncio.create_task(says(one, b'"waiting"')) for one in both]
        await asyncio.wait(lines, return_when=asyncio.FIRST_COMPLETED)
    for line in lines:
        line.cancel()
    await asyncio.wait(lines)
    hub.storage.gate.set()
    results = await asyncio.gather(*(ended(one) for one in both))
    assert [code for code, _, _ in results] == [0, 0]
    assert loader.files() == BIG
    assert hub.sent == TOTAL


async def says(process, text):
    while text not in await process.stdout.readline():
        pass


async def test_two_models_of_one_volume_load_the_same_weights_once(hub, loader):
    hub.push(BIG)
    hub.storage.pause_s = 0.005
    both = [await loader.process(source(hub), folder=name) for name in ("one", "two")]
    results = await asyncio.gather(*(ended(one) for one in both))
    assert [code for code, _, _ in results] == [0, 0]
    assert loader.files("one") == loader.files("two") == BIG
    assert hub.sent <= TOTAL + 1
    assert json.loads(results[0][1].splitlines()[-1])["state"] == "ready"


async def test_no_secret_in_anything_the_process_says(hub, loader):
    hub.push(BIG)
    hub.token = TOKEN
    hub.storage.faults["a.safetensors"] = [(CUT, 100), (STATUS, 403), (STATUS, 503)]
    code, out, err = await ended(await loader.process(source(hub), environment={"HF_TOKEN": TOKEN}))
    assert code == 0
    told = out + err + "".join(path.read_text("latin-1") for path in loader.volume.rglob(".arks-*") if path.is_file())
    assert TOKEN not in told
    assert "Signature" not in told
