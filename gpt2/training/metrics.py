"""Where a run's figures go: metrics.jsonl, the terminal, and a metrics service if asked."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from gpt2.errors import RequestError


class Sink(Protocol):
    """A metrics service."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Figures of one step by name."""

    def close(self) -> None:
        """Sends what is left."""


class _NoSink:
    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, run: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run / "tensorboard"))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _RunService:
    """Weights & Biases, and trackio, which has its interface."""

    def __init__(self, module: Any, run: Path, config: Mapping[str, Any]) -> None:
        self.module = module
        module.init(project="build-gpt2", name=run.name, config=dict(config))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.module.log(dict(values), step=step)

    def close(self) -> None:
        self.module.finish()


def open_sink(name: str, run: Path, config: Mapping[str, Any]) -> Sink:
    """The sink of that name ("none" for none). Raises RequestError where its package is missing."""
    try:
        match name:
            case "tensorboard":
                return _TensorBoard(run)
            case "wandb":
                import wandb

                return _RunService(wandb, run, config)
            case "trackio":
                import trackio

                return _RunService(trackio, run, config)
    except ImportError as error:
        raise RequestError(f"log.sink = {name!r} needs a package: pip install 'build-gpt2[logging]'") from error
    return _NoSink()


class Metrics:
    """Writes a run's events, one JSON object a line, and shows them. Use as a context manager.

    A step's events stand once: `start_at` drops what an interrupted run wrote after its checkpoint.
    """

    def __init__(self, run: Path, sink: Sink, steps: int, minutes: float, quiet: bool = False) -> None:
        self.path = run / "metrics.jsonl"
        self.sink = sink
        self.steps, self.minutes = steps, minutes
        self.console = Console(file=sys.stderr, quiet=quiet, highlight=False)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
        )
        self.task = self.progress.add_task("training", total=1.0)

    def __enter__(self) -> "Metrics":
        self.file = open(self.path, "a", encoding="utf-8")
        self.progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()
        self.file.close()
        self.sink.close()

    def event(self, kind: str, step: int, **values: Any) -> None:
        """Appends {"event": kind, "step": step, "time": Unix seconds, …}; numbers go to the sink as well."""
        line = {"event": kind, "step": step, "time": round(time.time(), 3), **values}
        self.file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.file.flush()
        numbers = {f"{kind}/{k}": v for k, v in values.items() if isinstance(v, int | float)}
        if numbers and kind in ("step", "val", "hellaswag"):
            self.sink.write(step, numbers)

    def step(self, step: int, done: float, values: Mapping[str, float]) -> None:
        """A training step's figures; `done` is the part of the run that is behind, in [0, 1]."""
        self.event("step", step, **values)
        text = (
            f"step {step}{f'/{self.steps}' if self.steps else ''}  loss {values['loss']:.4f}  lr {values['lr']:.2e}  "
            f"norm {values['grad_norm']:.2f}  {values['tokens_per_second']:,.0f} tok/s  MFU {values['mfu']:.1%}"
        )
        self.progress.update(self.task, completed=done, description=text)
        if not self.console.is_terminal:
            left = values["train_seconds"] / done * (1 - done) if done else 0.0
            self.console.print(f"{text}  {left:,.0f} s left", soft_wrap=True)

    def say(self, text: str) -> None:
        """A line for the user, above the progress bar."""
        self.console.print(text, markup=False, soft_wrap=True)


def start_at(run: Path, step: int) -> None:
    """Drops from metrics.jsonl the events after `step`, and a last line that a kill left torn."""
    path = run / "metrics.jsonl"
    kept = [line for line in read_metrics(run) if line["step"] <= step]
    temporary = path.with_name(".tmp-metrics.jsonl")
    temporary.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept), encoding="utf-8")
    temporary.replace(path)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The events of a run in order; a torn last line is left out."""
    path = run / "metrics.jsonl"
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and isinstance(event.get("step"), int):
            events.append(event)
    return events
