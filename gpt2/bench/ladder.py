"""The optimisation ladder: the plainest GPT-2 training step, then one optimisation more on each rung, measured here.

A rung is a change of the config against the rung before, so that a new one is one more entry of RUNGS. Each trains in
a process of its own (worker.py) by the functions that `gpt2 train` runs; they take turns, so that a drift of the
machine falls on all alike. All start from the same weights and see the same batches, so their losses can be compared.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpt2.bench.machine import machine
from gpt2.bench.worker import START_SHARE, Say, Worker, start_all, take_turns
from gpt2.config import Config, from_dict, preset
from gpt2.data.shards import Dataset
from gpt2.distributed import can_compile, find_device, multiplies_bf16_fast
from gpt2.doctor import memory
from gpt2.errors import RequestError
from gpt2.model import flops_per_token
from gpt2.training.peak import device_peak

# Loss differences that are allowed, as a part of the first loss. A loss is log Σ exp z - z_y: logits z that are off by
# a part u move it by at most u (|log Σ exp z| + |z_y|), which at the start is u ln V, the first loss.
ROUNDING = {
    "fp32": (
        2.0**-17,
        "2^7 roundings of float32 (2^-24 each), as only the order of its sums differs: a tenth of what the padded "
        "columns would add to the loss if they were not left out",
    ),
    "tf32": (2.0**-11, "one rounding of TF32, which keeps 10 bits of mantissa, in each logit and all of one sign"),
    "bf16": (2.0**-8, "one rounding of bfloat16, which keeps 7 bits of mantissa, in each logit and all of one sign"),
}


@dataclass(frozen=True)
class Rung:
    """One optimisation."""

    name: str
    """For --only and --without."""
    title: str
    change: Mapping[str, Mapping[str, Any]]
    """Section -> field -> value, against the rung before."""
    lacking: Callable[[torch.device], str] = lambda device: ""
    """Why the device does not have it; empty where it does."""


def _no_tf32(device: torch.device) -> str:
    if device.type == "cpu":
        return "a CPU has no TF32"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return ""
    return "this GPU has no TF32 (NVIDIA since Ampere has)"


def _no_fast_bf16(device: torch.device) -> str:
    return (
        ""
        if multiplies_bf16_fast(device)
        else "this device has no bfloat16 instructions: emulated, it would be far slower"
    )


def _no_compiler(device: torch.device) -> str:
    return "" if can_compile(device) else "torch.compile has no compiler here (see gpt2 doctor)"


def _auto_is_flash(device: torch.device) -> str:
    if device.type == "cpu" and multiplies_bf16_fast(device):
        return ""
    return "on this device auto is flash attention: the same as above"


# In the lecture's order, then beyond it. The first is what all are compared with.
RUNGS: tuple[Rung, ...] = (
    Rung(
        "fp32",
        "plain: float32, explicit attention",
        {
            "model": {
                "attention": "explicit",
                "pad_vocab_to": 1,
                "fused_loss": False,
                "recompute": False,
                "dropout": 0.0,
            },
            "optim": {"optimizer": "adamw", "fused": False},
            "train": {"precision": "fp32", "matmul_precision": "highest", "compile": False},
        },
    ),
    Rung("tf32", "TF32 matmuls", {"train": {"matmul_precision": "high"}}, _no_tf32),
    Rung("bf16", "bfloat16 autocast", {"train": {"precision": "bf16"}}, _no_fast_bf16),
    Rung("compile", "torch.compile", {"train": {"compile": True}}, _no_compiler),
    Rung("flash", "flash attention", {"model": {"attention": "flash"}}),
    Rung("nice", "nice numbers: padded vocabulary", {"model": {"pad_vocab_to": 128}}),
    Rung("fused-adamw", "AdamW fused", {"optim": {"fused": True}}),
    Rung("auto-attention", "attention chosen by device", {"model": {"attention": "auto"}}, _auto_is_flash),
    Rung("fused-loss", "lm_head and cross-entropy in chunks", {"model": {"fused_loss": True}}),
)


@dataclass(frozen=True)
class Options:
    """What is measured."""

    preset: str = "gpt2-124m"
    batch: int = 0
    """Windows in a micro-batch; 0: the preset's on a GPU, 4 elsewhere."""
    accumulation: int = 1
    """Micro-batches in a step."""
    context: int = 0
    """Tokens in a window; 0: the preset's on a GPU, at most 256 elsewhere."""
    device: str = "auto"
    minutes: float = 8.0
    """Budget: no round starts that would not fit."""
    steps: int = 20
    """Steps after which losses are compared."""
    rounds: int = 5
    """Turns of each rung, at least; more where `steps` needs them, fewer where the minutes are up."""
    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("batch", 0), ("accumulation", 1), ("context", 0), ("steps", 1), ("rounds", 1)):
            if getattr(self, name) < least:
                raise RequestError(f"--{name} {getattr(self, name)} must be at least {least}")
        if self.minutes <= 0:
            raise RequestError(f"--minutes {self.minutes:g} must be above 0")
        for name in (*self.only, *self.without):
            if name not in [rung.name for rung in RUNGS]:
                raise RequestError(f"there is no rung {name!r}: known are {', '.join(rung.name for rung in RUNGS)}")
        if RUNGS[0].name in self.without:
            raise RequestError(f"--without {RUNGS[0].name}: the first rung is what the others are compared with")


