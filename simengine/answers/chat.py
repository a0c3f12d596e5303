"""`/v1/chat/completions`.

vLLM: role chunk, one chunk per token, `finish_reason` on the last token's chunk, then the usage chunk with empty
`choices` where it was asked for, then [DONE]. SGLang: `finish_reason` in a chunk of its own, ids without a prefix.
"""

from simengine.answers.plan import Choice, Plan

DONE = b"data: [DONE]\n\n"


class ChatAnswer:
    """See `Answer`."""

    __slots__ = (
        "_after",
        "_before",
        "_first_after",
        "_first_before",
        "_head",
        "_plan",
        "_sglang",
        "_usage_each",
        "_used",
    )

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._sglang = plan.flavor == "sglang"
        prefix = b"" if self._sglang else b"chatcmpl-"
        self._head = b'"id":"%b%b","object":"chat.completion' % (prefix, plan.request_id)
        self._before = b'data: {%b.chunk","created":%d,"model":"%b","choices":[{"index":' % (
            self._head,
            plan.created_s,
            plan.model,
        )
        self._usage_each = plan.usage == "continuous" and not plan.no_usage
        self._used = 0
        if self._sglang:
            self._after = b'","reasoning_content":null,"tool_calls":null},"logprobs":null,"finish_reason":'
        else:
            self._after = b'"},"logprobs":null,"finish_reason":'

        # A stream's plain chunk, ready but for its text.
        self._first_before = self._before + b'0,"delta":{"content":"'
        self._first_after = self._after + (b"null}]}\n\n" if self._sglang else b'null,"token_ids":null}]}\n\n')

    def whole(self) -> bytes:
        plan = self._plan
        choices = []
        ending = b'"matched_stop":%b}' if self._sglang else b'"stop_reason":%b,"token_ids":null}'
        form = b'{"index":%d,"message":{"role":"assistant",%b},"logprobs":%b,"finish_reason":"%b",' + ending
        for index, choice in enumerate(plan.choices):
            message, logprobs = self.message(index), self.logprobs(index, 0, len(choice.pieces))
            choices.append(form % (index, message, logprobs, self.finish_reason(choice), choice.stop_reason))
        usage = b"" if plan.no_usage else b',"usage":' + plan.usage_json(plan.completion_tokens, whole=True)
        if self._sglang:
            tail = usage + b',"metadata":{"weight_version":"default"}}'
        else:
            tail = (
                b',"service_tier":null,"system_fingerprint":%b%b,"prompt_logprobs":null,"prompt_token_ids":null,'
                b'"kv_transfer_params":null}' % (plan.fingerprint, usage)
            )
        return b'{%b","created":%d,"model":"%b","choices":[%b]%b' % (
            self._head,
            plan.created_s,
            plan.model,
            b",".join(choices),
            tail,
        )

    def message(self, index: int) -> bytes:
        """A whole answer's message, behind its role."""
        text = b"".join(self._plan.choices[index].pieces)
        if self._sglang:
            return b'"content":"%b","reasoning_content":null,"tool_calls":null' % text
        return (
            b'"content":"%b","refusal":null,"annotations":null,"audio":null,"function_call":null,"tool_calls":[],'
            b'"reasoning":null' % text
        )

    def logprobs(self, index: int, first: int, last: int) -> bytes:
        """Log probabilities of the token positions first ≤ k < last of a choice, in JSON."""
        return b"null"

    def finish_reason(self, choice: Choice) -> bytes:
        return choice.finish_reason

    def opening(self) -> list[bytes]:
        # Continuous usage: vLLM's role chunk has it (completion 0), SGLang's has none.
        usage = b"}" if self._sglang or not self._usage_each else self._with_usage(0)
        return [
            b'%b%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]%b\n\n'
            % (self._before, index, usage)
            for index in range(len(self._plan.choices))
        ]

    def tokens(self, first: int, last: int) -> list[bytes]:
        choices = self._plan.choices
        if len(choices) == 1 and not self._usage_each:
            before, after = self._first_before, self._first_after
            pieces = choices[0].pieces
            if last - first == 1 and last < len(pieces):
                return [before + pieces[first] + after]
            events = [before + piece + after for piece in pieces[first:last]]
            if last == len(pieces) and not self._sglang:
                events[-1] = self._final(0, pieces[-1])
            return events
        events = []
        for position in range(first, last):
            for index, choice in enumerate(choices):
                if position < len(choice.pieces):
                    events.append(self._token(index, position))
        return events

    def closing(self) -> list[bytes]:
        plan = self._plan
        events: list[bytes] = []
        if self._sglang:
            for index, choice in enumerate(plan.choices):
                events.append(
                    b'%b%d,"delta":{"role":null,"content":null},"logprobs":null,"finish_reason":"%b","matched_stop":%b}]'
                    % (self._before, index, self.finish_reason(choice), choice.stop_reason)
                    + self._finish_usage(index)
                    + b"\n\n"
                )
        if self._usage_chunk():
            fingerprint = b"" if self._sglang else b',"system_fingerprint":' + plan.fingerprint
            events.append(
                b'data: {%b.chunk","created":%d,"model":"%b","choices":[],"usage":%b%b}\n\n'
                % (
                    self._head,
                    plan.created_s,
                    plan.model,
                    plan.usage_json(plan.completion_tokens, whole=False),
                    fingerprint,
                )
            )
        events.append(DONE)
        return events

    def _usage_chunk(self) -> bool:
        plan = self._plan
        return not plan.no_usage and (plan.usage == "continuous" or (plan.usage == "own" and plan.include_usage))

    def _token(self, index: int, position: int) -> bytes:
        pieces = self._plan.choices[index].pieces
        self._used += 1
        if position == len(pieces) - 1 and not self._sglang:
            return self._final(index, pieces[-1])
        ending = b"null}]%b\n\n" if self._sglang else b'null,"token_ids":null}]%b\n\n'
        usage = self._with_usage(self._used) if self._usage_each else b"}"
        return b'%b%d,"delta":{"content":"%b%b%b' % (self._before, index, pieces[position], self._after, ending % usage)

    def _final(self, index: int, piece: bytes) -> bytes:
        choice = self._plan.choices[index]
        return b'%b%d,"delta":{"content":"%b%b"%b","stop_reason":%b,"token_ids":null}]%b\n\n' % (
            self._before,
            index,
            piece,
            self._after,
            choice.finish_reason,
            choice.stop_reason,
            self._finish_usage(index),
        )

    def _finish_usage(self, index: int) -> bytes:
        """The end of the finish chunk, from behind its choices."""
        plan = self._plan
        last_one = index == len(plan.choices) - 1
        # The fingerprint rides on the stream's last chunk: this one, unless a usage chunk follows.
        fingerprint = b""
        if last_one and not self._sglang and not self._usage_chunk():
            fingerprint = b',"system_fingerprint":' + plan.fingerprint
        if plan.no_usage:
            return fingerprint + b"}"
        if plan.usage == "finish" and last_one:
            return fingerprint + self._with_usage(plan.completion_tokens)
        if self._usage_each and not self._sglang:
            return fingerprint + self._with_usage(self._used)
        return fingerprint + b"}"

    def _with_usage(self, completion_tokens: int) -> bytes:
        return b',"usage":%b}' % self._plan.usage_json(completion_tokens, whole=False)
