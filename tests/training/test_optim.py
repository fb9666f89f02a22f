"""Which parameters decay, which go to Muon, and Muon against torch's own."""

import math

import pytest
import torch

from gpt2.config import GPTConfig, OptimConfig
from gpt2.model import GPT
from gpt2.training.optim import (
    Muon,
    build_optimizers,
    load_optimizer_tensors,
    optimizer_tensors,
    orthogonalize,
    set_learning_rate,
)

TINY = GPTConfig(vocab_size=50, n_ctx=8, n_layer=2, n_head=2, n_embd=16)


def model() -> GPT:
    torch.manual_seed(0)
    return GPT(TINY)


def names_of(network: GPT, optimizer: torch.optim.Optimizer, decayed: bool) -> set[str]:
    names = {id(p): name for name, p in network.named_parameters()}
    groups = [g for g in optimizer.param_groups if (g["weight_decay"] > 0) == decayed]
    return {names[id(p)] for g in groups for p in g["params"]}


def test_exactly_matmul_and_embedding_weights_decay() -> None:
    network = model()
    (adamw,) = build_optimizers(network, OptimConfig())
    linear_and_embedding = {"wte.weight", "wpe.weight"} | {
        f"h.{i}.{name}.weight" for i in range(2) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert names_of(network, adamw, decayed=True) == linear_and_embedding
    every = {name for name, _ in network.named_parameters()}
    assert names_of(network, adamw, decayed=False) == every - linear_and_embedding


def test_muon_takes_the_blocks_matrices_and_adamw_the_rest() -> None:
    network = model()
    adamw, muon = build_optimizers(network, OptimConfig(optimizer="muon"))
    in_muon = names_of(network, muon, decayed=True)
    assert len(in_muon) == 8
    assert all(name.startswith("h.") for name in in_muon)
    rest = names_of(network, adamw, True) | names_of(network, adamw, False)
    assert rest | in_muon == {name for name, _ in network.named_parameters()}
    assert not rest & in_muon


@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (16, 64)])
def test_orthogonalize_moves_singular_values_near_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    result = orthogonalize(torch.randn(3, *shape), steps=5)
    singular = torch.linalg.svdvals(result.float())
    assert singular.max() < 1.3
    assert singular.median() > 0.6


def test_muon_steps_as_torchs_own_does() -> None:
    """torch's runs in bfloat16 (8 bits of mantissa) and one matrix at a time: equal to that precision."""
    torch.manual_seed(2)
    ours = [torch.nn.Parameter(torch.randn(24, 16)) for _ in range(3)]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    a = Muon(ours, lr=0.02, weight_decay=0.1)
    b = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1)
    for _ in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.linalg.norm(p - q) / torch.linalg.norm(q) < 2e-3


def test_muon_equals_its_formula_in_float32() -> None:
    torch.manual_seed(3)
    p = torch.nn.Parameter(torch.randn(8, 4))
    before, p.grad = p.detach().clone(), torch.randn(8, 4)
    Muon([p], lr=0.1, momentum=0.9, weight_decay=0.5).step()
    update = p.grad * 0.1 * 0.9 + p.grad * 0.1  # momentum starts at 0; Nesterov looks one step ahead
    x = (update / update.norm()).T
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    expected = before * (1 - 0.1 * 0.5) - 0.1 * math.sqrt(8 / 4) * x.T
    torch.testing.assert_close(p.detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_state_survives_saving_and_loading_bit_for_bit(kind: str) -> None:
    def one_step(network: GPT, optimizers: list[torch.optim.Optimizer], seed: int) -> None:
        idx = torch.randint(0, 50, (2, 8), generator=torch.Generator().manual_seed(seed))
        network(idx, idx)[1].backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    config = OptimConfig(optimizer=kind)
    first = model()
    first_optimizers = build_optimizers(first, config)
    for seed in range(3):
        one_step(first, first_optimizers, seed)
    second = model()
    second.load_state_dict(first.state_dict())
    second_optimizers = build_optimizers(second, config)
    load_optimizer_tensors(second, second_optimizers, optimizer_tensors(first, first_optimizers).items())
    for seed in range(3, 6):
        one_step(first, first_optimizers, seed)
        one_step(second, second_optimizers, seed)
    for (name, a), (_, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_learning_rates_scale_from_each_groups_peak() -> None:
    optimizers = build_optimizers(model(), OptimConfig(optimizer="muon", lr=1e-3, muon_lr=0.02))
    set_learning_rate(optimizers, 0.5)
    set_learning_rate(optimizers, 0.25)
    assert {g["lr"] for o in optimizers for g in o.param_groups} == {0.25e-3, 0.005}
