"""The xDS that Envoy Gateway makes of our manifests, and what of it decides.

`python -m tests.manifests.translation` writes the golden file anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.harness.envoy_gateway import Translation, kustomize_build, translate
from tests.harness.kubernetes import Object

MANIFESTS = Path(__file__).parents[2] / "manifests"
GOLDEN = Path(__file__).parent / "golden" / "xds.yaml"
ROUTE = Path(__file__).parents[1] / "desired" / "golden" / "quickstart-endpoint.bare.out.yaml"
ENVOY = {"gateway.networking.k8s.io", "gateway.envoyproxy.io"}


def judged(objects: list[Object]) -> list[Object]:
    """What Envoy Gateway reads of them, with an endpoint's route and its Service."""
    read = [item for item in objects if item["apiVersion"].partition("/")[0] in ENVOY or item["kind"] == "Secret"]
    (extproc,) = (item for item in objects if item["kind"] == "Service")
    spaces = {item["metadata"]["namespace"] for item in read if "namespace" in item["metadata"]} | {"team-a"}
    found = [{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}} for name in sorted(spaces)]
    route = yaml.safe_load(ROUTE.read_text())
    engines = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "arks-application-app-qwen", "namespace": "team-a"},
        "spec": {"clusterIP": "10.96.7.8", "ports": [{"name": "http", "port": 8080}]},
    }
    named = {**extproc, "spec": {**extproc["spec"], "clusterIP": "10.96.7.7"}}
    return [*found, *read, named, engines, route]


def manager(translation: Translation) -> Object:
    """The HTTP connection manager of the Gateway's one listener."""
    (listener,) = (item for item in translation.listeners if "ready" not in item["name"])
    (found,) = (item for item in listener["defaultFilterChain"]["filters"] if item["name"].endswith("manager"))
    config: Object = found["typedConfig"]
    return config


def decisive(translation: Translation) -> Object:
    """Without what only names and describes."""
    (listener,) = (item for item in translation.listeners if "ready" not in item["name"])
    connections = {"perConnectionBufferLimitBytes": listener["perConnectionBufferLimitBytes"]}
    (routes,) = (each["virtualHosts"] for each in translation.routes.values())
    return bare(
        {
            "listener": {**connections, "manager": manager(translation)},
            "routes": [route for host in routes for route in host["routes"]],
            "clusters": translation.clusters,
        }
    )


def bare(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: bare(value) for key, value in tree.items() if key not in {"metadata", "@type", "statPrefix"}}
    return [bare(item) for item in tree] if isinstance(tree, list) else tree


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(yaml.safe_dump(decisive(translate(judged(kustomize_build(MANIFESTS)))), width=110))
