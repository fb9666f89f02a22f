"""A run as it was logged: its events by kind, checked, with the columns that plots and verdicts are made from."""

import bisect
import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt2.config import Config, read_run_config
from gpt2.errors import RequestError

Event = dict[str, Any]
# What an event of each kind must hold besides "event" and "step". Kinds that are not named here are left alone.
NUMBERS: Mapping[str, tuple[str, ...]] = {
    "start": (),
    "step": ("loss", "lr", "grad_norm", "tokens_per_second", "mfu", "train_seconds"),
    "val": ("loss", "bits_per_byte", "train_seconds"),
    "hellaswag": ("acc", "acc_norm"),
    "sample": (),
    "skip": (),
    "checkpoint": (),
    "done": (),
}
TEXTS: Mapping[str, tuple[str, ...]] = {"sample": ("prompt", "text")}
LARGEST_STEP = 2**53  # beyond it a JSON reader may round


@dataclass(frozen=True)
class RunCurves:
    """One run: its config and its events, sorted by step, each step once."""

    path: Path
    name: str
    """What the report calls it."""
    config: Config
    source: str
    """Where its text came from, as its data says; the data's path where that is gone."""
    events: Mapping[str, Sequence[Event]]
    """Kind -> events."""
    damaged: tuple[int, ...] = ()
    """Lines of metrics.jsonl that are no events, counted from 1."""
    torn: bool = False
    """Whether the last line breaks off, as it does where a run was killed or is still writing."""
    _times: tuple[list[int], list[float]] = field(default=([], []), repr=False)

    def of(self, kind: str) -> Sequence[Event]:
        """The events of a kind, by step."""
        return self.events.get(kind, ())

    def column(self, kind: str, name: str) -> list[float]:
        """One figure of each event of a kind."""
        return [float(event[name]) for event in self.of(kind)]

    def steps(self, kind: str) -> list[int]:
        """The step of each event of a kind."""
        return [event["step"] for event in self.of(kind)]

    @property
    def last_step(self) -> int:
        """The last step that left a line."""
        return max(step for kind in ("step", "val", "skip") for step in self.steps(kind))

    @property
    def finished(self) -> bool:
        """Whether the run has reached its end."""
        return bool(self.of("done"))

    def seconds_at(self, step: int) -> float:
        """Seconds of training after that many steps, between logged ones by proportion."""
        steps, seconds = self._times
        right = bisect.bisect_left(steps, step)
        if right == len(steps):
            return seconds[-1]
        if steps[right] == step:
            return seconds[right]
        step0, seconds0 = (steps[right - 1], seconds[right - 1]) if right else (0, 0.0)
        return seconds0 + (seconds[right] - seconds0) * (step - step0) / (steps[right] - step0)


def read_run(path: Path) -> RunCurves:
    """A run's config and events. Damaged lines are left out and counted.

    Raises RequestError where it is no run, or none with metrics.
    """
    config = read_run_config(path)
    file = path / "metrics.jsonl"
    try:
        lines = file.read_bytes().split(b"\n")
    except FileNotFoundError as error:
        raise RequestError(f"{path} has no metrics.jsonl yet: go on with it by gpt2 train --resume {path}") from error
    except OSError as error:
        raise RequestError(f"cannot read {file}: {error.strerror}") from error
    torn = bool(lines[-1].strip())  # each event ends in a line feed
    events: dict[str, dict[int, Event]] = {}
    damaged = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        event = _event(line)
        if event is not None:
            events.setdefault(event["event"], {})[event["step"]] = event
        elif number < len(lines):
            damaged.append(number)
    if "step" not in events:
        found = f"{len(damaged)} damaged lines and no" if damaged else "no"
        raise RequestError(f"{file} holds {found} training step: go on with the run by gpt2 train --resume {path}")
    by_kind = {kind: [by_step[step] for step in sorted(by_step)] for kind, by_step in events.items()}
    timed = {e["step"]: e["train_seconds"] for kind in ("step", "val") for e in by_kind.get(kind, ())}
    timed = {step: seconds for step, seconds in sorted(timed.items()) if step > 0 and math.isfinite(seconds)}
    times = (list(timed), list(itertools.accumulate(timed.values(), max))) if timed else ([1], [0.0])
    return RunCurves(
        path,
        path.resolve().name,
        config,
        _source(config),
        by_kind,
        tuple(damaged),
        torn and _event(lines[-1]) is None,
        times,
    )


def read_runs(paths: Sequence[Path]) -> list[RunCurves]:
    """Several runs under names that tell them apart. Raises RequestError where one is given twice."""
    resolved = [path.resolve() for path in paths]
    for i, path in enumerate(resolved):
        if path in resolved[:i]:
            raise RequestError(f"{paths[i]} is named twice: name each run once")
    runs = [read_run(path) for path in paths]
    depth = 1  # as many parts of the path as it takes
    while len({path.parts[-depth:] for path in resolved}) < len(runs):
        depth += 1
    names = ["/".join(path.parts[-depth:]) for path in resolved]
    return [dataclasses.replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def smooth(values: Sequence[float], part: float = 0.02) -> list[float]:
    """The mean over the neighbours: `part` of the curve on each side, fewer at its ends, at least five if it has fifty.

    Values that are not finite count as absent; where all neighbours are, so is the mean (NaN).
    """
    n = len(values)
    width = max(round(part * n), min(5, n // 10), 1)
    finite = [v if math.isfinite(v) else 0.0 for v in values]
    total = list(itertools.accumulate(finite, initial=0.0))
    count = list(itertools.accumulate((math.isfinite(v) for v in values), initial=0))
    result = []
    for i in range(n):
        reach = min(i, width)
        low, high = i - reach, min(n, i + reach + 1)
        seen = count[high] - count[low]
        result.append((total[high] - total[low]) / seen if seen else math.nan)
    return result


def thin(run: RunCurves, most: int = 2_000) -> list[int]:
    """Indices of at most about `most` step events to draw: of each stretch those that show its extremes."""
    events = run.of("step")
    if len(events) <= most:
        return list(range(len(events)))
    kept = {0, len(events) - 1}
    stretch = math.ceil(3 * len(events) / most)
    for start in range(0, len(events), stretch):
        indices = [i for i in range(start, min(start + stretch, len(events))) if math.isfinite(events[i]["loss"])]
        if indices:
            kept |= {min(indices, key=lambda i: events[i]["loss"]), max(indices, key=lambda i: events[i]["loss"])}
            kept.add(max(indices, key=lambda i: events[i]["grad_norm"]))
    return sorted(kept)


def _event(line: bytes) -> Event | None:
    """The event that a line holds; None where it holds none."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        return None
    step, kind = event.get("step"), event["event"]
    if type(step) is not int or not 0 <= step <= LARGEST_STEP:
        return None
    if not all(_is_number(event.get(name)) for name in NUMBERS.get(kind, ())):
        return None
    if not all(isinstance(event.get(name), str) for name in TEXTS.get(kind, ())):
        return None
    return event


def _is_number(value: object) -> bool:
    """Whether it is a number that a float can hold. NaN and the infinities are: a run may have met them."""
    return type(value) is float or (type(value) is int and abs(value) <= LARGEST_STEP)


def _source(config: Config) -> str:
    try:
        described = json.loads((Path(config.train.data) / "dataset.json").read_bytes())
        return str(described["source"])
    except (OSError, ValueError, KeyError, TypeError):
        return config.train.data
