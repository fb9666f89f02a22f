"""Saving in the background: what is written, what a failure does, and that training does not wait for the disk."""

import shutil
import threading
from pathlib import Path

import pytest
import torch

from gpt2 import files
from gpt2.checkpoint.directory import (
    TrainingState,
    list_checkpoints,
    read_checkpoint,
    step_of,
    verify_checkpoint,
)
from gpt2.config import Config, from_dict
from gpt2.errors import WorkError
from gpt2.model import GPT
from gpt2.training import saver as saver_module
from gpt2.training.loop import train
from gpt2.training.metrics import read_metrics
from gpt2.training.run import Run, start_run
from gpt2.training.saver import WEIGHTS, Saver


@pytest.fixture
def run(tiny: Config, tmp_path: Path) -> Run:
    return start_run(tiny, tmp_path / "run")


def weights_of(model: GPT) -> list[tuple[str, torch.Tensor]]:
    return [(WEIGHTS + name, parameter) for name, parameter in model.named_parameters()]


def test_what_changes_after_the_call_is_not_in_the_file(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training thread goes on while the file is being written."""
    model = GPT(run.config.model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    go_on = threading.Event()
    real = saver_module.write_checkpoint

    def slow(*arguments: object) -> Path:
        assert go_on.wait(30)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(saver_module, "write_checkpoint", slow)
    with Saver(run) as saver:
        saver.allocate(weights_of(model))
        saver.save(TrainingState(step=3), weights_of(model))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        assert saver.finished() == []
        go_on.set()
        assert [event["step"] for event in saver.finish()] == [3]
        assert saver.finished() == []
    weights, _, state = read_checkpoint(list_checkpoints(run.path)[0], run.config.model)
    assert state.step == 3
    for name, tensor in before.items():
        assert torch.equal(weights[name], tensor), name


def full_disk(path: Path) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_is_told_and_training_goes_on(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = from_dict({"checkpoint": {"every": 5}}, tiny)
    run = start_run(config, tmp_path / "run")
    real, calls = saver_module.write_checkpoint, []

    def sometimes(*arguments: object) -> Path:
        calls.append(1)
        if len(calls) == 2:
            with monkeypatch.context() as patch:
                patch.setattr(files, "flush_to_disk", full_disk)
                return real(*arguments)  # type: ignore[arg-type]
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(saver_module, "write_checkpoint", sometimes)
    assert train(run, quiet=True)["steps"] == 20
    told = {e["step"]: e.get("error") for e in read_metrics(run.path) if e["event"] == "checkpoint"}
    assert told.keys() == {5, 10, 15, 20}
    assert "No space left on device" in told[10]
    assert [told[5], told[15], told[20]] == [None] * 3
    for path in list_checkpoints(run.path):
        verify_checkpoint(path)


def test_a_checkpoint_that_must_succeed_stops_the_run(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = from_dict({"checkpoint": {"every": 5, "must_succeed": True}}, tiny)
    run = start_run(config, tmp_path / "run")
    monkeypatch.setattr(files, "flush_to_disk", full_disk)
    with pytest.raises(WorkError, match="No space left on device"):
        train(run, quiet=True)


def test_the_last_checkpoint_must_always_succeed(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start_run(from_dict({"checkpoint": {"every": 0}}, tiny), tmp_path / "run")
    monkeypatch.setattr(files, "flush_to_disk", full_disk)
    with pytest.raises(WorkError, match="No space left on device"):
        train(run, quiet=True)


def test_a_run_whose_directory_is_gone_says_so(tiny: Config, tmp_path: Path) -> None:
    run = start_run(tiny, tmp_path / "run")
    shutil.rmtree(run.path)
    model = GPT(run.config.model)
    with Saver(run) as saver:
        saver.save(TrainingState(step=3), weights_of(model))
        with pytest.raises(WorkError, match="is gone"):
            saver.finish()


def test_checkpoints_by_time(tiny: Config, tmp_path: Path) -> None:
    config = from_dict({"checkpoint": {"every": 0, "minutes": 1e-9, "keep_last": 50}, "train": {"steps": 6}}, tiny)
    run = start_run(config, tmp_path / "run")
    train(run, quiet=True)
    assert [step_of(path) for path in list_checkpoints(run.path)] == [1, 2, 3, 4, 5, 6]
    stops = [e for e in read_metrics(run.path) if e["event"] == "save"]
    assert [e["step"] for e in stops] == [1, 2, 3, 4, 5, 6]
    assert all(e["stopped_seconds"] >= 0 for e in stops)
