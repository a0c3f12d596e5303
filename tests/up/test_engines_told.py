"""extproc and the file from which Envoy learns which engines there are."""

import asyncio
import gc
import json
import sys
from pathlib import Path

import pytest

from extproc import app
from extproc.settings import ExtprocSettings
from tests.harness.gateway import endpoint, policy, token, until


@pytest.fixture
def own_process():
    """What a process sets for itself alone is set back."""
    interval_s, threshold = sys.getswitchinterval(), gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*threshold)
    sys.setswitchinterval(interval_s)


@pytest.mark.usefixtures("own_process")
async def test_engines_that_envoy_cannot_be_told_now_are_told_as_soon_as_it_can_be(tmp_path: Path):
    """Full disks end. Until the next change of the policy other engines would have got their requests."""
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "all.yaml").write_text(policy(endpoint(), token("alice", "sk-alice")))
    folder = tmp_path / "envoy"
    settings = ExtprocSettings(
        listen=f"unix:{tmp_path / 'socket'}",
        policy_dir=tmp_path / "policy",
        state_dir=tmp_path / "state",
        admin="127.0.0.1:0",
        engines=("127.0.0.1:9",),
        eds_file=folder / "engines.json",
    )
    stopped = asyncio.Event()
    running = asyncio.create_task(app.Gateway(settings).run(stopped))
    await until((tmp_path / "socket").exists)
    assert not folder.exists()
    folder.mkdir()
    await until((folder / "engines.json").exists)
    stopped.set()
    assert await running == 0
    told = json.loads((folder / "engines.json").read_bytes())
    assert "127.0.0.1" in json.dumps(told)