@dataclass
class Entry:
    """A rung as it is climbed here."""

    rung: Rung
    config: Config
    worker: Worker | None
    skipped: str = ""


def base_config(options: Options, data: Path, device: torch.device) -> Config:
    """The preset with the measurement's shapes. Raises RequestError where they do not fit.

    The learning rate rises over 10 steps to its peak and stays there, so that a few steps already move the weights.
    """
    config = preset(options.preset)
    on_gpu = device.type == "cuda"
    context = options.context or (config.model.n_ctx if on_gpu else min(256, config.model.n_ctx))
    micro_batch = config.train.micro_batch if isinstance(config.train.micro_batch, int) else 32
    batch = options.batch or (micro_batch if on_gpu else 4)
    return from_dict(
        {
            "model": {"n_ctx": context, "vocab_size": Dataset.open(data).tokenizer.vocab_size},
            "optim": {"schedule": "constant", "warmup_steps": 10},
            "train": {
                "data": str(data),
                "device": str(device),
                "micro_batch": batch,
                "batch_tokens": batch * options.accumulation * context,
            },
        },
        config,
    )


def climb(options: Options, base: Config, data: Path, device: torch.device) -> list[Entry]:
    """The rungs in order, each with its config. One that the device lacks is left out of those that follow."""
    entries: list[Entry] = []
    config = base
    for i, rung in enumerate(RUNGS):
        if i > 0 and (rung.name in options.without or (options.only and rung.name not in options.only)):
            continue
        changed = from_dict(rung.change, config)
        reason = rung.lacking(device)
        if not reason:
            config = changed
        entries.append(Entry(rung, changed, None if reason else Worker(rung.name, changed, data), reason))
    return entries


def ladder(options: Options, data: Path, say: Say = lambda line: None) -> dict[str, Any]:
    """Measures every rung; gives {bench, machine, config, results}. Raises RequestError for a wrong request."""
    started = time.perf_counter()
    device = find_device(options.device)
    base = base_config(options, data, device)
    entries = climb(options, base, data, device)
    workers = [entry.worker for entry in entries if entry.worker is not None]
    for entry in entries:
        if entry.skipped:
            say(f"{entry.rung.name}: skipped, {entry.skipped}")
    peak_precision = "bf16" if multiplies_bf16_fast(device) else "fp32"
    peak = device_peak(device, peak_precision)
    available = free_memory(device)
    try:
        deadline = started + 60 * options.minutes
        alive = start_all(workers, available, say, started + START_SHARE * 60 * options.minutes)
        turn_steps, rounds = take_turns(workers, alive, options.rounds, options.steps, deadline, say)
    finally:
        for worker in workers:
            worker.stop()
    results = report(entries, base, peak, options.steps)
    config = {
        "preset": options.preset,
        "batch": base.train.micro_batch,
        "accumulation": options.accumulation,
        "context": base.model.n_ctx,
        "device": str(device),
        "threads": next((worker.facts["threads"] for worker in workers if worker.facts), None),
        "peak_flops": peak,
        "peak_flops_is": f"{'data sheet or measured' if device.type == 'cuda' else 'measured'}, {peak_precision}: "
        "the same for every rung",
        "peak_memory_is": "allocated on the GPU while training"
        if device.type == "cuda"
        else "resident set of the rung's process while training",
        "rounds": rounds,
        "steps_a_round": turn_steps,
        "loss_steps": options.steps,
        "learning_rate": f"{base.optim.lr:g} after a warm-up of {base.optim.warmup_steps} steps",
        "compile_cache": "torch's own, so a graph that was compiled here before takes less",
        "processes": "kept, run in turn" if alive else "built anew for each turn: together they do not fit into memory",
        "seconds": time.perf_counter() - started,
    }
    return {"bench": "ladder", "machine": machine(), "config": config, "results": results}


