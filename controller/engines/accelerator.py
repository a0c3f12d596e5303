"""Which hardware an instance asks for, read from its resources and node selection.

The annotation ``arks.ai/accelerator`` (nvidia, amd, cpu) decides where nothing else tells. A pod that asks
for nothing at all gets what Arks gave it: the CUDA image (its nodes may hand out GPUs without resources).
A pod that asks for CPU or memory and for no device runs on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from controller.engines.model import Accelerator

ACCELERATOR_ANNOTATION = "arks.ai/accelerator"


def accelerator_of(instance: Mapping[str, Any], annotations: Mapping[str, str] | None = None) -> Accelerator:
    """``instance`` is an ``instanceSpec`` as the API server stores it."""
    said = (annotations or {}).get(ACCELERATOR_ANNOTATION, "")
    if said in tuple(Accelerator):
        return Accelerator(said)
    resources = instance.get("resources") or {}
    asked = {name for part in ("limits", "requests") for name in (resources.get(part) or {})}
    hints = asked | set(instance.get("nodeSelector") or {})
    if any(name.startswith("amd.com/") for name in hints):
        return Accelerator.AMD
    if any(name.startswith("nvidia.com/") for name in hints):
        return Accelerator.NVIDIA
    only_cpu = bool(asked & {"cpu", "memory"}) and not any("/" in name for name in asked)
    elsewhere = (
        bool(resources.get("claims"))
        or bool(instance.get("resourceClaims"))
        or "nvidia" in str(instance.get("runtimeClassName") or "")
        or any(str(item.get("name", "")).startswith("NVIDIA_") for item in instance.get("env") or ())
    )
    return Accelerator.CPU if only_cpu and not elsewhere else Accelerator.NVIDIA
