"""Logits -> the next token."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt2.errors import RequestError, WorkError


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. The steps are applied in this order: temperature, top_k, top_p."""

    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int | None = None
    """Exactly this many candidates stay; of equal ones those with the lower id."""
    top_p: float | None = None
    """The fewest candidates stay whose probabilities sum to at least this (nucleus sampling, Holtzman et al. 2020)."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise RequestError(f"temperature {self.temperature} must be at least 0 and finite")
        if self.top_k is not None and self.top_k < 1:
            raise RequestError(f"top_k {self.top_k} must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise RequestError(f"top_p {self.top_p} must be in (0, 1]")


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """(…, vocab_size) logits -> probabilities of the choice, in float32; what is not a candidate has exactly 0."""
    logits = logits.float()
    if sampling.temperature == 0:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
    # The maximum becomes 0, so that a tiny temperature overflows to -inf only; below float32's range it would be 0.
    logits = (logits - logits.amax(-1, keepdim=True)) / max(sampling.temperature, 1e-30)
    # A stable descending order decides ties by the lower id, so that top_k keeps exactly k.
    ordered, ids = torch.sort(logits, dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        ordered[..., sampling.top_k :] = float("-inf")
    chances = torch.softmax(ordered, dim=-1)
    if sampling.top_p is not None and sampling.top_p < 1:
        before = chances.cumsum(-1) - chances  # of the likelier candidates together; 0 for the first, which stays
        chances = chances.masked_fill((before >= sampling.top_p) & (before > 0), 0.0)
        chances = chances / chances.sum(-1, keepdim=True)
    return torch.zeros_like(chances).scatter(-1, ids, chances)


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token id from (vocab_size,) logits. Raises WorkError where one is NaN or all are infinite."""
    if not math.isfinite(logits.max()):  # NaN where any is NaN
        raise WorkError(
            "the model's output is not a number: its weights are spoilt; take an earlier checkpoint or another model"
        )
    chances = probabilities(logits, sampling)
    if sampling.temperature == 0:
        return int(chances.argmax())
    return int(torch.multinomial(chances.cpu(), 1, generator=generator))
