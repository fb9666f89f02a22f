"""What the int8 kernels should compute: the network in float64, rounded where they round."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2.config import GPTConfig
from gpt2.inference.quantize import Int8Matrix, QuantizedWeights


@dataclass
class Matrix:
    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        y = round_activations(x, self.weight) @ (self.weight.double() * self.scale.double()[:, None]).T
        return y if self.bias is None else y + self.bias.double()


@dataclass
class Layer:
    c_attn: Matrix
    attn_c_proj: Matrix
    c_fc: Matrix
    mlp_c_proj: Matrix


@dataclass
class Weights:
    config: GPTConfig
    layers: tuple[Layer, ...]
    wte: Matrix
    lm_head: Matrix | None
    wpe: Tensor
    ln_f_weight: Tensor
    ln_f_bias: Tensor
    head_column: Tensor


def from_quantized(weights: QuantizedWeights) -> Weights:
    def matrix(of: Int8Matrix) -> Matrix:
        return Matrix(of.weight, of.scale, of.bias)

    layers = tuple(
        Layer(matrix(of.c_attn), matrix(of.attn_c_proj), matrix(of.c_fc), matrix(of.mlp_c_proj))
        for of in weights.layers
    )
    head = None if weights.lm_head is None else matrix(weights.lm_head)
    vectors = (weights.wpe, weights.ln_f_weight, weights.ln_f_bias, weights.head_column)
    return Weights(weights.config, layers, matrix(weights.wte), head, *vectors)


def reference(weights: Weights, ids: list[int]) -> Tensor:
    """(T, vocab_size) logits of one sequence in float64; activations, keys and values are rounded as the kernels do."""
    c = weights.config
    T, C, H = len(ids), c.n_embd, c.n_head

    def normalised(x: Tensor) -> Tensor:
        return F.layer_norm(x, (C,), eps=c.layer_norm_epsilon)

    def rounded(x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127  # one for each head and token
        return (x / scale).round() * scale

    wte = weights.wte.weight.double() * weights.wte.scale.double()[:, None]
    x = wte[ids] + weights.wpe[:T].double()
    for layer in weights.layers:
        q, k, v = layer.c_attn(normalised(x)).view(T, 3, H, C // H).permute(1, 2, 0, 3)  # each (H, T, C/H)
        y = F.scaled_dot_product_attention(q, rounded(k), rounded(v), is_causal=True)
        x = x + layer.attn_c_proj(y.transpose(0, 1).reshape(T, C))
        x = x + layer.mlp_c_proj(F.gelu(layer.c_fc(normalised(x)), approximate="tanh"))
    y = normalised(x) * weights.ln_f_weight.double() + weights.ln_f_bias.double()
    return (weights.lm_head or weights.wte)(y) + (y @ weights.head_column.double())[:, None]


def round_activations(x: Tensor, weight: Tensor) -> Tensor:
    """(T, C) -> (T, C) on the grid of each row for a product with `weight` (out, C) int8: Walk::round_row."""
    limit = min(32767, (2**31 - 1) // max(1, int(weight.long().abs().sum(1).max())))
    T, C = x.shape
    fours = F.pad(x, (0, -C % 64)).view(T, -1, 8, 2, 2, 2)  # (T, round, octet, first or last four, pair, number)
    positive, negative = fours.clamp(min=0).sum((3, 5)), -fours.clamp(max=0).sum((3, 5))  # (T, round, octet, pair)
    groups = torch.maximum(positive, negative).amax(1).flatten(1)  # (T, 16): the heaviest four of each
    scales = []
    for of_row in groups:
        heaviest = [*sorted(set(of_row.tolist()), reverse=True), 0.0, 0.0, 0.0]
        scales.append(max(heaviest[3] / 127, heaviest[0] / limit, 1e-37))
    scale = torch.tensor(scales, dtype=x.dtype)[:, None]
    return (x / scale).round() * scale
