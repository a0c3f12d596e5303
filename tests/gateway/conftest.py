"""What every module here uses: a client session that waits no longer than a test may, and a day that does not end."""

from collections.abc import AsyncIterator

import aiohttp
import pytest

from tests.harness.gateway import past_midnight


@pytest.fixture(autouse=True)
def within_one_day() -> None:
    """Daily limits begin anew at midnight (UTC): a test that counts does not run over it."""
    past_midnight()


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=120)
    # Bodies as they come: what is compressed stays so.
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as one:
        yield one
