"""Runs in SGLang's environment: what its own programs make of command lines, without starting them.

Reads a JSON list of command lines on standard input, from the module's name on. Writes the options that each program's
parser takes, and for each line either what the program made of it, or why it refused.
"""

import argparse
import contextlib
import io
import json
import sys
from typing import Any

from sglang.srt.server_args import prepare_server_args
from sglang_router.launch_router import parse_router_args

SERVER = ("model_path", "served_model_name", "trust_remote_code", "host", "port", "tp_size", "pp_size", "dp_size")
SERVER += ("dist_init_addr", "nnodes", "node_rank", "device", "disaggregation_mode", "disaggregation_bootstrap_port")
SERVER += (
    "enable_metrics",
    "enable_lora",
    "lora_paths",
    "mem_fraction_static",
    "context_length",
    "json_model_override_args",
)
ROUTER = ("pd_disaggregation", "policy", "prefill_policy", "decode_policy", "host", "port", "service_discovery")
ROUTER += ("service_discovery_port", "service_discovery_namespace", "prefill_selector", "decode_selector")
ROUTER += ("prometheus_host", "prometheus_port", "bootstrap_port_annotation", "selector", "cache_threshold")
OPTIONS: dict[str, set[str]] = {}
_parse = argparse.ArgumentParser.parse_known_args


def _noted(self: argparse.ArgumentParser, *args: Any, **named: Any) -> Any:
    OPTIONS[sys.argv[0]].update(self._option_string_actions)
    return _parse(self, *args, **named)


def _server(arguments: list[str]) -> dict[str, Any]:
    made = prepare_server_args(arguments)
    return {name: getattr(made, name) for name in SERVER}


def _router(arguments: list[str]) -> dict[str, Any]:
    made = parse_router_args(arguments)
    return {name: getattr(made, name) for name in ROUTER}


PROGRAMS = {"sglang.launch_server": _server, "sglang_router.launch_router": _router}


def judged(line: list[str]) -> dict[str, Any]:
    sys.argv = line
    OPTIONS.setdefault(line[0], set())
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return PROGRAMS[line[0]](line[1:])
    except SystemExit as error:
        return {"refused": error.code, "said": said.getvalue()[-500:]}
    except Exception as error:
        return {"refused": type(error).__name__, "said": str(error)}


if __name__ == "__main__":
    argparse.ArgumentParser.parse_known_args = _noted  # type: ignore[method-assign]
    # What a library prints is not the answer.
    with contextlib.redirect_stdout(sys.stderr):
        found = [judged(line) for line in json.load(sys.stdin)]
    json.dump({"options": {name: sorted(names) for name, names in OPTIONS.items()}, "lines": found}, sys.stdout)
