"""The learning rate against the recipe's formula, and the shape of each schedule."""

import itertools
import math

import pytest

from gpt2.config import OptimConfig, preset
from gpt2.training.schedule import decay, learning_rate_factor, progress_by_steps

RECIPE = preset("gpt2-124m")


def rate(step: int) -> float:
    config = RECIPE.optim
    return config.lr * learning_rate_factor(config, step, progress_by_steps(config, step, RECIPE.train.steps))


def lecture(step: int) -> float:
    """The lecture's get_lr, with warm-up 715, 19,073 steps, 6e-4 down to a tenth."""
    if step < 715:
        return 6e-4 * (step + 1) / 715
    part = (step - 715) / (19073 - 715)
    return 6e-5 + 0.5 * (1 + math.cos(math.pi * part)) * (6e-4 - 6e-5)


@pytest.mark.parametrize("step", [0, 1, 357, 714, 715, 716, 9894, 19072, 19073])
def test_recipe_follows_the_formula(step: int) -> None:
    assert rate(step) == pytest.approx(lecture(step), rel=1e-12)


def test_recipe_at_its_corners() -> None:
    assert rate(0) == pytest.approx(6e-4 / 715)
    assert rate(714) == rate(715) == pytest.approx(6e-4)
    assert rate((19073 + 715) // 2) == pytest.approx((6e-4 + 6e-5) / 2, rel=1e-12)
    assert rate(19073) == pytest.approx(6e-5)


def test_every_schedule_ends_at_its_minimum_and_never_rises() -> None:
    for schedule in ("cosine", "linear", "wsd"):
        config = OptimConfig(schedule=schedule, min_lr_ratio=0.1)
        values = [decay(config, p / 100) for p in range(101)]
        assert values[0] == 1.0
        assert values[-1] == pytest.approx(0.1)
        assert all(a >= b for a, b in itertools.pairwise(values))
    constant = OptimConfig(schedule="constant")
    assert decay(constant, 1.0) == 1.0


def test_wsd_is_stable_until_its_decay() -> None:
    config = OptimConfig(schedule="wsd", decay_fraction=0.25, min_lr_ratio=0.0)
    assert decay(config, 0.75) == 1.0
    assert decay(config, 0.875) == pytest.approx(0.5)


def test_no_warmup_starts_at_the_peak() -> None:
    assert learning_rate_factor(OptimConfig(warmup_steps=0), 0, 0.0) == 1.0
