"""Every command line that we generate for SGLang and its router, read by their own parsers; our tables of options."""

import pytest

from controller.engines import router, sglang
from controller.engines.known import known_options
from controller.engines.model import Accelerator, LoraAdapter, Role, Stage
from controller.engines.version import Version
from scripts import engines
from tests.engines.test_launch import SGLANG, router_spec, spec
from tests.engines_real.parsed import Parsed, accepted, parsed

PAIR = {"size": 2, "tensor_parallel": 4, "pipeline_parallel": 2}
ADAPTERS = (LoraAdapter("sql", "/adapters/0"), LoraAdapter("law", "/adapters/1"))
JSON = '{"rope_scaling": {"type": "yarn", "factor": 4.0}}'
SPELLINGS = ("--tp", "8", "--port=9001", "--mem-fraction-static", "0.7", "--json-model-override-args", JSON)
LAUNCHES = {
    "single": sglang.launch(spec(SGLANG)),
    "leader": sglang.launch(spec(SGLANG, Role.LEADER, **PAIR)),
    "worker": sglang.launch(spec(SGLANG, Role.WORKER, **PAIR)),
    "prefill": sglang.launch(spec(SGLANG, stage=Stage.PREFILL)),
    "decode": sglang.launch(spec(SGLANG, stage=Stage.DECODE)),
    "prefill of two": sglang.launch(spec(SGLANG, Role.LEADER, stage=Stage.PREFILL, **PAIR)),
    "adapters": sglang.launch(spec(SGLANG, lora=ADAPTERS)),
    "cpu": sglang.launch(spec(SGLANG, accelerator=Accelerator.CPU)),
    "user's": sglang.launch(spec(SGLANG, args=SPELLINGS)),
    "user's prefill": sglang.launch(
        spec(SGLANG, stage=Stage.PREFILL, args=("--disaggregation-bootstrap-port", "9998"))
    ),
    "metrics twice": sglang.launch(spec(SGLANG, args=("--enable-metrics", "--served-model-name", "mine"))),
    "misspelt": sglang.launch(spec(SGLANG, args=("--mem-fraction-statik", "0.7"))),
    "router": router.launch(router_spec()),
    "user's router": router.launch(
        router_spec(args=("--policy", "random", "--port", "7000", "--router-cache-threshold", "0.5"))
    ),
    "policies": router.launch(router_spec(args=("--prefill-policy", "bucket", "--decode-policy", "round_robin"))),
    "misspelt router": router.launch(router_spec(args=("--polizy", "random"))),
}


@pytest.fixture(scope="module")
def found() -> Parsed:
    return parsed(engines.SGLANG, "sglang_parser.py", LAUNCHES, {"SGLANG_USE_CPU_ENGINE": "1"})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("single", {"model_path": "/models/m", "served_model_name": "qwen", "host": "0.0.0.0", "port": 8080}),
        ("single", {"enable_metrics": True, "trust_remote_code": True, "nnodes": 1, "disaggregation_mode": "null"}),
        ("leader", {"nnodes": 2, "node_rank": 1, "dist_init_addr": "chat-0.chat:20000", "port": 8080}),
        ("leader", {"tp_size": 4, "pp_size": 2, "served_model_name": "qwen"}),
        ("worker", {"nnodes": 2, "node_rank": 1, "dist_init_addr": "chat-0.chat:20000", "tp_size": 4, "pp_size": 2}),
        ("prefill", {"disaggregation_mode": "prefill", "disaggregation_bootstrap_port": sglang.BOOTSTRAP_PORT}),
        ("decode", {"disaggregation_mode": "decode"}),
        ("prefill of two", {"disaggregation_mode": "prefill", "nnodes": 2, "tp_size": 4}),
        ("adapters", {"enable_lora": True, "lora_paths": ["sql=/adapters/0", "law=/adapters/1"]}),
        ("cpu", {"device": "cpu"}),
        ("user's", {"tp_size": 8, "port": 9001, "mem_fraction_static": 0.7, "json_model_override_args": JSON}),
        ("user's prefill", {"disaggregation_bootstrap_port": 9998}),
        ("metrics twice", {"enable_metrics": True, "served_model_name": "mine"}),
        ("router", {"host": "0.0.0.0", "port": 9000, "prometheus_host": "0.0.0.0", "prometheus_port": 9091}),
        ("router", {"pd_disaggregation": True, "service_discovery": True, "service_discovery_port": 8080}),
        ("router", {"service_discovery_namespace": "team-a", "policy": "cache_aware"}),
        ("router", {"prefill_selector": {"a": "1", "b": "2"}, "decode_selector": {"a": "1"}, "selector": {}}),
        ("router", {"bootstrap_port_annotation": sglang.BOOTSTRAP_ANNOTATION}),
        ("user's router", {"policy": "random", "port": 7000, "cache_threshold": 0.5}),
        ("policies", {"prefill_policy": "bucket", "decode_policy": "round_robin"}),
    ],
)
def test_what_we_generate_is_accepted_and_means_what_we_meant(name, expected, found: Parsed):
    accepted(expected, found.lines[name])


@pytest.mark.parametrize("name", ["misspelt", "misspelt router"])
def test_what_sglang_refuses_is_a_condition(name, found: Parsed):
    assert "refused" in found.lines[name]
    (problem,) = LAUNCHES[name].problems
    assert problem.reason == "UnknownEngineOption"
    assert problem.blocking


@pytest.mark.parametrize(
    ("module", "program", "release"),
    [
        ("sglang.launch_server", "sglang", Version(0, 5, 23)),
        ("sglang_router.launch_router", "sglang-router", Version(0, 3, 2)),
    ],
)
def test_our_tables_of_options_are_sglangs(module, program, release, found: Parsed):
    assert known_options(program, release) == found.options[module]
