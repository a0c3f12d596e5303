"""What ends an `arks` command with a reason.

ArksError            anything the user is told in one line, exit code 1
├── UsageError       the command line asks for something impossible, exit code 2
├── PartFailed       a supervised process cannot start or keeps dying
└── EngineUnreadable a given engine does not answer as an OpenAI-compatible server
"""


class ArksError(Exception):
    """`str(error)` is the line: what is wrong and what to do about it. Never a secret."""

    exit_code = 1


class UsageError(ArksError):
    exit_code = 2


class PartFailed(ArksError):  # noqa: N818 - what happened, in the words of the message
    pass


class EngineUnreadable(ArksError):  # noqa: N818 - likewise
    pass
