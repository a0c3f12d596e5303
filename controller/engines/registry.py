"""The engines by the name a user writes in ``spec.runtime``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from controller.engines import dynamo, sglang, vllm
from controller.engines.model import Launch, LaunchSpec, Problem

DEFAULT_RUNTIME = "vllm"
DEFAULT_DISAGGREGATED_RUNTIME = "sglang"

ENGINES: Mapping[str, Callable[[LaunchSpec], Launch]] = {
    "vllm": vllm.launch,
    "sglang": sglang.launch,
    "dynamo": dynamo.launch,
}


def unsupported(runtime: str) -> Problem | None:
    """Arks' reason for a runtime that nobody knows; names are case-sensitive, as in Arks."""
    if runtime in ENGINES:
        return None
    known = ", ".join(sorted(ENGINES))
    return Problem("RuntimeNotSupport", "spec.runtime", f"runtime {runtime!r} is not one of {known}")
