"""The choice of a token: exact sets of candidates, exact frequencies."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2.errors import RequestError
from gpt2.inference.sampling import Sampling, probabilities, sample

LOGITS = st.lists(st.sampled_from([-3.0, -1.0, 0.0, 0.5, 2.0]), min_size=2, max_size=12).map(torch.tensor)


@settings(deadline=None, derandomize=True)
@given(LOGITS, st.integers(1, 15))
def test_top_k_keeps_exactly_k_also_among_equals(logits: torch.Tensor, k: int) -> None:
    chances = probabilities(logits, Sampling(1.0, top_k=k))
    kept = chances.nonzero().flatten().tolist()
    likeliest_first = sorted(range(len(logits)), key=lambda i: (-logits[i].item(), i))
    assert sorted(kept) == sorted(likeliest_first[:k])
    assert chances.sum().item() == pytest.approx(1)


@settings(deadline=None, derandomize=True)
@given(LOGITS, st.sampled_from([0.01, 0.3, 0.5, 0.9, 0.99, 1.0]))
def test_top_p_keeps_the_smallest_sufficient_set(logits: torch.Tensor, p: float) -> None:
    plain = torch.softmax(logits, -1)
    kept = probabilities(logits, Sampling(1.0, top_p=p)).nonzero().flatten().tolist()
    ordered = sorted(range(len(logits)), key=lambda i: (-logits[i].item(), i))
    assert sorted(kept) == sorted(ordered[: len(kept)])
    assert len(kept) >= 1
    assert plain[kept].sum() >= p - 1e-6
    assert plain[ordered[: len(kept) - 1]].sum() < p + 1e-6


def test_temperature_zero_is_the_likeliest_and_lowest_id() -> None:
    logits = torch.tensor([1.0, 5.0, 5.0])
    assert probabilities(logits, Sampling(0)).tolist() == [0, 1, 0]
    assert sample(logits, Sampling(0), torch.Generator()) == 1


def test_temperature_divides_the_logits() -> None:
    logits = torch.tensor([0.3, -1.0, 2.0])
    torch.testing.assert_close(probabilities(logits, Sampling(0.5)), torch.softmax(logits / 0.5, -1))
    assert torch.isfinite(probabilities(logits * 1e4, Sampling(1e-6))).all()


def test_frequencies_are_the_probabilities() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    generator = torch.Generator().manual_seed(0)
    n = 4000
    counts = torch.bincount(
        torch.tensor([sample(logits, Sampling(1.0), generator) for _ in range(n)]), minlength=4
    ).double()
    expected = torch.softmax(logits, -1).double() * n
    assert ((counts - expected) ** 2 / expected).sum() < 16.3  # chi-square, 3 degrees of freedom, p = 0.001


@pytest.mark.parametrize(
    "values", [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_values_out_of_range_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(RequestError, match="must be"):
        Sampling(**values)  # type: ignore[arg-type]
