"""What reaches the engine: the client's bytes, nothing it may not say, and lengths that are right."""

import hashlib
import io
import json
import uuid

import pytest

from apis.eds import ENGINES_CLUSTER
from tests.harness.client import CHAT, RawClient, bearer, chat, events, head
from tests.harness.gateway import backend, document, endpoint, policy, route, running_engine, running_gateway, token
from tests.harness.http2 import http2_request

ALICE = bearer("sk-alice")
BOB = bearer("sk-bob")
STEERING = {
    "kv_transfer_params": {"do_remote_prefill": True, "remote_host": "10.0.0.1"},
    "bootstrap_host": "10.0.0.1",
    "bootstrap_port": 8998,
    "bootstrap_room": 1,
    "session_id": "x",
    "session_params": {},
    "vllm_xargs": {"a": 1},
    "priority": -100,
    "cache_salt": "mine",
    "custom_logit_processor": "gASV",
    "data_parallel_rank": 3,
    "routed_dp_rank": 3,
    "disagg_prefill_dp_rank": 3,
    "extra_key": "mine",
    "rid": "another's",
    "lora_path": "another's",
    "nvext": {"backend_instance_id": 1},
}
ODD = (
    '{ "model" :"qwen-7b",\t"messages":[{"role":"user","content":"h\\u00e9 \\"usage\\" 日本 \\ud83d\\ude80"}],\r\n'
    ' "zz":1e400 ,"max_tokens":3}'
).encode()


def the_policy(engine) -> str:
    own = {"routeConfigs": [route("engine", 1)]}
    salted_elsewhere = document(
        "ArksEndpoint", "salted", {"gatewayRef": {"name": "g"}, "cacheSaltPerTenant": True}, namespace="other"
    )
    bob = {
        "token": "sk-bob",
        "qos": [{"arksEndpoint": {"name": "salted"}}],
    }
    return policy(
        endpoint(),
        endpoint("renamed", modelName="Qwen/Qwen2.5-7B"),
        endpoint("open", allowedEngineFields=["priority", "bootstrap_*", "background"], **own),
        endpoint("salted", cacheSaltPerTenant=True, **own),
        salted_elsewhere,
        backend("engine", engine.address),
        token("alice", "sk-alice", endpoints=("qwen-7b", "renamed", "open", "salted"), rates={"rpm": 10**6}),
        document("ArksToken", "bob", bob, namespace="other"),
    )


@pytest.fixture(scope="module")
def engine():
    flags = ("--record", "20", "--allow-fault-headers", "--max-body-bytes", "100000000")
    models = [part for name in ("renamed", "Qwen/Qwen2.5-7B", "open", "salted") for part in ("--model", name)]
    with running_engine(*flags, *models) as one:
        yield one


@pytest.fixture(scope="module")
def gateway(engine, tmp_path_factory):
    with running_gateway(tmp_path_factory.mktemp("bodies"), the_policy(engine), [engine]) as one:
        yield one


async def arrived(engine, session):
    found = await engine.recorded(session)
    assert len(found) == 1, found
    return found[0]


def sent_to_engines(gateway) -> int:
    """Envoy's own count."""
    name = f"cluster.{ENGINES_CLUSTER}.upstream_rq_total"
    return gateway.stats(f"^{name}$")[name]


def length_of(request) -> int | None:
    value = request["headers"].get("content-length")
    return None if value is None else int(value)


@pytest.fixture(autouse=True)
async def nothing_recorded(engine, session):
    await engine.recorded(session)


async def test_odd_body_arrives_byte_for_byte(gateway, engine, session):
    headers = {**ALICE, "Content-Type": "application/json"}
    async with session.post(gateway.url + CHAT + "?beta=true&x=%20", data=ODD, headers=headers) as answer:
        assert answer.status == 200, await answer.text()
    request = await arrived(engine, session)
    assert request["body"] == ODD
    assert length_of(request) == len(ODD)
    assert request["target"] == CHAT + "?beta=true&x=%20"


