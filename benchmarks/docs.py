"""Carries what was measured into docs/optimisations/: tables between markers, and the pictures.

python benchmarks/docs.py

Reads results/ladder_*.json (gpt2 ladder), results/optimisations.json and results/optimisations_speed.json. A block of a
page, from <!-- ladder:NAME --> to <!-- /ladder --> or the same with `measured`, is written anew; the rest stays.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpt2.config import PRESETS
from gpt2.model import flops_per_token
from gpt2.report.plots import TRAIN_COLOR, VALIDATION_COLOR
from gpt2.training.schedule import learning_rate_factor, progress_by_steps

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "optimisations"
GREY = "#888888"

# A page's rung is the first whose name has one of these words, and none of the second row.
RUNGS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "tf32": (("tf32",), ()),
    "bf16": (("bf16", "bfloat16", "autocast"), ("copies", "weights")),
    "compile": (("compile",), ("mode", "autotune", "regional")),
    "flash": (("flash",), ()),
    "nice": (("nice", "pad", "vocab", "50304"), ()),
    "fused": (("adamw", "optimizer", "fused"), ("loss", "head", "cross")),
}
NOT_MEASURED = (
    "Not measured yet: `gpt2 ladder` writes `benchmarks/results/ladder_*.json`, `python benchmarks/docs.py` the table."
)

Report = Mapping[str, Any]


def find_rung(name: str, results: Sequence[Report]) -> Report | None:
    """The rung of a page among a ladder's results, by the words in its name; None where there is none."""
    words, others = RUNGS[name]
    for result in results:
        rung = str(result.get("name", "")).lower()
        if any(word in rung for word in words) and not any(word in rung for word in others):
            return result
    return None


def describe_machine(report: Report) -> str:
    """Device, and what the ladder was run with, in a few words."""
    machine, config = report.get("machine") or {}, report.get("config") or {}
    name = next((str(machine[k]) for k in ("gpu", "device_name", "card", "cpu", "device") if machine.get(k)), "?")
    if not any(machine.get(k) for k in ("gpu", "device_name", "card")) and machine.get("cores"):
        name += f", {machine['cores']} cores"
    parts = [f"{config['preset']}"] if config.get("preset") else []
    parts += [f"{letter}={config[k]}" for letter, k in (("B", "batch"), ("T", "context")) if config.get(k)]
    return name + (f"; {' '.join(parts)}" if parts else "")


def shown(value: Any, form: Callable[[float], str]) -> str:
    """The number in its form, a dash where there is none."""
    return form(float(value)) if isinstance(value, int | float) and not isinstance(value, bool) else "–"


COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("tokens/s", "tokens_per_second", lambda x: f"{x:,.0f}"),
    ("ms a step", "ms_per_step", lambda x: f"{x:,.1f}"),
    ("MFU", "mfu", lambda x: f"{100 * x:.1f} %"),
    ("peak memory", "peak_memory", lambda x: f"{x / 1e9:.2f} GB"),
    ("over the rung before", "gain", lambda x: f"×{x:.2f}"),
    ("over the first", "gain_total", lambda x: f"×{x:.2f}"),
    ("loss difference", "loss_difference", lambda x: f"{x:+.1e}"),
    ("compile", "compile_seconds", lambda x: f"{x:.0f} s"),
)


def row(first: str, result: Report) -> list[str]:
    """A line of the ladder's table; a rung that was skipped gives its reason."""
    if result.get("skipped"):
        return [first, f"not measured: {result['skipped']}", *[""] * (len(COLUMNS) - 1)]
    return [first, *(shown(result.get(key), form) for _, key, form in COLUMNS)]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def ladder_block(name: str, reports: Sequence[Report]) -> str:
    """The rung of one page on every machine; `all`: every rung of every machine."""
    names = [column for column, _, _ in COLUMNS]
    if name == "all":
        parts = []
        for report in reports:
            rungs = [row(str(result.get("name", "?")), result) for result in report.get("results", [])]
            parts.append(f"{describe_machine(report)}:\n\n{table(['rung', *names], rungs)}")
        return "\n\n".join(parts) or NOT_MEASURED
    rows = []
    for report in reports:
        rung = find_rung(name, report.get("results", []))
        if rung is not None:
            rows.append(row(describe_machine(report), rung))
    return table(["machine", *names], rows) if rows else NOT_MEASURED


