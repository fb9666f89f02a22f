"""Hugging Face's GPT-2 <-> ours: names, orientation, config.json. What comes in goes out bit for bit.

Two differences only. Names: theirs carry the prefix `transformer.` on all but lm_head. Orientation:
OpenAI wrote the linear layers as Conv1D, with weights (in, out), where torch's Linear holds (out, in).
And the padded rows of our embedding exist in memory only: they are dropped here and added here.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gpt2.config import GPTConfig
from gpt2.errors import RequestError

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# What is fetched of a hub id: no pickle, no code, no other format of the same weights.
HUB_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
)
# What GPT-2 is, in Hugging Face's words: another value makes another network.
_FIXED: dict[str, Any] = {
    "activation_function": "gelu_new",
    "n_inner": None,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}


def to_hf(tensors: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Our state_dict as Hugging Face's tensors (contiguous, on the CPU); a tied lm_head is left out, as they do."""
    result = {}
    for name, tensor in tensors.items():
        if name == "lm_head.weight" and config.tie_embeddings:
            continue
        tensor = tensor.detach().cpu()
        if name in ("wte.weight", "lm_head.weight"):
            tensor = tensor[: config.vocab_size]
        if name.endswith(TRANSPOSED):
            tensor = tensor.t()
        result[name if name == "lm_head.weight" else f"transformer.{name}"] = tensor.contiguous()
    return result


