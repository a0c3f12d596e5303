"""A real `arks extproc` on a policy stream, asked as Envoy asks it, by a stock gRPC client."""

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import grpc
import grpc.aio

from apis.wire import ext_proc_pb2 as pb
from tests.harness.gateway import environment, sum_series

PROCESS = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
ADMITTED = 0


class Decisions:
    """`await decisions(secret)`: the status that extproc answers with at once; ADMITTED where it lets it in."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._call = channel.stream_stream(
            PROCESS,
            request_serializer=pb.ProcessingRequest.SerializeToString,
            response_deserializer=pb.ProcessingResponse.FromString,
        )

    async def __call__(self, secret: str) -> int:
        request = pb.ProcessingRequest()
        for name, value in (
            (":method", "POST"),
            (":path", "/v1/chat/completions"),
            ("authorization", f"Bearer {secret}"),
            ("content-type", "application/json"),
        ):
            request.request_headers.headers.headers.add(key=name, raw_value=value.encode())
        call = self._call()
        try:
            async with asyncio.timeout(30):
                await call.write(request)
                answer = await call.read()
        finally:
            call.cancel()
        kind = answer.WhichOneof("response")
        return answer.immediate_response.status.code if kind == "immediate_response" else ADMITTED

    async def whole(self, secret: str, model: str, prompt_tokens: int, completion_tokens: int) -> int:
        """One request to its end, with an engine's plain answer; the status, as `__call__`."""
        asked, body, answered, answer = (pb.ProcessingRequest() for _ in range(4))
        for name, value in (
            (":method", "POST"),
            (":path", "/v1/chat/completions"),
            ("authorization", f"Bearer {secret}"),
            ("content-type", "application/json"),
        ):
            asked.request_headers.headers.headers.add(key=name, raw_value=value.encode())
        messages = [{"role": "user", "content": "Hello there!"}]
        body.request_body.body = json.dumps({"model": model, "max_tokens": 64, "messages": messages}).encode()
        body.request_body.end_of_stream = True
        for name, value in ((":status", "200"), ("content-type", "application/json")):
            answered.response_headers.headers.headers.add(key=name, raw_value=value.encode())
        attributes = answered.attributes["envoy.filters.http.ext_proc"].fields
        attributes["response.code_details"].string_value = "via_upstream"
        total = prompt_tokens + completion_tokens
        used = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}
        choices = [{"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}]
        answer.response_body.body = json.dumps({"model": model, "choices": choices, "usage": used}).encode()
        answer.response_body.end_of_stream = True
        call = self._call()
        try:
            async with asyncio.timeout(30):
                for message in (asked, body, answered, answer):
                    await call.write(message)
                    told = await call.read()
                    if told.WhichOneof("response") == "immediate_response":
                        return told.immediate_response.status.code
                await call.done_writing()
                await call.read()
        finally:
            call.cancel()
        return ADMITTED

    async def until(self, secret: str, wanted: int, timeout_s: float = 60.0) -> float:
        """Ask until it is so; the seconds that took."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        while await self(secret) != wanted:
            if loop.time() - began > timeout_s:
                raise AssertionError(f"after {timeout_s} s it is still not {wanted}")
            await asyncio.sleep(0.002)
        return loop.time() - began


class ExtprocProcess:
    def __init__(self, process: subprocess.Popen[bytes], folder: Path) -> None:
        self.process, self.folder = process, folder

    @property
    def admin(self) -> str:
        for line in (self.folder / "extproc.log").read_text().splitlines()[::-1]:
            if '"admin"' in line:
                return f"http://{json.loads(line)['admin']}"
        raise AssertionError("it does not serve")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    async def metric(self, name: str) -> float:
        async with aiohttp.ClientSession() as session, session.get(f"{self.admin}/metrics") as answer:
            return sum_series(await answer.text(), name)

    async def readiness(self) -> dict:
        async with aiohttp.ClientSession() as session, session.get(f"{self.admin}/readyz") as answer:
            return {"status": answer.status, **(await answer.json())["checks"]["policy"]}


@contextlib.contextmanager
def extproc(folder: Path, stream: str) -> Iterator[ExtprocProcess]:
    """Its state and socket are in the folder, so that a second one is a restart of the first."""
    command = [sys.executable, "-m", "arks", "extproc", "--policy-stream", stream, "--state", str(folder / "state")]
    command += ["--listen", f"unix:{folder / 'extproc.sock'}", "--admin", "127.0.0.1:0", "--log-format", "json"]
    with (folder / "extproc.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment())
    try:
        yield ExtprocProcess(process, folder)
    finally:
        process.kill()
        process.wait()


@contextlib.asynccontextmanager
async def asking(folder: Path) -> AsyncIterator[Decisions]:
    """Decisions of the extproc of this folder, once it listens."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.initial_reconnect_backoff_ms", 50)]
    options += [("grpc.max_reconnect_backoff_ms", 100), ("grpc.min_reconnect_backoff_ms", 50)]
    async with grpc.aio.insecure_channel(f"unix:{folder / 'extproc.sock'}", options=options) as channel:
        async with asyncio.timeout(60):
            await channel.channel_ready()
        yield Decisions(channel)
