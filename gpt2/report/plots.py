"""Plots of a run, drawn from its metrics.jsonl alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TRAIN_COLOR, VALIDATION_COLOR = "#9bb8d3", "#c8102e"


def plot_loss(events: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draws training and validation loss (nats a token, left) and bits per byte (right) against minutes of training.

    events: of a run's metrics.jsonl. Writes a PNG of 1,440 x 810 pixels.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [event for event in events if event["event"] == "step"]
    validations = [event for event in events if event["event"] == "val"]
    figure, axes = plt.subplots(figsize=(9.6, 5.4), dpi=150)
    minutes = [event["train_seconds"] / 60 for event in steps]
    axes.plot(
        minutes,
        [event["loss"] for event in steps],
        color=TRAIN_COLOR,
        linewidth=1,
        label="training, each batch",
    )
    if validations:
        axes.plot(
            [event["train_seconds"] / 60 for event in validations],
            [event["loss"] for event in validations],
            color=VALIDATION_COLOR,
            linewidth=2,
            marker="o",
            markersize=4,
            label="validation, held-out documents",
        )
        last = validations[-1]
        axes.annotate(
            f"{last['bits_per_byte']:.3f} bits per byte",
            (last["train_seconds"] / 60, last["loss"]),
            xytext=(0, -14),
            textcoords="offset points",
            ha="right",
            va="top",
            color=VALIDATION_COLOR,
            fontsize=12,
        )
    axes.set_xlabel("minutes of training")
    axes.set_ylabel("loss (nats a token)")
    axes.set_title(title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(left=0)
    axes.margins(y=0.12)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
