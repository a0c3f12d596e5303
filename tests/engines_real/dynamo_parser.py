"""Runs in Dynamo's environment: what its own programs make of command lines, without starting them.

Reads a JSON list of command lines on standard input, from the module's name on. Writes the options that each program's
parsers take, and for each line either what the program made of it, or why it refused.
"""

import argparse
import contextlib
import io
import json
import sys
from typing import Any

import dynamo.frontend.main as frontend
from dynamo.vllm.args import parse_args

OPTIONS: dict[str, set[str]] = {}
_parse = argparse.ArgumentParser.parse_known_args


def _noted(self: argparse.ArgumentParser, *args: Any, **named: Any) -> Any:
    OPTIONS[sys.argv[0]].update(self._option_string_actions)
    return _parse(self, *args, **named)


def _worker() -> dict[str, Any]:
    config = parse_args()
    engine = config.engine_args
    transfer = engine.kv_transfer_config
    return {
        "model": config.model,
        "served": config.served_model_name,
        "namespace": config.namespace,
        "discovery": config.discovery_backend,
        "stage": config.disaggregation_mode.value,
        "headless": config.headless,
        "tensor": engine.tensor_parallel_size,
        "pipeline": engine.pipeline_parallel_size,
        "nodes": [engine.nnodes, engine.node_rank, engine.master_addr, engine.master_port],
        "max_model_len": engine.max_model_len,
        "lora": engine.enable_lora,
        "transfer": transfer and [transfer.kv_connector, transfer.kv_role],
    }


def _frontend() -> dict[str, Any]:
    config, _, _ = frontend.parse_args()
    names = ("http_host", "http_port", "router_mode", "migration_limit", "namespace", "discovery_backend")
    return {name: getattr(config, name) for name in names}


PROGRAMS = {"dynamo.vllm": _worker, "dynamo.frontend": _frontend}


def judged(line: list[str]) -> dict[str, Any]:
    sys.argv = line
    OPTIONS.setdefault(line[0], set())
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return PROGRAMS[line[0]]()
    except SystemExit as error:
        return {"refused": error.code, "said": said.getvalue()}
    except Exception as error:
        return {"refused": type(error).__name__, "said": str(error)}


if __name__ == "__main__":
    argparse.ArgumentParser.parse_known_args = _noted  # type: ignore[method-assign]
    # What a library prints is not the answer.
    with contextlib.redirect_stdout(sys.stderr):
        found = [judged(line) for line in json.load(sys.stdin)]
    json.dump({"options": {name: sorted(names) for name, names in OPTIONS.items()}, "lines": found}, sys.stdout)
