"""Runs in the engines' environment: what vLLM's own command makes of command lines, without starting an engine.

Reads a JSON list of command lines on standard input. Writes the options that `vllm serve` takes, and for each line
either what its parser and its configuration made of it, or why it refused.
"""

import contextlib
import io
import json
import sys
from typing import Any

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.cli import main
from vllm.entrypoints.cli.serve import ServeSubcommand

FIELDS = ("port", "host", "served_model_name", "headless", "shutdown_timeout", "max_model_len", "master_addr")
SEEN: list[Any] = []
OPTIONS: set[str] = set()
_init = ServeSubcommand.subparser_init


def subparser_init(self: ServeSubcommand, subparsers: Any) -> Any:
    parser = _init(self, subparsers)
    OPTIONS.update(name for action in parser._actions for name in action.option_strings)
    return parser


def judged(line: list[str]) -> dict[str, Any]:
    SEEN.clear()
    sys.argv = line
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            main.main()
        (args,) = SEEN
        args.model = args.model_tag
        config = AsyncEngineArgs.from_cli_args(args).create_engine_config(headless=bool(args.headless))
    except SystemExit as error:
        return {"refused": error.code, "said": said.getvalue()}
    except Exception as error:
        return {"refused": type(error).__name__, "said": str(error)}
    parallel, transfer = config.parallel_config, config.kv_transfer_config
    return {
        **{name: getattr(args, name) for name in FIELDS},
        "model": config.model_config.model,
        "hf_overrides": args.hf_overrides,
        "generation": config.model_config.override_generation_config,
        "adapters": {each.name: each.path for each in args.lora_modules or ()},
        "nodes": parallel.nnodes,
        "rank": parallel.node_rank,
        "master": [parallel.master_addr, parallel.master_port],
        "world": parallel.world_size,
        "local_world": parallel.local_world_size,
        "transfer": transfer and [transfer.kv_connector, transfer.kv_role, transfer.kv_buffer_device],
    }


if __name__ == "__main__":
    ServeSubcommand.subparser_init = subparser_init
    ServeSubcommand.cmd = staticmethod(SEEN.append)
    # What a library prints is not the answer.
    with contextlib.redirect_stdout(sys.stderr):
        found = [judged(line) for line in json.load(sys.stdin)]
    json.dump({"options": sorted(OPTIONS), "lines": found}, sys.stdout)
