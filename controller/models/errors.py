"""Why a model is not loaded, as one tree.

    LoadError                 knows its `reason`, the `field` of the ArksModel to look at, and the exit code
    ├── LastingError          exit 3: the same request fails until somebody changes something
    │   └── NoSpaceError      the volume is too small
    └── TransientError        exit 1: the same request may succeed later
        ├── ChangedError      the source's files changed while they were loaded: list again
        └── ContentError      what arrived is not what the source promised

Messages name hosts, files and fields. They never hold a URL (it may be signed), a header, or a body of an answer.
"""

from __future__ import annotations

from typing import ClassVar

EXIT_READY = 0
EXIT_TRANSIENT = 1
EXIT_LASTING = 3
EXIT_STOPPED = 143  # 128 + SIGTERM, as a shell would say it


class LoadError(Exception):
    """A load that did not end ready."""

    exit_code: ClassVar[int] = EXIT_TRANSIENT

    def __init__(self, reason: str, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.field = field


class LastingError(LoadError):
    exit_code = EXIT_LASTING


class NoSpaceError(LastingError):
    def __init__(self, message: str) -> None:
        super().__init__("NoSpace", message, field="spec.storage")


class TransientError(LoadError):
    exit_code = EXIT_TRANSIENT


class ChangedError(TransientError):
    def __init__(self, message: str) -> None:
        super().__init__("SourceChanged", message)


class ContentError(TransientError):
    def __init__(self, message: str) -> None:
        super().__init__("ContentMismatch", message)
