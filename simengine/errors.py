"""What the engines answer when they refuse, each in its own form.

ApiError is the one exception; `status` is HTTP's, `type` the engine's own word for it.
"""

import msgspec

from simengine.settings import Flavor


class ApiError(Exception):
    """Raised by a handler, rendered by the router."""

    def __init__(self, status: int, kind: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.message = message
        self.param = param

    def body(self, flavor: Flavor, anthropic: bool = False) -> bytes:
        """The JSON error body: vLLM wraps it in `error`, SGLang does not, `/v1/messages` has Anthropic's form."""
        if anthropic:
            # Its form alone: vLLM keeps its own words for the type.
            return msgspec.json.encode({"type": "error", "error": {"type": self.kind, "message": self.message}})
        fields = {"message": self.message, "type": self.kind, "param": self.param, "code": self.status}
        if flavor == "sglang":
            return msgspec.json.encode({"object": "error", **fields})
        return msgspec.json.encode({"error": fields})


def bad_request(message: str, param: str | None = None, kind: str = "BadRequestError") -> ApiError:
    return ApiError(400, kind, message, param)


def unknown_model(asked: str, served: tuple[str, ...]) -> ApiError:
    listed = ", ".join(served)
    return ApiError(404, "NotFoundError", f"The model `{asked}` does not exist. Served models: {listed}", "model")


def queue_full(flavor: Flavor) -> ApiError:
    kind = "503" if flavor == "sglang" else "Service Unavailable"
    return ApiError(503, kind, "The request queue is full.")


def internal(message: str) -> ApiError:
    return ApiError(500, "InternalServerError", message)
