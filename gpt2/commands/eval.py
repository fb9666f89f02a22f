"""gpt2 eval: what a model is worth."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from gpt2.commands.common import Json, Outcome, parse, say, working
from gpt2.errors import RequestError, WorkError


@dataclass(frozen=True)
class Eval:
    """What a model is worth: its loss on prepared data, its HellaSwag score, any task of lm-evaluation-harness."""

    model: tyro.conf.Positional[str]
    """Run, checkpoint, int8 directory, or Hugging Face GPT-2 directory or id."""
    data: Path | None = None
    """loss: directory of token shards (gpt2 prepare), with the model's tokenizer."""
    task: str = "loss"
    """loss, hellaswag, or lm:NAME[,NAME] (tasks of lm-evaluation-harness; pip install 'build-gpt2[lm-eval]')."""
    split: str = "val"
    """loss: val or train."""
    windows: int = 0
    """loss: windows of the model's context, from the start of the split; 0: all."""
    stride: int = 0
    """loss: tokens from one window to the next; below the context windows overlap, and each target is counted
    where it first comes, with more context before it. 0: no overlap."""
    batch: int = 16
    """loss: windows in one forward pass."""
    file: Path | None = None
    """hellaswag: its validation file (JSON lines); downloaded once and kept if not given."""
    items: int = 0
    """hellaswag: so many items, evenly spaced over the file; lm: the first items of each task. 0: all."""
    task_path: Path | None = None
    """lm: directory with further task files (YAML), for tasks and data on the disk."""
    batch_tokens: int = 0
    """hellaswag, lm: tokens in one forward pass; 0: 512 on a CPU, 4,096 on a GPU."""
    precision: str = "auto"
    """hellaswag, lm: fp32, bf16 (autocast), or auto: bf16 where the device multiplies it fast."""
    compile: bool = False
    """hellaswag: torch.compile, a graph for each of six row lengths: pays off on long files only."""
    device: str = "auto"
    """auto (cuda, else mps, else cpu) or a torch device."""
    json: Json = False
    """Print one JSON object as the last line."""


def main(argv: Sequence[str]) -> Outcome:
    """gpt2 eval"""
    args = parse(Eval, argv, "eval")
    for name in ("windows", "stride", "items", "batch_tokens"):
        if getattr(args, name) < 0:
            raise RequestError(f"--{name.replace('_', '-')} must be at least 0")
    if args.batch < 1:
        raise RequestError("--batch must be at least 1")
    if args.precision not in ("auto", "fp32", "bf16"):
        raise RequestError(f"--precision {args.precision} must be one of auto, fp32, bf16")
    if args.task == "loss":
        return _loss(args)
    if args.task == "hellaswag":
        return _hellaswag(args)
    names = [name.strip() for name in args.task.removeprefix("lm:").split(",")]
    if args.task.startswith("lm:") and all(names):
        return _harness(args, names)
    raise RequestError(f"there is no task {args.task!r}: known are loss, hellaswag and lm:NAME[,NAME]")


def _loss(args: Eval) -> Outcome:
    if args.data is None:
        raise RequestError("--data is missing: --task loss needs the directory that `gpt2 prepare` made")
    from gpt2.data.shards import Dataset
    from gpt2.evaluation.loss import evaluate_model_loss
    from gpt2.inference.engine import load_network

    dataset = Dataset.open(args.data)
    model, tokenizer = load_network(args.model, args.device)
    result = evaluate_model_loss(model, tokenizer, dataset, args.split, args.batch, args.windows, args.stride)
    if not math.isfinite(result.loss):
        raise WorkError(
            f"the loss of {args.model} is {result.loss}: its weights are spoilt; take an earlier checkpoint"
        )
    say(
        f"{args.model} on {args.data} ({args.split}): loss {result.loss:.4f} nats a token, perplexity "
        f"{result.perplexity:.2f}, {result.bits_per_byte:.4f} bits per byte "
        f"({result.tokens:,} tokens, {result.seconds:.1f} s)"
    )
    return Outcome({"task": "loss", **result.to_dict()}, args.json)


def _hellaswag(args: Eval) -> Outcome:
    from gpt2.distributed import can_compile
    from gpt2.evaluation.hellaswag import evaluate_hellaswag, read_items, tokenize
    from gpt2.inference.engine import load_network

    model, tokenizer = load_network(args.model, args.device)
    device = model.wpe.weight.device
    if args.compile and not can_compile(device):
        raise RequestError("--compile needs a C++ compiler on a CPU, Triton on a GPU: leave it out")
    n_ctx = model.config.n_ctx
    items = tokenize(read_items(args.file, args.items), tokenizer, n_ctx)
    with working("HellaSwag") as progress:
        result = evaluate_hellaswag(
            model,
            items,
            n_ctx,
            device,
            batch_tokens=args.batch_tokens,
            precision=args.precision,
            compiled=args.compile,
            progress=progress,
        )
    cut = [
        f"{count:,} {what} were cut to the model's {n_ctx} tokens"
        for count, what in ((result.contexts_cut, "contexts"), (result.endings_cut, "endings"))
        if count
    ]
    say(
        f"{args.model} on HellaSwag: acc {result.acc:.4f}, acc_norm {result.acc_norm:.4f} "
        f"({result.items:,} items, {result.seconds:.1f} s{''.join('; ' + text for text in cut)})"
    )
    return Outcome({"task": "hellaswag", **result.to_dict()}, args.json)


def _harness(args: Eval, names: list[str]) -> Outcome:
    from gpt2.evaluation.harness import evaluate_tasks, harness_model

    kind = harness_model()
    with working("lm-evaluation-harness") as progress:
        model = kind(args.model, args.device, args.precision, args.batch_tokens, progress)
        result = evaluate_tasks(model, names, args.task_path, args.items)
    for name, values in result["results"].items():
        say(f"{args.model} on {name}: " + ", ".join(f"{metric} {value:.4f}" for metric, value in values.items()))
    return Outcome({"task": args.task, **result}, args.json)
