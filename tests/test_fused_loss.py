"""The fused loss against lm_head followed by cross-entropy: value, gradients, padding, ignored targets."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from gpt2 import fused_loss
from gpt2.config import GPTConfig
from gpt2.fused_loss import chunk_size, fused_cross_entropy
from gpt2.model import GPT

CONFIG = GPTConfig(vocab_size=300, n_ctx=16, n_layer=2, n_head=2, n_embd=32)


@pytest.mark.parametrize("tokens", [1, 7, 64, 130])
@pytest.mark.parametrize("size", [1, 16, 1000])
def test_equals_linear_and_cross_entropy(monkeypatch: pytest.MonkeyPatch, tokens: int, size: int) -> None:
    monkeypatch.setattr(fused_loss, "chunk_size", lambda *_: size)
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, 32, generator=generator, requires_grad=True)
    weight = torch.randn(384, 32, generator=generator, requires_grad=True)
    targets = torch.randint(0, 300, (tokens,), generator=generator)
    targets[::3] = -100
    targets[0] = 5
    expected = F.cross_entropy((hidden @ weight.T)[:, :300], targets)
    wanted = torch.autograd.grad(expected * 0.25, (hidden, weight))
    loss = fused_cross_entropy(hidden, weight, targets, 300)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for gradient, other in zip(torch.autograd.grad(loss * 0.25, (hidden, weight)), wanted, strict=True):
        assert torch.linalg.norm(gradient - other) <= 1e-5 * torch.linalg.norm(other)
    loss = fused_cross_entropy(hidden, weight, targets, 300)
    assert torch.count_nonzero(torch.autograd.grad(loss, weight)[0][300:]) == 0


@pytest.mark.parametrize(("tied", "compiled"), [(True, False), (False, False), (True, True)])
def test_a_model_trains_alike_with_it(tied: bool, compiled: bool) -> None:
    results = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = GPT(replace(CONFIG, tie_embeddings=tied, fused_loss=fused))
        idx = torch.randint(0, 300, (4, 17), generator=torch.Generator().manual_seed(1))
        function = torch.compile(model, dynamic=False) if compiled else model
        logits, loss = function(idx[:, :-1].contiguous(), idx[:, 1:].contiguous())
        assert (logits is None) == fused
        loss.backward()
        results.append((loss.item(), {name: p.grad for name, p in model.named_parameters()}))
    (loss, gradients), (fused_value, fused_gradients) = results
    assert fused_value == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        # Relative to the norm, of which the keys' bias (rounding only) is no part.
        assert torch.linalg.norm(fused_gradients[name] - gradient) <= 1e-5 * torch.linalg.norm(gradient), name


def test_evaluation_and_generation_still_get_logits() -> None:
    model = GPT(replace(CONFIG, fused_loss=True)).eval()
    idx = torch.zeros(1, 4, dtype=torch.int64)
    assert model(idx, idx)[0].shape == (1, 4, 300)
    assert model.train()(idx)[0].shape == (1, 4, 300)


def test_under_autocast_the_sums_stay_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 32, generator=generator, requires_grad=True)
    weight = torch.randn(384, 32, generator=generator, requires_grad=True)
    targets = torch.randint(0, 300, (40,), generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        loss = fused_cross_entropy(hidden, weight, targets, 300)
    expected = F.cross_entropy((hidden @ weight.T)[:, :300], targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    wanted = torch.autograd.grad(expected, (hidden, weight))
    for gradient, other in zip(gradients, wanted, strict=True):
        assert gradient.dtype == torch.float32
        assert torch.linalg.norm(gradient - other) <= 2e-2 * torch.linalg.norm(other)


def test_all_targets_ignored_is_no_loss_and_no_gradient() -> None:
    hidden, weight = torch.randn(8, 4, requires_grad=True), torch.randn(16, 4, requires_grad=True)
    loss = fused_cross_entropy(hidden, weight, torch.full((8,), -100), 16)
    loss.backward()
    assert loss.item() == 0
    assert torch.count_nonzero(hidden.grad) == 0


@pytest.mark.parametrize(("tokens", "columns"), [(1, 128), (1024, 8192), (1024, 50304), (32768, 50304), (65537, 10)])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_chunks_are_even_and_cover_all(tokens: int, columns: int, device: str) -> None:
    size = chunk_size(tokens, columns, torch.device(device))
    chunks = -(-tokens // size)
    assert chunks * size - tokens < chunks
