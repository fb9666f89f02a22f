"""Hugging Face <-> ours: exact both ways, and everything that is not GPT-2 refused by name."""

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from gpt2 import hf
from gpt2.checkpoint.directory import TrainingState, write_checkpoint
from gpt2.config import GPTConfig
from gpt2.errors import RequestError
from gpt2.inference import engine
from gpt2.model import GPT
from gpt2.tokenizer import Tokenizer

CONFIG = GPTConfig(vocab_size=300, n_ctx=16, n_layer=2, n_head=2, n_embd=16)


def model_of(config: GPTConfig = CONFIG) -> GPT:
    torch.manual_seed(0)
    return GPT(config)


def refused(directory: str | Path, *expected: str) -> None:
    """Reading it is refused in one line that says all that is expected."""
    with pytest.raises(RequestError) as error:
        GPT.from_pretrained(directory)
    said = str(error.value)
    assert len(said.splitlines()) == 1
    for text in expected:
        assert text in said


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
    refused(directory, str(directory), "model-00002-of-00002.safetensors cannot be read")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"wte.weight": 3}}',
        '{"weight_map": {"wte.weight": ["a"]}}',
        '{"weight_map": {"wte.weight": "../model.safetensors"}}',
        '{"weight_map": {"wte.weight": "/etc/passwd"}}',
        '{"weight_map": {"wte.weight": ".."}}',
        '{"weight_map": {"wte.weight": ""}}',
        '{"weight_map": {}}',
        "[" * 5000,
    ],
)
def test_a_bad_list_of_shards_is_one_line(tmp_path: Path, text: str) -> None:
    directory = write(tmp_path / "m", hf.to_hf(model_of().state_dict(), CONFIG))
    (directory / "model.safetensors.index.json").write_text(text)
    refused(directory, str(directory))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_read_as_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: t.to(dtype) for name, t in hf.to_hf(model_of().state_dict(), CONFIG).items()}
    model = GPT.from_pretrained(write(tmp_path / "m", tensors))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for name, tensor in hf.to_hf(model.state_dict(), CONFIG).items():
        assert torch.equal(tensor, tensors[name].float()), name


def test_an_untied_head_gives_the_same_logits_there(tmp_path: Path) -> None:
    config = replace(CONFIG, tie_embeddings=False)
    model = model_of(config).eval()
    values = hf.config_to_hf(config, 299)
    assert values["tie_word_embeddings"] is False
    directory = write(tmp_path / "m", hf.to_hf(model.state_dict(), config), tie_word_embeddings=False)
    theirs = AutoModelForCausalLM.from_pretrained(directory)
    idx = torch.arange(16)[None]
    assert not torch.equal(theirs.lm_head.weight, theirs.transformer.wte.weight)
    torch.testing.assert_close(theirs(idx).logits, model(idx)[0], rtol=0, atol=1e-5)
    back = GPT.from_pretrained(directory)
    assert torch.equal(back(idx)[0], model(idx)[0])
    tensors = hf.to_hf(model.state_dict(), config)
    del tensors["lm_head.weight"]
    refused(write(tmp_path / "n", tensors, tie_word_embeddings=False), "the tensor lm_head.weight is missing")


def test_a_dropped_padding_comes_back_as_zeros(tmp_path: Path) -> None:
    model = model_of()
    model.wte.weight.data[300:] = 7.0  # cannot happen in training; must not reach the disk all the same
    tensors = hf.to_hf(model.state_dict(), CONFIG)
    assert tensors["transformer.wte.weight"].shape == (300, 16)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    read = GPT.from_pretrained(write(tmp_path / "m", tensors))
    assert read.wte.weight.shape == (384, 16)
    assert torch.count_nonzero(read.wte.weight[300:]) == 0


def test_reading_draws_nothing_and_gives_a_network_to_evaluate_or_train(tmp_path: Path) -> None:
    directory = write(tmp_path / "m", hf.to_hf(model_of().state_dict(), CONFIG))
    before = torch.get_rng_state()
    model = GPT.from_pretrained(str(directory))
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training
    assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())


