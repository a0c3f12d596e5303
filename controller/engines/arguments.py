"""Command lines as lists: the user's options, ours, and whose wins.

Arks joined ``runtimeCommonArgs`` with spaces into a ``bash -c`` string, so one entry may hold several
arguments (``--max-model-len 32768``) or carry shell quotes around a JSON value. :func:`split_entries` reads
such entries as bash did, but never gives them to a shell; an entry that is one argument stays one argument,
JSON included. :func:`merge` then drops each of our options that the user gives under any of its names.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence

Option = tuple[str, ...]
"""One option with its values, e.g. ``("--port", "8080")`` or ``("--headless",)``."""

_FLAG = re.compile(r"^(--[A-Za-z]|-[A-Za-z])")
_INNER_FLAG = re.compile(r"\s--[A-Za-z]")
_SHELL_NAME = re.compile(r"\$(?:\{([A-Za-z_][A-Za-z0-9_]*)\}|([A-Za-z_][A-Za-z0-9_]*))")


def is_flag(token: str) -> bool:
    return _FLAG.match(token) is not None


def split_entries(entries: Iterable[str], names: frozenset[str] = frozenset()) -> tuple[str, ...]:
    """Single arguments from the user's entries; ``$NAME`` and ``${NAME}`` become Kubernetes' ``$(NAME)``
    for the environment variables in ``names`` (bash expanded them for Arks' users).
    """
    tokens: list[str] = []
    for entry in entries:
        tokens.extend(_split(entry.strip()))
    return tuple(_expand(token, names) for token in tokens)


def _split(entry: str) -> list[str]:
    if not entry:
        return []
    if not is_flag(entry):
        if entry[0] in "{[":
            return [entry]
        # Bash would have split this; only do so where the second half is plainly another option.
        return _words(entry) if _INNER_FLAG.search(entry) or _quoted(entry) else [entry]
    head, space, rest = entry.partition(" ")
    flag, equals, value = entry.partition("=")
    if equals and (not space or len(flag) < len(head)):
        if value[:1] in ("{", "["):
            return [entry]
        if _quoted(value):
            return [f"{flag}={_words(value)[0]}"]
    if space and rest.lstrip()[:1] in ("{", "["):
        return [head, rest.strip()]
    return _words(entry)


def _quoted(text: str) -> bool:
    return len(text) >= 2 and text[0] in "'\"" and text[-1] == text[0] and text[0] not in text[1:-1]


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:  # an unmatched quote: bash would have failed, one plain argument at least says so
        return [text]


def _expand(token: str, names: frozenset[str]) -> str:
    if "$" not in token or not names:
        return token

    def swap(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        return f"$({name})" if name in names else found[0]

    return _SHELL_NAME.sub(swap, token)


def option_name(token: str, aliases: Mapping[str, str]) -> str:
    """The canonical name of an option: no dashes, no value, ``_`` as ``-``, aliases and ``--no-`` resolved."""
    bare = token.split("=", 1)[0].split(".", 1)[0].lstrip("-").replace("_", "-")
    bare = bare.removeprefix("no-")
    return aliases.get(bare, bare)


def user_options(tokens: Sequence[str], aliases: Mapping[str, str]) -> frozenset[str]:
    return frozenset(option_name(token, aliases) for token in tokens if is_flag(token))


def merge(ours: Iterable[Option], user: Sequence[str], aliases: Mapping[str, str]) -> tuple[str, ...]:
    """Our options that the user did not give, in our order, then the user's arguments as they are."""
    given = user_options(user, aliases)
    kept = [part for option in ours if option_name(option[0], aliases) not in given for part in option]
    return (*kept, *user)


def option_value(tokens: Sequence[str], name: str, aliases: Mapping[str, str]) -> str | None:
    """The last value given for an option (the last one wins in argparse), None when absent."""
    found: str | None = None
    for position, token in enumerate(tokens):
        if not is_flag(token) or option_name(token, aliases) != name:
            continue
        flag, equals, value = token.partition("=")
        if equals:
            found = value
        elif position + 1 < len(tokens) and not is_flag(tokens[position + 1]):
            found = tokens[position + 1]
        else:
            found = "" if not flag.startswith("--no-") else None
    return found


def without_option(tokens: Sequence[str], name: str, aliases: Mapping[str, str]) -> tuple[str, ...]:
    """The arguments less one single-valued option and its value."""
    kept: list[str] = []
    skip = False
    for position, token in enumerate(tokens):
        if skip:
            skip = False
            continue
        if is_flag(token) and option_name(token, aliases) == name:
            skip = "=" not in token and position + 1 < len(tokens) and not is_flag(tokens[position + 1])
            continue
        kept.append(token)
    return tuple(kept)


def positive_int(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() and int(text) > 0 else None
