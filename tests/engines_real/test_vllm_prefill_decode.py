"""A generated prefill and decode pair and its router, from the pods of one ArksDisaggregatedApplication: two real vLLMs
that hand KV over by NIXL on CPUs, and vLLM's own router, which finds them by their labels through a real Kubernetes API
server with nothing but the rights of the Role that we generate.

The tests run in the order of the pair's life: the last one takes a pod away.
"""

import asyncio
import contextlib
import json
import shutil
import socket
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest

from scripts import engines
from tests.engines_real.client import CHAT, Answer, Client, chat
from tests.engines_real.conftest import POLICY, SLOW_START
from tests.engines_real.generated import disaggregated, pods
from tests.engines_real.launched import START_TIMEOUT_S, Container, pod_address
from tests.harness.gateway import Gateway, running_gateway, sum_series
from tests.harness.kubernetes import KubeApi

pytestmark = SLOW_START

# Where there is one loopback network and no other, UCX must be told to use it.
UCX = ({"name": "UCX_TLS", "value": "tcp,self,sm"}, {"name": "UCX_NET_DEVICES", "value": "lo"})
TOKENS = 24
TEXT = "The gateway counts every token that an engine reads and writes. " * 12
ANOTHER_TEXT = "A quick brown fox asks the model a question, and the model answers at length. " * 9
SOURCES = ("local_compute", "local_cache_hit", "external_kv_transfer")


@dataclass(frozen=True, slots=True)
class Work:
    """Prompt tokens of an engine by where their KV came from, and tokens that it generated."""

    local_compute: int
    local_cache_hit: int
    external_kv_transfer: int
    generated: int
    transfers: int
    failed: int = 0
    """transfers"""

    def __sub__(self, other: "Work") -> "Work":
        return Work(*(getattr(self, name) - getattr(other, name) for name in self.__slots__))


async def work(session: aiohttp.ClientSession, engine: Container) -> Work:
    async with session.get(f"{engine.url}/metrics") as answer:
        page = await answer.text()
    found = dict.fromkeys(SOURCES, 0)
    for line in page.splitlines():
        if line.startswith("vllm:prompt_tokens_by_source_total{"):
            source = line.partition('source="')[2].partition('"')[0]
            found[source] = int(float(line.rpartition(" ")[2]))
    generated = int(sum_series(page, "vllm:generation_tokens_total"))
    transfers = int(sum_series(page, "vllm:nixl_bytes_transferred_count"))
    failed = int(sum_series(page, "vllm:nixl_num_failed_transfers_total"))
    return Work(*found.values(), generated, transfers, failed)


@dataclass
class Pair:
    api: KubeApi
    namespace: str
    prefill: Container
    decode: Container
    router: Container
    early: list[bool]
    """the router's readiness, looked at until both engines were ready"""


@pytest.fixture(scope="module")
def pair(made, kube_api: KubeApi, tmp_path_factory) -> Iterator[Pair]:
    namespace = kube_api.create_namespace()
    desired = disaggregated(*UCX, namespace=namespace)
    kube_api.apply(*desired.objects)
    folder = tmp_path_factory.mktemp("pair")
    found = {}
    for name, pod in pods(desired).items():
        found[name] = Container(pod, folder / name, {"models": engines.models()})
    prefill, decode, router = (found[f"pair-{name}"] for name in ("prefill", "decode", "scheduler"))
    let_in(kube_api, router)
    pair = Pair(kube_api, namespace, prefill, decode, router, [])
    try:
        for each in found.values():
            run(kube_api, each)
        router.wait_started()
        waiting = [prefill, decode]
        deadline = time.monotonic() + START_TIMEOUT_S
        while waiting:
            pair.early.append(router.probe("readiness"))
            for each in [one for one in waiting if one.probe("startup") and one.probe("readiness")]:
                tell(kube_api, each, ready=True)
                waiting.remove(each)
            for each in found.values():
                assert each.exit_status is None, each.log[-4000:]
            assert time.monotonic() < deadline, [each.log[-2000:] for each in waiting]
            time.sleep(0.3)
        until(lambda: router.probe("readiness"), router)
        until(lambda: introduced(router), router)
        yield pair
    finally:
        for each in found.values():
            each.kill()
        kube_api.remove_namespace(namespace)


def run(api: KubeApi, container: Container) -> None:
    """As a node does with a pod that was bound to it."""
    pod = {**container.pod, "spec": {**container.pod["spec"], "nodeName": "node"}}
    api.apply(pod)
    container.start()
    tell(api, container, ready=False)


def tell(api: KubeApi, container: Container, *, ready: bool) -> None:
    """What a kubelet writes into a pod's status."""
    conditions = [{"type": "Ready", "status": str(ready)}]
    address = container.address
    api.set_status(container.pod, phase="Running", podIP=address, podIPs=[{"ip": address}], conditions=conditions)


def let_in(api: KubeApi, router: Container) -> None:
    """Its ServiceAccount's token and the cluster's address, which a container finds mounted, as a kubeconfig."""
    account = router.pod["spec"]["serviceAccountName"]
    token = api.service_account_token(router.pod["metadata"]["namespace"], account)
    router.folder.mkdir(parents=True)
    written = api.kubeconfig(f"router-{router.pod['metadata']['namespace']}", credentials={"token": token})
    shutil.move(written, router.folder / "kubeconfig")
    router.injected = {"KUBECONFIG": str(router.folder / "kubeconfig")}