def by_name(report: Report) -> dict[str, Report]:
    return {str(result["name"]): result for result in report["results"]}


def range_of(differences: Sequence[float]) -> str:
    return f"{min(differences):+.4f} … {max(differences):+.4f}"


def losses_block(variants: Sequence[str]) -> Callable[[Report, Report], str]:
    """Validation losses of the small network, the recipe and the named variants."""

    def block(facts: Report, _: Report) -> str:
        runs = {variant["name"]: variant for variant in by_name(facts)["losses"]["variants"]}
        rows = []
        for name in ("recipe", *variants):
            differences = [run["difference"] for run in runs[name]["runs"]]
            shown_difference = "" if name == "recipe" else range_of(differences)
            rows.append(
                [name, f"{runs[name]['val_loss']:.4f}", shown_difference, f"{100 * runs[name]['clipped']:.0f} %"]
            )
        seeds = len(runs["recipe"]["runs"])
        head = ["", "validation loss", f"difference, {seeds} seeds: least … greatest", "steps with a norm above 1"]
        return table(head, rows) + "\n\n" + small_network(facts["config"])

    return block


def small_network(config: Report) -> str:
    """The sentence under the losses."""
    return (
        f"Mean of {len(config['seeds'])} seeds, float32. {config['layers']} layers × {config['width']}, "
        f"context {config['context']}, {config['windows'] * config['context']} tokens a step, {config['steps']} steps, "
        f"learning rate {config['lr']:g}, on presidential addresses; nats a token on "
        f"{config['validation_tokens']:,} held-out tokens.\nThe differences are to the recipe of the same seed. "
        "So short a run of so small a network tells the large effects from the small, and no more."
    )


def residual_block(facts: Report, _: Report) -> str:
    places = (0, 1, 2, 4, 8, 12)
    rows = [
        [v["name"], *(f"{v['stds'][place]:.4f}" for place in places), f"{v['first_loss']:.3f}"]
        for v in by_name(facts)["residual"]["variants"]
    ]
    return table(["projections", "embeddings", *(f"block {place}" for place in places[1:]), "first loss"], rows)


def matmul_block(facts: Report, _: Report) -> str:
    rows = [[v["name"], str(v["mantissa_bits"]), f"{v['error']:.2e}"] for v in by_name(facts)["matmul"]["variants"]]
    return table(["inputs rounded to", "mantissa bits stored", "relative error of the product (RMS)"], rows)


def attention_block(facts: Report, speed: Report) -> str:
    seconds = {v["context"]: v for v in by_name(speed)["attention"]["variants"]}
    rows = []
    for v in by_name(facts)["attention"]["variants"]:
        explicit, flash = (seconds[v["context"]][kind]["median"] for kind in ("explicit", "flash"))
        rows.append(
            [
                f"{v['context']:,}",
                f"{v['explicit'] / 1e6:.2f} MB",
                f"{v['flash'] / 1e6:.2f} MB",
                f"{1e3 * explicit:.1f} ms",
                f"{1e3 * flash:.1f} ms",
                f"{v['largest_difference']:.1e}",
            ]
        )
    head = ["T", "kept, explicit", "kept, flash", "time, explicit", "time, flash", "largest difference"]
    return (
        table(head, rows) + f"\n\nTimes: forward and backward, median of {speed['config']['rounds']}, " + where(speed)
    )


def where(report: Report) -> str:
    return f"{report['machine']['cpu']}, {report['config']['threads']} threads, float32."


def padding_block(facts: Report, speed: Report) -> str:
    v = by_name(facts)["padding"]
    heads = by_name(speed)["head"]["variants"]
    rows = [[f"{head['columns']:,}", *(f"{1e3 * head[k]:.1f} ms" for k in ("median", "min", "max"))] for head in heads]
    return (
        f"The same weights with {v['rows']} padded rows and with none: the loss differs by {v['loss_difference']:g}, "
        f"the gradient of the real rows by at most {v['gradient_difference']:g},\nand the largest gradient of a padded "
        f"row is {v['largest_padded_gradient']:g}.\n\nlm_head alone, forward and backward, 512 tokens × 768:\n\n"
        + table(["columns", "median", "least", "greatest"], rows)
        + f"\n\n{heads[0]['runs']} runs in turn, {where(speed)}"
    )


