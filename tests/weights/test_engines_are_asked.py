"""The scraper before engines in processes of their own, and the loop that turns their answers into weights."""

import asyncio
import contextlib

import aiohttp
import pytest
from aiohttp import web

from controller.kube.resource import Key
from controller.reconcile.desired.endpoint import Backend
from controller.weights import following, scraper
from controller.weights.following import LoadFollower
from controller.weights.metrics import from_loads, from_page
from controller.weights.model import EngineLoad
from controller.weights.scraper import Scraper
from tests.harness.gateway import running_engine
from tests.weights.test_shares import busy, endpoint

KEY = Key("team-a", "qwen")


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


async def chat(session, url, tokens=4):
    body = {"model": "qwen-7b", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": tokens, "stream": True}
    async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
        return await answer.read()


@pytest.mark.parametrize("flavor", ["vllm", "sglang"])
async def test_a_busy_engine_is_seen_busy_in_its_own_words(flavor):
    clock = Clock()
    slow = ("--flavor", flavor, "--max-running", "2", "--itl-ms", "200", "--ttft-ms", "1")
    with running_engine(*slow) as engine:
        asking = Scraper(timeout_s=30.0, clock=clock)
        async with aiohttp.ClientSession() as session:
            found = await asking.sweep([engine.address])
            assert found[engine.address][:5] == (engine.address, True, True, 0, 0)
            chats = [asyncio.create_task(chat(session, engine.url, 500)) for _ in range(5)]
            async with asyncio.timeout(60):
                while found[engine.address].waiting != 3 or found[engine.address].kv_usage == 0:
                    clock.now_s += 2
                    found = await asking.sweep([engine.address])
                    await asyncio.sleep(0.02)
            assert found[engine.address].running == 2
            for each in chats:
                each.cancel()
            await asyncio.gather(*chats, return_exceptions=True)


async def test_the_time_to_first_token_is_that_of_the_last_seconds():
    clock = Clock()
    with running_engine("--ttft-ms", "120", "--itl-ms", "1", "--jitter", "0") as engine:
        asking = Scraper(timeout_s=30.0, clock=clock)
        async with aiohttp.ClientSession() as session:
            await chat(session, engine.url)
            found = await asking.sweep([engine.address])
            assert found[engine.address].ttft_s == 0, "one look tells no difference"
            await chat(session, engine.url)
            clock.now_s += 2
            found = await asking.sweep([engine.address])
            assert 0.1 < found[engine.address].ttft_s < 30.0
            clock.now_s += 60
            found = await asking.sweep([engine.address])
            assert found[engine.address].ttft_s == 0, "what was long ago says nothing"


async def test_an_engine_that_refuses_is_dead_after_three_looks_and_alive_after_one():
    clock = Clock()
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(running_engine())
        asking = Scraper(timeout_s=30.0, clock=clock)
        await asking.sweep([engine.address])
        engine.kill()
        seen = []
        for _ in range(3):
            clock.now_s += 2
            seen.append((await asking.sweep([engine.address]))[engine.address].healthy)
        assert seen == [True, True, False]
        stack.enter_context(running_engine("--flavor", "sglang", listen=engine.address))
        clock.now_s += 2
        found = await asking.sweep([engine.address])
        assert found[engine.address].healthy
        assert found[engine.address].known


@contextlib.asynccontextmanager
async def serving(handler):
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(
    "answer",
    [
        lambda: web.Response(status=404),
        lambda: web.Response(status=503),
        lambda: web.Response(text="smg_requests_total 3\n"),
        lambda: web.Response(status=302, headers={"location": "http://127.0.0.1:1/"}),
        lambda: web.Response(body=b'{"loads": "none"}'),
    ],
)
async def test_a_server_that_tells_no_load_is_alive_and_unknown(answer):
    async def handler(_request):
        return answer()

    asking = Scraper(timeout_s=30.0)
    async with serving(handler) as address:
        found = await asking.sweep([address])
        assert found[address] == EngineLoad(address, healthy=True, known=False)


async def test_an_endless_answer_is_cut_off(monkeypatch):
    monkeypatch.setattr(scraper, "MOST_BYTES", 1000)

    async def handler(request):
        response = web.StreamResponse()
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            while True:
                await response.write(b"x" * 1000)
        return response

    asking = Scraper(timeout_s=30.0)
    async with serving(handler) as address:
        async with asyncio.timeout(60):
            await asking.sweep([address])


async def test_no_more_looks_at_once_than_agreed_and_none_before_its_time():
    clock, most, now = Clock(), 0, 0

    async def handler(_request):
        nonlocal most, now
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.01)
        now -= 1
        return web.Response(text='vllm:num_requests_running{engine="0"} 1.0\n')

    asking = Scraper(timeout_s=30.0, clock=clock)
    async with serving(handler) as address:
        port = int(address.rpartition(":")[2])
        many = [f"127.0.0.{host}:{port}" for host in range(1, 2)] + [f"localhost:{port}"]
        await asking.sweep(many * 100)
        looked = asking.looks
        assert looked <= 4, "one address was asked twice"
        await asking.sweep(many)
        assert asking.looks == looked
        clock.now_s += 1.0
        await asking.sweep(many)
        assert asking.looks == looked + 2
        assert most <= scraper.CONCURRENCY


