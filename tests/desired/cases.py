"""What golden files are made from: for each folder name, the objects that shall be applied and the problems."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from controller.reconcile.desired.application import desired_application
from controller.reconcile.desired.disaggregated import desired_disaggregated
from controller.reconcile.desired.endpoint import Backend, desired_endpoint
from controller.reconcile.desired.model import desired_model
from controller.reconcile.desired.outcome import World
from controller.workloads.model import DYNAMO_METADATA, GVK, LWS, RBG_V1ALPHA1, RBG_V1ALPHA2
from tests.desired.resources import MODEL, load, parse

GOLDEN = Path(__file__).parent / "golden"
SERVED: dict[str, frozenset[GVK]] = {
    "bare": frozenset(),
    "lws": frozenset({LWS}),
    "rbg-v1alpha1": frozenset({LWS, RBG_V1ALPHA1}),
    "rbg-v1alpha2": frozenset({LWS, RBG_V1ALPHA1, RBG_V1ALPHA2}),
    "rbg-alone": frozenset({RBG_V1ALPHA2}),
    "dynamo": frozenset({LWS, DYNAMO_METADATA}),
}


def results(source: Path) -> dict[str, Any]:
    """``<case>.<cluster>.in.yaml`` holds one resource; its model is the usual one unless a second is given."""
    trees = list(yaml.safe_load_all(source.read_text(encoding="utf-8")))
    resource = parse(trees[0])
    model = parse(trees[1]) if len(trees) > 1 else load(MODEL)
    world = World(SERVED[source.name.split(".")[1]])
    match resource.kind:
        case "ArksApplication":
            desired = desired_application(resource, model, world, adapters={model.metadata.name: model})
            applied = [*desired.objects, *desired.plan.apply]
            problems = desired.problems
        case "ArksDisaggregatedApplication":
            desired = desired_disaggregated(resource, model, world)
            applied = [*desired.objects, *desired.plan.apply]
            problems = desired.problems
        case "ArksEndpoint":
            route = desired_endpoint(resource, (Backend("app-qwen", resource.spec.default_weight),))
            applied, problems = [item for item in (route.route,) if item], route.problems
        case "ArksModel":
            wanted = desired_model(resource, environment={})
            applied, problems = [item for item in (wanted.claim, wanted.job) if item], wanted.problems
        case other:
            raise AssertionError(other)
    return {"objects": applied, "problems": [f"{item.reason}: {item}" for item in problems]}


class _Plain(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def rendered(source: Path) -> str:
    found = results(source)
    parts = [yaml.dump(item, Dumper=_Plain, sort_keys=False, width=120) for item in found["objects"]]
    notes = "".join(f"# problem: {item}\n" for item in found["problems"])
    return notes + "---\n".join(parts)


def expected_path(source: Path) -> Path:
    return source.with_name(source.name.replace(".in.yaml", ".out.yaml"))


if __name__ == "__main__":
    for found_source in sorted(GOLDEN.glob("*.in.yaml")):
        expected_path(found_source).write_text(rendered(found_source), encoding="utf-8")
