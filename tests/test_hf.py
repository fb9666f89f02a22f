"""Hugging Face <-> ours: exact both ways, and everything that is not GPT-2 refused by name."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from gpt2 import hf
from gpt2.checkpoint.directory import TrainingState, write_checkpoint
from gpt2.config import GPTConfig
from gpt2.errors import RequestError
from gpt2.inference.engine import load
from gpt2.model import GPT
from gpt2.tokenizer import Tokenizer

CONFIG = GPTConfig(vocab_size=300, n_ctx=16, n_layer=2, n_head=2, n_embd=16)


def model_of(config: GPTConfig = CONFIG) -> GPT:
    torch.manual_seed(0)
    return GPT(config)


def write(directory: Path, tensors: dict[str, Tensor], **changes: object) -> Path:
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    values = hf.config_to_hf(CONFIG, 299) | changes
    (directory / "config.json").write_text(json.dumps(values))
    return directory


@pytest.mark.parametrize("tied", [True, False])
def test_ours_to_theirs_and_back_is_exact(tied: bool) -> None:
    config = replace(CONFIG, tie_embeddings=tied)
    state = model_of(config).state_dict()
    back = hf.from_hf(hf.to_hf(state, config), config)
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor), name


def test_theirs_to_ours_and_back_is_exact(tmp_path: Path) -> None:
    torch.manual_seed(1)
    sizes = {"vocab_size": 300, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    theirs = GPT2LMHeadModel(GPT2Config(**sizes))
    theirs.save_pretrained(tmp_path)
    model = GPT.from_pretrained(tmp_path)
    again = hf.to_hf(model.state_dict(), model.config)
    expected = {name: t for name, t in theirs.state_dict().items() if name != "lm_head.weight"}
    assert again.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(again[name], tensor), name
    idx = torch.arange(16)[None]
    torch.testing.assert_close(model(idx)[0], theirs.eval()(idx).logits, rtol=0, atol=1e-5)


def test_openais_own_names_and_mask_buffers_are_read(tmp_path: Path) -> None:
    model = model_of()
    tensors = {n.removeprefix("transformer."): t for n, t in hf.to_hf(model.state_dict(), CONFIG).items()}
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 16, 16).tril() for i in range(2)}
    tensors |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    read = GPT.from_pretrained(write(tmp_path / "m", tensors))
    for name, tensor in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name
    assert read.lm_head.weight is read.wte.weight


def test_shards_are_read(tmp_path: Path) -> None:
    tensors = hf.to_hf(model_of().state_dict(), CONFIG)
    directory = write(tmp_path / "m", tensors)
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, directory / file)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(GPT.from_pretrained(directory).wte.weight[:300], tensors["transformer.wte.weight"])
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(RequestError, match="cannot be read"):
        GPT.from_pretrained(directory)


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name) or None


def reshape(tensors: dict[str, Tensor]) -> None:
    tensors["transformer.ln_f.bias"] = torch.zeros(17)


def extra(tensors: dict[str, Tensor]) -> None:
    tensors["transformer.h.7.attn.q_norm.weight"] = torch.zeros(3)


def other_head(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = torch.zeros(300, 16)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (without("transformer.h.1.mlp.c_fc.bias"), r"h\.1\.mlp\.c_fc\.bias is missing"),
        (reshape, r"ln_f\.bias has shape \(17,\) where config\.json says \(16,\)"),
        (extra, r"h\.7\.attn\.q_norm\.weight is not of GPT-2"),
        (other_head, r"lm_head\.weight differs from wte\.weight"),
    ],
)
def test_wrong_tensors_are_named(tmp_path: Path, change: Callable[[dict[str, Tensor]], None], expected: str) -> None:
    tensors = hf.to_hf(model_of().state_dict(), CONFIG)
    change(tensors)
    with pytest.raises(RequestError, match=expected) as error:
        GPT.from_pretrained(write(tmp_path / "m", tensors))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "llama"),
        ("activation_function", "relu"),
        ("n_inner", 17),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("reorder_and_upcast_attn", True),
        ("n_layer", "two"),
        ("n_head", 3),
    ],
)
def test_other_architectures_are_named(tmp_path: Path, field: str, value: object) -> None:
    directory = write(tmp_path / "m", hf.to_hf(model_of().state_dict(), CONFIG), **{field: value})
    with pytest.raises(RequestError) as error:
        GPT.from_pretrained(directory)
    assert "\n" not in str(error.value)
    assert field in str(error.value) or "not a GPT-2 config.json" in str(error.value)


def test_an_n_inner_that_says_what_gpt2_is_is_taken(tmp_path: Path) -> None:
    GPT.from_pretrained(write(tmp_path / "m", hf.to_hf(model_of().state_dict(), CONFIG), n_inner=64))


def test_pickle_is_never_opened(tmp_path: Path) -> None:
    directory = write(tmp_path / "m", hf.to_hf(model_of().state_dict(), CONFIG))
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(RequestError, match="pickle only, which is never opened"):
        GPT.from_pretrained(directory)


@pytest.mark.parametrize("size", [0, 4, 100, 5000])
def test_a_damaged_file_is_one_line(tmp_path: Path, size: int) -> None:
    directory = write(tmp_path / "m", hf.to_hf(model_of().state_dict(), CONFIG))
    content = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(content[:size])
    with pytest.raises(RequestError, match="cannot be read") as error:
        GPT.from_pretrained(directory)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"model_type": "gpt2"}', "null", '"x"'])
def test_a_bad_config_is_one_line(tmp_path: Path, text: str) -> None:
    directory = write(tmp_path / "m", hf.to_hf(model_of().state_dict(), CONFIG))
    (directory / "config.json").write_text(text)
    with pytest.raises(RequestError) as error:
        GPT.from_pretrained(directory)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["gpt2", "bytes", "bpe:320"])
def test_a_checkpoint_opens_in_transformers(tmp_path: Path, kind: str) -> None:
    text = "The people of these States, and it's 1790:\n\n  two  spaces, é 世界 — done. " * 3
    if kind.startswith("bpe"):
        tokenizer = Tokenizer.train([text * 3 + "a state of the union of peoples " * 9], 320)
    else:
        tokenizer = Tokenizer.from_name(kind)
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, n_ctx=128, n_layer=2, n_head=2, n_embd=16))
    for parameter in model.parameters():
        parameter.data.mul_(4)  # far from an even guess, so that greedy choices are clear
    step = write_checkpoint(tmp_path, model.config, model.state_dict(), tokenizer, {}, TrainingState(step=12))
    theirs = AutoModelForCausalLM.from_pretrained(step)
    their_tokenizer = AutoTokenizer.from_pretrained(step)
    assert type(theirs).__name__ == "GPT2LMHeadModel"
    assert theirs.dtype == torch.float32
    assert their_tokenizer.eos_token_id == tokenizer.eot == theirs.config.eos_token_id
    ids = their_tokenizer(text).input_ids
    assert ids == tokenizer.encode(text)
    assert their_tokenizer.decode(ids) == text

    prompt = "The people"
    start = torch.tensor([tokenizer.encode(prompt)])
    generated = theirs.generate(start, max_new_tokens=20, do_sample=False)[0, start.size(1) :].tolist()
    if tokenizer.eot in generated:
        generated = generated[: generated.index(tokenizer.eot)]
    assert load(step).generate(prompt, max_tokens=20, temperature=0) == tokenizer.decode(generated)


def test_names_that_are_nowhere_are_one_line(tmp_path: Path) -> None:
    for name in ("./nowhere", str(tmp_path / "nothing"), str(tmp_path)):
        with pytest.raises(RequestError) as error:
            hf.read_pretrained(name)
        assert "\n" not in str(error.value)
