"""A GPT-2 in int8: a byte a weight, and float scales that make it hardly another model.

    GPT ── quantize_model ── QuantizedWeights ── write_quantized ── DIR ── read_quantized ── int8_network, NativeDecoder

A matrix keeps, for each output channel i, whole numbers q[i, :] in -127..127 and a scale: w[i, j] ≈ scale[i] · q[i, j],
scale[i] about max |w[i, :]| / 127. A large weight makes the grid coarse for all of its row, and OpenAI's GPT-2 has
channels whose weights or activations are tens of times as large as the rest. So before rounding the network is
rewritten, its function unchanged, into one without such weights (1 to 3), and rounding looks at the sizes of the
activations (4, 5), which a pass over 1,024 random tokens shows:

1. A layer norm's scale and offset go into the matrix behind it: (n·g + b) Wᵀ = n (W·g)ᵀ + W b. What is left of
   ln_1 and ln_2 only normalises.
2. Attention mixes values channel by channel, so row i of the value matrix may be multiplied by any s > 0 if column i
   of the projection behind it is divided by it. s makes the two alike (Nagel et al. 2019, section 4.1; here with
   attention in the place of ReLU).
3. An offset common to all rows of wte goes into wpe, whence it reaches the same sum, and out of the head into
   `head_column`: it adds one number to all logits of a position.
4. A channel of the residual stream that carries a constant makes an input of the next matrix constant: times the
   rounding errors that is a constant, too, and the bias takes it up (section 4.2 there).
5. The scale of a row is searched near max / 127 for the least squared error, each weight's counted by its input.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from gpt2 import hf
from gpt2.checkpoint.directory import save_tensors, verify_files, write_checksums, write_facts
from gpt2.config import GPTConfig
from gpt2.errors import RequestError, WorkError
from gpt2.files import new_directory
from gpt2.model import GPT, Block
from gpt2.tokenizer import Tokenizer

QUANTIZATION = {
    "quant_method": "build-gpt2",
    "bits": 8,
    "scheme": "symmetric, one float32 scale an output channel; layer norms folded",
    "version": 1,
}
ROWS = 4096  # rows quantised at once: wte is never held twice in float
CALIBRATION = 1024  # tokens
FACTORS = tuple(0.9 + 0.01 * i for i in range(16))  # of max / 127
LARGEST = 127


@dataclass(frozen=True)
class Int8Matrix:
    """y = scale * (weight @ x) + bias."""

    weight: Tensor
    """(out, in) int8, contiguous, values -127..127"""
    scale: Tensor
    """(out,) float32, above 0"""
    bias: Tensor | None = None
    """(out,) float32"""


@dataclass(frozen=True)
class Int8Layer:
    """The four matrices of a block."""

    c_attn: Int8Matrix
    attn_c_proj: Int8Matrix
    c_fc: Int8Matrix
    mlp_c_proj: Int8Matrix


@dataclass(frozen=True)
class QuantizedWeights:
    """A GPT-2 whose matrices are int8. logits = lm_head(y) + y · head_column, with y the output of ln_f."""

    config: GPTConfig
    """pad_vocab_to is 1: there are no padded rows."""
    layers: tuple[Int8Layer, ...]
    """ln_1 is folded into c_attn, ln_2 into c_fc: those layer norms only normalise."""
    wte: Int8Matrix
    """(vocab_size, C) without bias: row i times its scale is token i's embedding less the rows' mean."""
    lm_head: Int8Matrix | None
    """None where it is wte."""
    wpe: Tensor
    """(n_ctx, C) float32, the mean of wte's rows added."""
    ln_f_weight: Tensor
    """(C,) float32"""
    ln_f_bias: Tensor
    """(C,) float32"""
    head_column: Tensor
    """(C,) float32: the mean that was taken off every row of the head."""


