"""SIGKILL at random moments: every restart finds a good checkpoint, the final weights are those of a quiet run."""

from pathlib import Path

import torch
from processes import kill_and_restart, run_ranks
from safetensors.torch import load_file

from gpt2.checkpoint.directory import list_checkpoints, newest_good_checkpoint
from gpt2.config import Config
from gpt2.training.metrics import read_metrics


def test_a_run_killed_again_and_again_ends_with_the_same_bits(tiny: Config, tmp_path: Path) -> None:
    options = ["--train.steps", "300", "--checkpoint.every", "5", "--eval.every", "0", "--model.dropout", "0.1"]
    argv = ["train", "--data", tiny.train.data, "--preset", "tiny", *options, "--out"]
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    assert run_ranks(1, [*argv, str(quiet)], tmp_path / "log") == [0]
    survived = kill_and_restart([*argv, str(killed)], killed, tmp_path / "log", 6, 0.2, every=5, seed=1)
    assert survived.kills == 6
    assert survived.damaged == 0
    assert newest_good_checkpoint(killed)[1] == []
    expected = load_file(list_checkpoints(quiet)[-1] / "model.safetensors")
    for name, tensor in load_file(list_checkpoints(killed)[-1] / "model.safetensors").items():
        assert torch.equal(tensor, expected[name]), name
    for kind in ("step", "val"):
        lines = [[e["step"], e["loss"]] for e in read_metrics(killed) if e["event"] == kind]
        assert lines == [[e["step"], e["loss"]] for e in read_metrics(quiet) if e["event"] == kind]
