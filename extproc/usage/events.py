"""Reading one server-sent event's data, per API, into `Findings`.

Only events that the tap cannot recognise by their frame come here. Whatever cannot be read changes nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import msgspec

from extproc.usage.findings import Findings
from extproc.usage.model import Api
from extproc.usage.shapes import Body, Event, decode_body, decode_event, failure, merge_anthropic, read_usage


class Reading(NamedTuple):
    """What the framing must know about an event."""

    text: str = ""
    """the event's only text, where it has one and means nothing else: events of the same frame need no decoding"""
    usage_only: bool = False
    """an OpenAI usage event: no choices, a usage"""


NOTHING = Reading()
Read: TypeAlias = Callable[[Findings, bytes, bytes], Reading]


def _utf8_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _event(found: Findings, name: bytes, data: bytes) -> Event | None:
    try:
        event = decode_event(data)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        event = None
    reason = failure(event) if event is not None else ""
    if name == b"error" or reason:
        found.fail(reason or "engine_error")
    return event


def _function_texts(call: Any) -> list[Any]:
    function = call.get("function", call) if type(call) is dict else None
    return [function.get("name"), function.get("arguments")] if type(function) is dict else []


def _delta_texts(delta: dict[str, Any]) -> list[str]:
    """Every string that the model wrote. vLLM sends reasoning under its old and its new name: counted once."""
    content = delta.get("content")
    texts: list[Any] = [content]
    if type(content) is list:
        texts = [part.get("text") for part in content if type(part) is dict]
    texts += [delta.get("reasoning_content") or delta.get("reasoning"), delta.get("refusal")]
    calls = delta.get("tool_calls")
    if type(calls) is list:
        for call in calls:
            texts += _function_texts(call)
    texts += _function_texts(delta.get("function_call"))
    return [text for text in texts if type(text) is str and text]


def _read_choice(found: Findings, choice: dict[str, Any]) -> tuple[list[str], bool]:
    """The texts, and whether another text in their place would mean the same."""
    if choice.get("index"):
        found.parallel = True
    finish = choice.get("finish_reason")
    if type(finish) is str and finish in {"error", "abort"}:
        found.fail("engine_error")
    delta = choice.get("delta")
    role = None
    if type(delta) is dict:
        texts = _delta_texts(delta)
        role = delta.get("role")
    else:
        text = choice.get("text")
        texts = [text] if type(text) is str and text else []
        if type(text) is not str:
            return [], False
    if texts:
        found.started = True
        found.events += 1
        found.text_bytes += sum(map(_utf8_length, texts))
    elif found.started and not finish and not role:
        # NOTE: a token that ends inside a UTF-8 character comes as an empty text; role and finish chunks are no tokens.
        found.events += 1
    return texts, not finish


def read_chat(found: Findings, name: bytes, data: bytes) -> Reading:
    """Chat and text completions."""
    event = _event(found, name, data)
    if event is None:
        return NOTHING
    choices = event.choices
    texts: list[str] = []
    plain = False
    if type(choices) is list:
        for choice in choices:
            if type(choice) is dict:
                more, plain = _read_choice(found, choice)
                texts += more
    if event.usage is None:
        return Reading(texts[0]) if len(texts) == 1 and len(choices) == 1 and plain and not found.error else NOTHING
    usage = read_usage(event.usage)
    if usage is not None:
        found.replace_usage(usage)
        found.final = not choices
    return Reading(usage_only=not choices and type(event.usage) is dict and not failure(event))


_RESPONSE_ENDS = {"response.completed", "response.incomplete", "response.failed"}


def _response(raw: msgspec.Raw) -> Body | None:
    try:
        return decode_body(raw)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None


def read_responses(found: Findings, name: bytes, data: bytes) -> Reading:
    """OpenAI responses: usage is in the last event only, `null` in the ones before."""
    event = _event(found, name, data)
    if event is None:
        return NOTHING
    kind = event.type if type(event.type) is str else name.decode("latin-1")
    if kind.endswith(".delta"):
        if type(event.delta) is str and event.delta and "audio" not in kind:
            found.started = True
            found.events += 1
            found.text_bytes += _utf8_length(event.delta)
            return NOTHING if found.error else Reading(event.delta)
    elif kind in _RESPONSE_ENDS:
        found.done = True
        response = _response(event.response)
        if response is not None:
            usage = read_usage(response.usage)
            if usage is not None:
                found.replace_usage(usage)
                found.final = True
        if kind == "response.failed" or (response is not None and failure(response)):
            found.fail((failure(response) if response is not None else "") or "engine_error")
    return NOTHING


def read_messages(found: Findings, name: bytes, data: bytes) -> Reading:
    """Anthropic messages: message_start has the prompt, message_delta the final counts."""
    event = _event(found, name, data)
    if event is None:
        return NOTHING
    kind = event.type if type(event.type) is str else name.decode("latin-1")
    if kind == "content_block_delta" and type(event.delta) is dict:
        values = [event.delta.get(field) for field in ("text", "thinking", "partial_json")]
        texts = [text for text in values if type(text) is str and text]
        if texts:
            found.started = True
            found.events += 1
            found.text_bytes += sum(map(_utf8_length, texts))
            if len(texts) == 1 and not found.error:
                return Reading(texts[0])
    elif kind == "message_start" and type(event.message) is dict:
        _merge(found, event.message.get("usage"))
    elif kind == "message_delta" and type(event.usage) is dict:
        _merge(found, event.usage)
        found.final = "output_tokens" in event.usage and found.usage is not None
    elif kind == "message_stop":
        found.done = True
    return NOTHING


def _merge(found: Findings, raw: Any) -> None:
    if found.newest is None:
        found.newest = {}
    usage = merge_anthropic(found.newest, raw)
    if usage is not None:
        found.replace_usage(usage)


def reader(api: Api) -> Read:
    """The reader of an API's events."""
    return {"responses": read_responses, "messages": read_messages}.get(api, read_chat)
