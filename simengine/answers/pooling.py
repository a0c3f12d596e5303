"""`/v1/embeddings`, `/v1/rerank`, `/v1/score`: numbers that depend on the texts alone, seeded."""

import base64
import random
import struct
import zlib

import msgspec

from simengine.answers.plan import Plan

_DIMENSIONS = 32


def vector(text: bytes, seed: int, dimensions: int | None) -> list[float]:
    """A unit vector in so many dimensions."""
    rng = random.Random(zlib.crc32(text, seed & 0xFFFFFFFF))  # noqa: S311 - repeatable numbers
    values = [rng.gauss(0.0, 1.0) for _ in range(dimensions or _DIMENSIONS)]
    norm = sum(value * value for value in values) ** 0.5
    return [round(value / norm, 6) for value in values]


def score(query: bytes, document: bytes, seed: int) -> float:
    """0..1"""
    return zlib.crc32(query + b"\0" + document, seed & 0xFFFFFFFF) / 0xFFFFFFFF


def embeddings(plan: Plan, vectors: list[list[float]], encoding_format: str | None) -> bytes:
    data = []
    for index, values in enumerate(vectors):
        embedding: object = values
        if encoding_format == "base64":
            embedding = base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()
        data.append({"index": index, "object": "embedding", "embedding": embedding})
    return _list(plan, b"embd", data)


def scores(plan: Plan, values: list[float]) -> bytes:
    return _list(
        plan, b"score", [{"index": index, "object": "score", "score": value} for index, value in enumerate(values)]
    )


def ranking(plan: Plan, ranked: list[tuple[int, str, float]]) -> bytes:
    """(index, document, relevance), best first. Usage has two fields here, and all documents are counted."""
    results = [
        {"index": index, "document": {"text": text, "multi_modal": None}, "relevance_score": value}
        for index, text, value in ranked
    ]
    usage = b""
    if not plan.no_usage:
        usage = b'"usage":{"prompt_tokens":%d,"total_tokens":%d},' % (plan.prompt_tokens, plan.prompt_tokens)
    return b'{"id":"rerank-%b","model":"%b",%b"results":%b}' % (
        plan.request_id,
        plan.model,
        usage,
        msgspec.json.encode(results),
    )


def _list(plan: Plan, prefix: bytes, data: list[dict[str, object]]) -> bytes:
    usage = b"" if plan.no_usage else b',"usage":' + plan.usage_json(0, whole=True)
    return b'{"id":"%b-%b","object":"list","created":%d,"model":"%b","data":%b%b}' % (
        prefix,
        plan.request_id,
        plan.created_s,
        plan.model,
        msgspec.json.encode(data),
        usage,
    )
