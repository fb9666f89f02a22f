"""Logits -> the next token."""

import math
from dataclasses import dataclass

import numpy as np
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
    """(vocab_size,) logits -> float32 probabilities of the choice; what is not a candidate has exactly 0."""
    return torch.from_numpy(_probabilities(_numpy(logits), sampling))


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token id from (vocab_size,) logits. Raises WorkError where one is NaN or all are infinite."""
    row = _numpy(logits)
    best = int(row.argmax())  # the first NaN where there is one
    if not math.isfinite(row[best]):
        raise WorkError(
            "the model's output is not a number: its weights are spoilt; take an earlier checkpoint or another model"
        )
    if sampling.temperature == 0:
        return best
    below = _probabilities(row, sampling).cumsum(dtype=np.float64)
    drawn = torch.rand((), dtype=torch.float64, generator=generator).item() * below[-1]  # in [0, all of it)
    return int(below.searchsorted(drawn, side="right"))


def _numpy(logits: Tensor) -> np.ndarray:
    # A row is too short to share: torch would wake its threads, which then stand in the way of the network's.
    return logits.detach().float().cpu().numpy()


def _probabilities(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    if sampling.temperature == 0:
        choice: np.ndarray = np.zeros_like(logits)
        choice[logits.argmax()] = 1.0
        return choice
    # The maximum becomes 0, so that a tiny temperature overflows to -inf only; below float32's range it would be 0.
    with np.errstate(over="ignore"):
        logits = (logits - logits.max()) / np.float32(max(sampling.temperature, 1e-30))
    if sampling.top_k is not None and sampling.top_k < len(logits):
        least = np.partition(logits, -sampling.top_k)[-sampling.top_k]
        kept = logits > least
        kept[np.flatnonzero(logits == least)[: sampling.top_k - kept.sum()]] = True  # of equal ones the lower ids
        logits = np.where(kept, logits, -np.inf)
    chances: np.ndarray = np.exp(logits)
    chances /= chances.sum(dtype=np.float64)
    if sampling.top_p is not None and sampling.top_p < 1:
        # All that are below this sum to less than 1 - top_p: the nucleus is among the others, and few are to sort.
        others = np.flatnonzero(chances >= (1 - sampling.top_p) / len(chances) / 2)
        ids = others[np.argsort(-chances[others], kind="stable")]  # equal ones by the lower id
        before = chances[ids].cumsum(dtype=np.float64) - chances[ids]  # of the likelier candidates together
        ids = ids[(before < sampling.top_p) | (before <= 0)]  # the first stays
        nucleus: np.ndarray = np.zeros_like(chances)
        nucleus[ids] = chances[ids] / chances[ids].sum(dtype=np.float64)
        return nucleus
    return chances
