"""What is launched, for every engine, age and place in a group."""

from __future__ import annotations

import http.server
import itertools
import json
import subprocess
import sys
import threading
from typing import ClassVar

import pytest

from controller.engines import dynamo, router, sglang, vllm
from controller.engines.accelerator import accelerator_of
from controller.engines.images import router_image, runtime_image
from controller.engines.known import known_options, unknown_options
from controller.engines.model import Accelerator, LaunchSpec, LoraAdapter, Role, Stage
from controller.engines.registry import ENGINES, unsupported
from controller.engines.stopping import stopping
from controller.engines.version import Version, image_version

VLLM = "vllm/vllm-openai:v0.32.0"
SGLANG = "lmsysorg/sglang:v0.5.23"
DYNAMO = "nvcr.io/nvidia/ai-dynamo/vllm-runtime:1.6.1"


def spec(image=VLLM, role=Role.SINGLE, **changes):
    facts = {
        "namespace": "team-a",
        "application": "app",
        "role": role,
        "model_path": "/models/m",
        "served_name": "qwen",
        "image": image,
    }
    return LaunchSpec(**{**facts, **changes})


def pairs(command):
    return {a: b for a, b in itertools.pairwise(command) if a.startswith("-")}


@pytest.mark.parametrize(
    ("image", "version"),
    [
        ("vllm/vllm-openai:v0.8.2", Version(0, 8, 2)),
        ("lmsysorg/sglang:v0.5.1.post1-cu126", Version(0, 5, 1)),
        ("rocm/vllm:rocm7.0.0_vllm_0.11.2_20251210", Version(0, 11, 2)),
        ("vllm/vllm-openai-cpu:v0.19.0-x86_64", Version(0, 19, 0)),
        ("registry:5000/vllm", None),
        ("vllm/vllm-openai:latest", None),
        ("vllm/vllm-openai@sha256:0123456789abcdef", None),
        ("registry.example:5000/team/vllm:v0.32.0@sha256:00", Version(0, 32, 0)),
    ],
)
def test_the_version_is_read_from_the_tag_alone(image, version):
    assert image_version(image) == version


def test_a_single_vllm_has_no_multi_node_options_and_no_shell():
    launch = vllm.launch(spec(tensor_parallel=2))
    assert launch.command[:3] == ("vllm", "serve", "/models/m")
    assert not {"--nnodes", "--headless", "--master-addr"} & set(launch.command)
    assert pairs(launch.command)["--tensor-parallel-size"] == "2"
    assert launch.serving_port == 8080


def test_vllm_over_two_nodes_starts_without_ray_and_only_the_leader_serves():
    leader = vllm.launch(spec(role=Role.LEADER, size=2, tensor_parallel=2))
    worker = vllm.launch(spec(role=Role.WORKER, size=2, tensor_parallel=2))
    for launch in (leader, worker):
        options = pairs(launch.command)
        assert options["--node-rank"] == "$(LWS_WORKER_INDEX)"
        assert options["--master-addr"] == "$(LWS_LEADER_ADDRESS)"
        assert "ray" not in " ".join(launch.command)
    assert "--headless" in worker.command
    assert "--headless" not in leader.command
    assert worker.serving_port is None
    assert worker.probes.readiness is None
    assert leader.probes.readiness["httpGet"]["path"] == "/health"


def test_an_old_vllm_over_two_nodes_starts_ray_and_the_users_text_never_meets_a_shell():
    evil = "x; touch /tmp/pwned $(id)"
    launch = vllm.launch(spec("vllm/vllm-openai:v0.8.2", Role.LEADER, size=2, args=("--served-model-name", evil)))
    assert launch.command[:2] == ("/bin/bash", "-c")
    assert evil not in launch.command[2]
    assert '"$@"' in launch.command[2]
    assert launch.command[-1] == evil
    assert "--shutdown-timeout" not in launch.command
    worker = vllm.launch(spec("vllm/vllm-openai:v0.8.2", Role.WORKER, size=2))
    assert worker.command[-1] == "--ray_address=$(LWS_LEADER_ADDRESS)"


def test_vllm_drains_inside_the_grace_period_so_that_no_open_stream_hangs():
    for grace in (None, 20, 60, 600):
        launch = vllm.launch(spec(grace_s=grace))
        drain = int(pairs(launch.command)["--shutdown-timeout"])
        sleep = int(launch.lifecycle["preStop"]["exec"]["command"][1])
        assert sleep + drain < launch.grace_s
        assert launch.grace_s == (grace or 330)
    assert stopping(0).lifecycle is None


