"""Who may do what, at every moment of a policy that changes; the incremental index equals the one built afresh."""

from hypothesis import given, settings
from hypothesis import strategies as st

from apis.policy import EMPTY, Endpoint, Grant, Policy, Quota, QuotaLimit, RateLimit, Token
from extproc.limits.model import Rule
from extproc.snapshot.index import Ambiguous, Index, LiveIndex, Principal


def policy(*records: Token | Quota | Endpoint) -> Policy:
    made = Policy({}, {}, {})
    for record in records:
        table = {Token: made.tokens, Quota: made.quotas, Endpoint: made.endpoints}[type(record)]
        table[record.namespace, record.name] = record
    return made


def token(name: str = "alice", digest: bytes = b"a", *grants: Grant, namespace: str = "team", **fields) -> Token:
    return Token(namespace, name, digest, grants, **fields)


QWEN = Endpoint("team", "qwen", "Qwen/Qwen2.5", None)
BASIC = Quota("team", "basic", (QuotaLimit("prompt", 10), QuotaLimit("total", 20)))


def principal(index: Index, digest: bytes = b"a") -> Principal:
    found = index.principals[digest]
    assert isinstance(found, Principal)
    return found


def test_a_grant_carries_every_rule_under_its_stable_key():
    rates = (RateLimit("rpm", 1), RateLimit("rpd", 2), RateLimit("tpm", 3), RateLimit("tpd", 4))
    who = token("alice", b"a", Grant("qwen", rates, "basic"), max_concurrent_requests=5, priority=9)
    found = principal(Index.build(policy(who, QWEN, BASIC)))
    assert found.token is who
    grant = found.grants["Qwen/Qwen2.5"]
    assert (grant.endpoint, grant.problem) == (QWEN, "")
    assert grant.rules == (
        Rule("rate/team/alice/qwen/rpm", "rpm", "requests", 1, 60),
        Rule("rate/team/alice/qwen/rpd", "rpd", "requests", 2, 86_400),
        Rule("rate/team/alice/qwen/tpm", "tpm", "total", 3, 60),
        Rule("rate/team/alice/qwen/tpd", "tpd", "total", 4, 86_400),
        Rule("quota/team/basic/prompt", "prompt", "prompt", 10, 0),
        Rule("quota/team/basic/total", "total", "total", 20, 0),
        Rule("concurrent/team/alice", "concurrency", "concurrent", 5, 0),
    )


def test_a_missing_quota_is_a_reason_and_no_freedom():
    grant = principal(Index.build(policy(token("alice", b"a", Grant("qwen", (), "basic")), QWEN))).grants[
        "Qwen/Qwen2.5"
    ]
    assert "quota 'basic'" in grant.problem


def test_a_missing_endpoint_is_no_grant():
    assert principal(Index.build(policy(token("alice", b"a", Grant("qwen"))))).grants == {}


def test_a_missing_endpoint_does_not_stand_before_another_that_serves_its_name():
    """As where an endpoint was replaced by one of another name that serves the same model."""
    new = Endpoint("team", "qwen-2", "qwen", None)
    index = Index.build(policy(token("alice", b"a", Grant("qwen"), Grant("qwen-2")), new))
    assert principal(index).grants["qwen"].endpoint is new


def test_an_endpoint_or_quota_of_another_namespace_is_not_meant():
    elsewhere = (Endpoint("other", "qwen", "qwen", None), Quota("other", "basic", ()))
    assert principal(Index.build(policy(token("alice", b"a", Grant("qwen", (), "basic")), *elsewhere))).grants == {}


def test_two_tokens_with_one_secret_are_both_refused_until_one_goes():
    both = policy(token("alice", b"same"), token("bob", b"same"))
    index = Index.build(both)
    assert index.principals[b"same"] == Ambiguous((("team", "alice"), ("team", "bob")))
    left = Index.update(index, policy(both.tokens["team", "bob"]))
    assert principal(left, b"same").token.name == "bob"
    again = Index.update(left, policy(*both.tokens.values(), token("carol", b"same", namespace="z")))
    assert len(again.principals[b"same"].tokens) == 3
    assert Index.update(again, EMPTY).principals == {}


