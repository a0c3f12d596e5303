"""The router in front of prefill and decode pods: SGLang's, vLLM's, or Dynamo's frontend.

SGLang's and vLLM's routers find their workers by pod labels, so they watch pods (a Role of their own) and
are told the selectors of leaders only. Both serve ``/readiness`` and ``/liveness``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from controller.engines import dynamo
from controller.engines.arguments import Option, merge, option_value, positive_int
from controller.engines.known import option_problems
from controller.engines.model import SERVING_PORT, Launch, LaunchSpec, MetricNames, Probes, Problem, http_probe
from controller.engines.stopping import stopping
from controller.engines.version import Version

DEFAULT_PORT = 8080
DEFAULT_METRICS_PORT = 9090
_SGLANG = ("sglang-router", Version(0, 3, 2))


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """``engine`` carries the facts that the router shares with its workers (image, namespace, names)."""

    engine: LaunchSpec
    runtime: str
    port: int
    metrics_port: int
    args: tuple[str, ...]
    prefill_selector: Mapping[str, str]
    decode_selector: Mapping[str, str]


def needs_pod_access(runtime: str) -> bool:
    return runtime in ("sglang", "vllm")


def _selector(labels: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(f"{key}={labels[key]}" for key in sorted(labels))


def _probes(port: int) -> Probes:
    return Probes(
        startup=http_probe("/liveness", port, period_s=5, timeout_s=3, failures=60),
        readiness=http_probe("/readiness", port, period_s=5, timeout_s=3, failures=3),
        liveness=http_probe("/liveness", port, period_s=10, timeout_s=5, failures=6),
    )


def _router_problems(spec: RouterSpec) -> tuple[Problem, ...]:
    if spec.engine.allow_unknown:
        return ()
    # vLLM's router has an image of its own, whose tag tells; SGLang's is in the engine's.
    program, version = ("vllm-router", spec.engine.version) if spec.runtime == "vllm" else _SGLANG
    return option_problems(program, version, _plain(spec.args), "spec.router.routerArgs")


def _plain(tokens: Sequence[str]) -> tuple[str, ...]:
    """SGLang's launcher takes every option of its router with or without ``--router-`` before it, vLLM's without."""
    return tuple(
        f"--{token.removeprefix('--router-')}" if token.startswith("--router-") and not _own(token) else token
        for token in tokens
    )


def _own(token: str) -> bool:
    """Is ``router-`` a part of the option's own name?"""
    return token.split("=", 1)[0] == "--router-temperature"


def launch(spec: RouterSpec) -> Launch:
    if spec.runtime == "dynamo":
        return dynamo.frontend(spec.engine, port=spec.port, args=spec.args)
    stop = stopping(spec.engine.grace_s)
    options: list[Option] = [
        ("--service-discovery",),
        ("--service-discovery-port", str(SERVING_PORT)),
        ("--service-discovery-namespace", spec.engine.namespace),
        ("--host", "0.0.0.0"),
        ("--port", str(spec.port)),
        ("--prefill-selector", *_selector(spec.prefill_selector)),
        ("--decode-selector", *_selector(spec.decode_selector)),
        ("--prometheus-host", "0.0.0.0"),
        ("--prometheus-port", str(spec.metrics_port)),
    ]
    if spec.runtime == "vllm":
        program: tuple[str, ...] = ("vllm-router",)
        options.insert(0, ("--vllm-pd-disaggregation",))
    else:
        program = ("python3", "-m", "sglang_router.launch_router")
        options.insert(0, ("--pd-disaggregation",))
    given = _plain(spec.args)
    policies = {"prefill-policy", "decode-policy"}
    if not any(option_value(given, name, {}) is not None for name in policies):
        options.append(("--policy", "cache_aware"))
    port = positive_int(option_value(given, "port", {})) or spec.port
    metrics_port = positive_int(option_value(given, "prometheus-port", {})) or spec.metrics_port
    return Launch(
        (*program, *merge(options, given, {})),
        ports=(("http", port), ("metrics", metrics_port)),
        probes=_probes(port),
        lifecycle=stop.lifecycle,
        grace_s=stop.grace_s,
        metrics_port=metrics_port,
        metrics=MetricNames(),
        problems=_router_problems(spec),
    )