def optimizer_block(_: Report, speed: Report) -> str:
    rows = [
        [v["name"], *(f"{1e3 * v[k]:.0f} ms" for k in ("median", "min", "max"))]
        for v in by_name(speed)["optimizer"]["variants"]
        if v["name"] != "clipping"
    ]
    return (
        table(["one step of GPT-2 124M", "median", "least", "greatest"], rows)
        + f"\n\n{speed['config']['rounds']} runs in turn, {where(speed)}"
    )


def clipping_block(facts: Report, speed: Report) -> str:
    clipping = next(v for v in by_name(speed)["optimizer"]["variants"] if v["name"] == "clipping")
    runs = {variant["name"]: variant for variant in by_name(facts)["losses"]["variants"]}
    norms = ", ".join(f"{run['largest_norm']:.1f} (median {run['median_norm']:.2f})" for run in runs["recipe"]["runs"])
    return (
        losses_block(["without clipping"])(facts, speed)
        + f"\n\nThe largest gradient norm of the recipe's runs, by seed: {norms}.\n\nOne pass over the gradients of "
        f"GPT-2 124M, norm and product: {1e3 * clipping['median']:.0f} ms, median of {clipping['runs']}, {where(speed)}"
    )


def accumulation_block(facts: Report, _: Report) -> str:
    rows = [
        [str(v["micro_batch"]), str(v["micro_steps"]), f"{v['difference']:.1e}"]
        for v in by_name(facts)["accumulation"]["variants"]
    ]
    return table(["windows at once", "micro-steps", "largest difference over largest gradient"], rows)


def communication_block(facts: Report, _: Report) -> str:
    variants = by_name(facts)["communication"]["variants"]
    rows = [[v["name"], str(v["micro_steps"]), str(v["calls"]), f"{v['bytes']:,}"] for v in variants]
    buckets = variants[-1]["buckets"]
    return (
        table(["gradients sent", "micro-steps", "buckets", "bytes"], rows)
        + f"\n\nThe {len(buckets)} buckets in the order in which they go out, in MB: "
        + ", ".join(f"{size / 1e6:.1f}" for size in buckets)
        + "."
    )


def int8_block(facts: Report, _: Report) -> str:
    rows = [
        [v["name"], f"{100 * v['weight_error']:.2f} %", f"{v['val_loss']:.4f}", f"{v['difference']:+.5f}"]
        for v in by_name(facts)["int8"]["variants"]
    ]
    return table(["weights", "relative error of a matrix (mean)", "validation loss", "difference"], rows)


MEASURED: Mapping[str, Callable[[Report, Report], str]] = {
    "norm": losses_block(["post-norm", "post-norm without warm-up"]),
    "init": lambda facts, speed: (
        residual_block(facts, speed) + "\n\n" + losses_block(["residual init not scaled"])(facts, speed)
    ),
    "ties": losses_block(["untied"]),
    "matmul": matmul_block,
    "attention": attention_block,
    "padding": padding_block,
    "optimizer": lambda facts, speed: (
        optimizer_block(facts, speed) + "\n\n" + losses_block(["beta2 0.999"])(facts, speed)
    ),
    "clipping": clipping_block,
    "schedule": losses_block(["without warm-up", "constant learning rate"]),
    "decay": losses_block(["without weight decay", "weight decay on everything"]),
    "accumulation": accumulation_block,
    "communication": communication_block,
    "int8": int8_block,
}


def fill(text: str, ladders: Sequence[Report], facts: Report, speed: Report) -> str:
    """The page with every block written anew. Raises KeyError for a block of an unknown name."""

    def written(match: re.Match[str]) -> str:
        kind, name = match["kind"], match["name"]
        content = ladder_block(name, ladders) if kind == "ladder" else MEASURED[name](facts, speed)
        return f"<!-- {kind}:{name} -->\n{content}\n<!-- /{kind} -->"

    pattern = r"<!-- (?P<kind>ladder|measured):(?P<name>\w+) -->.*?<!-- /(?P=kind) -->"
    return re.sub(pattern, written, text, flags=re.DOTALL)


def read_results(results: Path = RESULTS) -> tuple[list[Report], Report, Report]:
    """Every ladder, then the two reports of benchmarks/optimisations.py."""

    def read(path: Path) -> Report:
        report: Report = json.loads(path.read_text(encoding="utf-8"))
        return report

    ladders = [read(path) for path in sorted(results.glob("ladder*.json"))]
    return ladders, read(results / "optimisations.json"), read(results / "optimisations_speed.json")


