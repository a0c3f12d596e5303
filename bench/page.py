"""The measured parts of docs/performance.md: each benchmark owns the text between its two markers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

PAGE = "performance.md"


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table: what, the limit it must keep, the value, and whether it does (None: it is not judged)."""

    what: str
    must: str
    value: str
    ok: bool | None


def figures_table(figures: Iterable[Figure]) -> list[str]:
    marks = {True: "ok", False: "**missed**", None: ""}
    rows = [(one.what, one.must, one.value, marks[one.ok]) for one in figures]
    return table(("figure", "must reach", "measured", ""), rows)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def write_section(folder: Path, section: str, lines: Iterable[str]) -> None:
    """Put the lines between `<!-- SECTION: begin -->` and its end, added where there is none; prints them."""
    begin, end = f"<!-- {section}: begin -->", f"<!-- {section}: end -->"
    text = "\n".join(lines)
    print(text)
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / PAGE
    old = page.read_text() if page.exists() else "# Performance\n"
    if begin not in old:
        old = f"{old}\n{begin}\n{end}\n"
    head, rest = old.split(begin)
    page.write_text(f"{head}{begin}\n{text}\n{end}{rest.split(end)[1]}")