@pytest.mark.parametrize("name", sorted(hf.to_hf(model_of().state_dict(), CONFIG)))
def test_each_tensor_is_needed_in_its_shape_and_kind(name: str) -> None:
    tensors = hf.to_hf(model_of().state_dict(), CONFIG)
    ours = name.removeprefix("transformer.")
    for wrong in (tensors[name][1:], tensors[name][..., None], tensors[name].flatten()[:1]):
        with pytest.raises(RequestError) as error:
            hf.from_hf(tensors | {name: wrong}, CONFIG)
        said = f"the tensor {ours} has shape {tuple(wrong.shape)} where config.json says {tuple(tensors[name].shape)}"
        assert str(error.value) == said
    with pytest.raises(RequestError, match=f"the tensor {ours} holds int8, not floating-point numbers"):
        hf.from_hf(tensors | {name: tensors[name].to(torch.int8)}, CONFIG)
    del tensors[name]
    with pytest.raises(RequestError, match=f"the tensor {ours} is missing"):
        hf.from_hf(tensors, CONFIG)


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
        ("model_type", None),
        ("activation_function", "gelu"),
        ("n_inner", 64.5),
        ("add_cross_attention", True),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("reorder_and_upcast_attn", True),
        ("n_layer", "two"),
        ("n_head", 3),
        ("n_embd", 0),
        ("layer_norm_epsilon", -1.0),
        ("n_layer", 2.5),
        ("n_layer", 2.0),
        ("n_layer", "2"),
        ("n_layer", True),
        ("n_head", None),
        ("n_embd", "16"),
        ("n_positions", 16.0),
        ("vocab_size", [300]),
        ("layer_norm_epsilon", "1e-5"),
        ("layer_norm_epsilon", True),
        ("tie_word_embeddings", "false"),
        ("tie_word_embeddings", 1),
        ("scale_attn_weights", "true"),
        ("scale_attn_weights", 1),
        ("reorder_and_upcast_attn", "no"),
        ("reorder_and_upcast_attn", None),
        ("n_inner", 64.0),
        ("n_inner", True),
    ],
)
def test_other_architectures_are_named(tmp_path: Path, field: str, value: object) -> None:
    directory = write(tmp_path / "m", hf.to_hf(model_of().state_dict(), CONFIG), **{field: value})
    refused(directory, str(directory), "not a GPT-2 config.json" if value == "two" else field)


def test_more_layers_than_there_are_is_a_missing_tensor(tmp_path: Path) -> None:
    """Said at once, also where the config claims a thousand million of them."""
    tensors = hf.to_hf(model_of().state_dict(), CONFIG)
    refused(write(tmp_path / "m", tensors, n_layer=10**9), "h.2.ln_1.weight is missing")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda x: st.lists(x, max_size=2) | st.dictionaries(st.text(max_size=3), x, max_size=2),
    max_leaves=3,
)
NUMBERS = st.sampled_from([0, -1, 2.5, 10**400, float("inf"), float("nan"), "2", "two", None, [], {}])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from(sorted(hf.config_to_hf(CONFIG, 299))), JSON | NUMBERS, max_size=3))
def test_any_config_is_gpt2_or_one_line(changes: dict[str, object]) -> None:
    values = hf.config_to_hf(CONFIG, 299) | changes
    try:
        config = hf.config_from_hf(values)
    except RequestError as error:
        said = str(error)
    else:
        assert hf.config_from_hf(hf.config_to_hf(config, 299)) == config
        return
    assert len(said.splitlines()) == 1


def test_the_config_comes_back(tmp_path: Path) -> None:
    for config in (CONFIG, replace(CONFIG, tie_embeddings=False, layer_norm_epsilon=1e-6), GPTConfig()):
        assert hf.config_from_hf(json.loads(json.dumps(hf.config_to_hf(config, 1)))) == config
    old = {"model_type": "gpt2", "vocab_size": 300, "n_ctx": 16, "n_layer": 2, "n_head": 2, "n_embd": 16}
    assert hf.config_from_hf(old) == CONFIG  # OpenAI's own file: n_ctx, and the defaults unsaid


def test_an_n_inner_that_says_what_gpt2_is_is_taken(tmp_path: Path) -> None:
    GPT.from_pretrained(write(tmp_path / "m", hf.to_hf(model_of().state_dict(), CONFIG), n_inner=64))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "ckpt.pt", "model.pth", "lightning.ckpt", "model.pkl"])
def test_pickle_is_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    directory = write(tmp_path / "m", hf.to_hf(model_of().state_dict(), CONFIG))
    (directory / "model.safetensors").unlink()
    (directory / name).write_bytes(pickle.dumps(Trap()))
    refused(directory, str(directory), "pickle only, which is never opened")
    assert not Trap.sprung


class Trap:
    """Notes when it is unpickled."""

    sprung = False

    def __reduce__(self) -> tuple[object, ...]:
        return setattr, (Trap, "sprung", True)


