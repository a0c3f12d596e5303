"""Whatever way the network cuts a stream, the same is found and the client gets the same bytes."""

import gzip
import zlib

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from extproc.usage.findings import Findings
from extproc.usage.model import Tap
from extproc.usage.sse import SseTap
from extproc.usage.taps import make_tap
from tests.usage.strategies import CUTS, ENDS_OF_LINE, FAKES, NOISE, TRANSCRIPTS, cut, findings, follow, with_noise
from tests.usage.transcripts import BUILDERS, Transcript, vllm_chat


def sse_tap(made: Transcript, *, hide: bool, encoding: str = "") -> Tap:
    return make_tap(
        made.api,
        stream=True,
        content_type="text/event-stream; charset=utf-8",
        content_encoding=encoding,
        hide_usage=hide,
    )


class FramelessTap(SseTap):
    """Decodes every event: the reference for what frames and the fast way must find."""

    __slots__ = ()

    def feed(self, chunk, end):
        return self._follow(chunk, end)

    def _learn(self, raw, name, data, text):
        pass


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("hide", [False, True])
@pytest.mark.parametrize("step", [1, 2, 7, 100_000])
def test_every_engines_stream_is_read_and_hidden_right(build, hide, step):
    made = build([" Hello", " world", "", *FAKES, " end"])
    body = made.encode()
    tap = sse_tap(made, hide=hide)
    out = follow(tap, [body[at : at + step] for at in range(0, len(body), step)])
    assert out == made.encode(hidden=hide)
    assert findings(tap)[:5] == (made.usage, made.error, made.started, made.done, made.final)


@settings(max_examples=400, deadline=None)
@given(TRANSCRIPTS, NOISE, ENDS_OF_LINE, CUTS, st.booleans(), st.booleans(), st.booleans())
def test_the_cut_changes_nothing(made, noise, end_of_line, places, hide, last_blank, separate_end):
    made = with_noise(made, noise)
    body = made.encode(end_of_line, last_blank=last_blank)
    tap = sse_tap(made, hide=hide)
    out = follow(tap, cut(body, places), separate_end=separate_end)
    assert findings(tap)[:5] == (made.usage, made.error, made.started, made.done, made.final)
    if not hide:
        assert out == body
    elif not any("" in lines for _, lines in noise):
        assert out == made.encode(end_of_line, hidden=True, last_blank=last_blank)
    whole = sse_tap(made, hide=hide)
    assert follow(whole, [body], separate_end=False) == out
    assert findings(whole) == findings(tap)


@settings(max_examples=400, deadline=None)
@given(TRANSCRIPTS, ENDS_OF_LINE, CUTS, st.booleans(), st.integers(0, 3))
def test_frames_find_what_decoding_every_event_finds(made, end_of_line, places, hide, together):
    body = made.encode(end_of_line)
    pieces = cut(body, places)
    if together:
        events = _events(made, end_of_line)
        pieces = [b"".join(events[at : at + together]) for at in range(0, len(events), together)]
    fast, exact = SseTap(made.api, hide_usage=hide), FramelessTap(made.api, hide_usage=hide)
    for piece in pieces:
        assert fast.feed(piece, False) == exact.feed(piece, False)
        assert findings(fast)[:5] == findings(exact)[:5]
        assert fast.events == exact.events
        # an escape counts as two bytes where it is not decoded
        assert 0 <= fast.text_bytes - exact.text_bytes <= body.count(b"\\")


def _events(made: Transcript, end_of_line: str) -> list[bytes]:
    return [(end_of_line.join(lines) + end_of_line * 2).encode() for lines in made.blocks]


def test_usual_chunks_take_the_fast_way(monkeypatch):
    pieces = _events(vllm_chat([f" word{number}" for number in range(50)]), "\n")
    tap = SseTap("chat", hide_usage=True)
    slow = []
    follow_exactly = SseTap._follow
    monkeypatch.setattr(
        SseTap, "_follow", lambda self, chunk, end: slow.append(chunk) or follow_exactly(self, chunk, end)
    )
    for piece in pieces:
        tap.feed(piece, False)
    # role, the event that the frame is learned from, finish_reason, usage, [DONE]
    assert len(slow) == 5
    assert tap.usage is not None
    assert tap.usage.completion == 50