def from_hf(tensors: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Hugging Face's tensors, or OpenAI's own (no prefix, mask buffers), as our state_dict in float32.

    Raises RequestError for a tensor that is missing, unknown or of another shape or kind, and where a stored
    lm_head is not the wte that the config says it is tied to.
    """
    given: dict[str, Tensor] = {}
    for full_name, tensor in tensors.items():
        name = full_name.removeprefix("transformer.")
        if name in given:
            raise RequestError(f"the tensor {name} is there twice, with and without the prefix transformer.")
        if not name.endswith((".attn.bias", ".attn.masked_bias")):
            given[name] = tensor
    if config.tie_embeddings and "wte.weight" not in given and "lm_head.weight" in given:
        given["wte.weight"] = given["lm_head.weight"]  # of a shared pair some writers keep the other name
    result = {}
    for name, shape in _shapes(config):
        if name not in given:
            raise RequestError(f"the tensor {name} is missing: the file is not a whole GPT-2 of its config.json")
        tensor = given.pop(name)
        if tuple(tensor.shape) != shape:
            raise RequestError(f"the tensor {name} has shape {tuple(tensor.shape)} where config.json says {shape}")
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise RequestError(f"the tensor {name} holds {kind}, not floating-point numbers")
        if name.endswith(TRANSPOSED):
            tensor = tensor.t()
        if name in ("wte.weight", "lm_head.weight"):
            padded = torch.zeros(config.padded_vocab_size, config.n_embd)
            padded[: config.vocab_size] = tensor
            tensor = padded
        result[name] = tensor.float().contiguous()
    if config.tie_embeddings:
        head = given.pop("lm_head.weight", None)
        if head is not None and not torch.equal(head.float(), result["wte.weight"][: config.vocab_size]):
            raise RequestError(
                "lm_head.weight differs from wte.weight: a GPT-2 with an untied head says so in config.json"
            )
        result["lm_head.weight"] = result["wte.weight"]
    if given:
        raise RequestError(f"the tensor {min(given)} is not of GPT-2: the file is of another network")
    return result


def _shapes(config: GPTConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Hugging Face's tensors (without their prefix) and shapes; a tied lm_head is not stored."""
    C = config.n_embd
    yield "wte.weight", (config.vocab_size, C)
    yield "wpe.weight", (config.n_ctx, C)
    for layer in range(config.n_layer):
        yield f"h.{layer}.ln_1.weight", (C,)
        yield f"h.{layer}.ln_1.bias", (C,)
        yield f"h.{layer}.attn.c_attn.weight", (C, 3 * C)
        yield f"h.{layer}.attn.c_attn.bias", (3 * C,)
        yield f"h.{layer}.attn.c_proj.weight", (C, C)
        yield f"h.{layer}.attn.c_proj.bias", (C,)
        yield f"h.{layer}.ln_2.weight", (C,)
        yield f"h.{layer}.ln_2.bias", (C,)
        yield f"h.{layer}.mlp.c_fc.weight", (C, 4 * C)
        yield f"h.{layer}.mlp.c_fc.bias", (4 * C,)
        yield f"h.{layer}.mlp.c_proj.weight", (4 * C, C)
        yield f"h.{layer}.mlp.c_proj.bias", (C,)
    yield "ln_f.weight", (C,)
    yield "ln_f.bias", (C,)
    if not config.tie_embeddings:
        yield "lm_head.weight", (config.vocab_size, C)


def config_to_hf(config: GPTConfig, end_of_text: int) -> dict[str, Any]:
    """The contents of config.json."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.n_ctx,
        "n_ctx": config.n_ctx,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        **_FIXED,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "initializer_range": 0.02,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "use_cache": True,
        "dtype": "float32",
        "torch_dtype": "float32",
    }


def config_from_hf(values: Mapping[str, Any]) -> GPTConfig:
    """Our config from a config.json's contents. Raises RequestError where it is not GPT-2, naming the field."""
    if not isinstance(values, Mapping):
        raise RequestError("not a GPT-2 config.json: no JSON object")
    if values.get("model_type") != "gpt2":
        raise RequestError(f"model_type is {values.get('model_type')!r}: only GPT-2 models can be read")
    if values.get("quantization_config") is not None:
        raise RequestError("the weights are quantised (quantization_config): give the float model they were made from")
    n_embd = _whole(values, "n_embd")
    for name, wanted in _FIXED.items():
        value = values.get(name, wanted)
        if (type(value), value) != (type(wanted), wanted) and not (name == "n_inner" and _same(value, 4 * n_embd)):
            raise RequestError(f"{name} is {value!r} where GPT-2 has {wanted!r}: only GPT-2 models can be read")
    tied = values.get("tie_word_embeddings", True)
    if not isinstance(tied, bool):
        raise RequestError(f"not a GPT-2 config.json: tie_word_embeddings is {tied!r}, neither true nor false")
    epsilon = values.get("layer_norm_epsilon", 1e-5)
    if type(epsilon) not in (int, float):
        raise RequestError(f"not a GPT-2 config.json: layer_norm_epsilon is {epsilon!r}, not a number")
    return GPTConfig(
        vocab_size=_whole(values, "vocab_size"),
        n_ctx=_whole(values, "n_positions" if "n_positions" in values else "n_ctx", 1024),
        n_layer=_whole(values, "n_layer"),
        n_head=_whole(values, "n_head"),
        n_embd=n_embd,
        layer_norm_epsilon=epsilon,
        tie_embeddings=tied,
    )


def _whole(values: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A whole number as such: 2.5, "2" and true would be read as another network than the file's writer meant."""
    value = values.get(name, default)
    if type(value) is not int:
        said = f"{name} is {value!r}, not a whole number" if name in values else f"{name} is missing"
        raise RequestError(f"not a GPT-2 config.json: {said}")
    return value


def _same(value: object, number: int) -> bool:
    return type(value) is int and value == number


def read_pretrained(path_or_id: str | Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Config and state_dict of a Hugging Face GPT-2 directory (single or sharded safetensors) or hub id.

    Raises RequestError that names the directory and what is wrong with it. Pickle is never opened.
    """
    directory = local_directory(path_or_id)
    config = read_config(directory)
    try:
        tensors: dict[str, Tensor] = {}
        for file in _weight_files(directory):
            tensors |= _load(file)
        return config, from_hf(tensors, config)
    except RequestError as error:
        raise RequestError(f"{directory}: {error}") from error


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise RequestError(f"{file.name} cannot be read: {error}") from error


def read_config(directory: Path) -> GPTConfig:
    """The config of a Hugging Face GPT-2 directory. Raises RequestError that names it."""
    try:
        return config_from_hf(json.loads((directory / "config.json").read_text(encoding="utf-8")))
    except RequestError as error:
        raise RequestError(f"{directory}: {error}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"{directory / 'config.json'} cannot be read: {error}") from error


def local_directory(path_or_id: str | Path) -> Path:
    """The directory itself, or a hub id's files after a download. Raises RequestError."""
    path = Path(path_or_id)
    if os.path.isdir(path):  # where Path.is_dir raises (a name too long, a folder closed to us), this is False
        if not os.path.isfile(path / "config.json"):
            raise RequestError(
                f"{path} holds no config.json: name a run, a checkpoint, an int8 or a Hugging Face GPT-2 directory"
            )
        return path
    if os.path.exists(path) or str(path_or_id).count("/") > 1 or str(path_or_id).startswith((".", "/", "~")):
        raise RequestError(
            f"there is no directory {path}: name a run, a checkpoint, an int8 or a Hugging Face GPT-2 directory"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path_or_id), allow_patterns=list(HUB_FILES)))
    except Exception as error:  # the hub's own errors, httpx's and a missing network are all the same to the user
        raise RequestError(
            f"{path_or_id} is neither a directory here nor a model that could be downloaded ({type(error).__name__}): "
            "check the name, or give a local directory"
        ) from error


def _weight_files(directory: Path) -> list[Path]:
    """model.safetensors, or the shards that model.safetensors.index.json names."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            outside = any(Path(name).name != name for name in names)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RequestError(f"{index.name} does not list the files: {type(error).__name__} {error}") from error
        if outside:
            raise RequestError("model.safetensors.index.json names a file outside the directory")
        return [directory / name for name in names]
    single = directory / "model.safetensors"
    if not single.is_file():
        pickled = any(any(directory.glob(f"*.{ending}")) for ending in ("bin", "pt", "pth", "ckpt", "pkl"))
        mend = (
            "it holds pickle only, which is never opened; convert it to safetensors"
            if pickled
            else "only weights in safetensors are read"
        )
        raise RequestError(f"model.safetensors is missing: {mend}")
    return [single]
