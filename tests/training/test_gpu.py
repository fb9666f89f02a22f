"""The same trainer on a CUDA GPU: bf16, compiled, flash attention, saved and gone on with."""

import math
from pathlib import Path

import pytest
import torch

from gpt2.checkpoint.directory import list_checkpoints
from gpt2.config import Config, from_dict, read_run_config
from gpt2.distributed import Distributed
from gpt2.fused_loss import fused_cross_entropy
from gpt2.inference.engine import load
from gpt2.model import GPT, explicit_attention, flash_attention
from gpt2.training.loop import train
from gpt2.training.metrics import read_metrics
from gpt2.training.parallel import TrainingNetwork, whole
from gpt2.training.run import resume_run, start_run

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_trains_resumes_and_samples(tiny: Config, tmp_path: Path, optimizer: str) -> None:
    config = from_dict(
        {
            "optim": {"optimizer": optimizer},
            "train": {"precision": "auto", "compile": True, "device": "cuda", "steps": 40},
            "checkpoint": {"every": 20, "keep_last": 3},
        },
        tiny,
    )
    result = train(start_run(config, tmp_path / "run"), quiet=True)
    assert result["val_loss"] < math.log(257)
    saved = read_run_config(tmp_path / "run")
    assert saved.train.precision == "bf16"
    (list_checkpoints(tmp_path / "run")[-1] / "checksums.json").unlink()
    again = train(resume_run(tmp_path / "run", saved), quiet=True)
    assert again["val_loss"] == pytest.approx(result["val_loss"], rel=0.02)
    engine = load(tmp_path / "run", "cuda")
    assert engine.generate("the people", max_tokens=20, temperature=0) == load(tmp_path / "run", "cpu").generate(
        "the people", max_tokens=20, temperature=0
    )


def test_flash_equals_explicit_attention() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 128, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    torch.testing.assert_close(flash_attention(q, k, v), explicit_attention(q, k, v), rtol=2e-2, atol=2e-2)


def test_auto_micro_batch_takes_the_largest_that_fits(tiny: Config, tmp_path: Path) -> None:
    config = from_dict({"train": {"micro_batch": "auto", "device": "cuda", "precision": "auto"}}, tiny)
    train(start_run(config, tmp_path / "run"), quiet=True)
    started = next(event for event in read_metrics(tmp_path / "run") if event["event"] == "start")
    assert started["micro_batch"] == 8  # all windows of so small a model


def test_auto_micro_batch_stops_where_memory_ends(tiny: Config, tmp_path: Path) -> None:
    """A quarter of the memory is allowed: what is chosen fits, and is below the whole batch."""
    sizes = {"n_ctx": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768}
    config = from_dict(
        {
            "model": sizes,
            "train": {
                "micro_batch": "auto",
                "device": "cuda",
                "precision": "auto",
                "batch_tokens": 524_288,
                "steps": 1,
            },
        },
        tiny,
    )
    torch.cuda.set_per_process_memory_fraction(0.25)
    try:
        run = start_run(config, tmp_path / "run")
        train(run, quiet=True)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    started = next(event for event in read_metrics(run.path) if event["event"] == "start")
    assert 1 <= started["micro_batch"] < 512


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_nccl_with_one_process_gives_the_plain_loss_and_gradient(tiny: Config, tmp_path: Path, layout: str) -> None:
    config = from_dict({"model": {"vocab_size": 257}, "train": {"precision": "fp32", "parallel": layout}}, tiny)
    device = torch.device("cuda")
    idx = torch.randint(0, 257, (4, 32), device=device)

    def gradient(network: TrainingNetwork, model: GPT) -> tuple[float, torch.Tensor]:
        with network.micro_step(last=True):
            loss = network(idx, idx.clone())
            loss.backward()
        assert model.wte.weight.grad is not None
        return loss.item(), whole(model.wte.weight.grad).clone()

    torch.manual_seed(0)
    model = GPT(config.model)
    expected = gradient(TrainingNetwork(model, config, Distributed(0, 1, device)), model)
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1
    )
    try:
        torch.manual_seed(0)
        model = GPT(config.model)
        network = TrainingNetwork(model, config, Distributed(0, 1, device), grouped=True)
        loss, found = gradient(network, model)
    finally:
        torch.distributed.destroy_process_group()
    assert loss == pytest.approx(expected[0], rel=1e-5)
    torch.testing.assert_close(found, expected[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_fused_loss_on_a_gpu(dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(3000, 64, device="cuda", requires_grad=True)
    weight = torch.randn(384, 64, device="cuda", requires_grad=True)
    targets = torch.randint(0, 300, (3000,), device="cuda")
    with torch.autocast("cuda", dtype or torch.float32, enabled=dtype is not None):
        loss = torch.compile(fused_cross_entropy)(hidden, weight, targets, 300)
    expected = torch.nn.functional.cross_entropy((hidden @ weight.T)[:, :300], targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
    for found, wanted in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        assert torch.linalg.norm(found - wanted) < 3e-2 * torch.linalg.norm(wanted)