# --- pictures ---------------------------------------------------------------------------------------------------------


def new_figure(width: float = 7.2, height: float = 3.4, columns: int = 1) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=(width, height), dpi=120)
    for one in axes if columns > 1 else [axes]:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(alpha=0.25)
    return figure, axes


def save(figure: Any, name: str) -> None:
    import matplotlib.pyplot as plt

    figure.tight_layout()
    # Without the version of the library in it, the same picture is the same file.
    figure.savefig(PAGES / f"{name}.png", metadata={"Software": None})
    plt.close(figure)


def draw_formats() -> None:
    """Sign, exponent and mantissa of the formats, a square a bit."""
    figure, axes = new_figure(7.2, 2.5)
    formats = (("float32", 8, 23), ("TF32", 8, 10), ("bfloat16", 8, 7), ("float16", 5, 10))
    for line, (name, exponent, mantissa) in enumerate(formats):
        y = len(formats) - 1 - line
        for bit in range(1 + exponent + mantissa):
            color = GREY if bit == 0 else VALIDATION_COLOR if bit <= exponent else TRAIN_COLOR
            axes.add_patch(axes_rectangle((bit, y + 0.1), 0.88, 0.7, color))
        axes.text(-0.6, y + 0.45, name, ha="right", va="center", fontsize=11)
        axes.text(
            1 + exponent + mantissa + 0.5,
            y + 0.45,
            f"1 + {exponent} + {mantissa} = {1 + exponent + mantissa} bits",
            ha="left",
            va="center",
            fontsize=9,
            color=GREY,
        )
    axes.set_xlim(-6, 42)
    axes.set_ylim(-0.7, len(formats))
    for x, text, color in (
        (0, "sign", GREY),
        (4, "exponent: range", VALIDATION_COLOR),
        (15, "mantissa: precision", TRAIN_COLOR),
    ):
        axes.text(x, -0.45, text, color=color, fontsize=10)
    axes.axis("off")
    save(figure, "formats")


def axes_rectangle(corner: tuple[float, float], width: float, height: float, color: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, width, height, color=color, linewidth=0)


def draw_schedule() -> None:
    """The learning rate of the GPT-2 recipe, and the two other shapes, thin."""
    figure, axes = new_figure()
    config = PRESETS["gpt2-124m"]
    steps = config.train.steps
    shown_steps = [*range(0, steps, 20), steps - 1]
    for name, color, width in (("wsd", GREY, 1.0), ("linear", TRAIN_COLOR, 1.5), ("cosine", VALIDATION_COLOR, 2.2)):
        optim = replace(config.optim, schedule=name)
        rates = [
            optim.lr * learning_rate_factor(optim, step, progress_by_steps(optim, step, steps)) for step in shown_steps
        ]
        axes.plot(shown_steps, rates, color=color, linewidth=width, label=name)
    axes.axvline(config.optim.warmup_steps, color=GREY, linewidth=0.8, linestyle=":")
    axes.text(config.optim.warmup_steps + 150, 1.5e-5, f"warm-up: {config.optim.warmup_steps} steps", color=GREY)
    axes.set_xlabel("step")
    axes.set_ylabel("learning rate")
    axes.set_xlim(0, steps)
    axes.set_ylim(0, 6.6e-4)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-4, -4))
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.12, 0.1))
    save(figure, "schedule")


def draw_residual(facts: Report) -> None:
    """Standard deviation of the residual stream after each block of a fresh GPT-2 124M."""
    figure, axes = new_figure()
    for variant, color in zip(by_name(facts)["residual"]["variants"], (VALIDATION_COLOR, TRAIN_COLOR), strict=True):
        axes.plot(range(len(variant["stds"])), variant["stds"], color=color, marker="o", markersize=4)
        axes.text(12.15, variant["stds"][-1], variant["name"], color=color, va="center")
    axes.set_xlabel("blocks passed (0: after the embeddings)")
    axes.set_ylabel("standard deviation")
    axes.set_title("Residual stream of a fresh GPT-2 124M", fontsize=11)
    axes.set_xlim(0, 14)
    axes.set_xticks(range(0, 13, 2))
    axes.set_ylim(bottom=0)
    save(figure, "residual")


