"""The plan against the network itself, published figures, and what arithmetic demands of any such model."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpt2.cli import main
from gpt2.commands.plan import COUNTS
from gpt2.config import PRESETS, Config, GPTConfig, TrainConfig, preset
from gpt2.errors import RequestError
from gpt2.model import GPT
from gpt2.report.plan import (
    GPUS,
    PUBLISHED,
    USABLE,
    activation_bytes,
    check_published,
    communication_parts,
    find_gpu,
    make_plan,
    memory_parts,
    parameters,
)
from gpt2.training.peak import card_peak

# Within this factor of every published figure. llm.c is C and CUDA: it is faster than the plan on A100.
FACTOR = 1.15


def with_batch(config: Config, windows: int) -> Config:
    train = dataclasses.replace(config.train, batch_tokens=windows * config.model.n_ctx)
    return dataclasses.replace(config, train=train)


@pytest.mark.parametrize("index", range(len(PUBLISHED)), ids=[figure.source for figure in PUBLISHED])
def test_published_figures_are_met(index: int) -> None:
    figure, ratio = check_published()[index]
    assert 1 / FACTOR < ratio < FACTOR, figure


def test_the_recipe_in_numbers_of_one_line_each() -> None:
    """llm.c: 124M on 8 A100 in about 90 minutes for about 20 dollars."""
    plan = make_plan(preset("gpt2-124m"), GPUS["A100-80"], 8)
    assert plan.hours == pytest.approx(1.6, rel=0.2)
    assert plan.dollars == pytest.approx(22, rel=0.2)
    assert plan.micro_batch == 64  # the lecture's, on the same card
    assert plan.mfu == pytest.approx(0.55, abs=0.06)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_network(name: str, tied: bool) -> None:
    config = dataclasses.replace(preset(name).model, tie_embeddings=tied)
    with torch.device("meta"):
        model = GPT(config)
    assert parameters(config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("dtype", "a"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_activations_are_what_autograd_keeps(dtype: torch.dtype, a: int) -> None:
    """Eager autograd keeps no less than the formula, and little more: it also keeps what a compiler would not."""
    config = GPTConfig(vocab_size=64, pad_vocab_to=1, n_ctx=64, n_layer=3, n_head=4, n_embd=64, attention="flash")
    model = GPT(config)
    parameters_ = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    idx = torch.randint(64, (2, 64))
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        x = model.wte(idx) + model.wpe(torch.arange(64))
        for block in model.h:
            x = block(x)
    weights = {n * s for n in (64, 192, 256) for s in (64, 256)}  # autocast's copies of the matrices
    sizes = [
        tensor.untyped_storage().nbytes()
        for pointer, tensor in kept.items()
        if pointer not in parameters_ and not (tensor.dim() == 2 and tensor.numel() in weights and a == 2)
    ]
    expected = 2 * 64 * activation_bytes(config, a)
    assert 0.95 * expected < sum(sizes) < 1.35 * expected


@given(
    st.sampled_from(sorted(GPUS)),
    st.sampled_from(["gpt2-124m", "gpt2-350m", "gpt2-774m", "gpt2-1558m"]),
    st.sampled_from(COUNTS),
    st.sampled_from(["ddp", "fsdp", "auto"]),
    st.booleans(),
)
def test_what_holds_of_every_plan(kind: str, name: str, gpus: int, sharding: str, recompute: bool) -> None:
    config, gpu = preset(name), GPUS[kind]
    plan = make_plan(config, gpu, gpus, sharding, recompute=recompute)  # type: ignore[arg-type]
    if not plan.fits:
        assert plan.why
        assert plan.to_dict()["tokens_per_second"] is None
        return
    assert plan.micro_batch * plan.accumulation * gpus == config.batch_windows
    assert plan.memory_total <= USABLE * gpu.memory
    assert plan.step_seconds == pytest.approx(plan.compute_seconds + plan.exposed_seconds)
    assert 0 <= plan.exposed_seconds <= plan.communication_seconds
    assert (plan.communication_seconds > 0) == (gpus > 1)
    assert 0 < plan.mfu < gpu.share
    tokens = config.train.steps * config.train.batch_tokens
    assert plan.hours * 3600 * plan.tokens_per_second == pytest.approx(tokens)
    assert plan.dollars == pytest.approx(plan.hours * gpus * gpu.dollars)
    faster = dataclasses.replace(gpu, network=10 * gpu.network, link=10 * gpu.link, bandwidth=2 * gpu.bandwidth)
    other = make_plan(config, faster, gpus, plan.sharding, recompute=recompute)
    assert other.tokens_per_second > plan.tokens_per_second
    if gpus > 1:
        alone = make_plan(with_batch(config, config.batch_windows // gpus), gpu, 1, recompute=recompute)
        if alone.fits and plan.sharding == "ddp":
            assert plan.tokens_per_second <= gpus * alone.tokens_per_second


def test_a_larger_micro_batch_takes_more_memory_and_the_largest_that_fits_is_taken() -> None:
    config, gpu = preset("gpt2-124m"), GPUS["4090"]
    plan = make_plan(config, gpu, 8)
    assert sum(memory_parts(config, gpu, 8, plan.micro_batch * 2, "ddp").values()) > USABLE * gpu.memory
    too_large = make_plan(config, gpu, 8, micro_batch=plan.micro_batch * 2)
    assert not too_large.fits
    assert "does not fit" in too_large.why
    assert not make_plan(config, gpu, 8, micro_batch=3).fits


def test_what_does_not_fit_whole_is_sharded() -> None:
    """28 GB of state for 1558M: on a card of 24 GB only FSDP, and not on one GPU."""
    config, gpu = preset("gpt2-1558m"), GPUS["A10G"]
    assert not make_plan(config, gpu, 1).fits
    assert not make_plan(config, gpu, 8, "ddp").fits
    assert make_plan(config, gpu, 8).sharding == "fsdp"
    recomputed = make_plan(config, gpu, 8, recompute=True)
    assert recomputed.micro_batch > make_plan(config, gpu, 8).micro_batch


def test_all_reduce_bytes_and_the_network_between_hosts() -> None:
    """2 (n - 1) / n of the gradients, over NVLink in a host and over its network beyond."""
    config, gpu = preset("gpt2-124m"), dataclasses.replace(GPUS["A100-80"], link=100e9, network=10e9)
    gradients = 4 * parameters(config.model)
    traffic, eight, _ = communication_parts(config, gpu, 8, "ddp", 1.0, 1, 4)
    assert traffic == pytest.approx(2 * 7 / 8 * gradients)
    _, sixteen, _ = communication_parts(config, gpu, 16, "ddp", 1.0, 1, 4)
    assert sixteen / eight == pytest.approx(10 * (15 / 16) / (7 / 8), rel=0.1)
    halved, _, _ = communication_parts(config, gpu, 8, "ddp", 1.0, 1, 2)
    assert halved == pytest.approx(traffic / 2)
    sharded, _, _ = communication_parts(config, gpu, 8, "fsdp", 1.0, 4, 4)
    assert sharded == pytest.approx(4 * 7 / 8 * (2 + 2 + 4) * parameters(config.model))
    _, total, exposed = communication_parts(config, gpu, 8, "ddp", 1e-9, 1, 4)
    assert exposed == pytest.approx(total, rel=1e-3)  # nothing to hide behind


def test_every_card_has_a_peak_and_old_cards_train_in_float32() -> None:
    assert all(card_peak(gpu.card, "bf16") for gpu in GPUS.values())
    plan = make_plan(preset("gpt2-124m"), GPUS["V100"], 8)
    assert plan.tokens_per_second < 8 * 15.7e12 / 855e6
    config = dataclasses.replace(preset("gpt2-124m"), train=TrainConfig(precision="bf16"))
    with pytest.raises(RequestError, match="bfloat16"):
        make_plan(config, GPUS["V100"], 8)
    with pytest.raises(RequestError, match="known are"):
        find_gpu("A1000")


def test_the_run_by_minutes_ends_by_minutes() -> None:
    plan = make_plan(preset("demo"), GPUS["L4"], 1)
    assert plan.hours == pytest.approx(3 / 60)
    assert math.isfinite(plan.dollars)


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    argv = ["plan", "--gpu", "h100", "--gpus", "24", "--train.batch-tokens", str(384 * 1024), "--price", "2"]
    assert main([*argv, "--out", str(picture), "--json"]) == 0
    said = capsys.readouterr().out
    result = json.loads(said.splitlines()[-1])
    assert {"tokens_per_second", "hours", "dollars", "memory", "micro_batch", "communication_seconds"} <= result.keys()
    assert result["fits"]
    assert result["dollars"] == pytest.approx(result["hours"] * 24 * 2)
    assert [row["gpus"] for row in result["table"]] == sorted({*COUNTS, 24})
    assert "waiting for communication" in said
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(tmp_path.iterdir()) == [picture]


def test_what_cannot_be_trained_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--gpus", "7", "--json"]) == 0
    said = capsys.readouterr().out
    assert "cannot be shared by 7 GPUs" in said
    assert json.loads(said.splitlines()[-1])["fits"] is False


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--gpu", "H1000"], "known are A100-40"),
        (["--gpus", "0"], "--gpus must be at least 1"),
        (["--price", "-1"], "--price -1 must be above 0"),
        (["--price", "nan"], "--price nan must be above 0"),
        (["--preset", "gpt2-125m"], "did you mean gpt2-124m?"),
        (["--out", "plan.svg"], "must end in .png"),
        (["--out", "nowhere/plan.png"], "cannot write nowhere/plan.png"),
        (["--gpu", "T4", "--train.precision", "bf16"], "does not multiply bfloat16"),
        (["--train.batch-tokens", "1000"], "use "),
    ],
)
def test_wrong_requests(
    argv: list[str], expected: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *argv]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
