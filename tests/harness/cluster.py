"""A cluster to install Arks on, in a process of its own: `python -m tests.harness.cluster [API SERVER FLAG ...]`.

For programs that may not import the tests (`bench/`). A real API server and etcd with Arks' CRDs and its controller's
own rights, Gateway API, Envoy Gateway's Backend and the stand-in for LeaderWorkerSet. When all of it is served, prints
one JSON line: kubeconfig paths, {"admin": PATH, "controller": PATH}. Each line on stdin is answered by what the
controller's account wrote since the line before: {"writes": {"VERB RESOURCE[/SUBRESOURCE]": COUNT}, "last_s": WHEN},
where `last_s` is the Unix time of the last one that was no Lease's, or null. Ends when its stdin does.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

from tests.harness.envoy_gateway import custom_resources
from tests.harness.kubernetes import KubeApi, Object

MANIFESTS = Path(__file__).parents[2] / "manifests"
STAND_IN = Path(__file__).with_name("crds") / "leaderworkersets.yaml"
FOREIGN = {"httproutes", "gateways", "backends"}


def main(flags: list[str]) -> None:
    with KubeApi(flags=flags, audit=True) as api:
        kinds = [*custom_resources("gateway-api"), *custom_resources("envoy-gateway")]
        foreign = [crd for crd in kinds if crd["spec"]["names"]["plural"] in FOREIGN]
        base = [MANIFESTS / "base" / name for name in ("namespace.yaml", "serviceaccount.yaml", "rbac.yaml")]
        api.apply(MANIFESTS / "crds", STAND_IN, *foreign, *base, namespace="arks-system")
        _tell({user: str(api.kubeconfig(user)) for user in ("admin", "controller")})
        since = api.audit.mark()
        for _ in sys.stdin:
            before, since = since, api.audit.mark()
            _tell(_written(api, before, since))


def _written(api: KubeApi, since: int, until: int) -> Object:
    writes = api.audit.writes(since=since, until=until, user=api.user_name("controller"))
    counts = Counter(f"{each.verb} {each.resource}/{each.subresource}".rstrip("/") for each in writes)
    return {
        "writes": counts,
        "last_s": max((each.answered_s for each in writes if each.resource != "leases"), default=None),
    }


def _tell(answer: Object) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
