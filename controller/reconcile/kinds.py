"""The kinds that the controller reads and writes: ours, Kubernetes' own, and those that may be installed or not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

from controller.kube.resource import Key, Resource
from controller.workloads.model import (
    DYNAMO_METADATA,
    GVK,
    LWS,
    RBG_V1ALPHA1,
    RBG_V1ALPHA2,
)

ARKS: Final[Mapping[str, Resource]] = {
    kind: Resource("arks.ai", "v1", f"{kind.lower()}s", kind)
    for kind in (
        "ArksApplication",
        "ArksDisaggregatedApplication",
        "ArksEndpoint",
        "ArksModel",
        "ArksQuota",
        "ArksToken",
    )
}
APPLICATION_KINDS: Final = frozenset({"ArksApplication", "ArksDisaggregatedApplication"})

ROLES: Final = Resource("rbac.authorization.k8s.io", "v1", "roles", "Role")
ROLE_BINDINGS: Final = Resource("rbac.authorization.k8s.io", "v1", "rolebindings", "RoleBinding")

GATEWAY_API: Final = "gateway.networking.k8s.io"
WORKLOADS: Final = "workloads.x-k8s.io"


class Installed(NamedTuple):
    """A kind of somebody else's API, watched while the cluster serves it, in the first of `versions`."""

    group: str
    kind: str
    versions: tuple[str, ...]


INSTALLED: Final = (
    Installed(LWS.group, LWS.kind, (LWS.version,)),
    Installed(WORKLOADS, "RoleBasedGroup", ("v1alpha2", "v1alpha1")),
    Installed(WORKLOADS, "RoleBasedGroupSet", ("v1alpha2", "v1alpha1")),
    Installed(GATEWAY_API, "HTTPRoute", ("v1",)),
    Installed(GATEWAY_API, "Gateway", ("v1",)),
)
# What the choice of a workload and of an engine's discovery depends on.
CHOSEN_FROM: Final[tuple[GVK, ...]] = (LWS, RBG_V1ALPHA1, RBG_V1ALPHA2, DYNAMO_METADATA)


class Request(NamedTuple):
    """One object of ours to be looked at."""

    kind: str
    namespace: str
    name: str

    @property
    def key(self) -> Key:
        return Key(self.namespace, self.name)

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}"
