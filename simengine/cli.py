"""The command line: flags to settings, one ready line, drain on SIGTERM and SIGINT."""

import argparse
import asyncio
import gc
import json
import logging
import signal
import sys
from collections.abc import Sequence
from typing import Any

import uvloop

from simengine.faults import NO_FAULTS, parse_faults
from simengine.server import Server
from simengine.settings import Settings

_D = Settings()


def main(argv: Sequence[str] | None = None) -> int:
    """Run until told to stop. Exit status 0: everything in progress was finished."""
    parser = _parser()
    options = parser.parse_args(argv)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s simengine: %(message)s")
    try:
        settings = _settings(options)
    except ValueError as error:
        parser.error(str(error))
    # The process keeps few objects; collections would only add to its latencies.
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    return uvloop.run(_serve(settings, options.listen))


async def _serve(settings: Settings, listen: str) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    server = Server(settings)
    try:
        url = await server.start(listen)
    except (OSError, ValueError) as error:
        logging.getLogger(__name__).error("cannot listen on %s: %s", listen, error)
        return 1
    print(json.dumps({"event": "ready", "url": url}), flush=True)
    await stop.wait()
    return 0 if await server.drain() else 1


def _settings(options: argparse.Namespace) -> Settings:
    values: dict[str, Any] = {name: value for name, value in vars(options).items() if name not in {"listen", "fault"}}
    values["models"] = tuple(options.models or _D.models)
    values["faults"] = parse_faults(",".join(options.fault)) if options.fault else NO_FAULTS
    if options.max_running < 1 or options.kv_blocks < 1 or options.block_size_tokens < 1:
        raise ValueError("--max-running, --kv-blocks and --block-size must be at least 1")
    return Settings(**values)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m simengine", description="A simulated vLLM or SGLang engine.")
    add = parser.add_argument
    add("--listen", default="127.0.0.1:8000", help="HOST:PORT or unix:PATH; port 0 takes a free one")
    add("--model", dest="models", action="append", metavar="NAME", help="served name; repeat for aliases")
    add("--flavor", choices=("vllm", "sglang"), default=_D.flavor)
    add("--seed", type=int, default=_D.seed)
    add("--awkward-text", action="store_true", help="tokens that look like usage, [DONE] and event borders")

    time = parser.add_argument_group("latency")
    time.add_argument("--ttft-ms", type=float, default=_D.ttft_ms, help="time to first token")
    time.add_argument("--prefill-ms-per-1k-tokens", type=float, default=_D.prefill_ms_per_1k_tokens)
    time.add_argument("--itl-ms", type=float, default=_D.itl_ms, help="inter-token latency")
    time.add_argument("--itl-ms-per-running", type=float, default=_D.itl_ms_per_running, help="added per other request")
    time.add_argument("--jitter", type=float, default=_D.jitter, help="0.2: each request's latencies ±20 %%")
    time.add_argument("--tokens-per-step", type=int, default=_D.tokens_per_step, help="tokens that leave in one write")

    size = parser.add_argument_group("capacity")
    size.add_argument("--max-running", type=int, default=_D.max_running, help="requests generating at once")
    size.add_argument(
        "--max-num-queued-reqs",
        dest="max_queued_requests",
        type=int,
        default=_D.max_queued_requests,
        help="running and waiting together; one more gets 503; 0: no bound",
    )
    size.add_argument("--kv-blocks", type=int, default=_D.kv_blocks)
    size.add_argument("--block-size", dest="block_size_tokens", type=int, default=_D.block_size_tokens)
    size.add_argument("--prefix-cache", action="store_true")
    size.add_argument("--max-model-len", type=int, default=_D.max_model_len)
    size.add_argument("--default-output-tokens", type=int, default=_D.default_output_tokens)

    face = parser.add_argument_group("HTTP")
    face.add_argument("--usage", choices=("own", "finish", "continuous", "never"), default=_D.usage)
    face.add_argument("--prompt-tokens-details", action="store_true", help="report cached tokens")
    face.add_argument("--api-key", default=_D.api_key)
    face.add_argument("--keep-alive-timeout-s", type=float, default=_D.keep_alive_timeout_s)
    face.add_argument("--max-body-bytes", type=int, default=_D.max_body_bytes)
    face.add_argument("--shutdown-timeout-s", type=float, default=_D.shutdown_timeout_s)

    test = parser.add_argument_group("testing")
    test.add_argument("--fault", action="append", metavar="NAME[=VALUE]", help="see simengine/faults.py; may repeat")
    test.add_argument("--allow-fault-headers", action="store_true", help="heed x-sim-fault on requests")
    test.add_argument(
        "--record", type=int, default=_D.record, metavar="N", help="keep N requests for GET /sim/requests"
    )
    return parser
