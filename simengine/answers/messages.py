"""`/v1/messages`, Anthropic's shape. The final values replace the first ones; they are never to be added. No [DONE].

vLLM: `message_start` tells the whole prompt as input, `message_delta` the final split (with the details flag input
excludes what was read from or written to the cache). SGLang: split at the start already, only output at the end.
"""

from simengine.answers.plan import Plan
from simengine.vocabulary import quoted


class MessagesAnswer:
    """See `Answer`."""

    __slots__ = ("_plan", "_sglang")

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._sglang = plan.flavor == "sglang"

    def whole(self) -> bytes:
        choice = self._plan.choices[0]
        text = b"".join(choice.pieces)
        return self._message(
            self._tool(b'{"text":"%b"}' % text) if self._plan.tool else b'{"type":"text","text":"%b"}' % text,
            b'"%b"' % self._stop_reason,
            self._usage(len(choice.pieces), split=True),
        )

    def opening(self) -> list[bytes]:
        start = self._message(b"", b"null", self._usage(0, split=self._sglang))
        block = self._tool(b"{}") if self._plan.tool else b'{"type":"text","text":""}'
        return [
            b'event: message_start\ndata: {"type":"message_start","message":%b}\n\n' % start,
            b'event: content_block_start\ndata: {"type":"content_block_start","index":0,"content_block":%b}\n\n'
            % block,
        ]

    def tokens(self, first: int, last: int) -> list[bytes]:
        pieces = self._plan.choices[0].pieces
        form = (
            b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,'
            b'"delta":{"type":"%b","%b":"%b"}}\n\n'
        )
        if not self._plan.tool:
            return [form % (b"text_delta", b"text", piece) for piece in pieces[first:last]]
        parts = [quoted(piece.decode()) for piece in pieces[first:last]]
        if first == 0:
            parts[0] = quoted('{"text":"') + parts[0]
        if last == len(pieces):
            parts[-1] += quoted('"}')
        return [form % (b"input_json_delta", b"partial_json", part) for part in parts]

    def closing(self) -> list[bytes]:
        produced = len(self._plan.choices[0].pieces)
        usage = b',"usage":{"output_tokens":%d}' % produced if self._sglang else self._usage(produced, split=True)
        if self._plan.no_usage:
            usage = b""
        return [
            b'event: content_block_stop\ndata: {"type":"content_block_stop","index":0}\n\n',
            b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"%b","stop_sequence":null}'
            b"%b}\n\n" % (self._stop_reason, usage),
            b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
        ]

    @property
    def _stop_reason(self) -> bytes:
        choice = self._plan.choices[0]
        if choice.finish_reason == b"length":
            return b"max_tokens"
        if self._plan.tool:
            return b"tool_use"
        return b"end_turn" if choice.stop_reason == b"null" else b"stop_sequence"

    def _tool(self, arguments: bytes) -> bytes:
        plan = self._plan
        block = b'{"type":"tool_use","id":"chatcmpl-tool-%b","name":"%b","input":%b}'
        return block % (plan.request_id, plan.tool, arguments)

    def _usage(self, output_tokens: int, split: bool) -> bytes:
        plan = self._plan
        if plan.no_usage:
            return b""
        if not split or not plan.details:
            return b',"usage":{"input_tokens":%d,"output_tokens":%d}' % (plan.prompt_tokens, output_tokens)
        # One token at least is computed, and blocks that are not full are not written.
        read = plan.cached_tokens
        size = plan.block_size_tokens
        created = 0 if self._sglang else max(0, (plan.prompt_tokens - 1) // size * size - read)
        return (
            b',"usage":{"input_tokens":%d,"output_tokens":%d,"cache_creation_input_tokens":%d,'
            b'"cache_read_input_tokens":%d}' % (plan.prompt_tokens - read - created, output_tokens, created, read)
        )

    def _message(self, content: bytes, stop_reason: bytes, usage: bytes) -> bytes:
        plan = self._plan
        return (
            b'{"id":"chatcmpl-%b","type":"message","role":"assistant","content":[%b],"model":"%b",'
            b'"stop_reason":%b,"stop_sequence":null%b}' % (plan.request_id, content, plan.model, stop_reason, usage)
        )
