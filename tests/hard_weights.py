"""Weights as hard to quantise as those of OpenAI's GPT-2, planted in a network; also by benchmarks/int8_quality.py."""

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gpt2.model import GPT


def plant_layer_norm(model: GPT) -> None:
    """A layer norm's channel x 64, the weight columns behind it / 64."""
    with torch.no_grad():
        for block in model.h:
            for norm, linear in ((block.ln_1, block.attn.c_attn), (block.ln_2, block.mlp.c_fc)):
                norm.weight[5] *= 64
                norm.bias[5] *= 64
                linear.weight[:, 5] /= 64


def plant_values(model: GPT) -> None:
    """Value rows of c_attn x 64, the columns of c_proj that read them / 64."""
    with torch.no_grad():
        for block in model.h:
            for channel in (3, 17):
                block.attn.c_attn.weight[2 * model.config.n_embd + channel] *= 64
                block.attn.c_attn.bias[2 * model.config.n_embd + channel] *= 64
                block.attn.c_proj.weight[:, channel] /= 64


def plant_column(model: GPT) -> None:
    """50 in one channel of every token's embedding."""
    model.wte.weight.data[:, 9] += 50


def plant_positions(model: GPT) -> None:
    """50 in one channel of every position."""
    model.wpe.weight.data[:, 9] += 50


def plant_bias(model: GPT) -> None:
    """50 in one channel from the middle of the network on."""
    model.h[0].mlp.c_proj.bias.data[9] += 50


SCALES: dict[str, Callable[[GPT], None]] = {"layer norm": plant_layer_norm, "values": plant_values}
"""They leave the function as it is."""
OFFSETS: dict[str, Callable[[GPT], None]] = {"wte": plant_column, "wpe": plant_positions, "bias": plant_bias}
"""They change the variance that the layer norms divide by, and so the function."""


def normalised(model: GPT, norm: nn.Module, idx: Tensor) -> Tensor:
    """(n, C) what the layer norm gives before its scale and offset."""
    seen: list[Tensor] = []
    handle = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    model(idx)
    handle.remove()
    return F.layer_norm(seen[0], seen[0].shape[-1:])


@torch.no_grad()
def adapt(model: GPT, reference: GPT, idx: Tensor) -> None:
    """Sets each layer norm so that it gives nearly what it gave before the plant, as training would have.

    idx: (n, T) token ids.
    """
    for norm, as_was in zip(
        *([m for m in n.modules() if isinstance(m, nn.LayerNorm)] for n in (model, reference)), strict=True
    ):
        now, before = normalised(model, norm, idx), normalised(reference, as_was, idx)
        ratio = (before - before.mean(0)).std() / (now - now.mean(0)).std()
        norm.bias += norm.weight * (before.mean(0) - ratio * now.mean(0))
        norm.weight *= ratio
