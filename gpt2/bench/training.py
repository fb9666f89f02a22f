"""This project's training step beside other programs', on the same shapes and the same data, in turn A B A B.

Each runs in a process of its own (worker.py) with its own network, attention and optimizer, at its best setting on
the device: compiled, and under bfloat16 autocast where the device multiplies bfloat16 fast, else in float32.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt2.bench.contenders import NEEDS_PATH, OURS, PEERS
from gpt2.bench.ladder import Options as Shapes
from gpt2.bench.ladder import base_config, free_memory
from gpt2.bench.machine import machine
from gpt2.bench.worker import START_SHARE, Say, Worker, start_all, take_turns
from gpt2.config import from_dict
from gpt2.distributed import can_compile, find_device, multiplies_bf16_fast
from gpt2.errors import RequestError, WorkError
from gpt2.model import flops_per_token
from gpt2.training.peak import device_peak


def parse_peers(against: Sequence[str]) -> list[tuple[str, str]]:
    """NAME or NAME=PATH -> (name, path or ""). Raises RequestError for an unknown name or a missing folder."""
    peers: list[tuple[str, str]] = []
    for text in against:
        name, _, path = text.partition("=")
        if name not in PEERS:
            raise RequestError(f"there is no {name!r} to compare with: known are {', '.join(PEERS)}")
        if name in NEEDS_PATH and not path:
            raise RequestError(f"{name} is no package: give the folder of your own copy, --against {name}=PATH")
        if path and not Path(path).is_dir():
            raise RequestError(f"{name}: there is no directory {path}: give the folder of your own copy")
        if name in [known for known, _ in peers]:
            raise RequestError(f"{name} is given twice")
        peers.append((name, str(Path(path).absolute()) if path else ""))
    return peers


def bench_training(
    shapes: Shapes, against: Sequence[str], data: Path, compiled: bool = True, say: Say = lambda line: None
) -> dict[str, Any]:
    """Measures this project and the others; gives {bench, machine, config, results}, results[0] being this project.

    Raises RequestError for a wrong request, WorkError where this project's own step fails; another program's failure
    stands in its result.
    """
    started = time.perf_counter()
    peers = parse_peers(against)
    device = find_device(shapes.device)
    precision = "bf16" if multiplies_bf16_fast(device) else "fp32"
    compiled = compiled and can_compile(device)
    best = {
        # On a CPU the fused loss saves memory and, at this width, costs time (docs/LOG.md).
        "model": {"dropout": 0.0, "fused_loss": device.type != "cpu", "recompute": False},
        "optim": {"optimizer": "adamw", "fused": True},
        "train": {"precision": precision, "matmul_precision": "high", "compile": compiled},
    }
    config = from_dict(best, base_config(shapes, data, device))
    workers = [Worker(name, config, data, name, path) for name, path in [(OURS, ""), *peers]]
    available = free_memory(device)
    try:
        deadline = started + 60 * shapes.minutes
        alive = start_all(workers, available, say, started + START_SHARE * 60 * shapes.minutes)
        if workers[0].failure:
            raise WorkError(workers[0].failure)
        turn_steps, rounds = take_turns(workers, alive, shapes.rounds, 0, deadline, say)
        if not workers[0].turns:
            raise WorkError(workers[0].failure)
    finally:
        for worker in workers:
            worker.stop()

    peak = device_peak(device, precision)
    facts = {
        "preset": shapes.preset,
        "batch": config.train.micro_batch,
        "accumulation": shapes.accumulation,
        "context": config.model.n_ctx,
        "tokens_per_step": config.train.batch_tokens,
        "device": str(device),
        "threads": workers[0].facts["threads"],
        "precision": precision,
        "best_setting": f"{precision}{' and torch.compile' if compiled else ', eager'} for all: "
        + (
            "this device multiplies bfloat16 fast"
            if precision == "bf16"
            else "this device has no bfloat16 instructions, so bf16 autocast is slower than float32 by far"
        ),
        "optimizer": "AdamW, clipping at 1.0; each as its own code makes it",
        "peak_flops": peak,
        "peak_memory_is": "allocated on the GPU while training"
        if device.type == "cuda"
        else "resident set of the process while training",
        "rounds": rounds,
        "steps_a_round": turn_steps,
        "processes": "kept, run in turn" if alive else "built anew for each turn",
        "seconds": time.perf_counter() - started,
    }
    flops = flops_per_token(config.model)
    results = [result_of(worker, workers[0], config.train.batch_tokens, flops / peak) for worker in workers]
    return {"bench": "train", "machine": machine(), "config": facts, "results": results}


def result_of(worker: Worker, ours: Worker, tokens: int, flops_share: float) -> dict[str, Any]:
    """One program's figures; `ours_over_this` is this project's speed over it."""
    result: dict[str, Any] = {"name": worker.name}
    if not worker.turns:
        return {**result, "tokens_per_second": None, "failed": worker.failure}
    seconds = worker.seconds_a_step
    return {
        **result,
        "tokens_per_second": tokens / seconds,
        "ms_per_step": 1e3 * seconds,
        "mfu": tokens / seconds * flops_share,
        "peak_memory": worker.peak_bytes,
        "ours_over_this": seconds / ours.seconds_a_step,
        "compile_seconds": worker.compile_seconds,
        "first_loss": worker.losses[0],
        "last_loss": worker.losses[-1],
        "steps": len(worker.losses),
        "setting": worker.facts["setting"],
        "ms_per_step_each_turn": [1e3 * turn for turn in worker.turns],
    }


def print_table(report: Mapping[str, Any]) -> None:
    """The programs as a table on standard output."""
    import sys

    from rich.console import Console
    from rich.table import Table

    config, facts = report["config"], report["machine"]
    where = facts.get("gpu") or f"{facts['cpu']}, {config['threads']} threads"
    table = Table(
        caption=f"{config['preset']}, {config['tokens_per_step']:,} tokens a step in windows of {config['context']}, "
        f"{where}; {config['best_setting']}; {config['rounds']} turns each",
        caption_justify="left",
    )
    table.add_column("program")
    for head in ("tokens/s", "ms a step", "MFU", "memory", "build-gpt2 is", "compile", "last loss"):
        table.add_column(head, justify="right")
    for result in report["results"]:
        if result["tokens_per_second"] is None:
            table.add_row(result["name"], "failed")
            continue
        table.add_row(
            result["name"],
            f"{result['tokens_per_second']:,.0f}",
            f"{result['ms_per_step']:,.1f}",
            f"{result['mfu']:.1%}",
            f"{result['peak_memory'] / 1e9:.2f} GB",
            f"×{result['ours_over_this']:.2f}" if result["name"] != OURS else "",
            f"{result['compile_seconds']:.0f} s" if result["compile_seconds"] else "",
            f"{result['last_loss']:.3f}",
        )
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    console.print(table)
    for result in report["results"]:
        if "failed" in result:
            console.print(f"{result['name']} failed: {result['failed']}", markup=False)
