"""Every command line that we generate for Dynamo, read by Dynamo's own parsers, and our table of its options."""

from pathlib import Path

import pytest

from controller.engines import dynamo, router
from controller.engines.known import known_options
from controller.engines.model import LoraAdapter, Role, Stage
from controller.engines.version import Version
from scripts import engines
from tests.engines.test_launch import DYNAMO, router_spec
from tests.engines.test_launch import spec as any_spec
from tests.engines_real.parsed import Parsed, accepted, parsed

RELEASE = Version(1, 6, 1)
TYPING_ERROR = ("--max-modle-len", "1")
SERVERS_OWN = ("--enable-auto-tool-choice",)
MODEL = str(Path(__file__).parent)
"""some folder that is there: vLLM would look for another one in its cache of downloads"""


def spec(*args, **facts):
    return any_spec(*args, model_path=MODEL, **facts)


PAIR = {"size": 2, "tensor_parallel": 2, "pipeline_parallel": 1}
LAUNCHES = {
    "single": dynamo.launch(spec(DYNAMO, tensor_parallel=1)),
    "leader": dynamo.launch(spec(DYNAMO, Role.LEADER, **PAIR)),
    "worker": dynamo.launch(spec(DYNAMO, Role.WORKER, **PAIR)),
    "prefill": dynamo.launch(spec(DYNAMO, stage=Stage.PREFILL, cluster_discovery=True)),
    "decode": dynamo.launch(spec(DYNAMO, stage=Stage.DECODE, cluster_discovery=True)),
    "adapters": dynamo.launch(spec(DYNAMO, lora=(LoraAdapter("sql", "/adapters/0"),))),
    "user's": dynamo.launch(spec(DYNAMO, args=("--max-model-len", "4096", "-tp", "4", "--served-model-name=mine"))),
    "misspelt": dynamo.launch(spec(DYNAMO, args=TYPING_ERROR)),
    "server's": dynamo.launch(spec(DYNAMO, args=SERVERS_OWN)),
    "frontend": dynamo.frontend(spec(DYNAMO)),
    "user's frontend": dynamo.frontend(spec(DYNAMO, args=("--router-mode", "kv", "--migration-limit", "3"))),
    "router": router.launch(router_spec("dynamo", args=("--router-mode", "kv"))),
    "misspelt router": router.launch(router_spec("dynamo", args=("--router-mod", "kv", "--rooter", "1"))),
}


@pytest.fixture(scope="module")
def found() -> Parsed:
    env = {item["name"]: str(item["value"]) for item in LAUNCHES["single"].env if "value" in item}
    return parsed(engines.DYNAMO, "dynamo_parser.py", LAUNCHES, env)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("single", {"model": MODEL, "served": "qwen", "tensor": 1, "stage": "agg", "headless": False}),
        ("single", {"namespace": "team-a-app", "discovery": "file"}),
        ("leader", {"nodes": [2, 1, "chat-0.chat", 29501], "tensor": 2, "pipeline": 1, "headless": False}),
        ("worker", {"nodes": [2, 1, "chat-0.chat", 29501], "tensor": 2, "headless": True}),
        ("prefill", {"stage": "prefill", "transfer": ["NixlConnector", "kv_producer"]}),
        ("decode", {"stage": "decode", "transfer": ["NixlConnector", "kv_consumer"]}),
        ("adapters", {"lora": True}),
        ("user's", {"max_model_len": 4096, "tensor": 4, "served": "mine"}),
        ("frontend", {"http_host": "0.0.0.0", "http_port": 8080, "router_mode": "round-robin"}),
        ("frontend", {"discovery_backend": "file"}),
        ("user's frontend", {"router_mode": "kv", "migration_limit": 3}),
        ("router", {"http_port": 9000, "router_mode": "kv"}),
    ],
)
def test_what_we_generate_is_accepted_and_means_what_we_meant(name, expected, found: Parsed):
    accepted(expected, found.lines[name])


@pytest.mark.parametrize("name", ["misspelt", "server's", "misspelt router"])
def test_what_dynamo_refuses_is_a_condition(name, found: Parsed):
    assert "refused" in found.lines[name]
    (problem,) = LAUNCHES[name].problems
    assert problem.reason == "UnknownEngineOption"
    assert problem.blocking


@pytest.mark.parametrize(
    ("module", "program"), [("dynamo.vllm", "dynamo-vllm"), ("dynamo.frontend", "dynamo-frontend")]
)
def test_our_table_of_options_is_dynamos(module, program, found: Parsed):
    assert known_options(program, RELEASE) == found.options[module]
