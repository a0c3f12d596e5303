"""The loop that the program runs on: resets, half-closes and write order are the loop's own."""

import uvloop


def pytest_asyncio_loop_factories(config, item):
    return {"uvloop": uvloop.new_event_loop}
