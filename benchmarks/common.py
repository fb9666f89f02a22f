"""What every benchmark shares: the machine's facts, runs taken in turn, results as JSON."""

import datetime
import json
import os
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt2.bench.machine import machine

RESULTS = Path(os.environ.get("OUT") or Path(__file__).parent / "results")


def commit() -> str:
    """The commit that was measured; `+` behind it where the tree had changes besides results."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    changed = [line for line in git("status", "--porcelain").splitlines() if "benchmarks/results/" not in line]
    return (git("rev-parse", "HEAD") or "unknown") + ("+" if changed else "")


def write(bench: str, config: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> Path:
    """Writes {bench, date, commit, machine, config, results} to results/BENCH.json; gives its path."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{bench}.json"
    report = {
        "bench": bench,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "config": dict(config),
        "results": [dict(result) for result in results],
    }
    path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def in_turn(rounds: int, *measures: Callable[[], float]) -> list[list[float]]:
    """Each measure `rounds` times in turn A B A B …, so that a drift of the machine falls on all alike."""
    figures: list[list[float]] = [[] for _ in measures]
    for _ in range(rounds):
        for measure, values in zip(measures, figures, strict=True):
            values.append(measure())
    return figures


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, extremes and number."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": len(values)}
