"""Policy as a request needs it: digest to principal, model to grant, grant to the rules it must fit under.

An Index never changes; a new one takes its place by one assignment. `update` costs what changed: the principals of
tokens that changed, and of those whose endpoint or quota did. It may run in any thread (`LiveIndex` does that).

Fails closed: a grant whose quota is missing is there and refuses; one whose endpoint is missing is none; a secret that
two tokens share belongs to neither.
"""

import asyncio
from collections import defaultdict
from collections.abc import Mapping
from typing import Final, TypeAlias

import msgspec

from apis.policy import EMPTY, Endpoint, Key, Policy, Quota, Token
from apis.policy import Grant as GrantPolicy
from extproc.limits.model import Rule, Unit
from extproc.snapshot.breath import let_go

_RATES: Final[Mapping[str, tuple[Unit, int]]] = {
    "rpm": ("requests", 60),
    "rpd": ("requests", 86_400),
    "tpm": ("total", 60),
    "tpd": ("total", 86_400),
}


class Grant(msgspec.Struct, frozen=True, gc=False):
    """One model a principal may use."""

    name: str
    """of the ArksEndpoint"""
    endpoint: Endpoint
    rules: tuple[Rule, ...]
    """rates, then quota, then concurrency; refuses nothing where empty"""
    problem: str = ""
    """why every request under this grant is refused; fit for the client's eyes"""


class Principal(msgspec.Struct, frozen=True, gc=False):
    """One token, and by public model name what it may use."""

    token: Token
    grants: dict[str, Grant]


class Ambiguous(msgspec.Struct, frozen=True, gc=False):
    """Tokens that share one secret: none of them is accepted."""

    tokens: tuple[Key, ...]


Found: TypeAlias = Principal | Ambiguous


class Index(msgspec.Struct, frozen=True):
    policy: Policy
    principals: dict[bytes, Found]
    """by SHA-256 of the secret"""
    models: dict[str, dict[str, Endpoint]]
    """namespace to public model name to endpoint; of two with one name, the first by resource name"""
    holders: dict[bytes, frozenset[Key]]
    """tokens by digest, where more than one has it"""
    users: dict[tuple[str, str, str], frozenset[Key]]
    """tokens by what they name: ("e" or "q", namespace, name)"""
    quota_rules: dict[Key, tuple[Rule, ...]]

    @classmethod
    def empty(cls) -> "Index":
        return cls(EMPTY, {}, {}, {}, {}, {})

    @classmethod
    def build(cls, policy: Policy) -> "Index":
        return cls.update(cls.empty(), policy)

    @classmethod
    def update(cls, old: "Index", policy: Policy) -> "Index":
        """The index of `policy`, made of `old`'s parts wherever the policy did not change.

        Records are compared by identity first, as `apis.compile.link` keeps them.
        """
        before = old.policy
        if policy is before:
            return old
        tokens = _changed(before.tokens, policy.tokens)
        quotas = _changed(before.quotas, policy.quotas)
        endpoints = _changed(before.endpoints, policy.endpoints)
        users = _users(old, policy, tokens)
        affected = set(tokens)
        for namespace, name in quotas:
            affected |= users.get(("q", namespace, name), frozenset())
        for namespace, name in endpoints:
            affected |= users.get(("e", namespace, name), frozenset())

        quota_rules = dict(old.quota_rules)
        for key in quotas:
            quota_rules.pop(key, None)
            if key in policy.quotas:
                quota_rules[key] = _quota_rules(policy.quotas[key])
        principals, holders = _principals(old, policy, affected, quota_rules)
        models = old.models if not endpoints else _models(old, policy, {namespace for namespace, _ in endpoints})
        return cls(policy, principals, models, holders, users, quota_rules)


class LiveIndex:
    """The current index. Changes are worked out in a thread, one after the other, and take effect by one assignment."""

    def __init__(self) -> None:
        self.current = Index.empty()
        self._one = asyncio.Lock()

    def replace(self, policy: Policy) -> Index:
        """At once, in this thread: for the first start."""
        self.current = Index.update(self.current, policy)
        return self.current

    async def apply(self, policy: Policy) -> Index:
        async with self._one:
            old = self.current
            self.current = await asyncio.to_thread(Index.update, old, policy)
            retired: list[Found] = list(old.principals.values())
            del old
            await asyncio.to_thread(let_go, retired)
            return self.current


def _changed(before: Mapping[Key, object], now: Mapping[Key, object]) -> list[Key]:
    """Keys added, removed or with another record."""
    if before is now:
        return []
    get = before.get
    found = [key for key, record in now.items() if (known := get(key)) is not record and known != record]
    if len(now) - len(before) != len(found) or found:
        found += (key for key in before if key not in now)
    return found


