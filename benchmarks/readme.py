"""Carries what was measured into README.md: two blocks, from <!-- measured:NAME --> to <!-- /measured -->.

python benchmarks/readme.py

A row whose JSON is not in benchmarks/results/ is left out.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

Report = Mapping[str, Any]
Row = tuple[str, str]


def named(report: Report, name: str) -> Report:
    """The result of that name. Raises StopIteration where there is none."""
    return next(result for result in report["results"] if result["name"] == name)


def processor(report: Report) -> str:
    machine = report["machine"]
    return f"{machine['cpu']}, {machine['cores']} cores"


def demo_block(report: Report) -> str:
    """The sentence under the picture."""
    ours = report["results"][0]
    return (
        f"That curve: {ours['train_seconds'] / 60:.0f} minutes of training on {processor(report)} "
        f"({ours['steps']:,} steps, {ours['tokens_per_second']:,.0f} tokens a second; {ours['wall_seconds']:.0f} s "
        f"with preparing and evaluating), then\n**{ours['bits_per_byte']:.3f} bits per byte** on 12 speeches that it "
        "has not seen. `xz -9e`, primed with the training text, gets 1.75 on them, nanoGPT's CPU recipe 2.27."
    )


def startup_rows(report: Report) -> list[Row]:
    seconds = {result["name"]: result["seconds"]["median"] for result in report["results"]}
    return [
        (
            "Start",
            f"`gpt2 --help` {seconds['gpt2 --help']:.2f} s, `gpt2 train --help` {seconds['gpt2 train --help']:.2f} s, "
            f"`import gpt2` {seconds['import gpt2']:.2f} s; Python alone {seconds['python -c pass']:.2f} s",
        )
    ]


def prepare_rows(report: Report) -> list[Row]:
    large, small = report["results"][:2]
    peaks = [result["peak_bytes"] / 1e6 for result in report["results"] if "peak_bytes" in result]
    return [
        (
            "Preparing text, whole process, GPT-2's tokens",
            f"{large['name']}: {large['prepare_mb_per_second']['median']:.1f} MB/s, "
            f"**{large['ratio_of_medians']:.2f}×** tiktoken on one thread; "
            f"{small['name']} (12 MB, start included): {small['ratio_of_medians']:.2f}×",
        ),
        (
            "Memory of preparing 12 MB to 1 GB, many files or one",
            f"{min(peaks):.0f} to {max(peaks):.0f} MB, all processes together",
        ),
    ]


def crash_rows(report: Report) -> list[Row]:
    rows = []
    for run in report["results"]:
        same = "the same bits" if run["same_weights_to_the_bit"] and run["same_losses_at_every_step"] else "OTHER BITS"
        rows.append(
            (
                f"Killed {run['kills']} times at random moments ({run['name']})",
                f"{run['damaged']} damaged checkpoints, {run['inside_a_save']} kills inside a save; {same} as a run "
                "that was left alone",
            )
        )
    return rows


def saving_rows(report: Report) -> list[Row]:
    ours = report["results"][0]
    return [
        (
            f"Saving GPT-2 124M while it trains, {ours['checkpoint_bytes'] / 1e9:.2f} GB",
            f"training stops for {ours['longest_stop_seconds']:.2f} s at most",
        )
    ]


def hosts_rows(report: Report) -> list[Row]:
    run = report["results"][0]
    waited, allowed = max(run["seconds_until_trainer_ended"]), run["allowed_seconds"]
    return [
        ("Two hosts, the link between them cut", f"noticed after {waited:.0f} s ({allowed} s allowed); the run goes on")
    ]


def hellaswag_rows(report: Report) -> list[Row]:
    rows = []
    for run in report["results"]:
        equal = min(run["equal_acc_predictions"], run["equal_acc_norm_predictions"])
        told = f"{equal:,} of {run['items']:,} predictions as one item at a time"
        if run["parameters"] > 1e8:  # the speed of a model that one would score
            told += f"; {run['plain_over_ours_fp32']:.2f}× its speed, both float32"
        rows.append((f"HellaSwag, {run['name']}", told))
    return rows


def decode_rows(report: Report) -> list[Row]:
    rows = []
    for case, what in (
        ("one", "int8 124M generates: 1 sequence after 64 tokens"),
        ("sixteen", "16 sequences after 64 tokens"),
        ("long", "1 sequence after 900 tokens"),
        ("prefill", "a prompt of 512 tokens"),
    ):
        figure = "prefill_tokens_per_second" if case == "prefill" else "tokens_per_second"
        speeds = {run["name"]: run.get(figure) for run in report["results"] if run["case"] == case}
        ours = speeds.pop("build-gpt2", None)
        if ours:
            others = sorted(((speed, name) for name, speed in speeds.items() if speed), reverse=True)
            told = ", ".join(f"{name} {speed:,.0f}" for speed, name in others)
            rows.append((what, f"**{ours:,.0f}** tokens/s; {told}"))
    ours_in = {run["case"]: run for run in report["results"] if run["name"] == "build-gpt2"}
    if "one" in ours_in and "long" in ours_in:
        start, held = ours_in["one"]["start_beyond_torch_seconds"], ours_in["long"]["resident_bytes"]
        told = f"{held / 1e6:,.0f} MB with torch, 1 sequence at full context; first token {start:.2f} s after torch"
        rows.append(("its memory and start", told))
    return rows


def training_rows(report: Report) -> list[Row]:
    ours, *others = report["results"]
    told = ", ".join(f"{run['name']} {run['tokens_per_second']:,.0f}" for run in others)
    what = f"Training step, {report['config']['preset']}, {report['config']['tokens_per_step']:,} tokens in float32"
    return [(what, f"**{ours['tokens_per_second']:,.0f}** tokens/s; {told}")]


def quality_rows(report: Report) -> list[Row]:
    trained, *hard = report["results"]
    return [
        (
            "int8 beside float, by the kernels",
            f"perplexity {trained['rise_int8']:+.2%} of a trained model, at most "
            f"{max(run['rise_int8'] for run in hard):+.2%} with planted outliers; "
            f"{trained['greedy_agreement']:.1%} of {report['config']['greedy_tokens']} greedy tokens alike",
        )
    ]


ROWS: Mapping[str, Callable[[Report], list[Row]]] = {
    "startup": startup_rows,
    "prepare": prepare_rows,
    "crash": crash_rows,
    "crash_compiled": crash_rows,
    "saving": saving_rows,
    "two_hosts": hosts_rows,
    "hellaswag": hellaswag_rows,
    "train_cpu": training_rows,
    "decode_cpu": decode_rows,
    "int8_quality": quality_rows,
}


# Where it is not the name of the JSON.
SCRIPTS = {"crash_compiled": "crash", "train_cpu": "training", "decode_cpu": "decode"}


def table(results: Path) -> str:
    """Every row there is a file for, with the script that measured it."""
    lines: list[Sequence[str]] = [("", "measured", "by"), ("---", "---", "---")]
    machines = set()
    for name, rows in ROWS.items():
        path = results / f"{name}.json"
        if path.is_file():
            report = json.loads(path.read_text(encoding="utf-8"))
            machines.add(processor(report))
            lines += [(*row, f"`benchmarks/{SCRIPTS.get(name, name)}.py`") for row in rows(report)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + f"\n\nOn {', '.join(sorted(machines))}."


def fill(text: str, results: Path = RESULTS) -> str:
    """README with both blocks written anew."""
    demo = json.loads((results / "demo.json").read_text(encoding="utf-8"))
    blocks = {"demo": demo_block(demo), "table": table(results)}

    def written(match: re.Match[str]) -> str:
        return f"<!-- measured:{match['name']} -->\n{blocks[match['name']]}\n<!-- /measured -->"

    return re.sub(r"<!-- measured:(?P<name>\w+) -->.*?<!-- /measured -->", written, text, flags=re.DOTALL)


if __name__ == "__main__":
    page = ROOT / "README.md"
    page.write_text(fill(page.read_text(encoding="utf-8")), encoding="utf-8")
