"""What the loader is told: one JSON object, and its environment.

The controller writes the object from an ArksModel's spec; no secret is in it. An unknown field is refused rather
than overlooked: a loader that is older than its controller must not load the wrong files silently.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from controller.engines.model import MODELS_MOUNT
from controller.models.errors import LastingError

CACHE_FOLDER = ".arks-cache"
MIB = 1 << 20


class _Source(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel", tag_field="kind", omit_defaults=True
):
    include: list[str] = []
    exclude: list[str] = []


class HuggingFace(_Source, frozen=True, tag="huggingface"):
    endpoint: str | None = None
    revision: str | None = None


class ModelScope(_Source, frozen=True, tag="modelscope"):
    endpoint: str | None = None
    revision: str | None = None


class S3(_Source, frozen=True, tag="s3", kw_only=True):
    bucket: str
    prefix: str = ""
    endpoint: str | None = None
    region: str | None = None
    path_style: bool = False


class Oci(_Source, frozen=True, tag="oci", kw_only=True):
    reference: str
    plain_http: bool = False


class Pvc(_Source, frozen=True, tag="pvc"):
    claim_name: str = ""
    sub_path: str = ""


class HostPath(_Source, frozen=True, tag="hostPath"):
    path: str = ""


AnySource: TypeAlias = HuggingFace | ModelScope | S3 | Oci | Pvc | HostPath


class LoadRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``path`` is the folder to fill, in the loader's own file system."""

    model: str
    path: str
    source: AnySource

    @property
    def kind(self) -> str:
        return str(type(self.source).__struct_config__.tag)

    def fingerprint(self) -> str:
        """Equal for requests that ask for the same files, wherever they are put."""
        told = msgspec.json.encode([self.model, self.source], order="deterministic")
        return hashlib.sha256(told).hexdigest()


@dataclass(frozen=True, slots=True)
class Settings:
    """How the loader goes about it; every value has an environment variable (``spec.instanceSpec.env``)."""

    connections: int = 8
    files_at_once: int = 16
    piece_bytes: int = 64 * MIB
    write_bytes: int = MIB
    retries: int = 6
    backoff_first_s: float = 1.0
    backoff_longest_s: float = 60.0
    report_every_s: float = 5.0
    connect_timeout_s: float = 30.0
    silence_timeout_s: float = 60.0
    margin_bytes: int = 64 * MIB
    mount: str = MODELS_MOUNT
    """the volume: links above it are the cluster's business, none below it is followed"""
    cache: str | None = None
    """folder of files shared by all models of the volume; None: below the mount; empty: not shared"""
    lock_poll_s: float = 0.5
    lock_silence_s: float = 30.0

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Settings:
        """Raises LastingError for a value that is not a number in range."""
        given: dict[str, Any] = {}
        for name, variable, kind, low in _VARIABLES:
            text = environment.get(variable)
            if text is None or (text == "" and kind is not str):
                continue
            try:
                value = kind(text)
            except ValueError:
                value = None
            if value is None or (low is not None and not float(value) >= low):
                told = f"{variable} must be a number of at least {low}"
                raise LastingError("InvalidRequest", told, field="spec.instanceSpec.env")
            given[name] = value
        return cls(**given)


_VARIABLES: tuple[tuple[str, str, type[int | float | str], float | None], ...] = (
    ("connections", "ARKS_LOADER_CONNECTIONS", int, 1),
    ("piece_bytes", "ARKS_LOADER_PIECE_BYTES", int, 4096),
    ("retries", "ARKS_LOADER_RETRIES", int, 0),
    ("backoff_first_s", "ARKS_LOADER_BACKOFF_S", float, 0),
    ("report_every_s", "ARKS_LOADER_REPORT_S", float, 0.05),
    ("silence_timeout_s", "ARKS_LOADER_TIMEOUT_S", float, 0.1),
    ("margin_bytes", "ARKS_LOADER_MARGIN_BYTES", int, 0),
    ("mount", "ARKS_MODELS_MOUNT", str, None),
    ("cache", "ARKS_MODEL_CACHE", str, None),
)


def decode_request(text: str) -> LoadRequest:
    """Raises LastingError; values are not quoted."""
    try:
        request = msgspec.json.decode(text.encode(), type=LoadRequest)
    except (msgspec.DecodeError, UnicodeEncodeError) as error:
        raise LastingError("InvalidRequest", f"the loader's request is not what it should be: {error}") from None
    parts = request.path.split("/")
    if not request.path.startswith("/") or ".." in parts or "\0" in request.path:
        raise LastingError("InvalidRequest", "path must be absolute, without ..", field="spec.storage.subPath")
    return request


def placed(request: LoadRequest, settings: Settings) -> tuple[str, str, str]:
    """(root, folder below it, cache folder or nothing): nothing below the root is reached through a link."""
    path, mount = os.path.normpath(request.path), os.path.normpath(settings.mount)
    if path == mount:
        return mount, "", ""
    root = mount if path.startswith(mount + "/") else str(Path(path).parent)
    if settings.cache is None:
        # A folder outside the mount is not known to be a shared volume.
        cache = CACHE_FOLDER if root == mount else ""
    else:
        cache = os.path.relpath(settings.cache, root) if settings.cache else ""
        if cache.startswith(".."):
            raise LastingError(
                "InvalidRequest",
                f"ARKS_MODEL_CACHE must be below {root}: files are shared by hard links, which stay in one volume",
                field="spec.instanceSpec.env",
            )
    return root, os.path.relpath(path, root), cache