def test_other_formats_alone_are_one_line(tmp_path: Path) -> None:
    directory = write(tmp_path / "m", hf.to_hf(model_of().state_dict(), CONFIG))
    (directory / "model.safetensors").rename(directory / "tf_model.h5")
    refused(directory, str(directory), "model.safetensors is missing: only weights in safetensors are read")


def test_of_a_tied_pair_either_name_will_do(tmp_path: Path) -> None:
    tensors = hf.to_hf(model_of().state_dict(), CONFIG)
    tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")
    read = GPT.from_pretrained(write(tmp_path / "m", tensors))
    assert torch.equal(read.wte.weight, model_of().wte.weight)
    assert read.lm_head.weight is read.wte.weight


@pytest.mark.parametrize("value", [float("nan"), 0.5])
def test_a_stored_head_must_be_the_embedding(tmp_path: Path, value: float) -> None:
    """In a single number, and at another precision."""
    tensors = hf.to_hf(model_of().state_dict(), CONFIG)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    tensors["lm_head.weight"][299, 15] = value
    refused(write(tmp_path / "m", tensors), "lm_head.weight differs from wte.weight")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].half()
    refused(write(tmp_path / "m", tensors), "lm_head.weight differs from wte.weight")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"][:299].clone()
    refused(write(tmp_path / "m", tensors), "lm_head.weight differs from wte.weight")


def test_a_tensor_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    tensors = hf.to_hf(model_of().state_dict(), CONFIG)
    tensors["ln_f.bias"] = tensors["transformer.ln_f.bias"] + 1
    refused(write(tmp_path / "m", tensors), "the tensor ln_f.bias is there twice")


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("head", ["none", "tied", "untied"])
@pytest.mark.parametrize("shards", [1, 3])
def test_all_ways_of_storing_a_gpt2_are_read_alike(tmp_path: Path, prefix: str, head: str, shards: int) -> None:
    config = replace(CONFIG, tie_embeddings=head != "untied")
    model = model_of(config)
    tensors = {
        name if name == "lm_head.weight" else prefix + name.removeprefix("transformer."): tensor
        for name, tensor in hf.to_hf(model.state_dict(), config).items()
    }
    tensors |= {f"{prefix}h.{i}.attn.bias": torch.ones(1, 1, 16, 16).tril() for i in range(2)}
    tensors |= {f"{prefix}h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    if head == "tied":
        tensors["lm_head.weight"] = tensors[f"{prefix}wte.weight"].clone()
    directory = write(tmp_path / "m", tensors, tie_word_embeddings=config.tie_embeddings)
    if shards > 1:
        (directory / "model.safetensors").unlink()
        names = sorted(tensors)
        files = {f"model-{i + 1:05d}-of-{shards:05d}.safetensors": names[i::shards] for i in range(shards)}
        for file, part in files.items():
            save_file({name: tensors[name] for name in part}, directory / file)
        index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    read = GPT.from_pretrained(directory)
    assert read.config == config
    for name, tensor in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name


@pytest.mark.parametrize("size", [0, 4, 100, 5000])
def test_a_damaged_file_is_one_line(tmp_path: Path, size: int) -> None:
    directory = write(tmp_path / "m", hf.to_hf(model_of().state_dict(), CONFIG))
    content = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(content[:size])
    refused(directory, str(directory), "model.safetensors cannot be read")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_damaged_header_is_one_line_or_the_same_network(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    state = model_of().state_dict()
    directory = write(tmp_path_factory.getbasetemp() / "damaged", hf.to_hf(state, CONFIG))
    file = directory / "model.safetensors"
    content = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    try:
        model = GPT.from_pretrained(directory)
    except RequestError as error:
        said = str(error)
    else:
        assert model.state_dict().keys() == state.keys()
        return
    assert said.startswith(f"{directory}: ")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b'{"model_type": "gpt2"}', b"null", b'"x"', b"\xff\xfe{", b"[" * 5000, b"NaN"]
)
def test_a_bad_config_is_one_line(tmp_path: Path, content: bytes) -> None:
    directory = write(tmp_path / "m", hf.to_hf(model_of().state_dict(), CONFIG))
    (directory / "config.json").write_bytes(content)
    refused(directory, str(directory))


TEXTS = (
    "The people of these States, and it's 1790:\n\n  two  spaces, é 世界 — done. ",
    " leading, trailing \n \t\r\n ",
    "don't we'll I've you're he'd it's I'm 'S 1234567 3.14 ²½ Ⅻ",
    "👩‍👩‍👧‍👦 é e\u0301 \u00a0\u3000 \x00\x1c \ufffd עברית ไทย",
    "",
)


