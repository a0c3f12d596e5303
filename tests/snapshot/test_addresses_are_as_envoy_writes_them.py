"""A pick names an engine by its address' text, and Envoy must know that very text."""

from pathlib import Path

import pytest

from extproc.snapshot.errors import PolicyErrors
from extproc.snapshot.files import load_folder

SLICE = """
apiVersion: arks.ai/v1
kind: ArksEndpoint
metadata: {name: qwen, namespace: team}
spec:
  defaultWeight: 1
  gatewayRef: {name: arks}
  routeConfigs: [{name: pods, port: 8000}]
---
apiVersion: v1
kind: Service
metadata: {name: pods, namespace: team}
spec: {ports: [{port: 8000, targetPort: 8000}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: pods-1, namespace: team, labels: {kubernetes.io/service-name: pods}}
addressType: IPv6
endpoints: [{addresses: ["ADDRESS"]}]
ports: [{port: 8000}]
"""


def test_an_ipv6_address_in_any_spelling_is_one_address(tmp_path: Path):
    (tmp_path / "a.yaml").write_text(SLICE.replace("ADDRESS", "FD00:0:0:0::0001"))
    (served,) = load_folder(tmp_path).policy.endpoints.values()
    assert served.routes is not None
    assert [route.addresses for route in served.routes] == [("[fd00::1]:8000",)]


def test_an_address_that_is_none_is_a_fault_of_its_slice(tmp_path: Path):
    """In Envoy's list of engines it would keep all others from being told, too."""
    (tmp_path / "a.yaml").write_text(SLICE.replace("ADDRESS", "engine one"))
    with pytest.raises(PolicyErrors, match="IP address"):
        load_folder(tmp_path)
