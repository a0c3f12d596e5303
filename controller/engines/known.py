"""Options that an engine version is known to take, so that a misspelt one is a condition and no crash loop.

``known_options.json`` holds long option names drawn from the argument definitions of the released packages
(vLLM 0.32.0, SGLang 0.5.23, sglang-router 0.3.2, Dynamo 1.6.1 with its vLLM 0.31.0 and SGLang 0.5.21). A version
that is not in the table is not judged at all: silence is better than refusing what would work.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from importlib import resources

from controller.engines.arguments import is_flag
from controller.engines.model import Problem
from controller.engines.version import Version

# What an image without a readable tag is taken for.
CURRENT = {
    "vllm": Version(0, 32, 0),
    "sglang": Version(0, 5, 23),
    "dynamo-vllm": Version(1, 6, 1),
    "dynamo-sglang": Version(1, 6, 1),
    "dynamo-frontend": Version(1, 6, 1),
}


@functools.cache
def _table() -> Mapping[str, Mapping[str, frozenset[str]]]:
    text = resources.files("controller.engines").joinpath("known_options.json").read_text(encoding="utf-8")
    return {
        program: {version: frozenset(names.split()) for version, names in versions.items()}
        for program, versions in json.loads(text).items()
    }


def known_options(program: str, version: Version | None) -> frozenset[str] | None:
    """All long options of that very release, without dashes; None when we cannot know."""
    if version is None:
        return None
    versions = _table().get(program, {})
    return versions.get(f"{version.major}.{version.minor}.{version.patch}") or versions.get(
        f"{version.major}.{version.minor}"
    )


def unknown_options(program: str, version: Version | None, tokens: Sequence[str]) -> tuple[str, ...]:
    """Long options that argparse would refuse. Unique prefixes are taken by argparse, so they are by us."""
    known = known_options(program, version)
    if known is None:
        return ()
    unknown: list[str] = []
    for token in tokens:
        if not is_flag(token) or not token.startswith("--"):
            continue
        name = token[2:].split("=", 1)[0].split(".", 1)[0].rstrip("+").replace("_", "-")
        if name not in known and not any(option.startswith(name) for option in known):
            unknown.append(token.split("=", 1)[0])
    return tuple(unknown)


def option_problems(program: str, version: Version | None, tokens: Sequence[str], path: str) -> tuple[Problem, ...]:
    """One blocking problem that names every option the engine would die of."""
    unknown = unknown_options(program, version, tokens)
    if not unknown:
        return ()
    names = ", ".join(unknown)
    return (
        Problem(
            "UnknownEngineOption",
            path,
            f"{program} {version} does not know {names}; remove it, or set the annotation "
            "arks.ai/allow-unknown-options to true if the image takes it",
        ),
    )
