"""Microbenchmarks of the taps and bounds: `python -m tests.usage.bench`. Best of seven runs; prints nanoseconds."""

import json
import timeit
from collections.abc import Callable

import msgspec

from extproc.usage.bounds import prompt_upper_bound, requested_output
from extproc.usage.model import Tap
from extproc.usage.taps import make_tap

CHAT = (
    b'data: {"id":"chatcmpl-8f2b1c6d0e","object":"chat.completion.chunk","created":1763700000,"model":"qwen-7b",'
    b'"choices":[{"index":0,"delta":{"content":"%b"},"logprobs":null,"finish_reason":null}]}\n\n'
)
RESPONSES = (
    b'event: response.output_text.delta\ndata: {"content_index":0,"delta":"%b","item_id":"msg_0123456789abcdef",'
    b'"logprobs":[],"output_index":0,"sequence_number":%d,"type":"response.output_text.delta"}\n\n'
)
USAGE = {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13, "prompt_tokens_details": {"cached_tokens": 4}}
PROSE = "The quick brown fox jumps over the lazy dog and then some more. " * 3200


def measure(name: str, call: Callable[[], object], number: int) -> None:
    best = min(timeit.repeat(call, number=number, repeat=7)) / number
    print(f"{best * 1e9:9.0f} ns  {name}")


def sse(api: str, hide: bool = False) -> Tap:
    return make_tap(api, stream=True, content_type="text/event-stream", content_encoding="", hide_usage=hide)


def main() -> None:
    measure("an empty call, part of every figure", lambda: None, 200_000)
    chunk = CHAT % b" hello"
    for hide in (False, True):
        feed = sse("chat", hide).feed
        feed(CHAT % b"hi", False)
        measure(f"chat chunk of {len(chunk)} B, hide_usage={hide}", lambda feed=feed: feed(chunk, False), 200_000)
    escaped = CHAT % b'a \\"q\\"\\n'
    measure("chat chunk with escapes", lambda: feed(escaped, False), 100_000)
    halves = chunk[:90], chunk[90:]
    measure("chat chunk cut in two (both pieces)", lambda: (feed(halves[0], False), feed(halves[1], False)), 20_000)
    measure("ten chat events in one chunk", lambda: feed(chunk * 10, False), 10_000)
    last = b"data: " + json.dumps({"choices": [], "usage": USAGE}).encode() + b"\n\n"
    measure("usage event, hidden", lambda: feed(last, False), 20_000)
    feed = sse("responses").feed
    feed(RESPONSES % (b"hi", 4), False)
    delta = RESPONSES % (b" there", 15)
    measure(f"responses delta of {len(delta)} B", lambda: feed(delta, False), 100_000)
    body = json.dumps({"choices": [{"message": {"content": "word and " * 90}}], "usage": USAGE}).encode()

    def whole_answer() -> None:
        tap = make_tap("chat", stream=False, content_type="application/json", content_encoding="", hide_usage=False)
        tap.feed(body, False)
        tap.feed(b"", True)

    measure(f"JSON answer of {len(body)} B: make, feed, end", whole_answer, 20_000)
    measure("make an SSE tap", lambda: sse("chat"), 50_000)
    for size in (900, 200_000):
        messages = [{"role": "user", "content": PROSE[:size]}]
        request = json.dumps({"model": "m", "messages": messages, "max_tokens": 5, "stream": True})
        fields = msgspec.json.decode(request, type=dict[str, msgspec.Raw])
        measure(f"prompt_upper_bound of {size} B", lambda fields=fields: prompt_upper_bound("chat", fields, 2048), 2000)
    measure("requested_output", lambda: requested_output("chat", fields, 2048), 20_000)


if __name__ == "__main__":
    main()
