"""Dynamo: a frontend that speaks HTTP, and workers that hold vLLM or SGLang.

``dynamo run`` is gone; ``python3 -m dynamo.frontend`` and ``python3 -m dynamo.vllm|sglang`` are what starts.
They find each other in one of three ways, tried in this order:

* the user's own (``ETCD_ENDPOINTS`` or ``DYN_DISCOVERY_BACKEND`` in their environment);
* the cluster's, where Dynamo's ``DynamoWorkerMetadata`` is served: frontends are a Deployment, workers a group;
* none: each leader pod carries its own frontend beside the engine, and the two meet in a shared directory.

A frontend is healthy without any worker, so its readiness asks whether a model is listed. A worker's status
server tells nothing until ``DYN_SYSTEM_USE_ENDPOINT_HEALTH_STATUS`` names its endpoint.

A worker that is told to stop leaves the discovery at once, and five seconds later aborts whatever it still computes
(seen with ``dynamo.vllm`` 1.6.1; the mocker waits instead). So it is told only when it is idle: a pre-stop hook waits
until Kubernetes has taken the pod out of the endpoints and the last request is done. A discovery of the user's own
knows nothing of Kubernetes' endpoints: there the signal must come first, and the five seconds become the drain time.

Adapters are no option of the worker over vLLM: it loads them when asked, which a post-start hook does.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence

from controller.engines import sglang, vllm
from controller.engines.arguments import Option, is_flag, merge, option_name
from controller.engines.known import option_problems
from controller.engines.model import (
    SERVING_PORT,
    Launch,
    LaunchSpec,
    MetricNames,
    Probes,
    Problem,
    Sidecar,
    Stage,
    field_env,
    http_probe,
)
from controller.engines.stopping import Stopping, stopping

SYSTEM_PORT = 9090
START_S = 7200
MIGRATIONS = 3
"""of a request, at most; within a rolling update its next worker may leave, too"""
DISCOVERY_DIRECTORY = "/run/arks-dynamo"
FRONTEND_METRICS = MetricNames(
    running="dynamo_frontend_inflight_requests",
    waiting="dynamo_frontend_queued_requests",
    ttft_seconds="dynamo_frontend_time_to_first_token_seconds",
    itl_seconds="dynamo_frontend_inter_token_latency_seconds",
)
# Options of the frontend that a user writes among the worker's.
_FRONTEND_PREFIXES = ("router-", "http-", "migration-", "kserve-", "enable-anthropic-api")
_MODEL_LISTED = (
    "import json,sys,urllib.request as r;"
    "sys.exit(0 if json.load(r.urlopen('http://127.0.0.1:%d/v1/models',timeout=4))['data'] else 1)"
)
# While requests run, wait; a worker that does not answer ends the wait.
_UNTIL_IDLE = (
    "import re,time,urllib.request as r\n"
    "time.sleep({leave_s})\n"
    "end=time.monotonic()+{drain_s}\n"
    "while time.monotonic()<end:\n"
    " page=r.urlopen('http://127.0.0.1:{port}/metrics',timeout=5).read().decode()\n"
    " if not any(map(float,re.findall('inflight_requests.*\"generate\".* (.+)',page))):\n"
    "  break\n"
    " time.sleep(1)\n"
)
# Before the startup probe is asked for the first time; a worker that cannot load an adapter is started anew.
_LOAD_ADAPTERS = (
    "import json,time,urllib.request as r\n"
    "worker='http://127.0.0.1:{port}'\n"
    "end=time.monotonic()+{start_s}\n"
    "while time.monotonic()<end:\n"
    " try:\n"
    "  r.urlopen(worker+'/health',timeout=5)\n"
    "  break\n"
    " except OSError:\n"
    "  time.sleep(1)\n"
    "for asked in {requests}:\n"
    " q=r.Request(worker+'/v1/loras',json.dumps(asked).encode(),{{'Content-Type':'application/json'}})\n"
    " answer=json.load(r.urlopen(q,timeout=600))\n"
    " assert answer['status']=='success',answer\n"
)


class Discovery(enum.StrEnum):
    USER = "user"
    CLUSTER = "cluster"
    POD = "pod"


def discovery(spec: LaunchSpec) -> Discovery:
    if spec.env_names & {"ETCD_ENDPOINTS", "DYN_DISCOVERY_BACKEND"}:
        return Discovery.USER
    return Discovery.CLUSTER if spec.cluster_discovery else Discovery.POD


def backend(spec: LaunchSpec) -> str:
    """Which engine an image holds: its name says (``sglang-runtime``, ``vllm-runtime``), vLLM otherwise."""
    return "sglang" if "sglang" in spec.image else "vllm"


def dynamo_namespace(spec: LaunchSpec) -> str:
    """One Dynamo namespace per application: two applications on one etcd must not mix."""
    return f"{spec.namespace}-{spec.application}"


def split_arguments(tokens: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(the workers', the frontend's): an option carries its values along."""
    mine: list[str] = []
    theirs: list[str] = []
    target = mine
    for token in tokens:
        if is_flag(token):
            target = theirs if option_name(token, {}).startswith(_FRONTEND_PREFIXES) else mine
        target.append(token)
    return tuple(mine), tuple(theirs)


