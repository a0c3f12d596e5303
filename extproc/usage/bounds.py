"""Upper bounds of what a request can cost in tokens, from its raw JSON alone: what admission reserves.

A token of a byte-level BPE vocabulary is at least one byte of text, and JSON is never shorter than the text it holds;
its quotes, keys and braces (29 bytes for an empty message) outweigh what a chat template puts around each message. So
the raw length bounds the prompt without a tokenizer, decoding nothing. Media are counted by a stated allowance, not by
their base64.

Not bounded: what the engine adds from elsewhere (`previous_response_id`, a template's own text beyond the constants
below), pages of a document beyond the allowance, and vocabularies whose normaliser lengthens text (NFKC of ligatures).
"""

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from extproc.usage.model import NOT_GENERATING, Api

TEMPLATE_TOKENS = 64
"""default system prompt and special tokens: Qwen2.5 about 20, Llama 3.1 about 30, gpt-oss about 60"""
TOOL_TEMPLATE_TOKENS = 256
"""the instructions that templates put around tools: Qwen2.5 about 120, Llama 3.1 about 100"""
SEQUENCE_TOKENS = 4
"""begin, end and separators of one sequence or of one query-document pair"""
TOKENS_MAX = 2**53 - 1

_CONVERSATION = {
    "chat": frozenset(
        {"messages", "tools", "functions", "documents", "chat_template_kwargs", "response_format", "input_ids"}
    ),
    "messages": frozenset({"messages", "system", "tools", "output_config"}),
    "responses": frozenset(
        {"input", "instructions", "tools", "text", "prompt", "previous_input_messages", "chat_template_kwargs"}
    ),
    "embeddings": frozenset({"input", "messages", "instruction", "chat_template_kwargs"}),
    "completions": frozenset({"prompt", "prompt_embeds", "suffix"}),
}
_LISTS = frozenset({"prompt", "input", "input_ids"})
"""may be a list of token ids"""
_PAIRS = (
    *(("query", "documents"), ("query", "items"), ("queries", "documents"), ("queries", "items")),
    *(("text_1", "text_2"), ("data_1", "data_2")),
)
_WITH_EACH_PAIR = frozenset({"instruction", "instruct", "chat_template_kwargs"})
_MESSAGES = frozenset({"messages", "previous_input_messages"})
"""may hold media; elsewhere templates write out what is there, whatever its keys are called"""
_TOOLS = frozenset({"tools", "functions"})
_OUTPUT: Mapping[Api, frozenset[str]] = {
    "chat": frozenset({"max_tokens", "max_completion_tokens", "n_predict"}),
    "completions": frozenset({"max_tokens", "n_predict"}),
    "responses": frozenset({"max_output_tokens"}),
    "messages": frozenset({"max_tokens"}),
}
"""what engines heed, API by API: another one's name is passed over, and must not make the reservation small.
`n_predict`: llama.cpp's server takes it before the others, negative ones as no limit"""
_LIST_LOOKS = 16
"""lists that are looked at before a body is decoded instead"""

_raws = msgspec.json.Decoder(list[msgspec.Raw]).decode
_MEDIA_KEYS = frozenset((
    "image_url", "video_url", "audio_url", "input_audio", "input_image", "input_file", "image_embeds", "audio_embeds",
    "image_pil", "file",
))  # fmt: skip
_MEDIA_TYPES = _MEDIA_KEYS | {"image", "document", "audio", "video"}
_media_mark = re.compile(rb'"(?:image|video|audio|input_|file|document)').search
"""one of these begins each of them; looking for it costs less than half of decoding"""
_PAYLOAD_KEYS = frozenset(
    {"url", "data", "file_data", "file_url", "image_url", "video_url", "audio_url", "image_embeds"}
)


def prompt_upper_bound(api: Api, fields: Mapping[str, msgspec.Raw], media_tokens: int) -> int:
    """Tokens that the prompt can have at most; `media_tokens` is the allowance for each image, sound, video or file."""
    if api in {"rerank", "score"}:
        return _pairs(fields, media_tokens)
    if api == "count_tokens":
        return 0
    bound = TEMPLATE_TOKENS
    for name in fields.keys() & _CONVERSATION[api]:
        raw = bytes(fields[name])
        if name in _LISTS:
            bound += _texts_or_ids(raw, media_tokens)
        elif name in _MESSAGES and raw.find(b"[", 1) >= 0 and not _is_text_only(raw):
            bound += _with_media(raw, media_tokens)
        else:
            bound += len(raw)
        if name in _TOOLS:
            bound += TOOL_TEMPLATE_TOKENS
    return bound


