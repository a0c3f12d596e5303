"""How far a download is stands in its model's status, from the loader's own lines, with few calls."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from controller.kube.errors import UnreachableError
from controller.kube.resource import Key
from controller.models.report import Report
from controller.permissions import NAMESPACE
from controller.reconcile.downloads import Downloads, fields, words
from tests.harness.rights import grant
from tests.models.hubs import Hub
from tests.models.origin import noise
from tests.models.pods import LoaderPods
from tests.reconcile.conftest import Running, condition
from tests.reconcile.resources import MODEL

CHUNK = 64 << 10
PIECE = 4 * CHUNK
WEIGHTS = noise(32 * CHUNK)


@pytest.fixture
async def hub():
    server = await Hub().start()
    yield server
    await server.stop()


@pytest.fixture
async def loaders(room, tmp_path):
    async with LoaderPods(room.api, room.namespace, tmp_path) as found:
        found.environment |= {"ARKS_LOADER_CONNECTIONS": "1", "ARKS_LOADER_PIECE_BYTES": str(PIECE)}
        yield found


def progress(model):
    return model.get("status", {}).get("progress", {})


async def test_a_model_s_status_follows_its_loader_with_the_granted_rights(room, hub, loaders):
    commit = hub.push({"config.json": b"{}", "a.safetensors": WEIGHTS})
    permits = asyncio.Semaphore(0)  # one for each chunk of the weights
    hub.storage.gate = SimpleNamespace(wait=permits.acquire)
    grant(room.api)
    running = Running(room.api, NAMESPACE, model_progress_s=0.3)
    await running.start(user="controller")
    try:
        room.apply(MODEL, model="org/model", source={"huggingface": {"endpoint": hub.api.url}})
        for share in (25, 50, 75):
            for _ in range(8):
                permits.release()
            wanted = {
                "percent": share,
                "bytesDone": 2 + share * len(WEIGHTS) // 100,
                "bytesTotal": 2 + len(WEIGHTS),
                "filesDone": 1,
                "filesTotal": 2,
            }
            model = await room.until(
                "ArksModel", "qwen-7b", lambda item, wanted=wanted: progress(item) == wanted, f"{share} %"
            )
            assert model["status"]["phase"] == "ModelLoading"
            message = condition(model, "ModelLoaded")["message"]
            assert message.startswith(f"loading: {share} % (")
            assert "of 2.0 MiB, 1 of 2 files" in message
        for _ in range(8):
            permits.release()
        ready = await room.phase("ArksModel", "qwen-7b", "Ready")
        assert "progress" not in ready["status"]
        await room.until("ArksModel", "qwen-7b", lambda item: item["status"]["revision"] == commit)
        await running.quiet()
        calls = running.client.stats.calls
        assert not [call for call in calls if call[3] == "403"]
        asked = sum(count for call, count in calls.items() if call[:3] == ("get", "", "pods/log"))
        assert asked == len(loaders.log_requests) > 0
        # What is written is what was asked for, and the few steps before and after.
        assert running.writes()["patch", "arks.ai", "arksmodels/status", "200"] <= asked + 5
        (event,) = [each for each in room.events("qwen-7b") if each[1] == "ModelLoadSucceeded"]
        assert event[0] == "Normal"
    finally:
        await running.stop()


class _Node:
    """Logs by pod, as a client gives them."""

    def __init__(self):
        self.logs = {}
        self.asked = []

    async def log(self, namespace, pod, container, **_limits):
        self.asked.append(pod)
        if pod not in self.logs:
            raise UnreachableError("no such node")
        return self.logs[pod]


MODEL_KEY = Key("team-a", "qwen-7b")


def line(done, total=100, files_total=4):
    return b'{"state":"loading","bytesDone":%d,"bytesTotal":%d,"filesDone":1,"filesTotal":%d}\n' % (
        done,
        total,
        files_total,
    )


@pytest.fixture
def clock():
    return SimpleNamespace(now_s=1000.0)


@pytest.fixture
def node():
    return _Node()


@pytest.fixture
def downloads(node, clock):
    return Downloads(node, 10.0, now_s=lambda: clock.now_s)


async def test_a_pod_is_asked_no_more_often_than_said_however_often_the_loop_wakes(downloads, node, clock):
    node.logs["pod"] = line(10)
    for _ in range(50):
        assert (await downloads.progress(MODEL_KEY, ["pod"])).bytes_done == 10
        clock.now_s += 0.1
    assert node.asked == ["pod"]
    assert downloads.due_s(MODEL_KEY) == pytest.approx(5.0)
    node.logs["pod"] = line(50)
    clock.now_s += 5.0
    assert (await downloads.progress(MODEL_KEY, ["pod"])).bytes_done == 50
    assert len(node.asked) == 2


async def test_what_was_heard_stays_while_nobody_can_be_asked(downloads, node, clock):
    node.logs["first"] = line(40)
    await downloads.progress(MODEL_KEY, ["first"])
    clock.now_s += 60.0
    assert (await downloads.progress(MODEL_KEY, [])).bytes_done == 40  # between two tries of the Job
    assert (await downloads.progress(MODEL_KEY, ["on-a-lost-node"])).bytes_done == 40
    # A node that does not answer is not asked in a hurry, either.
    asked = len(node.asked)
    await downloads.progress(MODEL_KEY, ["on-a-lost-node"])
    assert len(node.asked) == asked
    downloads.forget(MODEL_KEY)
    assert await downloads.progress(MODEL_KEY, []) is None


async def test_copies_onto_several_nodes_are_told_as_one_sum(downloads, node):
    node.logs |= {"a": line(10), "b": line(30), "c": b'{"state":"listing"}\n'}
    found = await downloads.progress(MODEL_KEY, ["a", "b", "c"])
    assert fields(found) == {"percent": 20, "bytesDone": 40, "bytesTotal": 200, "filesDone": 2, "filesTotal": 8}


@pytest.mark.parametrize(
    ("report", "told"),
    [
        (Report(state="listing"), "listing"),
        (
            Report(state="waiting", message="another loader fills this folder"),
            "waiting: another loader fills this folder",
        ),
        (
            Report(state="loading", bytes_done=3 << 29, bytes_total=3 << 30, files_done=2, files_total=9),
            "loading: 50 % (1.5 GiB of 3.0 GiB, 2 of 9 files)",
        ),
        (
            Report(
                state="loading",
                bytes_done=2047,
                bytes_total=2048,
                files_done=0,
                files_total=1,
                bytes_per_second=5 << 20,
            ),
            "loading: 99 % (2.0 KiB of 2.0 KiB, 0 of 1 files, 5.0 MiB/s)",
        ),
        (
            Report(state="checking", files_done=0, files_total=1, bytes_total=0),
            "checking: (0.0 KiB of 0.0 KiB, 0 of 1 files)",
        ),
    ],
)
def test_progress_in_words(report, told):
    assert words(report) == told
