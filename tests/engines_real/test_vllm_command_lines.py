"""Command lines that Arks generates, before vLLM's own parser and configuration; no engine is started for them."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from controller.engines.known import known_options
from controller.engines.version import Version
from controller.workloads.model import LWS
from scripts import engines
from tests.engines_real.generated import application, disaggregated, pods
from tests.engines_real.launched import IMAGE, Container

RELEASE, ROUTER_RELEASE = Version(0, 32, 0), Version(0, 1, 17)
OVERRIDES = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
MISSPELT = ("--max-modle-len", "1")


def lines(folder: Path) -> dict[str, list[str]]:
    """What a container's process would be started with, by what it is."""
    group = pods(application(served=frozenset({LWS}), size=2, tensorParallelSize=2))
    uneven = pods(application("-dp", "1", served=frozenset({LWS}), size=3, tensorParallelSize=2))
    rich = application(
        "--hf-overrides",
        json.dumps(OVERRIDES),
        '--override-generation-config \'{"temperature": 0.5, "top_k": 3}\'',
        "--served-model-name own other",
        "--shutdown-timeout=7",
        loraAdapters=[{"name": "accented", "model": {"name": "accent"}}],
    )
    misspelt = application(*MISSPELT, annotations={"arks.ai/allow-unknown-options": "true"})
    found = {
        "plain": pods(application())["chat"],
        "rich": pods(rich)["chat"],
        "misspelt": pods(misspelt)["chat"],
        "uneven": uneven["leader"],
        **group,
        **pods(disaggregated()),
    }
    del found["pair-scheduler"]
    injected = {"LWS_LEADER_ADDRESS": "127.0.0.1", "LWS_GROUP_SIZE": "2"}
    volumes = {"models": engines.models()}
    return {name: Container(pod, folder, volumes, injected).command for name, pod in found.items()}


@pytest.fixture(scope="module")
def parsed(made, tmp_path_factory) -> Iterator[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("parser")
    asked = lines(folder)
    found = told(folder, "vllm_parser.py", list(asked.values()))
    return {"options": found["options"], **dict(zip(asked, found["lines"], strict=True))}


def told(folder: Path, script: str, question: Any) -> Any:
    """The answer of one of our scripts in the engines' environment."""
    with (folder / "log").open("wb") as log:
        done = subprocess.run(
            [engines.environment() / "bin" / "python", Path(__file__).with_name(script)],
            input=json.dumps(question).encode(),
            stdout=subprocess.PIPE,
            stderr=log,
            check=False,
            env={**IMAGE, "HOME": str(folder)},
        )
    assert done.returncode == 0, (folder / "log").read_text()[-3000:]
    return json.loads(done.stdout)


def long_names(options: list[str]) -> set[str]:
    return {name.removeprefix("--").replace("_", "-") for name in options if name.startswith("--")} - {"help"}


def test_the_plain_command_line_is_taken(parsed):
    found = parsed["plain"]
    assert found["model"] == str(engines.models() / "chat")
    assert (found["port"], found["served_model_name"], found["nodes"]) == (8080, ["tiny-chat"], 1)
    assert found["shutdown_timeout"] == 300


def test_json_adapters_and_the_users_own_word_reach_the_engine(parsed):
    found = parsed["rich"]
    assert found["hf_overrides"] == OVERRIDES
    assert found["generation"] == {"temperature": 0.5, "top_k": 3}
    assert found["adapters"] == {"accented": str(engines.models() / "adapter")}
    assert found["served_model_name"] == ["own", "other"]
    assert found["shutdown_timeout"] == 7


def test_both_nodes_of_a_group_agree_on_their_world(parsed):
    leader, worker = parsed["leader"], parsed["worker"]
    for found in (leader, worker):
        assert (found["nodes"], found["world"], found["local_world"]) == (2, 2, 1)
        assert found["master"] == ["127.0.0.1", 29501]
    assert (leader["rank"], leader["headless"]) == (0, False)
    assert (worker["rank"], worker["headless"]) == (1, True)


def test_prefill_and_decode_get_their_ends_of_the_transfer(parsed):
    assert parsed["pair-prefill"]["transfer"] == ["NixlConnector", "kv_producer", "cpu"]
    assert parsed["pair-decode"]["transfer"] == ["NixlConnector", "kv_consumer", "cpu"]


def test_what_we_block_the_engine_would_have_died_of(parsed):
    blocked = application(*MISSPELT).blocked
    assert blocked is not None
    assert blocked.reason == "UnknownEngineOption"
    assert (parsed["misspelt"]["refused"], MISSPELT[0] in parsed["misspelt"]["said"]) == (2, True)
    blocked = application(served=frozenset({LWS}), size=3, tensorParallelSize=2).blocked
    assert blocked is not None
    assert blocked.reason == "ParallelismDoesNotFillGroup"
    assert "nnodes 3" in parsed["uneven"]["said"]


def test_the_router_reads_its_command_line_as_we_mean_it(made, tmp_path):
    router = Container(pods(disaggregated())["pair-scheduler"], tmp_path)
    program, *rest = router.command
    found = told(tmp_path, "vllm_router_parser.py", rest)
    args = found["args"]
    assert program == "vllm-router"
    assert (args["vllm_pd_disaggregation"], args["service_discovery"]) == (True, True)
    assert (args["service_discovery_port"], args["service_discovery_namespace"]) == (8080, "team-a")
    assert args["prefill_selector"].items() - args["decode_selector"].items() == {
        ("arks.ai/disaggregation-role", "prefill")
    }
    assert (args["host"], args["port"], args["prometheus_port"]) == (router.address, 8080, 9090)
    assert known_options("vllm-router", ROUTER_RELEASE) == long_names(found["options"])


def test_the_table_of_known_options_is_the_parsers(parsed):
    assert known_options("vllm", RELEASE) == long_names(parsed["options"])
