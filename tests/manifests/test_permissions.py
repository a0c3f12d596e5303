"""The controller can do what it must and nothing else, by the word of a real API server's RBAC."""

from __future__ import annotations

import functools
import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import yaml

from controller.permissions import NAMESPACE, PERMISSIONS, rbac
from tests.desired.cases import GOLDEN
from tests.harness.actor import Actor
from tests.harness.kubernetes import KubeApi, KubeError, Object
from tests.manifests.conftest import MANIFESTS
from tests.reconcile.conftest import Room, Running, wait_for

VERBS = ("get", "list", "watch", "create", "update", "patch", "delete", "deletecollection")
BEYOND = (
    ("impersonate", "", "users"),
    ("impersonate", "", "serviceaccounts"),
    ("escalate", "rbac.authorization.k8s.io", "roles"),
    ("bind", "rbac.authorization.k8s.io", "clusterroles"),
    ("approve", "certificates.k8s.io", "signers"),
)
"""verbs that are none of HTTP's"""


@pytest.fixture
def tenant(cluster: KubeApi):
    name = cluster.create_namespace()
    yield name
    cluster.remove_namespace(name)


def test_the_manifest_is_the_table():
    found = list(yaml.safe_load_all((MANIFESTS / "base" / "rbac.yaml").read_text()))
    assert found == rbac(), "run: python -m controller.permissions > manifests/base/rbac.yaml"


def every_resource(api: KubeApi) -> set[tuple[str, str]]:
    """(group, plural or plural/subresource) of all that is served."""
    versions = ["v1"]
    versions += [each["groupVersion"] for group in api.request("GET", "/apis")["groups"] for each in group["versions"]]
    found = set()
    for version in versions:
        group = version.rpartition("/")[0]
        path = f"/apis/{version}" if group else f"/api/{version}"
        found |= {(group, each["name"]) for each in api.request("GET", path)["resources"]}
    return found


def granted(group: str, resource: str, verb: str, namespace: str) -> bool:
    return any(
        item.group == group and resource in item.resources and verb in item.verbs and item.namespace in {"", namespace}
        for item in PERMISSIONS
    )


@pytest.mark.parametrize("namespace", [NAMESPACE, "default"])
def test_every_verb_on_every_kind_is_as_the_table_says(cluster: KubeApi, namespace: str):
    served = every_resource(cluster)
    missing = {(item.group, name) for item in PERMISSIONS for name in item.resources} - served
    # Status and finalizers are subresources that discovery lists in part; Dynamo's kind is not installed here.
    assert {name for _, name in missing if not name.endswith("/finalizers")} == {"dynamoworkermetadatas"}
    asked = [(verb, group, name) for (group, name), verb in itertools.product(sorted(served | missing), VERBS)]

    def may(question: tuple[str, str, str]) -> tuple[tuple[str, str, str], bool]:
        verb, group, name = question
        resource, _, subresource = name.partition("/")
        what = {"verb": verb, "group": group, "resource": resource, "subresource": subresource, "namespace": namespace}
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": what},
        }
        path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
        return question, bool(cluster.request("POST", path, review, user="controller")["status"]["allowed"])

    with ThreadPoolExecutor(4) as pool:
        answers = dict(pool.map(may, [*asked, *BEYOND]))
    # What everybody may: ask what they may do.
    everybodys = {"authentication.k8s.io", "authorization.k8s.io"}
    wrong = {
        question: allowed
        for question, allowed in answers.items()
        if allowed != granted(question[1], question[2], question[0], namespace) and question[1] not in everybodys
    }
    assert not wrong
    assert len(asked) > 1000


def desired() -> list[Object]:
    found = [item for path in sorted(GOLDEN.glob("*.out.yaml")) for item in yaml.safe_load_all(path.read_text())]
    # v1alpha1 of the groups is served by stand-ins only where they have it.
    return [item for item in found if item]


