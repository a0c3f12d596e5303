"""The engines' JSON for usage and for failure, read leniently: a field of a foreign type is as good as absent.

Fields are `Any` on purpose. A typed decode would lose the whole event over one odd field beside the one we need; what
msgspec does not find in the struct it skips without building it. Numbers outside 0..2^53 are no counts.
"""

from typing import Annotated, Any, TypeAlias

import msgspec

from extproc.usage.model import Usage

_COUNT_MAX = 2**53


class Body(msgspec.Struct):
    """The top level of a whole body, in every API's shape at once; without `choices`, whose text nobody needs there."""

    usage: Any = None
    error: Any = None
    object: Any = None
    type: Any = None
    status: Any = None
    message: Any = None
    code: Any = None
    detail: Any = None


class Event(Body):
    """The top level of one event."""

    choices: Any = None
    delta: Any = None
    response: msgspec.Raw = msgspec.Raw(b"null")


_Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=_COUNT_MAX)]


class _UsualDetails(msgspec.Struct):
    cached_tokens: _Count | None = None
    reasoning_tokens: _Count | None = None


class _UsualUsage(msgspec.Struct):
    prompt_tokens: _Count
    completion_tokens: _Count
    prompt_tokens_details: _UsualDetails | None = None
    completion_tokens_details: _UsualDetails | None = None
    reasoning_tokens: _Count | None = None


class _UsualBody(msgspec.Struct):
    """A chat, completions or embeddings answer in its exact shape; whatever deviates does not decode."""

    usage: _UsualUsage
    error: None = None


decode_event = msgspec.json.Decoder(Event).decode
decode_body = msgspec.json.Decoder(Body).decode
_decode_usual_body = msgspec.json.Decoder(_UsualBody).decode


def _count(value: Any) -> int | None:
    if type(value) is int:
        return value if 0 <= value <= _COUNT_MAX else None
    if type(value) is float and value.is_integer():
        return int(value) if 0 <= value <= _COUNT_MAX else None
    return None


def _detail(details: Any, field: str) -> int:
    return (_count(details.get(field)) or 0) if type(details) is dict else 0


def read_usage(usage: Any) -> Usage | None:
    """OpenAI chat, completions, embeddings, rerank, score (prompt_tokens) and responses (input_tokens).

    Cached and reasoning tokens are parts of prompt and completion; SGLang has `reasoning_tokens` at the top level.
    Rerank has no completion_tokens, some rerankers only total_tokens.
    """
    if type(usage) is not dict:
        return None
    get = usage.get
    prompt, completion = _count(get("prompt_tokens")), _count(get("completion_tokens"))
    cached_in, reasoning_in = get("prompt_tokens_details"), get("completion_tokens_details")
    if prompt is None:
        cached_in, reasoning_in = get("input_tokens_details"), get("output_tokens_details")
        prompt, completion = _count(get("input_tokens")), _count(get("output_tokens"))
    if prompt is None or completion is None:
        total = _count(get("total_tokens"))
        if prompt is None:
            if total is None:
                return None
            prompt = max(0, total - (completion or 0))
        if completion is None:
            completion = max(0, total - prompt) if total is not None else 0
    cached = _detail(cached_in, "cached_tokens") if cached_in is not None else 0
    reasoning = _detail(reasoning_in, "reasoning_tokens") if reasoning_in is not None else 0
    if not reasoning:
        reasoning = _count(get("reasoning_tokens")) or 0
    return Usage(prompt, completion, min(cached, prompt), min(reasoning, completion))


def read_usual_body(data: bytes) -> Usage | None:
    """The usage of an answer in its exact OpenAI shape, in one decode; None where `decode_body` must look."""
    try:
        usage = _decode_usual_body(data).usage
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None
    prompt, completion = usage.prompt_tokens, usage.completion_tokens
    cached, reasoning = usage.prompt_tokens_details, usage.completion_tokens_details
    return Usage(
        prompt,
        completion,
        min((cached.cached_tokens or 0) if cached is not None else 0, prompt),
        min((reasoning.reasoning_tokens if reasoning is not None else None) or usage.reasoning_tokens or 0, completion),
    )


_ANTHROPIC_FIELDS = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens", "output_tokens")


def merge_anthropic(newest: dict[str, int], usage: Any) -> Usage | None:
    """Take over every field that `usage` has, and count: input_tokens excludes what the cache wrote and gave.

    vLLM repeats all fields in message_delta with the final split, SGLang only output_tokens.
    """
    if type(usage) is not dict:
        return None
    for field in _ANTHROPIC_FIELDS:
        count = _count(usage.get(field))
        if count is not None:
            newest[field] = count
    if not newest:
        return None
    cached = newest.get("cache_read_input_tokens", 0)
    prompt = newest.get("input_tokens", 0) + newest.get("cache_creation_input_tokens", 0) + cached
    return Usage(prompt, newest.get("output_tokens", 0), cached)


_BUSY = {429, 503, 529, "429", "503", "529", "overloaded_error", "rate_limit_error", "SERVICE_UNAVAILABLE"}
_CALLER = {"invalid_request_error", "not_found_error", "authentication_error", "permission_error", "BadRequestError"}


def _reason(error: Any) -> str:
    """A stable word for a failure; never a part of its text."""
    kinds = [error.get("code"), error.get("type")] if type(error) is dict else []
    kinds = [kind for kind in kinds if type(kind) in {int, str}]
    if any(kind in _BUSY for kind in kinds):
        return "engine_overloaded"
    if any(kind in _CALLER or (type(kind) is int and 400 <= kind < 500) for kind in kinds):
        return "engine_refused"
    return "engine_error"


def failure(body: Body) -> str:
    """The reason if this is an error in any engine's shape, else empty.

    {"error": {...} | "text"} (OpenAI, vLLM, Anthropic), {"object": "error", ...} (SGLang), {"message", "type", "code"}
    (Dynamo), {"detail": ...} (FastAPI), a response object with status "failed".
    """
    error = body.error
    if error is not None and error is not False and error != "":  # {} is an error
        return _reason(error)
    if body.object == "error" or body.type == "error":
        return _reason({"code": body.code, "type": body.type})
    if body.status == "failed":
        return "engine_error"
    if body.usage is None:
        if type(body.message) is str and (body.code is not None or type(body.type) is str):
            return _reason({"code": body.code, "type": body.type})
        if body.detail:
            return "engine_refused"
    return ""
