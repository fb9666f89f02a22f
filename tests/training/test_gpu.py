"""The same trainer on a CUDA GPU: bf16, compiled, flash attention, saved and gone on with."""

import math
from pathlib import Path

import pytest
import torch

from gpt2.checkpoint.directory import list_checkpoints
from gpt2.config import Config, from_dict, read_run_config
from gpt2.inference.engine import load
from gpt2.model import explicit_attention, flash_attention
from gpt2.training.loop import train
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
