"""Why a state directory cannot be used. Raised at start only; what fails later is `Journal.status`.

JournalError
├── StateInUse      another process holds the directory
├── StateUnreadable damaged, not a database, no permission, no space
└── StateTooNew     written by a later version of this program
"""


class JournalError(Exception):
    """Names the file and the reason; never any content."""


class StateInUse(JournalError):  # noqa: N818 - a state of the directory
    pass


class StateUnreadable(JournalError):  # noqa: N818 - a state of the file
    pass


class StateTooNew(JournalError):  # noqa: N818 - a state of the file
    pass
