"""Which API runs an application, what it is given, and how its groups are counted."""

from __future__ import annotations

import copy

import pytest

from controller.workloads.choice import choose
from controller.workloads.deployment import DeploymentWorkload
from controller.workloads.lws import LwsWorkload
from controller.workloads.model import (
    LWS,
    RBG_V1ALPHA1,
    RBG_V1ALPHA2,
    TEMPLATE_HASH,
    Counts,
    Gang,
    Observed,
    RoleGroup,
    Serving,
    pods_serving,
)
from controller.workloads.rbg import RbgWorkload

OWNER = {"apiVersion": "arks.ai/v1", "kind": "ArksApplication", "name": "app", "uid": "u", "controller": True}


def template(role, *, stage=None, image="engine:1"):
    labels = {"arks.ai/application": "app", "arks.ai/work-load-role": role}
    if stage:
        labels["arks.ai/disaggregation-role"] = stage
    container = {"name": "engine", "image": image, "command": ["run", role]}
    if role == "leader":
        container["readinessProbe"] = {"httpGet": {"path": "/health", "port": 8080}}
        container["ports"] = [{"containerPort": 8080}]
    return {"metadata": {"labels": labels}, "spec": {"containers": [container]}}


def serving(replicas=1, size=2, *, image="engine:1", gang=None):
    role = RoleGroup(
        "inference",
        replicas,
        size,
        template("leader", image=image),
        template("worker", image=image) if size > 1 else None,
    )
    return Serving("team-a", "app", OWNER, {"arks.ai/application": "app"}, (role,), gang=gang)


def pair(prefill=1, decode=1):
    roles = [RoleGroup("scheduler", 1, 1, template("leader", stage="router"))]
    roles += [
        RoleGroup(stage, number, 2, template("leader", stage=stage), template("worker", stage=stage))
        for stage, number in (("prefill", prefill), ("decode", decode))
    ]
    return Serving("team-a", "app", OWNER, {}, tuple(roles), disaggregated=True)


def test_what_runs_already_goes_on_running():
    existing = Observed(({"kind": "LeaderWorkerSet", "metadata": {"name": "app"}},))
    workload, _ = choose({LWS, RBG_V1ALPHA1}, existing, application="app", size=1)
    assert workload.name == "lws"
    deployment = Observed(({"kind": "Deployment", "metadata": {"name": "app"}},))
    assert choose({LWS}, deployment, application="app", size=1)[0].name == "deployment"


def test_what_runs_already_moves_where_the_user_wants_it():
    existing = Observed(({"kind": "LeaderWorkerSet", "metadata": {"name": "app"}},))
    workload, _ = choose({LWS, RBG_V1ALPHA2}, existing, application="app", size=1, preferred="rbg")
    assert workload.name == "rbg"


def test_rbg_is_arks_choice_and_its_newest_version_ours():
    workload, problem = choose({LWS, RBG_V1ALPHA1, RBG_V1ALPHA2}, Observed(), application="app", size=4)
    assert (workload.name, workload.kinds[0], problem) == ("rbg", RBG_V1ALPHA2, None)
    assert choose({LWS, RBG_V1ALPHA1}, Observed(), application="app", size=1)[0].kinds[0] == RBG_V1ALPHA1
    assert choose({LWS}, Observed(), application="app", size=4)[0].name == "lws"


def test_v1alpha1_without_lws_cannot_run_groups():
    assert choose({RBG_V1ALPHA1}, Observed(), application="app", size=2)[0] is None


def test_without_any_group_api_one_pod_runs_and_two_are_a_condition():
    workload, note = choose(set(), Observed(), application="app", size=1)
    assert workload.name == "deployment"
    assert not note.blocking
    workload, problem = choose(set(), Observed(), application="app", size=2)
    assert workload is None
    assert (problem.reason, problem.blocking) == ("WorkloadApiMissing", True)


def test_a_preference_that_is_not_installed_is_refused_and_not_ignored():
    assert choose({LWS, RBG_V1ALPHA2}, Observed(), application="app", size=1, preferred="lws")[0].name == "lws"
    assert choose({LWS}, Observed(), application="app", size=1, preferred="rbg")[1].blocking


def effective(base, patch):
    """A strategic merge of the parts that our patches touch: maps merge, containers by name, lists replace."""
    found = copy.deepcopy(base)
    for key, value in patch.items():
        if key == "containers":
            by_name = {item["name"]: item for item in found.get(key, [])}
            for item in value:
                by_name[item["name"]] = effective(by_name.get(item["name"], {}), item)
            found[key] = list(by_name.values())
        elif isinstance(value, dict) and isinstance(found.get(key), dict):
            found[key] = effective(found[key], value)
        else:
            found[key] = copy.deepcopy(value)
    return found


