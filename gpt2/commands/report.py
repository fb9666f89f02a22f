"""gpt2 report: runs as one HTML page."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from gpt2.commands.common import Json, Outcome, parse, say
from gpt2.errors import RequestError


@dataclass(frozen=True)
class Report:
    """One HTML page of a run or of several laid over each other: curves, scores, samples, config, and a verdict."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories."""
    out: Path
    """HTML file to write; one that is there is replaced."""
    json: Json = False
    """Print one JSON object as the last line."""


def main(argv: Sequence[str]) -> Outcome:
    """gpt2 report"""
    args = parse(Report, argv, "report")
    if not args.runs:
        raise RequestError("no run is named: gpt2 report RUN… --out FILE.html")
    from gpt2.report.page import write_report

    results = write_report(args.runs, args.out)
    for result in results:
        say(f"{result['run']}: {result['headline']}")
    say(f"the page: {args.out}")
    return Outcome({"out": str(args.out), "runs": results}, args.json)
