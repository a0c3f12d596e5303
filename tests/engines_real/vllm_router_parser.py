"""Runs in the engines' environment: what vLLM's router makes of a command line, without starting it.

Reads its arguments as a JSON list on standard input, writes the options that it takes and what these were parsed to.
"""

import argparse
import dataclasses
import json
import sys

from vllm_router.launch_router import parse_router_args
from vllm_router.router_args import RouterArgs

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    RouterArgs.add_cli_args(parser)
    options = sorted(name for action in parser._actions for name in action.option_strings)
    args = parse_router_args(json.load(sys.stdin))
    json.dump({"options": options, "args": dataclasses.asdict(args)}, sys.stdout)
