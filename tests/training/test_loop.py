"""The trainer: accumulation, reported loss, equal bits, resume, and what it refuses."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gpt2.checkpoint.directory import list_checkpoints, newest_good_checkpoint, step_of
from gpt2.config import Config, from_dict, read_run_config
from gpt2.data.loader import BatchLoader
from gpt2.data.shards import Dataset
from gpt2.distributed import Distributed
from gpt2.errors import RequestError, WorkError
from gpt2.evaluation.loss import evaluate_model_loss
from gpt2.inference.engine import load
from gpt2.model import GPT
from gpt2.training.loop import accumulate_gradients, train
from gpt2.training.metrics import read_metrics, start_at
from gpt2.training.parallel import TrainingNetwork
from gpt2.training.run import resume_run, start_run

ALONE = Distributed(rank=0, world_size=1, device=torch.device("cpu"))


def changed(config: Config, **values: object) -> Config:
    sections: dict[str, dict[str, object]] = {}
    for name, value in values.items():
        section, _, field = name.partition("__")
        sections.setdefault(section, {})[field] = value
    return from_dict(sections, config)


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(list_checkpoints(run)[-1] / "model.safetensors")


def assert_equal_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


@pytest.mark.parametrize("compiled", [False, True])
def test_accumulation_changes_neither_gradients_nor_reported_loss(tiny: Config, compiled: bool) -> None:
    config = changed(tiny, model__vocab_size=257, train__compile=compiled)
    loader = BatchLoader(Dataset.open(Path(config.train.data)).split("train"), 32, 8, seed=1)
    x, y = loader.batch(0)
    results = []
    for accumulation in (1, 4, 8):  # 8 x 1, 2 x 4 and 1 x 8 windows
        torch.manual_seed(0)
        torch.compiler.reset()
        model = GPT(config.model)
        loss = accumulate_gradients(TrainingNetwork(model, config, ALONE), x, y, accumulation, ALONE)
        assert loss is not None
        results.append((loss.item(), {name: p.grad for name, p in model.named_parameters()}))
        if compiled and accumulation == 4:
            break  # the compiler is slow; two forms suffice
    plain_loss = results[0][0]
    for loss, gradients in results[1:]:
        assert loss == pytest.approx(plain_loss, rel=1e-6)
        for name, gradient in gradients.items():
            expected = results[0][1][name]
            assert torch.linalg.norm(gradient - expected) <= 1e-6 * torch.linalg.norm(expected), name


def test_the_reported_loss_is_the_whole_steps_mean(tiny: Config, tmp_path: Path) -> None:
    """Not the last micro-batch's: with the rate at almost nothing the first steps' losses are the initial model's."""
    config = changed(tiny, train__steps=2, train__micro_batch=1, optim__lr=1e-12, optim__weight_decay=0.0)
    train(start_run(config, tmp_path / "run"), quiet=True)
    reported = [e["loss"] for e in read_metrics(tmp_path / "run") if e["event"] == "step"]
    dataset = Dataset.open(Path(config.train.data))
    torch.manual_seed(config.train.seed)
    model = GPT(read_run_config(tmp_path / "run").model)
    loader = BatchLoader(dataset.split("train"), 32, 8, config.train.seed)
    for step, loss in enumerate(reported):
        x, y = loader.batch(step)
        each = [model(torch.from_numpy(x[i : i + 1]), torch.from_numpy(y[i : i + 1]))[1].item() for i in range(8)]
        assert loss == pytest.approx(np.mean(each), rel=1e-5)
        assert abs(loss - each[-1]) > 1e-6


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_interrupted_run_ends_with_the_same_bits(tiny: Config, tmp_path: Path, optimizer: str) -> None:
    config = changed(
        tiny, optim__optimizer=optimizer, model__dropout=0.1, train__steps=12, checkpoint__every=4, eval__every=4
    )
    whole = start_run(config, tmp_path / "whole")
    train(whole, quiet=True)

    broken = start_run(config, tmp_path / "broken")
    train(broken, quiet=True)
    for path in list_checkpoints(broken.path)[1:]:  # as if it had been killed after step 8, its lines written
        (path / "checksums.json").unlink()
    assert step_of(list_checkpoints(broken.path)[-1]) == 8
    train(resume_run(broken.path, read_run_config(broken.path)), quiet=True)

    assert_equal_bits(weights_of(whole.path), weights_of(broken.path))
    for name in ("step", "val"):
        lines = [[e[k] for k in ("step", "loss")] for e in read_metrics(broken.path) if e["event"] == name]
        assert lines == [[e[k] for k in ("step", "loss")] for e in read_metrics(whole.path) if e["event"] == name]
    steps = [e["step"] for e in read_metrics(broken.path) if e["event"] == "step"]
    assert steps == list(range(1, 13))


