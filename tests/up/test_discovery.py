"""Pointing at an engine is enough: its models become endpoints that the compiled policy really serves."""

import pytest
import yaml
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from arks.discovery import engine_models, generate, slug, write_policy
from arks.errors import ArksError, EngineUnreadable
from arks.folders import quickstart
from arks.options import engine_url
from arks.policyfiles import default_models, documents, example
from extproc.snapshot.folder import FolderSource

ONE = engine_url("http://127.0.0.1:8001")
TWO = engine_url("http://127.0.0.1:8002")


@pytest.fixture
async def engine():
    class Fake:
        reply = web.json_response({"data": []})

    async def models(_request):
        return Fake.reply()

    app = web.Application()
    app.router.add_get("/v1/models", models)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    Fake.url = engine_url("http://127.0.0.1:{1}".format(*runner.addresses[0]))
    yield Fake
    await runner.cleanup()


async def compiled(folder):
    taken = []
    source = FolderSource(folder, lambda policy, _notes: taken.append(policy), lambda _errors: None)
    await source.start()
    return taken[-1]


async def test_models_are_asked_for(engine):
    engine.reply = lambda: web.json_response({"data": [{"id": "Qwen/Qwen2.5"}, {"id": "Qwen/Qwen2.5"}, {"id": "b"}]})
    assert await engine_models((engine.url,)) == {engine.url: ("Qwen/Qwen2.5", "b")}


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (lambda: web.json_response({"data": []}), "it serves no model now"),
        (lambda: web.Response(text="<html>"), "did not answer with a list of models"),
        (lambda: web.json_response([1]), "did not answer with a list of models"),
        (lambda: web.Response(status=401), "API key"),
        (lambda: web.Response(status=302, headers={"location": "http://169.254.169.254/"}), "answered 302"),
    ],
)
async def test_what_is_no_engine_is_named_with_its_address(engine, reply, says):
    engine.reply = reply
    with pytest.raises(EngineUnreadable, match=says) as raised:
        await engine_models((engine.url,))
    assert engine.url.url in str(raised.value)


async def test_an_engine_that_is_not_there_is_named():
    with pytest.raises(EngineUnreadable, match=r"--engine http://127.0.0.1:1: cannot be reached"):
        await engine_models((engine_url("http://127.0.0.1:1"),))


async def test_engines_alike_serve_every_model_by_default(tmp_path):
    write_policy(tmp_path, {ONE: ("Qwen/Qwen2.5-7B", "b"), TWO: ("b", "Qwen/Qwen2.5-7B")}, quickstart())
    policy = await compiled(tmp_path)
    assert {endpoint.model: endpoint.routes for endpoint in policy.endpoints.values()} == {
        "Qwen/Qwen2.5-7B": None,
        "b": None,
    }
    (token,) = policy.tokens.values()
    assert {grant.endpoint for grant in token.grants} == {"qwen-qwen2.5-7b", "b"}
    assert all(grant.rates and grant.quota for grant in token.grants)
    assert example(tmp_path).model == "Qwen/Qwen2.5-7B"
    assert default_models(tmp_path) == ["Qwen/Qwen2.5-7B", "b"]


async def test_engines_that_differ_get_only_their_own_models(tmp_path):
    write_policy(tmp_path, {ONE: ("a", "both"), TWO: ("both",)}, quickstart())
    policy = await compiled(tmp_path)
    behind = {
        endpoint.model: {address for route in endpoint.routes for address in route.addresses}
        for endpoint in policy.endpoints.values()
    }
    assert behind == {"a": {"127.0.0.1:8001"}, "both": {"127.0.0.1:8001", "127.0.0.1:8002"}}


def test_a_quickstart_without_a_token_is_an_error():
    with pytest.raises(ArksError, match="no ArksToken"):
        generate({ONE: ("a",)}, [])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_categories=("Z", "C")), min_size=1, max_size=80), min_size=1)
)
def test_any_model_names_become_distinct_kubernetes_names(models):
    import re

    written = generate({ONE: tuple(dict.fromkeys(models))}, list(documents(quickstart())))
    names = [each["metadata"]["name"] for each in written if each["kind"] == "ArksEndpoint"]
    assert len(set(names)) == len(set(models))
    for name in names:
        assert re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*", name), name
        assert len(name) <= 63
    read = list(yaml.safe_load_all(yaml.safe_dump_all(written)))
    public = [
        each["spec"].get("modelName") or each["metadata"]["name"] for each in read if each["kind"] == "ArksEndpoint"
    ]
    assert public == list(dict.fromkeys(models))


def test_names_stay_recognisable():
    assert slug("Qwen/Qwen2.5-7B-Instruct") == "qwen-qwen2.5-7b-instruct"
    assert slug("llama3.2:latest") == "llama3.2-latest"
    assert slug("日本") == "model"


def test_unreadable_policy_files_are_left_to_extproc_to_report(tmp_path):
    (tmp_path / "a.yaml").write_text("kind: [")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe")
    (tmp_path / "c.yaml").write_text("just text\n---\nkind: ArksToken\nspec: 7\n")
    assert example(tmp_path) is None
    assert default_models(tmp_path) == []