PIECES = [
    *(
        b"data: ",
        b"data:",
        b"data",
        b"event: error\n",
        b"\n",
        b"\n\n",
        b"\r",
        b"\r\n",
        b"\r\n\r\n",
        b": c\n",
        b"[DONE]",
    ),
    b'data: {"choices":[{"index":0,"delta":{"content":"abc"}}]}\n\n',
    b'data: {"choices":[{"index":0,"delta":{"content":"x\x00\xff"}}]}\n\n',
    b'data: {"choices":[{"index":0,"delta":{"content":"d\\\\ef"}}]}\r\n\r\n',
    b'data: {"choices":[{"index":0,"delta":{"content":"wx\\"},"usage":{}}]}\n\n',
    *(b'data: {"choices":[{"index":0,"delta":{"content":"abc', b'"}}]}\n\n', b'"}}]}\r\n\r\n'),
    *(b'{"choices":[],"usage":', b'{"prompt_tokens":3,"completion_tokens":4}}', b'{"usage":[[['),
    b'data: {"choices":[],"usage":{"prompt_tokens":1}}\r\r',
    b'data: {"choices":[],"usage":{"prompt_tokens":2}}\r\n\r',
    b'data: {"error":"x"}\n\n',
    b'{"type":"response.completed","response":{"usage":{"input_tokens":1}}}',
    b'{"type":"message_start","message":{}}',
    b'data: {"delta":"abc","sequence_number":1,"type":"response.output_text.delta"}\n\n',
    b'data: {"delta":"def","sequence_number":12,"type":"response.output_text.delta"}\n\n',
    b'data: {"delta":"g","sequence_number":,"type":"response.output_text.delta"}\n\n',
]
FRAGMENTS = st.lists(
    st.one_of(
        st.binary(max_size=8),
        st.sampled_from(PIECES),
    ),
    max_size=14,
).map(b"".join)  # fmt: skip


@settings(max_examples=600, deadline=None)
@given(FRAGMENTS, CUTS, st.booleans(), st.sampled_from(["chat", "completions", "responses", "messages", "rerank"]))
@example(b'data: {"choices":[],"usage":{"prompt_tokens":1}}\r\n\r\n', [51], True, "chat")
@example(b'data: {"choices":[{"delta":{"content":"abc"}}]}\n\n' * 2, [50], True, "chat")
def test_garbage_neither_raises_nor_depends_on_the_cut(body, places, hide, api):
    whole, cut_up = SseTap(api, hide_usage=hide), SseTap(api, hide_usage=hide)
    assert follow(whole, [body], separate_end=False) == follow(cut_up, cut(body, places))
    assert findings(whole) == findings(cut_up)
    assert (whole.events, whole.text_bytes) == (cut_up.events, cut_up.text_bytes)


@settings(max_examples=200, deadline=None)
@given(TRANSCRIPTS, CUTS, st.booleans(), st.sampled_from(["gzip", "deflate", "raw deflate", "two members", "flushed"]))
def test_compressed_streams_are_read_alike(made, places, hide, kind):
    body = made.encode()
    tap = sse_tap(made, hide=hide, encoding="gzip" if kind in {"gzip", "two members", "flushed"} else "deflate")
    sent = _compress(body, kind)
    out = follow(tap, cut(sent, places))
    hides = hide and made.api in {"chat", "completions"}
    assert tap.decodes == hides
    assert out == (made.encode(hidden=True) if hides else sent)
    assert findings(tap)[:5] == (made.usage, made.error, made.started, made.done, made.final)


def _compress(body: bytes, kind: str) -> bytes:
    if kind == "gzip":
        return gzip.compress(body)
    if kind == "two members":
        return gzip.compress(body[:50]) + gzip.compress(body[50:])
    if kind == "deflate":
        return zlib.compress(body)
    packer = zlib.compressobj(wbits=-15 if kind == "raw deflate" else 31)
    return b"".join(
        packer.compress(body[at : at + 90]) + packer.flush(zlib.Z_SYNC_FLUSH) for at in range(0, len(body), 90)
    ) + packer.flush()  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.binary(max_size=40), CUTS, st.booleans(), st.sampled_from(["gzip", "deflate"]))
def test_broken_compression_passes_untouched(body, damage, places, hide, encoding):
    packed = gzip.compress(body) if encoding == "gzip" else zlib.compress(body)
    sent = packed[: len(packed) // 2] + damage + packed[len(packed) // 2 :]
    tap = make_tap("chat", stream=True, content_type="text/event-stream", content_encoding=encoding, hide_usage=hide)
    out = follow(tap, cut(sent, places))
    assert hide or out == sent


def test_a_plain_body_called_gzip_passes_untouched_and_is_a_failure():
    body = vllm_chat([" a"]).encode()
    tap = make_tap("chat", stream=True, content_type="text/event-stream", content_encoding="gzip", hide_usage=True)
    assert follow(tap, [body[:10], body[10:]]) == body
    assert tap.error == "engine_bad_encoding"


def test_findings_have_no_dict():
    assert not hasattr(SseTap("chat", hide_usage=False), "__dict__")
    assert not hasattr(Findings(), "__dict__")


@given(made=TRANSCRIPTS, encoding=st.sampled_from(["", "gzip"]), hide=st.booleans(), cuts=CUTS)
def test_where_a_tap_is_dispensable_the_rest_may_go_out_as_it_is(made, encoding, hide, cuts):
    body = made.encode()
    raw = gzip.compress(body) if encoding else body
    tap, out, seen, free = sse_tap(made, hide=hide, encoding=encoding), b"", 0, 0
    hides = hide and made.api in {"chat", "completions"}
    for chunk in cut(raw, cuts):
        changed = tap.feed(chunk, False)
        out, seen = out + (chunk if changed is None else changed), seen + len(chunk)
        if tap.dispensable():
            free += 1
            assert out + raw[seen:] in {raw, made.encode(hidden=hides)}
    # It is so at the end of a stream, but for what is decoded on its way.
    assert bool(free) == (not (encoding and hides))
