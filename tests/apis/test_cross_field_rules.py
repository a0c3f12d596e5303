"""Each rule between fields has objects that it accepts and objects that it refuses: in Python here, by the API server's
CEL in the cluster tests, from the same files."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from apis.resources import KINDS
from tests.apis.test_crds_are_arks_and_more import nodes, schema

CASES = Path(__file__).with_name("cel")
ACCEPT = sorted(CASES.glob("*/accept-*.yaml"))
REJECT = sorted(CASES.glob("*/reject-*.yaml"))
STRICT = dict.fromkeys(("ArksToken", "ArksQuota", "ArksEndpoint"), "forbid")
"""kinds without pass-through parts: a slip in a case is an error"""


def named(file: Path) -> str:
    return f"{file.parent.name}/{file.stem}"


@pytest.mark.parametrize("file", ACCEPT, ids=named)
def test_accepted(file):
    value = yaml.safe_load(file.read_text())
    assert value["kind"] == file.parent.name
    KINDS[value["kind"]].model_validate(value, extra=STRICT.get(value["kind"]))


@pytest.mark.parametrize("file", REJECT, ids=named)
def test_refused_for_the_reason_it_names(file):
    text = file.read_text()
    message = text.splitlines()[0].removeprefix("# message: ")
    with pytest.raises(ValidationError) as caught:
        KINDS[file.parent.name].model_validate(yaml.safe_load(text), extra=STRICT.get(file.parent.name))
    (error,) = caught.value.errors(include_input=False)
    said = str(error["ctx"]["error"])
    # Python says the two forbidden ends in one sentence.
    assert said == message or (said.startswith(message.rpartition(" ")[0]) and "ends not in" in message)


def test_every_rule_has_a_refused_example_of_its_kind_or_type():
    rules = {
        rule["message"]
        for kind in KINDS
        for _, node in nodes(schema(kind))
        for rule in node.get("x-kubernetes-validations", [])
    }
    refused = {file.read_text().splitlines()[0].removeprefix("# message: ") for file in REJECT}
    assert refused == rules


def test_every_kind_has_an_accepted_example():
    assert {file.parent.name for file in ACCEPT} == set(KINDS)
