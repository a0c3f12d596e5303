"""Every kind of refusal arrives as the exception that the SDK has for it, and an SDK's retries do no harm."""

from dataclasses import dataclass, field
from typing import Any, get_args

import anthropic as anthropic_sdk
import openai as openai_sdk
import pytest
from anthropic.types.shared import ErrorType

from extproc.errors import PATIENCE_S, REASONS
from tests.clients.conftest import MESSAGES, MODEL


@dataclass(frozen=True)
class Refusal:
    code: str
    openai: type[openai_sdk.APIStatusError]
    anthropic: type[anthropic_sdk.APIStatusError]
    secret: str = "sk-good"
    asked: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.code


REFUSALS = [
    Refusal("invalid_token", openai_sdk.AuthenticationError, anthropic_sdk.AuthenticationError, "sk-unknown"),
    Refusal("token_expired", openai_sdk.AuthenticationError, anthropic_sdk.AuthenticationError, "sk-expired"),
    Refusal(
        "model_not_allowed",
        openai_sdk.PermissionDeniedError,
        anthropic_sdk.PermissionDeniedError,
        asked={"model": "secluded"},
    ),
    Refusal("model_not_found", openai_sdk.NotFoundError, anthropic_sdk.NotFoundError, asked={"model": "nothing"}),
    Refusal("invalid_field", openai_sdk.BadRequestError, anthropic_sdk.BadRequestError, asked={"max_tokens": -1}),
    Refusal("rate_limit_exceeded", openai_sdk.RateLimitError, anthropic_sdk.RateLimitError, "sk-a-minute"),
    Refusal("quota_exceeded", openai_sdk.RateLimitError, anthropic_sdk.RateLimitError, "sk-spent"),
    Refusal("quota_not_found", openai_sdk.InternalServerError, anthropic_sdk.ServiceUnavailableError, "sk-unquoted"),
    Refusal(
        "no_healthy_engine",
        openai_sdk.InternalServerError,
        anthropic_sdk.ServiceUnavailableError,
        asked={"model": "off"},
    ),
    Refusal(
        "engine_unreachable",
        openai_sdk.InternalServerError,
        anthropic_sdk.ServiceUnavailableError,
        asked={"extra_headers": {"x-sim-fault": "close"}},
    ),
]


def asked(refusal: Refusal) -> dict[str, Any]:
    return {"model": MODEL, "messages": MESSAGES, "max_tokens": 5, **refusal.asked}


async def refused_openai(clients, refusal: Refusal, **options: Any) -> openai_sdk.APIStatusError:
    client = await clients.openai(refusal.secret, **options)
    with pytest.raises(refusal.openai) as caught:
        await client.chat.completions.create(**asked(refusal))
    return caught.value


async def refused_anthropic(clients, refusal: Refusal, **options: Any) -> anthropic_sdk.APIStatusError:
    client = await clients.anthropic(refusal.secret, **options)
    with pytest.raises(refusal.anthropic) as caught:
        await client.messages.create(**asked(refusal))
    return caught.value


@pytest.mark.parametrize("refusal", REFUSALS, ids=str)
async def test_openais_exception(clients, refusal):
    error = await refused_openai(clients, refusal)
    reason = REASONS[refusal.code]
    assert (error.status_code, error.code, error.type) == (reason.status, refusal.code, reason.type)
    assert error.request_id == error.response.headers["x-request-id"]
    assert error.body["message"] in str(error)


@pytest.mark.parametrize("refusal", REFUSALS, ids=str)
async def test_anthropics_exception(clients, refusal):
    error = await refused_anthropic(clients, refusal)
    assert (error.status_code, error.error_code) == (REASONS[refusal.code].status, refusal.code)
    assert error.type in get_args(ErrorType)
    assert error.request_id == error.response.headers["x-request-id"] == error.body["request_id"]
    assert error.api_message == error.body["error"]["message"]
    assert error.body["error"]["code"] == refusal.code, "scripts find it where it always is"


def test_every_refusal_has_a_type_that_anthropics_sdk_knows():
    assert {reason.anthropic_type for reason in REASONS.values()} <= set(get_args(ErrorType))


@pytest.mark.parametrize(
    ("code", "sleeps"),
    [("rate_limit_exceeded", 2), ("no_healthy_engine", 2), ("quota_exceeded", 0), ("quota_not_found", 0)],
)
@pytest.mark.parametrize("refused", [refused_openai, refused_anthropic])
async def test_retries_wait_as_long_as_they_are_told_or_are_not_made(clients, slept, refused, code, sleeps):
    """A refusal of a minute at most is slept over; with a longer one the SDK neither hammers nor sleeps for an hour."""
    refusal = next(one for one in REFUSALS if one.code == code)
    error = await refused(clients, refusal, max_retries=2)
    assert len(slept) == sleeps
    if sleeps:
        told_s = int(error.response.headers["retry-after"])
        assert 1 <= told_s <= PATIENCE_S
        # The minute moves on between two tries, and may end.
        assert all((each - told_s) % 60 <= 30 for each in slept), (slept, told_s)
    else:
        assert error.response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("refused", [refused_openai, refused_anthropic])
async def test_a_day_is_not_slept_through(clients, slept, refused):
    limits = (openai_sdk.RateLimitError, anthropic_sdk.RateLimitError)
    error = await refused(clients, Refusal("rate_limit_exceeded", *limits, "sk-a-day"), max_retries=2)
    lasts = int(error.response.headers["retry-after"]) > PATIENCE_S
    # In the last minute of the day (UTC) it is worth waiting for.
    assert len(slept) == (0 if lasts else 2)


async def test_a_retry_gets_through_once_the_engine_is_back(clients, engine, session, slept):
    """One request for the user, two for the engine."""
    await engine.faults(session, status=503, times=1)
    openai = await clients.openai(max_retries=2)
    answer = await openai.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=2)
    assert answer.usage.completion_tokens == 2
    assert len(slept) == 1


async def test_an_unknown_path(openai, anthropic):
    with pytest.raises(openai_sdk.NotFoundError) as caught:
        await openai.responses.retrieve("resp_1")
    assert caught.value.code == "unknown_path"
    with pytest.raises(anthropic_sdk.NotFoundError):
        await anthropic.messages.batches.list()


async def test_a_body_too_large(openai, anthropic):
    messages = [{"role": "user", "content": "x" * (51 * 1024 * 1024)}]
    with pytest.raises(openai_sdk.APIStatusError) as caught:
        await openai.chat.completions.create(model=MODEL, messages=messages)
    assert (caught.value.status_code, caught.value.code) == (413, "body_too_large")
    with pytest.raises(anthropic_sdk.ContentTooLargeError) as refused:
        await anthropic.messages.create(model=MODEL, max_tokens=1, messages=messages)
    assert refused.value.error_code == "body_too_large"


async def test_one_request_at_a_time(clients, gateway):
    openai = await clients.openai("sk-single")
    asked = {"model": MODEL, "messages": MESSAGES, "stream": True}
    stream = await openai.chat.completions.create(**asked, max_tokens=100_000)
    await anext(aiter(stream))
    with pytest.raises(openai_sdk.RateLimitError) as caught:
        await openai.chat.completions.create(**asked)
    assert caught.value.code == "concurrency_limit_exceeded"
    await stream.close()
    await gateway.row_of(stream.response.headers["x-request-id"])
    patient = await clients.openai("sk-single", max_retries=2)
    assert await patient.chat.completions.create(**asked, max_tokens=1)
