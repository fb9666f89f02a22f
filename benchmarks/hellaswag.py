"""HellaSwag: our predictions against those of the plain formula, item by item, and the speed of both, in turn.

python benchmarks/hellaswag.py --file hellaswag_val.jsonl [--trained MODEL] [--parts small trained large]
    [--rounds 1] [--items 200] [--device auto] [--out hellaswag]          writes results/OUT.json

The plain formula is that of the "reproduce GPT-2" lecture: one item at a time, its four endings behind four copies of
the context, filled up to the longest, logits of every position, in float32.

small, trained     all items on a small network with random weights, and on MODEL: predictions compared
large              --items items, evenly spaced over the file, at 124M random weights: predictions compared, and timed:
                   plain, ours in float32, and ours in the device's default precision where that is another
all                all items at 124M, ours, default precision, timed (minutes on a GPU, an hour on a CPU)

A part's results replace those of an earlier call in the file; the others stay.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
import torch.nn.functional as F

from gpt2.config import GPTConfig
from gpt2.distributed import find_device
from gpt2.evaluation.hellaswag import Item, Items, losses, read_items, tokenize
from gpt2.evaluation.likelihood import Question, uses_bf16
from gpt2.inference.engine import load
from gpt2.model import GPT
from gpt2.tokenizer import Tokenizer

SMALL = GPTConfig(vocab_size=257, n_ctx=512, n_layer=2, n_head=2, n_embd=32)  # of bytes: its longest items are cut
METHOD = (
    "plain: one item at a time, four rows filled up to the longest, logits of every position, float32, losses summed "
    "in float64; ours: likelihood.score"
)


@torch.no_grad()
def plain(model: GPT, questions: Sequence[Question], device: torch.device) -> np.ndarray:
    """(n, 4) sums of losses in nats."""
    sums = []
    for question in questions:
        context = list(question.context)
        length = len(context) + max(map(len, question.endings))
        tokens = torch.zeros(4, length, dtype=torch.int64)
        mask = torch.zeros(4, length)
        for row, ending in enumerate(question.endings):
            tokens[row, : len(context) + len(ending)] = torch.tensor([*context, *ending])
            mask[row, len(context) : len(context) + len(ending)] = 1
        tokens, mask = tokens.to(device), mask.to(device)
        logits = model(tokens[:, :-1])[0]  # (4, length - 1, vocab_size)
        nats = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(4, -1)
        sums.append((nats * mask[:, 1:]).double().sum(1).cpu().numpy())
    return np.stack(sums)


def compare(name: str, model: GPT, items: Items, device: torch.device, rounds: int) -> dict[str, Any]:
    """How many items' predictions are equal, in float32; the seconds of each, in turn, and the ratios of medians."""
    n_ctx, questions = model.config.n_ctx, items.questions
    found: dict[str, np.ndarray] = {}
    losses(model, questions[:8], n_ctx, device)  # warms up
    plain(model, questions[:2], device)

    def ours(precision: str) -> np.ndarray:
        return losses(model, questions, n_ctx, device, precision=precision)[0]

    measures = {"plain_fp32": lambda: plain(model, questions, device), "ours_fp32": lambda: ours("fp32")}
    if uses_bf16("auto", device):
        measures["ours_bf16"] = lambda: ours("bf16")

    def seconds(measure: str) -> float:
        started = time.perf_counter()
        found[measure] = measures[measure]()
        return time.perf_counter() - started

    figures = common.in_turn(rounds, *(lambda m=measure: seconds(m) for measure in measures))
    spreads = {m: common.spread(values) for m, values in zip(measures, figures, strict=True)}
    labels, tokens = np.array(items.labels), np.array([[len(e) for e in q.endings] for q in questions])
    expected, sums = found["plain_fp32"], found["ours_fp32"]
    choice, choice_norm = sums.argmin(1), (sums / tokens).argmin(1)
    result = {
        "name": name,
        "items": len(labels),
        "n_ctx": n_ctx,
        "parameters": model.num_parameters(),
        "contexts_cut": items.contexts_cut,
        "endings_cut": items.endings_cut,
        "equal_acc_predictions": int((choice == expected.argmin(1)).sum()),
        "equal_acc_norm_predictions": int((choice_norm == (expected / tokens).argmin(1)).sum()),
        "largest_difference_nats": float(np.abs(sums - expected).max()),
        "acc": float((choice == labels).mean()),
        "acc_norm": float((choice_norm == labels).mean()),
        "threads": torch.get_num_threads(),
        "default_precision": "bf16" if uses_bf16("auto", device) else "fp32",
        **{f"{m}_seconds": spread for m, spread in spreads.items()},
        **{f"plain_over_{m}": spreads["plain_fp32"]["median"] / spreads[m]["median"] for m in list(measures)[1:]},
    }
    print(json.dumps(result), flush=True)
    return result


def everything(model: GPT, items: Items, device: torch.device) -> dict[str, Any]:
    """Seconds for all items in the default precision."""
    losses(model, items.questions[:50], model.config.n_ctx, device)
    started = time.perf_counter()
    losses(model, items.questions, model.config.n_ctx, device)
    result = {
        "name": "all items",
        "items": len(items.labels),
        "parameters": model.num_parameters(),
        "default_precision": "bf16" if uses_bf16("auto", device) else "fp32",
        "seconds": time.perf_counter() - started,
    }
    print(json.dumps(result))
    return result


def random_model(config: GPTConfig, device: torch.device) -> GPT:
    torch.manual_seed(0)
    return GPT(config).eval().to(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path)
    parser.add_argument("--trained")
    parser.add_argument("--parts", nargs="+", default=["small", "trained", "large"])
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", default="hellaswag")
    args = parser.parse_args()

    device = find_device(args.device)
    words = Tokenizer.from_name("gpt2")
    whole: list[Item] = read_items(args.file)
    config = {"items": args.items, "device": str(device), "method": METHOD}
    for part in args.parts:
        if part == "small":
            items = tokenize(whole, Tokenizer.from_name("bytes"), SMALL.n_ctx)
            result = compare("small, random weights", random_model(SMALL, device), items, device, args.rounds)
        elif part == "trained" and args.trained:
            engine = load(args.trained, args.device)
            items = tokenize(whole, engine.tokenizer, engine.model.config.n_ctx)
            result = compare("trained", engine.model, items, device, args.rounds)
        elif part == "large":
            items = tokenize(read_items(args.file, args.items), words, 1024)
            result = compare("124M, random weights", random_model(GPTConfig(), device), items, device, args.rounds)
        elif part == "all":
            result = everything(random_model(GPTConfig(), device), tokenize(whole, words, 1024), device)
        else:
            continue
        keep(args.out, config, result)


def keep(name: str, config: dict[str, Any], result: dict[str, Any]) -> None:
    """Writes the part's result beside the other parts'."""
    path = common.RESULTS / f"{name}.json"
    earlier = json.loads(path.read_text(encoding="utf-8"))["results"] if path.is_file() else []
    others = [r for r in earlier if r["name"] != result["name"]]
    print(common.write(name, config, [*others, result]), flush=True)


if __name__ == "__main__":
    main()
