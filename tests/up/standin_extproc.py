"""Takes `arks extproc`'s flags and pins every request with a token to what x-test-pin says.

Faults by environment: STANDIN_FAULT=broken-policy refuses to start, =dies ends at a SIGUSR1, and at each later start
at once.
"""

import argparse
import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import grpc.aio

from apis.wire import ext_proc_pb2 as pb
from extproc.http.admin import AdminServer, Check
from extproc.observe.metrics import GatewayMetrics

SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"
PIN = "x-gateway-destination-endpoint"


def reply(request: pb.ProcessingRequest, seen: dict[str, str]) -> pb.ProcessingResponse:
    answer = pb.ProcessingResponse()
    kind = request.WhichOneof("request")
    if kind == "request_headers":
        seen.update({h.key: (h.raw_value.decode() or h.value) for h in request.request_headers.headers.headers})
        if "authorization" not in seen:
            refused = answer.immediate_response
            refused.status.code = 401
            refused.body = json.dumps({"error": {"code": "token_missing"}}).encode()
            refused.details = "token_missing"
            header = refused.headers.set_headers.add()
            header.header.key, header.header.raw_value = "content-type", b"application/json"
            return answer
        if not request.request_headers.end_of_stream:
            answer.request_headers.SetInParent()
            return answer
        common = answer.request_headers.response
    elif kind == "request_body":
        common = answer.request_body.response
    else:
        getattr(answer, kind).SetInParent()
        if kind == "response_headers":
            attributes = request.attributes["envoy.filters.http.ext_proc"].fields
            if "upstream.address" in attributes:
                address = attributes["upstream.address"].string_value
                add(answer.response_headers.response, "x-test-upstream-address", address)
        return answer
    if pin := seen.get("x-test-pin"):
        add(common, PIN, pin)
        answer.dynamic_metadata.update({"envoy.lb": {PIN: pin}})
    # What came in, for tests of what the edge removes; the engine records it.
    add(common, "x-test-saw", ",".join(sorted(seen)))
    answer.dynamic_metadata.update({"arks": {"token": "alice", "namespace": "default", "decision": "ok"}})
    return answer


def add(common: pb.CommonResponse, key: str, value: str) -> None:
    option = common.header_mutation.set_headers.add()
    option.header.key, option.header.raw_value = key, value.encode()
    option.append_action = 2  # OVERWRITE_IF_EXISTS_OR_ADD


async def process(stream, _context):
    seen: dict[str, str] = {}
    async for message in stream:
        yield reply(pb.ProcessingRequest.FromString(message), seen).SerializeToString()


async def main() -> int:
    parser = argparse.ArgumentParser()
    for flag in ("listen", "admin", "policy", "state", "transport", "on-journal-failure", "eds-file"):
        parser.add_argument(f"--{flag}")
    parser.add_argument("--drain-timeout-s", type=float)
    parser.add_argument("--log-level")
    parser.add_argument("--log-format")
    parser.add_argument("--engine", action="append")
    options = parser.parse_args()
    fault = os.environ.get("STANDIN_FAULT")
    if fault == "broken-policy":
        print(
            f"{options.policy}/tokens.yaml:7: spec.qos: bad, Authorization: Bearer sk-secret-of-alice", file=sys.stderr
        )
        return 1
    died = Path(options.state) / "died-once"
    if fault == "dies" and died.exists():
        return 3
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    if fault == "dies":

        def die() -> None:
            died.touch()
            os._exit(3)

        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, die)
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", 64 << 20)])
    handlers = {"Process": grpc.stream_stream_rpc_method_handler(process)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, handlers)])
    server.add_insecure_port(options.listen)
    await server.start()
    admin = AdminServer(GatewayMetrics(), {"policy": lambda: Check(ok=True)})
    host, _, port = options.admin.rpartition(":")
    await admin.start(host, int(port))
    await stop.wait()
    print("standin: settled", file=sys.stderr)
    await server.stop(options.drain_timeout_s)
    await admin.close()
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
