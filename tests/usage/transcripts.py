"""Event streams as the real engines send them, built with the outcome that a tap must find.

Shapes as seen on the wire of vLLM 0.32, SGLang 0.5, Dynamo 1.6, transformers serve 5.19 and llama.cpp's Python server.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from extproc.usage.model import Api, Usage


@dataclass
class Transcript:
    engine: str
    api: Api
    blocks: list[list[str]] = field(default_factory=list)
    """lines of each event"""
    usage_blocks: set[int] = field(default_factory=set)
    """the events that a client must not see who did not ask for usage"""
    usage: Usage | None = None
    error: str = ""
    done: bool = True
    final: bool = True
    started: bool = False
    events: int = 0
    """content events after the last usage"""

    def add(self, data: Any, *, name: str = "", dump: Callable[[Any], str] | None = None) -> None:
        text = data if isinstance(data, str) else (dump or compact)(data)
        self.blocks.append(([f"event: {name}"] if name else []) + [f"data: {text}"])

    def content(self, text: str, *, role: bool = False, finished: bool = False) -> None:
        if text:
            self.started = True
        if text or (self.started and not role and not finished):
            self.events += 1

    def encode(self, end_of_line: str = "\n", *, hidden: bool = False, last_blank: bool = True) -> bytes:
        blocks = [
            end_of_line.join(lines) + end_of_line * 2
            for index, lines in enumerate(self.blocks)
            if not (hidden and index in self.usage_blocks)
        ]
        body = "".join(blocks)
        return (body if last_blank else body.removesuffix(end_of_line)).encode()


def compact(data: Any) -> str:
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False)


def _chunk(choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    head = {"id": "chatcmpl-8f2b", "object": "chat.completion.chunk", "created": 1763700000, "model": "qwen-7b"}
    return head | {"choices": choices} | more


def _choice(delta: dict[str, Any], finish: str | None = None, index: int = 0) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}


def vllm_chat(texts: Sequence[str], *, continuous: bool = False) -> Transcript:
    """Role chunk, a chunk per token, finish_reason on the last; usage in its own chunk, or on every one as well."""
    made = Transcript("vllm", "chat")

    def running(count: int) -> dict[str, Any]:
        return (
            {"usage": {"prompt_tokens": 31, "total_tokens": 31 + count, "completion_tokens": count}}
            if continuous
            else {}
        )

    made.add(_chunk([_choice({"role": "assistant", "content": ""})], **running(0)))
    for count, text in enumerate(texts, start=1):
        last = count == len(texts)
        made.content(text, finished=last)
        made.add(_chunk([_choice({"content": text}, "stop" if last else None)], **running(count)))
    made.usage_blocks = {len(made.blocks)}
    details = {"cached_tokens": 16, "created_cache_tokens": 0, "multimodal_tokens": None}
    made.add(
        _chunk(
            [],
            usage={
                "prompt_tokens": 31,
                "total_tokens": 31 + len(texts),
                "completion_tokens": len(texts),
                "prompt_tokens_details": details,
                "completion_tokens_details": None,
            },
            system_fingerprint="vllm-0.32.0",
        )
    )
    made.add("[DONE]")
    made.usage = Usage(31, len(texts), 16)
    made.events = 0
    return made


def vllm_completions(texts: Sequence[str]) -> Transcript:
    made = Transcript("vllm", "completions")
    for text in texts:
        made.content(text)
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": None, "stop_reason": None}
        made.add({"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m", "choices": [choice]})
    made.usage_blocks = {len(made.blocks)}
    usage = {"prompt_tokens": 0, "total_tokens": len(texts), "completion_tokens": len(texts)}
    made.add({"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m", "choices": [], "usage": usage})
    made.add("[DONE]")
    made.usage = Usage(0, len(texts))
    made.events = 0
    return made


def vllm_fails(texts: Sequence[str]) -> Transcript:
    """The engine dies under way: an error event, and [DONE] all the same."""
    made = Transcript("vllm fails", "chat", final=False, error="engine_error")
    made.add(_chunk([_choice({"role": "assistant", "content": ""})]))
    for text in texts:
        made.content(text)
        made.add(_chunk([_choice({"content": text})]))
    made.add({"error": {"message": "usage", "type": "InternalServerError", "param": None, "code": 500}})
    made.add("[DONE]")
    return made


def sglang_chat(texts: Sequence[str]) -> Transcript:
    """`usage: null` in every chunk, finish_reason in its own, reasoning_tokens at the top level."""
    made = Transcript("sglang", "chat")

    def delta(text: str | None, role: str | None = None) -> dict[str, Any]:
        return {"role": role, "content": text, "reasoning_content": None, "tool_calls": None}

    made.add(_chunk([_choice(delta("", "assistant")) | {"matched_stop": None}], usage=None))
    for text in texts:
        made.content(text)
        made.add(_chunk([_choice(delta(text)) | {"matched_stop": None}], usage=None))
    made.add(_chunk([_choice(delta(None), "length") | {"matched_stop": None}], usage=None))
    made.usage_blocks = {len(made.blocks)}
    usage = {"prompt_tokens": 9, "total_tokens": 9 + len(texts), "completion_tokens": len(texts), "reasoning_tokens": 1}
    made.add(_chunk([], usage=usage | {"prompt_tokens_details": None}))
    made.add("[DONE]")
    made.usage = Usage(9, len(texts), 0, min(1, len(texts)))
    made.events = 0
    return made


def sglang_is_full(_texts: Sequence[str]) -> Transcript:
    made = Transcript("sglang is full", "chat", final=False, error="engine_overloaded")
    made.add({"error": {"object": "error", "message": "full", "type": "SERVICE_UNAVAILABLE", "code": 503}})
    made.add("[DONE]")
    return made


def dynamo_chat(texts: Sequence[str]) -> Transcript:
    """A role in every delta; empty deltas are dropped."""
    made = Transcript("dynamo", "chat")
    for text in filter(None, texts):
        made.content(text)
        made.add(_chunk([_choice({"content": text, "function_call": None, "tool_calls": None, "role": "assistant"})]))
    made.add(_chunk([_choice({}, "stop")]))
    made.usage_blocks = {len(made.blocks)}
    usage = {"prompt_tokens": 40, "completion_tokens": len(texts), "total_tokens": 40 + len(texts)}
    made.add(_chunk([], usage=usage | {"prompt_tokens_details": {"audio_tokens": None, "cached_tokens": 32}}))
    made.add("[DONE]")
    made.usage = Usage(40, len(texts), 32)
    made.events = 0
    return made


def transformers_chat(texts: Sequence[str]) -> Transcript:
    """Usage on the finish chunk, which has choices and stays; no [DONE]."""
    made = Transcript("transformers", "chat", done=False)
    made.add(_chunk([_choice({"role": "assistant"})]))
    for text in texts:
        made.content(text)
        made.add(_chunk([_choice({"content": text})]))
    usage = {"completion_tokens": len(texts), "prompt_tokens": 12, "total_tokens": 12 + len(texts)}
    made.add(_chunk([_choice({}, "stop")], usage=usage))
    made.usage = Usage(12, len(texts))
    made.events = 0
    return made


def llama_cpp_chat(texts: Sequence[str]) -> Transcript:
    """Never any usage; json.dumps with its defaults: blanks and \\u escapes."""
    made = Transcript("llama.cpp", "chat", final=False)
    made.add(_chunk([_choice({"role": "assistant"})]), dump=json.dumps)
    for text in texts:
        made.content(text)
        made.add(_chunk([_choice({"content": text})]), dump=json.dumps)
    made.add(_chunk([_choice({}, "length")]), dump=json.dumps)
    made.add("[DONE]")
    return made


def _responses(texts: Sequence[str], engine: str, ending: str) -> Transcript:
    made = Transcript(engine, "responses")
    number = 0

    def emit(kind: str, **more: Any) -> None:
        nonlocal number
        made.add(more | {"sequence_number": number, "type": kind}, name=kind)
        number += 1

    def response(status: str, usage: Any, error: Any = None) -> dict[str, Any]:
        return {
            "id": "resp_1",
            "error": error,
            "instructions": '{"usage":{"input_tokens":7}}',
            "status": status,
            "usage": usage,
        }

    emit("response.created", response=response("in_progress", None))
    emit("response.in_progress", response=response("in_progress", None))
    emit("response.output_item.added", item={"id": "msg_1", "content": []}, output_index=0)
    for text in texts:
        if text:
            made.content(text)
            emit(
                "response.output_text.delta", content_index=0, delta=text, item_id="msg_1", logprobs=[], output_index=0
            )
    emit("response.output_text.done", content_index=0, item_id="msg_1", text="".join(texts))
    usage = {
        "input_tokens": 227,
        "input_tokens_details": {"cached_tokens": 224, "cache_write_tokens": 0},
        "output_tokens": len(texts),
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 227 + len(texts),
    }
    if ending == "failed":
        emit("response.failed", response=response("failed", None, {"code": "server_error", "message": "text"}))
        made.error, made.final = "engine_error", False
    else:
        emit(f"response.{ending}", response=response(ending, usage))
        made.usage = Usage(227, len(texts), 224)
        made.events = 0
    return made


def vllm_responses(texts: Sequence[str]) -> Transcript:
    return _responses(texts, "vllm", "completed")


def dynamo_responses(texts: Sequence[str]) -> Transcript:
    made = _responses(texts, "dynamo", "incomplete")
    made.add("[DONE]")
    return made


def responses_fail(texts: Sequence[str]) -> Transcript:
    return _responses(texts, "responses fail", "failed")


def _messages(texts: Sequence[str], engine: str, start: dict[str, int], delta: dict[str, int]) -> Transcript:
    made = Transcript(engine, "messages", usage=Usage(227, len(texts), 224))

    def emit(kind: str, **more: Any) -> None:
        made.add({"type": kind} | more, name=kind)

    emit("message_start", message={"id": "chatcmpl-1", "type": "message", "content": [], "usage": start})
    emit("content_block_start", index=0, content_block={"type": "text", "text": ""})
    emit("ping")
    for text in filter(None, texts):
        made.content(text)
        emit("content_block_delta", index=0, delta={"type": "text_delta", "text": text})
    emit("content_block_stop", index=0)
    emit("message_delta", delta={"stop_reason": "end_turn"}, usage=delta | {"output_tokens": len(texts)})
    emit("message_stop")
    made.events = 0
    return made


def vllm_messages(texts: Sequence[str]) -> Transcript:
    """message_start has the whole prompt; message_delta the final split, which replaces it."""
    start = {"input_tokens": 227, "output_tokens": 0}
    delta = {"input_tokens": 3, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 224}
    return _messages(texts, "vllm", start, delta)


def sglang_messages(texts: Sequence[str]) -> Transcript:
    """message_start is split already; message_delta has output_tokens alone."""
    return _messages(texts, "sglang", {"input_tokens": 3, "cache_read_input_tokens": 224, "output_tokens": 0}, {})


def messages_fail(texts: Sequence[str]) -> Transcript:
    made = Transcript(
        "messages fail", "messages", error="engine_overloaded", done=False, final=False, usage=Usage(5, 0)
    )
    made.add(
        {"type": "message_start", "message": {"usage": {"input_tokens": 5, "output_tokens": 0}}}, name="message_start"
    )
    for text in filter(None, texts):
        made.content(text)
        delta = {"type": "thinking_delta", "thinking": text}
        made.add({"type": "content_block_delta", "index": 0, "delta": delta}, name="content_block_delta")
    made.add({"type": "error", "error": {"type": "overloaded_error", "message": "usage"}}, name="error")
    return made


BUILDERS: tuple[Callable[[Sequence[str]], Transcript], ...] = (
    vllm_chat,
    lambda texts: vllm_chat(texts, continuous=True),
    vllm_completions,
    vllm_fails,
    sglang_chat,
    sglang_is_full,
    dynamo_chat,
    transformers_chat,
    llama_cpp_chat,
    vllm_responses,
    dynamo_responses,
    responses_fail,
    vllm_messages,
    sglang_messages,
    messages_fail,
)
