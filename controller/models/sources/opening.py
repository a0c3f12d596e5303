"""The source that a request names."""

from __future__ import annotations

from collections.abc import Mapping

from controller.models.http import Http
from controller.models.request import S3, HuggingFace, LoadRequest, ModelScope, Oci
from controller.models.sources.huggingface import HuggingFaceHub
from controller.models.sources.modelscope import ModelScopeHub
from controller.models.sources.oci import OciArtifact
from controller.models.sources.s3 import S3Store
from controller.models.sources.source import Source


def opened(http: Http, request: LoadRequest, environment: Mapping[str, str]) -> Source:
    """Raises LastingError where the request does not fit the source."""
    source = request.source
    if isinstance(source, HuggingFace):
        return HuggingFaceHub(http, request.model, source, environment)
    if isinstance(source, ModelScope):
        return ModelScopeHub(http, request.model, source, environment)
    if isinstance(source, S3):
        return S3Store(http, source, environment)
    assert isinstance(source, Oci)
    return OciArtifact(http, source, environment)
