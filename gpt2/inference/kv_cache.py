"""Keys and values of the tokens seen so far, so that each new token costs one position and not all of them."""

import torch
from torch import Tensor

from gpt2.config import GPTConfig


class KVCache:
    """Preallocated for a whole context: 2 x n_layer x B x n_ctx x n_embd numbers (75 MB for GPT-2 small, float32)."""

    def __init__(self, config: GPTConfig, batch: int, device: torch.device, dtype: torch.dtype) -> None:
        heads, width = config.n_head, config.n_embd // config.n_head
        shape = (config.n_layer, batch, heads, config.n_ctx, width)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores (B, nh, T, hs) keys and values behind the first `length`; gives all (B, nh, length + T, hs)."""
        stop = self.length + k.size(2)
        self.keys[layer, :, :, self.length : stop] = k
        self.values[layer, :, :, self.length : stop] = v
        return self.keys[layer, :, :, :stop], self.values[layer, :, :, :stop]

    def advance(self, tokens: int) -> None:
        """After a forward pass over that many tokens, when every layer has stored its own."""
        self.length += tokens

    def repeat(self, batch: int) -> "KVCache":
        """The same contents for `batch` sequences, from a cache of one."""
        copy = KVCache.__new__(KVCache)
        copy.keys = self.keys.repeat(1, batch, 1, 1, 1)
        copy.values = self.values.repeat(1, batch, 1, 1, 1)
        copy.length = self.length
        return copy