async def test_everything_that_the_controller_makes_it_may_make(cluster: KubeApi, tenant: str):
    kinds = set()
    for item in desired():
        item["metadata"] = {**item["metadata"], "namespace": tenant}
        try:
            path = cluster.path(item["apiVersion"], item["kind"], tenant)
        except KubeError:
            continue
        # A binding is judged by the role that it names, so roles are really made, and not collected for want of owners.
        if item["kind"] == "Role":
            del item["metadata"]["ownerReferences"]
        query = "fieldManager=arks&force=true" + ("" if item["kind"] == "Role" else "&dryRun=All")
        target = f"{path}/{item['metadata']['name']}?{query}"
        await wait_for(functools.partial(applied, cluster, target, item))
        kinds.add(item["kind"])
    assert {"Deployment", "Job", "HTTPRoute", "LeaderWorkerSet", "RoleBasedGroup", "Role", "RoleBinding"} <= kinds


def applied(cluster: KubeApi, target: str, item: Object) -> bool:
    """False while the server has not heard of the role that was made a moment ago."""
    try:
        cluster.request("PATCH", target, item, user="controller", content_type="application/apply-patch+yaml")
    except KubeError as error:
        if error.status == 404 and item["kind"] == "RoleBinding":
            return False
        raise
    return True


def pod(name: str) -> Object:
    return {"metadata": {"name": name}, "spec": {"containers": [{"name": "a", "image": "a"}]}}


def role(resources: list[str], verbs: list[str]) -> Object:
    return {"metadata": {"name": "given"}, "rules": [{"apiGroups": [""], "resources": resources, "verbs": verbs}]}


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/api/v1/namespaces/{ns}/pods", pod("a")),
        ("POST", "/api/v1/namespaces/{ns}/secrets", {"metadata": {"name": "a"}}),
        ("GET", "/api/v1/namespaces/{ns}/configmaps", None),
        ("POST", "/api/v1/namespaces/{ns}/serviceaccounts/default/token", {"spec": {}}),
        ("POST", "/apis/coordination.k8s.io/v1/namespaces/{ns}/leases", {"metadata": {"name": "arks-controller"}}),
        ("POST", "/apis/arks.ai/v1/namespaces/{ns}/arkstokens", {"metadata": {"name": "a"}, "spec": {"qos": []}}),
        ("GET", "/apis/rbac.authorization.k8s.io/v1/clusterroles", None),
        # Roles may be given, but never more than what one has.
        ("POST", "/apis/rbac.authorization.k8s.io/v1/namespaces/{ns}/roles", role(["pods"], ["create"])),
    ],
    ids=lambda value: value if isinstance(value, str) and value.startswith("/") else "",
)
def test_what_it_need_not_do_is_refused(cluster: KubeApi, tenant: str, method: str, path: str, body: Any):
    with pytest.raises(KubeError) as refused:
        cluster.request(method, path.format(ns=tenant), body, user="controller")
    assert refused.value.status == 403


async def test_the_running_controller_is_never_refused(cluster: KubeApi, tenant: str):
    """From the quickstart to its end, as the ServiceAccount of the manifests."""
    running = Running(cluster, NAMESPACE)
    room = Room(cluster, tenant)
    async with Actor(cluster, tenant) as actor:
        actor.gateways = True
        await running.start(user="controller")
        try:
            await running.leading()
            room.apply((MANIFESTS / "samples" / "quickstart.yaml").read_text())
            await room.phase("ArksApplication", "app-qwen", "Running")
            await room.until("ArksEndpoint", "qwen-7b", lambda item: item["status"].get("routes"))
            room.delete("ArksApplication", "app-qwen")
            await room.gone("ArksApplication", "app-qwen")
            await running.quiet()
        finally:
            calls = dict(running.client.stats.calls)
            await running.stop()
    refused = {call: count for call, count in calls.items() if call[3] in {"401", "403"}}
    assert not refused
    assert {("arks.ai", "arkstokens"), ("", "secrets"), ("", "events"), ("coordination.k8s.io", "leases")} <= {
        call[1:3] for call in calls
    }
