"""extproc asked as Envoy asks it, by a stock gRPC client: what does it decide of a request with this secret?"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import grpc
import grpc.aio

from apis.wire import ext_proc_pb2 as pb

PROCESS = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
ADMITTED, UNKNOWN = 0, 401
_BETWEEN_S = 0.001
# grpcio's own pauses between tries would count as the product's.
_OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 50),
]


class Decisions:
    """`await decisions(secret)`: the HTTP status that extproc answers with at once; ADMITTED where it lets it in."""

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
            async with asyncio.timeout(5):
                await call.write(request)
                answer = await call.read()
        finally:
            call.cancel()
        kind = answer.WhichOneof("response")
        return answer.immediate_response.status.code if kind == "immediate_response" else ADMITTED

    async def until(self, secret: str, wanted: int, timeout_s: float = 30.0) -> float:
        """Ask again and again; seconds until the first answer that is `wanted`. Raises TimeoutError."""
        began_s = time.perf_counter()  # a loop's own clock stands still within a turn
        while await self(secret) != wanted:
            if time.perf_counter() - began_s > timeout_s:
                raise TimeoutError(f"after {timeout_s:.0f} s the decision is still not {wanted}")
            await asyncio.sleep(_BETWEEN_S)
        return time.perf_counter() - began_s


@contextlib.asynccontextmanager
async def asking(address: str, timeout_s: float = 60.0) -> AsyncIterator[Decisions]:
    """Of the extproc that listens there, or is about to."""
    async with grpc.aio.insecure_channel(address, options=_OPTIONS) as channel:
        async with asyncio.timeout(timeout_s):
            await channel.channel_ready()
        yield Decisions(channel)