def test_a_worker_stays_while_its_leader_drains():
    worker = vllm.launch(spec(role=Role.WORKER, size=2, tensor_parallel=2))
    script = worker.lifecycle["preStop"]["exec"]["command"][2]
    compile(script, "preStop", "exec")
    assert "LWS_LEADER_ADDRESS" in script
    assert "8080" in script


def test_the_users_port_is_the_port_of_probes_and_metrics():
    launch = vllm.launch(spec(args=("--port=9001",)))
    assert "8080" not in launch.command
    assert launch.probes.readiness["httpGet"]["port"] == launch.serving_port == launch.metrics_port == 9001


def test_the_users_model_replaces_ours_once():
    assert vllm.launch(spec(args=("--model", "/models/other"))).command[2:4] == ("/models/other", "--port")


def test_lora_adapters_are_served_under_their_own_names():
    command = vllm.launch(spec(lora=(LoraAdapter("sql", "/adapters/0"), LoraAdapter("law", "/adapters/1")))).command
    place = command.index("--lora-modules")
    assert command[place + 1 : place + 3] == ("sql=/adapters/0", "law=/adapters/1")
    assert "--enable-lora" in command


def test_nixl_roles_and_side_channel_of_prefill_and_decode():
    prefill = vllm.launch(spec(stage=Stage.PREFILL))
    config = json.loads(pairs(prefill.command)["--kv-transfer-config"])
    assert config == {"kv_connector": "NixlConnector", "kv_role": "kv_producer"}
    env = {item["name"]: item for item in prefill.env}
    assert env["VLLM_NIXL_SIDE_CHANNEL_HOST"]["valueFrom"]["fieldRef"]["fieldPath"] == "status.podIP"
    cpu = vllm.launch(spec(stage=Stage.DECODE, accelerator=Accelerator.CPU))
    assert json.loads(pairs(cpu.command)["--kv-transfer-config"])["kv_buffer_device"] == "cpu"
    old = vllm.launch(spec("vllm/vllm-openai:v0.11.0", stage=Stage.DECODE))
    assert json.loads(pairs(old.command)["--kv-transfer-config"])["kv_role"] == "kv_both"


def test_groups_that_the_engine_would_refuse_are_a_problem_and_no_crash_loop():
    (problem,) = vllm.launch(spec(role=Role.LEADER, size=2)).problems
    assert problem.blocking
    assert problem.field == "spec.tensorParallelSize"
    assert not vllm.launch(spec(role=Role.LEADER, size=2, args=("-tp", "4"))).problems
    assert not vllm.launch(spec(role=Role.LEADER, size=2, args=("-dp", "2"))).problems
    assert sglang.launch(spec(SGLANG, Role.LEADER, size=2)).problems
    assert not sglang.launch(spec(SGLANG, Role.LEADER, size=2, args=("--tp", "2"))).problems


def test_an_option_that_the_version_does_not_know_is_named():
    (problem,) = vllm.launch(spec(args=("--max-modle-len", "1"))).problems
    assert "--max-modle-len" in problem.message
    assert problem.field == "spec.runtimeCommonArgs"
    assert not vllm.launch(spec(args=("--max-modle-len", "1"), allow_unknown=True)).problems
    assert not vllm.launch(spec("registry/own:latest", args=("--max-modle-len", "1"))).problems
    assert not vllm.launch(spec("vllm/vllm-openai:v0.9.1", args=("--max-modle-len", "1"))).problems


@pytest.mark.parametrize(
    ("program", "version", "tokens"),
    [
        ("vllm", Version(0, 32, 0), ["--max_model_len", "1", "--hf-overrides.rope", "x", "--no-enable-prefix-caching"]),
        ("vllm", Version(0, 32, 0), ["--gpu-memory-util", "0.9", "-O3", "-tp", "2"]),
        ("sglang", Version(0, 5, 23), ["--tp", "2", "--mem-fraction-static=0.7", "--enable-metrics"]),
        ("sglang-router", Version(0, 3, 2), ["--policy", "random", "--prefill-policy", "bucket"]),
        ("dynamo-vllm", Version(1, 6, 1), ["--max-model-len", "1", "--disaggregation-mode", "prefill"]),
        ("dynamo-frontend", Version(1, 6, 1), ["--router-mode", "kv", "--http-port", "1"]),
    ],
)
def test_options_in_every_spelling_that_argparse_takes_are_known(program, version, tokens):
    assert unknown_options(program, version, tokens) == ()


