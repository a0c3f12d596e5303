"""Why an answer broke off: told by another connection than its end, before it or after it."""

import asyncio

from extproc.access_log import CLIENT_DISCONNECTED, EARLY_ID_CHARACTERS, EARLY_MOST, ENGINE_LOST, Abandoned


def told(*early: str, asked: str) -> list[str]:
    """What `asked` is told where entries for `early` had come already, once nobody waits any longer."""
    heard: list[str] = []

    async def run() -> None:
        abandoned = Abandoned()
        for request_id in early:
            abandoned.tell(request_id, ENGINE_LOST)
        abandoned.wait(asked, heard.append)
        abandoned.close()

    asyncio.run(run())
    return heard


def test_a_reason_that_overtook_its_end_is_told_once():
    assert told("one", "two", asked="one") == [ENGINE_LOST]
    assert told("one", asked="another") == [CLIENT_DISCONNECTED]


def test_what_nobody_asks_for_does_not_fill_the_memory():
    flood = [str(number) for number in range(EARLY_MOST)]
    assert told("one", *flood[1:], asked="one") == [ENGINE_LOST]
    assert told("one", *flood, asked="one") == [CLIENT_DISCONNECTED]
    long = "x" * (EARLY_ID_CHARACTERS + 1)
    assert told(long, asked=long) == [CLIENT_DISCONNECTED]


def test_a_reason_is_told_to_one_request_of_its_id():
    heard: list[str] = []

    async def run() -> None:
        abandoned = Abandoned()
        abandoned.tell("same", ENGINE_LOST)
        abandoned.wait("same", heard.append)
        abandoned.wait("same", heard.append)
        abandoned.close()

    asyncio.run(run())
    assert heard == [ENGINE_LOST, CLIENT_DISCONNECTED]