def _is_text_only(raw: bytes) -> bool:
    """True if no value of an object is a list: parts can stand nowhere else. False may be wrong, and only costs time.

    Looks at the opening brackets alone, which memchr finds at memory speed; those in texts are seldom behind a colon.
    """
    at = raw.find(b"[", 1)
    for _ in range(_LIST_LOOKS):
        if at < 0:
            return True
        before = raw[max(0, at - 8) : at].rstrip()
        if not before or before.endswith(b":"):
            return False
        at = raw.find(b"[", at + 1)
    return False


def _with_media(raw: bytes, media_tokens: int) -> int:
    """The raw length, with each part's payload replaced by the allowance."""
    if _media_mark(raw) is None:
        return len(raw)
    try:
        tree = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return len(raw)
    bound = len(raw)
    stack: list[Any] = [tree]
    while stack:
        node = stack.pop()
        if type(node) is list:
            stack.extend(node)
        elif type(node) is dict:
            payload = _payload(node)
            if payload < 0:
                stack.extend(node.values())
            else:
                bound += media_tokens - payload
    return bound


def _payload(part: dict[str, Any]) -> int:
    """Length of a media part's data or address; negative if this is no media part."""
    if part.get("type") not in _MEDIA_TYPES and part.keys().isdisjoint(_MEDIA_KEYS):
        return -1
    source = part.get("source")
    if type(source) is dict and source.get("type") in {"text", "content"}:
        return -1
    holders = [part, *(value for value in part.values() if type(value) is dict)]
    return sum(
        len(value)
        for holder in holders
        for key, value in holder.items()
        if key in _PAYLOAD_KEYS and type(value) is str
    )  # fmt: skip


def _texts_or_ids(raw: bytes, media_tokens: int) -> int:
    """A text, a list of texts or of content items, token ids, or lists of token ids."""
    if raw[:1] != b"[":
        return len(raw)
    if b'"' not in raw:
        return raw.count(b",") + 1 + SEQUENCE_TOKENS * raw.count(b"[")
    return _with_media(raw, media_tokens) if b"{" in raw else len(raw)


def _pairs(fields: Mapping[str, msgspec.Raw], media_tokens: int) -> int:
    """Rerank and score run every query with every document: one side counts as often as the other has entries."""
    bound = 0
    with_each = SEQUENCE_TOKENS + sum(len(bytes(fields[name])) for name in fields.keys() & _WITH_EACH_PAIR)
    for left, right in _PAIRS:
        if left in fields and right in fields:
            ones, others = bytes(fields[left]), bytes(fields[right])
            one_count, other_count = _count_entries(ones), _count_entries(others)
            pairs = max(one_count, other_count)
            pair_bound = with_each * pairs
            pair_bound += _with_media(ones, media_tokens) * (other_count if one_count == 1 else 1)
            pair_bound += _with_media(others, media_tokens) * (one_count if other_count == 1 else 1)
            bound = max(bound, pair_bound)
    return bound + TEMPLATE_TOKENS


def _count_entries(raw: bytes) -> int:
    if raw[:1] != b"[":
        return 1
    try:
        return len(_raws(raw))
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return raw.count(b",") + 1


def requested_output(api: Api, fields: Mapping[str, msgspec.Raw], cap: int) -> int:
    """Completion tokens that the request can generate at most; `cap` is the endpoint's bound on one answer.

    The largest of the limits that the request names (engines disagree on which one wins), times the choices, times the
    prompts of a completions list. Nothing for APIs that generate nothing.
    """
    if api in NOT_GENERATING:
        return 0
    limits = [limit for name in fields.keys() & _OUTPUT[api] if (limit := _integer(fields[name])) is not None]
    # Without a limit vLLM and SGLang complete 16 tokens, Ollama and llama.cpp go on to the end of their context.
    tokens = cap if not limits or min(limits) < 0 else min(max(limits), cap)
    answers = max(1, _integer(fields["n"]) or 1) if "n" in fields else 1
    if "best_of" in fields:
        answers = max(answers, _integer(fields["best_of"]) or 1)
    if api == "completions" and "prompt" in fields:
        answers *= _count_prompts(bytes(fields["prompt"]))
    return max(0, min(tokens * answers, TOKENS_MAX))


def _count_prompts(raw: bytes) -> int:
    """Texts or lists of ids; a flat list of ids is one prompt."""
    if raw[:1] != b"[" or (b'"' not in raw and b"[" not in raw[1:]):
        return 1
    return max(1, _count_entries(raw))


def _integer(raw: msgspec.Raw) -> int | None:
    """A JSON integer; null, fractions and other types are as good as absent."""
    text = bytes(raw)
    if len(text) > 20:
        return TOKENS_MAX if text.isdigit() else None
    try:
        return min(int(text), TOKENS_MAX)
    except ValueError:
        return None
