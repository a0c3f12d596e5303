"""A real kube-apiserver takes the CRDs, and its CEL decides every example as Python does."""

from typing import Any

import pytest
import yaml

from apis.crds import FOLDER
from apis.resources import KINDS
from tests.apis.test_cross_field_rules import ACCEPT, REJECT, named
from tests.harness.kubernetes import KubeApi, KubeError
from tests.snapshot.test_documents_become_policy import ARKS_QUICKSTART, QUICKSTART


@pytest.fixture(scope="module")
def api(kube_api: KubeApi) -> KubeApi:
    kube_api.apply(FOLDER)
    return kube_api


def tried(api: KubeApi, item: dict[str, Any], *, dry_run: bool = True) -> dict[str, Any]:
    """Create as `kubectl create` does: unknown fields are errors."""
    query = "?fieldValidation=Strict" + ("&dryRun=All" if dry_run else "")
    item["metadata"].setdefault("namespace", "default")
    return api.request("POST", api.path(item["apiVersion"], item["kind"], item["metadata"]["namespace"]) + query, item)


def test_every_definition_is_served_and_structural(api):
    definitions = {
        item["spec"]["names"]["kind"]: item for item in api.list("apiextensions.k8s.io/v1", "CustomResourceDefinition")
    }
    for kind in KINDS:
        conditions = {item["type"]: item["status"] for item in definitions[kind]["status"]["conditions"]}
        assert conditions["Established"] == "True"
        assert conditions.get("NonStructuralSchema", "False") == "False"


@pytest.mark.parametrize("file", ACCEPT, ids=named)
def test_accepted(api, file):
    tried(api, yaml.safe_load(file.read_text()))


@pytest.mark.parametrize("file", REJECT, ids=named)
def test_refused_for_the_reason_it_names(api, file):
    text = file.read_text()
    with pytest.raises(KubeError) as caught:
        tried(api, yaml.safe_load(text))
    assert caught.value.status == 422
    assert text.splitlines()[0].removeprefix("# message: ") in str(caught.value)


@pytest.mark.parametrize("text", [ARKS_QUICKSTART, (QUICKSTART / "quickstart.yaml").read_text()], ids=["arks", "ours"])
def test_a_quickstart_is_taken_without_a_warning(api, text):
    for item in yaml.safe_load_all(text):
        tried(api, item)


def test_an_object_is_stored_without_filler(api, kube_namespace):
    item = yaml.safe_load((FOLDER.parents[1] / "tests/apis/cel/ArksApplication/accept-least.yaml").read_text())
    item["metadata"]["namespace"] = kube_namespace
    assert tried(api, item, dry_run=False)["spec"] == item["spec"]


def test_an_endpoint_gets_arks_defaults(api):
    item = yaml.safe_load((FOLDER.parents[1] / "tests/apis/cel/ArksEndpoint/accept-least.yaml").read_text())
    spec = tried(api, item)["spec"]
    assert spec["defaultWeight"] == 1
    assert spec["gatewayRef"] == {"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "arks-eg"}
    assert spec["matchConfigs"] == [{"path": {"type": "PathPrefix", "value": "/"}}]


def test_an_application_is_scaled_through_its_subresource(api, kube_namespace):
    item = yaml.safe_load((FOLDER.parents[1] / "tests/apis/cel/ArksApplication/accept-least.yaml").read_text())
    item["metadata"]["namespace"] = kube_namespace
    tried(api, item, dry_run=False)
    path = f"{api.path('arks.ai/v1', 'ArksApplication', kube_namespace)}/case/scale"
    patch = {"spec": {"replicas": 3}}
    api.request("PATCH", path, patch, content_type="application/merge-patch+json")
    assert api.get("arks.ai/v1", "ArksApplication", "case", kube_namespace)["spec"]["replicas"] == 3


def test_a_status_as_our_models_write_it_is_taken(api, kube_namespace):
    item = yaml.safe_load((FOLDER.parents[1] / "tests/apis/cel/ArksModel/accept-claim.yaml").read_text())
    item["metadata"]["namespace"] = kube_namespace
    made = tried(api, item, dry_run=False)
    condition = {"type": "Ready", "status": "True", "reason": "Ready", "lastTransitionTime": "2027-01-31T00:00:00Z"}
    status = {"phase": "Ready", "conditions": [condition], "observedGeneration": 1, "progress": {"bytesDone": 5}}
    found = api.set_status(made, **status)
    assert found["status"]["progress"]["bytesDone"] == 5
    assert KINDS["ArksModel"].model_validate(found).status.phase == "Ready"
