"""Keys and values of the tokens seen so far, so that each new token costs one position and not all of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gpt2.config import GPTConfig


class KVCache:
    """A slot a sequence, each preallocated for a whole context: 2 x n_layer x n_ctx x n_embd numbers (75 MB for GPT-2
    small in float32)."""

    def __init__(
        self, config: GPTConfig, slots: int, device: torch.device, dtype: torch.dtype, room: int | None = None
    ) -> None:
        """room: tokens of a slot at most; n_ctx unless given."""
        heads, width = config.n_head, config.n_embd // config.n_head
        shape = (config.n_layer, slots, heads, room or config.n_ctx, width)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)

    def grow(self, slots: int) -> None:
        """At least so many slots; what is held stays."""
        layers, held, *rest = self.keys.shape
        if slots > held:
            slots = max(slots, 2 * held)
            for name in ("keys", "values"):
                old: Tensor = getattr(self, name)
                new = old.new_zeros((layers, slots, *rest))
                new[:, :held] = old
                setattr(self, name, new)

    def copy(self, source: int, to: int) -> None:
        """Slot `to` holds what slot `source` holds."""
        self.keys[:, to] = self.keys[:, source]
        self.values[:, to] = self.values[:, source]

    def of_one(self, slot: int, length: int) -> "OneSequence":
        """The model's view of a slot that holds `length` tokens."""
        return OneSequence(self, slot, length)

    def of(self, slots: Sequence[int], lengths: Tensor) -> "SeveralSequences":
        """The model's view of B slots that hold (B,) int64 tokens each, for one more token of each."""
        return SeveralSequences(self, slots, lengths)


class OneSequence:
    """T new tokens of one sequence."""

    def __init__(self, cache: KVCache, slot: int, length: int) -> None:
        self.cache, self.slot, self.length = cache, slot, length

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores (1, nh, T, hs) keys and values behind the first `length`; gives all (1, nh, length + T, hs)."""
        stop = self.length + k.size(2)
        keys, values = self.cache.keys[layer, self.slot, None], self.cache.values[layer, self.slot, None]
        keys[:, :, self.length : stop] = k
        values[:, :, self.length : stop] = v
        return keys[:, :, :stop], values[:, :, :stop]


class SeveralSequences:
    """One new token of each of B sequences of any lengths."""

    def __init__(self, cache: KVCache, slots: Sequence[int], lengths: Tensor) -> None:
        self.cache, self.lengths = cache, lengths
        self.length = int(lengths.max())
        first = slots[0]
        in_order = list(slots) == list(range(first, first + len(slots)))
        self.rows = slice(first, first + len(slots)) if in_order else torch.tensor(slots, device=lengths.device)
        self.slots = torch.tensor(slots, device=lengths.device)  # (B,)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores (B, nh, 1, hs) keys and values, each at its sequence's end; gives all (B, nh, S, hs) with S the
        longest's length. Beyond a shorter one's end there is anything but NaN: the mask hides it."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]  # (slots, nh, n_ctx, hs)
        keys[self.slots, :, self.lengths] = k[:, :, 0]  # (B, nh, hs)
        values[self.slots, :, self.lengths] = v[:, :, 0]
        stop = self.length + 1
        return keys[self.rows, :, :stop], values[self.rows, :, :stop]
