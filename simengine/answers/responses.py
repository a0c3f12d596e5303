"""`/v1/responses`: named events, usage only inside the last one, `null` before; no [DONE].

vLLM ends a truncated answer in `response.completed` all the same, SGLang in `response.incomplete`. `cached_tokens` is
there without any flag. In vLLM's events `response` comes first and `type` last.
"""

from simengine.answers.plan import Plan


class ResponsesAnswer:
    """See `Answer`."""

    __slots__ = ("_item", "_number", "_plan", "_text_at")

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._number = 0
        self._item = b"msg_" + plan.request_id
        self._text_at = b'"content_index":0,"item_id":"%b","output_index":0' % self._item

    def whole(self) -> bytes:
        return self._response(done=True)

    def opening(self) -> list[bytes]:
        running = self._response(done=False)
        item = b'{"id":"%b","content":[],"role":"assistant","status":"in_progress","type":"message"}' % self._item
        part = b'{"annotations":[],"text":"","type":"output_text","logprobs":[]}'
        return [
            self._event(b"response.created", b'"response":' + running),
            self._event(b"response.in_progress", b'"response":' + running),
            self._event(b"response.output_item.added", b'"item":%b,"output_index":0' % item),
            self._event(b"response.content_part.added", b'%b,"part":%b' % (self._text_at, part)),
        ]

    def tokens(self, first: int, last: int) -> list[bytes]:
        pieces = self._plan.choices[0].pieces[first:last]
        return [
            self._event(b"response.output_text.delta", b'%b,"delta":"%b","logprobs":[]' % (self._text_at, piece))
            for piece in pieces
        ]

    def closing(self) -> list[bytes]:
        text = b"".join(self._plan.choices[0].pieces)
        part = b'{"annotations":[],"text":"%b","type":"output_text","logprobs":null}' % text
        ending = b"response.incomplete" if self._cut_short and self._plan.flavor == "sglang" else b"response.completed"
        return [
            self._event(b"response.output_text.done", b'%b,"logprobs":[],"text":"%b"' % (self._text_at, text)),
            self._event(b"response.content_part.done", b'%b,"part":%b' % (self._text_at, part)),
            self._event(b"response.output_item.done", b'"item":%b,"output_index":0' % self._message()),
            self._event(ending, b'"response":' + self._response(done=True)),
        ]

    @property
    def _cut_short(self) -> bool:
        return self._plan.choices[0].finish_reason == b"length"

    def _event(self, name: bytes, fields: bytes) -> bytes:
        number = self._number
        self._number += 1
        return b'event: %b\ndata: {%b,"sequence_number":%d,"type":"%b"}\n\n' % (name, fields, number, name)

    def _message(self) -> bytes:
        text = b"".join(self._plan.choices[0].pieces)
        return (
            b'{"id":"%b","content":[{"annotations":[],"text":"%b","type":"output_text","logprobs":null}],'
            b'"role":"assistant","status":"completed","type":"message"}' % (self._item, text)
        )

    def _response(self, done: bool) -> bytes:
        plan = self._plan
        usage = b"null"
        if done and not plan.no_usage:
            completion = len(plan.choices[0].pieces)
            usage = (
                b'{"input_tokens":%d,"input_tokens_details":{"cached_tokens":%d,"cache_write_tokens":%d},'
                b'"output_tokens":%d,"output_tokens_details":{"reasoning_tokens":0,"tool_output_tokens":0},'
                b'"total_tokens":%d}'
                % (
                    plan.prompt_tokens,
                    plan.cached_tokens,
                    plan.prompt_tokens - plan.cached_tokens,
                    completion,
                    plan.prompt_tokens + completion,
                )
            )
        status = b"in_progress"
        details = b"null"
        if done and self._cut_short:
            status, details = b"incomplete", b'{"reason":"max_output_tokens"}'
        elif done:
            status = b"completed"
        return (
            b'{"id":"resp_%b","created_at":%d,"incomplete_details":%b,"instructions":null,"metadata":null,'
            b'"model":"%b","object":"response","output":[%b],"parallel_tool_calls":true,"status":"%b",'
            b'"usage":%b}'
            % (
                plan.request_id,
                plan.created_s,
                details,
                plan.model,
                self._message() if done else b"",
                status,
                usage,
            )
        )
