"""Bits per byte against a plain loop over the windows."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2.config import GPTConfig
from gpt2.data.prepare import prepare
from gpt2.data.shards import Dataset
from gpt2.distributed import Distributed
from gpt2.errors import RequestError
from gpt2.evaluation.loss import evaluate_loss, evaluate_model_loss
from gpt2.model import GPT
from gpt2.tokenizer import Tokenizer

ALONE = Distributed(rank=0, world_size=1, device=torch.device("cpu"))
CONFIG = GPTConfig(vocab_size=300, n_ctx=32, n_layer=1, n_head=2, n_embd=16)


@pytest.fixture(scope="module")
def dataset(text_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    out = tmp_path_factory.mktemp("bpe") / "data"
    prepare(str(text_directory), out, "bpe:300", shard_tokens=100)
    return Dataset.open(out)


def plain_nats(model: GPT, tokens: list[int], context: int) -> float:
    """One window after the other, the last one shorter."""
    total = 0.0
    for start in range(0, len(tokens) - 1, context):
        window = torch.tensor(tokens[start : start + context + 1])
        logits, _ = model(window[None, :-1])
        total += F.cross_entropy(logits[0], window[1:], reduction="sum").item()
    return total


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_equals_the_plain_loop_with_the_last_partial_window(dataset: Dataset, batch: int) -> None:
    torch.manual_seed(0)
    model = GPT(CONFIG)
    split = dataset.split("val")
    tokens = split.read(0, split.tokens).tolist()
    assert (len(tokens) - 1) % CONFIG.n_ctx != 0
    result = evaluate_model_loss(model, dataset.tokenizer, dataset, batch=batch)
    nats = plain_nats(model, tokens, CONFIG.n_ctx)
    assert result.nats == pytest.approx(nats, rel=1e-5)
    assert result.tokens == len(tokens) - 1
    assert result.bytes == split.bytes
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / split.bytes, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nats / (len(tokens) - 1)), rel=1e-5)


def test_windows_limits_tokens_and_their_bytes(dataset: Dataset) -> None:
    model = GPT(CONFIG)
    split = dataset.split("val")
    result = evaluate_model_loss(model, dataset.tokenizer, dataset, windows=3)
    assert result.tokens == 3 * 32
    assert result.bytes == len(dataset.tokenizer.decode_bytes(split.read(1, 3 * 32 + 1)))
    assert result.nats == pytest.approx(plain_nats(model, split.read(0, 3 * 32 + 1).tolist(), 32), rel=1e-5)


def test_a_uniform_guess_of_bytes_costs_their_logarithm(data: Path) -> None:
    split = Dataset.open(data).split("val")

    def uniform(idx: Tensor, targets: Tensor) -> Tensor:
        return torch.tensor(math.log(257))

    result = evaluate_loss(uniform, split, Tokenizer.from_name("bytes"), 32, ALONE)
    expected = math.log2(257) * (split.tokens - 1) / split.bytes  # end-of-text costs too, and counts no byte
    assert result.bits_per_byte == pytest.approx(expected)


def test_every_pass_has_one_shape(dataset: Dataset) -> None:
    shapes = set()

    def record(idx: Tensor, targets: Tensor) -> Tensor:
        shapes.add((tuple(idx.shape), tuple(targets.shape)))
        return torch.tensor(1.0)

    evaluate_loss(record, dataset.split("val"), dataset.tokenizer, 32, ALONE, batch=5)
    assert shapes == {((5, 32), (5, 32))}


def test_refuses_another_tokenizer_and_a_missing_split(dataset: Dataset, tmp_path: Path) -> None:
    model = GPT(replace(CONFIG, vocab_size=257))
    with pytest.raises(RequestError, match="differs from the model's"):
        evaluate_model_loss(model, Tokenizer.from_name("bytes"), dataset)
    with pytest.raises(RequestError, match="no split 'test'"):
        evaluate_model_loss(GPT(CONFIG), dataset.tokenizer, dataset, split="test")


@torch.no_grad()
def strided_nats(model: GPT, tokens: list[int], context: int, stride: int) -> tuple[float, int]:
    """Target by target: which window counts it first, and what it costs there."""
    total, counted = 0.0, 0
    for target in range(1, len(tokens)):
        window = max(0, -(-(target - context) // stride))  # the first whose last target is not before this one
        start = window * stride
        logits, _ = model(torch.tensor(tokens[start:target])[None])
        total += F.cross_entropy(logits[0, -1:], torch.tensor(tokens[target : target + 1])).item()
        counted += 1
    return total, counted


@pytest.mark.parametrize("stride", [1, 7, 16, 31, 32])
def test_strided_windows_count_each_target_once_with_more_context(dataset: Dataset, stride: int) -> None:
    torch.manual_seed(0)
    model = GPT(CONFIG).eval()
    split = dataset.split("val")
    tokens = split.read(0, split.tokens).tolist()
    result = evaluate_model_loss(model, dataset.tokenizer, dataset, stride=stride, batch=5)
    nats, counted = strided_nats(model, tokens, CONFIG.n_ctx, stride)
    assert (result.tokens, result.bytes) == (counted, split.bytes)
    assert result.nats == pytest.approx(nats, rel=1e-5)


def test_so_many_strided_windows(dataset: Dataset) -> None:
    model = GPT(CONFIG)
    result = evaluate_model_loss(model, dataset.tokenizer, dataset, stride=8, windows=3, batch=2)
    assert result.tokens == 32 + 2 * 8
    tokens = dataset.split("val").read(0, 49).tolist()
    assert result.nats == pytest.approx(strided_nats(model, tokens, 32, 8)[0], rel=1e-5)


def test_a_context_longer_than_the_split(dataset: Dataset) -> None:
    model = GPT(replace(CONFIG, n_ctx=4096))
    split = dataset.split("val")
    result = evaluate_model_loss(model, dataset.tokenizer, dataset, stride=100, batch=1)
    assert result.tokens == split.tokens - 1
    assert result.nats == pytest.approx(plain_nats(model, split.read(0, split.tokens).tolist(), 4096), rel=1e-5)


@pytest.mark.parametrize("stride", [-1, 33])
def test_refuses_a_stride_out_of_range(dataset: Dataset, stride: int) -> None:
    with pytest.raises(RequestError, match=r"must be in 1\.\.32"):
        evaluate_model_loss(GPT(CONFIG), dataset.tokenizer, dataset, stride=stride)