def draw_attention(facts: Report, speed: Report) -> None:
    """What one layer's attention keeps, and how long it takes, against the context."""
    figure, (left, right) = new_figure(8.4, 3.4, 2)
    kept, seconds = by_name(facts)["attention"]["variants"], by_name(speed)["attention"]["variants"]
    contexts = [v["context"] for v in kept]
    for kind, color in (("explicit", TRAIN_COLOR), ("flash", VALIDATION_COLOR)):
        left.plot(contexts, [v[kind] / 1e6 for v in kept], color=color, marker="o", markersize=4, label=kind)
        times = [1e3 * v[kind]["median"] for v in seconds]
        right.plot(contexts, times, color=color, marker="o", markersize=4, label=kind)
    for axes, label in ((left, "MB kept for the backward pass"), (right, "ms, forward and backward")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(contexts, [str(T) for T in contexts])
        axes.set_xlabel("context T")
        axes.set_title(label, fontsize=10)
        axes.legend(frameon=False)
    save(figure, "attention")


def draw_overlap(facts: Report) -> None:
    """A step of two micro-steps: all-reduce under the backward pass of the last one, by a model of time."""
    config = PRESETS["gpt2-124m"]
    tokens = config.train.micro_batch * config.model.n_ctx
    pass_seconds = tokens * flops_per_token(config.model) / (0.4 * 989e12)
    forward, backward = 1e3 * pass_seconds / 3, 1e3 * pass_seconds * 2 / 3  # ms
    buckets = by_name(facts)["communication"]["variants"][-1]["buckets"]
    figure, axes = new_figure(8.4, 2.4)
    at = 0.0
    for _ in range(2):
        for length, color, text in ((forward, TRAIN_COLOR, "forward"), (backward, GREY, "backward")):
            axes.add_patch(axes_rectangle((at, 1.1), length - 0.4, 0.7, color))
            axes.text(at + length / 2, 1.45, text, ha="center", va="center", fontsize=10)
            at += length
    end, free = at, 0.0
    sent = 0.0
    for i, size in enumerate(buckets):
        sent += size
        # Ready when its share of the backward pass is done; the last one waits for wte, the very last gradient.
        ready = end - backward + backward * (1.0 if i == len(buckets) - 1 else sent / sum(buckets[:-1]) * 0.92)
        start = max(ready, free)
        free = start + 1e3 * size / 50e9
        axes.add_patch(axes_rectangle((start, 0.1), free - start, 0.7, VALIDATION_COLOR))
    axes.text(end - backward - 2, 0.45, "all-reduce, a bar a bucket", ha="right", va="center", color=VALIDATION_COLOR)
    axes.text(free + 1, 0.45, "wte", ha="left", va="center", color=VALIDATION_COLOR)
    axes.set_xlim(0, free + 8)
    axes.set_ylim(0, 2)
    axes.set_yticks([])
    axes.set_xlabel("ms: a model, 2 processes, 32 windows a micro-step at 40 % of 989 TFLOP/s, 50 GB/s between them")
    save(figure, "overlap")


def draw_variants(facts: Report) -> None:
    """Difference of each variant of the small network from the recipe, a point a seed."""
    variants = by_name(facts)["losses"]["variants"][1:]
    figure, axes = new_figure(7.2, 3.8)
    for y, variant in enumerate(reversed(variants)):
        differences = [run["difference"] for run in variant["runs"]]
        axes.plot(differences, [y] * len(differences), "o", color=VALIDATION_COLOR, markersize=5, alpha=0.8)
    axes.axvline(0, color=GREY, linewidth=1)
    axes.set_yticks(range(len(variants)), [variant["name"] for variant in reversed(variants)])
    axes.set_xlabel("validation loss less the recipe's of the same seed (nats a token)")
    save(figure, "variants")


def main() -> None:
    ladders, facts, speed = read_results()
    for page in sorted(PAGES.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        filled = fill(text, ladders, facts, speed)
        if filled != text:
            page.write_text(filled, encoding="utf-8")
            print(page)
    draw_formats()
    draw_schedule()
    draw_residual(facts)
    draw_attention(facts, speed)
    draw_overlap(facts)
    draw_variants(facts)


if __name__ == "__main__":
    main()