def _users(old: Index, policy: Policy, tokens: list[Key]) -> dict[tuple[str, str, str], frozenset[Key]]:
    gone: defaultdict[tuple[str, str, str], set[Key]] = defaultdict(set)
    come: defaultdict[tuple[str, str, str], set[Key]] = defaultdict(set)
    for key in tokens:
        for table, token in ((gone, old.policy.tokens.get(key)), (come, policy.tokens.get(key))):
            for grant in token.grants if token else ():
                table["e", key[0], grant.endpoint].add(key)
                if grant.quota is not None:
                    table["q", key[0], grant.quota].add(key)
    if not gone and not come:
        return old.users
    users = dict(old.users)
    for name in {*gone, *come}:
        if gone.get(name) == come.get(name):
            continue
        kept = (users.get(name, frozenset()) - gone.get(name, set())) | come.get(name, set())
        if kept:
            users[name] = kept
        else:
            users.pop(name, None)
    return users


def _principals(
    old: Index, policy: Policy, affected: set[Key], quota_rules: dict[Key, tuple[Rule, ...]]
) -> tuple[dict[bytes, Found], dict[bytes, frozenset[Key]]]:
    if not affected:
        return old.principals, old.holders
    principals, holders = dict(old.principals), dict(old.holders)
    owners: dict[bytes, set[Key]] = {}

    def owners_of(digest: bytes) -> set[Key]:
        if digest not in owners:
            known = old.principals.get(digest)
            if isinstance(known, Principal):
                owners[digest] = {(known.token.namespace, known.token.name)}
            else:
                owners[digest] = set(old.holders.get(digest, ()))
        return owners[digest]

    for key in affected:
        was = old.policy.tokens.get(key)
        if was is not None:
            owners_of(was.digest).discard(key)
    for key in affected:
        now = policy.tokens.get(key)
        if now is not None:
            owners_of(now.digest).add(key)
    for digest, keys in owners.items():
        holders.pop(digest, None)
        if not keys:
            principals.pop(digest, None)
        elif len(keys) == 1:
            principals[digest] = _principal(policy, policy.tokens[next(iter(keys))], quota_rules)
        else:
            principals[digest] = Ambiguous(tuple(sorted(keys)))
            holders[digest] = frozenset(keys)
    return principals, holders


def _principal(policy: Policy, token: Token, quota_rules: dict[Key, tuple[Rule, ...]]) -> Principal:
    namespace, name = token.namespace, token.name
    grants: dict[str, Grant] = {}
    concurrency: tuple[Rule, ...] = ()
    if token.max_concurrent_requests is not None:
        concurrency = (
            Rule(f"concurrent/{namespace}/{name}", "concurrency", "concurrent", token.max_concurrent_requests, 0),
        )
    for grant in token.grants:
        endpoint = policy.endpoints.get((namespace, grant.endpoint))
        # What a token's qos lists first wins, also where two endpoints share one public name.
        if endpoint is not None and endpoint.model not in grants:
            grants[endpoint.model] = _grant(token, grant, endpoint, quota_rules, concurrency)
    return Principal(token, grants)


def _grant(
    token: Token,
    grant: GrantPolicy,
    endpoint: Endpoint,
    quota_rules: dict[Key, tuple[Rule, ...]],
    concurrency: tuple[Rule, ...],
) -> Grant:
    problem = ""
    quota: tuple[Rule, ...] = ()
    if grant.quota is not None:
        found = quota_rules.get((token.namespace, grant.quota))
        if found is None:
            problem = f"The quota '{grant.quota}' that this token's use of the model is under does not exist."
        else:
            quota = found
    prefix = f"rate/{token.namespace}/{token.name}/{grant.endpoint}/"
    rates = tuple(Rule(prefix + rate.kind, rate.kind, *_bound(rate.kind, rate.value)) for rate in grant.rates)
    return Grant(grant.endpoint, endpoint, rates + quota + concurrency, problem)


def _bound(kind: str, value: int) -> tuple[Unit, int, int]:
    unit, window_s = _RATES[kind]
    return unit, value, window_s


def _quota_rules(quota: Quota) -> tuple[Rule, ...]:
    prefix = f"quota/{quota.namespace}/{quota.name}/"
    return tuple(Rule(prefix + limit.kind, limit.kind, limit.kind, limit.value, 0) for limit in quota.limits)


def _models(old: Index, policy: Policy, namespaces: set[str]) -> dict[str, dict[str, Endpoint]]:
    fresh: defaultdict[str, dict[str, Endpoint]] = defaultdict(dict)
    for (namespace, name), endpoint in policy.endpoints.items():
        if namespace in namespaces:
            known = fresh[namespace].get(endpoint.model)
            if known is None or name < known.name:
                fresh[namespace][endpoint.model] = endpoint
    kept = {namespace: table for namespace, table in old.models.items() if namespace not in namespaces}
    return {**kept, **fresh}
