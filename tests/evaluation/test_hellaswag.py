"""HellaSwag against the plain formula: one item at a time, four padded rows, the whole head, in float32."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gpt2.config import GPTConfig
from gpt2.errors import RequestError, WorkError
from gpt2.evaluation.hellaswag import (
    HellaSwagResult,
    Item,
    download,
    evaluate_hellaswag,
    losses,
    read_items,
    tokenize,
)
from gpt2.model import GPT
from gpt2.tokenizer import Tokenizer

CPU = torch.device("cpu")
SENTENCE = "the man stands on a roof and throws snow down he then she walks away with skis in hand – é 世"


def make_items(n: int, seed: int = 0, shortest: int = 3, longest: int = 20) -> list[Item]:
    draw = np.random.default_rng(seed)

    def text() -> str:
        return " ".join(draw.choice(SENTENCE.split(), draw.integers(shortest, longest)))

    return [Item(text() + ".", tuple(text() for _ in range(4)), int(draw.integers(4))) for _ in range(n)]


def make_model(n_ctx: int, seed: int = 0, vocab_size: int = 257) -> GPT:
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=vocab_size, n_ctx=n_ctx, n_layer=2, n_head=2, n_embd=32)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


@torch.no_grad()
def plain_predictions(model: GPT, items: list[Item], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """(acc's choice, acc_norm's choice) of each item, from its text."""
    n_ctx = model.config.n_ctx
    by_sum, by_mean = [], []
    for item in items:
        context = tokenizer.encode(item.context)
        endings = [tokenizer.encode(" " + ending)[:n_ctx] for ending in item.endings]
        context = context[-(n_ctx + 1 - max(map(len, endings))) :]
        length = len(context) + max(map(len, endings))
        tokens, mask = torch.zeros(4, length, dtype=torch.int64), torch.zeros(4, length)
        for row, ending in enumerate(endings):
            tokens[row, : len(context) + len(ending)] = torch.tensor(context + ending)
            mask[row, len(context) : len(context) + len(ending)] = 1
        logits = model(tokens[:, :-1])[0]
        nats = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(4, -1)
        sums = (nats.double() * mask[:, 1:]).sum(1)
        by_sum.append(int(sums.argmin()))
        by_mean.append(int((sums / mask[:, 1:].sum(1)).argmin()))
    return by_sum, by_mean


@pytest.mark.parametrize(
    ("tokenizer", "n_ctx", "n"),
    [("bytes", 256, 200), ("bytes", 64, 200), ("gpt2", 128, 20)],
    ids=["fits", "contexts and endings are cut", "gpt2"],
)
def test_each_prediction_equals_the_plain_formulas(tokenizer: str, n_ctx: int, n: int) -> None:
    items, words = make_items(n), Tokenizer.from_name(tokenizer)
    model = make_model(n_ctx, vocab_size=words.vocab_size)
    tokenized = tokenize(items, words, n_ctx)
    sums, tokens = losses(model, tokenized.questions, n_ctx, CPU, precision="fp32")
    by_sum, by_mean = plain_predictions(model, items, words)
    assert sums.argmin(1).tolist() == by_sum
    assert (sums / tokens).argmin(1).tolist() == by_mean
    assert by_sum != by_mean
    result = evaluate_hellaswag(model, tokenized, n_ctx, CPU, precision="fp32")
    labels = [item.label for item in items]
    assert result.correct == sum(a == b for a, b in zip(by_sum, labels, strict=True))
    assert result.correct_norm == sum(a == b for a, b in zip(by_mean, labels, strict=True))
    assert (result.acc, result.acc_norm) == (result.correct / n, result.correct_norm / n)


def test_what_is_cut_is_counted() -> None:
    words = Tokenizer.from_name("bytes")
    items = [
        Item("a" * 10, ("b",) * 4, 0),
        Item("a" * 20, ("b",) * 4, 0),
        Item("0123456789", ("b" * 9, "c", "d", "e"), 0),
        Item("a", ("b" * 30, "b" * 40, "c", "d"), 0),
        Item("", ("b", "c", "d", "e"), 0),
    ]
    tokenized = tokenize(items, words, 16)
    assert (tokenized.contexts_cut, tokenized.endings_cut) == (2, 2)
    contexts = [bytes(i for i in q.context if i < 256).decode() for q in tokenized.questions]
    assert contexts == ["a" * 10, "a" * 15, "3456789", "a", ""]
    assert tokenized.questions[4].context == [words.eot]
    assert [len(e) for e in tokenized.questions[3].endings] == [16, 16, 2, 2]
    result = evaluate_hellaswag(make_model(16), tokenized, 16, CPU)
    assert (result.items, result.contexts_cut, result.endings_cut) == (5, 2, 2)


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_the_shares_of_several_processes_add_up(world_size: int) -> None:
    model = make_model(128)
    items = tokenize(make_items(20), Tokenizer.from_name("bytes"), 128)
    whole = evaluate_hellaswag(model, items, 128, CPU)
    total = HellaSwagResult(0, 0, 0, 0, 0, 0.0)
    for rank in range(world_size):
        total += evaluate_hellaswag(model, items, 128, CPU, rank, world_size)
    assert (total.items, total.correct, total.correct_norm) == (20, whole.correct, whole.correct_norm)
    assert (total.contexts_cut, total.endings_cut) == (whole.contexts_cut, whole.endings_cut)


def as_lines(items: list[Item]) -> str:
    return "".join(
        json.dumps({"ctx": i.context, "endings": list(i.endings), "label": i.label}, ensure_ascii=False) + "\n"
        for i in items
    )


def test_items_are_read_and_evenly_spaced(tmp_path: Path) -> None:
    items, path = make_items(10), tmp_path / "items.jsonl"
    path.write_text(as_lines(items), encoding="utf-8")
    assert read_items(path) == items
    assert read_items(path, 5) == items[::2]
    assert read_items(path, 3) == [items[0], items[3], items[6]]
    assert read_items(path, 99) == items
    path.write_text(as_lines(items).replace('"label": 1', '"label": "1"'), encoding="utf-8")  # as Hugging Face has it
    assert read_items(path) == items


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no HellaSwag items"),
        (b'{"ctx": "a", "endings": ["b", "c", "d"], "label": 0}', "line 1 is no HellaSwag item"),
        (b'{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": 4}', "line 1 is no HellaSwag item"),
        (b'{"ctx": "a", "endings": ["b", "c", "d", 5], "label": 0}', "line 1 is no HellaSwag item"),
        (b'{"ctx": "a", "label": 0}', "line 1 is no HellaSwag item"),
        (b"[]", "line 1 is no HellaSwag item"),
        (b'{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": 0}\n\n{"ctx', "line 3 is no HellaSwag item"),
        (b"\xff", "not UTF-8 at byte 0"),
    ],
)
def test_a_file_of_another_kind_is_refused_by_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "items.jsonl"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=message):
        read_items(path)
    with pytest.raises(RequestError, match="cannot read"):
        read_items(tmp_path / "none")


def test_a_download_is_kept_and_its_hash_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "source.jsonl"
    source.write_text(as_lines(make_items(3)), encoding="utf-8")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    path = download(source.as_uri(), digest)
    assert path.parent == tmp_path / "cache" / "build-gpt2"
    assert path.read_bytes() == source.read_bytes()

    content = source.read_bytes()
    source.unlink()
    assert download(source.as_uri(), digest) == path  # it is there already
    path.write_bytes(b"altered")
    with pytest.raises(WorkError, match=r"cannot download .* give --file"):
        download(source.as_uri(), digest)
    source.write_bytes(content + b"\n")
    with pytest.raises(WorkError, match="is not the published HellaSwag file"):
        download(source.as_uri(), digest)
    assert os.listdir(path.parent) == [path.name]
    assert path.read_bytes() == b"altered"


@pytest.mark.interop
def test_openais_weights_score_as_published() -> None:
    """GPT-2 124M: acc 0.2859, acc_norm 0.2955 on all 10,042 items."""
    from gpt2.inference.engine import load

    try:
        engine = load("openai-community/gpt2")
        items = read_items()
    except (RequestError, WorkError) as error:
        pytest.skip(f"OpenAI's weights or HellaSwag cannot be had here: {error}")
    device = engine.model.wte.weight.device
    result = evaluate_hellaswag(engine.model, tokenize(items, engine.tokenizer, 1024), 1024, device, precision="fp32")
    assert result.items == 10_042
    assert round(result.acc, 4) == 0.2859
    assert round(result.acc_norm, 4) == 0.2955