def _environment(spec: LaunchSpec, *names: Mapping[str, object]) -> tuple[Mapping[str, object], ...]:
    shared: list[Mapping[str, object]] = [{"name": "DYN_NAMESPACE", "value": dynamo_namespace(spec)}]
    match discovery(spec):
        case Discovery.CLUSTER:
            shared += [
                {"name": "DYN_DISCOVERY_BACKEND", "value": "kubernetes"},
                field_env("POD_NAME", "metadata.name"),
                field_env("POD_NAMESPACE", "metadata.namespace"),
                field_env("POD_UID", "metadata.uid"),
            ]
        case Discovery.POD:
            shared += [
                {"name": "DYN_DISCOVERY_BACKEND", "value": "file"},
                {"name": "DYN_FILE_KV", "value": DISCOVERY_DIRECTORY},
            ]
        case Discovery.USER:
            pass
    return (*shared, field_env("POD_IP", "status.podIP"), *names)


def _frontend_probes(port: int) -> Probes:
    listed = {"exec": {"command": ["python3", "-c", _MODEL_LISTED % port]}}
    return Probes(
        startup=http_probe("/live", port, period_s=5, timeout_s=5, failures=60),
        readiness={**listed, "periodSeconds": 5, "timeoutSeconds": 6, "failureThreshold": 2},
        liveness=http_probe("/live", port, period_s=10, timeout_s=5, failures=6),
    )


def frontend(spec: LaunchSpec, *, port: int = SERVING_PORT, args: Sequence[str] = ()) -> Launch:
    """The HTTP side. ``args`` are the router's own where the resource has them apart from the workers'."""
    given = (*split_arguments(spec.args)[1], *args)
    command = ("python3", "-m", "dynamo.frontend", *merge([("--http-port", str(port))], given, {}))
    stop = stopping(spec.grace_s)
    problems = () if spec.allow_unknown else option_problems("dynamo-frontend", spec.version, given, spec.args_field)
    # Told to stop, it refuses what is new and finishes what runs, for 5 s unless it is given more.
    drain = {"name": "DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS", "value": str(stop.drain_s)}
    # A request that was just on its way to a worker that leaves goes to another one; without this it fails with 503.
    again = {"name": "DYN_MIGRATION_LIMIT", "value": str(MIGRATIONS)}
    return Launch(
        command,
        env=_environment(spec, drain, again),
        ports=(("http", port),),
        probes=_frontend_probes(port),
        lifecycle=stop.lifecycle,
        grace_s=stop.grace_s,
        metrics_port=port,
        metrics=FRONTEND_METRICS,
        problems=problems,
    )


def _worker_options(spec: LaunchSpec) -> tuple[list[Option], Mapping[str, str]]:
    if backend(spec) == "sglang":
        return sglang.engine_options(spec), sglang.ALIASES
    options: list[Option] = [("--model", spec.model_path), *vllm.engine_options(spec)]
    if spec.stage is not Stage.WHOLE:
        options.append(("--disaggregation-mode", spec.stage.value))
    if spec.lora:
        options.append(("--enable-lora",))
    return options, vllm.ALIASES