def test_a_dynamo_worker_takes_its_engines_options_and_none_of_its_engines_server():
    worker = dynamo.launch(spec(DYNAMO, args=("--enable-auto-tool-choice", "--dyn-tool-call-parser", "hermes")))
    (problem,) = worker.problems
    assert "--enable-auto-tool-choice" in problem.message
    assert "--dyn-tool-call-parser" not in problem.message
    own = ("--max-num-seqs", "8", "--benchmark-prefill-granularity", "4")
    assert not dynamo.launch(spec(DYNAMO, args=own)).problems


def test_every_option_that_we_generate_is_known_to_the_release_that_we_default_to():
    for stage in Stage:
        for role, size in ((Role.SINGLE, 1), (Role.LEADER, 2), (Role.WORKER, 2)):
            facts = {"role": role, "size": size, "stage": stage, "tensor_parallel": 2, "pipeline_parallel": 1}
            lora = (LoraAdapter("a", "/a"),)
            for program, version, launch in (
                ("vllm", Version(0, 32, 0), vllm.launch(spec(VLLM, lora=lora, **facts))),
                ("sglang", Version(0, 5, 23), sglang.launch(spec(SGLANG, lora=lora, **facts))),
                ("dynamo-vllm", Version(1, 6, 1), dynamo.launch(spec(DYNAMO, lora=lora, **facts))),
                ("dynamo-sglang", Version(1, 6, 1), dynamo.launch(spec("x/sglang-runtime:1.6.1", **facts))),
            ):
                assert known_options(program, version)
                assert unknown_options(program, version, launch.command) == ()
    front = router.launch(router_spec())
    assert unknown_options("sglang-router", Version(0, 3, 2), front.command) == ()
    assert unknown_options("dynamo-frontend", Version(1, 6, 1), dynamo.frontend(spec(DYNAMO)).command) == ()


def test_sglang_tells_that_it_serves_by_its_cheap_endpoint_where_the_release_has_one():
    assert sglang.launch(spec(SGLANG)).probes.readiness["httpGet"]["path"] == "/ready"
    assert sglang.launch(spec("lmsysorg/sglang:v0.4.5-cu124")).probes.readiness["httpGet"]["path"] == "/health"


def test_sglang_metrics_are_on_once_also_when_the_user_asks_for_them():
    command = sglang.launch(spec(SGLANG, args=("--enable-metrics",))).command
    assert command.count("--enable-metrics") == 1


def test_sglang_prefill_tells_the_router_its_bootstrap_port():
    assert sglang.launch(spec(SGLANG, stage=Stage.PREFILL)).annotations == {"sglang.ai/bootstrap-port": "8998"}
    own = sglang.launch(spec(SGLANG, stage=Stage.PREFILL, args=("--disaggregation-bootstrap-port", "9998")))
    assert own.annotations["sglang.ai/bootstrap-port"] == "9998"
    assert not sglang.launch(spec(SGLANG, stage=Stage.DECODE)).annotations


def test_dynamo_finds_itself_by_the_users_etcd_the_cluster_or_a_shared_directory():
    def names(found):
        return {item["name"]: item.get("value") for item in found.env}

    alone = dynamo.launch(spec(DYNAMO))
    assert names(alone)["DYN_DISCOVERY_BACKEND"] == "file"
    (front,) = alone.sidecars
    assert {item["name"]: item.get("value") for item in front.env}["DYN_FILE_KV"] == alone.scratch[0][1]
    assert alone.serving_port == 8080
    cluster = dynamo.launch(spec(DYNAMO, cluster_discovery=True))
    assert names(cluster)["DYN_DISCOVERY_BACKEND"] == "kubernetes"
    assert not cluster.sidecars
    assert cluster.serving_port is None
    etcd = dynamo.launch(spec(DYNAMO, cluster_discovery=True, env_names=frozenset({"ETCD_ENDPOINTS"})))
    assert "DYN_DISCOVERY_BACKEND" not in names(etcd)


def test_a_dynamo_worker_is_ready_only_when_its_endpoint_is():
    launch = dynamo.launch(spec(DYNAMO))
    env = {item["name"]: item.get("value") for item in launch.env}
    assert json.loads(env["DYN_SYSTEM_USE_ENDPOINT_HEALTH_STATUS"]) == ["generate"]
    assert launch.probes.readiness["httpGet"] == {"path": "/health", "port": 9090}
    ready = dynamo.frontend(spec(DYNAMO)).probes.readiness["exec"]["command"]
    compile(ready[2], "probe", "exec")
    assert "/v1/models" in ready[2]


