"""However a request ends, and whenever: settled once, nothing held, and engines blamed for what they did alone."""

import asyncio

from hypothesis import example, given, settings
from hypothesis import strategies as st

from extproc.access_log import CLIENT_DISCONNECTED, ENGINE_LOST, STREAM_TIMEOUT
from extproc.picking import HealthSettings
from extproc.transport.core import CloseReason
from tests.exchange.talk import (
    DONE,
    ENGINES,
    JSON,
    REQUEST_ID,
    SSE,
    World,
    answers,
    event,
    piece,
    trailers,
    usage_event,
    whole,
)

NOTHING = {"open": 0, "leases": 0, "slots": 0, "reserved": 0, "in_flight": 0}
OVERFLOW = "upstream_reset_before_response_started{overflow}"
REFUSED = "upstream_reset_before_response_started{remote_connection_failure|delayed_connect_error:_Connection_refused}"
TIMEOUT = "response_timeout"

BEGUN = (200, "via_upstream", 1)
PLAIN = (JSON, (whole(7, 5),))
BODIES = st.sampled_from(
    [
        PLAIN,
        (JSON, (whole(7, 5)[:20], whole(7, 5)[20:])),
        (JSON, (b'{"error": {"message": "no", "code": 500}}',)),
        (SSE, (event("a"), event("b"), usage_event(7, 2), DONE)),
        (SSE, (event("a"), b'data: {"error": {"code": 500}}\n\n', DONE)),
        ("text/plain", (b"what", b"ever")),
    ]
)
ENDS = st.sampled_from(["end", "trailers", "close", "deadline"])
HEADS = st.sampled_from(
    [
        None,
        BEGUN,
        (200, "via_upstream", 2),
        (404, "via_upstream", 1),
        (500, "via_upstream", 1),
        (503, OVERFLOW, 1),
        (503, REFUSED, 1),
        (503, REFUSED, 2),
        (503, "no_healthy_upstream", 0),
        (504, TIMEOUT, 1),
        (400, "filter_chain_not_found", 1),
    ]
)
TOLD = st.sampled_from([None, CLIENT_DISCONNECTED, ENGINE_LOST, STREAM_TIMEOUT])


@example(stream=False, head=BEGUN, body=PLAIN, pieces=0, end="deadline", told=None, moved=False)
@settings(max_examples=200, deadline=None)
@given(st.booleans(), HEADS, BODIES, st.integers(0, 4), ENDS, TOLD, st.booleans())
def test_every_ending_settles_once_and_leaves_nothing(stream, head, body, pieces, end, told, moved):
    async def run() -> World:
        world = World()
        exchange, engine = world.admitted(stream=stream, max_tokens=50)
        assert world.held["leases"] == world.held["slots"] == world.held["in_flight"] == 1
        content_type, chunks = body
        if head is not None:
            status, details, attempts = head
            other = next(each for each in ENGINES if each != engine)
            served = None if details == OVERFLOW else other if moved else engine
            over = end == "end" and not pieces
            exchange.on_message(answers(served, status, content_type, details=details, attempts=attempts, end=over))
            for number, chunk in enumerate(chunks[:pieces], 1):
                exchange.on_message(piece(chunk, end=end == "end" and number == min(pieces, len(chunks))))
            if end == "trailers":
                exchange.on_message(trailers())
        if end == "deadline":
            exchange.on_deadline()
            # What Envoy said meanwhile.
            exchange.on_message(answers(engine, 200, content_type) if head is None else piece(chunks[-1], end=True))
        exchange.on_close(CloseReason.RESET)
        if told is not None:
            world.deps.abandoned.tell(REQUEST_ID, told)
        world.deps.abandoned.close()
        return world

    world = asyncio.run(run())
    assert world.held == NOTHING
    assert len(world.deps.metrics.ended) == 1
    rows = list(world.ledger.rows.values())
    assert len({row.id for row in rows}) == 1
    tokens = sum(row.prompt_tokens + row.completion_tokens for row in rows)
    requests, charged = world.charged
    assert requests in {0, 1}
    assert charged == tokens
    assert requests or not tokens


