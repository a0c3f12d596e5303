"""The policies that a benchmark runs under: one busy token with every kind of limit, or ten thousand of them."""

from pathlib import Path

import yaml

LIMIT = 10**12
"""never reached: what is measured is the counting, not the refusing"""


def _token(name: str, secret: str, endpoint: str, quota: str) -> dict[str, object]:
    rates = [{"type": kind, "value": LIMIT} for kind in ("rpm", "rpd", "tpm", "tpd")]
    return {
        "apiVersion": "arks.ai/v1",
        "kind": "ArksToken",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "token": secret,
            "qos": [{"arksEndpoint": {"name": endpoint}, "rateLimits": rates, "quota": {"name": quota}}],
        },
    }


def _endpoint(name: str) -> dict[str, object]:
    return {
        "apiVersion": "arks.ai/v1",
        "kind": "ArksEndpoint",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"defaultWeight": 1, "gatewayRef": {"name": "arks-eg"}},
    }


def _quota(name: str) -> dict[str, object]:
    quotas = [{"type": kind, "value": LIMIT} for kind in ("prompt", "response", "total")]
    return {
        "apiVersion": "arks.ai/v1",
        "kind": "ArksQuota",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"quotas": quotas},
    }


def write(folder: Path, tokens: int = 0, endpoints: int = 0) -> None:
    """A policy folder: the busy token `sk-bench` on model qwen-7b, and as many others as asked for."""
    folder.mkdir(parents=True, exist_ok=True)
    busy = [_quota("quota"), _endpoint("qwen-7b"), _token("bench", "sk-bench", "qwen-7b", "quota")]
    _dump(folder / "busy.yaml", busy)
    if endpoints:
        _dump(folder / "endpoints.yaml", [_endpoint(f"model-{i}") for i in range(endpoints)])
    if tokens:
        write_tokens(folder, tokens, endpoints)


def write_tokens(folder: Path, tokens: int, endpoints: int, changed: int = 0) -> None:
    """The many tokens; `changed` gives the first one another secret."""
    many = [_token(f"token-{i}", f"sk-{i}", f"model-{i % endpoints}", "quota") for i in range(tokens)]
    many[0] = _token("token-0", f"sk-0-{changed}", "model-0", "quota")
    _dump(folder / "tokens.yaml", many)


def _dump(path: Path, documents: list[dict[str, object]]) -> None:
    hidden = path.with_name(f".{path.name}")
    hidden.write_text(yaml.dump_all(documents, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper)))
    hidden.replace(path)
