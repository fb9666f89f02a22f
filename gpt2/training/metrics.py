"""Where a run's figures go: metrics.jsonl, the terminal, and a metrics service if asked."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from gpt2.config import to_dict
from gpt2.errors import RequestError
from gpt2.training.run import Run


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

    Rank 0 writes and shows, the others keep silent. A step's events stand once: `start_at` drops what an
    interrupted run wrote after its checkpoint. A full disk stops nothing: lines wait until they can be written.
    """

    def __init__(self, run: Run, quiet: bool = False) -> None:
        config = run.config
        self.path = run.path / "metrics.jsonl"
        self.steps = config.train.steps
        self.writes = run.distributed.is_main
        self.sink = open_sink(config.log.sink if self.writes else "none", run.path, to_dict(config))
        quiet = quiet or not self.writes
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
        self.waiting: list[str] = []

    def __enter__(self) -> "Metrics":
        self.progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()
        self.sink.close()

    def event(self, kind: str, step: int, **values: Any) -> None:
        """Appends {"event": kind, "step": step, "time": Unix seconds, …}; numbers go to the sink as well."""
        if not self.writes:
            return
        line = {"event": kind, "step": step, "time": round(time.time(), 3), **values}
        self.waiting.append(json.dumps(line, ensure_ascii=False) + "\n")
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                while self.waiting:
                    file.write(self.waiting[0])
                    file.flush()
                    del self.waiting[0]
        except OSError as error:
            if len(self.waiting) == 1:
                self.say(f"cannot write {self.path}: {error.strerror}; training goes on")
        numbers = {f"{kind}/{k}": v for k, v in values.items() if isinstance(v, int | float)}
        if numbers and kind in ("step", "val", "hellaswag"):
            self.sink.write(step, numbers)

    def events(self, kind: str, lines: Sequence[Mapping[str, Any]]) -> None:
        """Each as an event; one that has an `error` is told."""
        for line in lines:
            values = dict(line)
            self.event(kind, values.pop("step"), **values)
            if "error" in values:
                self.say(f"step {line['step']}  the checkpoint is not written: {values['error']}; training goes on")

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
