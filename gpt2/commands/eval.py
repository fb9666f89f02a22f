"""gpt2 eval: what a model is worth."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from gpt2.commands.common import Json, Outcome, parse, say
from gpt2.errors import RequestError


@dataclass(frozen=True)
class Eval:
    """What a model is worth on prepared data: nats a token, perplexity, bits per byte."""

    model: tyro.conf.Positional[str]
    """Run, checkpoint, or Hugging Face GPT-2 directory or id."""
    data: Path
    """Directory of token shards (gpt2 prepare), with the model's tokenizer."""
    task: str = "loss"
    """loss."""
    split: str = "val"
    """val or train."""
    windows: int = 0
    """Windows of the model's context, from the start of the split; 0: all."""
    batch: int = 16
    """Windows in one forward pass."""
    device: str = "auto"
    """auto (cuda, else mps, else cpu) or a torch device."""
    json: Json = False
    """Print one JSON object as the last line."""


def main(argv: Sequence[str]) -> Outcome:
    """gpt2 eval"""
    args = parse(Eval, argv, "eval")
    if args.task != "loss":
        raise RequestError(f"there is no task {args.task!r}: known is loss")
    if args.batch < 1 or args.windows < 0:
        raise RequestError("--batch must be at least 1 and --windows at least 0")
    from gpt2.data.shards import Dataset
    from gpt2.evaluation.loss import evaluate_model_loss
    from gpt2.inference.engine import load

    dataset = Dataset.open(args.data)
    engine = load(args.model, args.device)
    result = evaluate_model_loss(engine.model, engine.tokenizer, dataset, args.split, args.batch, args.windows)
    say(
        f"{args.model} on {args.data} ({args.split}): loss {result.loss:.4f} nats a token, perplexity "
        f"{result.perplexity:.2f}, {result.bits_per_byte:.4f} bits per byte "
        f"({result.tokens:,} tokens, {result.seconds:.1f} s)"
    )
    return Outcome({"task": "loss", **result.to_dict()}, args.json)
