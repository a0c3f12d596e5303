"""What stays in memory of an object: enough to plan with, and nothing that only makes thousands of them heavy."""

from __future__ import annotations

import json

import pytest

from apis.resources import ArksEndpoint
from controller.kube.resource import DEPLOYMENTS, Resource
from controller.reconcile.desired.endpoint import desired_endpoint
from controller.reconcile.objects import decode_object, decode_resource
from controller.reconcile.tokens import decode_token
from controller.reconcile.watches import applications_of

LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
LWS = Resource("leaderworkerset.x-k8s.io", "v1", "leaderworkersets", "LeaderWorkerSet")
RBG = Resource("workloads.x-k8s.io", "v1alpha2", "rolebasedgroups", "RoleBasedGroup")
ROUTES = Resource("gateway.networking.k8s.io", "v1", "httproutes", "HTTPRoute")
OWNER = {"apiVersion": "arks.ai/v1", "kind": "ArksApplication", "name": "app", "uid": "1", "controller": True}


def read(resource, meta, spec, **others):
    item = {"metadata": {"name": "a", "namespace": "t", "resourceVersion": "7", **meta}, "spec": spec, **others}
    return decode_object(resource)(json.dumps(item).encode())


def test_a_runtime_keeps_its_metadata_and_status_but_not_its_spec():
    meta = {"labels": {"x": "y"}, "generation": 3, "ownerReferences": [OWNER], "finalizers": ["f"]}
    annotations = {"mark": "1", LAST_APPLIED: "{}"}
    managed = [{"manager": "arks-controller", "operation": "Apply"}]
    found = read(
        LWS,
        {**meta, "annotations": annotations, "managedFields": managed},
        {"leaderWorkerTemplate": {"size": 2}},
        status={"replicas": 1},
    )
    kept = {"name": "a", "namespace": "t", "resourceVersion": "7", **meta, "annotations": {"mark": "1"}}
    assert found == {"apiVersion": LWS.api_version, "kind": LWS.kind, "metadata": kept, "status": {"replicas": 1}}


def test_fields_that_arks_manager_owns_are_kept_until_they_are_taken_over():
    managed = [{"manager": "manager", "operation": "Update", "fieldsV1": {"f:spec": {}}}]
    assert read(LWS, {"managedFields": managed}, {})["metadata"]["managedFields"] == managed


def test_a_deployment_tells_which_pods_are_its():
    spec = {"replicas": 3, "selector": {"matchLabels": {"arks.ai/application": "app"}}, "template": {"spec": {}}}
    assert read(DEPLOYMENTS, {}, spec)["spec"] == {"selector": spec["selector"]}


def test_a_group_whose_set_is_gone_is_known_by_its_pods_labels():
    labels = {"arks.ai/application": "app", "other": "1"}
    roles = [
        {"name": "leader", "template": {"metadata": {"labels": labels}, "spec": {"containers": []}}},
        {"name": "x"},
    ]
    found = read(RBG, {"name": "app-0"}, {"roles": roles})
    assert applications_of(found) == [("t", "app")]
    assert "containers" not in json.dumps(found)


@pytest.mark.parametrize("matches", [None, [], [{"headers": [{"name": "namespace", "value": "other"}]}]])
def test_a_strangers_route_is_still_known_from_arks_own(matches):
    tree = {"metadata": {"name": "a", "namespace": "t"}, "spec": {"gatewayRef": {"name": "eg"}}}
    endpoint = decode_resource(ArksEndpoint)(json.dumps(tree).encode())
    route = desired_endpoint(endpoint, ()).route
    assert route is not None
    arks = read(ROUTES, {}, route["spec"])
    assert desired_endpoint(endpoint, (), arks).route == route
    rules = [] if matches is None else [{"matches": matches}]
    foreign = read(ROUTES, {}, {"rules": rules})
    assert desired_endpoint(endpoint, (), foreign).route is None


def test_a_route_with_an_owner_is_known_by_that():
    found = read(ROUTES, {"ownerReferences": [OWNER]}, {"rules": [{"matches": []}]}, status={"parents": []})
    assert "spec" not in found
    assert found["status"] == {"parents": []}


def test_a_resource_of_ours_does_not_keep_what_kubectl_remembers_of_it():
    meta = {"name": "a", "namespace": "t", "annotations": {LAST_APPLIED: "{}", "arks.ai/workload": "lws"}}
    tree = {"metadata": meta, "spec": {"gatewayRef": {"name": "eg"}, "routeConfigs": [{"name": "svc", "port": 80}]}}
    raw = json.dumps(tree).encode()
    found, whole = decode_resource(ArksEndpoint)(raw), ArksEndpoint.model_validate_json(raw)
    assert found.metadata.annotations == {"arks.ai/workload": "lws"}
    assert found.model_dump(exclude={"metadata": {"annotations"}}) == whole.model_dump(
        exclude={"metadata": {"annotations"}}
    )
    changed = found.model_copy(update={"kind": "ArksEndpoint"})
    assert changed == found


def test_tokens_that_allow_the_same_share_it_and_keep_their_own_secrets():
    def token(name, rpm):
        limits = [{"type": "rpm", "value": rpm}]
        qos = [{"arksEndpoint": {"name": "qwen"}, "rateLimits": limits, "quota": {"name": "basic"}}]
        meta = {"name": name, "namespace": "t", "uid": name}
        return decode_token(json.dumps({"metadata": meta, "spec": {"token": f"sk-{name}", "qos": qos}}).encode())

    first, second, other = token("a", 5), token("b", 5), token("c", 6)
    assert first.fragment.record.grants is second.fragment.record.grants
    assert first.fragment.record.digest != second.fragment.record.digest
    assert (first.fragment.record.name, second.fragment.record.name) == ("a", "b")
    assert [rate.value for rate in other.fragment.record.grants[0].rates] == [6]