async def test_many_engines_take_turns_but_one_in_doubt_comes_first():
    clock = Clock()
    asked: list[int] = []

    async def handler(request):
        asked.append(request.transport.get_extra_info("sockname")[1])
        return web.Response(text="vllm:num_requests_running 1.0\n")

    app = web.Application()
    app.router.add_get("/metrics", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    rounds = 4
    try:
        for _ in range(rounds * scraper.LOOKS_PER_SWEEP):
            await web.TCPSite(runner, "127.0.0.1", 0).start()
        addresses = [f"127.0.0.1:{port}" for _, port in runner.addresses]
        asking = Scraper(timeout_s=30.0, clock=clock)

        async def sweep():
            clock.now_s += 0.5
            return await asking.sweep(addresses)

        for _ in range(rounds):
            await sweep()
        assert sorted(asked) == sorted(port for _, port in runner.addresses), "each had its turn, none had two"
        addresses.append("127.0.0.1:1")  # nobody listens there
        seen = [(await sweep())[addresses[-1]].healthy for _ in range(3)]
        assert seen == [True, True, False], "its three looks follow on each other"
    finally:
        await runner.cleanup()


def test_several_ranks_of_one_engine_add_up():
    page = b"\n".join(
        (
            b"# HELP vllm:num_requests_running x",
            b'vllm:num_requests_running{engine="0",model_name="m"} 3.0',
            b'vllm:num_requests_running{engine="1",model_name="m"} 4.0',
            b'vllm:num_requests_waiting{engine="0"} 2.0',
            b'vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 99.0',
            b'vllm:kv_cache_usage_perc{engine="0"} 0.25',
            b'vllm:kv_cache_usage_perc{engine="1"} 0.75',
            b'vllm:time_to_first_token_seconds_sum{engine="0"} 1.5',
            b'vllm:time_to_first_token_seconds_count{engine="0"} 3.0',
            b'vllm:time_to_first_token_seconds_bucket{le="0.1"} 3.0',
            b"vllm:num_requests_running{} NaN",
        )
    )
    assert from_page(page) == (7, 2, 0.75, 1.5, 3.0)
    dynamo = b"\n".join(
        (
            b"# TYPE dynamo_frontend_inflight_requests gauge",
            b'dynamo_frontend_inflight_requests{model="a"} 5',
            b'dynamo_frontend_inflight_requests{model="b"} 2',
            b'dynamo_frontend_queued_requests{model="a"} 3',
            b'dynamo_frontend_disconnected_clients{model="a"} 9',
            b'dynamo_frontend_time_to_first_token_seconds_sum{model="a"} 0.5',
            b'dynamo_frontend_time_to_first_token_seconds_count{model="a"} 2',
        )
    )
    assert from_page(dynamo) == (4, 3, 0.0, 0.5, 2.0), "those without a first token are in flight, too"
    assert from_loads(b'[{"num_running_reqs": 1, "num_waiting_reqs": 2, "token_usage": 0.5}]') == (1, 2, 0.5, 0.0, 0.0)
    assert from_loads(b'{"num_running_reqs": 1}') == (1, 0, 0.0, 0.0, 0.0)
    assert from_loads(b"[]") is None
    assert from_loads(b"<html>") is None
    assert from_page(b"up 1\n") is None


class Stage:
    """A follower whose engines' loads are set by hand, on a clock of its own."""

    def __init__(self, policy: str = "load") -> None:
        self.clock = Clock()
        self.endpoint = endpoint(policy)
        self.shares: list[Key] = []
        self.routes: list[Key] = []
        self.follower = LoadFollower(
            lambda _key: self.endpoint, lambda _endpoint, app: (f"{app}:80",), clock=self.clock
        )
        self.follower.subscribe(shares=self.shares.append, route=self.routes.append)
        self.backends = [Backend("a", 1), Backend("b", 1)]

    def load(self, **engines: EngineLoad) -> None:
        self.follower.scraper.loads = {f"{name}:80": load for name, load in engines.items()}

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.clock.now_s += 1
            self.follower.step()

    def weights(self, weigh) -> dict[str, int]:
        return {each.application: each.weight for each in weigh(self.endpoint, self.backends)}


def test_the_route_is_written_for_shifts_that_matter_and_not_often():
    stage = Stage()
    stage.load(a=busy(), b=busy())
    assert stage.weights(stage.follower.weigh_route) == {"a": 100, "b": 100}
    stage.steps(100)
    assert not stage.shares
    assert not stage.routes
    stage.load(a=busy(), b=busy(waiting=1))
    stage.steps(100)
    assert stage.shares
    fine = stage.weights(stage.follower.weigh)
    assert fine["b"] < 90
    stage.load(a=busy(), b=busy(waiting=40))
    stage.routes.clear()
    stage.steps(30)
    assert 1 <= len(stage.routes) <= 30 / following.ROUTE_S
    written = len(stage.routes)
    stage.steps(100)
    assert len(stage.routes) - written <= 1, "a load that stands still is written again and again"
    assert stage.weights(stage.follower.weigh_route)["b"] < 50


def test_a_dead_backend_leaves_the_route_and_a_gone_one_is_not_asked_for():
    stage = Stage()
    stage.load(a=busy(), b=busy())
    stage.weights(stage.follower.weigh_route)
    stage.load(a=busy(), b=busy(healthy=False))
    stage.steps(11)
    assert stage.weights(stage.follower.weigh_route) == {"a": 100, "b": 0}
    stage.backends = [Backend("a", 1), Backend("c", 1)]
    stage.load(a=busy(), c=busy())
    assert stage.weights(stage.follower.weigh_route) == {"a": 100, "c": 10}


def test_other_policies_are_left_alone():
    stage = Stage("capacity")
    assert stage.weights(stage.follower.weigh_route) == {"a": 1, "b": 1}
    stage.steps(3)
    assert not stage.follower._followed


def test_weights_at_rest_follow_what_else_they_are_made_of():
    stage = Stage()
    stage.load(a=busy(), b=busy())
    assert stage.weights(stage.follower.weigh) == {"a": 100, "b": 100}
    stage.steps(5)
    stage.endpoint = endpoint(routeConfigs=[{"name": "theirs", "port": 80, "weight": 3}])
    stage.steps(2)
    assert stage.weights(stage.follower.weigh) == {"a": 1, "b": 1}, "beside weights of users ours have their measure"
    stage.endpoint = endpoint()
    stage.backends = [Backend("a", 2), Backend("b", 1)]
    stage.weights(stage.follower.weigh)
    stage.steps(2)
    assert stage.weights(stage.follower.weigh) == {"a": 200, "b": 100}
    assert len(stage.shares) == 2


async def test_an_engine_under_load_loses_traffic_to_its_idle_twin():
    slow = ("--max-running", "1", "--itl-ms", "300")
    with running_engine(*slow) as loaded, running_engine(*slow) as idle:
        engines = {"a": (loaded.address,), "b": (idle.address,)}
        follower = LoadFollower({KEY: endpoint()}.get, lambda _endpoint, app: engines[app], sweep_s=0.1, step_s=0.1)
        seen = asyncio.Event()
        follower.subscribe(shares=lambda _key: seen.set())
        backends = [Backend("a", 1), Backend("b", 1)]
        follower.weigh(endpoint(), backends)
        async with aiohttp.ClientSession() as session:
            chats = [asyncio.create_task(chat(session, loaded.url, 50)) for _ in range(12)]
            running = asyncio.create_task(follower.run())
            async with asyncio.timeout(60):
                while True:
                    await seen.wait()
                    seen.clear()
                    weights = {each.application: each.weight for each in follower.weigh(endpoint(), backends)}
                    if weights["a"] < 60 and weights["b"] >= 95:
                        break
            for task in (*chats, running):
                task.cancel()
            await asyncio.gather(*chats, running, return_exceptions=True)
