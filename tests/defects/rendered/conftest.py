"""The manifests as Kubernetes would get them."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from tests.harness.go_build import NoGoError
from tests.manifests.conftest import build, built, product

__all__ = ["built", "product"]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build before the first test: minutes of compiling are no test's time limit."""
    here = Path(__file__).parent
    if not session.config.option.collectonly and any(here in item.path.parents for item in session.items):
        with contextlib.suppress(NoGoError):  # the tests say so
            build()
