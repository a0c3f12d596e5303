"""What can be wrong with a policy, said so that its author can mend it: file, line, field, problem, fix.

PolicyErrors                 everything that is wrong with one state of the folder
└── .errors: PolicyError     one fault at one place

No text here ever holds a value from the files: it could be a token.
"""

from dataclasses import dataclass
from typing import Final

_SHOWN: Final = 50
"""a text of more faults than this helps nobody; `errors` has them all"""


@dataclass(frozen=True, slots=True, order=True)
class PolicyError:
    """One fault. `line` counts from 1; 0 where the file as a whole is meant."""

    file: str
    line: int
    path: str
    """the field, such as spec.qos[0].rateLimits[1].value; empty where the YAML itself is broken"""
    problem: str
    fix: str = ""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        field = f" {self.path}:" if self.path else ""
        fix = f" ({self.fix})" if self.fix else ""
        return f"{place}:{field} {self.problem}{fix}"


@dataclass(frozen=True, slots=True, order=True)
class Note:
    """Something that takes effect otherwise than its author may think."""

    file: str
    line: int
    path: str
    text: str

    def __str__(self) -> str:
        field = f" {self.path}:" if self.path else ""
        return f"{self.file}:{self.line}:{field} {self.text}"


class PolicyErrors(Exception):  # noqa: N818 - the plural is the point: all of them, not the first
    """The policy cannot be taken as it stands."""

    def __init__(self, errors: tuple[PolicyError, ...]) -> None:
        assert errors
        super().__init__(errors)
        self.errors = errors

    def __str__(self) -> str:
        shown = [str(error) for error in self.errors[:_SHOWN]]
        if len(self.errors) > _SHOWN:
            shown.append(f"and {len(self.errors) - _SHOWN} more")
        return "\n".join(shown)
