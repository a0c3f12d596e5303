"""What each document means to the data plane, and what its author is told beside it."""

import hashlib
from pathlib import Path

import pytest

from apis.policy import Endpoint, Grant, Quota, QuotaLimit, RateLimit, Route, Token
from extproc.snapshot.files import Folder, Loaded, load_folder
from tests.snapshot.conftest import PolicyFolder, endpoint, quota, token

QUICKSTART = Path(__file__).parents[2] / "manifests" / "quickstart"

# The fields of Arks' quickstart (scitix/arks, examples/quickstart), in its own order and layout.
ARKS_QUICKSTART = """\
apiVersion: arks.ai/v1
kind: ArksModel
metadata: {name: qwen-7b, namespace: default}
spec:
  model: Qwen/Qwen2.5-7B-Instruct-1M
  source:
    huggingface: {}
  storage:
    pvc:
      name: qwen-7b
      spec: {accessModes: [ReadWriteOnce], resources: {requests: {storage: 2Gi}}, storageClassName: local-path}
---
apiVersion: arks.ai/v1
kind: ArksApplication
metadata: {name: app-qwen}
spec:
  replicas: 1
  size: 2
  tensorParallelSize: 2
  runtime: vllm
  model: {name: qwen-7b}
  instanceSpec:
    resources: {limits: {nvidia.com/gpu: "1"}, requests: {nvidia.com/gpu: "1"}}
---
apiVersion: arks.ai/v1
kind: ArksEndpoint
metadata: {name: qwen-7b}
spec:
  defaultWeight: 5
  gatewayRef: {name: arks-eg, namespace: arks-operator-system}
  matchConfigs:
    - path: {type: PathPrefix, value: /v1/completions}
    - path: {type: PathPrefix, value: /v1/chat/completions}
---
apiVersion: arks.ai/v1
kind: ArksQuota
metadata: {name: basic-quota, namespace: default}
spec:
  quotas: [{type: prompt, value: 100000}, {type: response, value: 500000}, {type: total, value: 600000}]
---
apiVersion: arks.ai/v1
kind: ArksToken
metadata: {name: example-token, namespace: default}
spec:
  token: "sk-test123456"
  qos:
    - arksEndpoint: {name: qwen-7b}
      rateLimits:
        - {type: rpm, value: 5}
        - {type: tpm, value: 40000}
        - {type: rpd, value: 100}
        - {type: tpd, value: 1000000}
      quota: {name: basic-quota}
"""


def load(folder: PolicyFolder) -> Loaded:
    return load_folder(folder.path)


def notes(loaded: Loaded) -> list[str]:
    return [note.text for note in loaded.notes]


