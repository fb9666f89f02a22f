"""What the commands share: reading the options, what a command gives back, printing."""

import contextlib
import io
import re
import time
from collections.abc import Callable, Iterator, Sequence
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


@contextlib.contextmanager
def working(name: str) -> Iterator[Callable[[int, int], None]]:
    """A function that shows (done, in all): a bar on a terminal, else a line every ten seconds, with the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    started = said = time.monotonic()
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=20), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=None)

        def show(done: int, total: int) -> None:
            nonlocal said
            now = time.monotonic()
            bar.update(task, description=f"{name}: {done / max(total, 1):.0%}", total=total, completed=done)
            if not console.is_terminal and now - said >= 10 and done:
                said = now
                left = (now - started) / done * (total - done)
                console.print(f"{name}: {done / total:.0%}, {left:,.0f} s left", markup=False, soft_wrap=True)

        yield show


def say(text: str) -> None:
    """A line for the user, at once."""
    print(text, flush=True)


def figure(value: float | None) -> str:
    """Four decimals, or the word none."""
    return "none" if value is None else f"{value:.4f}"
