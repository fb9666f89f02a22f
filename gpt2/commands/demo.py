"""gpt2 demo: the whole way on the embedded corpus."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt2.commands.common import Json, Outcome, parse, say


@dataclass(frozen=True)
class Demo:
    """The whole way on the embedded corpus: prepare, train, evaluate, draw the loss, sample."""

    minutes: float = 3.0
    """Minutes of training (compile and evaluation not counted)."""
    out: Path = Path("out/demo")
    """Directory for data, run and picture; an interrupted demo goes on there."""
    json: Json = False
    """Print one JSON object as the last line."""


def main(argv: Sequence[str]) -> Outcome:
    """gpt2 demo"""
    args = parse(Demo, argv, "demo")
    from gpt2.demo import demo as run_demo
    from gpt2.training.loop import Stopped

    try:
        return Outcome(run_demo(args.out, args.minutes, say), args.json)
    except Stopped as stopped:
        print(f"gpt2: {stopped}; the same command goes on", file=sys.stderr)
        return Outcome({"stopped": stopped.signal}, args.json, 128 + stopped.signal)
