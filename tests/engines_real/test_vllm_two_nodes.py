"""A group of two pods of one ArksApplication: two real vLLMs that are one engine by tensor parallelism over two nodes,
started as LeaderWorkerSet starts them, and stopped as Kubernetes stops both: at the same moment.
"""

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from controller.workloads.model import LWS
from scripts import engines
from tests.engines_real.client import CHAT, Client, chat
from tests.engines_real.conftest import SLOW_START
from tests.engines_real.generated import application, instance, pods
from tests.engines_real.launched import Container

pytestmark = SLOW_START

TOKENS = 600
# A pod has one address and knows it; here all share a network of many, so each is told which is its own.
NETWORK = ({"name": "VLLM_HOST_IP", "value": "$(POD_IP)"}, {"name": "GLOO_SOCKET_IFNAME", "value": "lo"})


@dataclass
class Group:
    leader: Container
    worker: Container


@pytest.fixture(scope="module")
def group(made, tmp_path_factory) -> Iterator[Group]:
    folder = tmp_path_factory.mktemp("group")
    made_pods = pods(
        application(served=frozenset({LWS}), size=2, tensorParallelSize=2, instanceSpec=instance(*NETWORK))
    )
    leader, worker = (
        Container(made_pods[role], folder / role, {"models": engines.models()}) for role in ("leader", "worker")
    )
    for each in (leader, worker):
        each.injected = {"LWS_LEADER_ADDRESS": leader.address, "LWS_GROUP_SIZE": "2"}
    try:
        worker.start()
        leader.start()
        leader.wait_started()
        yield Group(leader, worker)
    finally:
        leader.kill()
        worker.kill()


def listens(address: str, port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection((address, port), 2).close()
        return True
    return False


async def test_the_leader_answers_for_both_and_the_worker_answers_nobody(group, session):
    answer = await Client(session, group.leader.url).ok(CHAT, chat(max_tokens=5, ignore_eos=True))
    assert answer.json["usage"]["completion_tokens"] == 5
    assert "-tp2-" in answer.json["system_fingerprint"]
    assert group.worker.exit_status is None
    assert "ports" not in group.worker.spec
    assert not {"startupProbe", "readinessProbe", "livenessProbe"} & group.worker.spec.keys()
    assert not listens(group.worker.address, group.leader.port("http"))


async def test_a_worker_told_to_stop_computes_on_until_its_leaders_last_stream_has_ended(group, session):
    leader, worker = group.leader, group.worker
    until = time.monotonic() + leader.grace_s
    following = asyncio.create_task(asyncio.to_thread(worker.pre_stop))
    await asyncio.to_thread(leader.pre_stop)
    body = chat(max_tokens=TOKENS, ignore_eos=True, stream=True, stream_options={"include_usage": True})
    async with Client(session, leader.url).stream(CHAT, body) as (_, events):
        for _ in range(10):
            await anext(events)
        leader.terminate()
        data = [one async for one in events]
    assert not following.done()
    assert data[-1] == "[DONE]"
    assert f'"completion_tokens":{TOKENS}' in data[-2]
    assert await asyncio.to_thread(leader.wait_ended, until - time.monotonic()) == 0
    async with asyncio.timeout(30):
        await following
    assert worker.exit_status is None
    worker.terminate()
    assert await asyncio.to_thread(worker.wait_ended, until - time.monotonic()) == 0
