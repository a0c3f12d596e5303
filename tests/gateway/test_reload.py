"""Policy that changes under load: it comes into force, no stream is dropped, and a broken one changes nothing.

How soon is shown where the machine's speed plays no part: `tests/snapshot/test_following_a_folder`.
"""

import asyncio
import json
import subprocess
import sys
import uuid

import pytest

from tests.harness.client import CHAT, bearer, chat, events
from tests.harness.gateway import (
    backend,
    document,
    endpoint,
    policy,
    quota,
    route,
    running_engine,
    running_gateway,
    sum_series,
    token,
    until,
)

STREAM = chat(stream=True, max_tokens=250)
ALL = ("qwen-7b", "going", "fresh")


@pytest.fixture(scope="module")
def engine():
    with running_engine("--itl-ms", "10", "--model", "going", "--model", "fresh") as one:
        yield one


@pytest.fixture(scope="module")
def other():
    """An engine that no policy names at first."""
    with running_engine("--itl-ms", "10", "--model", "going", "--model", "fresh") as one:
        yield one


def before(other) -> str:
    return policy(
        endpoint(),
        endpoint("going", routeConfigs=[route("other", 1)]),
        backend("other", other.address),
        token("stays", "sk-stays", ALL, rates={"rpd": 100_000}),
        token("revoked", "sk-revoked"),
        token("changed", "sk-changed", rates={"rpd": 100_000}),
    )


def after(fresh: str) -> str:
    return policy(
        endpoint(),
        endpoint("fresh", routeConfigs=[route("fresh", 1)]),
        backend("fresh", fresh),
        token("stays", "sk-stays", ALL, rates={"rpd": 100_000}),
        token("changed", "sk-changed", rates={"rpd": 77_777}),
    )


@pytest.fixture(scope="module")
def gateway(engine, other, tmp_path_factory):
    with running_gateway(tmp_path_factory.mktemp("reload"), before(other), [engine]) as one:
        yield one


async def ask(gateway, session, secret, **fields):
    """(status, code, headers) of one short request."""
    async with session.post(gateway.url + CHAT, json=chat(max_tokens=1, **fields), headers=bearer(secret)) as answer:
        told = json.loads(await answer.read())
    return answer.status, told["error"]["code"] if answer.status != 200 else "", answer.headers


async def becomes(holds) -> None:
    """Poll until `holds()` is true. Raises TimeoutError."""
    async with asyncio.timeout(60):
        while not await holds():  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.01)


async def stream(gateway, session, secret, model, begun) -> tuple[str, bytes]:
    headers = {**bearer(secret), "x-request-id": str(uuid.uuid4())}
    async with session.post(gateway.url + CHAT, json={**STREAM, "model": model}, headers=headers) as answer:
        assert answer.status == 200
        await begun.wait()
        return headers["x-request-id"], await answer.read()


async def test_changes_come_into_force_and_drop_no_stream(gateway, engine, other, session):
    begun = asyncio.Barrier(16)
    streams = [
        asyncio.create_task(stream(gateway, session, secret, model, begun))
        for secret, model in [("sk-stays", "qwen-7b"), ("sk-revoked", "qwen-7b"), ("sk-stays", "going")] * 5
    ]
    refused: list[int] = []
    over = asyncio.Event()

    async def load() -> None:
        while not over.is_set():
            status, _, _ = await ask(gateway, session, "sk-stays")
            if status != 200:
                refused.append(status)

    loads = [asyncio.create_task(load()) for _ in range(4)]
    await begun.wait()
    with running_engine("--model", "fresh") as fresh:
        assert (await ask(gateway, session, "sk-stays", model="fresh"))[:2] == (404, "model_not_found")
        assert (await ask(gateway, session, "sk-revoked"))[0] == 200
        gateway.write_policy(after(fresh.address))

        async def revoked() -> bool:
            return (await ask(gateway, session, "sk-revoked"))[1] == "invalid_token"

        async def changed() -> bool:
            return (await ask(gateway, session, "sk-changed"))[2].get("x-ratelimit-limit-requests") == "77777"

        async def added() -> bool:
            # A new address: Envoy has to learn it before it can be reached.
            return (await ask(gateway, session, "sk-stays", model="fresh"))[0] == 200

        async def removed() -> bool:
            return (await ask(gateway, session, "sk-stays", model="going"))[1] == "model_not_found"

        await asyncio.gather(*(becomes(each) for each in (revoked, changed, added, removed)))
        status, _, headers = await ask(gateway, session, "sk-stays", model="fresh")
        assert status == 200
        assert (await gateway.row_of(headers["x-request-id"]))["engine"] == fresh.address
        ended = await asyncio.gather(*streams)
        over.set()
        await asyncio.gather(*loads)
    assert refused == []
    for request_id, body in ended:
        assert events(body)[-1] == "[DONE]"
        row = await gateway.row_of(request_id)
        assert (row["completion_tokens"], row["accuracy"]) == (250, "exact")
    gateway.write_policy(before(other))
    await becomes(lambda: works_again(gateway, session))