def leader_and_worker(workload, wanted):
    applied = workload.build(wanted, Observed()).apply
    item = next(entry for entry in applied if entry["kind"] in ("LeaderWorkerSet", "RoleBasedGroup"))
    if item["kind"] == "LeaderWorkerSet":
        group = item["spec"]["leaderWorkerTemplate"]
        return group["leaderTemplate"], group["workerTemplate"]
    role = next(role for role in item["spec"]["roles"] if role["name"] != "scheduler")
    if "leaderWorkerPattern" in role:
        pattern = role["leaderWorkerPattern"]
        base, patches = pattern["template"], (pattern["leaderTemplatePatch"], pattern["workerTemplatePatch"])
    else:
        group = role["leaderWorkerSet"]
        base, patches = role["template"], (group["patchLeaderTemplate"], group["patchWorkerTemplate"])
    return effective(base, patches[0]), effective(base, patches[1])


@pytest.mark.parametrize(
    "workload",
    [LwsWorkload(), RbgWorkload(RBG_V1ALPHA1), RbgWorkload(RBG_V1ALPHA2), RbgWorkload(RBG_V1ALPHA2, lws=False)],
)
@pytest.mark.parametrize("wanted", [serving(), pair()])
def test_workers_never_look_like_leaders_on_any_backend(workload, wanted):
    leader, worker = leader_and_worker(workload, wanted)
    assert leader["metadata"]["labels"]["arks.ai/work-load-role"] == "leader"
    assert worker["metadata"]["labels"]["arks.ai/work-load-role"] == "worker"
    assert leader["spec"]["containers"][0]["readinessProbe"]
    assert not {"readinessProbe", "ports"} & set(worker["spec"]["containers"][0])
    assert worker["spec"]["containers"][0]["command"] == ["run", "worker"]
    assert leader["spec"]["containers"][0]["command"] == ["run", "leader"]


def test_names_and_containers_are_arks_so_that_what_it_made_is_updated_in_place():
    (item,) = LwsWorkload().build(serving(), Observed()).apply
    group = item["spec"]["leaderWorkerTemplate"]
    assert item["metadata"]["name"] == "app"
    assert group["leaderTemplate"]["spec"]["containers"][0]["name"] == "leader"
    assert group["workerTemplate"]["spec"]["containers"][0]["name"] == "worker"
    names = [item["metadata"]["name"] for item in LwsWorkload().build(pair(), Observed()).apply]
    assert names == ["app-scheduler", "app-prefill", "app-decode"]
    groups = RbgWorkload(RBG_V1ALPHA1).build(serving(replicas=3), Observed()).apply
    assert [item["metadata"]["name"] for item in groups] == ["app-0", "app-1", "app-2"]
    (one,) = RbgWorkload(RBG_V1ALPHA1).build(pair(), Observed()).apply
    assert one["metadata"]["name"] == "app-0"
    assert [role["name"] for role in one["spec"]["roles"]] == ["scheduler", "prefill", "decode"]


def pod(group, *, ready=True, mark="", index="0", role="leader", deleted=False, stage=None):
    labels = {
        "arks.ai/application": "app",
        "arks.ai/work-load-role": role,
        "rolebasedgroup.workloads.x-k8s.io/name": group,
        "leaderworkerset.sigs.k8s.io/worker-index": index,
    }
    if stage:
        labels["arks.ai/disaggregation-role"] = stage
    meta = {"name": f"{group}-{index}", "labels": labels, "annotations": {TEMPLATE_HASH: mark} if mark else {}}
    if deleted:
        meta["deletionTimestamp"] = "2027-01-01T00:00:00Z"
    return {"metadata": meta, "status": {"conditions": [{"type": "Ready", "status": "True" if ready else "False"}]}}


def marks(workload, wanted):
    item = workload.group(wanted, 0)
    role = item["spec"]["roles"][0]["template"]["metadata"]["annotations"][TEMPLATE_HASH]
    return item["metadata"]["annotations"][TEMPLATE_HASH], role


def existing_group(index, mark):
    return {
        "apiVersion": "workloads.x-k8s.io/v1alpha1",
        "kind": "RoleBasedGroup",
        "metadata": {"name": f"app-{index}", "annotations": {TEMPLATE_HASH: mark}},
    }


def test_all_groups_are_counted_and_not_the_first_alone():
    workload, wanted = RbgWorkload(RBG_V1ALPHA1), serving(replicas=3)
    _, mark = marks(workload, wanted)
    pods = (pod("app-0", mark=mark), pod("app-1", mark="old"), pod("app-2", ready=False, mark=mark))
    noise = (pod("app-0", index="1", role="worker"), pod("app-1", deleted=True), pod("other-0"))
    assert workload.status(wanted, Observed(pods=(*pods, *noise)))["inference"] == Counts(3, 2, 2)


def test_a_group_whose_old_pod_is_still_ready_does_not_count_as_rolled():
    """The API's own status lags behind a change: believing it would take two of two groups down at once."""
    workload, wanted = RbgWorkload(RBG_V1ALPHA1), serving(replicas=2, image="engine:2")
    group, mark = marks(workload, wanted)
    old = marks(workload, serving(replicas=2))
    objects = (existing_group(0, old[0]), existing_group(1, group))
    lagging = Observed(objects, (pod("app-0", mark=old[1]), pod("app-1", mark=old[1])))
    assert [item["metadata"]["name"] for item in workload.build(wanted, lagging).apply] == ["app-1"]
    rolled = Observed(objects, (pod("app-0", mark=old[1]), pod("app-1", mark=mark)))
    assert [item["metadata"]["name"] for item in workload.build(wanted, rolled).apply] == ["app-0", "app-1"]


