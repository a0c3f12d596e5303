"""Which files of a source are wanted: shell patterns over the whole relative path, as the hub's own clients take them.

``*`` also matches slashes, so ``*.safetensors`` means every such file at any depth; ``folder/`` means all below it.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence


def wanted(path: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    if include and not _any(path, include):
        return False
    return not _any(path, exclude)


def _any(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, one + "*" if one.endswith("/") else one) for one in patterns)
