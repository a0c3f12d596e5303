"""A reservation is never smaller than the text, never as large as a picture's base64, and survives absurd numbers."""

import json

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.usage import bounds
from extproc.usage.bounds import (
    TEMPLATE_TOKENS,
    TOKENS_MAX,
    TOOL_TEMPLATE_TOKENS,
    prompt_upper_bound,
    requested_output,
)

MEDIA_TOKENS = 2048
BASE64 = "QUJD" * 5000


def fields(body, *, ascii_only=False):
    return msgspec.json.decode(json.dumps(body, ensure_ascii=ascii_only), type=dict[str, msgspec.Raw])


def bound(api, body, **options):
    return prompt_upper_bound(api, fields(body, **options), MEDIA_TOKENS)


CONTENT = st.one_of(
    st.text(max_size=60),
    st.lists(st.text(max_size=30).map(lambda text: {"type": "text", "text": text}), max_size=3),
)


def text_bytes(node):
    if isinstance(node, str):
        return len(node.encode())
    if isinstance(node, list):
        return sum(map(text_bytes, node))
    return text_bytes(node["text"])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(CONTENT, min_size=1, max_size=5),
    CONTENT,
    st.booleans(),
    st.sampled_from(["chat", "messages", "responses"]),
)
def test_text_is_never_underestimated(contents, system, ascii_only, api):
    messages = [{"role": "user", "content": content} for content in contents]
    body = {"chat": {"messages": messages}, "messages": {"messages": messages, "system": system}}
    request = body.get(api) or {"input": messages, "instructions": "".join("é" for _ in contents)}
    texts = text_bytes(contents) + (text_bytes(system) if api == "messages" else 0)
    texts += 2 * len(contents) if api == "responses" else 0
    found = bound(api, request, ascii_only=ascii_only)
    # ten tokens of chat template for every message
    assert found >= texts + 10 * len(contents) + TEMPLATE_TOKENS
    assert found <= len(json.dumps(request)) + TEMPLATE_TOKENS


def test_text_in_brackets_is_still_text():
    text = "a[0]: [1, 2], b :[x] " * 50
    assert bound("chat", {"messages": [{"role": "user", "content": text}]}) == (
        TEMPLATE_TOKENS + len(json.dumps([{"role": "user", "content": text}]))
    )


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{BASE64}", "detail": "low"}},
        {"type": "image_url", "image_url": "https://example.com/a.png"},
        {"image_url": {"url": BASE64}},
        {"type": "input_audio", "input_audio": {"data": BASE64, "format": "wav"}},
        {"type": "video_url", "video_url": {"url": BASE64}},
        {"type": "input_image", "image_url": BASE64},
        {"type": "input_file", "filename": "a.pdf", "file_data": BASE64},
        {"type": "file", "file": {"file_data": BASE64, "filename": "a.pdf"}},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": BASE64}},
        {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}},
        {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": BASE64}},
    ],
)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("pad", ["", " " * 30])
def test_media_count_their_allowance_and_not_their_base64(part, nested, pad):
    content = [{"type": "text", "text": "what is this?"}, part, part]
    if nested:
        content = [{"type": "tool_result", "tool_use_id": "t", "content": content}]
    raw = json.dumps([{"role": "user", "content": content}]).replace(": [", f":{pad}[").encode()
    found = prompt_upper_bound("chat", {"messages": msgspec.Raw(raw)}, MEDIA_TOKENS)
    assert 2 * MEDIA_TOKENS <= found <= 2 * MEDIA_TOKENS + TEMPLATE_TOKENS + 600


def test_every_kind_of_media_begins_with_a_mark_that_is_looked_for():
    for name in bounds._MEDIA_TYPES:
        assert bounds._media_mark(json.dumps(name).encode())


def test_a_document_of_text_counts_as_text():
    part = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "x" * 9000}}
    assert 9000 < bound("messages", {"messages": [{"role": "user", "content": [part]}]}) < 9500


@pytest.mark.parametrize("name", ["documents", "tools", "chat_template_kwargs"])
def test_text_is_not_taken_for_media_where_templates_write_out_what_is_there(name):
    """Whatever its keys are called: it reserved next to nothing."""
    odd = [{"file": "a", "data": "x" * 10_000, "list": [1]}]
    assert bound("chat", {"messages": [], name: odd}) > 10_000