async def test_stream_that_asks_for_usage_itself_arrives_byte_for_byte(gateway, engine, session):
    body = ODD.replace(b'"zz":1e400', b'"stream" : true, "stream_options":{"include_usage":true }')
    headers = {**ALICE, "Content-Type": "application/json"}
    async with session.post(gateway.url + CHAT, data=body, headers=headers) as answer:
        assert answer.status == 200
        await answer.read()
    assert (await arrived(engine, session))["body"] == body


async def test_only_the_usage_option_is_added_to_a_stream(gateway, engine, session):
    body = ODD.replace(b'"zz":1e400', b'"stream" : true')
    async with session.post(
        gateway.url + CHAT, data=body, headers={**ALICE, "Content-Type": "application/json"}
    ) as answer:
        assert answer.status == 200
        await answer.read()
    request = await arrived(engine, session)
    assert request["body"] == body[:-1] + b',"stream_options":{"include_usage":true}}'
    assert length_of(request) == len(request["body"])


async def test_clients_other_stream_options_stay(gateway, engine, session):
    sent = chat(stream=True, stream_options={"include_usage": False, "continuous_usage_stats": False})
    async with session.post(gateway.url + CHAT, json=sent, headers=ALICE) as answer:
        await answer.read()
    told = json.loads((await arrived(engine, session))["body"])
    assert told.pop("stream_options") == {"include_usage": True, "continuous_usage_stats": False}
    del sent["stream_options"]
    assert told == sent


async def test_fields_that_steer_the_engine_are_removed(gateway, engine, session):
    sent = {**chat(max_tokens=2, user="kept"), **STEERING, "seed": 1}
    async with session.post(gateway.url + CHAT, json=sent, headers=ALICE) as answer:
        assert answer.status == 200
    request = await arrived(engine, session)
    assert json.loads(request["body"]) == {**chat(max_tokens=2, user="kept"), "seed": 1}
    assert length_of(request) == len(request["body"])


@pytest.mark.parametrize("name", ["bootstrap_host", "priority", "kv_transfer_params"])
async def test_field_written_with_escapes_is_removed_too(gateway, engine, session, name):
    escaped = "".join(f"\\u{ord(char):04x}" for char in name)
    body = json.dumps(chat(max_tokens=2))[:-1] + f', "{escaped}": {{"host": "10.0.0.1"}}}}'
    headers = {**ALICE, "Content-Type": "application/json"}
    async with session.post(gateway.url + CHAT, data=body, headers=headers) as answer:
        assert answer.status == 200
    assert json.loads((await arrived(engine, session))["body"]) == chat(max_tokens=2)


async def test_only_fields_that_the_endpoint_allows_pass(gateway, engine, session):
    sent = {**chat(model="open", max_tokens=2), **STEERING}
    async with session.post(gateway.url + CHAT, json=sent, headers=ALICE) as answer:
        assert answer.status == 200
    told = json.loads((await arrived(engine, session))["body"])
    assert told.keys() - chat(max_tokens=2).keys() == {"priority", "bootstrap_host", "bootstrap_port", "bootstrap_room"}


@pytest.mark.parametrize("field", [{"background": True}, {"previous_response_id": "resp_1"}, {"conversation": "c1"}])
async def test_responses_that_reach_beyond_themselves_are_refused(gateway, engine, session, field):
    sent = {"model": "qwen-7b", "input": "Hello", **field}
    async with session.post(gateway.url + "/v1/responses", json=sent, headers=ALICE) as answer:
        error = (await answer.json())["error"]
    assert (answer.status, error["code"], error["param"]) == (400, "invalid_field", next(iter(field)))


async def test_responses_reach_beyond_themselves_where_the_endpoint_allows_it(gateway, engine, session):
    said = {"input": "Hello", "previous_response_id": None}
    for sent in ({"model": "qwen-7b", "background": False, **said}, {"model": "open", "background": True, **said}):
        async with session.post(gateway.url + "/v1/responses", json=sent, headers=ALICE) as answer:
            assert answer.status == 200, await answer.text()
        assert json.loads((await arrived(engine, session))["body"]) == sent


