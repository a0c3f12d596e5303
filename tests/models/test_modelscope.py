"""ModelScope's repositories arrive whole, each file at its own commit."""

from __future__ import annotations

import pytest

from controller.models.errors import ContentError, LastingError, TransientError
from tests.models.hubs import TOKEN
from tests.models.origin import CUT, WRONG, noise

FILES = {"config.json": b"{}", "sub/model one.safetensors": noise(600_000, 3)}


def source(scope, **more):
    return {"kind": "modelscope", "endpoint": scope.api.url, **more}


async def test_whole_repository(scope, loader):
    scope.files = FILES
    scope.api.faults["sub/model one.safetensors"] = [(CUT, 50_000)]
    marker = await loader(source(scope))
    assert loader.files() == FILES
    assert all(file.digest.startswith("sha256:") for file in marker.files)
    assert scope.api.sent["sub/model one.safetensors"] == 600_000


async def test_token(scope, loader):
    scope.files, scope.token = FILES, TOKEN
    await loader(source(scope), environment={"MODELSCOPE_API_TOKEN": TOKEN})
    assert loader.files() == FILES
    assert TOKEN not in loader.said()


async def test_wrong_content(scope, loader):
    scope.files = FILES
    scope.api.forever = True
    scope.api.faults["config.json"] = [(WRONG,)]
    with pytest.raises(ContentError):
        await loader(source(scope))


async def test_commit_as_revision_is_the_status_s(scope, loader):
    scope.files = FILES
    marker = await loader(source(scope, revision="a" * 40))
    assert marker.revision == "a" * 40


@pytest.mark.parametrize(
    ("code", "error", "field"),
    [
        (404, LastingError, "spec.model"),
        (403, LastingError, "spec.source.modelscope.tokenSecretRef"),
        (10010999999, TransientError, ""),
    ],
)
async def test_errors_inside_answers_of_200(scope, loader, code, error, field):
    scope.answer_code = code
    with pytest.raises(error) as failed:
        await loader(source(scope))
    assert failed.value.field == field


async def test_refused_token_names_the_field(scope, loader):
    scope.token = TOKEN
    with pytest.raises(LastingError) as failed:
        await loader(source(scope), environment={"MODELSCOPE_API_TOKEN": "wrong"})
    assert failed.value.field == "spec.source.modelscope.tokenSecretRef"
    with pytest.raises(LastingError) as failed:
        await loader(source(scope), model="org/other", environment={"MODELSCOPE_API_TOKEN": TOKEN})
    assert failed.value.field == "spec.model"