def test_a_picture_in_a_responses_input_counts_its_allowance():
    body = {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": BASE64}]}]}
    assert MEDIA_TOKENS < bound("responses", body) < MEDIA_TOKENS + 300


@pytest.mark.parametrize(
    ("api", "body", "least", "most"),
    [
        ("completions", {"prompt": "x" * 100}, 102, 102),
        ("completions", {"prompt": [1, 22222, 3]}, 3, 10),
        ("completions", {"prompt": [[1, 2], [3, 4, 5]]}, 5, 20),
        ("completions", {"prompt": ["x" * 50, "{" * 50]}, 100, 110),
        ("completions", {"prompt": "x" * 10, "suffix": "y" * 10}, 20, 24),
        ("embeddings", {"input": ["a" * 10] * 5}, 50 + 2 * 5, 70),
        ("embeddings", {"input": list(range(1000))}, 1000, 1010),
        ("embeddings", {"input": []}, 0, 10),
        ("rerank", {"query": "q" * 100, "documents": ["d" * 10] * 20}, 100 * 20 + 10 * 20, 3000),
        ("rerank", {"query": "q", "documents": [{"text": "d, e"}] * 3}, 15, 100),
        ("score", {"text_1": "a" * 100, "text_2": ["b" * 5] * 10}, 1050, 1300),
        ("score", {"text_1": ["a" * 100] * 10, "text_2": ["b" * 5] * 10}, 1050, 1300),
        (
            "chat",
            {"messages": [], "tools": [{"type": "function"}]},
            TOOL_TEMPLATE_TOKENS + 20,
            TOOL_TEMPLATE_TOKENS + 30,
        ),
        ("chat", {"model": "m" * 500}, 0, 0),
        # what engines read in place of the usual field, or beside it
        ("chat", {"messages": [], "input_ids": list(range(1000))}, 1000, 1010),
        ("responses", {"input": "", "previous_input_messages": [{"content": "x" * 500}]}, 500, 530),
        ("completions", {"prompt": "", "prompt_embeds": "x" * 500}, 500, 510),
        ("messages", {"messages": [], "output_config": {"format": "x" * 500}}, 500, 530),
        ("score", {"data_1": "a" * 100, "data_2": ["b" * 5] * 10}, 1050, 1300),
        ("score", {"queries": "a" * 100, "items": ["b" * 5] * 10}, 1050, 1300),
        ("rerank", {"query": "q", "documents": ["d"] * 10, "instruction": "i" * 100}, 1000, 1200),
    ],
)
def test_other_inputs(api, body, least, most):
    assert least <= bound(api, body) - TEMPLATE_TOKENS <= most


@pytest.mark.parametrize(
    ("api", "body", "tokens"),
    [
        ("chat", {}, 1000),
        ("chat", {"max_tokens": None}, 1000),
        ("chat", {"max_tokens": 5}, 5),
        ("chat", {"max_tokens": 5, "max_completion_tokens": 7}, 7),
        ("chat", {"max_tokens": 5000}, 1000),
        ("chat", {"max_tokens": 5, "n": 3}, 15),
        ("chat", {"n": None}, 1000),
        ("completions", {}, 1000),
        # Limits that only another API's engines heed are none.
        ("chat", {"max_output_tokens": 1}, 1000),
        ("completions", {"max_completion_tokens": 1}, 1000),
        ("responses", {"max_tokens": 1}, 1000),
        ("messages", {"max_completion_tokens": 1}, 1000),
        ("chat", {"max_tokens": 1, "n_predict": 500}, 500),
        ("completions", {"max_tokens": 1, "n_predict": -1}, 1000),
        ("completions", {"max_tokens": 10, "n": 2, "best_of": 4}, 40),
        ("completions", {"max_tokens": 10, "n": 2, "prompt": ["a", "b", "c"]}, 60),
        ("completions", {"max_tokens": 10, "prompt": [1, 2, 3]}, 10),
        ("completions", {"max_tokens": 10, "prompt": [[1, 2], [3]]}, 20),
        ("completions", {"max_tokens": 10, "prompt": []}, 10),
        ("responses", {"max_output_tokens": 9}, 9),
        ("messages", {"max_tokens": 9}, 9),
        ("count_tokens", {"max_tokens": 9}, 0),
        ("embeddings", {"max_tokens": 9}, 0),
        ("rerank", {"max_tokens": 9}, 0),
        ("score", {}, 0),
        ("chat", {"max_tokens": 10**5000}, 1000),
        ("chat", {"max_tokens": -5}, 1000),
        ("chat", {"max_tokens": "x", "n": [1]}, 1000),
        ("chat", {"max_tokens": 1.5}, 1000),
        ("chat", {"n": 10**30}, TOKENS_MAX),
    ],
)
def test_requested_output(api, body, tokens, monkeypatch):
    monkeypatch.setattr("sys.set_int_max_str_digits", lambda digits: None, raising=False)
    raws = {name: msgspec.Raw(_dump(value)) for name, value in body.items()}
    assert requested_output(api, raws, 1000) == tokens


def _dump(value):
    return b"1" + b"0" * 5000 if isinstance(value, int) and value.bit_length() > 1000 else json.dumps(value).encode()


def test_counting_tokens_reserves_none():
    assert bound("count_tokens", {"messages": [{"role": "user", "content": "x" * 100}]}) == 0


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=40),
    st.sampled_from(["chat", "completions", "embeddings", "responses", "messages", "count_tokens", "rerank", "score"]),
)
def test_raw_garbage_never_raises(raw, api):
    names = (
        "messages",
        "prompt",
        "input",
        "query",
        "documents",
        "text_1",
        "text_2",
        "tools",
        "n",
        "max_tokens",
        "best_of",
    )
    body = {name: msgspec.Raw(raw or b"0") for name in names}
    assert prompt_upper_bound(api, body, MEDIA_TOKENS) >= 0
    assert 0 <= requested_output(api, body, 1000) <= TOKENS_MAX
