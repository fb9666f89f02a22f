"""What generation asks of a network: logits for tokens of several sequences, each of which has a slot for its past.

A sequence's tokens may come many at once (prefill) or one by one (decode), beside tokens of other sequences of other
lengths. `TorchDecoder` does it with any GPT on any device, compiled.CompiledDecoder quicker after compiling,
native.NativeDecoder with int8 weights on a CPU.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from gpt2.config import GPTConfig
from gpt2.errors import RequestError
from gpt2.inference.kv_cache import KVCache
from gpt2.model import GPT, Packing


class Decoder(Protocol):
    """One thread at a time may call it."""

    config: GPTConfig
    slots: int
    """Sequences in flight at most."""

    def step(
        self, ids: Sequence[int], slots: Sequence[int], positions: Sequence[int], outputs: Sequence[int]
    ) -> Tensor:
        """One pass over n tokens: ids[i] stands at positions[i] of the sequence in slots[i].

        A slot's tokens stand next to each other, at positions that follow each other, the first of them at most one
        beyond what the slot holds; what the slot held from there on is forgotten. outputs: numbers of the tokens, in
        ascending order, whose logits are wanted. Gives (len(outputs), vocab_size) float32. Raises RequestError for a
        token id, slot or position out of range.
        """

    def copy_slot(self, source: int, to: int) -> None:
        """`to` holds what `source` holds."""

    def free_slot(self, slot: int) -> None:
        """Forgets a sequence."""


class TorchDecoder:
    """A Decoder that runs the training network over a cache in its own type."""

    def __init__(self, model: GPT, slots: int) -> None:
        self.model, self.config, self.slots = model.eval(), model.config, slots
        self._cache = KVCache(self.config, 0, self._device, model.wpe.weight.dtype)

    @property
    def _device(self) -> torch.device:
        return self.model.wpe.weight.device

    @torch.no_grad()  # not inference_mode, whose tensors a compiled step could not take for its own
    def step(
        self, ids: Sequence[int], slots: Sequence[int], positions: Sequence[int], outputs: Sequence[int]
    ) -> Tensor:
        """See Decoder.step. Sequences that bring one token share a pass, of the others each has its own."""
        check_step(self, ids, slots, positions, outputs)
        self._cache.grow(max(slots, default=-1) + 1)
        runs = list(runs_of(slots))
        single = [start for start, stop in runs if stop - start == 1]
        rows: dict[int, Tensor] = {}  # token -> (vocab_size,) logits
        if single:
            logits = self._decode([ids[i] for i in single], [slots[i] for i in single], [positions[i] for i in single])
            rows |= zip(single, logits, strict=True)
        for start, stop in runs:
            if stop - start > 1:
                wanted = [i for i in outputs if start <= i < stop]
                logits = self._prefill(ids[start:stop], slots[start], positions[start], [i - start for i in wanted])
                rows |= zip(wanted, logits, strict=True)
        if not outputs:
            return torch.empty(0, self.config.vocab_size)
        return torch.stack([rows[i] for i in outputs]).float()

    def _decode(self, ids: list[int], slots: list[int], positions: list[int]) -> Tensor:
        """One token of each of B sequences: (B, vocab_size)."""
        idx = torch.tensor(ids, device=self._device)[:, None]  # (B, 1)
        at = torch.tensor(positions, device=self._device)[:, None]  # (B, 1)
        seen = torch.arange(max(positions) + 1, device=self._device) <= at  # (B, S)
        view = self._cache.of(slots, at[:, 0])
        logits: Tensor = self.model(idx, cache=view, packing=Packing(at, seen[:, None, None]))[0]  # (B, 1, vocab_size)
        return logits[:, 0]

    def _prefill(self, ids: Sequence[int], slot: int, position: int, wanted: list[int]) -> Tensor:
        """T tokens of one sequence: (len(wanted), vocab_size)."""
        idx = torch.tensor([list(ids)], device=self._device)  # (1, T)
        at = torch.tensor(wanted, dtype=torch.int64, device=self._device)
        logits: Tensor = self.model(idx, cache=self._cache.of_one(slot, position), at=at)[0]
        return logits  # (len(wanted), vocab_size)

    def copy_slot(self, source: int, to: int) -> None:
        """`to` holds what `source` holds."""
        self._cache.grow(max(source, to) + 1)
        self._cache.copy(source, to)

    def free_slot(self, slot: int) -> None:
        """The memory stays, for the next sequence."""


class UncachedDecoder:
    """A Decoder that computes every position again for every token: slow, and the cache's oracle."""

    def __init__(self, model: GPT, slots: int) -> None:
        self.model, self.config, self.slots = model.eval(), model.config, slots
        self._held: dict[int, list[int]] = {}

    @torch.inference_mode()
    def step(
        self, ids: Sequence[int], slots: Sequence[int], positions: Sequence[int], outputs: Sequence[int]
    ) -> Tensor:
        """See Decoder.step."""
        check_step(self, ids, slots, positions, outputs)
        rows = []
        for i, (token, slot, position) in enumerate(zip(ids, slots, positions, strict=True)):
            held = self._held[slot] = [*self._held.get(slot, [])[:position], token]
            if i in outputs:
                idx = torch.tensor([held], device=self.model.wpe.weight.device)  # (1, T)
                rows.append(self.model(idx)[0][0, -1].float())
        return torch.stack(rows) if rows else torch.empty(0, self.config.vocab_size)

    def copy_slot(self, source: int, to: int) -> None:
        """`to` holds what `source` holds."""
        self._held[to] = list(self._held[source])

    def free_slot(self, slot: int) -> None:
        """Forgets a sequence."""
        self._held.pop(slot, None)


def check_step(
    decoder: Decoder, ids: Sequence[int], slots: Sequence[int], positions: Sequence[int], outputs: Sequence[int]
) -> None:
    """Raises RequestError for what Decoder.step does not take."""
    if not len(ids) == len(slots) == len(positions):
        raise RequestError("ids, slots and positions must be of one length")
    for name, values, bound in (
        ("token id", ids, decoder.config.vocab_size),
        ("slot", slots, decoder.slots),
        ("position", positions, decoder.config.n_ctx),
    ):
        if values and not (min(values) >= 0 and max(values) < bound):
            raise RequestError(f"a {name} is not within 0 … {bound - 1}")
    if outputs and not (outputs[0] >= 0 and outputs[-1] < len(ids) and all(a < b for a, b in pairwise(outputs))):
        raise RequestError("outputs must be numbers of the tokens, in ascending order")


def runs_of(slots: Sequence[int]) -> list[tuple[int, int]]:
    """(first, behind the last) of each stretch of one slot."""
    borders = [i for i, (a, b) in enumerate(pairwise(slots), start=1) if a != b]
    return list(pairwise([0, *borders, len(slots)])) if slots else []