async def works_again(gateway, session) -> bool:
    return (await ask(gateway, session, "sk-revoked"))[0] == 200


BROKEN = {
    "no YAML": ("spec: [\n", 2),
    "unknown kind of limit": (token("x", "sk-x", rates={"rpx": 5}), None),
    "negative": (quota("q", total=-1), None),
    "half a document": (document("ArksToken", "x", {}), None),
}


@pytest.mark.parametrize("fault", BROKEN)
async def test_broken_file_changes_nothing_is_told_and_heals(gateway, session, fault):
    text, line = BROKEN[fault]
    gateway.write_policy(text, "broken.yaml")
    try:

        async def told() -> bool:
            return (await gateway.ready(session))["checks"]["policy"]["current"] is False

        await becomes(told)
        ready = await gateway.ready(session)
        assert ready["status"] == 200  # what was in force still is
        [error] = ready["checks"]["policy"]["errors"][:1]
        assert error.startswith("broken.yaml:" + (str(line) if line else ""))
        assert "sk-x" not in json.dumps(ready)
        assert sum_series(await gateway.metrics(session), "arks_policy_broken") == 1
        await until(lambda: "broken.yaml" in gateway.log())
        for secret in ("sk-stays", "sk-revoked", "sk-changed"):
            assert (await ask(gateway, session, secret))[0] == 200
    finally:
        (gateway.policy / "broken.yaml").unlink()

    async def healed() -> bool:
        return bool((await gateway.ready(session))["checks"]["policy"]["current"])

    await becomes(healed)
    assert sum_series(await gateway.metrics(session), "arks_policy_broken") == 0


async def test_many_changes_in_a_row_end_at_the_last_one(gateway, other, session):
    for number in range(30):
        text = before(other) + "---\n" + token("counted", "sk-counted", rates={"rpd": 1000 + number})
        gateway.write_policy(text)
        await asyncio.sleep(0.005)

    async def last() -> bool:
        return (await ask(gateway, session, "sk-counted"))[2].get("x-ratelimit-limit-requests") == "1029"

    await becomes(last)


def test_broken_policy_at_the_first_start_is_refused_with_file_line_and_field(tmp_path):
    (tmp_path / "policy").mkdir()
    text = endpoint() + "---\n" + token("x", "sk-very-secret", rates={"rpm": -3})
    (tmp_path / "policy" / "tokens.yaml").write_text(text)
    line = next(number for number, each in enumerate(text.splitlines(), 1) if "-3" in each)
    command = [sys.executable, "-m", "arks", "up", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"]
    command += [
        "--policy",
        str(tmp_path / "policy"),
        "--state",
        str(tmp_path / "state"),
        "--engine",
        "http://127.0.0.1:9",
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode not in (0, -9)
    assert ended.stdout == ""
    assert f"tokens.yaml:{line}" in ended.stderr
    assert "rateLimits" in ended.stderr
    assert "value" in ended.stderr
    assert "sk-very-secret" not in ended.stderr
