"""What a client is charged that left before the engine's own count came."""

import pytest

from extproc.usage.sse import SseTap
from tests.usage.transcripts import Transcript, compact, dynamo_chat, vllm_chat, vllm_responses

# 4.5 bytes a token, as English is cut by the vocabularies in use
WORDS = [" the", " quick", " brown", "ing", " a", ".", " model", "led", " over", " lazy", "ness", " because"]
assert 4.4 < sum(map(len, WORDS)) / len(WORDS) < 4.6


def leave_before_usage(made: Transcript, blocks: int) -> int:
    tap = SseTap(made.api, hide_usage=False)
    for lines in made.blocks[:blocks]:
        tap.feed(("\n".join(lines) + "\n\n").encode(), False)
    assert not tap.final
    return tap.delivered_tokens()


def test_one_token_per_event_is_counted_exactly():
    texts = WORDS * 100
    assert leave_before_usage(vllm_chat(texts), 1 + 1000) == 1000


def test_an_engine_that_falls_behind_is_within_one_percent():
    """vLLM's 1500 tokens came as 1487 events: some hold two tokens."""
    texts = (WORDS * 125)[:1500]
    for at in range(13):
        texts[at * 100 : at * 100 + 2] = ["".join(texts[at * 100 : at * 100 + 2])]
    assert leave_before_usage(vllm_chat(texts), 1 + 1487) == pytest.approx(1500, rel=0.01)


def test_tokens_inside_a_character_count_though_their_text_is_empty():
    assert leave_before_usage(vllm_chat(["Hi", "", "", "🙂", ""] * 20), 1 + 50) == 50


def test_role_and_finish_chunks_are_no_tokens():
    made = dynamo_chat(["a", "b"])
    assert leave_before_usage(made, 3) == 2


@pytest.mark.parametrize("held", [2, 4, 8, 16])
def test_several_tokens_in_a_delta_are_told_from_the_text(held):
    texts = ["".join(WORDS[(at + i) % len(WORDS)] for i in range(held)) for at in range(100)]
    made = vllm_responses(texts)
    assert leave_before_usage(made, 3 + 100) == pytest.approx(100 * held, rel=0.25)


def test_long_tokens_are_not_charged_by_their_bytes():
    assert leave_before_usage(vllm_chat([" international", " a", ","] * 50), 1 + 150 - 1) == 149


def test_running_usage_is_the_base_and_events_after_it_are_added():
    made = vllm_chat(["a", "b", "c", "d"], continuous=True)
    assert leave_before_usage(made, 3) == 2
    tap = SseTap("chat", hide_usage=False)
    for lines in made.blocks[:3]:
        tap.feed(("\n".join(lines) + "\n\n").encode(), False)
    tap.feed(b'data: {"choices":[{"index":0,"delta":{"content":"x"}}]}\n\n', False)
    assert tap.delivered_tokens() == 3


def test_running_usage_of_one_choice_does_not_stand_for_all():
    """vLLM's running usage counts the tokens of the choice that it rides on."""
    tap = SseTap("chat", hide_usage=False)
    for count in range(1, 11):
        for index in (0, 1, 2):
            event = {
                "choices": [{"index": index, "delta": {"content": "x"}}],
                "usage": {"prompt_tokens": 5, "completion_tokens": count},
            }
            tap.feed(f"data: {compact(event)}\n\n".encode(), False)
    assert tap.delivered_tokens() in {29, 30}
    tap.feed(b'data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":28}}\n\n', False)
    assert tap.delivered_tokens() == 28


def test_anthropics_first_count_is_no_final_one():
    tap = SseTap("messages", hide_usage=False)
    tap.feed(b'data: {"type":"message_start","message":{"usage":{"input_tokens":9,"output_tokens":0}}}\n\n', False)
    for _ in range(7):
        tap.feed(b'data: {"type":"content_block_delta","delta":{"type":"text_delta","text":"abc"}}\n\n', False)
    assert not tap.final
    assert tap.delivered_tokens() == 7
