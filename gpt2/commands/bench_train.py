"""gpt2 bench train: the training step beside other programs'."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt2.commands.common import Json, Outcome, parse
from gpt2.commands.ladder import prepared


@dataclass(frozen=True)
class BenchTrain:
    """This project's training step beside others': same shapes, data, precision, in turn, each at its best setting."""

    preset: str = "gpt2-124m"
    """gpt2-124m, gpt2-350m, gpt2-774m, gpt2-1558m, finetune, demo or tiny: the network's shape."""
    against: tuple[str, ...] = ()
    """nanogpt=PATH build-nanogpt=PATH (your own checkouts), transformers litgpt (packages, or =PATH of a folder)."""
    data: Path | None = None
    """Directory of token shards (gpt2 prepare); without it the embedded corpus in GPT-2's tokens."""
    batch: int = 0
    """Windows in a micro-batch; 0: the preset's on a GPU, 4 elsewhere."""
    accumulation: int = 1
    """Micro-batches in a step."""
    context: int = 0
    """Tokens in a window; 0: the preset's on a GPU, at most 256 elsewhere."""
    device: str = "auto"
    """auto (cuda, else mps, else cpu) or a torch device."""
    minutes: float = 8.0
    """Budget: no round of turns starts that would not fit into it."""
    rounds: int = 7
    """Turns of each program."""
    compile: bool = True
    """torch.compile all of them."""
    json: Json = False
    """Print one JSON object as the last line."""


def main(argv: Sequence[str]) -> Outcome:
    """gpt2 bench train"""
    args = parse(BenchTrain, argv, "bench train")
    from gpt2.bench import training
    from gpt2.bench.ladder import Options

    training.parse_peers(args.against)
    shapes = Options(
        args.preset, args.batch, args.accumulation, args.context, args.device, args.minutes, rounds=args.rounds
    )
    with prepared(args.data) as data:
        result = training.bench_training(
            shapes, args.against, data, args.compile, lambda line: print(line, file=sys.stderr, flush=True)
        )
    training.print_table(result)
    return Outcome(result, args.json)
