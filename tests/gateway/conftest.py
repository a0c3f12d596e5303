"""What every module here uses: a client session that waits no longer than a test may."""

from collections.abc import AsyncIterator

import aiohttp
import pytest


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=60)
    # Bodies as they come: what is compressed stays so.
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as one:
        yield one
