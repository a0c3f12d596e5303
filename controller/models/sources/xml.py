"""Flat reading of the XML that S3 and STS answer with; documents that define entities are refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from xml.parsers import expat

from controller.models.errors import TransientError


def elements(body: bytes, ended: Callable[[Sequence[str], str], None]) -> None:
    """``ended`` gets the path of names (without namespaces) and the text of each element that ends."""
    path: list[str] = []
    pieces: list[str] = []

    def start(name: str, _: dict[str, str]) -> None:
        path.append(name.rpartition(":")[2])
        pieces.clear()

    def end(_: str) -> None:
        ended(path, "".join(pieces))
        path.pop()
        pieces.clear()

    def refuse(*_: object) -> None:
        raise TransientError("UnusableAnswer", "the source answers with XML that defines entities")

    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = pieces.append
    parser.EntityDeclHandler = refuse
    try:
        parser.Parse(body, True)
    except expat.ExpatError:
        raise TransientError("UnusableAnswer", "the source does not answer with XML") from None


def texts(body: bytes, names: Sequence[str]) -> dict[str, str]:
    """The first text of each name, wherever it stands; empty where there is none."""
    found: dict[str, str] = {}

    def ended(path: Sequence[str], text: str) -> None:
        if path[-1] in names:
            found.setdefault(path[-1], text)

    elements(body, ended)
    return {name: found.get(name, "") for name in names}
