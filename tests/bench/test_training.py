"""Other programs' training steps: found in the user's copies, trained on the same batches, reported beside ours."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt2.bench import contenders
from gpt2.bench.ladder import Options, base_config
from gpt2.bench.training import bench_training, parse_peers, print_table
from gpt2.config import Config
from gpt2.errors import RequestError

CPU = torch.device("cpu")

# A file as a user's checkout has it: classes with their optimizer, and a script behind them that must not run.
CHECKOUT = """
import torch, missing_package
from dataclasses import dataclass
import torch.nn as nn
import torch.nn.functional as F

@dataclass
class GPTConfig:
    vocab_size: int = 1
    block_size: int = 1
    n_layer: int = 1
    n_head: int = 1
    n_embd: int = 1
    dropout: float = 0.0
    bias: bool = True

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size)

    def forward(self, idx, targets=None):
        logits = self.lm_head(self.wte(idx))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, betas=None, device_type=None):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate)
"""


@pytest.fixture
def config(data: Path) -> Config:
    return base_config(Options("tiny", batch=2), data, CPU)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "model.py").write_text(CHECKOUT.replace(", missing_package", ""), encoding="utf-8")
    (tmp_path / "train_gpt2.py").write_text(CHECKOUT + "\nraise SystemExit('training starts')\n", encoding="utf-8")
    return tmp_path


def test_names_and_paths(checkout: Path) -> None:
    peers = parse_peers([f"nanogpt={checkout}", "transformers"])
    assert peers == [("nanogpt", str(checkout)), ("transformers", "")]
    for wrong, message in (
        (["nanogtp=/x"], "known are nanogpt"),
        (["nanogpt"], "--against nanogpt=PATH"),
        (["nanogpt=/nowhere"], "no directory /nowhere"),
        (["transformers", "transformers"], "twice"),
    ):
        with pytest.raises(RequestError, match=message):
            parse_peers(wrong)


@pytest.mark.parametrize("name", ["nanogpt", "build-nanogpt", "transformers"])
def test_a_peer_learns_from_the_same_batches(name: str, config: Config, checkout: Path) -> None:
    path = "" if name == "transformers" else str(checkout)
    if name == "transformers":
        pytest.importorskip("transformers")
    peer = contenders.build(name, path, config, 1, CPU)
    x = np.random.default_rng(0).integers(0, 257, (2, 32))
    before = float(peer.gradients(x, x))
    assert before == pytest.approx(math.log(257), abs=1.0)
    peer.optimizers[0].step()
    peer.model.zero_grad()
    assert float(peer.gradients(x, x)) < before
    assert peer.setting["precision"] == "fp32"


def test_a_peer_that_is_not_there(config: Config) -> None:
    with pytest.raises(RequestError, match="there is no directory /nowhere"):
        contenders.build("nanogpt", "/nowhere", config, 1, CPU)
    with pytest.raises(RequestError, match="known are nanogpt"):
        contenders.build("llm.c", "", config, 1, CPU)


def test_accumulation_does_not_change_a_peers_gradient(config: Config, checkout: Path) -> None:
    x = np.random.default_rng(0).integers(0, 257, (4, 32))
    grads = []
    for accumulation in (1, 2):
        peer = contenders.build("nanogpt", str(checkout), config, accumulation, CPU)
        loss = peer.gradients(x, x)
        grads.append([float(loss), *(p.grad.norm().item() for p in peer.model.parameters() if p.grad is not None)])
    assert grads[0] == pytest.approx(grads[1], rel=1e-4)


def test_a_folder_that_holds_something_else(tmp_path: Path) -> None:
    for text, message in (
        (None, "cannot be read"),
        ("x = (", "cannot be read"),
        ("x = 1", "has no GPT"),
        ("1/0", "Zero"),
    ):
        if text is not None:
            (tmp_path / "model.py").write_text(text, encoding="utf-8")
        with pytest.raises(RequestError, match=message):
            contenders.load_source(tmp_path / "model.py", "some_model")


def test_bench_train_whole(data: Path, checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A program that works and one that fails: the first result is this project, the failure has its reason."""
    (checkout / "train_gpt2.py").write_text(
        CHECKOUT.replace("logits = self", "raise ValueError('no such layer')"), encoding="utf-8"
    )
    shapes = Options("tiny", batch=2, rounds=2, minutes=2.0)
    peers = [f"nanogpt={checkout}", f"build-nanogpt={checkout}"]
    report = bench_training(shapes, peers, data, compiled=False)
    ours, nanogpt, broken = report["results"]
    assert (ours["name"], nanogpt["name"], broken["name"]) == ("build-gpt2", "nanogpt", "build-nanogpt")
    assert nanogpt["ours_over_this"] == pytest.approx(ours["tokens_per_second"] / nanogpt["tokens_per_second"])
    assert broken["tokens_per_second"] is None
    assert "no such layer" in broken["failed"]
    assert report["bench"] == "train"
    assert "eager for all" in report["config"]["best_setting"]
    print_table(report)
    assert "build-nanogpt failed" in capsys.readouterr().out
