"""The live connections of one listener."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from extproc.transport.link import Link


class Register(set["Link"]):
    """The live connections of one listener."""

    closed = False
    """no more of them: one whose TLS handshake ends after the listener's end is dropped"""
