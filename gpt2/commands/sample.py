"""gpt2 sample: continue a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from gpt2.commands.common import Json, Outcome, parse, say
from gpt2.errors import RequestError


@dataclass(frozen=True)
class Sample:
    """Continue a prompt."""

    model: tyro.conf.Positional[str]
    """Run, checkpoint, int8 directory, or Hugging Face GPT-2 directory or id."""
    prompt: str = ""
    """Text to continue; empty: a new document."""
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 1
    """Number of samples."""
    max_tokens: int = 200
    """Longest completion, in tokens."""
    temperature: float = 0.8
    """Spread of the choice; 0: always the likeliest token."""
    top_k: int | None = None
    """Choose among the k likeliest tokens only."""
    top_p: float | None = None
    """Choose among the likeliest tokens that together have this probability."""
    stop: str | None = None
    """Text at which a completion ends; it is not part of it."""
    seed: int | None = None
    """Seed of the choice; the same seed gives the same text."""
    device: str = "auto"
    """auto (cuda, else mps, else cpu) or a torch device."""
    compile: bool = False
    """Compile the step from token to token: worth it from some thousands of tokens on, on a GPU most of all."""
    json: Json = False
    """Print one JSON object as the last line."""


def main(argv: Sequence[str]) -> Outcome:
    """gpt2 sample"""
    args = parse(Sample, argv, "sample")
    if args.n < 1:
        raise RequestError(f"-n {args.n} must be at least 1")
    from gpt2.inference.engine import load

    engine = load(args.model, args.device, compile=args.compile)
    options: dict[str, Any] = {
        "max_tokens": args.max_tokens,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "stop": args.stop,
        "seed": args.seed,
    }
    if args.n == 1:
        pieces: list[str] = []
        for piece in engine.stream(args.prompt, **options):
            if not pieces:
                print(args.prompt, end="", flush=True)
            pieces.append(piece)
            print(piece, end="", flush=True)
        print()
        completions = ["".join(pieces)]
    else:
        completions = engine.generate_many(args.prompt, args.n, **options)
        for number, text in enumerate(completions, 1):
            say(f"--- {number}\n{args.prompt}{text}")
    return Outcome({"prompt": args.prompt, "completions": completions}, args.json)