async def test_cache_salt_is_the_tenants_own_and_never_the_clients(gateway, engine, session):
    salts = []
    for headers, forged in ((ALICE, {}), (ALICE, {"cache_salt": "bobs"}), (BOB, {}), (BOB, {"cache_salt": "alices"})):
        sent = {**chat(model="salted", max_tokens=2), **forged}
        async with session.post(gateway.url + CHAT, json=sent, headers=headers) as answer:
            assert answer.status == 200, await answer.text()
        request = await arrived(engine, session)
        salts.append(json.loads(request["body"])["cache_salt"])
        assert length_of(request) == len(request["body"])
    assert salts[0] == salts[1] != salts[2] == salts[3]
    assert len(salts[0]) >= 32
    assert "default" not in salts[0]


STEERING_HEADERS = (
    *("x-vllm-priority", "x-session-id", "x-data-parallel-rank", "x-smg-routing-key"),
    *("x-worker-instance-id", "x-prefill-instance-id", "x-dp-rank", "x-prefill-dp-rank"),
    *("x-dynamo-worker-instance-id", "x-dynamo-prefill-instance-id", "x-dynamo-dp-rank", "x-dynamo-prefill-dp-rank"),
    *("x-dynamo-request-priority", "x-dynamo-request-strict-priority", "x-dynamo-meta-policy-class"),
    *("x-dynamo-session-id", "x-dynamo-session-final", "x-dynamo-parent-session-id", "x-parent-session-id"),
    *("x-bypass-remote-prefill", "x-tenant-id"),
)


async def test_credentials_and_owned_headers_never_reach_the_engine(gateway, engine, session):
    forged = {
        **ALICE,
        **dict.fromkeys(STEERING_HEADERS, "1"),
        "X-Api-Key": "sk-alice",
        "x-gateway-destination-endpoint": "10.0.0.1:80",
        "x-gateway-destination-endpoint-subset": "10.0.0.1:80",
        "model": "other",
        "namespace": "kube-system",
        "username": "root",
        "x-arks-tenant": "other",
        "x-arks-priority": "1000",
        "x-envoy-upstream-rq-timeout-ms": "1",
        "x-envoy-retry-on": "5xx",
        "content-encoding": "identity",
        "x-custom": "kept",
    }
    async with session.post(gateway.url + CHAT, json=chat(), headers=forged) as answer:
        assert answer.status == 200
    headers = (await arrived(engine, session))["headers"]
    assert headers["x-custom"] == "kept"
    assert headers["x-gateway-destination-endpoint"] == engine.address
    assert (headers["model"], headers["namespace"], headers["username"]) == ("qwen-7b", "default", "alice")
    gone = {"authorization", "x-api-key", "x-gateway-destination-endpoint-subset", "x-arks-tenant", "x-arks-priority"}
    gone |= {"x-envoy-upstream-rq-timeout-ms", "x-envoy-retry-on", *STEERING_HEADERS}
    assert not gone & headers.keys()
    assert "sk-alice" not in json.dumps(headers)


async def test_a_request_id_of_any_length_costs_the_ledger_a_bounded_row(gateway):
    request_id = str(uuid.uuid4()) + "x" * 50_000
    headers = {**ALICE, "Content-Type": "application/json", "X-Request-Id": request_id}
    async with RawClient(gateway.url) as client:
        answer = await client.request(ODD, headers=headers)
    assert (answer.status, answer.headers["x-request-id"]) == (200, request_id)
    assert (await gateway.row_of(request_id[:256]))["status"] == 200


async def test_engine_reads_the_body_as_it_was_metered(gateway, engine, session):
    """A body may be valid JSON and, decompressed, another one: an engine must not be told to decompress."""
    headers = {**ALICE, "Content-Type": "application/json", "Content-Encoding": "deflate"}
    async with RawClient(gateway.url) as client:
        assert (await client.request(ODD, headers=headers)).status == 200
    request = await arrived(engine, session)
    assert request["body"] == ODD
    assert "content-encoding" not in request["headers"]


