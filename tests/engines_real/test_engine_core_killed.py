"""vLLM's inner process dies, its API server lives a moment longer: an error event, then [DONE], under status 200.

Uses up the shared engine, and so comes last.
"""

import os
import signal
from pathlib import Path

from tests.engines_real.client import CHAT, Client, chat
from tests.engines_real.test_engine_lost import refused_within_s


def core_of(pid: int) -> int:
    """The process that holds the model: the API server's child with the most memory."""
    children = [
        int(one) for task in Path(f"/proc/{pid}/task").iterdir() for one in (task / "children").read_text().split()
    ]
    return max(children, key=lambda child: int(Path(f"/proc/{child}/statm").read_text().split()[1]))


async def test_done_after_an_error_is_no_success(engine, gateway, client: Client):
    async with client.stream(CHAT, chat(max_tokens=3000, ignore_eos=True, stream=True)) as (request_id, events):
        for _ in range(10):
            await anext(events)
        os.kill(core_of(engine.process.pid), signal.SIGKILL)
        data = [one async for one in events]
    row = await gateway.row_of(request_id)
    # The engine's own error event is what the client sees, and [DONE] after it.
    assert '"error"' in data[-2]
    assert data[-1] == "[DONE]"
    assert (row["status"], row["error"]) == (200, "engine_error")
    assert row["accuracy"] == "estimated"
    assert row["completion_tokens"] >= 8
    assert await refused_within_s(client, 10, dying=frozenset({500})) < 10
