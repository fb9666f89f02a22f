"""GGUF: what the library's own reader finds in our file is the model, and what cannot be said there is refused."""

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpt2.checkpoint.gguf import write_gguf
from gpt2.config import GPTConfig
from gpt2.errors import RequestError, WorkError
from gpt2.model import GPT
from gpt2.tokenizer import Tokenizer

CONFIG = GPTConfig(vocab_size=300, n_ctx=16, n_layer=2, n_head=2, n_embd=32)
TEXT = "the people of these states have met and the congress will hear what the year has brought to them "


@pytest.fixture(scope="module")
def gguf() -> Any:
    return pytest.importorskip("gguf", reason="needs pip install 'build-gpt2[gguf]'")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT * 20], 300)


def model_of(config: GPTConfig = CONFIG) -> GPT:
    torch.manual_seed(0)
    model = GPT(config)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.wte.weight.data[config.vocab_size :] = 7.0  # the padding, which must not reach the file
    return model


def text_of(field: Any) -> str:
    return bytes(field.parts[field.data[0]]).decode()


def texts_of(field: Any) -> list[str]:
    return [bytes(field.parts[i]).decode() for i in field.data]


def number_of(field: Any) -> float:
    return field.parts[field.data[0]][0]  # type: ignore[no-any-return]


def expected_tensors(model: GPT) -> dict[str, np.ndarray]:
    """By llama.cpp's names, in float32, (out, in)."""
    ours = {
        "token_embd.weight": "wte.weight",
        "position_embd.weight": "wpe.weight",
        "output_norm.weight": "ln_f.weight",
        "output_norm.bias": "ln_f.bias",
    }
    theirs = {
        "attn_norm": "ln_1",
        "attn_qkv": "attn.c_attn",
        "attn_output": "attn.c_proj",
        "ffn_norm": "ln_2",
        "ffn_up": "mlp.c_fc",
        "ffn_down": "mlp.c_proj",
    }
    for layer in range(model.config.n_layer):
        for their, our in theirs.items():
            for kind in ("weight", "bias"):
                ours[f"blk.{layer}.{their}.{kind}"] = f"h.{layer}.{our}.{kind}"
    if not model.config.tie_embeddings:
        ours["output.weight"] = "lm_head.weight"
    state = model.state_dict()
    tensors = {their: state[our].numpy() for their, our in ours.items()}
    for name in ("token_embd.weight", "output.weight"):
        if name in tensors:
            tensors[name] = tensors[name][: model.config.vocab_size]
    return tensors


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quant", ["f16", "q8_0"])
def test_the_tensors_come_back(gguf: Any, tokenizer: Tokenizer, tmp_path: Path, quant: Any, tied: bool) -> None:
    model = model_of(replace(CONFIG, tie_embeddings=tied))
    path = tmp_path / "new" / "model.gguf"
    size = write_gguf(path, model.config, model.state_dict(), tokenizer, "name", quant)
    assert size == path.stat().st_size
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    expected = expected_tensors(model)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        tensor = found[name]
        assert tuple(int(n) for n in reversed(tensor.shape)) == values.shape, name
        read = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(values.shape)
        if values.ndim == 1 or name == "position_embd.weight":
            assert tensor.tensor_type.name == "F32", name
            assert np.array_equal(read, values), name
        elif quant == "f16":
            assert tensor.tensor_type.name == "F16", name
            assert np.array_equal(read, values.astype(np.float16).astype(np.float32)), name
        else:
            assert tensor.tensor_type.name == "Q8_0", name
            blocks = values.reshape(-1, 32)
            largest = np.abs(blocks).max(axis=1, keepdims=True)
            # Half a step of largest / 127, and the scale's own rounding to 11 bits, 127 times.
            assert np.all(np.abs(read.reshape(-1, 32) - blocks) <= largest * (0.5 / 127 + 2**-11) + 1e-8), name