async def test_public_model_name_goes_to_the_engine_as_it_is(gateway, engine, session):
    sent = chat(model="Qwen/Qwen2.5-7B", max_tokens=2)
    async with session.post(gateway.url + CHAT, json=sent, headers=ALICE) as answer:
        assert answer.status == 200
        request_id = answer.headers["x-request-id"]
    request = await arrived(engine, session)
    assert json.loads(request["body"])["model"] == "Qwen/Qwen2.5-7B"
    assert request["headers"]["model"] == "renamed"
    row = await gateway.row_of(request_id)
    assert (row["model"], row["endpoint"]) == ("Qwen/Qwen2.5-7B", "renamed")


# --- lengths, over every way a body can come -----------------------------------------------------------------------

CHANGED = json.dumps(chat(stream=True, max_tokens=3)).encode()


def chunked(body: bytes) -> bytes:
    pieces = (body[at : at + 17] for at in range(0, len(body), 17))
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


@pytest.mark.parametrize("body", [ODD, CHANGED], ids=["as it is", "changed"])
async def test_chunked_upload(gateway, engine, session, body):
    headers = {**ALICE, "Content-Type": "application/json", "Transfer-Encoding": "chunked"}
    async with RawClient(gateway.url) as client:
        await client.send(head("POST", CHAT, headers) + chunked(body))
        answer = await client.answer()
    assert answer.status == 200, answer
    request = await arrived(engine, session)
    assert request["body"].startswith(body[:-1])
    assert length_of(request) in (None, len(request["body"]))


@pytest.mark.parametrize("body", [ODD, CHANGED], ids=["as it is", "changed"])
@pytest.mark.parametrize("say_length", [True, False])
async def test_http2_upload(gateway, engine, session, body, say_length):
    headers = {**ALICE, "content-type": "application/json", "x-request-id": str(uuid.uuid4())}
    answer = await http2_request(gateway.url, CHAT, headers, body, say_length=say_length)
    assert answer.status == 200, answer
    request = await arrived(engine, session)
    assert request["body"].startswith(body[:-1])
    assert length_of(request) in (None, len(request["body"]))
    row = await gateway.row_of(headers["x-request-id"])
    assert (row["completion_tokens"], row["accuracy"]) == (3, "exact")
    if body is CHANGED:
        assert events(answer.body)[-1] == "[DONE]"
        assert b'"usage"' not in answer.body


@pytest.mark.parametrize("body", [ODD, CHANGED], ids=["as it is", "changed"])
async def test_http2_upload_that_ends_in_trailers(gateway, engine, session, body):
    headers = {**ALICE, "content-type": "application/json", "x-request-id": str(uuid.uuid4())}
    answer = await http2_request(gateway.url, CHAT, headers, body, trailers={"x-checksum": "1"})
    assert answer.status == 200, answer
    request = await arrived(engine, session)
    assert request["body"].startswith(body[:-1])
    assert length_of(request) in (None, len(request["body"]))
    assert (await gateway.row_of(headers["x-request-id"]))["completion_tokens"] == 3


async def test_body_that_waits_for_100_continue(gateway, engine, session):
    headers = {**ALICE, "Content-Type": "application/json", "Expect": "100-continue"}
    async with RawClient(gateway.url) as client:
        await client.send(head("POST", CHAT, headers, ODD))
        assert b"100" in await client.reader.readline()
        assert await client.reader.readline() == b"\r\n"
        await client.send(ODD)
        assert (await client.answer()).status == 200
    assert (await arrived(engine, session))["body"] == ODD


async def test_refusal_at_the_headers_does_not_ask_for_the_body(gateway):
    headers = {"Authorization": "Bearer sk-nobody", "Expect": "100-continue"}
    async with RawClient(gateway.url) as client:
        await client.send(head("POST", CHAT, headers, b"x" * 10_000_000))
        assert (await client.answer()).status == 401


async def test_upload_one_byte_at_a_time(gateway, engine, session):
    headers = {**ALICE, "Content-Type": "application/json"}
    async with RawClient(gateway.url) as client:
        for byte in head("POST", CHAT, headers, ODD) + ODD:
            await client.send(bytes((byte,)))
        assert (await client.answer()).status == 200
    assert (await arrived(engine, session))["body"] == ODD


