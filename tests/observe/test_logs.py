"""No secret reaches a log line, whichever way it tries."""

import io
import json
import logging

import pytest
import structlog

from extproc.observe.logs import configure_logging

SECRET = "sk-very-secret-0123456789"


@pytest.fixture
def lines():
    out = io.StringIO()
    configure_logging("debug", "json", out)
    yield lambda: [json.loads(line) for line in out.getvalue().splitlines()]
    structlog.reset_defaults()
    logging.getLogger().handlers.clear()


def test_telling_fields_lose_their_values(lines):
    headers = {"Authorization": f"Bearer {SECRET}", "x-api-key": SECRET, "accept": "*/*"}
    structlog.get_logger().info("asked", token=SECRET, body=b'{"messages":[]}', headers=headers, token_name="alice")
    (line,) = lines()
    assert SECRET not in json.dumps(line)
    assert "messages" not in json.dumps(line)
    assert line["token_name"] == "alice"
    assert line["headers"]["accept"] == "*/*"


def test_secrets_inside_text_and_errors_are_cut_out(lines):
    try:
        raise ValueError(f"cannot use Bearer {SECRET}")
    except ValueError as error:
        structlog.get_logger().exception("failed", error=error, note=[f"x-api-key: {SECRET}"])
    logging.getLogger("aiohttp").warning("odd header: authorization: bearer %s", SECRET)
    assert len(lines()) == 2
    assert SECRET not in json.dumps(lines())
    assert lines()[1]["logger"] == "aiohttp"


def test_levels_are_kept(lines):
    configured = io.StringIO()
    configure_logging("warning", "json", configured)
    structlog.get_logger().info("chatter")
    structlog.get_logger().warning("trouble")
    assert [json.loads(line)["event"] for line in configured.getvalue().splitlines()] == ["trouble"]
