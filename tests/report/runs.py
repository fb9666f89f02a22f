"""Runs as the trainer leaves them, made without training: a config and a metrics.jsonl of the usual form."""

import dataclasses
import json
import math
import random
from pathlib import Path
from typing import Any

from gpt2.config import Config, preset, to_toml

Events = list[dict[str, Any]]


def make_events(
    config: Config, steps: int, every: int = 10, end: float = 3.28, skips: tuple[int, ...] = (), seed: int = 0
) -> Events:
    """Events of a run of `steps` steps that falls from ln(vocabulary) to about `end` nats."""
    random_ = random.Random(seed)
    peak = config.optim.lr
    start = math.log(config.model.vocab_size)
    events: Events = [
        {
            "event": "start",
            "step": 0,
            "time": 1_795_430_022.862,
            "compile_seconds": 41.5,
            "parameters": 124_439_808,
            "device": "NVIDIA H100 80GB HBM3",
            "peak_flops": 989e12,
            "threads": 16,
            "torch": "2.13.0",
            "python": "3.12.4",
            "platform": "Linux-6.8.0-x86_64-with-glibc2.39",
        }
    ]

    def loss(step: int) -> float:
        fall = (1 + step / (steps / 60)) ** -0.75
        return end + (start - end) * (fall - 61**-0.75 * step / steps)

    for step in range(every, steps + 1, every):
        seconds = 1.15 * step
        warm = min(1.0, step / max(1, config.optim.warmup_steps))
        rate = peak * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
        events.append(
            {
                "event": "step",
                "step": step,
                "time": 1_795_430_022.862 + seconds,
                "loss": loss(step) + random_.gauss(0, 0.03),
                "lr": rate,
                "grad_norm": 0.25 + 2.5 * math.exp(-step / (steps / 40)) + abs(random_.gauss(0, 0.03)),
                "tokens_per_second": 455_000 + random_.gauss(0, 2_000),
                "mfu": 0.395 + random_.gauss(0, 0.002),
                "train_seconds": seconds,
            }
        )
        if step % (every * max(1, steps // every // 20)) == 0:
            value = loss(step) + 0.01
            events.append(
                {
                    "event": "val",
                    "step": step,
                    "loss": value,
                    "perplexity": math.exp(value),
                    "bits_per_byte": value / math.log(2) / 4.6,
                    "train_seconds": seconds,
                }
            )
            accuracy = 0.25 + 0.055 * (1 - math.exp(-3 * step / steps)) + random_.gauss(0, 0.001)
            events.append(
                {"event": "hellaswag", "step": step, "acc": accuracy - 0.01, "acc_norm": accuracy, "items": 10_042}
            )
            events.append(
                {
                    "event": "sample",
                    "step": step,
                    "prompt": "Hello, I'm a language model,",
                    "text": f" and {step} it is.",
                }
            )
            events.append({"event": "checkpoint", "step": step})
    events += [{"event": "skip", "step": step, "reason": "grad_norm is nan"} for step in skips]
    events.append({"event": "done", "step": steps, "compile_seconds": 41.5, "evaluation_seconds": 312.0})
    return sorted(events, key=lambda event: event["step"])


def write_run(path: Path, config: Config, events: Events) -> Path:
    """The run's directory."""
    path.mkdir(parents=True)
    (path / "config.toml").write_text(to_toml(config), encoding="utf-8")
    (path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    return path


def gpt2_config(**train: Any) -> Config:
    """The 124M recipe on FineWeb-Edu."""
    config = preset("gpt2-124m")
    changed = {"data": "data/fineweb-edu", "data_hash": "a" * 64, **train}
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changed))
