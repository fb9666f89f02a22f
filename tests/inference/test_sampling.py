"""The choice of a token: exact sets of candidates, exact frequencies."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpt2.errors import RequestError, WorkError
from gpt2.inference.sampling import Sampling, probabilities, sample

LOGITS = st.lists(st.sampled_from([-3.0, -1.0, 0.0, 0.5, 2.0]), min_size=2, max_size=12).map(torch.tensor)
ANY_LOGITS = st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=12).map(torch.tensor)
TEMPERATURES = st.sampled_from([0, 1e-300, 1e-45, 1e-6, 0.5, 1, 3.0, 1e30, 1e300])


def likeliest_first(logits: Tensor) -> list[int]:
    """Ids in the order in which they are candidates: of equal ones the lower id first."""
    return sorted(range(len(logits)), key=lambda i: (-logits[i].item(), i))


def candidates(chances: Tensor) -> list[int]:
    return chances.nonzero().flatten().tolist()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(ANY_LOGITS, TEMPERATURES, st.none() | st.integers(1, 15), st.none() | st.floats(0, 1, exclude_min=True))
def test_always_a_distribution_over_the_candidates(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    sampling = Sampling(temperature, top_k, top_p)
    chances = probabilities(logits, sampling)
    assert chances.dtype == torch.float32
    assert chances.shape == logits.shape
    assert (chances >= 0).all()
    assert chances.sum().item() == pytest.approx(1, abs=1e-5)
    kept = candidates(chances)
    assert len(kept) <= (top_k or len(logits))
    token = sample(logits, sampling, torch.Generator().manual_seed(0))
    assert token in kept  # what is no candidate has exactly 0 and never comes


@settings(deadline=None, derandomize=True)
@given(LOGITS, st.integers(1, 15))
def test_top_k_keeps_exactly_k_also_among_equals(logits: Tensor, k: int) -> None:
    chances = probabilities(logits, Sampling(1.0, top_k=k))
    best = sorted(likeliest_first(logits)[:k])
    assert candidates(chances) == best
    expected = torch.zeros_like(logits)
    expected[best] = torch.softmax(logits[best], -1)
    torch.testing.assert_close(chances, expected)


def test_top_k_among_a_vocabulary_of_equals() -> None:
    assert candidates(probabilities(torch.zeros(50257), Sampling(1.0, top_k=50))) == list(range(50))


@settings(deadline=None, derandomize=True)
@given(LOGITS, st.sampled_from([1e-300, 0.01, 0.3, 0.5, 0.9, 0.99]))
def test_top_p_keeps_the_smallest_sufficient_set(logits: Tensor, p: float) -> None:
    plain = torch.softmax(logits, -1)
    chances = probabilities(logits, Sampling(1.0, top_p=p))
    kept, ordered = candidates(chances), likeliest_first(logits)
    assert kept == sorted(ordered[: len(kept)])
    assert len(kept) >= 1
    assert plain[kept].sum() >= p - 1e-6
    assert plain[ordered[: len(kept) - 1]].sum() < p + 1e-6
    torch.testing.assert_close(chances[kept], plain[kept] / plain[kept].sum())


def test_top_p_by_hand() -> None:
    logits = torch.tensor([0.25, 0.5, 0.125, 0.125]).log()
    for p, kept in ((0.4, [1]), (0.5, [1]), (0.51, [0, 1]), (0.75, [0, 1]), (0.8, [0, 1, 2]), (0.9, [0, 1, 2, 3])):
        assert candidates(probabilities(logits, Sampling(1.0, top_p=p))) == kept, p


def test_top_p_of_one_leaves_everything_as_it_is() -> None:
    logits = torch.linspace(0, -80, 200)  # from 0.33 down to 1e-35
    plain = probabilities(logits, Sampling(1.0))
    assert torch.equal(probabilities(logits, Sampling(1.0, top_p=1.0)), plain)
    assert (plain > 0).all()


def test_top_p_sees_what_top_k_and_temperature_left() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    # After top_k = 2: 4/7 and 3/7, so 0.55 is reached by the first alone; without it two are needed.
    assert candidates(probabilities(logits, Sampling(1.0, top_k=2, top_p=0.55))) == [0]
    assert candidates(probabilities(logits, Sampling(1.0, top_p=0.55))) == [0, 1]
    # At temperature 0.5 the chances are squared: 16/30 and 9/30.
    assert candidates(probabilities(logits, Sampling(0.5, top_p=0.53))) == [0]


def test_temperature_zero_is_the_likeliest_and_lowest_id() -> None:
    logits = torch.tensor([1.0, 5.0, 5.0])
    assert probabilities(logits, Sampling(0)).tolist() == [0, 1, 0]
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert sample(logits, Sampling(0, top_k=3, top_p=0.1), generator) == 1
    assert torch.equal(generator.get_state(), before)  # nothing is drawn


def test_temperature_divides_the_logits() -> None:
    logits = torch.tensor([0.3, -1.0, 2.0])
    torch.testing.assert_close(probabilities(logits, Sampling(0.5)), torch.softmax(logits / 0.5, -1))
    assert probabilities(logits, Sampling(1e-300)).tolist() == [0, 0, 1]
    torch.testing.assert_close(probabilities(logits, Sampling(1e300)), torch.full((3,), 1 / 3))


def test_rows_of_a_batch_are_on_their_own() -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(0.7, top_k=5, top_p=0.8)
    expected = torch.stack([probabilities(row, sampling) for row in logits])
    torch.testing.assert_close(probabilities(logits, sampling), expected)
    before = logits.clone()
    probabilities(logits, sampling)
    assert torch.equal(logits, before)  # the caller's logits stay


def test_half_precision_is_computed_in_float32() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(probabilities(logits, Sampling(0.7)), probabilities(logits.float(), Sampling(0.7)))


# The 0.999 quantiles of chi-square by degrees of freedom.
CHI_SQUARE = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47}


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(2.0), Sampling(1.0, top_k=3), Sampling(1.0, top_p=0.85)])
def test_frequencies_are_the_probabilities(sampling: Sampling) -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])
    generator = torch.Generator().manual_seed(0)
    n = 3000
    drawn = torch.tensor([sample(logits, sampling, generator) for _ in range(n)])
    counts = torch.bincount(drawn, minlength=5).double()
    expected = probabilities(logits, sampling).double() * n
    kept = expected > 0
    assert (counts[~kept] == 0).all()
    statistic = ((counts - expected) ** 2 / expected)[kept].sum()
    assert statistic < CHI_SQUARE[int(kept.sum()) - 1]


def test_the_same_generator_draws_the_same() -> None:
    logits = torch.randn(100, generator=torch.Generator().manual_seed(0))
    draws = [
        [sample(logits, Sampling(1.0), generator) for _ in range(20)]
        for generator in (torch.Generator().manual_seed(seed) for seed in (7, 7, 8))
    ]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"temperature": -1}, "temperature -1 must be at least 0"),
        ({"temperature": float("nan")}, "temperature nan must be"),
        ({"temperature": float("inf")}, "temperature inf must be at least 0 and finite"),
        ({"top_k": 0}, "top_k 0 must be at least 1"),
        ({"top_k": -5}, "top_k -5 must be at least 1"),
        ({"top_p": 0.0}, "top_p 0.0 must be in"),
        ({"top_p": 1.5}, "top_p 1.5 must be in"),
        ({"top_p": float("nan")}, "top_p nan must be in"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, float], expected: str) -> None:
    with pytest.raises(RequestError, match=expected):
        Sampling(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize("bad", [[0.0, float("nan")], [0.0, float("inf")], [float("-inf")] * 2])
def test_logits_that_are_no_numbers_are_refused(bad: list[float], temperature: float) -> None:
    with pytest.raises(WorkError, match="not a number"):
        sample(torch.tensor(bad), Sampling(temperature), torch.Generator())


def test_an_id_that_is_shut_out_never_comes() -> None:
    shut_out = torch.tensor([float("-inf"), 0.0, float("-inf")])
    assert {sample(shut_out, Sampling(1.0), torch.Generator().manual_seed(i)) for i in range(20)} == {1}
