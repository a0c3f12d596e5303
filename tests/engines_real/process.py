"""Real engines on the CPU, in the environment that `scripts/engines.py` makes: vLLM with its counters, and any other.

An engine gets a session of its own with the kernel's autogroup niced down: an engine's threads at full weight would
freeze the gateway and the clients beside it for seconds on a small machine.
"""

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from scripts import engines
from tests.harness.gateway import sum_series

START_TIMEOUT_S = 400.0
"""20 s on a quiet machine; the engine gives way to everything else"""
CONTEXT_TOKENS = 4096
BLOCK_TOKENS = 32
ENGINE_NICE = "10"

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # Compiling stalls the first request with logprobs for 16 s, in spite of --enforce-eager.
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "fork",
}


@dataclass(frozen=True, slots=True)
class Counts:
    """What the engine has read and written since its start."""

    prompt: int
    generation: int
    cached: int

    def __sub__(self, other: "Counts") -> "Counts":
        return Counts(self.prompt - other.prompt, self.generation - other.generation, self.cached - other.cached)


@dataclass
class Vllm:
    """A running engine. Its process and its children are one session."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def address(self) -> str:
        return self.url.removeprefix("http://")

    def signal(self, number: int) -> None:
        """To the API server, as a container's stop does."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """All its processes at once, as the kernel's OOM killer or a lost node does."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    async def metrics(self, session: aiohttp.ClientSession) -> str:
        async with session.get(f"{self.url}/metrics") as answer:
            return await answer.text()

    async def counts(self, session: aiohttp.ClientSession) -> Counts:
        text = await self.metrics(session)
        return Counts(
            int(sum_series(text, "vllm:prompt_tokens_total")),
            int(sum_series(text, "vllm:generation_tokens_total")),
            int(sum_series(text, "vllm:prompt_tokens_cached_total")),
        )

    async def busy(self, session: aiohttp.ClientSession) -> int:
        """Requests that it runs or has waiting."""
        text = await self.metrics(session)
        return int(sum_series(text, "vllm:num_requests_running") + sum_series(text, "vllm:num_requests_waiting"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running_vllm(folder: Path, model: str, served: tuple[str, ...], *flags: str, port: int = 0) -> Iterator[Vllm]:
    """`model` is one of `scripts/tiny_models.py`'s; served under these names. Port 0: a free one."""
    port = port or free_port()
    command = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(engines.models() / model)]
    command += ["--served-model-name", *served, "--host", "127.0.0.1", "--port", str(port), "--enforce-eager", *flags]
    with running_program(folder, command, port) as one:
        yield one


@contextlib.contextmanager
def running_program(folder: Path, arguments: list[str], port: int) -> Iterator[Vllm]:
    """The environment's Python with these arguments, once `/health` answers; its log is in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "engine.log"
    command = [str(engines.environment() / "bin" / "python"), *arguments]
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, stdout=sink, stderr=subprocess.STDOUT, env={**os.environ, **_ENVIRONMENT}, start_new_session=True
        )
    engine = Vllm(f"http://127.0.0.1:{port}", process, log)
    try:
        with contextlib.suppress(OSError):  # a kernel without autogroups
            Path(f"/proc/{process.pid}/autogroup").write_text(ENGINE_NICE)
        _wait(engine)
        yield engine
    finally:
        engine.kill()


def _wait(engine: Vllm) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if engine.process.poll() is not None:
            break
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{engine.url}/health", timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.3)
    raise AssertionError(f"the engine did not start; its log ends:\n{engine.log.read_text(errors='replace')[-4000:]}")


def generating(*more: str) -> tuple[str, ...]:
    """Flags of an engine that generates, with a cache that is quickly full."""
    return (
        *("--max-model-len", str(CONTEXT_TOKENS), "--block-size", str(BLOCK_TOKENS)),
        *("--num-gpu-blocks-override", "512", *more),
    )
