"""What the publisher may read: our own ClusterRole is enough, and plain tokens need no right to Secrets."""

from __future__ import annotations

from pathlib import Path

import pytest

from controller.permissions import NAMESPACE, rbac, rules
from tests.harness.kubernetes import KubeApi
from tests.harness.rights import until_allowed
from tests.snapshot_stream.conftest import Tenant
from tests.snapshot_stream.test_from_apply_to_decision import PublisherProcess
from tests.snapshot_stream.world import Following, until

GROUP = "rbac.authorization.k8s.io"


def without_secrets(user: str) -> list[dict]:
    kept = [rule for rule in rules("") if "secrets" not in rule["resources"]]
    role = {"apiVersion": f"{GROUP}/v1", "kind": "ClusterRole", "metadata": {"name": "no-secrets"}, "rules": kept}
    binding = {
        "apiVersion": f"{GROUP}/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": "no-secrets"},
        "roleRef": {"apiGroup": GROUP, "kind": "ClusterRole", "name": "no-secrets"},
        "subjects": [{"apiGroup": GROUP, "kind": "User", "name": user}],
    }
    return [role, binding]


@pytest.mark.parametrize(("user", "sees_secrets"), [("controller", True), ("u7", False)])
async def test_the_generated_role_suffices_and_a_missing_right_costs_only_what_needs_it(
    api: KubeApi, tenant: Tenant, tmp_path: Path, user: str, sees_secrets: bool
):
    api.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
    api.apply(*(rbac() if sees_secrets else without_secrets(user)))
    until_allowed(api, user, verb="watch", group="arks.ai", resource="arkstokens")
    tenant.endpoint()
    tenant.token("plain", "sk-plain")
    tenant.secret("box", token="sk-boxed")
    tenant.token("sealed", tokenSecretRef={"name": "box", "key": "token"})
    publisher = PublisherProcess(api, tmp_path)
    publisher.start(user)
    try:
        async with Following(tmp_path, publisher.address).running() as following:
            wanted = {"plain", "sealed"} if sees_secrets else {"plain"}
            await until(
                lambda: {name for where, name in following.policy.tokens if where == tenant.namespace} == wanted
            )
    finally:
        publisher.kill()
