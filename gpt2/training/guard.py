"""Bad weather: steps whose loss or gradient is not finite, and losses that jump far above where they were."""

import math
from dataclasses import replace

from gpt2.checkpoint.directory import TrainingState
from gpt2.config import GuardConfig


def bad_step(config: GuardConfig, state: TrainingState, loss: float, gradient_norm: float) -> str | None:
    """Why this step must make no update, or None. `loss` and norm are those of the whole batch."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(gradient_norm):
        return f"the gradient's norm is {gradient_norm}"
    if config.spike_zscore and state.loss_count >= config.window:
        score = (loss - state.loss_mean) / max(math.sqrt(state.loss_variance), 1e-8)
        if score > config.spike_zscore:
            return f"the loss is {loss:.4f}, {score:.1f} standard deviations above {state.loss_mean:.4f}"
    return None


def after_good_step(config: GuardConfig, state: TrainingState, loss: float) -> TrainingState:
    """The state with this loss in the running mean and variance (exponential, over about `window` steps)."""
    weight = 1 / min(state.loss_count + 1, config.window)
    difference = loss - state.loss_mean
    return replace(
        state,
        loss_mean=state.loss_mean + weight * difference,
        loss_variance=(1 - weight) * (state.loss_variance + weight * difference**2),
        loss_count=state.loss_count + 1,
        bad_in_row=0,
    )


def after_bad_step(state: TrainingState, step: int) -> TrainingState:
    """The state with this step, which made no update, among the skipped ones."""
    return replace(state, skipped_steps=(*state.skipped_steps, step), bad_in_row=state.bad_in_row + 1)


def after_rollback(state: TrainingState, checkpoint: TrainingState) -> TrainingState:
    """The checkpoint's state, moved on to the present step.

    All steps since count as skipped: the batches that were seen before and during a spike are passed over
    (PaLM, Chowdhery et al. 2022, section 5.1), and the schedule goes on.
    """
    skipped = sorted({*checkpoint.skipped_steps, *state.skipped_steps, *range(checkpoint.step, state.step)})
    return replace(
        checkpoint,
        step=state.step,
        train_seconds=state.train_seconds,
        val_loss=None,
        best_step=state.best_step,
        best_val_loss=state.best_val_loss,
        skipped_steps=tuple(skipped),
        bad_in_row=0,
        rolled_back_to=(*state.rolled_back_to, checkpoint.step),
    )
