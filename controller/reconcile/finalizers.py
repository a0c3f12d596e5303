"""Finalizers that Arks left on resources: honoured when they are deleted, never added.

Owner references take everything along that we make, without us; a finalizer would make a deletion hang on a
controller that is gone. Arks' own (`application.arks.ai/controller` and its kin) stay on living objects and are
removed from dying ones, whatever else is wrong with them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from controller.kube.client import Client
from controller.kube.errors import NotFoundError
from controller.kube.resource import Resource

_OURS: Final = "arks.ai/controller"


def is_ours(finalizer: str) -> bool:
    return finalizer == _OURS or finalizer.endswith(f".{_OURS}")


async def release(
    client: Client, resource: Resource, namespace: str, name: str, finalizers: Iterable[str], version: str
) -> bool:
    """Let a dying object go; True if a finalizer of ours was in the way. Raises `ConflictError` if it changed."""
    present = list(finalizers)
    left = [finalizer for finalizer in present if not is_ours(finalizer)]
    if len(left) == len(present):
        return False
    # The version keeps a finalizer that somebody adds meanwhile.
    patch = {"metadata": {"finalizers": left, "resourceVersion": version}}
    try:
        await client.patch(resource, name, namespace, patch)
    except NotFoundError:
        return True
    return True
