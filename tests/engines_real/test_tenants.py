"""What a tenant cannot do to the engine, by the engine's own word: its request log, its refusals, its prefix cache."""

import asyncio

import pytest

from tests.engines_real.client import CHAT, COMPLETIONS, MESSAGES, RESPONSES, Answer, Client, body_for, chat
from tests.engines_real.process import Vllm
from tests.harness.gateway import Gateway

FORGED = {"do_remote_prefill": True, "remote_engine_id": "other", "remote_block_ids": [1], "remote_host": "10.9.8.7"}
SECRET = "My account number is 0123456789 and nobody shall learn it. " * 6


@pytest.fixture
def direct(engine, session) -> Client:
    return Client(session, engine.url)


async def logged(engine: Vllm, answer: Answer) -> str:
    """The line in which the engine says what it was asked."""
    async with asyncio.timeout(10):
        while True:
            for line in engine.log.read_text(errors="replace").splitlines():
                if "Received request" in line and answer.json["id"] in line:
                    return line
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, MESSAGES, RESPONSES])
async def test_transfer_parameters_never_arrive(path, client: Client, direct, engine, balanced):
    """vLLM with a KV connector dials the host they name."""
    fields = {"kv_transfer_params": FORGED, "ec_transfer_params": {"remote_host": "10.9.8.7"}}
    fields |= {"vllm_xargs": {"steer": "10.9.8.7"}}
    body = body_for(path, "Hello", 2, **fields)
    through = await client.ok(path, body)
    assert "10.9.8.7" not in await logged(engine, through)
    # The proof's proof: without the gateway the same body puts them there, and the log shows it.
    answer = await direct.ok(path, body)
    assert "10.9.8.7" in await logged(engine, answer)
    usage = answer.json["usage"]
    balanced.aside(usage.get("prompt_tokens", usage.get("input_tokens")), 2)


async def test_engine_headers_never_arrive(client: Client, direct, balanced):
    """Asked directly, vLLM refuses a data-parallel rank that it does not have."""
    headers = {"X-data-parallel-rank": "7", "X-Vllm-Priority": "-5", "X-Session-ID": "other"}
    refused = await direct.ask(CHAT, chat(max_tokens=2), headers)
    assert refused.status >= 400, refused
    await client.ok(CHAT, chat(max_tokens=2), headers)


async def cached(gateway: Gateway, client: Client, model: str, text: str, **fields) -> int:
    answer = await client.ok(CHAT, {**chat(text, max_tokens=2, **fields), "model": model})
    return (await gateway.row_of(answer.request_id))["cached_tokens"]


async def test_a_salted_cache_is_one_tenants_own(client: Client, gateway, session, balanced):
    bob = Client(session, gateway.url, "sk-bob")
    assert await cached(gateway, client, "tiny-salted", SECRET) == 0
    mine = await cached(gateway, client, "tiny-salted", SECRET)
    assert mine > 100
    assert await cached(gateway, bob, "tiny-salted", SECRET) == 0
    assert await cached(gateway, bob, "tiny-salted", SECRET) == mine


async def test_a_forged_salt_opens_no_other_cache(client: Client, gateway, balanced):
    text = f"Without salt. {SECRET}"
    await cached(gateway, client, "tiny-chat", text)
    # Were the client's salt to arrive, nothing would be cached under it.
    assert await cached(gateway, client, "tiny-chat", text, cache_salt="mine") > 100


async def test_background_work_is_refused(client: Client, books, session):
    """A response in the background would be generated and never counted; vLLM's default refuses it."""
    answer = await client.ask(RESPONSES, body_for(RESPONSES, "Hello", 50, background=True))
    assert answer.status == 400
    page = await books.page(session)
    assert page.unexplained.prompt == page.unexplained.generation == 0
