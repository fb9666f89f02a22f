"""AdamW as GPT-2 and GPT-3 are trained with, or Muon for the blocks' matrices with AdamW for the rest."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gpt2.config import OptimConfig
from gpt2.distributed import multiplies_bf16_fast
from gpt2.training.parallel import share_of


def build_optimizers(model: nn.Module, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """The optimizers that together update every parameter once; each group holds its `peak_lr`."""
    named = list(model.named_parameters())
    blocks = [p for name, p in named if is_block_matrix(name, p)] if config.optimizer == "muon" else []
    taken = {id(p) for p in blocks}
    # Matmul and embedding weights have two dimensions, biases and layer norms one: only the former decay.
    decayed = [p for _, p in named if p.dim() >= 2 and id(p) not in taken]
    plain = [p for _, p in named if p.dim() < 2]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=config.fused)
    ]
    if blocks:
        optimizers.append(
            Muon(blocks, lr=config.muon_lr, momentum=config.muon_momentum, weight_decay=config.weight_decay)
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def is_block_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon takes it: the weights of the blocks' linear layers, not the embeddings."""
    return name.startswith("h.") and parameter.dim() == 2


class Muon(torch.optim.Muon):
    """torch's Muon (Jordan et al. 2024), with matrices of one shape orthogonalised together.

    Twelve blocks make twelve equal shapes: one batched matmul instead of twelve small ones. And the
    iteration runs in float32 where bfloat16 is emulated, which would take 100 times as long.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameters in _by_shape(p for p in group["params"] if p.grad is not None):
                grads = torch.stack([p.grad for p in parameters if p.grad is not None])  # (n, rows, columns)
                momenta = [self._momentum(p) for p in parameters]
                torch._foreach_lerp_(momenta, list(grads.unbind()), 1 - group["momentum"])
                # Nesterov: look ahead by one more application of the momentum.
                updates = grads.lerp(torch.stack(momenta), group["momentum"])
                updates = orthogonalize(updates, group["ns_steps"])
                rows, columns = parameters[0].shape
                lr = group["lr"] * math.sqrt(max(1.0, rows / columns))
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_sub_(parameters, list((updates * lr).to(parameters[0].dtype).unbind()))

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum_buffer"]
        return buffer


def orthogonalize(matrices: Tensor, steps: int) -> Tensor:
    """(n, rows, columns) -> the same with all singular values moved near 1, by a quintic Newton-Schulz iteration.

    The coefficients (Jordan et al. 2024) trade exactness for speed: singular values end in about (0.7, 1.2).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if tall else matrices  # the Gram matrix x xᵀ is then of the smaller side
    x = x.bfloat16() if multiplies_bf16_fast(x.device) else x.float()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # the largest singular value is now at most 1
    for _ in range(steps):
        gram = x @ x.mT  # (n, rows, rows)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _by_shape(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    groups: dict[torch.Size, list[Tensor]] = {}
    for parameter in parameters:
        groups.setdefault(parameter.shape, []).append(parameter)
    return list(groups.values())


def optimizer_tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """All of the optimizers' state by parameter: `wte.weight.exp_avg`, `h.0.attn.c_attn.weight.momentum_buffer`, …"""
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for optimizer in optimizers
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """The inverse of `optimizer_tensors`, from whole tensors on the host onto the parameters' device and layout."""
    owners = {
        p: (optimizer, group) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]
    }
    parameters = dict(model.named_parameters())
    for full_name, tensor in tensors:
        name, key = full_name.rsplit(".", 1)
        parameter = parameters[name]
        optimizer, group = owners[parameter]
        if key == "step":  # AdamW counts its steps on the host unless it is fused
            value = tensor.to(parameter.device if group.get("fused") else "cpu", copy=True)
        else:
            value = share_of(tensor, parameter)
        optimizer.state[parameter][key] = value


def set_learning_rate(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Every group's learning rate := its peak x factor."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
