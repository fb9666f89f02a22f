"""The processes that train: what they answer, how they fail, how they take turns."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gpt2.bench import worker as worker_module
from gpt2.bench.ladder import Options, base_config
from gpt2.bench.worker import Worker, start_all, take_turns
from gpt2.config import Config
from gpt2.errors import WorkError
from gpt2.training.loop import train
from gpt2.training.metrics import read_metrics
from gpt2.training.run import start_run


@pytest.fixture
def config(data: Path) -> Config:
    return base_config(Options("tiny", batch=2), data, torch.device("cpu"))


class Pretended(Worker):
    """A worker without a process, whose steps take what the test says."""

    def start(self) -> None:
        self._process = object()  # type: ignore[assignment]
        self.facts = {"build_seconds": 0.0, "first_pass_seconds": 0.0, "threads": 1}
        log.append(f"start {self.name}")

    def train(self, steps: int, timed: bool = True, release: bool = False) -> float:
        log.append(f"{self.name} {steps}")
        if self.name == "broken" and timed:
            self._process = None
            raise WorkError("broken: out of memory")
        self.peak_bytes, self.first_step = 100, 1.0
        self.losses += [1.0] * steps
        if timed:
            self.turns.append(1.0)
        return 1.0

    def stop(self) -> None:
        self._process = None


log: list[str] = []


def pretended(config: Config, *names: str) -> list[Worker]:
    log.clear()
    return [Pretended(name, config, Path()) for name in names]


def test_turns_are_taken_in_order(config: Config) -> None:
    workers = pretended(config, "a", "b")
    assert start_all(workers, 0, lambda _: None)
    assert take_turns(workers, True, 2, 0, float("inf"), lambda _: None) == (2, 2)
    assert log == ["start a", "a 1", "start b", "b 1", "a 2", "b 2", "a 2", "b 2"]


def test_rounds_go_on_until_the_losses_are_there(config: Config) -> None:
    workers = pretended(config, "a", "b")
    start_all(workers, 0, lambda _: None)
    steps, rounds = take_turns(workers, True, 1, 10, float("inf"), lambda _: None)
    assert 1 + steps * rounds >= 10


def test_the_budget_ends_the_rounds(config: Config) -> None:
    workers = pretended(config, "a")
    start_all(workers, 0, lambda _: None)
    assert take_turns(workers, True, 50, 0, 0.0, lambda _: None)[1] == 1


def test_one_that_fails_leaves_the_others_running(config: Config) -> None:
    workers = pretended(config, "a", "broken")
    start_all(workers, 0, lambda _: None)
    take_turns(workers, True, 2, 0, float("inf"), lambda _: None)
    assert workers[1].failure == "broken: out of memory"
    assert len(workers[0].turns) == 2
    with pytest.raises(WorkError, match="nothing could be measured"):
        take_turns(workers[1:], True, 1, 0, float("inf"), lambda _: None)


def test_what_does_not_fit_together_is_built_for_each_turn(config: Config) -> None:
    workers = pretended(config, "a", "b", "c")
    assert not start_all(workers, 250, lambda _: None)
    assert not any(worker.running for worker in workers)
    log.clear()
    take_turns(workers[:2], False, 1, 0, float("inf"), lambda _: None)
    assert log == ["start a", "a 1", "a 2", "start b", "b 1", "b 2"]


def test_a_worker_trains_as_gpt2_train_does_and_tells_that_it_was_killed(
    config: Config, data: Path, tmp_path: Path
) -> None:
    """The losses of a measured program are those of a run: same batches, weights, schedule, update."""
    worker = Worker("build-gpt2", config, data)
    try:
        worker.start()
        worker.train(2)
        worker.train(2)
        assert worker._process is not None
        os.kill(worker._process.pid, signal.SIGKILL)
        with pytest.raises(WorkError, match="out of memory: killed by the system"):
            worker.train(1)
        assert not worker.running
    finally:
        worker.stop()
    run = start_run(replace(config, train=replace(config.train, steps=4)), tmp_path / "run")
    train(run, quiet=True)
    losses = [event["loss"] for event in read_metrics(run.path) if event["event"] == "step"]
    assert worker.losses == pytest.approx(losses, abs=1e-6)
    assert len(worker.turns) == 2
    assert worker.facts["setting"]["precision"] == "fp32"


def test_out_of_memory_is_named() -> None:
    assert "a smaller --batch" in worker_module._reason(torch.OutOfMemoryError("CUDA out of memory. Tried …"))
    assert worker_module._reason(ValueError("first\nsecond")) == "ValueError: first"
