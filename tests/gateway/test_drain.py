"""SIGTERM: no new connections, open streams to their end, everything settled, exit status 0."""

import asyncio
import signal
import uuid

import aiohttp
import pytest

from tests.harness.client import CHAT, bearer, chat, events
from tests.harness.gateway import endpoint, policy, running_engine, running_gateway, token

POLICY = policy(endpoint(), token("alice", "sk-alice"))
ALICE = bearer("sk-alice")


@pytest.mark.parametrize("transport", ["h2", "grpc_aio"])
async def test_open_stream_is_finished_and_settled(session, tmp_path, transport):
    with (
        running_engine("--itl-ms", "10") as engine,
        running_gateway(tmp_path, POLICY, [engine], "--transport", transport) as gateway,
    ):
        headers = {**ALICE, "x-request-id": str(uuid.uuid4())}
        sent = chat(stream=True, max_tokens=200)
        async with session.post(gateway.url + CHAT, json=sent, headers=headers) as answer:
            body = await answer.content.readany()
            gateway.process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.5)
            assert gateway.process.poll() is None
            async with aiohttp.ClientSession() as late:
                with pytest.raises(aiohttp.ClientConnectorError):
                    await late.get(gateway.url + "/v1/models", headers=ALICE)
            body += await answer.read()
        assert events(body)[-1] == "[DONE]"
        assert await asyncio.to_thread(gateway.process.wait, 20) == 0
        [row] = gateway.usage()
        assert (row["request_id"], row["completion_tokens"]) == (headers["x-request-id"], 200)
        assert (row["status"], row["accuracy"], row["error"]) == (200, "exact", "")


async def test_second_signal_ends_at_once(session, tmp_path):
    with running_engine("--itl-ms", "50") as engine, running_gateway(tmp_path, POLICY, [engine]) as gateway:
        async with session.post(gateway.url + CHAT, json=chat(stream=True, max_tokens=2000), headers=ALICE) as answer:
            await answer.content.readany()
            gateway.process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.3)
            gateway.process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(gateway.process.wait, 5) == 130
            answer.close()
