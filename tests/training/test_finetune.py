"""Fine-tuning: from a checkpoint on new text, with an early stop, and a clear word where the text is too small."""

import dataclasses
import random
from pathlib import Path

import pytest
import torch

from gpt2.checkpoint.directory import TrainingState, list_checkpoints, read_checkpoint, step_of
from gpt2.cli import main
from gpt2.config import Config, from_dict, preset, read_run_config
from gpt2.data.prepare import prepare
from gpt2.data.shards import Dataset
from gpt2.errors import RequestError
from gpt2.evaluation.loss import evaluate_model_loss
from gpt2.inference.engine import load
from gpt2.training.loop import note_validation, train
from gpt2.training.metrics import read_metrics
from gpt2.training.run import resume_run, start_run

NEW_TEXT = "a ship left the harbour before dawn with salt and rope and a crew of nine who sang of storms"


def contents(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def original(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the tiny preset on the tests' common text."""
    config = from_dict({"train": {"data": str(data), "steps": 40}}, preset("tiny"))
    path = tmp_path_factory.mktemp("original") / "run"
    train(start_run(config, path), quiet=True)
    return path


@pytest.fixture(scope="module")
def new_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 documents in other words, prepared with the bytes tokenizer."""
    directory = tmp_path_factory.mktemp("new")
    generator = random.Random(3)
    (directory / "text").mkdir()
    for i in range(60):
        text = " ".join(generator.choices(NEW_TEXT.split(), k=40)) + ".\n"
        (directory / "text" / f"{i:02d}.txt").write_text(text, encoding="utf-8")
    prepare(str(directory / "text"), directory / "data", "bytes")
    return directory / "data"


def finetune(original: Path, data: Path, **train_fields: object) -> Config:
    """The preset as it is, but for its learning rate (that of a 124M model), compile and the number of steps."""
    changes = {"data": str(data), "init_from": str(original), "compile": False, "batch_tokens": 256, "steps": 40}
    return from_dict({"train": changes | train_fields, "optim": {"lr": 3e-3}, "log": {"every": 5}}, preset("finetune"))


def test_it_lowers_the_loss_on_new_text_and_leaves_the_original(original: Path, new_text: Path, tmp_path: Path) -> None:
    before = contents(original)
    engine = load(original)
    loss_before = evaluate_model_loss(engine.model, engine.tokenizer, Dataset.open(new_text)).loss
    config = from_dict({"optim": {"lr": 1e-2}}, finetune(original, new_text, steps=160))
    result = train(start_run(config, tmp_path / "run"), quiet=True)
    assert result["val_loss"] < loss_before - 0.5
    engine = load(tmp_path / "run")
    again = evaluate_model_loss(engine.model, engine.tokenizer, Dataset.open(new_text)).loss
    assert again == pytest.approx(result["val_loss"], rel=1e-5)
    assert contents(original) == before


def test_the_command_line_does_the_same(original: Path, new_text: Path, tmp_path: Path) -> None:
    before = contents(original)
    out = tmp_path / "run"
    argv = ["train", "--data", str(new_text), "--out", str(out), "--preset", "finetune", "--init-from", str(original)]
    argv += ["--train.no-compile", "--train.batch-tokens", "256", "--train.steps", "5"]
    assert main(argv) == 0
    config = read_run_config(out)
    assert config.model.n_embd == 32  # the model's shape, not the preset's
    assert config.model.dropout == 0.1  # the preset's
    assert config.train.patience == 3
    assert contents(original) == before


def test_the_preset_wants_a_model_to_start_from(
    new_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--data", str(new_text), "--out", str(tmp_path / "run"), "--preset", "finetune"]) == 2
    assert "--init-from is missing" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_every_validation_of_the_preset_is_saved() -> None:
    """Else the weights with the lowest loss might not be on the disk when the run stops early."""
    config = preset("finetune")
    assert config.eval.every == config.checkpoint.every > 0
    assert config.checkpoint.keep_best


def test_it_stops_early_and_keeps_the_best(original: Path, new_text: Path, tmp_path: Path) -> None:
    config = finetune(original, new_text, patience=2, steps=1000)
    # A rate that spoils the weights at once: no validation after the first can be lower.
    config = from_dict(
        {
            "optim": {"lr": 1.0, "warmup_steps": 4, "grad_clip": 0.0},
            "eval": {"every": 2},
            "checkpoint": {"every": 2},
            "log": {"every": 100},
        },
        config,
    )
    result = train(start_run(config, tmp_path / "run"), quiet=True)
    losses = {e["step"]: e["loss"] for e in read_metrics(tmp_path / "run") if e["event"] == "val"}
    best = min(losses, key=losses.__getitem__)
    last = max(losses)
    assert last == best + 4 < 1000
    assert result["steps"] == last
    assert result["train_seconds"] > 0
    assert {step_of(path) for path in list_checkpoints(tmp_path / "run")} == {best, last}
    assert read_metrics(tmp_path / "run")[-1]["event"] == "done"
    before = contents(tmp_path / "run")
    assert train(resume_run(tmp_path / "run", read_run_config(tmp_path / "run")), quiet=True) == result
    assert contents(tmp_path / "run") == before


def test_patience_goes_on_where_a_run_was_interrupted(original: Path, new_text: Path, tmp_path: Path) -> None:
    config = finetune(original, new_text, patience=3, steps=8)
    config = from_dict({"eval": {"every": 2}, "checkpoint": {"every": 2, "keep_last": 9}}, config)
    train(start_run(config, tmp_path / "run"), quiet=True)
    expected = TrainingState()
    losses = {e["step"]: e["loss"] for e in read_metrics(tmp_path / "run") if e["event"] == "val"}
    for path in list_checkpoints(tmp_path / "run"):
        state = read_checkpoint(path, read_run_config(tmp_path / "run").model)[2]
        expected = note_validation(expected, losses[state.step])
        assert (state.lowest_val_loss, state.stale_validations) == (
            expected.lowest_val_loss,
            expected.stale_validations,
        )


def test_what_counts_as_no_improvement() -> None:
    state = TrainingState()
    seen = []
    for loss in (3.0, 2.0, 2.0, 2.5, float("nan"), 1.9, 4.0):
        state = note_validation(state, loss)
        seen.append(state.stale_validations)
    assert seen == [0, 0, 1, 2, 3, 0, 1]
    assert state.lowest_val_loss == 1.9


@pytest.mark.parametrize(
    ("train_fields", "said"),
    [({"patience": -1}, r"train\.patience = -1 must be at least 0"), ({"patience": 2}, "set eval.every")],
)
def test_patience_without_validations_is_refused(train_fields: dict[str, int], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        from_dict({"train": train_fields, "eval": {"every": 0}, "checkpoint": {"every": 0}})


def test_a_text_too_small_for_a_window_is_told_before_the_run_starts(original: Path, tmp_path: Path) -> None:
    (tmp_path / "small.txt").write_text("Too small a text.\n")
    prepare(str(tmp_path / "small.txt"), tmp_path / "data", "bytes", 0.0)
    with pytest.raises(RequestError, match=r"too small: .* has \d+ tokens .* needs 33; give more text, or start from"):
        start_run(finetune(original, tmp_path / "data"), tmp_path / "run")
    config = from_dict({"train": {"data": str(tmp_path / "data")}}, preset("tiny"))
    with pytest.raises(RequestError, match=r"set a smaller model\.n_ctx"):
        start_run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_text_too_small_for_a_batch_is_told_with_what_fits(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "small.txt").write_text("A line of a small text, and another.\n" * 5)
    prepare(str(tmp_path / "small.txt"), tmp_path / "data", "bytes")
    windows = (Dataset.open(tmp_path / "data").split("train").tokens - 1) // 32
    run = start_run(finetune(original, tmp_path / "data", batch_tokens=1024), tmp_path / "run")
    (note,) = run.notes
    assert f"a step takes 32 windows of 32 tokens, all of the text is {windows}" in note
    assert f"--train.batch-tokens {windows * 32}" in note
    argv = ["train", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "two"), "--preset", "tiny"]
    assert main([*argv, "--train.steps", "1"]) == 0
    assert "the text is small" in capsys.readouterr().err
    fitting = ["--train.batch-tokens", str(windows * 32), "--train.micro-batch", "1"]
    assert main([*argv[:-3], str(tmp_path / "three"), *argv[-2:], "--train.steps", "1", *fitting]) == 0
    assert "the text is small" not in capsys.readouterr().err


def test_patience_wants_validation_text(original: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("A line of a text.\n" * 50)
    prepare(str(tmp_path / "text.txt"), tmp_path / "data", "bytes", 0.0)
    with pytest.raises(RequestError, match=r"train\.patience needs a validation loss"):
        start_run(finetune(original, tmp_path / "data"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_when_the_original_is_gone(original: Path, new_text: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(original, tmp_path / "original")
    config = finetune(tmp_path / "original", new_text, steps=4)
    run = start_run(from_dict({"checkpoint": {"every": 2, "keep_last": 2}}, config), tmp_path / "run")
    train(run, quiet=True)
    (list_checkpoints(run.path)[-1] / "checksums.json").unlink()
    shutil.rmtree(tmp_path / "original")
    result = train(resume_run(run.path, read_run_config(run.path)), quiet=True)
    assert result["steps"] == 4


def test_a_hugging_face_directory_will_do(original: Path, new_text: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    step = list_checkpoints(original)[-1]
    AutoModelForCausalLM.from_pretrained(step).save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file()
    before = contents(tmp_path / "theirs")
    config = dataclasses.replace(finetune(tmp_path / "theirs", new_text, steps=1), optim=preset("tiny").optim)
    train(start_run(config, tmp_path / "run"), quiet=True)
    assert contents(tmp_path / "theirs") == before
    assert torch.isfinite(load(tmp_path / "run").logits([1, 2])).all()