@torch.no_grad()
def quantize_model(model: GPT) -> QuantizedWeights:
    """The network in int8, on the CPU; the model is left as it is. The same model gives the same numbers.

    Memory beside it: the result, a block's matrices in float, and the activations of 1,024 tokens. Raises WorkError for
    weights that are not finite, naming the tensor.
    """
    for name, tensor in model.named_parameters():
        if not torch.isfinite(tensor).all():
            raise WorkError(f"the tensor {name} holds NaN or infinity: the model is spoilt; take an earlier checkpoint")
    config = replace(model.config, pad_vocab_to=1, dropout=0.0, fused_loss=False, recompute=False)
    was_training = model.training
    model.eval()
    try:
        idx = torch.randint(
            config.vocab_size,
            (-(-CALIBRATION // config.n_ctx), min(CALIBRATION, config.n_ctx)),
            generator=torch.Generator().manual_seed(0),
        )  # (B, T): all positions
        positions = torch.arange(idx.size(1))
        device = model.wpe.weight.device
        x = model.wte(idx.to(device)) + model.wpe(positions.to(device))  # (B, T, C)
        layers = []
        for block in model.h:
            assert isinstance(block, Block)
            x, inputs = _run(block, x)
            layers.append(_quantize_block(block, inputs))
        size = _float(model.ln_f(x)).flatten(0, 1).square().mean(0).sqrt()  # (C,) of the head's inputs
    finally:
        model.train(was_training)
    wte = _float(model.wte.weight)[: config.vocab_size]  # (vocab_size, C)
    column = _mean_row(wte)
    lm_head, head_column = None, column
    ln_f_weight, ln_f_bias = _float(model.ln_f.weight).clone(), _float(model.ln_f.bias).clone()
    if not config.tie_embeddings:
        # Nothing else reads ln_f's output: its channels and the head's columns share the load, as in step 2.
        head = _float(model.lm_head.weight)[: config.vocab_size]
        balance = _balance(size, head)
        ln_f_weight, ln_f_bias, size, head = ln_f_weight * balance, ln_f_bias * balance, size * balance, head / balance
        head_column = _mean_row(head)
        lm_head = _round(head, None, _Inputs(torch.zeros_like(size), size), head_column)
        size = torch.ones_like(size)  # an embedding is added, every channel alike
    return QuantizedWeights(
        config=config,
        layers=tuple(layers),
        wte=_round(wte, None, _Inputs(torch.zeros_like(size), size), column),
        lm_head=lm_head,
        wpe=_float(model.wpe.weight) + column,
        ln_f_weight=ln_f_weight,
        ln_f_bias=ln_f_bias,
        head_column=head_column,
    )


@dataclass(frozen=True)
class _Inputs:
    """What a matrix is multiplied with."""

    constant: Tensor
    """(in,) what is the same for every token"""
    size: Tensor
    """(in,) root mean square of the rest"""


def _run(block: Block, x: Tensor) -> tuple[Tensor, dict[str, _Inputs]]:
    """The block's output for (B, T, C), and the inputs of its matrices, a layer norm's scale left out."""
    inputs = {}

    def note(name: str, module: nn.Module) -> RemovableHandle:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen = _float(args[0]).flatten(0, 1)  # (B T, in)
            if isinstance(module, nn.LayerNorm):
                seen = F.layer_norm(seen, seen.shape[-1:], eps=module.eps)
            mean, square = seen.mean(0), seen.square().mean(0)
            # A mean counts in so far as it stands out from the spread: the rest may be chance, or of these tokens only.
            constant = mean.pow(3) / square.clamp(min=torch.finfo(torch.float32).tiny)
            inputs[name] = _Inputs(constant, (seen - constant).square().mean(0).sqrt())

        return module.register_forward_pre_hook(hook)

    handles = [
        note("c_attn", block.ln_1),
        note("attn_c_proj", block.attn.c_proj),
        note("c_fc", block.ln_2),
        note("mlp_c_proj", block.mlp.c_proj),
    ]
    try:
        return block(x), inputs
    finally:
        for handle in handles:
            handle.remove()


def _quantize_block(block: Block, inputs: Mapping[str, _Inputs]) -> Int8Layer:
    attn, mlp = block.attn, block.mlp
    c_attn, c_attn_bias = _fold(block.ln_1, attn.c_attn)  # (3C, C), (3C,)
    c_fc, c_fc_bias = _fold(block.ln_2, mlp.c_fc)  # (4C, C), (4C,)
    c_proj = _float(attn.c_proj.weight)  # (C, C)
    values, values_bias = c_attn[-len(c_proj) :], c_attn_bias[-len(c_proj) :]  # (C, C), (C,): views of the last third
    # With a normalised input a value has about this root mean square.
    balance = _balance(torch.hypot(values.norm(dim=1), values_bias), c_proj)  # (C,)
    values *= balance[:, None]
    values_bias *= balance
    mixed = inputs["attn_c_proj"]
    mixed = _Inputs(mixed.constant * balance, mixed.size * balance)
    return Int8Layer(
        c_attn=_round(c_attn, c_attn_bias, inputs["c_attn"]),
        attn_c_proj=_round(c_proj / balance, _float(attn.c_proj.bias), mixed),
        c_fc=_round(c_fc, c_fc_bias, inputs["c_fc"]),
        mlp_c_proj=_round(_float(mlp.c_proj.weight), _float(mlp.c_proj.bias), inputs["mlp_c_proj"]),
    )


def _float(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32)


def _fold(norm: nn.LayerNorm, linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight and bias of the linear layer that does the same behind a layer norm without scale and offset."""
    weight, bias = _float(linear.weight), _float(linear.bias)
    return weight * _float(norm.weight), bias + weight @ _float(norm.bias)


def _balance(size: Tensor, matrix: Tensor) -> Tensor:
    """(in,) factors for inputs of that size, and divisors for the columns of (out, in), that make the two alike."""
    columns = matrix.norm(dim=0)
    return torch.where((size > 0) & (columns > 0), (columns / size).sqrt(), 1.0)


def _mean_row(matrix: Tensor) -> Tensor:
    """(C,) float32, summed in float64: an offset far larger than the rest is not rounded."""
    total = torch.zeros(matrix.size(1), dtype=torch.float64)
    for start in range(0, len(matrix), ROWS):
        total += matrix[start : start + ROWS].double().sum(0)
    return (total / len(matrix)).float()


def _round(matrix: Tensor, bias: Tensor | None, inputs: _Inputs, offset: Tensor | float = 0.0) -> Int8Matrix:
    """(out, in) less `offset` to int8, each row with its own scale.

    The product of the rounding errors with what is constant in the inputs is added to the bias.
    """
    weight = torch.empty(matrix.shape, dtype=torch.int8)
    scale, shift = torch.empty(len(matrix)), torch.empty(len(matrix))
    for start in range(0, len(matrix), ROWS):
        part = slice(start, start + ROWS)
        rows = matrix[part] - offset  # (n, in)
        largest = rows.abs().amax(1)
        unit = torch.where(largest > 0, largest / LARGEST, 1.0).clamp_(min=torch.finfo(torch.float32).tiny)  # (n,)
        rows /= unit[:, None]  # -127..127: nothing is too small or too large for what follows
        factor = _search(rows, inputs.size)
        whole = (rows / factor).round_().clamp_(-LARGEST, LARGEST)
        scale[part] = unit * factor.squeeze(1)
        shift[part] = unit * (torch.addcmul(rows, whole, factor, value=-1) @ inputs.constant)
        weight[part] = whole
    return Int8Matrix(weight, scale, None if bias is None else bias + shift)


def _search(rows: Tensor, size: Tensor) -> Tensor:
    """(n, 1) scales near 1 with the least squared error of (n, in) rows, for inputs of that size."""
    best = torch.ones(len(rows), 1)
    least = torch.full_like(best, torch.inf)
    for factor in FACTORS:
        whole = (rows / factor).round_().clamp_(-LARGEST, LARGEST)
        errors = whole.mul_(-factor).add_(rows).mul_(size).square_().sum(1, keepdim=True)  # (n, 1)
        best[errors < least] = factor
        least = torch.minimum(errors, least)
    return best


def is_quantized(directory: Path) -> bool:
    """Whether the directory's config.json says that `write_quantized` made it (of whatever version)."""
    try:
        stated = json.loads((directory / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        return bool(stated["quant_method"] == QUANTIZATION["quant_method"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def write_quantized(weights: QuantizedWeights, directory: Path, tokenizer: Tokenizer) -> int:
    """Makes the int8 directory, whole or not at all; gives the bytes of all its files.

    model.safetensors, config.json with a `quantization_config`, tokenizer, checksums.json. Raises RequestError where
    the directory exists or cannot be written, WorkError where the disk is full or the weights are none that
    `read_quantized` would take.
    """
    try:
        _from_named(dict(_named(weights)), weights.config)
    except RequestError as error:
        raise WorkError(f"the model cannot be quantised, its weights are spoilt: {error}") from error
    with new_directory(directory) as temporary:
        write_facts(temporary, weights.config, tokenizer, {"quantization_config": QUANTIZATION})
        save_tensors(dict(_named(weights)), temporary / "model.safetensors", {"format": "pt"})
        write_checksums(temporary)
        return sum(file.stat().st_size for file in temporary.iterdir())


def read_quantized(directory: Path) -> QuantizedWeights:
    """What `write_quantized` wrote. Pickle is never opened.

    Raises WorkError where a file is missing or altered, RequestError where the directory holds no int8 GPT-2 of this
    version, or a tensor is missing, unknown, of another shape or kind, or holds what no quantised weight can be.
    """
    mend = "make it again with `gpt2 quantize`"
    if not is_quantized(directory):
        raise RequestError(f"{directory} is no int8 directory: {mend}")
    try:
        verify_files(directory, "int8 directory")
    except WorkError as error:
        raise WorkError(f"{error}; {mend}") from error
    try:
        values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        stated = values.pop("quantization_config")
        if stated != QUANTIZATION:
            raise RequestError(f"quantization_config is {stated}, this version reads {QUANTIZATION}")
        config = replace(hf.config_from_hf(values), pad_vocab_to=1)
        return _from_named(load_file(directory / "model.safetensors"), config)
    except RequestError as error:
        raise RequestError(f"{directory}: {error}; {mend}") from error
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise RequestError(f"{directory / 'model.safetensors'} cannot be read: {error}; {mend}") from error


def _matrices(config: GPTConfig) -> Iterator[tuple[str, int, int, bool]]:
    """Name, rows, columns and whether there is a bias, of each int8 matrix."""
    C = config.n_embd
    yield "wte", config.vocab_size, C, False
    for layer in range(config.n_layer):
        yield f"h.{layer}.attn.c_attn", 3 * C, C, True
        yield f"h.{layer}.attn.c_proj", C, C, True
        yield f"h.{layer}.mlp.c_fc", 4 * C, C, True
        yield f"h.{layer}.mlp.c_proj", C, 4 * C, True
    if not config.tie_embeddings:
        yield "lm_head", config.vocab_size, C, False


def _vectors(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the float32 tensors that belong to no int8 matrix."""
    C = config.n_embd
    return {"wpe.weight": (config.n_ctx, C), "ln_f.weight": (C,), "ln_f.bias": (C,), "head_column": (C,)}


def _named(weights: QuantizedWeights) -> Iterator[tuple[str, Tensor]]:
    """All tensors by the names of the file."""
    matrices = [weights.wte]
    for layer in weights.layers:
        matrices += [layer.c_attn, layer.attn_c_proj, layer.c_fc, layer.mlp_c_proj]
    if weights.lm_head is not None:
        matrices.append(weights.lm_head)
    for (name, *_), matrix in zip(_matrices(weights.config), matrices, strict=True):
        yield f"{name}.weight", matrix.weight
        yield f"{name}.scale", matrix.scale
        if matrix.bias is not None:
            yield f"{name}.bias", matrix.bias
    vectors = (weights.wpe, weights.ln_f_weight, weights.ln_f_bias, weights.head_column)
    yield from zip(_vectors(weights.config), vectors, strict=True)


def _from_named(given: Mapping[str, Tensor], config: GPTConfig) -> QuantizedWeights:
    """The inverse of `_named`. Raises RequestError that names the tensor."""
    left = dict(given)

    def take(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        if name not in left:
            raise RequestError(f"the tensor {name} is missing")
        tensor = left.pop(name)
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            found, wanted = (str(kind).removeprefix("torch.") for kind in (tensor.dtype, dtype))
            raise RequestError(
                f"the tensor {name} is {tuple(tensor.shape)} of {found} where config.json says {shape} of {wanted}"
            )
        if dtype == torch.int8 and tensor.min() < -LARGEST:
            raise RequestError(f"the tensor {name} holds -128, where whole numbers from -127 to 127 belong")
        if dtype == torch.float32 and not torch.isfinite(tensor).all():
            raise RequestError(f"the tensor {name} holds NaN or infinity")
        if name.endswith(".scale") and not (tensor > 0).all():
            raise RequestError(f"the tensor {name} holds a scale that is not above 0")
        return tensor

    matrices: list[Int8Matrix] = []
    for name, rows, columns, biased in _matrices(config):
        weight, scale = take(f"{name}.weight", (rows, columns), torch.int8), take(f"{name}.scale", (rows,))
        matrices.append(Int8Matrix(weight, scale, take(f"{name}.bias", (rows,)) if biased else None))
    wpe, ln_f_weight, ln_f_bias, head_column = (take(name, shape) for name, shape in _vectors(config).items())
    if left:
        raise RequestError(f"the tensor {min(left)} is not of an int8 GPT-2 of its config.json")
    blocks = matrices[1 : 1 + 4 * config.n_layer]
    return QuantizedWeights(
        config=config,
        layers=tuple(Int8Layer(*blocks[4 * layer : 4 * layer + 4]) for layer in range(config.n_layer)),
        wte=matrices[0],
        lm_head=None if config.tie_embeddings else matrices[-1],
        wpe=wpe,
        ln_f_weight=ln_f_weight,
        ln_f_bias=ln_f_bias,
        head_column=head_column,
    )


class _Int8Rows(nn.Module):
    """What the modules below hold: int8 rows and their scales, which stay float32 whatever the network is turned to."""

    weight: Tensor
    scale: Tensor

    def __init__(self, matrix: Int8Matrix) -> None:
        super().__init__()
        self.register_buffer("weight", matrix.weight)  # (out, in)
        self.register_buffer("scale", matrix.scale)  # (out,)

    def _apply(self, fn: Any, recurse: bool = True) -> "_Int8Rows":
        scale = self.scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scale = scale.to(self.scale.device)
        return self


class Int8Linear(_Int8Rows):
    """`nn.Linear` of int8 weights, multiplied out at use. torch.compile fuses the conversion into the product."""

    bias: Tensor | None

    def __init__(self, matrix: Int8Matrix) -> None:
        super().__init__(matrix)
        self.register_buffer("bias", matrix.bias)  # (out,)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out) of x's type."""
        y = F.linear(x, self.weight.to(x.dtype)) * self.scale
        return (y if self.bias is None else y + self.bias).to(x.dtype)


class Int8Embedding(_Int8Rows):
    """`nn.Embedding` of int8 rows."""

    like: Tensor

    def __init__(self, matrix: Int8Matrix) -> None:
        super().__init__(matrix)
        self.register_buffer("like", torch.empty(0), persistent=False)  # follows .to(): the type of the output

    def forward(self, idx: Tensor) -> Tensor:
        """(…) int64 -> (…, C)"""
        return (self.weight[idx] * self.scale[idx].unsqueeze(-1)).to(self.like.dtype)


class Int8Head(nn.Module):
    """`lm_head`: int8 rows, wte's own where they are tied, and the column that all rows have in common."""

    column: Tensor

    def __init__(self, rows: _Int8Rows, column: Tensor) -> None:
        super().__init__()
        self.rows = rows
        self.register_buffer("column", column)  # (C,)

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) -> (…, vocab_size) float32: the common part may be far larger than what tells tokens apart."""
        own = F.linear(x, self.rows.weight.to(x.dtype)) * self.rows.scale
        return own + (x.float() * self.column).sum(-1, keepdim=True)


def int8_network(weights: QuantizedWeights) -> GPT:
    """The training network's formula over int8 weights (shared with `weights`, not copied), in evaluation mode.

    For evaluation, a GPU with torch.compile, and as the kernels' oracle. It has no gradients; `wpe.weight` tells its
    device and type. On a CPU every pass multiplies all weights out again: long texts cost little more than in float,
    a single token much more.
    """
    config = weights.config
    with torch.device("meta"):  # nothing is allocated that is replaced below
        model = GPT(config)
    wte = Int8Embedding(weights.wte)
    head = Int8Head(wte if weights.lm_head is None else _Int8Rows(weights.lm_head), weights.head_column)
    model.wte, model.lm_head = wte, head  # type: ignore[assignment]
    model.wpe = nn.Embedding.from_pretrained(weights.wpe)  # type: ignore[no-untyped-call]
    for block, layer in zip(model.h, weights.layers, strict=True):
        assert isinstance(block, Block)
        block.ln_1 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon, elementwise_affine=False)
        block.ln_2 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon, elementwise_affine=False)
        attn, mlp = block.attn, block.mlp
        attn.c_attn, attn.c_proj = Int8Linear(layer.c_attn), Int8Linear(layer.attn_c_proj)  # type: ignore[assignment]
        mlp.c_fc, mlp.c_proj = Int8Linear(layer.c_fc), Int8Linear(layer.mlp_c_proj)  # type: ignore[assignment]
    model.ln_f.weight = nn.Parameter(weights.ln_f_weight)
    model.ln_f.bias = nn.Parameter(weights.ln_f_bias)
    return model.requires_grad_(False).eval()
