"""Bad weather: a step that is not finite or a spike makes no update, and after too many the run goes the chosen way."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2.checkpoint.directory import TrainingState, list_checkpoints, read_checkpoint
from gpt2.config import Config, GuardConfig, from_dict
from gpt2.data.loader import BatchLoader
from gpt2.data.shards import Dataset
from gpt2.errors import WorkError
from gpt2.training import loop
from gpt2.training.guard import after_bad_step, after_good_step, after_rollback, bad_step
from gpt2.training.loop import train
from gpt2.training.metrics import read_metrics
from gpt2.training.run import read_run_config, resume_run, start_run


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_metrics(run) if event["event"] == kind]


def inject(monkeypatch: pytest.MonkeyPatch, factors: dict[int, float]) -> list[int]:
    """Multiplies loss and gradients of the steps named; gives the list of steps that were computed."""
    real, computed = loop.accumulate_gradients, []
    step = 0

    def seed(seed: int, at: int, rank: int) -> None:
        nonlocal step
        step = at

    def bad(network: Any, *rest: Any) -> torch.Tensor | None:
        loss = real(network, *rest)
        computed.append(step)
        factor = factors.get(step, 1.0)
        for parameter in network.module.parameters():
            parameter.grad *= factor
        return None if loss is None else loss * factor

    monkeypatch.setattr(loop, "seed_dropout", seed)
    monkeypatch.setattr(loop, "accumulate_gradients", bad)
    return computed


def guarded(config: Config, **guard: object) -> Config:
    return from_dict({"guard": guard, "checkpoint": {"every": 5, "keep_last": 5}, "eval": {"every": 0}}, config)


def test_a_nan_makes_no_update_and_leaves_an_event(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = guarded(tiny)
    inject(monkeypatch, {7: float("nan"), 12: float("inf")})
    run = start_run(config, tmp_path / "run")
    result = train(run, quiet=True)
    assert result["steps"] == 20
    skips = events(run.path, "skip")
    assert [e["step"] for e in skips] == [8, 13]
    assert "nan" in skips[0]["reason"]
    loader = BatchLoader(Dataset.open(Path(config.train.data)).split("train"), 32, 8, config.train.seed)
    assert skips[0]["windows"] == loader.window_ids(7).tolist()
    weights, _, state = read_checkpoint(list_checkpoints(run.path)[-1], run.config.model)
    assert state.skipped_steps == (7, 12)
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert [e["step"] for e in events(run.path, "step")] == [s for s in range(1, 21) if s not in (8, 13)]


def test_a_spike_is_told_by_its_zscore(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, {15: 100.0})
    run = start_run(guarded(tiny, spike_zscore=6.0, window=10), tmp_path / "run")
    train(run, quiet=True)
    assert [e["step"] for e in events(run.path, "skip")] == [16]
    assert "standard deviations above" in events(run.path, "skip")[0]["reason"]
    inject(monkeypatch, {15: 100.0})
    blind = start_run(guarded(tiny), tmp_path / "blind")
    train(blind, quiet=True)
    assert events(blind.path, "skip") == []


def test_too_many_in_a_row_stop_the_run(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, {s: float("nan") for s in range(8, 20)})
    run = start_run(guarded(tiny, skips=2), tmp_path / "run")
    with pytest.raises(WorkError, match="the loss is nan at step 11, after 2 skipped steps in a row"):
        train(run, quiet=True)
    assert [e["step"] for e in events(run.path, "skip")] == [9, 10, 11]


def test_rollback_takes_the_checkpoints_weights_and_passes_over_the_steps_since(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = inject(monkeypatch, {s: float("nan") for s in range(7, 10)})
    run = start_run(guarded(tiny, skips=2, then="rollback"), tmp_path / "run")
    assert train(run, quiet=True)["steps"] == 20
    assert computed == list(range(20))  # no step is computed twice
    assert [(e["step"], e["checkpoint"]) for e in events(run.path, "rollback")] == [(10, 5)]
    _, _, state = read_checkpoint(list_checkpoints(run.path)[-1], run.config.model)
    assert state.skipped_steps == (5, 6, 7, 8, 9)
    assert state.rolled_back_to == (5,)
    # The same weights as of a run in which these steps never made an update.
    monkeypatch.undo()
    inject(monkeypatch, {s: float("nan") for s in range(5, 10)})
    other = start_run(guarded(tiny, skips=10), tmp_path / "other")
    train(other, quiet=True)
    expected = read_checkpoint(list_checkpoints(other.path)[-1], run.config.model)[0]
    for name, tensor in read_checkpoint(list_checkpoints(run.path)[-1], run.config.model)[0].items():
        assert torch.equal(tensor, expected[name]), name


def test_rollback_never_takes_a_checkpoint_twice_and_ends(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inject(monkeypatch, {s: float("nan") for s in range(11, 20)})
    run = start_run(guarded(tiny, skips=1, then="rollback", rollbacks=5), tmp_path / "run")
    with pytest.raises(WorkError, match="there is no checkpoint to go back to"):
        train(run, quiet=True)
    assert [e["checkpoint"] for e in events(run.path, "rollback")] == [10, 5]
    resumed = resume_run(run.path, read_run_config(run.path))
    assert resumed.checkpoint is not None


def test_a_resumed_run_tells_the_same_spikes(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = guarded(tiny, spike_zscore=6.0, window=10)
    inject(monkeypatch, {16: 100.0})
    run = start_run(config, tmp_path / "run")
    train(run, quiet=True)
    for path in list_checkpoints(run.path):
        if path.name > "step_000015":
            (path / "checksums.json").unlink()
    train(resume_run(run.path, read_run_config(run.path)), quiet=True)
    assert [e["step"] for e in events(run.path, "skip")] == [17]


def test_the_running_mean_is_that_of_the_last_losses() -> None:
    state = TrainingState()
    config = GuardConfig(spike_zscore=4.0, window=50)
    generator = torch.Generator().manual_seed(0)
    for value in (3 + 0.1 * torch.randn(2000, generator=generator)).tolist():
        assert bad_step(config, state, value, 1.0) is None or abs(value - 3) > 0.3
        state = after_good_step(config, state, value)
    assert state.loss_mean == pytest.approx(3, abs=0.05)
    assert state.loss_variance**0.5 == pytest.approx(0.1, rel=0.3)
    assert bad_step(config, state, 3.8, 1.0)
    assert bad_step(config, state, 2.0, 1.0) is None  # downwards is no spike
    assert bad_step(config, state, 3.0, float("inf"))
    assert after_bad_step(state, 7).skipped_steps == (7,)
    assert after_bad_step(after_bad_step(state, 7), 8).bad_in_row == 2
    later = dataclasses.replace(after_bad_step(state, 7), step=9)
    assert after_rollback(later, TrainingState(step=6, skipped_steps=(2,))).skipped_steps == (2, 6, 7, 8)
