"""vLLM: one server per group, on one node or several.

Since 0.12 several nodes run ``vllm serve`` each with its rank and no Ray; ranks above 0 are headless: no
HTTP, so no probes and no traffic. Older images (a user's pin, e.g. v0.8.2) need the Ray script that their
image carries; it is run by a constant shell line which takes our argument list as ``"$@"``, so nothing of
the user's is ever parsed by a shell. The HTTP port opens when the model is loaded, ``/health`` then tells.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from controller.engines.arguments import Option, merge, option_value, positive_int, without_option
from controller.engines.known import option_problems
from controller.engines.model import (
    SERVING_PORT,
    Accelerator,
    Launch,
    LaunchSpec,
    MetricNames,
    Probes,
    Problem,
    Stage,
    field_env,
    http_probe,
)
from controller.engines.stopping import stopping
from controller.engines.version import at_least

MASTER_PORT = 29501
NIXL_PORT = 5600
ALIASES = {
    "tp": "tensor-parallel-size",
    "tp-size": "tensor-parallel-size",
    "pp": "pipeline-parallel-size",
    "pp-size": "pipeline-parallel-size",
    "dp": "data-parallel-size",
    "n": "nnodes",
    "r": "node-rank",
    "model-path": "model",
}
METRICS = MetricNames(
    running="vllm:num_requests_running",
    waiting="vllm:num_requests_waiting",
    kv_usage="vllm:kv_cache_usage_perc",
    ttft_seconds="vllm:time_to_first_token_seconds",
    itl_seconds="vllm:inter_token_latency_seconds",
    prompt_tokens="vllm:prompt_tokens_total",
    generation_tokens="vllm:generation_tokens_total",
)
_RAY_SCRIPT = "/vllm-workspace/examples/online_serving/multi-node-serving.sh"
_RAY_LEADER = f'/bin/bash {_RAY_SCRIPT} leader --ray_cluster_size="$0" && exec "$@"'


def probes(port: int) -> Probes:
    """Weights of hundreds of gigabytes may load for two hours; after that, dead means dead within a minute."""
    return Probes(
        startup=http_probe("/health", port, period_s=10, timeout_s=5, failures=720),
        readiness=http_probe("/health", port, period_s=5, timeout_s=5, failures=3),
        liveness=http_probe("/health", port, period_s=10, timeout_s=10, failures=6),
    )


def engine_options(spec: LaunchSpec) -> list[Option]:
    """Options that the vLLM engine takes wherever it runs: under its own server or under Dynamo."""
    options: list[Option] = [("--served-model-name", spec.served_name)]
    if spec.tensor_parallel > 0:
        options.append(("--tensor-parallel-size", str(spec.tensor_parallel)))
    if spec.pipeline_parallel > 0:
        options.append(("--pipeline-parallel-size", str(spec.pipeline_parallel)))
    if spec.size > 1:
        options += [
            ("--nnodes", str(spec.size)),
            ("--node-rank", f"$({spec.group.rank})"),
            ("--master-addr", f"$({spec.group.leader_address})"),
            ("--master-port", str(MASTER_PORT)),
        ]
        if spec.headless:
            options.append(("--headless",))
    if spec.stage is not Stage.WHOLE:
        options.append(("--kv-transfer-config", transfer_config(spec)))
    return options


def transfer_config(spec: LaunchSpec) -> str:
    """NIXL between prefill and decode; ``kv_both`` is how it was said before roles were told apart."""
    role = "kv_producer" if spec.stage is Stage.PREFILL else "kv_consumer"
    config = {"kv_connector": "NixlConnector", "kv_role": role if at_least(spec.version, 0, 20) else "kv_both"}
    if spec.accelerator is Accelerator.CPU:
        config["kv_buffer_device"] = "cpu"
    return json.dumps(config, separators=(",", ":"))


def transfer_env(spec: LaunchSpec) -> tuple[Mapping[str, object], ...]:
    if spec.stage is Stage.WHOLE:
        return ()
    return (
        field_env("VLLM_NIXL_SIDE_CHANNEL_HOST", "status.podIP"),
        {"name": "VLLM_NIXL_SIDE_CHANNEL_PORT", "value": str(NIXL_PORT)},
    )


def rank_env(spec: LaunchSpec) -> tuple[Mapping[str, object], ...]:
    """Releases of LWS before 0.6 inject no worker index; the label is on every pod of every release."""
    if spec.size < 2 or spec.group.rank_label is None:
        return ()
    return (field_env(spec.group.rank, f"metadata.labels['{spec.group.rank_label}']"),)


def parallelism_problems(
    spec: LaunchSpec,
    aliases: Mapping[str, str] = ALIASES,
    names: tuple[str, str, str] = ("tensor-parallel-size", "pipeline-parallel-size", "data-parallel-size"),
) -> tuple[Problem, ...]:
    """World size must be a multiple of the pods: engines assert it, in a crash loop.

    ``names`` are the engine's canonical option names for tensor, pipeline and data parallelism.
    """
    if spec.size < 2 or option_value(spec.args, names[2], aliases) is not None:
        return ()
    tensor = positive_int(option_value(spec.args, names[0], aliases)) or max(1, spec.tensor_parallel)
    pipe = positive_int(option_value(spec.args, names[1], aliases)) or max(1, spec.pipeline_parallel)
    if (tensor * pipe) % spec.size == 0:
        return ()
    return (
        Problem(
            "ParallelismDoesNotFillGroup",
            "spec.tensorParallelSize" if spec.stage is Stage.WHOLE else spec.args_field,
            f"tensor parallel {tensor} x pipeline parallel {pipe} cannot be shared out over {spec.size} pods; "
            "make the product a multiple of the size",
        ),
    )


def launch(spec: LaunchSpec) -> Launch:
    """The whole of a vLLM container."""
    stop = stopping(spec.grace_s)
    old = spec.size > 1 and not at_least(spec.version, 0, 12)
    model = option_value(spec.args, "model", ALIASES) or spec.model_path
    args = without_option(spec.args, "model", ALIASES)
    problems = option_problems("vllm", spec.version, args, spec.args_field) if not spec.allow_unknown else ()
    env = (*rank_env(spec), *transfer_env(spec))
    port = positive_int(option_value(args, "port", ALIASES)) or SERVING_PORT
    if old and spec.headless:
        command: tuple[str, ...] = ("/bin/bash", _RAY_SCRIPT, "worker", f"--ray_address=$({spec.group.leader_address})")
        return Launch(
            command,
            env=env,
            lifecycle=stop.follow(spec.group.leader_address, port),
            grace_s=stop.grace_s,
            metrics=METRICS,
            problems=problems,
        )
    options: list[Option] = []
    if not spec.headless:
        options.append(("--port", str(SERVING_PORT)))
        if at_least(spec.version, 0, 18):
            options.append(("--shutdown-timeout", str(stop.drain_s)))
        if spec.lora:
            options.append(("--enable-lora",))
            options.append(("--lora-modules", *(f"{adapter.name}={adapter.path}" for adapter in spec.lora)))
    multi_node = {"nnodes", "node-rank", "master-addr", "master-port", "headless"}
    engine = engine_options(spec)
    options += [option for option in engine if not old or option[0].removeprefix("--") not in multi_node]
    if old and option_value(args, "distributed-executor-backend", ALIASES) is None:
        options.append(("--distributed-executor-backend", "ray"))
    command = ("vllm", "serve", model, *merge(options, args, ALIASES))
    if old:
        command = ("/bin/bash", "-c", _RAY_LEADER, str(spec.size), *command)
    else:
        problems += parallelism_problems(spec)
    if spec.headless:
        return Launch(
            command,
            env=env,
            lifecycle=stop.follow(spec.group.leader_address, port),
            grace_s=stop.grace_s,
            metrics=METRICS,
            problems=problems,
        )
    return Launch(
        command,
        env=env,
        ports=(("http", port),),
        probes=probes(port),
        lifecycle=stop.lifecycle,
        grace_s=stop.grace_s,
        metrics_port=port,
        metrics=METRICS,
        problems=problems,
    )