class Status(http.server.BaseHTTPRequestHandler):
    """A worker's status server, whose running requests end one by one as they are counted."""

    running = 0
    adapters: ClassVar[list] = []
    verdict = "success"

    def do_GET(self):
        page = ""
        if self.path == "/metrics":
            type(self).running -= 1
            page = f'dynamo_component_inflight_requests{{dynamo_endpoint="generate",worker_id="1"}} {self.running}\n'
        self._answer(page)

    def do_POST(self):
        assert (self.path, self.headers["Content-Type"]) == ("/v1/loras", "application/json")
        self.adapters.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self._answer(json.dumps({"status": self.verdict}))

    def _answer(self, text):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


def run_hook(hook):
    """Its exit status, against `Status`, without its pauses."""
    python, option, script = hook["exec"]["command"]
    assert (python, option) == ("python3", "-c")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Status) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        script = (
            script.replace("time.sleep(15)", "")
            .replace("time.sleep(1)", "pass")
            .replace("9090", str(server.server_port))
        )
        ended = subprocess.run([sys.executable, "-c", script], check=False, timeout=120, capture_output=True)
        server.shutdown()
    return ended.returncode


def test_a_dynamo_worker_hears_of_its_end_when_it_is_idle_for_it_aborts_what_runs():
    launch = dynamo.launch(spec(DYNAMO, grace_s=60))
    assert "time.sleep(15)\n" in launch.lifecycle["preStop"]["exec"]["command"][2]
    Status.running = 3
    assert run_hook(launch.lifecycle["preStop"]) == 0
    assert Status.running == 0
    (front,) = launch.sidecars
    drain = {item["name"]: item.get("value") for item in front.env}["DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS"]
    assert int(drain) == 30
    assert 15 + int(drain) < launch.grace_s
    assert front.lifecycle == {"preStop": {"exec": {"command": ["sleep", "15"]}}}
    assert dynamo.launch(spec(DYNAMO, grace_s=0)).lifecycle is None


@pytest.mark.parametrize(("verdict", "status"), [("success", 0), ("error", 1)])
def test_a_dynamo_worker_is_asked_to_load_its_adapters_before_it_is_ready(verdict, status):
    launch = dynamo.launch(
        spec(DYNAMO, lora=(LoraAdapter("sql", "/adapters/it's 0"), LoraAdapter("law", "/adapters/1")))
    )
    Status.adapters, Status.verdict = [], verdict
    assert run_hook(launch.lifecycle["postStart"]) == status
    asked = [(each["lora_name"], each["source"]["uri"]) for each in Status.adapters]
    assert asked == [("sql", "file:///adapters/it's 0"), ("law", "file:///adapters/1")][: 2 - status]
    assert {"name": "DYN_LORA_ENABLED", "value": "true"} in launch.env
    assert "--enable-lora" in launch.command
    assert "postStart" not in dynamo.launch(spec(DYNAMO)).lifecycle


def test_a_dynamo_worker_in_the_users_discovery_leaves_it_first_and_then_drains():
    launch = dynamo.launch(spec(DYNAMO, grace_s=60, env_names=frozenset({"ETCD_ENDPOINTS"})))
    env = {item["name"]: item.get("value") for item in launch.env}
    assert launch.lifecycle is None
    assert int(env["DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS"]) == 30
    assert "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS" not in {item["name"] for item in dynamo.launch(spec(DYNAMO)).env}


def test_dynamo_gives_the_frontends_options_to_the_frontend():
    args = ("--router-mode", "kv", "--max-model-len", "4096", "--migration-limit", "3")
    worker, front = dynamo.split_arguments(args)
    assert worker == ("--max-model-len", "4096")
    assert front == ("--router-mode", "kv", "--migration-limit", "3")


def test_dynamo_prefill_and_decode_need_a_discovery_that_spans_pods():
    assert any(p.reason == "DynamoDiscoveryMissing" for p in dynamo.launch(spec(DYNAMO, stage=Stage.DECODE)).problems)
    assert not dynamo.launch(spec(DYNAMO, stage=Stage.DECODE, cluster_discovery=True)).problems


