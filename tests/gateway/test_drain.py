"""SIGTERM: no new connections, open streams to their end, everything settled, exit status 0."""

import asyncio
import signal
import uuid

import aiohttp
import pytest

from tests.harness.client import CHAT, bearer, chat, events
from tests.harness.gateway import endpoint, policy, running_engine, running_gateway, token, until

POLICY = policy(endpoint(), token("alice", "sk-alice"))
ALICE = bearer("sk-alice")


@pytest.mark.parametrize("transport", ["h2", "grpc_aio"])
async def test_open_stream_is_finished_and_settled(session, tmp_path, transport):
    with (
        running_engine("--itl-ms", "2") as engine,
        running_gateway(tmp_path, POLICY, [engine], "--transport", transport) as gateway,
    ):
        headers = {**ALICE, "x-request-id": str(uuid.uuid4())}
        sent = chat(stream=True, max_tokens=200)
        async with session.post(gateway.url + CHAT, json=sent, headers=headers) as answer:
            body = await answer.content.readany()
            engine.signal(signal.SIGSTOP)  # the stream is open until we have seen what we came for
            gateway.process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(20):  # less than a drain may take
                while await accepts(gateway):  # noqa: ASYNC110 - another process
                    await asyncio.sleep(0.02)
            assert gateway.process.poll() is None
            engine.signal(signal.SIGCONT)
            body += await answer.read()
        assert events(body)[-1] == "[DONE]"
        assert await asyncio.to_thread(gateway.process.wait, 60) == 0
        [row] = [row for row in gateway.usage() if row["request_id"] == headers["x-request-id"]]
        assert row["completion_tokens"] == 200
        assert (row["status"], row["accuracy"], row["error"]) == (200, "exact", "")


async def accepts(gateway) -> bool:
    """Whether a new connection is taken."""
    try:
        async with aiohttp.ClientSession() as late, late.get(gateway.url + "/v1/models", headers=ALICE):
            return True
    except aiohttp.ClientConnectorError:
        return False


async def test_second_signal_ends_at_once(session, tmp_path):
    with running_engine("--itl-ms", "50") as engine, running_gateway(tmp_path, POLICY, [engine]) as gateway:
        async with session.post(gateway.url + CHAT, json=chat(stream=True, max_tokens=2000), headers=ALICE) as answer:
            await answer.content.readany()
            gateway.process.send_signal(signal.SIGTERM)
            await until(lambda: '"stopping"' in gateway.log())
            gateway.process.send_signal(signal.SIGTERM)
            # The drain alone would take 30 s, and end with 0.
            assert await asyncio.to_thread(gateway.process.wait, 60) == 130
            answer.close()
