"""The HTTP paths the gateway serves. Anything else is refused: nothing passes unmetered."""

from typing import Final, NamedTuple
from urllib.parse import unquote_to_bytes

from extproc.errors import Refused, refused
from extproc.usage.model import Api


class Metered(NamedTuple):
    """A path whose requests go to an engine."""

    api: Api


class ModelList(NamedTuple):
    """GET /v1/models, or one model of it."""

    model: str | None


_METERED: Final[dict[bytes, Metered]] = {
    b"/v1/chat/completions": Metered("chat"),
    b"/v1/completions": Metered("completions"),
    b"/v1/embeddings": Metered("embeddings"),
    b"/v1/responses": Metered("responses"),
    b"/v1/messages": Metered("messages"),
    b"/v1/messages/count_tokens": Metered("count_tokens"),
    b"/v1/rerank": Metered("rerank"),
    b"/v1/score": Metered("score"),
    # The same under the names by which Cohere's SDK and vLLM's own clients ask for them.
    b"/v2/rerank": Metered("rerank"),
    b"/rerank": Metered("rerank"),
    b"/score": Metered("score"),
}
_MODELS: Final = b"/v1/models"


def route(method: bytes, path: bytes) -> Metered | ModelList | Refused:
    """What a request line asks for. A query is ignored here and passed on to the engine."""
    metered = _METERED.get(path)
    if metered is None:
        path = path.partition(b"?")[0]
        metered = _METERED.get(path)
    if metered is not None:
        return metered if method == b"POST" else _wrong_method("POST")
    if path == _MODELS or path.startswith(b"/v1/models/"):
        if method != b"GET":
            return _wrong_method("GET")
        name = unquote_to_bytes(path[len(_MODELS) + 1 :]).decode("utf-8", "replace")
        return ModelList(name or None)
    return refused(
        "unknown_path", "There is nothing at this path. The gateway serves /v1/models and OpenAI's API under /v1/."
    )


def _wrong_method(allowed: str) -> Refused:
    return refused("method_not_allowed", f"Use {allowed} for this path.", headers=(("allow", allowed),))
