"""The rights that the manifests grant the controller. The server's authorizer hears of them by watches of its own."""

from __future__ import annotations

import time
from typing import Any

from controller.permissions import NAMESPACE, rbac
from tests.harness.kubernetes import KubeApi

TIMEOUT_S = 90.0
# One of each role's rules: a role and its binding count together or not at all.
_ASKED: tuple[dict[str, str], ...] = (
    {"verb": "patch", "group": "gateway.networking.k8s.io", "resource": "httproutes"},
    {"verb": "update", "group": "coordination.k8s.io", "resource": "leases", "namespace": NAMESPACE},
)


def grant(api: KubeApi) -> None:
    """Apply them, and wait until they are in force."""
    api.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}, *rbac())
    until_granted(api, "controller")


def until_granted(api: KubeApi, user: str, *, granted: bool = True) -> None:
    """Wait until this user has them, or no longer any of them."""
    for asked in _ASKED:
        until_allowed(api, user, allowed=granted, **asked)


def until_allowed(api: KubeApi, user: str, *, allowed: bool = True, **asked: str) -> None:
    """Wait until the authorizer says so. `asked`: verb, group, resource, namespace."""
    until = time.monotonic() + TIMEOUT_S
    while may(api, user, **asked) != allowed:
        if time.monotonic() > until:
            raise TimeoutError(f"{user} {'may not' if allowed else 'may still'} {asked}")
        time.sleep(0.02)


def may(api: KubeApi, user: str, **asked: str) -> bool:
    """An administrator asks: among the user's own calls would be one more."""
    review: dict[str, Any] = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {"user": api.user_name(user), "resourceAttributes": asked},
    }
    return bool(api.request("POST", "/apis/authorization.k8s.io/v1/subjectaccessreviews", review)["status"]["allowed"])
