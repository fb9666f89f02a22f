"""A model as one GGUF file, for llama.cpp and what is built on it. The `gguf` library names the keys and packs q8_0.

    header ─ facts (sizes, tokenizer with its merges) ─ names and shapes ─ tensors, one after the other

A linear layer is stored (out, in), as torch has it. Vectors and position embeddings stay in float32: they are
added, not multiplied, and weigh nothing.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from gpt2.config import GPTConfig
from gpt2.errors import RequestError
from gpt2.files import new_file
from gpt2.tokenizer import Tokenizer

Quant = Literal["f16", "q8_0"]
BLOCK = 32  # q8_0: so many numbers of a row share one float16 scale, 34 bytes together
LARGEST_F16 = 65504.0
# llama.cpp's name for GPT-2's split into words. A bpe:N of ours splits alike and has its own merges.
PRE_TOKENIZER = "gpt-2"


def write_gguf(
    path: Path, config: GPTConfig, weights: Mapping[str, Tensor], tokenizer: Tokenizer, name: str, quant: Quant = "f16"
) -> int:
    """Writes a model's state_dict and tokenizer as a new GGUF file; gives its size in bytes.

    quant: the matrices' type; f16, or q8_0 (8 bits and a scale for each 32). The same model gives the same bytes.
    Raises RequestError, before anything is written, for the bytes tokenizer, a width that q8_0 cannot divide,
    numbers that float16 cannot hold, and where the gguf package is missing; WorkError for a full disk.
    """
    try:
        import gguf
    except ImportError as error:
        raise RequestError("GGUF needs a package: pip install 'build-gpt2[gguf]'") from error
    _check(config, weights, tokenizer, quant)
    types = gguf.GGMLQuantizationType
    matrix = {"f16": types.F16, "q8_0": types.Q8_0}[quant]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layer)

    def their_name(ours: str) -> str:
        name = names.get_name(ours if ours == "lm_head.weight" else f"transformer.{ours}", (".weight", ".bias"))
        assert name is not None, f"the gguf package has no name for {ours}"
        return name

    tensors = [(their_name(ours), tensor) for ours, tensor in _stored(config, weights)]

    def type_of(name: str, tensor: Tensor) -> Any:
        return matrix if tensor.dim() == 2 and name != "position_embd.weight" else types.F32

    with new_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, "gpt2")
        try:
            _add_facts(writer, gguf, config, tokenizer, name, quant)
            for name, tensor in tensors:
                kind = type_of(name, tensor)
                block, size = gguf.GGML_QUANT_SIZES[kind]
                shape = (*tensor.shape[:-1], tensor.shape[-1] // block * size)  # the last in bytes
                writer.add_tensor_info(name, shape, np.dtype(np.uint8), int(np.prod(shape)), kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, tensor in tensors:  # packed one by one: memory holds the model once
                values = tensor.detach().cpu().float().contiguous().numpy()
                packed = gguf.quants.quantize(values, type_of(name, tensor))
                writer.write_tensor_data(packed.view(np.uint8))
        finally:
            writer.close()
        return temporary.stat().st_size


def _stored(config: GPTConfig, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the file: the padded rows dropped, a tied lm_head left out (llama.cpp takes wte for it)."""
    for name, tensor in weights.items():
        if name == "lm_head.weight" and config.tie_embeddings:
            continue
        yield name, tensor[: config.vocab_size] if name in ("wte.weight", "lm_head.weight") else tensor


def _check(config: GPTConfig, weights: Mapping[str, Tensor], tokenizer: Tokenizer, quant: str) -> None:
    if quant not in get_args(Quant):
        raise RequestError(f"there is no quant {quant!r} here: use {' or '.join(get_args(Quant))}")
    if tokenizer.vocab_size != config.vocab_size:
        raise RequestError(
            f"the model has {config.vocab_size} tokens, its tokenizer {tokenizer.vocab_size}: "
            "they do not belong together"
        )
    if not tokenizer.spelled_merges:
        raise RequestError(
            f"llama.cpp opens no tokenizer without merges, and {tokenizer.name} has none: train on data prepared with "
            "--tokenizer gpt2 or bpe:N"
        )
    if quant == "q8_0" and config.n_embd % BLOCK:
        raise RequestError(
            f"q8_0 packs {BLOCK} numbers together, and model.n_embd = {config.n_embd} is no multiple of it: "
            "use --quant f16"
        )
    for name, tensor in _stored(config, weights):
        largest = tensor.abs().max().item()
        if not largest <= (LARGEST_F16 if tensor.dim() == 2 else torch.finfo(torch.float32).max):  # NaN too
            raise RequestError(f"the tensor {name} holds {largest}, which {quant} cannot hold")


def _add_facts(writer: Any, gguf: Any, config: GPTConfig, tokenizer: Tokenizer, name: str, quant: str) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_context_length(config.n_ctx)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_file_type({"f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}[quant])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZER)
    tokens = tokenizer.spelled
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * (len(tokens) - 1) + [gguf.TokenType.CONTROL])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer.spelled_merges])
    writer.add_bos_token_id(tokenizer.eot)
    writer.add_eos_token_id(tokenizer.eot)
    writer.add_add_bos_token(False)  # as the tokenizer beside a checkpoint: nothing is put before a prompt
    writer.add_add_space_prefix(False)