async def test_several_requests_on_one_connection(gateway, engine, session):
    """A wrong length would eat into the next request."""
    headers = {**ALICE, "Content-Type": "application/json"}
    async with RawClient(gateway.url) as client:
        for body in (ODD, CHANGED, ODD, CHANGED):
            assert (await client.request(body, headers=headers)).status == 200
    assert [len(one["body"]) - len(ODD) for one in await engine.recorded(session)][::2] == [0, 0]


# --- sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True], ids=["as it is", "changed"])
async def test_20_mib_body_passes(gateway, engine, session, stream):
    embeddings = b'{"model":"qwen-7b","prompt":"' + b"x" * (20 * 1024 * 1024) + b'","max_tokens":1'
    body = embeddings + (b',"stream":true}' if stream else b"}")
    headers = {**ALICE, "Content-Type": "application/json"}
    async with session.post(gateway.url + "/v1/completions", data=io.BytesIO(body), headers=headers) as answer:
        await answer.read()
    request = await arrived(engine, session)
    assert length_of(request) == len(request["body"])
    kept = request["body"][: len(body) - 1]
    assert hashlib.sha256(kept).digest() == hashlib.sha256(body[:-1]).digest()


async def test_body_over_50_mib_never_reaches_the_engine(gateway, engine, session):
    async with RawClient(gateway.url) as client:
        answer = await client.request(b" " * (50 * 1024 * 1024 + 1), headers=ALICE)
    assert (answer.status, answer.code) == (413, "body_too_large")
    assert await engine.recorded(session) == []


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer sk-nobody"}], ids=["none", "unknown"])
@pytest.mark.parametrize(
    ("method", "path"), [("POST", CHAT), ("GET", CHAT), ("GET", "/v1/models"), ("GET", "/sim/requests")]
)
async def test_no_request_without_a_valid_token_reaches_an_engine(gateway, engine, session, headers, method, path):
    before = sent_to_engines(gateway)
    for body in (None, json.dumps(chat()).encode()):
        async with RawClient(gateway.url) as client:
            answer = await client.request(body, method=method, path=path, headers=headers)
        assert answer.status == 401
    assert await engine.recorded(session) == []
    assert sent_to_engines(gateway) == before


@pytest.mark.parametrize(
    "path",
    [
        "/", "/metrics", "/sim/requests", "/v1/load_lora_adapter", "/v1/chat/completions/", "/v1/chat//completions/x",
        "/V1/chat/completions", "/v1/models/../../metrics", "/v1/chat/completions/../../../sleep", "/tokenize",
        "/v1/chat%2Fcompletions/x", "/invocations", "/collective_rpc", "/v1/audio/transcriptions", "/pooling",
        "/health",
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["POST", "GET", "DELETE"])
async def test_unmetered_paths_never_reach_an_engine(gateway, engine, session, path, method):
    before = sent_to_engines(gateway)
    async with RawClient(gateway.url) as client:
        answer = await client.request(json.dumps(chat()).encode(), method=method, path=path, headers=ALICE)
    assert (answer.status, answer.code) == (404, "unknown_path")
    assert sent_to_engines(gateway) == before


async def test_models_are_listed_per_token_without_an_engine(gateway, engine, session):
    async with session.get(gateway.url + "/v1/models", headers=ALICE) as answer:
        assert [one["id"] for one in (await answer.json())["data"]] == ["qwen-7b", "Qwen/Qwen2.5-7B", "open", "salted"]
    async with session.get(gateway.url + "/v1/models", headers=BOB) as answer:
        assert [one["id"] for one in (await answer.json())["data"]] == ["salted"]
    for path in ("/v1/models/Qwen/Qwen2.5-7B", "/v1/models/Qwen%2FQwen2.5-7B"):
        async with session.get(gateway.url + path, headers=ALICE) as answer:
            assert (await answer.json())["id"] == "Qwen/Qwen2.5-7B"
    async with session.get(gateway.url + "/v1/models/qwen-7b", headers=BOB) as answer:
        assert answer.status == 404