@pytest.mark.parametrize("kind", ["gpt2", "bytes", "bpe:320"])
def test_a_checkpoint_opens_in_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    if kind.startswith("bpe"):
        tokenizer = Tokenizer.train([TEXTS[0] * 9 + "a state of the union of peoples " * 9], 320)
    else:
        tokenizer = Tokenizer.from_name(kind)
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, n_ctx=128, n_layer=2, n_head=2, n_embd=16))
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)  # far from an even guess: greedy choices are clear
    model.wte.weight.data[tokenizer.vocab_size :] = 0
    step = write_checkpoint(tmp_path, model.config, model.state_dict(), tokenizer, {}, TrainingState(step=12))
    theirs = AutoModelForCausalLM.from_pretrained(step)
    their_tokenizer = AutoTokenizer.from_pretrained(step)
    assert type(theirs).__name__ == "GPT2LMHeadModel"
    assert theirs.dtype == torch.float32
    assert their_tokenizer.eos_token_id == tokenizer.eot == theirs.config.eos_token_id
    for name, tensor in load_file(step / "model.safetensors").items():
        assert torch.equal(theirs.state_dict()[name], tensor), name
    for text in TEXTS:
        ids = their_tokenizer(text).input_ids
        assert ids == tokenizer.encode(text)
        assert their_tokenizer.decode(ids) == text

    chosen: list[int] = []

    def noted(*args: object) -> int:
        chosen.append(choose(*args))
        return chosen[-1]

    choose = engine.sample
    monkeypatch.setattr(engine, "sample", noted)
    for prompt in ("The people", "é", ""):
        start = torch.tensor([tokenizer.encode(prompt) or [tokenizer.eot]])
        mask = torch.ones_like(start)
        generated = theirs.generate(start, attention_mask=mask, max_new_tokens=20, do_sample=False)
        expected = generated[0, start.size(1) :].tolist()
        chosen.clear()
        text = engine.load(step).generate(prompt, max_tokens=20, temperature=0)
        assert chosen == expected
        assert text == tokenizer.decode(expected)


def test_what_transformers_writes_is_read_with_its_tokenizer(tmp_path: Path) -> None:
    """Through their hands and back: GPT2Tokenizer's files, and a checkpoint saved again by them."""
    tokenizer = Tokenizer.from_name("bytes")
    config = replace(CONFIG, vocab_size=257)
    step = write_checkpoint(tmp_path, config, model_of(config).state_dict(), tokenizer, {}, TrainingState())
    AutoModelForCausalLM.from_pretrained(step).save_pretrained(tmp_path / "again")
    AutoTokenizer.from_pretrained(step).save_pretrained(tmp_path / "again")
    again = engine.load(tmp_path / "again")
    assert again.tokenizer.hash == tokenizer.hash
    assert again.model.config == config
    for name, tensor in model_of(config).state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name


def test_names_that_are_nowhere_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("./nowhere", str(tmp_path / "nothing"), str(tmp_path), str(tmp_path / "file"), "/" + "x" * 5000):
        refused(name, str(Path(name)), "name a run, a checkpoint, an int8 or a Hugging Face GPT-2 directory")


def test_a_hub_id_is_fetched_without_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write(tmp_path / "m", hf.to_hf(model_of().state_dict(), CONFIG))
    asked = {}

    def fetch(name: str, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        return str(directory)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    monkeypatch.chdir(tmp_path)
    assert GPT.from_pretrained("someone/small").config == CONFIG
    (patterns,) = asked.values()

    def fetched(name: str) -> bool:
        return any(fnmatch(name, pattern) for pattern in patterns)

    there = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "vocab.json", "merges.txt"]
    there += ["model.safetensors.index.json", "model-00002-of-00004.safetensors", "tokenizer_config.json"]
    assert all(fetched(name) for name in there)
    left = [
        "pytorch_model.bin",
        "training/state.safetensors",
        "onnx/config.json",
        "onnx/model.safetensors",
        "tf_model.h5",
    ]
    left += ["modeling.py", "rust_model.ot", "flax_model.msgpack", "model.onnx", "README.md", "metrics.json"]
    assert not any(fetched(name) for name in left)


def test_a_hub_id_that_cannot_be_fetched_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(name: str, allow_patterns: list[str]) -> str:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    monkeypatch.chdir(tmp_path)
    for name in ("someone/small", "gpt2", "x" * 5000):
        refused(name, f"{name} is neither a directory here nor a model that could be downloaded (ConnectionError)")
