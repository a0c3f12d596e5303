"""What several modules here use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.defects.scripted import ScriptedEngine
from tests.gateway.conftest import session

__all__ = ["scripted", "session"]


@pytest.fixture(scope="module")
def scripted() -> Iterator[ScriptedEngine]:
    with ScriptedEngine() as engine:
        yield engine
