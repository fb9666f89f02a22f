"""gpt2 doctor: what this machine has and lacks."""

from collections.abc import Sequence
from dataclasses import dataclass

from gpt2.commands.common import Json, Outcome, parse


@dataclass(frozen=True)
class Doctor:
    """What this machine has for training and running a GPT-2, what is missing and how to mend it."""

    json: Json = False
    """Print one JSON object as the last line."""


def main(argv: Sequence[str]) -> Outcome:
    """gpt2 doctor"""
    args = parse(Doctor, argv, "doctor")
    from gpt2 import doctor as checks

    found = checks.diagnose()
    checks.print_report(found)
    return Outcome(checks.to_dict(found), args.json, checks.exit_code(found))