def test_warm_up_compiles_all_that_training_and_validation_need(tiny: Config, tmp_path: Path) -> None:
    """No step and no validation, short last batches included, waits for the compiler."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    run = start_run(
        changed(tiny, train__compile=True, train__steps=5, eval__every=2, eval__windows=0), tmp_path / "run"
    )
    train(run, quiet=True)
    assert counters["stats"]["unique_graphs"] == 2  # one to train with, one to validate with


def test_another_seed_gives_other_weights(tiny: Config, tmp_path: Path) -> None:
    for seed in (1, 2):
        config = changed(tiny, train__steps=2, train__seed=seed)
        train(start_run(config, tmp_path / str(seed)), quiet=True)
    a, b = weights_of(tmp_path / "1"), weights_of(tmp_path / "2")
    assert not torch.equal(a["transformer.wte.weight"], b["transformer.wte.weight"])


@pytest.mark.parametrize("compiled", [False, True])
def test_two_processes_give_the_same_bits(tiny: Config, tmp_path: Path, compiled: bool) -> None:
    options = ["--train.compile"] if compiled else []
    for name in ("a", "b"):
        command = [sys.executable, "-m", "gpt2", "train", "--data", tiny.train.data, "--out", str(tmp_path / name)]
        command += ["--preset", "tiny", "--train.steps", "4", *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "2"}
        subprocess.run(command, check=True, capture_output=True, env=environment)
    assert_equal_bits(weights_of(tmp_path / "a"), weights_of(tmp_path / "b"))


def test_the_loss_falls_and_the_figures_agree(tiny: Config, tmp_path: Path) -> None:
    config = changed(tiny, train__steps=60, eval__every=20, eval__windows=0)
    result = train(start_run(config, tmp_path / "run"), quiet=True)
    assert result["steps"] == 60
    assert result["val_loss"] < 3.0 < math.log(257)
    assert result["bits_per_byte"] == pytest.approx(result["val_loss"] / math.log(2), rel=0.02)  # a byte a token
    engine = load(tmp_path / "run")
    again = evaluate_model_loss(engine.model, engine.tokenizer, Dataset.open(Path(config.train.data)))
    assert again.loss == pytest.approx(result["val_loss"], rel=1e-5)
    assert again.bytes == Dataset.open(Path(config.train.data)).split("val").bytes


def test_keeps_the_last_and_the_best(tiny: Config, tmp_path: Path) -> None:
    # A rate this high spoils the weights after a good beginning, so the best is not among the last.
    config = changed(tiny, train__steps=12, checkpoint__every=2, checkpoint__keep_last=1, optim__lr=0.02)
    config = changed(config, optim__schedule="constant", optim__warmup_steps=0)
    run = start_run(config, tmp_path / "run")
    train(run, quiet=True)
    losses = {e["step"]: e["loss"] for e in read_metrics(run.path) if e["event"] == "val"}
    best = min((s for s in losses if s % 2 == 0), key=losses.__getitem__)
    assert {step_of(path) for path in list_checkpoints(run.path)} == {best, 12}


def test_a_run_by_time_ends_by_time_with_its_rate_at_the_end(tiny: Config, tmp_path: Path) -> None:
    config = changed(tiny, train__steps=0, train__minutes=0.02, optim__schedule="linear", optim__min_lr_ratio=0.0)
    result = train(start_run(config, tmp_path / "run"), quiet=True)
    steps = [e for e in read_metrics(tmp_path / "run") if e["event"] == "step"]
    assert result["train_seconds"] >= 1.2
    assert steps[-1]["lr"] < 0.5 * config.optim.lr
    assert sum(e["event"] == "done" for e in read_metrics(tmp_path / "run")) == 1


def test_a_finished_run_is_left_as_it_is(tiny: Config, tmp_path: Path) -> None:
    first = train(start_run(tiny, tmp_path / "run"), quiet=True)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert train(start_run(tiny, tmp_path / "run"), quiet=True) == first
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


def test_a_run_of_another_config_is_refused_by_name(tiny: Config, tmp_path: Path) -> None:
    start_run(tiny, tmp_path / "run")
    with pytest.raises(RequestError, match=r"optim\.lr"):
        start_run(changed(tiny, optim__lr=0.5), tmp_path / "run")


def test_resume_refuses_what_changes_results_and_takes_what_does_not(tiny: Config, tmp_path: Path) -> None:
    start_run(tiny, tmp_path / "run")
    saved = read_run_config(tmp_path / "run")
    with pytest.raises(RequestError, match=r"optim\.lr, train\.seed"):
        resume_run(tmp_path / "run", changed(saved, optim__lr=0.5, train__seed=3))
    run = resume_run(tmp_path / "run", changed(saved, train__micro_batch=2, log__every=5, model__attention="flash"))
    assert run.config.train.micro_batch == 2


def test_resume_takes_the_same_data_elsewhere_and_no_other(tiny: Config, tmp_path: Path) -> None:
    import shutil

    from gpt2.data.prepare import prepare

    start_run(tiny, tmp_path / "run")
    saved = read_run_config(tmp_path / "run")
    shutil.copytree(tiny.train.data, tmp_path / "copy")
    resume_run(tmp_path / "run", changed(saved, train__data=str(tmp_path / "copy")))
    (tmp_path / "other.txt").write_text("another text\n" * 200)
    prepare(str(tmp_path / "other.txt"), tmp_path / "other", "bytes")
    with pytest.raises(RequestError, match="is not what"):
        resume_run(tmp_path / "run", changed(saved, train__data=str(tmp_path / "other")))


def test_init_from_takes_weights_and_shape_and_leaves_the_original(tiny: Config, tmp_path: Path) -> None:
    train(start_run(changed(tiny, train__steps=4), tmp_path / "first"), quiet=True)
    before = {p: p.read_bytes() for p in (tmp_path / "first").rglob("*") if p.is_file()}
    config = changed(tiny, train__init_from=str(tmp_path / "first"), optim__lr=1e-12, train__steps=1)
    config = changed(config, model__n_layer=5, optim__weight_decay=0.0)  # the weights decide the shape
    run = start_run(config, tmp_path / "second")
    assert run.config.model.n_layer == 2
    train(run, quiet=True)
    a, b = weights_of(tmp_path / "first"), weights_of(tmp_path / "second")
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], rtol=1e-5, atol=1e-7)
    assert before == {p: p.read_bytes() for p in (tmp_path / "first").rglob("*") if p.is_file()}


def test_init_from_refuses_another_tokenizer(tiny: Config, tmp_path: Path, text_directory: Path) -> None:
    from gpt2.data.prepare import prepare

    train(start_run(changed(tiny, train__steps=1), tmp_path / "first"), quiet=True)
    prepare(str(text_directory), tmp_path / "bpe", "bpe:300")
    config = changed(tiny, train__init_from=str(tmp_path / "first"), train__data=str(tmp_path / "bpe"))
    with pytest.raises(RequestError, match=r"tokenizer \(bpe:300\) differs"):
        start_run(config, tmp_path / "second")
    assert not (tmp_path / "second").exists()


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tiny: Config, tmp_path: Path) -> None:
    run = start_run(changed(tiny, checkpoint__every=10, checkpoint__keep_last=3), tmp_path / "run")
    train(run, quiet=True)
    file = list_checkpoints(run.path)[-1] / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    path, complaints = newest_good_checkpoint(run.path)
    assert path is not None
    assert step_of(path) == 10
    assert "step_000020/model.safetensors is altered" in complaints[0]
    again = resume_run(run.path, read_run_config(run.path))
    assert again.checkpoint == path
    assert again.notes == (complaints[0], "the run goes on from step_000010")
    train(again, quiet=True)
    assert newest_good_checkpoint(run.path)[1] == []


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(tiny: Config, tmp_path: Path) -> None:
    train(start_run(tiny, tmp_path / "run"), quiet=True)
    for path in list_checkpoints(tmp_path / "run"):
        (path / "config.json").write_text("{}")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    for again in (lambda: start_run(tiny, tmp_path / "run"), lambda: resume_run(tmp_path / "run", tiny_of(tmp_path))):
        with pytest.raises(WorkError, match=r"no good checkpoint to go on from: .*config\.json is altered"):
            again()
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def tiny_of(directory: Path) -> Config:
    return read_run_config(directory / "run")


def test_a_run_goes_on_without_the_weights_it_started_from(tiny: Config, tmp_path: Path) -> None:
    """They may be gone, or may have been trained on: the run has checkpoints of its own."""
    train(start_run(changed(tiny, model__n_layer=1, train__steps=1), tmp_path / "first"), quiet=True)
    config = changed(tiny, train__init_from=str(tmp_path / "first"), train__steps=4, checkpoint__every=2)
    train(start_run(config, tmp_path / "run"), quiet=True)
    whole = weights_of(tmp_path / "run")
    (tmp_path / "first").rename(tmp_path / "elsewhere")
    for again in (lambda: start_run(config, tmp_path / "run"), lambda: resume_run(tmp_path / "run", tiny_of(tmp_path))):
        (list_checkpoints(tmp_path / "run")[-1] / "checksums.json").unlink()
        run = again()
        assert run.checkpoint is not None
        assert step_of(run.checkpoint) == 2
        assert run.config.model.n_layer == 1
        train(run, quiet=True)
        assert_equal_bits(weights_of(tmp_path / "run"), whole)


def test_a_sample_prompt_longer_than_the_context_is_refused_before_the_run(tiny: Config, tmp_path: Path) -> None:
    config = changed(tiny, eval__sample_prompt="x" * 33)
    with pytest.raises(RequestError, match=r"eval\.sample_prompt has 33 tokens, the model's context 32"):
        start_run(changed(config, eval__sample_every=5), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
    start_run(config, tmp_path / "run")  # without samples nobody reads it
    with pytest.raises(RequestError, match=r"eval\.sample_prompt"):
        resume_run(tmp_path / "run", changed(read_run_config(tmp_path / "run"), eval__sample_every=5))


def test_training_leaves_torchs_settings_as_they_were(tiny: Config, tmp_path: Path) -> None:
    def found() -> tuple[object, ...]:
        fill = torch.utils.deterministic.fill_uninitialized_memory
        return torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(), fill

    before = found()
    train(start_run(changed(tiny, train__steps=1), tmp_path / "run"), quiet=True)
    assert found() == before
    with pytest.raises(WorkError):
        train(start_run(changed(tiny, optim__lr=1e30, optim__warmup_steps=0), tmp_path / "bad"), quiet=True)
    assert found() == before


def test_a_damaged_shard_stops_training_before_its_tokens_are_used(
    tiny: Config, tmp_path: Path, text_directory: Path
) -> None:
    from gpt2.data.prepare import prepare

    prepare(str(text_directory), tmp_path / "data", "bytes")
    shard = tmp_path / "data" / "train_000000.bin"
    data = bytearray(shard.read_bytes())
    data[5000] ^= 1
    shard.write_bytes(data)
    run = start_run(changed(tiny, train__data=str(tmp_path / "data")), tmp_path / "run")
    with pytest.raises(RequestError, match=r"train_000000\.bin is damaged: SHA-256"):
        train(run, quiet=True)


def test_a_loss_that_is_not_finite_stops_the_run(tiny: Config, tmp_path: Path) -> None:
    config = changed(tiny, optim__lr=1e30, optim__grad_clip=0.0, optim__warmup_steps=0)
    with pytest.raises(WorkError, match="the loss is"):
        train(start_run(config, tmp_path / "run"), quiet=True)


def test_micro_batches_that_do_not_divide_name_the_nearest(tiny: Config, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="use 2 or 4"):
        start_run(changed(tiny, train__micro_batch=3), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 138)])
def test_a_signal_saves_and_leaves_with_its_code(tiny: Config, tmp_path: Path, name: str, code: int) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "gpt2", "train", "--data", tiny.train.data, "--out", str(out), "--preset", "tiny"]
    command += ["--train.steps", "1000000", "--eval.every", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not [e for e in read_metrics(out) if e["event"] == "step"]:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(getattr(signal, name))
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert b"--resume" in stderr
    last = [e["step"] for e in read_metrics(out) if e["event"] == "step"][-1]
    assert step_of(list_checkpoints(out)[-1]) == last


def test_metrics_are_cut_at_the_checkpoint_and_a_torn_line_is_dropped(tmp_path: Path) -> None:
    lines = [{"event": "step", "step": s, "text": "a\u2028b"} for s in range(1, 6)]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines) + '{"event": "st'
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    start_at(tmp_path, 3)
    assert [e["step"] for e in read_metrics(tmp_path)] == [1, 2, 3]


def test_samples_do_not_disturb_the_run(tiny: Config, tmp_path: Path) -> None:
    config = changed(tiny, train__steps=6, model__dropout=0.2)
    train(start_run(config, tmp_path / "plain"), quiet=True)
    train(start_run(changed(config, eval__sample_every=1), tmp_path / "sampled"), quiet=True)
    assert_equal_bits(weights_of(tmp_path / "plain"), weights_of(tmp_path / "sampled"))
    assert sum(e["event"] == "sample" for e in read_metrics(tmp_path / "sampled")) == 6


def test_every_optimisation_can_be_switched_off(tiny: Config, tmp_path: Path) -> None:
    """The plainest GPT-2 of the ladder: untied, unpadded, unscaled init, explicit attention, unfused, unclipped."""
    config = changed(
        tiny,
        model__tie_embeddings=False,
        model__pad_vocab_to=1,
        model__scale_residual_init=False,
        model__attention="explicit",
        optim__fused=False,
        optim__grad_clip=0.0,
        optim__weight_decay=0.0,
        optim__schedule="constant",
        train__matmul_precision="highest",
    )
    result = train(start_run(replace(config), tmp_path / "run"), quiet=True)
    assert result["val_loss"] < math.log(257)
    train(resume_run(tmp_path / "run", read_run_config(tmp_path / "run")), quiet=True)


@pytest.mark.parametrize("compiled", [False, True])
def test_hellaswag_is_scored_at_its_interval_and_leaves_the_run_alone(
    tiny: Config, tmp_path: Path, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # traced, no machine code
    file = tmp_path / "items.jsonl"
    item = {"ctx": "the people", "endings": ["will meet", "are", "have a sea", "go on land"], "label": 2}
    file.write_text(f"{json.dumps(item)}\n" * 6, encoding="utf-8")
    config = changed(tiny, train__steps=5, model__dropout=0.0 if compiled else 0.2, train__compile=compiled)
    if not compiled:
        train(start_run(config, tmp_path / "plain"), quiet=True)
    scored = changed(config, eval__hellaswag_every=2, eval__hellaswag_file=str(file), eval__hellaswag_items=4)
    train(start_run(scored, tmp_path / "scored"), quiet=True)
    events = [e for e in read_metrics(tmp_path / "scored") if e["event"] == "hellaswag"]
    assert [e["step"] for e in events] == [2, 4, 5]
    assert all(e["items"] == 4 and e["acc"] in (0.0, 1.0) and e["acc_norm"] in (0.0, 1.0) for e in events)
    if not compiled:
        assert_equal_bits(weights_of(tmp_path / "plain"), weights_of(tmp_path / "scored"))


def test_a_missing_hellaswag_file_is_refused_before_the_run_is_made(tiny: Config, tmp_path: Path) -> None:
    config = changed(tiny, eval__hellaswag_every=2, eval__hellaswag_file=str(tmp_path / "none"))
    with pytest.raises(RequestError, match=r"cannot read .*none"):
        start_run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