def test_a_renewed_secret_ends_the_old_one():
    index = Index.update(Index.build(policy(token("alice", b"old"))), policy(token("alice", b"new")))
    assert set(index.principals) == {b"new"}


def test_secrets_may_change_hands():
    index = Index.build(policy(token("alice", b"1"), token("bob", b"2")))
    index = Index.update(index, policy(token("alice", b"2"), token("bob", b"1")))
    assert (principal(index, b"1").token.name, principal(index, b"2").token.name) == ("bob", "alice")


def test_what_did_not_change_is_the_same_object():
    first = policy(token("alice", b"a", Grant("qwen", (), "basic")), token("bob", b"b", Grant("other")), QWEN, BASIC)
    index = Index.build(first)
    moved = Endpoint("team", "qwen", "Qwen/Qwen2.5", ())
    after = Index.update(index, Policy(first.tokens, first.quotas, {("team", "qwen"): moved}))
    assert after.principals[b"b"] is index.principals[b"b"]
    assert principal(after).grants["Qwen/Qwen2.5"].endpoint is moved
    assert Index.update(after, after.policy) is after


def test_an_index_in_use_never_changes():
    index = Index.build(policy(token("alice", b"a", Grant("qwen")), QWEN))
    before = (dict(index.principals), {key: dict(table) for key, table in index.models.items()})
    Index.update(index, policy(token("bob", b"b")))
    assert (index.principals, index.models) == before


def test_of_two_endpoints_with_one_model_the_first_counts_and_a_grant_means_its_own():
    one, two = Endpoint("team", "b", "m", None), Endpoint("team", "a", "m", None)
    index = Index.build(policy(one, two, token("alice", b"a", Grant("b")), token("bob", b"b", Grant("b"), Grant("a"))))
    assert index.models == {"team": {"m": two}}
    assert principal(index, b"a").grants["m"].endpoint is one
    assert principal(index, b"b").grants["m"].endpoint is one


async def test_the_live_index_takes_changes_in_their_order():
    live = LiveIndex()
    assert live.replace(policy(token())).principals
    assert (await live.apply(EMPTY)).principals == {}
    assert live.current.policy is EMPTY


_NAMES = st.sampled_from(["a", "b", "c"])
_SPACES = st.sampled_from(["x", "y"])
_GRANTS = st.lists(
    st.builds(
        Grant, _NAMES, st.just(()) | st.builds(lambda n: (RateLimit("rpm", n),), st.integers(0, 2)), st.none() | _NAMES
    ),
    max_size=3,
).map(tuple)
_TOKENS = st.builds(
    Token, _SPACES, _NAMES, st.sampled_from([b"1", b"2", b"3"]), _GRANTS, max_concurrent_requests=st.none() | st.just(1)
)
_QUOTAS = st.builds(Quota, _SPACES, _NAMES, st.builds(lambda n: (QuotaLimit("total", n),), st.integers(0, 2)))
_ENDPOINTS = st.builds(Endpoint, _SPACES, _NAMES, st.sampled_from(["m", "n"]), st.none() | st.just(()))
_POLICIES = st.lists(_TOKENS | _QUOTAS | _ENDPOINTS, max_size=12).map(lambda records: policy(*records))


@settings(max_examples=300, deadline=None)
@given(st.lists(_POLICIES, min_size=2, max_size=5))
def test_following_changes_ends_where_building_afresh_does(policies):
    index = Index.empty()
    for now in policies:
        index = Index.update(index, now)
        fresh = Index.build(now)
        assert index.principals == fresh.principals
        assert index.models == fresh.models
        assert index.users == fresh.users
        assert index.holders == fresh.holders
        assert index.quota_rules == fresh.quota_rules
