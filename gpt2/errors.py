"""The two ways in which a command ends badly.

Whoever finds the fault raises one of these with one line that names the thing and the mend;
`cli.py` prints that line and exits with the code. Everything else is a bug and shows a traceback.
"""


class RequestError(Exception):
    """The request was wrong (exit code 2): nothing was written."""


class WorkError(Exception):
    """The request was right, the work failed (exit code 1): disk full, damaged file, lost device."""