def router_spec(runtime="sglang", **changes):
    facts = {
        "engine": spec(SGLANG if runtime == "sglang" else DYNAMO),
        "runtime": runtime,
        "port": 9000,
        "metrics_port": 9091,
        "args": (),
        "prefill_selector": {"b": "2", "a": "1"},
        "decode_selector": {"a": "1"},
    }
    return router.RouterSpec(**{**facts, **changes})


def test_the_routers_port_reaches_its_command_and_its_probes():
    launch = router.launch(router_spec())
    assert pairs(launch.command)["--port"] == "9000"
    assert launch.probes.readiness["httpGet"] == {"path": "/readiness", "port": 9000}
    place = launch.command.index("--prefill-selector")
    assert launch.command[place + 1 : place + 3] == ("a=1", "b=2")
    assert pairs(launch.command)["--policy"] == "cache_aware"
    own = router.launch(router_spec(args=("--policy", "random", "--port", "7000")))
    assert own.command.count("--policy") == 1
    assert own.probes.readiness["httpGet"]["port"] == 7000


def test_an_option_of_vllms_router_is_judged_by_the_tag_of_its_image_and_keeps_its_own_name():
    def vllms(*args, image="registry/vllm-router:v0.1.17"):
        return router.launch(router_spec("vllm", engine=spec(image), args=args))

    own = vllms("--router-policy", "kv_aware", "--router-temperature=0.5")
    assert own.command[-3:] == ("--policy", "kv_aware", "--router-temperature=0.5")
    assert not own.problems
    (problem,) = vllms("--polcy", "random").problems
    assert (problem.field, "--polcy" in problem.message) == ("spec.router.routerArgs", True)
    assert not vllms("--polcy", "random", image="registry/vllm-router:main").problems
    known = Version(0, 1, 17)
    assert known_options("vllm-router", known)
    assert unknown_options("vllm-router", known, vllms().command) == ()


def test_vllms_router_and_dynamos_frontend_stand_in_the_same_place():
    assert router.launch(router_spec("vllm")).command[:2] == ("vllm-router", "--vllm-pd-disaggregation")
    front = router.launch(router_spec("dynamo"))
    assert pairs(front.command)["--http-port"] == "9000"


@pytest.mark.parametrize(
    ("instance", "annotations", "kind"),
    [
        ({"resources": {"limits": {"amd.com/gpu": "8"}}}, {}, Accelerator.AMD),
        ({"resources": {"requests": {"nvidia.com/gpu": "1", "cpu": "4"}}}, {}, Accelerator.NVIDIA),
        ({"resources": {"limits": {"cpu": "4", "memory": "8Gi"}}}, {}, Accelerator.CPU),
        ({"resources": {"limits": {"cpu": "4"}}, "runtimeClassName": "nvidia"}, {}, Accelerator.NVIDIA),
        ({"nodeSelector": {"amd.com/gpu.family": "AI"}}, {}, Accelerator.AMD),
        ({}, {}, Accelerator.NVIDIA),
        ({}, {"arks.ai/accelerator": "cpu"}, Accelerator.CPU),
    ],
)
def test_hardware_is_read_from_resources_and_node_selection(instance, annotations, kind):
    assert accelerator_of(instance, annotations) is kind


def test_images_come_from_the_resource_then_the_environment_then_our_default():
    env = {"ARKS_RUNTIME_DEFAULT_VLLM_IMAGE": "mine:1"}
    assert runtime_image("vllm", Accelerator.NVIDIA, given="his:2", environment=env) == ("his:2", None)
    assert runtime_image("vllm", Accelerator.NVIDIA, given="", environment=env) == ("mine:1", None)
    assert "rocm" in runtime_image("vllm", Accelerator.AMD, given="", environment=env)[0]
    image, problem = runtime_image("dynamo", Accelerator.AMD, given="", environment={})
    assert (image, problem.reason) == ("", "NoImageForAccelerator")
    shared = {"ARKS_DEFAULT_SGLANG_IMAGE": "pd:1"}
    found = runtime_image("sglang", Accelerator.NVIDIA, given="", environment=shared, disaggregated=True)
    assert found[0] == "pd:1"
    assert router_image("sglang", given="", engine_image="", environment=shared)[0] == "pd:1"
    assert router_image("vllm", given="", engine_image="", environment={})[1].reason == "RouterImageMissing"


def test_runtime_names_are_case_sensitive_and_refused_in_arks_words():
    assert unsupported("vLLM").reason == "RuntimeNotSupport"
    assert all(unsupported(name) is None for name in ENGINES)
