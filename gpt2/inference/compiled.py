"""Decoding in one launch: a step of fixed shapes over a static cache, compiled, on a GPU as one CUDA graph.

    slots 0 … B-1, one token of each or none ── the network over all their keys and values ── (B, vocab_size) logits

GPT-2 small has over a hundred kernels a token. Started one by one they keep the host busy for longer than the GPU,
which reads 124 MB of int8 weights in 40 microseconds; a graph of them all is started by one call.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt2.inference.decoder import TorchDecoder
from gpt2.inference.kv_cache import KVCache
from gpt2.model import GPT, Packing


class CompiledDecoder(TorchDecoder):
    """A TorchDecoder whose single tokens go through a compiled graph; prompts go through the network as it is.

    There is a graph for 1, 2, 4, 8 … slots, made when it is first needed, which takes up to a minute.
    """

    def __init__(self, model: GPT, slots: int) -> None:
        super().__init__(model, slots)
        # One place beyond the context: there a slot that has no token this time leaves its key and value.
        self._cache = KVCache(self.config, slots, self._device, model.wpe.weight.dtype, room=self.config.n_ctx + 1)
        mode = "reduce-overhead" if self._device.type == "cuda" else None
        self._step: Any = torch.compile(StaticStep(model, self._cache), mode=mode, fullgraph=True, dynamic=False)

    def _decode(self, ids: list[int], slots: list[int], positions: list[int]) -> Tensor:
        """One token of each of B sequences: (B, vocab_size)."""
        rows = min(1 << max(slots).bit_length(), self.slots)
        tokens, places = [0] * rows, [self.config.n_ctx] * rows
        for token, slot, position in zip(ids, slots, positions, strict=True):
            tokens[slot], places[slot] = token, position
        given = torch.tensor([tokens, places], device=self._device)  # (2, rows)
        # The plain formula: the compiler fuses one query over the cache, but not into a library's kernel.
        with sdpa_kernel(SDPBackend.MATH):
            logits: Tensor = self._step(given)  # (rows, vocab_size)
        return logits[slots]  # a copy: the next step writes to the same place


class StaticStep(nn.Module):
    """One token of each of the first slots. Buffers of a module keep their address, as CUDA graphs need."""

    keys: Tensor
    values: Tensor

    def __init__(self, model: GPT, cache: KVCache) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("keys", cache.keys)  # (n_layer, slots, nh, n_ctx + 1, hs)
        self.register_buffer("values", cache.values)

    def forward(self, given: Tensor) -> Tensor:
        """(2, B) int64, token ids above their places in the slots 0 … B-1 -> (B, vocab_size) logits."""
        tokens, places = given
        n_ctx = self.model.config.n_ctx
        seen = torch.arange(n_ctx + 1, device=given.device) <= places[:, None]  # (B, n_ctx + 1)
        packing = Packing(places.clamp(max=n_ctx - 1)[:, None], seen[:, None, None])
        cache = _Places(self.keys, self.values, places)
        logits: Tensor = self.model(tokens[:, None], cache=cache, packing=packing)[0]  # (B, 1, vocab_size)
        return logits[:, 0]


class _Places:
    """The model's view of the cache: the same addresses and shapes at every step."""

    length = 0  # of no use where positions are given

    def __init__(self, keys: Tensor, values: Tensor, places: Tensor) -> None:
        self.keys, self.values, self.places = keys, values, places
        self.rows = torch.arange(places.size(0), device=places.device)  # (B,)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores (B, nh, 1, hs) keys and values, each at its place; gives all (B, nh, n_ctx + 1, hs), used or not."""
        B = k.size(0)
        keys, values = self.keys[layer, :B], self.values[layer, :B]
        keys[self.rows, :, self.places] = k[:, :, 0]  # (B, nh, hs)
        values[self.rows, :, self.places] = v[:, :, 0]
        return keys, values
