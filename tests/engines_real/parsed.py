"""What the engines' own parsers make of generated command lines; see `dynamo_parser` and `sglang_parser`."""

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controller.engines.model import Launch
from scripts import engines
from tests.engines_real.launched import expand

HERE = Path(__file__).parent
TIMEOUT_S = 300
GROUP = {"LWS_WORKER_INDEX": "1", "LWS_LEADER_ADDRESS": "chat-0.chat"}
"""what LWS gives to the second pod of a group of two"""


@dataclass(frozen=True)
class Parsed:
    """`options`: long names that a program takes, by its module; `lines`: what became of each command line."""

    options: Mapping[str, frozenset[str]]
    lines: Mapping[str, Mapping[str, Any]]


def parsed(which: engines.Environment, script: str, launches: Mapping[str, Launch], env: Mapping[str, str]) -> Parsed:
    """All command lines by name, read in one process of that environment, with these variables in its own."""
    engines.make_environment(which)
    lines = [_line(each) for each in launches.values()]
    python = engines.environment(which) / "bin" / "python"
    quiet = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python, HERE / script],
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        env={**quiet, **env},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout)
    options = {program: frozenset(map(_bare, names)) - {"help", "version", ""} for program, names in _all(answer)}
    return Parsed(options, dict(zip(launches, answer["lines"], strict=True)))


def _line(launch: Launch) -> list[str]:
    """From the module's name on, as the second pod of a group sees it."""
    python, option, *line = launch.command
    assert (python, option) == ("python3", "-m")
    return [expand(part, GROUP) for part in line]


def _all(answer: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    return list(answer["options"].items())


def _bare(option: str) -> str:
    return option[2:].replace("_", "-") if option.startswith("--") else ""


def accepted(expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Each of these values is what the program understood."""
    assert "refused" not in found, found
    assert {name: found[name] for name in expected} == dict(expected)