def test_replicas_do_not_change_the_template_so_scaling_restarts_nothing():
    workload = RbgWorkload(RBG_V1ALPHA1)
    assert marks(workload, serving(replicas=1)) == marks(workload, serving(replicas=5))


def test_a_set_that_arks_left_is_orphaned_before_its_groups_are_adopted():
    workload, wanted = RbgWorkload(RBG_V1ALPHA1), serving(replicas=2)
    left = {
        "apiVersion": "workloads.x-k8s.io/v1alpha1",
        "kind": "RoleBasedGroupSet",
        "metadata": {"name": "app"},
    }
    children = tuple(existing_group(index, "arks") for index in range(2))
    plan = workload.build(wanted, Observed((left, *children), (pod("app-0"), pod("app-1"))))
    assert not plan.apply
    assert [(item.kind, item.propagation) for item in plan.delete] == [("RoleBasedGroupSet", "Orphan")]
    adopted = workload.build(wanted, Observed(children, (pod("app-0"), pod("app-1"))))
    assert [item["metadata"]["name"] for item in adopted.apply] == ["app-1"]
    assert not adopted.delete


def test_a_worker_that_arks_labelled_leader_is_no_serving_replica():
    workload, wanted = RbgWorkload(RBG_V1ALPHA1), serving(replicas=1)
    pods = (pod("app-0", ready=False), pod("app-0", index="1", role="leader"))
    assert workload.status(wanted, Observed(pods=pods))["inference"].ready == 0


def test_gang_scheduling_lands_on_every_api_or_is_said_to_be_missing():
    kube, volcano = Gang("kube", timeout_s=120), Gang("volcano", queue="gpu", priority_class="high")
    (old,) = RbgWorkload(RBG_V1ALPHA1).build(serving(gang=kube), Observed()).apply
    assert old["spec"]["podGroupPolicy"] == {"kubeScheduling": {"scheduleTimeoutSeconds": 120}}
    (new,) = RbgWorkload(RBG_V1ALPHA2).build(serving(gang=kube), Observed()).apply
    assert new["metadata"]["annotations"]["rbg.workloads.x-k8s.io/group-gang-scheduling"] == "true"
    assert new["metadata"]["annotations"]["rbg.workloads.x-k8s.io/group-gang-scheduling-timeout"] == "120"
    plan = LwsWorkload().build(serving(gang=volcano), Observed())
    spec = plan.apply[0]["spec"]["leaderWorkerTemplate"]["workerTemplate"]["spec"]
    assert (spec["schedulerName"], spec["priorityClassName"]) == ("volcano", "high")
    assert plan.apply[0]["metadata"]["annotations"] == {"scheduling.volcano.sh/queue-name": "gpu"}
    assert LwsWorkload().build(serving(gang=kube), Observed()).problems[0].reason == "GangSchedulingUnavailable"
    assert DeploymentWorkload().build(serving(size=1, gang=kube), Observed()).problems


def test_lws_and_deployments_take_the_last_replica_down_last():
    one = LwsWorkload().build(serving(replicas=1), Observed()).apply[0]["spec"]["rolloutStrategy"]
    many = LwsWorkload().build(serving(replicas=4), Observed()).apply[0]["spec"]["rolloutStrategy"]
    rolling = "rollingUpdateConfiguration"
    assert (one[rolling]["maxUnavailable"], one[rolling]["maxSurge"]) == (0, 1)
    assert (many[rolling]["maxUnavailable"], many[rolling]["maxSurge"]) == (1, 0)
    plain = DeploymentWorkload().build(serving(replicas=1, size=1), Observed()).apply[0]["spec"]["strategy"]
    assert plain["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}


def test_counts_of_an_older_generation_are_not_taken_for_the_newest():
    status = {"replicas": 2, "readyReplicas": 2, "updatedReplicas": 2, "observedGeneration": 1}
    item = {"kind": "LeaderWorkerSet", "metadata": {"name": "app", "generation": 2}, "status": status}
    assert LwsWorkload().status(serving(replicas=2), Observed((item,)))["inference"] == Counts(2, 2, 0)


def test_arks_router_with_the_overlapping_selector_goes_when_ours_serves():
    old = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "app-router"},
        "spec": {"selector": {"matchLabels": {"arks.ai/application": "app"}}},
    }
    assert not LwsWorkload().build(pair(), Observed((old,))).delete
    ours = {"kind": "Deployment", "metadata": {"name": "app-scheduler"}, "status": {"readyReplicas": 1}}
    (gone,) = LwsWorkload().build(pair(), Observed((old, ours))).delete
    assert gone.name == "app-router"


def test_an_application_whose_spec_cannot_be_built_is_still_counted_by_its_pods():
    pods = (pod("app-0"), pod("app-1", ready=False), pod("app-0", role="worker"), pod("app-0", stage="prefill"))
    assert pods_serving(pods) == {"inference": Counts(2, 1, 0), "prefill": Counts(1, 1, 0)}
