"""`/v1/completions`: vLLM writes `"usage":null` on every chunk that has none, and all other nulls too."""

from simengine.answers.chat import DONE
from simengine.answers.plan import Plan


class CompletionAnswer:
    """See `Answer`."""

    __slots__ = ("_before", "_head", "_plan", "_sglang", "_used")

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._sglang = plan.flavor == "sglang"
        prefix = b"" if self._sglang else b"cmpl-"
        self._head = b'{"id":"%b%b","object":"text_completion","created":%d,"model":"%b","choices":[' % (
            prefix,
            plan.request_id,
            plan.created_s,
            plan.model,
        )
        self._before = b"data: " + self._head
        self._used = 0

    def whole(self) -> bytes:
        plan = self._plan
        nulls = b"" if self._sglang else b',"token_ids":null,"prompt_logprobs":null,"prompt_token_ids":null'
        stop = b"matched_stop" if self._sglang else b"stop_reason"
        choices = [
            b'{"index":%d,"text":"%b","logprobs":null,"finish_reason":"%b","%b":%b%b}'
            % (index, b"".join(choice.pieces), choice.finish_reason, stop, choice.stop_reason, nulls)
            for index, choice in enumerate(plan.choices)
        ]
        usage = b"" if plan.no_usage else b',"usage":' + plan.usage_json(plan.completion_tokens, whole=True)
        if self._sglang:
            tail = usage + b',"metadata":{"weight_version":"default"}}'
        else:
            tail = b',"service_tier":null,"system_fingerprint":%b%b,"kv_transfer_params":null}' % (
                plan.fingerprint,
                usage,
            )
        return self._head + b",".join(choices) + b"]" + tail

    def opening(self) -> list[bytes]:
        return []

    def tokens(self, first: int, last: int) -> list[bytes]:
        plan = self._plan
        # SGLang finishes in a chunk of its own.
        ends_here = not self._sglang
        form = b'%b{"index":%d,"text":"%b","logprobs":null,"finish_reason":%b,%b}]%b}\n\n'
        plain = b'"matched_stop":null' if self._sglang else b'"stop_reason":null,"token_ids":null'
        plain_usage = b',"usage":null'
        each = plan.usage == "continuous" and not plan.no_usage
        events = []
        for position in range(first, last):
            for index, choice in enumerate(plan.choices):
                pieces = choice.pieces
                if position >= len(pieces):
                    continue
                self._used += 1
                usage = b',"usage":' + plan.usage_json(self._used, whole=False) if each else plain_usage
                if ends_here and position == len(pieces) - 1:
                    finish = b'"%b"' % choice.finish_reason
                    extra = b'"stop_reason":%b,"token_ids":null' % choice.stop_reason
                    usage = self._finish_usage(index) or usage
                    events.append(form % (self._before, index, pieces[position], finish, extra, usage))
                else:
                    events.append(form % (self._before, index, pieces[position], b"null", plain, usage))
        return events

    def closing(self) -> list[bytes]:
        plan = self._plan
        events = []
        if self._sglang:
            for index, choice in enumerate(plan.choices):
                events.append(
                    b'%b{"index":%d,"text":"","logprobs":null,"finish_reason":"%b","matched_stop":%b}]%b}\n\n'
                    % (
                        self._before,
                        index,
                        choice.finish_reason,
                        choice.stop_reason,
                        self._finish_usage(index) or b',"usage":null',
                    )
                )
        if not plan.no_usage and (plan.usage == "continuous" or (plan.usage == "own" and plan.include_usage)):
            usage = plan.usage_json(plan.completion_tokens, whole=False)
            events.append(b'%b],"usage":%b}\n\n' % (self._before, usage))
        events.append(DONE)
        return events

    def _finish_usage(self, index: int) -> bytes:
        plan = self._plan
        if plan.no_usage or plan.usage != "finish" or index != len(plan.choices) - 1:
            return b""
        return b',"usage":' + plan.usage_json(plan.completion_tokens, whole=False)