def failing(world: World, status: int, details: str, *, known: bool = True) -> None:
    exchange, engine = world.admitted()
    exchange.on_message(answers(engine if known else None, status, details=details, end=True))
    exchange.on_close(CloseReason.DONE)


def test_a_gateway_that_has_no_room_for_more_requests_blames_no_engine():
    """Envoy's circuit breaker is open: the engines answer all that they are asked."""
    world = World()
    for _ in range(10):
        failing(world, 503, OVERFLOW, known=False)
    assert world.fit == set(ENGINES)


def test_an_engine_that_takes_too_long_for_some_requests_stays_open_to_the_others():
    """Whoever asks for the longest answers must not take a model's only engine from all."""
    world = World(ENGINES[0])
    for _ in range(10):
        failing(world, 504, TIMEOUT)
    assert world.fit == {ENGINES[0]}
    assert world.row_errors == {"engine_timeout"}


def test_of_two_engines_the_one_that_takes_too_long_again_and_again_has_a_rest():
    world = World()
    for _ in range(2 * HealthSettings().failures_until_ejection):
        failing(world, 504, TIMEOUT)
    assert len(world.fit) == 1


def test_an_engine_that_cannot_be_reached_is_not_used_before_it_answers_a_probe():
    world = World(ENGINES[0])
    failing(world, 503, REFUSED)
    assert world.fit == set()


def left_after(events: int, world: World, **fields: object) -> int:
    """Completion tokens of a client that leaves a stream."""

    async def run() -> None:
        exchange, engine = world.admitted(stream=True, **fields)
        exchange.on_message(answers(engine, 200, SSE))
        for number in range(events):
            exchange.on_message(piece(event(f"word {number}")))
        exchange.on_close(CloseReason.RESET)
        world.deps.abandoned.close()

    asyncio.run(run())
    return world.row.completion_tokens


def test_who_leaves_pays_for_all_that_came_also_beyond_what_the_endpoint_reserves():
    """`maxOutputTokens` binds no engine: an answer of thousands cost whoever left before its end a few hundred."""
    assert left_after(30, World(max_output_tokens=10)) == 30
    assert left_after(30, World(max_output_tokens=10), max_tokens=1000) == 30


def test_who_leaves_pays_no_more_than_the_request_allowed():
    assert left_after(30, World(max_output_tokens=1000), max_tokens=20) == 20


def test_a_client_that_leaves_after_the_last_event_got_its_answer():
    """Many stop reading at [DONE], before the end that comes behind it."""
    world = World()

    async def run() -> None:
        exchange, engine = world.admitted(stream=True, stream_options={"include_usage": True})
        exchange.on_message(answers(engine, 200, SSE))
        for each in (event("a"), event("b"), usage_event(7, 2), DONE):
            exchange.on_message(piece(each))
        exchange.on_close(CloseReason.RESET)
        world.deps.abandoned.close()

    asyncio.run(run())
    row = world.row
    assert (row.status, row.error, row.accuracy) == (200, "", "exact")
    assert (row.prompt_tokens, row.completion_tokens) == (7, 2)


def test_an_answer_that_ends_in_trailers_is_read_to_its_end():
    world = World()
    exchange, engine = world.admitted()
    for message in (answers(engine), piece(whole(7, 5)), trailers()):
        exchange.on_message(message)
    exchange.on_close(CloseReason.DONE)
    row = world.row
    assert (row.accuracy, row.prompt_tokens, row.completion_tokens) == ("exact", 7, 5)


def test_a_clients_request_id_as_long_as_headers_may_be_does_not_fill_the_ledger():
    world = World()
    exchange, engine = world.admitted(request_id="x" * 50_000)
    for message in (answers(engine), piece(whole(7, 5), end=True)):
        exchange.on_message(message)
    assert world.row.request_id == "x" * 256
