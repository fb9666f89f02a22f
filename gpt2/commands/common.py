"""What the commands share: reading the options, what a command gives back, printing."""

import contextlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import tyro

from gpt2.cli import DONE
from gpt2.errors import RequestError

Json = Annotated[bool, tyro.conf.FlagCreatePairsOff]
Args = TypeVar("Args")


@dataclass(frozen=True)
class Outcome:
    """What a command gives back to the command line."""

    result: dict[str, Any]
    as_json: bool = False
    code: int = DONE


def parse(kind: type[Args], argv: Sequence[str], verb: str, default: Args | None = None) -> Args:
    """The verb's options. Raises RequestError with one line where they are wrong; `--help` prints and exits."""
    said = io.StringIO()
    given = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=list(argv), prog=f"gpt2 {verb}", **given)  # type: ignore[no-any-return, call-overload]
    except SystemExit as stopped:
        if not stopped.code:
            raise
        raise RequestError(_one_line(said.getvalue(), verb)) from stopped


def _one_line(box: str, verb: str) -> str:
    """The parser's framed, many-line complaint as one line."""
    lines = [re.sub(r"[╭╮╰╯│─]+|-{5,}", " ", line).strip() for line in box.splitlines()]
    text = " ".join(line for line in lines if line)
    text = re.sub(r"^(Unrecognized options|Value error|Parsing error|Required options)\s+(?=\S)", "", text)
    text = text.split("For full helptext")[0].split("Argument helptext")[0].strip()
    return f"{' '.join(text.split())} (see gpt2 {verb} --help)"


def say(text: str) -> None:
    """A line for the user, at once."""
    print(text, flush=True)


def figure(value: float | None) -> str:
    """Four decimals, or the word none."""
    return "none" if value is None else f"{value:.4f}"
