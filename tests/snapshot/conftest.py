from pathlib import Path

import pytest


class PolicyFolder:
    """A folder of policy files, and the documents that tests put into it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, name: str, *documents: str) -> Path:
        file = self.path / name
        file.write_text("---\n".join(documents), encoding="utf-8")
        return file


def token(
    name: str = "alice",
    secret: str = "sk-alice",
    *,
    endpoint: str = "qwen",
    rpm: int = 5,
    quota: str = "",
    extra: str = "",
) -> str:
    under = f"\n      quota: {{name: {quota}}}" if quota else ""
    return f"""\
apiVersion: arks.ai/v1
kind: ArksToken
metadata:
  name: {name}
spec:
  token: {secret}
  qos:
    - arksEndpoint:
        name: {endpoint}
      rateLimits:
        - type: rpm
          value: {rpm}{under}
{extra}"""


def endpoint(name: str = "qwen", extra: str = "") -> str:
    return f"""\
apiVersion: arks.ai/v1
kind: ArksEndpoint
metadata:
  name: {name}
spec:
  defaultWeight: 1
  gatewayRef:
    name: arks-eg
{extra}"""


def quota(name: str = "basic", total: int = 100) -> str:
    return f"""\
apiVersion: arks.ai/v1
kind: ArksQuota
metadata:
  name: {name}
spec:
  quotas:
    - type: total
      value: {total}
"""


@pytest.fixture
def folder(tmp_path: Path) -> PolicyFolder:
    path = tmp_path / "policy"
    path.mkdir()
    return PolicyFolder(path)
