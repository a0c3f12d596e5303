"""ArksToken and ArksQuota: nothing is made for them, but what keeps them from working is said, and what is used."""

from __future__ import annotations

import time
from collections.abc import Sequence

from controller.kube.resource import Key
from controller.reconcile.context import RESYNC_S, Context, about
from controller.reconcile.desired.phase import Verdict
from controller.reconcile.finalizers import release
from controller.reconcile.kinds import ARKS
from controller.reconcile.tokens import TokenView
from controller.status import About

_TOKENS, _QUOTAS = ARKS["ArksToken"], ARKS["ArksQuota"]


async def reconcile_token(context: Context, key: Key) -> float | None:
    entry = context.watches.tokens.entry(key)
    if entry is None:
        context.status.forget(_TOKENS, *key)
        return None
    token = entry.value
    if token.deleting:
        await release(context.client, _TOKENS, *key, token.finalizers, entry.version)
        return None
    told = About(_TOKENS, *key, token.uid, token.generation, entry.version, token.status)
    await context.status.write(told, [_accepted(context, key, token)])
    left_s = (token.fragment.record.expires_at_s or 0.0) - time.time()
    return min(left_s + 0.5, RESYNC_S) if left_s > 0 else None


def _accepted(context: Context, key: Key, token: TokenView) -> Verdict:
    """The first thing that keeps it, or part of it, from working. Never a word of the secret."""
    problem = _secret_problem(context, key, token) or _reference_problem(context, key, token)
    if problem is not None:
        return Verdict("Accepted", "False", *problem)
    record = token.fragment.record
    if record.disabled:
        return Verdict("Accepted", "False", "Disabled", "spec.disabled: every request with this token is refused")
    if record.expires_at_s is not None and record.expires_at_s <= time.time():
        return Verdict(
            "Accepted", "False", "Expired", "spec.expiresAt has passed: requests with this token are refused"
        )
    notes = "; ".join(f"{path}: {text}" for path, text in token.fragment.remarks)
    return Verdict("Accepted", "True", "Accepted", notes or "The token is valid")


def _secret_problem(context: Context, key: Key, token: TokenView) -> tuple[str, str] | None:
    watches = context.watches
    sealed = token.fragment.secret
    if sealed is not None and watches.secrets_known:
        name, entry = sealed
        found = watches.secrets.get(Key(key.namespace, name))
        if found is None:
            return "SecretNotFound", f"spec.tokenSecretRef.name: there is no Secret {name} in this namespace"
        if entry not in found.digests:
            return "SecretKeyNotFound", f"spec.tokenSecretRef.key: the Secret {name} has no key {entry}"
    peers = watches.holders.peers(key)
    if not peers:
        return None
    field = "spec.tokenSecretRef" if sealed is not None else "spec.token"
    near = [peer.name for peer in peers if peer.namespace == key.namespace]
    # Who shares it elsewhere is another tenant's business.
    whose = f"ArksToken {', '.join(near)}" if near else "an ArksToken of another namespace"
    return "DuplicateSecret", f"{field}: {whose} has the same secret, so none of them is accepted"


def _reference_problem(context: Context, key: Key, token: TokenView) -> tuple[str, str] | None:
    watches = context.watches
    for index, (endpoint, quota) in enumerate(token.qos):
        if endpoint and Key(key.namespace, endpoint) not in watches.endpoints:
            path = f"spec.qos[{index}].arksEndpoint.name"
            return "EndpointNotFound", f"{path}: there is no ArksEndpoint {endpoint} in this namespace"
        if quota and Key(key.namespace, quota) not in watches.quotas:
            path = f"spec.qos[{index}].quota.name"
            elsewhere = bool(watches.quotas.keys_by("name", quota))
            more = "; one of that name in another namespace cannot be used" if elsewhere else ""
            return "QuotaNotFound", f"{path}: there is no ArksQuota {quota} in this namespace{more}"
    return None


async def reconcile_quota(context: Context, key: Key) -> float | None:
    entry = context.watches.quotas.entry(key)
    if entry is None:
        context.status.forget(_QUOTAS, *key)
        return None
    quota = entry.value
    if quota.metadata.deletion_timestamp is not None:
        await release(context.client, _QUOTAS, *key, quota.metadata.finalizers, entry.version)
        return None
    kinds = [item.type for item in quota.spec.quotas]
    twice = next((index for index, kind in enumerate(kinds) if kind in kinds[:index]), None)
    message = "The quota is valid"
    if twice is not None:
        message = f"spec.quotas[{twice}].type: {kinds[twice]} is listed twice; the smaller value counts"
    verdict = Verdict("Accepted", "True", "Accepted", message)
    return await _write_quota(context, key, about(quota, entry.version), verdict, kinds)


async def _write_quota(context: Context, key: Key, told: About, verdict: Verdict, kinds: Sequence[str]) -> float | None:
    """With what was used, if that may be written now. Returns when it may, if not."""
    spending = context.spending
    live = context.status.latest(told).get("quotaStatus") or []
    entries = spending.entries(key, kinds, live)
    fresh = entries != live
    wait_s = spending.wait_s(key) if fresh else 0.0
    if wait_s > 0:
        fresh, entries = False, live
    # What stands there is said again, or an apply would take it away; what nobody reported is not ours to remove.
    status = {"quotaStatus": entries} if entries else {}
    foreign = frozenset() if spending.heard_of(key) else frozenset({"quotaStatus"})
    if await context.status.write(told, [verdict], status, foreign=foreign) and fresh:
        spending.written(key)
    return wait_s or None
