"""The inventory of Arks' defects, and that each has at least one test named after it, somewhere in the suite."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
DEFECTS = {
    1: "any caller could end the plugin with a request that has no body",
    2: "requests without a body passed without a valid token",
    3: "answers were cut after 15 s",
    4: "prompts over 32 KiB were refused",
    5: "an event split over two pieces ended its stream",
    6: "lost counters turned quotas off",
    7: "an unknown token was a 500 that echoed it",
    8: "two replicas and more were never routed",
    9: "workers of a group got requests",
    10: "the default match was unusable",
    11: "a failure was for ever",
    12: "a pipeline was not followed by its endpoint",
    13: "running did not mean serving",
    14: "parallel requests overshot limits, broken-off ones were free, failed ones were not",
    15: "metrics counted pieces, missed streams and refusals",
    16: "streams and broken-off answers left memory behind",
    17: "errors came after the headers had gone",
    18: "an engine's error lost its body, a success that is not 200 was an error",
    19: "settings of Redis Sentinel did nothing",
    20: "a claim without a name broke pods, a model without storage the operator",
    21: "the router's port was 8080 whatever was said",
    22: "routes without an owner, foreign ones taken over, Services not restored",
    23: "the router's permissions leaked, its selector overlapped",
    24: "a 429 named a time that was not the window's end",
    25: "arguments went through a shell",
    26: "two tokens with one secret: an arbitrary one won",
    27: "one of everything, without volume, password or probes, with far too many rights",
    28: "lifecycle and much of an instance's spec were ignored",
    29: "answers' headers of several values were set one by one",
    30: "an empty list of matches caught everything",
    31: "a changed model was mounted before it was there",
}


def named() -> Iterator[tuple[int, str]]:
    """(defect, test) of every test in the suite whose name says so."""
    for file in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(file.read_text(), file.name)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                match = re.match(r"test_defect_(\d\d)_", node.name)
                if match:
                    assert any(
                        isinstance(each, ast.Assert | ast.With | ast.AsyncFor | ast.Await) for each in ast.walk(node)
                    )
                    yield int(match[1]), f"{file.relative_to(TESTS)}::{node.name}"


TESTS_OF: dict[int, list[str]] = defaultdict(list)
for defect, test in named():
    TESTS_OF[defect].append(test)


@pytest.mark.parametrize("number", DEFECTS)
def test_the_defect_has_a_test_that_bears_its_number(number):
    assert TESTS_OF[number], DEFECTS[number]


def test_no_test_bears_the_number_of_a_defect_that_is_none():
    assert TESTS_OF.keys() <= DEFECTS.keys()
    assert list(DEFECTS) == list(range(1, 32))
