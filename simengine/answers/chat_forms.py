"""`/v1/chat/completions` in its rarer forms: tools called, log probabilities told. Chunks as vLLM 0.32 writes them."""

import msgspec

from simengine.answers.chat import ChatAnswer
from simengine.answers.plan import Choice, Plan
from simengine.vocabulary import quoted

ARGUMENTS = (b'{"text":"', b'"}')
"""around the words that a tool is called with; they cost no tokens"""


def chat_answer(plan: Plan) -> ChatAnswer:
    """The form that the plan needs."""
    if plan.tool:
        return ToolCallAnswer(plan)
    return ChatAnswer(plan) if plan.top_logprobs is None else LogprobsAnswer(plan)


class _Rare(ChatAnswer):
    """A stream whose chunks are each made on their own."""

    __slots__ = ()

    def _chunk(self, index: int, delta: bytes, logprobs: bytes, finish: bytes, rest: bytes) -> bytes:
        return b'%b%d,"delta":{%b},"logprobs":%b,"finish_reason":%b%b\n\n' % (
            *(self._before, index, delta, logprobs),
            *(finish, rest),
        )

    def _running(self) -> bytes:
        """The end of a chunk that is not a choice's last."""
        usage = self._with_usage(self._used) if self._usage_each else b"}"
        return b"}]" + usage if self._sglang else b',"token_ids":null}]' + usage

    def _last(self, index: int, delta: bytes, logprobs: bytes) -> bytes:
        """The chunk with the reason why the choice ended; SGLang has it among its closing ones."""
        choice = self._plan.choices[index]
        rest = b',"stop_reason":%b,"token_ids":null}]%b' % (choice.stop_reason, self._finish_usage(index))
        return self._chunk(index, delta, logprobs, b'"%b"' % self.finish_reason(choice), rest)


class ToolCallAnswer(_Rare):
    """Every choice calls the one tool. Streamed: its name with the first token, the reason in a chunk of its own."""

    __slots__ = ()

    def message(self, index: int) -> bytes:
        text = b"".join(self._plan.choices[index].pieces)
        arguments = _twice(ARGUMENTS[0] + text + ARGUMENTS[1])
        call = b'{"id":"%b","type":"function","function":{"name":"%b","arguments":"%b"}}' % (
            self._call_id(index),
            self._plan.tool,
            arguments,
        )
        return b'"content":null,"refusal":null,"tool_calls":[%b],"reasoning":null' % call

    def finish_reason(self, choice: Choice) -> bytes:
        return b"tool_calls" if choice.finish_reason == b"stop" else choice.finish_reason

    def tokens(self, first: int, last: int) -> list[bytes]:
        events: list[bytes] = []
        for position in range(first, last):
            for index, choice in enumerate(self._plan.choices):
                pieces = choice.pieces
                if position >= len(pieces):
                    continue
                self._used += 1
                text = pieces[position]
                if position == 0:
                    named = b'"id":"%b","type":"function","function":{"name":"%b"}'
                    events.append(self._call(index, named % (self._call_id(index), self._plan.tool)))
                    text = ARGUMENTS[0] + text
                ended = position == len(pieces) - 1
                if ended:
                    text += ARGUMENTS[1]
                events.append(self._call(index, b'"function":{"arguments":"%b"}' % _twice(text)))
                if ended and not self._sglang:
                    events.append(self._last(index, b"", b"null"))
        return events

    def _call(self, index: int, fields: bytes) -> bytes:
        return self._chunk(index, b'"tool_calls":[{"index":0,%b}]' % fields, b"null", b"null", self._running())

    def _call_id(self, index: int) -> bytes:
        return b"chatcmpl-tool-%b-%d" % (self._plan.request_id, index)


class LogprobsAnswer(_Rare):
    """Each token with its log probability, and with as many candidates as were asked for."""

    __slots__ = ()

    def logprobs(self, index: int, first: int, last: int) -> bytes:
        pieces = self._plan.choices[index].pieces[first:last]
        told = [self._told(msgspec.json.decode(b'"%b"' % piece)) for piece in pieces]
        return b'{"content":%b}' % msgspec.json.encode(told)

    def tokens(self, first: int, last: int) -> list[bytes]:
        events: list[bytes] = []
        for position in range(first, last):
            for index, choice in enumerate(self._plan.choices):
                if position >= len(choice.pieces):
                    continue
                self._used += 1
                delta = b'"content":"%b"' % choice.pieces[position]
                logprobs = self.logprobs(index, position, position + 1)
                if position == len(choice.pieces) - 1 and not self._sglang:
                    events.append(self._last(index, delta, logprobs))
                else:
                    events.append(self._chunk(index, delta, logprobs, b"null", self._running()))
        return events

    def _told(self, token: str) -> dict[str, object]:
        """The candidates are the token itself and made-up ones, each half as likely as the one before."""
        wanted = self._plan.top_logprobs or 0
        names = [token, *(f" candidate{number}" for number in range(1, wanted))][:wanted]
        top = [_candidate(name, -0.7 * (rank + 1)) for rank, name in enumerate(names)]
        return {**_candidate(token, -0.7), "top_logprobs": top}


def _candidate(token: str, logprob: float) -> dict[str, object]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


def _twice(text: bytes) -> bytes:
    """JSON inside a JSON string."""
    return quoted(text.decode())