def _worker_probes() -> Probes:
    return Probes(
        startup=http_probe("/live", SYSTEM_PORT, period_s=10, timeout_s=5, failures=START_S // 10),
        readiness=http_probe("/health", SYSTEM_PORT, period_s=10, timeout_s=5, failures=3),
        liveness=http_probe("/live", SYSTEM_PORT, period_s=10, timeout_s=5, failures=6),
    )


def _lifecycle(spec: LaunchSpec, stop: Stopping) -> Mapping[str, object] | None:
    """The worker's hooks."""
    hooks: dict[str, object] = {}
    if spec.lora and backend(spec) == "vllm":
        asked = [{"lora_name": each.name, "source": {"uri": f"file://{each.path}"}} for each in spec.lora]
        hooks["postStart"] = _python(_LOAD_ADAPTERS.format(port=SYSTEM_PORT, start_s=START_S, requests=asked))
    if stop.leave_s and discovery(spec) is not Discovery.USER:
        hooks["preStop"] = _python(_UNTIL_IDLE.format(leave_s=stop.leave_s, drain_s=stop.drain_s, port=SYSTEM_PORT))
    return hooks or None


def _python(script: str) -> dict[str, object]:
    return {"exec": {"command": ["python3", "-c", script]}}


def _problems(spec: LaunchSpec, args: Sequence[str]) -> tuple[Problem, ...]:
    problems: tuple[Problem, ...] = ()
    if not spec.allow_unknown:
        problems = option_problems(f"dynamo-{backend(spec)}", spec.version, args, spec.args_field)
    problems += vllm.parallelism_problems(spec) if backend(spec) == "vllm" else sglang.group_problems(spec)
    if spec.stage is not Stage.WHOLE and discovery(spec) is Discovery.POD:
        problems += (
            Problem(
                "DynamoDiscoveryMissing",
                "spec.runtime",
                "prefill and decode pods of Dynamo find each other through DynamoWorkerMetadata "
                "(nvidia.com/v1alpha1), which this cluster does not serve, or through ETCD_ENDPOINTS in "
                "instanceSpec.env, which is not set",
            ),
        )
    return problems


def launch(spec: LaunchSpec) -> Launch:
    """A worker; in a cluster without discovery, the leader's pod gets its own frontend as a sidecar."""
    mine, _ = split_arguments(spec.args)
    stop = stopping(spec.grace_s)
    options, aliases = _worker_options(spec)
    command = ("python3", "-m", f"dynamo.{backend(spec)}", *merge(options, mine, aliases))
    env = (*vllm.rank_env(spec), *(vllm.transfer_env(spec) if backend(spec) == "vllm" else ()))
    metrics = sglang.METRICS if backend(spec) == "sglang" else vllm.METRICS
    if spec.headless:
        return Launch(
            command,
            env=(*_environment(spec), *env),
            lifecycle=stop.follow(spec.group.leader_address, SYSTEM_PORT),
            grace_s=stop.grace_s,
            metrics=metrics,
        )
    status: tuple[Mapping[str, object], ...] = (
        {"name": "DYN_SYSTEM_PORT", "value": str(SYSTEM_PORT)},
        {"name": "DYN_SYSTEM_HOST", "value": "0.0.0.0"},
        {"name": "DYN_SYSTEM_USE_ENDPOINT_HEALTH_STATUS", "value": '["generate"]'},
    )
    if spec.lora:
        status += ({"name": "DYN_LORA_ENABLED", "value": "true"},)
    if discovery(spec) is Discovery.USER:
        status += ({"name": "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS", "value": str(stop.drain_s)},)
    sidecars: tuple[Sidecar, ...] = ()
    alone = discovery(spec) is Discovery.POD and spec.stage is Stage.WHOLE
    if alone:
        front = frontend(spec)
        sidecars = (Sidecar("frontend", front.command, front.env, front.ports, front.probes, front.lifecycle),)
    return Launch(
        command,
        env=_environment(spec, *status, *env),
        ports=(("system", SYSTEM_PORT),),
        probes=_worker_probes(),
        lifecycle=_lifecycle(spec, stop),
        grace_s=stop.grace_s,
        metrics_port=SYSTEM_PORT,
        metrics=metrics,
        sidecars=sidecars,
        scratch=(("arks-dynamo", DISCOVERY_DIRECTORY),) if discovery(spec) is Discovery.POD else (),
        problems=_problems(spec, mine) + (frontend(spec).problems if alone else ()),
    )