def sha(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def test_arks_own_quickstart_is_taken_as_it_is(folder):
    folder.write("quickstart.yaml", ARKS_QUICKSTART)
    loaded = load(folder)
    assert loaded.policy.tokens == {
        ("default", "example-token"): Token(
            namespace="default",
            name="example-token",
            digest=sha("sk-test123456"),
            grants=(
                Grant(
                    "qwen-7b",
                    (RateLimit("rpm", 5), RateLimit("tpm", 40000), RateLimit("rpd", 100), RateLimit("tpd", 1000000)),
                    "basic-quota",
                ),
            ),
        )
    }
    limits = (QuotaLimit("prompt", 100000), QuotaLimit("response", 500000), QuotaLimit("total", 600000))
    assert loaded.policy.quotas == {("default", "basic-quota"): Quota("default", "basic-quota", limits)}
    assert loaded.policy.endpoints == {("default", "qwen-7b"): Endpoint("default", "qwen-7b", "qwen-7b", None)}
    assert [(note.line, note.text.split()[0]) for note in loaded.notes] == [(2, "ArksModel"), (14, "ArksApplication")]


def test_our_own_quickstart_serves_and_has_nothing_to_remark():
    loaded = load_folder(QUICKSTART)
    (found,) = loaded.policy.tokens.values()
    assert found.digest == sha("sk-test123456")
    assert found.grants[0].endpoint == "qwen-7b"
    assert loaded.policy.endpoints["default", "qwen-7b"].routes is None
    assert loaded.notes == ()


def test_every_new_token_field_arrives(folder):
    extra = "  expiresAt: 2027-01-31T01:00:00+01:00\n  disabled: true\n  maxConcurrentRequests: 3\n  priority: -7\n"
    folder.write("t.yaml", endpoint(), token(extra=extra))
    found = load(folder).policy.tokens["default", "alice"]
    assert (found.expires_at_s, found.disabled, found.max_concurrent_requests, found.priority) == (
        1801353600,
        True,
        3,
        -7,
    )


def test_a_token_may_be_known_by_its_hash_alone(folder):
    digest = sha("sk-hidden")
    folder.write("t.yaml", endpoint(), token().replace("token: sk-alice", f"tokenHash: sha256:{digest.hex()}"))
    assert load(folder).policy.tokens["default", "alice"].digest == digest


@pytest.mark.parametrize(
    "data",
    [
        "stringData: {k: sk-held}",
        "data: {k: c2staGVsZA==}",
        "data: {k: c2staGVsZAo=}",
        "data: {k: eA==}\nstringData: {k: sk-held}",
    ],
)
def test_a_token_may_be_kept_in_a_secret(folder, data):
    # The third has the line end that `echo sk-held | base64` encodes: no client could ever send it.
    folder.write("z.yaml", endpoint(), token().replace("token: sk-alice", "tokenSecretRef: {name: vault, key: k}"))
    folder.write("a.yaml", f"apiVersion: v1\nkind: Secret\nmetadata: {{name: vault}}\n{data}\n")
    assert load(folder).policy.tokens["default", "alice"].digest == sha("sk-held")


def test_two_tokens_with_one_secret_are_both_there_for_the_index_to_refuse(folder):
    folder.write("t.yaml", endpoint(), token("a", "sk-same"), token("b", "sk-same"))
    assert len(load(folder).policy.tokens) == 2


def test_every_new_endpoint_field_arrives(folder):
    extra = (
        "  modelName: Qwen/Qwen2.5-7B\n  allowedEngineFields: [priority, bootstrap_*]\n  cacheSaltPerTenant: true\n"
        "  maxOutputTokens: 100\n  mediaTokens: 7\n  weightPolicy: load\n"
    )
    folder.write("e.yaml", endpoint(extra=extra))
    assert load(folder).policy.endpoints["default", "qwen"] == Endpoint(
        "default", "qwen", "Qwen/Qwen2.5-7B", None, ("priority", "bootstrap_*"), True, 100, 7, "load"
    )


_ROUTES = """\
  routeConfigs:
    - {group: gateway.envoyproxy.io, kind: Backend, name: be, weight: 3}
    - {name: svc, port: 80, weight: 0}
    - {name: svc, port: 90}
    - {name: outside, port: 443}
    - {name: svc, port: 81, namespace: default}
"""
_BACKENDS = """\
apiVersion: gateway.envoyproxy.io/v1alpha1
kind: Backend
metadata: {name: be}
spec:
  endpoints:
    - ip: {address: 10.0.0.1, port: 8000}
    - ip: {address: "2001:DB8::1", port: 8001}
    - fqdn: {hostname: engine.example, port: 8002}
---
apiVersion: v1
kind: Service
metadata: {name: svc}
spec:
  clusterIP: 10.96.0.1
  selector: {app: x}
  ports:
    - {name: http, port: 80, targetPort: 8080, protocol: TCP}
    - {name: other, port: 81, targetPort: 8081}
---
apiVersion: v1
kind: Service
metadata: {name: outside}
spec: {type: ExternalName, externalName: llm.example}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: svc-x, labels: {kubernetes.io/service-name: svc}}
addressType: IPv4
ports: [{name: http, port: 8080, protocol: TCP}]
endpoints:
  - {addresses: [10.1.0.1], conditions: {ready: true, serving: true}, nodeName: n1}
  - {addresses: [10.1.0.2], conditions: {ready: false}}
  - {addresses: [10.1.0.3]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: svc-y, labels: {kubernetes.io/service-name: svc}}
addressType: IPv6
ports: [{name: http, port: 8080}]
endpoints: [{addresses: ["fd00::1"]}]
"""


def test_routes_find_their_addresses(folder):
    folder.write("e.yaml", endpoint(extra=_ROUTES))
    folder.write("z.yaml", _BACKENDS)
    loaded = load(folder)
    assert loaded.policy.endpoints["default", "qwen"].routes == (
        Route("be", 3, ("10.0.0.1:8000", "[2001:db8::1]:8001"), ("engine.example:8002",)),
        Route("svc", 0, ("10.1.0.1:8080", "10.1.0.3:8080", "[fd00::1]:8080")),
        Route("svc", 1, ()),
        Route("outside", 1, (), ("llm.example:443",)),
        Route("svc", 1, ()),
    )
    assert [(note.file, note.line, note.path) for note in loaded.notes] == [
        ("e.yaml", 12, "spec.routeConfigs[2]"),
        ("e.yaml", 14, "spec.routeConfigs[4]"),
    ]


def test_a_route_to_nothing_known_is_noted_and_has_no_address(folder):
    routes = "  routeConfigs:\n    - {name: ghost, port: 1}\n    - {group: g.example, kind: Pool, name: p}\n"
    folder.write("e.yaml", endpoint(extra=routes))
    loaded = load(folder)
    assert loaded.policy.endpoints["default", "qwen"].routes == (Route("ghost", 1, ()), Route("p", 1, ()))
    assert "no Service default/ghost" in notes(loaded)[0]
    assert "Pool are not understood" in notes(loaded)[1]


def test_an_empty_list_of_routes_is_as_no_list(folder):
    folder.write("e.yaml", endpoint(extra="  routeConfigs: []\n"))
    assert load(folder).policy.endpoints["default", "qwen"].routes is None


def test_what_takes_no_effect_is_noted(folder):
    qos = (
        "    - arksEndpoint: {name: qwen}\n    - arksEndpoint: {}\n"
        "    - arksEndpoint: {name: ghost}\n      quota: {name: nowhere}\n"
    )
    folder.write(
        "t.yaml",
        endpoint(),
        token(extra=qos).replace("          value: 5", "          value: 5\n        - {type: rpm, value: 3}"),
    )
    loaded = load(folder)
    assert loaded.policy.tokens["default", "alice"].grants == (
        Grant("qwen", (RateLimit("rpm", 3),)),
        Grant("ghost", (), "nowhere"),
    )
    text = "\n".join(map(str, loaded.notes))
    for part in (
        "rpm is listed twice",
        "qwen is listed twice",
        "names no endpoint",
        "no ArksEndpoint default/ghost",
        "no ArksQuota default/nowhere",
    ):
        assert part in text
    assert "t.yaml:23: spec.qos[1].arksEndpoint.name: qwen is listed twice" in text


def test_foreign_kinds_are_passed_over_with_a_note(folder):
    folder.write("a.yaml", endpoint())
    folder.write("x.yaml", "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: x}\n")
    assert notes(load(folder)) == ["this kind is not understood and ignored"]


def test_what_an_api_server_adds_does_no_harm(folder):
    text = token().replace(
        "  name: alice",
        "  name: alice\n  uid: x\n  generation: 3\n  managedFields: [{manager: kubectl}]\n"
        "  creationTimestamp: 2026-01-01T00:00:00Z",
    )
    folder.write("t.yaml", endpoint(), text + "status: {conditions: [{type: Ready, status: 'True'}]}\n")
    assert len(load(folder).policy.tokens) == 1


def test_only_yaml_and_json_of_the_folder_itself_count(folder):
    for name in ("notes.txt", ".hidden.yaml", "t.yaml.swp", "t.yaml~"):
        (folder.path / name).write_text(": broken [")
    (folder.path / "sub").mkdir()
    (folder.path / "sub" / "t.yaml").write_text(": broken [")
    loaded = load(folder)
    assert loaded.policy.tokens == {}
    assert notes(loaded) == ["holds no policy: every request will be refused"]


def test_json_is_yaml(folder):
    text = """\
{
\t"apiVersion": "arks.ai/v1",
\t"kind": "ArksQuota",
\t"metadata": {"name": "q"},
\t"spec": {"quotas": [{"type": "total", "value": 1}]}
}
"""
    folder.write("q.json", text)
    assert load(folder).policy.quotas["default", "q"].limits == (QuotaLimit("total", 1),)


def test_a_second_load_keeps_every_record_that_did_not_change(folder):
    folder.write("a.yaml", endpoint(extra=_ROUTES), quota(), token("a", "sk-a"), token("b", "sk-b"))
    folder.write("z.yaml", _BACKENDS)
    reader = Folder(folder.path)
    first = reader.load().policy
    folder.write(
        "a.yaml", "# a line more\n", endpoint(extra=_ROUTES), quota(), token("a", "sk-a"), token("b", "sk-new")
    )
    second = reader.load().policy
    assert second.endpoints["default", "qwen"] is first.endpoints["default", "qwen"]
    assert second.quotas["default", "basic"] is first.quotas["default", "basic"]
    assert second.tokens["default", "a"] is first.tokens["default", "a"]
    assert second.tokens["default", "b"].digest == sha("sk-b".replace("b", "new"))


def test_no_secret_stays_in_memory_once_read(folder):
    secret = "sk-nobody-may-keep-this"
    vault = f"apiVersion: v1\nkind: Secret\nmetadata: {{name: vault}}\nstringData: {{k: {secret}}}\n"
    folder.write("t.yaml", endpoint(), token(secret=secret), vault)
    reader = Folder(folder.path)
    kept = reader.load()
    held = repr((kept, vars(reader)))
    assert "alice" in held
    assert secret not in held
