"""Which image runs what: the user's, then the operator's environment, then our own default.

The environment variables are Arks'. Its defaults (vLLM 0.8.2, SGLang 0.4.5, an unpullable Dynamo image) are
from spring 2025 and know neither today's models nor the options that let a pod drain before it dies
(``--shutdown-timeout`` came with vLLM 0.18) or start over several nodes without Ray; ours are the releases
that the command lines of this package were tried against. Names for AMD and CPU follow the projects' own
registries and can be replaced with ``<VARIABLE>_AMD`` and ``<VARIABLE>_CPU``.
"""

from __future__ import annotations

from collections.abc import Mapping

from controller.engines.model import Accelerator, Problem

VLLM_TAG = "v0.32.0"
SGLANG_TAG = "v0.5.23"
DYNAMO_TAG = "1.6.1"

RUNTIME_VARIABLES = {
    "vllm": "ARKS_RUNTIME_DEFAULT_VLLM_IMAGE",
    "sglang": "ARKS_RUNTIME_DEFAULT_SGLANG_IMAGE",
    "dynamo": "ARKS_RUNTIME_DEFAULT_DYNAMO_IMAGE",
}
# Arks' disaggregated applications read a variable of their own; the shared one is the fallback.
SGLANG_DISAGGREGATED_VARIABLE = "ARKS_DEFAULT_SGLANG_IMAGE"
SGLANG_ROUTER_VARIABLE = "ARKS_DEFAULT_SGLANG_ROUTER_IMAGE"
VLLM_ROUTER_VARIABLE = "ARKS_DEFAULT_VLLM_ROUTER_IMAGE"
LOADER_VARIABLE = "ARKS_SCRIPTS_IMAGE"
_ENGINE_VARIABLES = (*RUNTIME_VARIABLES.values(), SGLANG_DISAGGREGATED_VARIABLE)
VARIABLES = frozenset(
    (
        *_ENGINE_VARIABLES,
        *(f"{name}_{kind.upper()}" for name in _ENGINE_VARIABLES for kind in Accelerator if kind != Accelerator.NVIDIA),
        *(SGLANG_ROUTER_VARIABLE, VLLM_ROUTER_VARIABLE, LOADER_VARIABLE),
    )
)
"""all that are read here"""

_DEFAULTS: Mapping[tuple[str, Accelerator], str] = {
    ("vllm", Accelerator.NVIDIA): f"vllm/vllm-openai:{VLLM_TAG}",
    ("vllm", Accelerator.AMD): f"vllm/vllm-openai-rocm:{VLLM_TAG}",
    ("vllm", Accelerator.CPU): f"vllm/vllm-openai-cpu:{VLLM_TAG}",
    ("sglang", Accelerator.NVIDIA): f"lmsysorg/sglang:{SGLANG_TAG}",
    ("sglang", Accelerator.AMD): f"lmsysorg/sglang:{SGLANG_TAG}-rocm720",
    ("dynamo", Accelerator.NVIDIA): f"nvcr.io/nvidia/ai-dynamo/vllm-runtime:{DYNAMO_TAG}",
}
# The SGLang image carries its router; vLLM's is a package without a published image that we could name.
SGLANG_ROUTER_DEFAULT = f"lmsysorg/sglang:{SGLANG_TAG}"
LOADER_DEFAULT = "scitixai/arks:latest"


def runtime_image(
    runtime: str,
    accelerator: Accelerator,
    *,
    given: str,
    environment: Mapping[str, str],
    disaggregated: bool = False,
) -> tuple[str, Problem | None]:
    """The engine's image, and a problem when nobody has named one for this kind of hardware."""
    if given:
        return given, None
    suffix = "" if accelerator is Accelerator.NVIDIA else f"_{accelerator.upper()}"
    names = [RUNTIME_VARIABLES[runtime] + suffix]
    if disaggregated and runtime == "sglang":
        names.insert(0, SGLANG_DISAGGREGATED_VARIABLE + suffix)
    for name in names:
        if environment.get(name):
            return environment[name], None
    default = _DEFAULTS.get((runtime, accelerator))
    if default is not None:
        return default, None
    return "", Problem(
        "NoImageForAccelerator",
        "spec.runtimeImage",
        f"there is no default {runtime} image for {accelerator} hardware; set spec.runtimeImage or {names[-1]}",
    )


def router_image(
    runtime: str, *, given: str, engine_image: str, environment: Mapping[str, str]
) -> tuple[str, Problem | None]:
    """The router's image; Dynamo's frontend lives in the engine's own image."""
    if given:
        return given, None
    if runtime == "dynamo":
        return engine_image, None
    if runtime == "sglang":
        variables = (SGLANG_ROUTER_VARIABLE, SGLANG_DISAGGREGATED_VARIABLE)
        return next((environment[name] for name in variables if environment.get(name)), SGLANG_ROUTER_DEFAULT), None
    if environment.get(VLLM_ROUTER_VARIABLE):
        return environment[VLLM_ROUTER_VARIABLE], None
    return "", Problem(
        "RouterImageMissing",
        "spec.routerImage",
        f"vLLM's router has no published image; build one with the vllm-router package and set spec.routerImage "
        f"or {VLLM_ROUTER_VARIABLE}",
    )


def loader_image(environment: Mapping[str, str]) -> str:
    return environment.get(LOADER_VARIABLE) or LOADER_DEFAULT
