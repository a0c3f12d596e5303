"""YAML to plain values with the line of every field: fast and bounded.

Built on libyaml's events rather than on PyYAML's nodes: composing nodes recurses in C (a file of 100 000 brackets ends
the process) and resolves every scalar in Python (twice the time). The subset is what Kubernetes takes: string keys, no
merge keys, the core scalars; a field set to null is left out, as an API server does. A key given twice is an error.

Each libyaml call returns one event, so no call is long: documents are at most `MAX_DOCUMENT_BYTES`, near the bound that
an API server sets.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple, NoReturn, TypeAlias

import yaml
from yaml._yaml import CParser
from yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
)

MAX_DOCUMENT_BYTES: Final = 1_500_000
MAX_DEPTH: Final = 64
MAX_VALUES: Final = 100_000
"""values of one document, those that aliases repeat counted each time"""

# Events are Any: their stubs know neither that marks are always there nor which class a `type()` comparison proved.
Path: TypeAlias = tuple[str | int, ...]
Lines: TypeAlias = dict[Path, int]

_INT: Final = re.compile(r"[-+]?(0|[1-9][0-9]{0,24})")
_OCTAL: Final = re.compile(r"0[0-7]{1,24}")
_HEX: Final = re.compile(r"0x[0-9a-fA-F]{1,24}")
_FLOAT: Final = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: Final[dict[str, bool | None]] = {
    "": None,
    "~": None,
    **dict.fromkeys(("null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE", "yes", "Yes", "YES", "on", "On", "ON"), True),
    **dict.fromkeys(("false", "False", "FALSE", "no", "No", "NO", "off", "Off", "OFF"), False),
}
_NUMERIC: Final = frozenset("0123456789+-.")
_TAGS: Final = {"tag:yaml.org,2002:" + name for name in ("str", "int", "float", "bool", "null", "map", "seq")}


class Document(NamedTuple):
    line: int
    """of its first value, from 0"""
    value: Any
    lines: Lines
    """line of every field, from 0"""


class YAMLFault(Exception):  # noqa: N818 - becomes a PolicyError once the file is known
    """A document that is not (our) YAML. `line` counts from 0."""

    def __init__(self, line: int, path: Path, problem: str, fix: str = "") -> None:
        super().__init__(problem)
        self.line, self.path, self.problem, self.fix = line, path, problem, fix


def documents(text: bytes) -> Iterator[Document]:
    """Every non-empty document of `text`.

    Raises:
        YAMLFault: for the first fault; documents before it have been yielded.
    """
    if len(text) > MAX_DOCUMENT_BYTES:
        raise YAMLFault(
            0,
            (),
            f"the document is larger than {MAX_DOCUMENT_BYTES} bytes",
            "split it at --- lines into one per object",
        )
    parser = CParser(text)
    try:
        yield from _documents(parser)
    except yaml.reader.ReaderError as error:
        at = text.count(b"\n", 0, error.position)
        raise YAMLFault(at, (), f"is not valid UTF-8 YAML: {error.reason}", "save the file as UTF-8") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(part for part in (error.context, error.problem) if part)
        raise YAMLFault(mark.line if mark else 0, (), f"is not valid YAML: {problem}", _hint(problem)) from None
    finally:
        parser.dispose()


def _documents(parser: CParser) -> Iterator[Document]:
    next_event: Callable[[], Any] = parser.get_event
    while True:
        event = next_event()
        if event is None or type(event) is StreamEndEvent:
            return
        if type(event) is DocumentStartEvent:
            first = next_event()
            lines: Lines = {}
            value = _Builder(parser, lines).value(first)
            if value is not None:
                yield Document(first.start_mark.line, value, lines)


class _Builder:
    """One document. Iterative: depth costs a list entry, not a stack frame."""

    __slots__ = ("_anchors", "_count", "_lines", "_next")

    def __init__(self, parser: CParser, lines: Lines) -> None:
        self._next: Callable[[], Any] = parser.get_event
        self._lines = lines
        self._anchors: dict[str, tuple[Any, int]] = {}
        self._count = 0

    def value(self, event: Any) -> Any:
        next_event = self._next
        lines = self._lines
        path: list[str | int] = []
        # Frames of the containers around the current one: (container, its anchor, values counted before it)
        frames: list[tuple[Any, str | None, int]] = []
        container: Any = None
        anchor: str | None = None
        before = 0
        while True:
            kind = type(event)
            self._count += 1
            if self._count > MAX_VALUES:
                _fail(event, path, f"the document has more than {MAX_VALUES} values", "do not repeat blocks by aliases")
            if kind is ScalarEvent:
                value = event.value
                if not event.style or event.tag is not None:
                    value = _scalar(event, path)
                if event.anchor is not None:
                    self._anchors[event.anchor] = (value, 1)
            elif kind is MappingStartEvent or kind is SequenceStartEvent:
                if len(frames) >= MAX_DEPTH:
                    _fail(event, path, f"is nested deeper than {MAX_DEPTH} levels", "")
                if event.tag is not None and event.tag not in _TAGS:
                    _fail(event, path, "carries a YAML tag", "remove the tag")
                lines.setdefault(tuple(path), event.start_mark.line)
                frames.append((container, anchor, before))
                container, anchor, before = ({} if kind is MappingStartEvent else []), event.anchor, self._count
                event = self._enter(container, path)
                continue
            elif kind is AliasEvent:
                known = self._anchors.get(event.anchor)
                if known is None:
                    _fail(event, path, "is an alias for something that is not (yet) there", "write the value out")
                value, weight = known
                self._count += weight
            elif kind is MappingEndEvent or kind is SequenceEndEvent:
                path.pop()
                value = container
                if type(value) is dict and None in value.values():
                    value = {key: part for key, part in value.items() if part is not None}
                if anchor is not None:
                    self._anchors[anchor] = (value, self._count - before)
                container, anchor, before = frames.pop()
            else:
                _fail(event, path, "is not valid YAML", "")
            # A finished value: put it into its container.
            lines.setdefault(tuple(path), event.start_mark.line)
            if container is None:
                return value
            if type(container) is dict:
                container[path[-1]] = value
            else:
                container.append(value)
            event = self._step(container, path, next_event())

    def _enter(self, container: Any, path: list[str | int]) -> Any:
        """The first value's event of a container just opened, or its end."""
        event = self._next()
        if type(container) is list:
            path.append(0)
            return event
        path.append("")
        return self._key(container, path, event)

    def _step(self, container: Any, path: list[str | int], event: Any) -> Any:
        """The next value's event of the same container, or its end."""
        if type(container) is list:
            path[-1] = len(container)
            return event
        return self._key(container, path, event)

    def _key(self, container: dict[str, Any], path: list[str | int], event: Any) -> Any:
        if type(event) is MappingEndEvent:
            return event
        line = event.start_mark.line
        if type(event) is not ScalarEvent:
            _fail(event, path[:-1], "has a key that is no string", "write keys as plain text")
        key = event.value
        if key in container:
            _fail(event, [*path[:-1], key], "is given twice", "keep one of the two")
        if key == "<<" and not event.style:
            _fail(event, path[:-1], "uses a YAML merge key", "write the fields out")
        path[-1] = key
        self._lines[tuple(path)] = line
        container[key] = None  # so that a second one is noticed whatever the value
        return self._next()


def _scalar(event: Any, path: list[str | int]) -> Any:
    value: str = event.value
    tag = event.tag
    if tag is not None and tag != "!":
        if tag not in _TAGS:
            _fail(event, path, "carries a YAML tag", "remove the tag; quote the value if it is text")
        if tag == "tag:yaml.org,2002:str":
            return value
    elif event.style or tag == "!":
        return value
    if value in _WORDS:
        return _WORDS[value]
    if value[0] not in _NUMERIC:
        return value
    if _INT.fullmatch(value):
        return int(value)
    if _OCTAL.fullmatch(value):
        return int(value, 8)
    if _HEX.fullmatch(value):
        return int(value, 16)
    if _FLOAT.fullmatch(value) and len(value) < 64 and not value.isdigit():
        return float(value)
    return value


def _fail(event: Any, path: list[str | int], problem: str, fix: str) -> NoReturn:
    raise YAMLFault(event.start_mark.line, tuple(path), problem, fix)


def _hint(problem: str) -> str:
    if "cannot start any token" in problem:
        return "indent with spaces, and quote text that begins with a special character"
    if "mapping values are not allowed" in problem or "did not find expected" in problem:
        return "check the indentation, and quote text that holds ': '"
    return "check the indentation and the quotes near this line"
