"""Everything at once: what the ledger sums up to is what the engines counted, to the token."""

import asyncio
import random

import aiohttp
import pytest

from tests.harness.client import CHAT, bearer, chat
from tests.harness.gateway import endpoint, policy, quota, running_engine, running_gateway, sum_series, token

LIMIT = 10**9
POLICY = policy(
    endpoint(),
    quota("prompts", prompt=LIMIT),
    quota("answers", response=LIMIT),
    token("alice", "sk-alice", rates={"rpd": LIMIT, "tpd": LIMIT}, quota="prompts"),
    token("bob", "sk-bob", rates={"rpm": LIMIT, "tpm": LIMIT}, quota="answers"),
)
ENGINES = ("--itl-ms", "1", "--jitter", "0.5", "--allow-fault-headers", "--awkward-text")
REQUESTS = 400


@pytest.fixture(params=["h2", "grpc_aio"])
def parts(request, tmp_path):
    with (
        running_engine(*ENGINES, "--seed", "1") as one,
        running_engine(*ENGINES, "--seed", "2", "--flavor", "vllm") as two,
        running_gateway(tmp_path, POLICY, [one, two], "--transport", request.param) as gateway,
    ):
        yield gateway, (one, two)


def request_of(dice: random.Random):
    """(path, body, fault) of any API, plain or streamed, in one of many shapes."""
    words = " ".join(
        dice.choice(("usage", "data:", "\n\n", "héé", "日本", "[DONE]", "x")) for _ in range(dice.randrange(60))
    )
    most, stream = dice.randrange(1, 40), dice.random() < 0.6
    path = dice.choice((CHAT, CHAT, "/v1/completions", "/v1/responses", "/v1/messages", "/v1/embeddings"))
    body = {"model": "qwen-7b"}
    if path in (CHAT, "/v1/messages"):
        body = chat(messages=[{"role": "user", "content": words or "x"}], max_tokens=most)
    elif path == "/v1/completions":
        body |= {"prompt": words or "x", "max_tokens": most}
    elif path == "/v1/responses":
        body |= {"input": words or "x", "max_output_tokens": most}
    else:
        body |= {"input": [words or "x", "y"]}
        stream = False
    if stream:
        body["stream"] = True
        if path in (CHAT, "/v1/completions") and dice.random() < 0.3:
            body["stream_options"] = {"include_usage": True}
    cut = f"cut_every_bytes={dice.randrange(20, 300)}"
    return path, body, dice.choice(("", "", cut, "crlf", "comments", f"comments,{cut}", "gzip"))


async def test_ledger_and_counters_equal_the_engines_own(parts, session):
    gateway, engines = parts
    dice = random.Random(11)
    room = asyncio.Semaphore(24)

    async def one(secret: str, path: str, body: dict[str, object], fault: str) -> None:
        headers = {**bearer(secret), **({"x-sim-fault": fault} if fault else {})}
        async with room, session.post(gateway.url + path, json=body, headers=headers) as answer:
            assert answer.status == 200, await answer.read()
            await answer.read()

    await asyncio.gather(*(one(dice.choice(("sk-alice", "sk-bob")), *request_of(dice)) for _ in range(REQUESTS)))
    rows = await gateway.rows(REQUESTS)
    assert len(rows) == REQUESTS
    assert {row["accuracy"] for row in rows} == {"exact"}
    prompt = sum(row["prompt_tokens"] for row in rows)
    completion = sum(row["completion_tokens"] for row in rows)
    assert prompt == sum([await engine.counter(session, "vllm:prompt_tokens_total") for engine in engines])
    assert completion == sum([await engine.counter(session, "vllm:generation_tokens_total") for engine in engines])

    # Counted by the journal's thread, a moment after the rows can be read.
    metrics = await gateway.until_metric(session, "arks_ledger_rows_total", lambda count: count >= REQUESTS)
    assert (
        sum_series(metrics, "gateway_token_usage_total") + sum_series(metrics, "gateway_token_usage")
        == prompt + completion
    )
    assert sum_series(metrics, "gateway_requests_total") == REQUESTS
    assert sum_series(metrics, "arks_ledger_rows_total") == REQUESTS
    spent = {
        name: sum(row[column] for row in rows if row["token"] == user)
        for name, user, column in (("prompts", "alice", "prompt_tokens"), ("answers", "bob", "completion_tokens"))
    }
    for name, tokens in spent.items():
        [line] = [
            each
            for each in metrics.splitlines()
            if each.startswith("gateway_quota_usage{") and f'quota_name="{name}"' in each
        ]
        assert float(line.rpartition(" ")[2]) == tokens
    _, _, headers = await _ask(gateway, session)
    alices = sum(row["prompt_tokens"] + row["completion_tokens"] for row in rows if row["token"] == "alice")
    assert LIMIT - alices > int(headers["x-ratelimit-remaining-tokens"]) >= LIMIT - alices - 10_000
    assert sum_series(metrics, "arks_open_leases") == 0


async def _ask(gateway, session: aiohttp.ClientSession):
    async with session.post(gateway.url + CHAT, json=chat(max_tokens=1), headers=bearer("sk-alice")) as answer:
        return answer.status, await answer.read(), answer.headers
