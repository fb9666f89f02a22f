"""The cache as a store: what was put in comes out, per layer and in order; copies share nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpt2.config import GPTConfig
from gpt2.inference.kv_cache import KVCache
from gpt2.model import GPT

CONFIG = GPTConfig(vocab_size=50, n_ctx=12, n_layer=3, n_head=2, n_embd=8)
CPU = torch.device("cpu")


def filled(batch: int, tokens: int, seed: int = 0) -> tuple[KVCache, Tensor, Tensor]:
    """A cache and the (n_layer, B, nh, tokens, hs) keys and values that it was given."""
    random = torch.Generator().manual_seed(seed)
    keys, values = torch.randn((2, CONFIG.n_layer, batch, CONFIG.n_head, tokens, 4), generator=random)
    cache = KVCache(CONFIG, batch, CPU, torch.float32)
    for layer in range(CONFIG.n_layer):
        cache.extend(layer, keys[layer], values[layer])
    cache.advance(tokens)
    return cache, keys, values


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 3), st.lists(st.integers(1, 5), min_size=1, max_size=6).filter(lambda parts: sum(parts) <= 12))
def test_each_layer_gives_back_all_that_it_was_given(batch: int, parts: list[int]) -> None:
    random = torch.Generator().manual_seed(0)
    keys, values = torch.randn((2, CONFIG.n_layer, batch, CONFIG.n_head, sum(parts), 4), generator=random)
    cache = KVCache(CONFIG, batch, CPU, torch.float32)
    start = 0
    for part in parts:
        assert cache.length == start
        stop = start + part
        for layer in range(CONFIG.n_layer):
            k, v = cache.extend(layer, keys[layer, :, :, start:stop], values[layer, :, :, start:stop])
            assert torch.equal(k, keys[layer, :, :, :stop])
            assert torch.equal(v, values[layer, :, :, :stop])
        cache.advance(part)
        start = stop


def test_the_length_is_the_callers_to_advance() -> None:
    """Each layer stores at the same place in one pass, so only the end of the pass moves it."""
    cache = KVCache(CONFIG, 1, CPU, torch.float32)
    part = torch.ones(1, 2, 3, 4)
    cache.extend(0, part, part)
    assert cache.length == 0
    cache.extend(0, part * 2, part * 2)
    cache.advance(3)
    assert cache.length == 3
    k, _ = cache.extend(0, part[:, :, :1] * 5, part[:, :, :1])
    assert k[0, 0, :, 0].tolist() == [2, 2, 2, 5]


def test_a_copy_for_several_sequences_is_independent() -> None:
    cache, keys, values = filled(1, 5)
    copy = cache.repeat(3)
    assert copy.length == 5
    step = torch.zeros(3, CONFIG.n_head, 1, 4)
    for layer in range(CONFIG.n_layer):
        k, v = copy.extend(layer, step, step)
        assert k.shape == (3, CONFIG.n_head, 6, 4)
        for b in range(3):
            assert torch.equal(k[b, :, :5], keys[layer, 0])
            assert torch.equal(v[b, :, :5], values[layer, 0])
    copy.keys.zero_()
    copy.advance(1)
    assert cache.length == 5
    assert torch.equal(cache.keys[:, :, :, :5], keys)


def test_the_context_is_its_room() -> None:
    cache, _, _ = filled(1, 12)
    model = GPT(CONFIG).eval()
    with pytest.raises(ValueError, match="13 tokens do not fit into the context of 12"):
        model(torch.zeros(1, 1, dtype=torch.int64), cache=cache)


def test_its_size_is_that_of_its_docstring() -> None:
    small = GPTConfig()
    cache = KVCache(small, 1, torch.device("meta"), torch.float32)
    numbers = cache.keys.numel() + cache.values.numel()
    assert numbers == 2 * small.n_layer * small.n_ctx * small.n_embd
    assert numbers * 4 == 75_497_472
