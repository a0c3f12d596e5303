"""A peer that says anything in any order is told so, or ignored: nothing is held, nothing settled twice."""

import asyncio
import contextlib

from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.transport.core import CloseReason, GrpcError
from tests.exchange.talk import (
    DONE,
    ENGINES,
    SSE,
    World,
    answers,
    asks,
    event,
    piece,
    says,
    trailers,
    usage_event,
    whole,
)

MESSAGES = st.sampled_from(
    [
        asks(),
        asks("/v1/models"),
        says(),
        says(stream=True),
        answers(ENGINES[0]),
        answers(ENGINES[1], attempts=2),
        answers(ENGINES[0], content_type=SSE),
        answers(ENGINES[0], 500),
        answers(None, 503, details="no_healthy_upstream", attempts=0, end=True),
        piece(whole(7, 5), end=True),
        piece(event("a")),
        piece(usage_event(7, 5)),
        piece(DONE, end=True),
        trailers(),
        b"",
        b"\x00",
        b"\x3a\x00",
    ]
)


@settings(max_examples=500)
@given(st.lists(MESSAGES, max_size=8), st.booleans())
def test_messages_in_any_order_leave_nothing(told, drained):
    async def run() -> World:
        world = World()
        exchange = world.exchange()
        for message in (asks(), says(), *told):
            with contextlib.suppress(GrpcError):
                exchange.on_message(message)
        if drained:
            exchange.on_deadline()
        exchange.on_close(CloseReason.RESET)
        world.deps.abandoned.close()
        return world

    world = asyncio.run(run())
    assert set(world.held.values()) == {0}
    assert len(world.deps.metrics.ended) == 1
    assert len({row.id for row in world.ledger.rows.values()}) == 1
