"""The two ways in which a command ends badly.

Whoever finds the fault raises one of these with one line that names the thing and the mend;
`cli.py` prints that line and exits with the code. Everything else is a bug and shows a traceback.
"""


class _OneLine(Exception):
    """White space of the message is folded: it may quote what a user or a file said."""

    told = False
    """Whether another process of the group prints it."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class RequestError(_OneLine):
    """The request was wrong (exit code 2): nothing was written."""


class WorkError(_OneLine):
    """The request was right, the work failed (exit code 1): disk full, damaged file, lost device."""
