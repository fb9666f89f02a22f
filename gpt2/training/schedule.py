"""The learning rate at each moment: a factor between 0 and 1 of the peak."""

import math

from gpt2.config import OptimConfig


def learning_rate_factor(config: OptimConfig, step: int, progress: float) -> float:
    """warm-up(step) x decay(progress).

    step: 0 for the first; the warm-up (step + 1) / warmup_steps is above 0 there and 1 at its end.
    progress: the part of the decay that lies behind, in [0, 1] (`progress_by_steps`, or elapsed / planned time).
    """
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    return warmup * decay(config, min(max(progress, 0.0), 1.0))


def progress_by_steps(config: OptimConfig, step: int, steps: int) -> float:
    """0 until the end of warm-up, 1 at step `steps`."""
    return max(0, step - config.warmup_steps) / max(1, steps - config.warmup_steps)


def decay(config: OptimConfig, progress: float) -> float:
    """From 1 at progress 0 to min_lr_ratio at progress 1, along the schedule's curve.

    cosine: Loshchilov & Hutter 2017, eq. 5. wsd: Hu et al. 2024 (MiniCPM), section 4, with a linear decay.
    """
    low = config.min_lr_ratio
    match config.schedule:
        case "cosine":
            return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            return 1 - (1 - low) * progress
        case "wsd":
            stable = 1 - config.decay_fraction
            return 1 - (1 - low) * max(0.0, progress - stable) / config.decay_fraction
        case "constant":
            return 1.0