def until(holds: Any, container: Container, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, container.log[-4000:]
        time.sleep(0.1)


def introduced(router: Container) -> bool:
    """Has decode's handshake with prefill, in a first request, ended well? vLLM waits 5 s for it, then answers 500."""
    body = json.dumps(asked("They meet. " * 40, cache_salt="met")).encode()
    request = urllib.request.Request(router.url + CHAT, body, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError as error:
        if error.code != 500:
            raise
        return False


@pytest.fixture(scope="module")
def fronted(pair, tmp_path_factory) -> Iterator[Gateway]:
    with running_gateway(tmp_path_factory.mktemp("gateway"), POLICY, [pair.router.url]) as one:
        yield one


@pytest.fixture
def tenant(fronted, session) -> Client:
    return Client(session, fronted.url, "sk-alice")


def asked(text: str = TEXT, **fields: Any) -> dict[str, Any]:
    return chat(text, max_tokens=TOKENS, temperature=0, ignore_eos=True, **fields)


def said(answer: Answer) -> str:
    if answer.text.startswith("data:"):
        choices = [each for event in answer.events for each in event["choices"]]
        return "".join(each["delta"].get("content") or "" for each in choices)
    text: str = answer.json["choices"][0]["message"]["content"]
    return text


def test_the_router_finds_both_halves_by_itself_and_is_ready_no_sooner(pair):
    assert pair.early
    assert not any(pair.early)
    assert pair.router.probe("liveness")


async def test_decode_goes_on_from_what_prefill_computed_and_says_what_one_engine_says(pair, session):
    router, alone = Client(session, pair.router.url), Client(session, pair.prefill.url)
    before = [await work(session, each) for each in (pair.prefill, pair.decode)]
    answer = await router.ok(CHAT, asked())
    prefill, decode = [await work(session, each) for each in (pair.prefill, pair.decode)]
    prompt = answer.json["usage"]["prompt_tokens"]
    assert prompt > 150
    assert prefill - before[0] == Work(prompt, 0, 0, generated=1, transfers=0)
    assert decode - before[1] == Work(0, 0, prompt, generated=TOKENS, transfers=1)
    # The same engine, alone from the prompt's first token to the answer's last: its own salt hits no cache.
    whole = await alone.ok(CHAT, asked(cache_salt="alone"))
    assert (await work(session, pair.prefill)) - prefill == Work(prompt, 0, 0, generated=TOKENS, transfers=0)
    assert said(answer) == said(whole) != ""


@pytest.mark.parametrize("stream", [False, True])
async def test_a_tenant_is_charged_once_for_what_two_engines_did(pair, fronted, tenant, session, stream):
    text = f"{stream} {ANOTHER_TEXT}"
    before = await work(session, pair.decode)
    answer = await tenant.ok(CHAT, asked(text, stream=stream))
    done = (await work(session, pair.decode)) - before
    row = await fronted.row_of(answer.request_id)
    assert (row["status"], row["accuracy"], row["completion_tokens"]) == (200, "exact", TOKENS)
    assert row["prompt_tokens"] == done.external_kv_transfer > 150
    assert not done.failed
    alone = Client(session, pair.prefill.url)
    assert said(answer) == said(await alone.ok(CHAT, asked(text, cache_salt="alone")))


async def test_whose_kv_is_read_is_not_for_a_tenant_to_say(pair, session, tmp_path):
    """What an engine by itself would do at a client's word: call the host that the client names."""
    async with trap() as (address, port, calls):
        forged = {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": "somebody",
            "remote_request_id": "somebody-s",
            "remote_block_ids": [[1, 2, 3]],
            "remote_host": address,
            "remote_port": port,
            "remote_num_tokens": 64,
            "tp_size": 1,
        }
        body = asked("Tell me what others asked. " * 8, kv_transfer_params=forged)
        with running_gateway(tmp_path, POLICY, [pair.decode.url]) as gateway:
            before = await work(session, pair.decode)
            answer = await Client(session, gateway.url, "sk-alice").ok(CHAT, body)
            done = (await work(session, pair.decode)) - before
        assert done.external_kv_transfer == 0
        assert done.local_compute == answer.json["usage"]["prompt_tokens"]
        assert not calls
        leaving = asyncio.create_task(Client(session, pair.decode.url).ask(CHAT, body))
        async with asyncio.timeout(60):
            while not calls:  # noqa: ASYNC110 - another process calls
                await asyncio.sleep(0.1)
        leaving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await leaving


@contextlib.asynccontextmanager
async def trap() -> AsyncIterator[tuple[str, int, list[str]]]:
    """An address of its own that nobody has a reason to call, and who called."""
    calls: list[str] = []

    async def called(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        calls.append(writer.get_extra_info("peername")[0])
        writer.close()

    address = pod_address()
    with socket.socket() as probe:
        probe.bind((address, 0))
        port = probe.getsockname()[1]
    server = await asyncio.start_server(called, address, port)
    try:
        yield address, port, calls
    finally:
        server.close()


async def test_a_deleted_half_leaves_the_router_before_it_stops_serving(pair):
    name = pair.decode.pod["metadata"]["name"]
    path = f"{pair.api.path('v1', 'Pod', pair.namespace)}/{name}"
    grace_s = int(pair.decode.grace_s)
    deleted = await asyncio.to_thread(pair.api.request, "DELETE", path, {"gracePeriodSeconds": grace_s})
    assert deleted["metadata"]["deletionTimestamp"]
    await asyncio.to_thread(until, lambda: not pair.router.probe("readiness"), pair.router)
    assert pair.decode.probe("readiness")