def free_memory(device: torch.device) -> int:
    """Bytes that the rungs may share; 0 where it is not known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return memory()[1] or 0


def report(entries: Sequence[Entry], base: Config, peak: float, loss_steps: int) -> list[dict[str, Any]]:
    """The figures of every rung, skipped ones with their reason."""
    measured = [e.worker for e in entries if e.worker is not None and e.worker.turns]
    compared = min([loss_steps, *(len(worker.losses) for worker in measured)])
    tokens, flops = base.train.batch_tokens, flops_per_token(base.model)
    results: list[dict[str, Any]] = []
    first = entries[0].worker if entries[0].worker in measured else None
    before: Worker | None = None
    for entry in entries:
        worker = entry.worker
        result: dict[str, Any] = {
            "name": entry.rung.name,
            "title": entry.rung.title,
            "change": _flat(entry.rung.change),
        }
        results.append(result)
        if worker is None or not worker.turns:
            result["skipped"] = entry.skipped or (worker.failure if worker else "")
            continue
        seconds = worker.seconds_a_step
        speed = tokens / seconds
        result |= {
            "tokens_per_second": speed,
            "ms_per_step": 1e3 * seconds,
            "mfu": speed * flops / peak,
            "peak_memory": worker.peak_bytes,
            "gain": before.seconds_a_step / seconds if before else None,
            "gain_total": first.seconds_a_step / seconds if first else None,
            "compile_seconds": worker.compile_seconds,
            "ms_per_step_each_turn": [1e3 * turn for turn in worker.turns],
        }
        if first is not None:
            result |= loss_report(first.losses[:compared], worker.losses[:compared], entry.config)
        before = worker
    return results


def loss_report(plain: Sequence[float], losses: Sequence[float], config: Config) -> dict[str, Any]:
    """How far the losses went from those of the first rung, and how far they may."""
    kind = "bf16" if config.train.precision == "bf16" else "tf32" if _is_tf32(config) else "fp32"
    part, reason = ROUNDING[kind]
    bound = part * plain[0]
    differences = [here - there for here, there in zip(losses, plain, strict=True)]
    largest = max(map(abs, differences))
    return {
        "loss": losses[-1],
        "loss_steps": len(losses),
        "loss_difference": differences[-1],
        "largest_loss_difference": largest,
        "loss_bound": bound,
        "loss_within_bound": largest <= bound,
        "loss_bound_reason": f"{part:.2g} of the first loss: {reason}",
    }


def _is_tf32(config: Config) -> bool:
    return config.train.matmul_precision == "high" and not _no_tf32(find_device(config.train.device))


def _flat(change: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{section}.{name}": value for section, fields in change.items() for name, value in fields.items()}


def print_table(ladder_report: Mapping[str, Any]) -> None:
    """The rungs as a table on standard output."""
    from rich.console import Console
    from rich.table import Table

    table = Table(caption=caption(ladder_report), caption_justify="left")
    table.add_column("rung")
    for head in (
        "tokens/s",
        "ms a step",
        "MFU",
        "memory",
        "gain",
        "over the first",
        "compile",
        "loss − fp32",
        "allowed",
    ):
        table.add_column(head, justify="right")
    for result in ladder_report["results"]:
        if "skipped" in result:
            table.add_row(result["name"], "skipped")
            continue
        loss = result.get("loss_difference")
        table.add_row(
            result["name"],
            f"{result['tokens_per_second']:,.0f}",
            f"{result['ms_per_step']:,.1f}",
            f"{result['mfu']:.1%}",
            f"{result['peak_memory'] / 1e9:.2f} GB",
            "" if result["gain"] is None else f"×{result['gain']:.2f}",
            "" if result["gain_total"] is None else f"×{result['gain_total']:.2f}",
            f"{result['compile_seconds']:.0f} s" if result["compile_seconds"] else "",
            "" if loss is None else f"{loss:+.1e}{'' if result['loss_within_bound'] else ' !'}",
            "" if loss is None else f"{result['loss_bound']:.1e}",
        )
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    console.print(table)
    for result in ladder_report["results"]:
        if "skipped" in result:
            console.print(f"{result['name']} skipped: {result['skipped']}", markup=False)


def caption(ladder_report: Mapping[str, Any]) -> str:
    """What was measured where, in a line or two."""
    config, facts = ladder_report["config"], ladder_report["machine"]
    where = facts.get("gpu") or f"{facts['cpu']}, {config['threads']} threads"
    accumulated = f" x {config['accumulation']}" if config["accumulation"] > 1 else ""
    compared = max((result.get("loss_steps", 0) for result in ladder_report["results"]), default=0)
    return (
        f"{config['preset']}, {config['batch']}{accumulated} windows of {config['context']} tokens, {where}; "
        f"median of {config['rounds']} turns; MFU of {config['peak_flops'] / 1e12:.3g} TFLOP/s "
        f"({config['peak_flops_is']}); losses after {compared} steps"
    )


def plot(ladder_report: Mapping[str, Any], path: Path) -> None:
    """Draws the rungs as bars of tokens a second, the gain over the first beside each; a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = ladder_report["results"]
    figure, axes = plt.subplots(figsize=(9.6, 1.6 + 0.5 * len(results)), dpi=150)
    highest = max((result["tokens_per_second"] for result in results if "skipped" not in result), default=1.0)
    for i, result in enumerate(results):
        if "skipped" in result:
            axes.text(0.01 * highest, i, f"skipped: {result['skipped']}", va="center", color="#777777", fontsize=8)
            continue
        speed, gain = result["tokens_per_second"], result["gain_total"]
        axes.barh(i, speed, color="#9bb8d3" if i == 0 else "#3b6ea5", height=0.65)
        label = f" {speed:,.0f}" + ("" if gain is None else f"   ×{gain:.2f}")
        axes.text(speed, i, label, va="center", fontsize=9)
    axes.set_yticks(range(len(results)), [result["title"] for result in results])
    axes.set_ylim(len(results) - 0.4, -0.6)  # the first on top
    axes.set_xlim(0, 1.22 * highest)
    axes.set_xlabel("tokens a second, and how many times those of the first rung")
    axes.set_title(caption(ladder_report).split("; ")[0], fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
