"""One engine that generates, and a gateway before it, for the whole folder; run by `make test-engines` alone."""

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest

from scripts import engines
from tests.engines_real.books import Books
from tests.engines_real.client import Client
from tests.engines_real.process import Vllm, generating, running_vllm
from tests.harness.gateway import Gateway, document, endpoint, policy, running_gateway, token

SERVED = ("tiny-chat", "tiny-alias", "tiny-salted")
LARGE = {"rpm": 10**6, "tpm": 10**9}
SALTED = {"defaultWeight": 1, "gatewayRef": {"name": "arks-eg"}, "cacheSaltPerTenant": True}
POLICY = policy(
    endpoint("tiny-chat"),
    endpoint("tiny-alias"),
    endpoint("tiny-salted", cacheSaltPerTenant=True),
    token("alice", "sk-alice", SERVED, rates=LARGE),
    document("ArksEndpoint", "tiny-salted", SALTED, namespace="beta"),
    document(
        "ArksToken",
        "bob",
        {"token": "sk-bob", "qos": [{"arksEndpoint": {"name": "tiny-salted"}, "rateLimits": []}]},
        namespace="beta",
    ),
)
TEST_TIMEOUT_S = 600
"""the first test of an engine waits for its start"""
SLOW_START = pytest.mark.timeout(1200)
"""for modules that start several engines at once"""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [item for item in items if item.path.is_relative_to(Path(__file__).parent)]
    others = [item for item in items if item not in ours]
    if os.environ.get("ARKS_ENGINES") != "1":
        items[:] = others
        config.hook.pytest_deselected(items=ours)
        return
    for item in ours:
        item.add_marker("engines")
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TEST_TIMEOUT_S))
    # What closes the books on the shared engine comes after all that use it, what kills it last of all.
    last = {"test_ledger_equals_counters.py": 1, "test_engine_core_killed.py": 2}
    ours.sort(key=lambda item: last.get(item.path.name, 0))
    items[:] = others + ours


@pytest.fixture(scope="session")
def made() -> None:
    engines.make()


@pytest.fixture(scope="session")
def engine(made, tmp_path_factory) -> Iterator[Vllm]:
    flags = generating("--enable-prompt-tokens-details", "--enable-log-requests")
    with running_vllm(tmp_path_factory.mktemp("engine"), "chat", SERVED, *flags) as one:
        yield one


@pytest.fixture(scope="session")
def gateway(engine, tmp_path_factory) -> Iterator[Gateway]:
    with running_gateway(tmp_path_factory.mktemp("gateway"), POLICY, [engine.url]) as one:
        yield one


@pytest.fixture(scope="session")
def whole(engine, gateway) -> Books:
    """Everything since the engine's start."""
    return Books(engine, gateway)


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as one:
        yield one


@pytest.fixture
def client(gateway, session) -> Client:
    return Client(session, gateway.url, "sk-alice")


@pytest.fixture
async def books(engine, gateway, whole, session) -> AsyncIterator[Books]:
    """This test's own."""
    one = await Books(engine, gateway).open(session)
    yield one
    whole.again += one.again
    whole.aside(one.direct.prompt, one.direct.generation)


@pytest.fixture
async def balanced(books, session) -> AsyncIterator[Books]:
    """This test's own, and they must balance to the token: no row may be estimated."""
    yield books
    page = await books.page(session)
    assert page.exact
    assert not page.estimated, page.estimated
    assert page.unexplained.prompt == page.unexplained.generation == 0, page