@pytest.mark.parametrize("kind", ["gpt2", "bpe"])
def test_the_facts_and_the_tokenizer(gguf: Any, tokenizer: Tokenizer, tmp_path: Path, kind: str) -> None:
    tokenizer = tokenizer if kind == "bpe" else Tokenizer.from_name("gpt2")
    config = replace(CONFIG, vocab_size=tokenizer.vocab_size, layer_norm_epsilon=1e-6)
    model = model_of(config)
    write_gguf(tmp_path / "m.gguf", config, model.state_dict(), tokenizer, "the name")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    texts = {
        "general.architecture": "gpt2",
        "general.name": "the name",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
    }
    for name, value in texts.items():
        assert text_of(fields[name]) == value, name
    numbers = {
        "gpt2.context_length": 16,
        "gpt2.embedding_length": 32,
        "gpt2.feed_forward_length": 128,
        "gpt2.block_count": 2,
        "gpt2.attention.head_count": 2,
        "tokenizer.ggml.bos_token_id": tokenizer.eot,
        "tokenizer.ggml.eos_token_id": tokenizer.eot,
        "tokenizer.ggml.add_bos_token": False,
    }
    for name, value in numbers.items():
        assert number_of(fields[name]) == value, name
    assert number_of(fields["gpt2.attention.layer_norm_epsilon"]) == pytest.approx(1e-6)
    tokenizer.save(tmp_path)  # what transformers opens says the same
    merges = (tmp_path / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert texts_of(fields["tokenizer.ggml.merges"]) == merges
    tokens = texts_of(fields["tokenizer.ggml.tokens"])
    assert tokens == tokenizer.spelled
    assert tokens[-1] == "<|endoftext|>"
    types = [int(fields["tokenizer.ggml.token_type"].parts[i][0]) for i in fields["tokenizer.ggml.token_type"].data]
    assert types == [1] * (len(tokens) - 1) + [3]


def test_the_same_model_gives_the_same_bytes(gguf: Any, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = model_of()
    for name in ("a", "b"):
        write_gguf(tmp_path / name, CONFIG, model.state_dict(), tokenizer, "name", "q8_0")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def refused(path: Path, said: str, *arguments: Any) -> None:
    with pytest.raises(RequestError, match=said):
        write_gguf(path, *arguments)
    assert not path.parent.exists()


def test_what_cannot_be_said_in_it_is_refused(gguf: Any, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "new" / "m.gguf"
    weights = model_of().state_dict()
    plain = Tokenizer.from_name("bytes")
    refused(path, "they do not belong together", CONFIG, weights, plain, "n")
    small = replace(CONFIG, vocab_size=257)
    refused(path, "bytes has none: train on", small, model_of(small).state_dict(), plain, "n")
    refused(path, "use f16 or q8_0", CONFIG, weights, tokenizer, "n", "q4_k")
    narrow = replace(CONFIG, n_embd=48)
    state = model_of(narrow).state_dict()
    refused(path, r"n_embd = 48 is no multiple", narrow, state, tokenizer, "n", "q8_0")
    write_gguf(tmp_path / "narrow.gguf", narrow, state, tokenizer, "n", "f16")
    for value in (7e4, float("inf"), float("nan")):
        broken = {name: tensor.clone() for name, tensor in weights.items()}
        broken["h.1.mlp.c_fc.weight"][0, 0] = value
        refused(path, r"h\.1\.mlp\.c_fc\.weight holds", CONFIG, broken, tokenizer, "n", "f16")


def test_without_the_package_its_extra_is_named(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(tmp_path / "new" / "m.gguf", r"build-gpt2\[gguf\]", CONFIG, model_of().state_dict(), tokenizer, "n")


def test_a_full_disk_leaves_nothing(
    gguf: Any, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: object, tensor: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    path = tmp_path / "new" / "m.gguf"
    with caplog.at_level(logging.CRITICAL), pytest.raises(WorkError, match="No space left"):
        write_gguf(path, CONFIG, model_of().state_dict(), tokenizer, "n")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_stays(gguf: Any, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_text("mine")
    with pytest.raises(RequestError, match="exists already"):
        write_gguf(path, CONFIG, model_of().state_dict(), tokenizer, "n")
    assert path.read_text() == "mine"
