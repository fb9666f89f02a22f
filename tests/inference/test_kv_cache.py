"""The cache as a store: what was put in comes out, per layer, slot and place; copies share nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2.config import GPTConfig
from gpt2.inference.kv_cache import KVCache
from gpt2.model import GPT

CONFIG = GPTConfig(vocab_size=50, n_ctx=12, n_layer=3, n_head=2, n_embd=8)
CPU = torch.device("cpu")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2), st.lists(st.integers(1, 5), min_size=1, max_size=6).filter(lambda parts: sum(parts) <= 12))
def test_each_layer_gives_back_all_that_it_was_given(slot: int, parts: list[int]) -> None:
    random = torch.Generator().manual_seed(0)
    keys, values = torch.randn((2, CONFIG.n_layer, 1, CONFIG.n_head, sum(parts), 4), generator=random)
    cache = KVCache(CONFIG, 3, CPU, torch.float32)
    start = 0
    for part in parts:
        stop, view = start + part, cache.of_one(slot, start)
        assert view.length == start
        for layer in range(CONFIG.n_layer):
            k, v = view.extend(layer, keys[layer, :, :, start:stop], values[layer, :, :, start:stop])
            assert torch.equal(k, keys[layer, :, :, :stop])
            assert torch.equal(v, values[layer, :, :, :stop])
        start = stop
    others = [other for other in range(3) if other != slot]
    assert not cache.keys[:, others].any()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 11), min_size=1, max_size=4), st.permutations(range(4)))
def test_a_token_of_each_of_several_sequences(lengths: list[int], order: list[int]) -> None:
    """Each goes to the end of its own; what is there before stays."""
    slots = order[: len(lengths)]
    cache = KVCache(CONFIG, 4, CPU, torch.float32)
    cache.keys.normal_(generator=torch.Generator().manual_seed(0))
    before = cache.keys.clone()
    new = torch.randn(len(slots), CONFIG.n_head, 1, 4, generator=torch.Generator().manual_seed(1))
    keys, values = cache.of(slots, torch.tensor(lengths)).extend(1, new, new)
    assert keys.shape == (len(slots), CONFIG.n_head, max(lengths) + 1, 4)
    for b, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
        assert torch.equal(keys[b, :, :length], before[1, slot, :, :length])
        assert torch.equal(keys[b, :, length], new[b, :, 0])
        assert torch.equal(values[b, :, length], new[b, :, 0])
    assert torch.equal(cache.keys[0], before[0])


def test_it_grows_and_copies() -> None:
    cache = KVCache(CONFIG, 0, CPU, torch.float32)
    cache.grow(1)
    cache.keys.fill_(3.0)
    cache.grow(3)
    assert cache.keys.size(1) >= 3
    assert (cache.keys[:, 0] == 3).all()
    cache.copy(0, 2)
    cache.keys[:, 0] = 5.0
    assert (cache.keys[:, 2] == 3).all()
    assert not cache.keys[:, 1].any()


def test_the_context_is_its_room() -> None:
    cache = KVCache(CONFIG, 1, CPU, torch.float32)
    model = GPT(CONFIG).eval()
    with pytest.raises(ValueError, match="13 tokens do not fit into the context of 12"):
        model(torch.zeros(1, 1, dtype=torch.int64), cache=cache.of_one(0, 12))


def test_its_size_is_that_of_its_docstring() -> None:
    small = GPTConfig()
    cache = KVCache(small, 1, torch.device("meta"), torch.float32)
    numbers = cache.keys.numel() + cache.values.numel()
    assert numbers == 2 * small.n_layer * small.n_ctx * small.n_embd
    assert numbers * 4 == 75_497_472
