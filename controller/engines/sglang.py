"""SGLang: one server per group; every node runs the same program with its rank, rank 0 alone speaks HTTP.

The port opens long before the model serves, so only the readiness endpoint tells: ``/ready`` (cheap) where
the release has it, ``/health`` (generates a token when idle) before. SGLang drains its running requests on
SIGTERM by itself and answers its health check with 503 meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping

from controller.engines.arguments import Option, merge, option_value, positive_int
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
    http_probe,
)
from controller.engines.stopping import stopping
from controller.engines.version import at_least
from controller.engines.vllm import parallelism_problems, rank_env

RENDEZVOUS_PORT = 20000
BOOTSTRAP_PORT = 8998
BOOTSTRAP_ANNOTATION = "sglang.ai/bootstrap-port"
ALIASES = {
    "tp": "tp-size",
    "tensor-parallel-size": "tp-size",
    "pp": "pp-size",
    "pipeline-parallel-size": "pp-size",
    "dp": "dp-size",
    "data-parallel-size": "dp-size",
    "model": "model-path",
    "nccl-init-addr": "dist-init-addr",
    "mem-fraction": "mem-fraction-static",
}
METRICS = MetricNames(
    running="sglang:num_running_reqs",
    waiting="sglang:num_queue_reqs",
    kv_usage="sglang:token_usage",
    ttft_seconds="sglang:time_to_first_token_seconds",
    itl_seconds="sglang:inter_token_latency_seconds",
    prompt_tokens="sglang:prompt_tokens_total",
    generation_tokens="sglang:generation_tokens_total",
    loads_path="/v1/loads",
)


def probes(spec: LaunchSpec, port: int) -> Probes:
    """Liveness asks the one endpoint that needs a living scheduler, patiently: a busy one answers late."""
    ready = "/ready" if at_least(spec.version, 0, 5, 23) else "/health"
    return Probes(
        startup=http_probe(ready, port, period_s=10, timeout_s=10, failures=720),
        readiness=http_probe(ready, port, period_s=5, timeout_s=5, failures=3),
        liveness=http_probe("/health", port, period_s=30, timeout_s=25, failures=5),
    )


def engine_options(spec: LaunchSpec) -> list[Option]:
    """Options that the SGLang engine takes wherever it runs: under its own server or under Dynamo."""
    options: list[Option] = [
        ("--model-path", spec.model_path),
        ("--served-model-name", spec.served_name),
        ("--trust-remote-code",),
    ]
    if spec.tensor_parallel > 0:
        options.append(("--tp-size", str(spec.tensor_parallel)))
    if spec.pipeline_parallel > 0:
        options.append(("--pp-size", str(spec.pipeline_parallel)))
    if spec.size > 1:
        options += [
            ("--dist-init-addr", f"$({spec.group.leader_address}):{RENDEZVOUS_PORT}"),
            ("--nnodes", str(spec.size)),
            ("--node-rank", f"$({spec.group.rank})"),
        ]
    if spec.accelerator is Accelerator.CPU:
        options.append(("--device", "cpu"))
    if spec.stage is not Stage.WHOLE:
        options.append(("--disaggregation-mode", spec.stage.value))
    if spec.lora:
        options.append(("--enable-lora",))
        options.append(("--lora-paths", *(f"{adapter.name}={adapter.path}" for adapter in spec.lora)))
    return options


def group_problems(spec: LaunchSpec) -> tuple[Problem, ...]:
    return parallelism_problems(spec, ALIASES, ("tp-size", "pp-size", "dp-size"))


def bootstrap_annotation(spec: LaunchSpec) -> Mapping[str, str]:
    """Tells the router where prefill pods meet decode pods; without it the router guesses."""
    if spec.stage is not Stage.PREFILL or spec.headless:
        return {}
    port = positive_int(option_value(spec.args, "disaggregation-bootstrap-port", ALIASES)) or BOOTSTRAP_PORT
    return {BOOTSTRAP_ANNOTATION: str(port)}


def launch(spec: LaunchSpec) -> Launch:
    """The whole of an SGLang container."""
    stop = stopping(spec.grace_s)
    options = engine_options(spec)
    if not spec.headless:
        options += [("--host", "0.0.0.0"), ("--port", str(SERVING_PORT))]
    options.append(("--enable-metrics",))
    command = ("python3", "-m", "sglang.launch_server", *merge(options, spec.args, ALIASES))
    problems = () if spec.allow_unknown else option_problems("sglang", spec.version, spec.args, spec.args_field)
    problems += group_problems(spec)
    env = list(rank_env(spec))
    if spec.accelerator is Accelerator.CPU:
        env.append({"name": "SGLANG_USE_CPU_ENGINE", "value": "1"})
    port = positive_int(option_value(spec.args, "port", ALIASES)) or SERVING_PORT
    if spec.headless:
        return Launch(
            command,
            env=tuple(env),
            lifecycle=stop.follow(spec.group.leader_address, port),
            grace_s=stop.grace_s,
            metrics=METRICS,
            problems=problems,
        )
    return Launch(
        command,
        env=tuple(env),
        ports=(("http", port),),
        probes=probes(spec, port),
        lifecycle=stop.lifecycle,
        grace_s=stop.grace_s,
        metrics_port=port,
        metrics=METRICS,
        annotations=bootstrap_annotation(spec),
        problems=problems,
    )
