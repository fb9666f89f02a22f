"""gpt2 ladder: each optimisation, measured on this machine."""

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gpt2.commands.common import Json, Outcome, parse, say
from gpt2.errors import RequestError

CORPUS = "sotu"


@dataclass(frozen=True)
class Ladder:
    """What each optimisation of the training step gains on this machine: from the plainest step up, one at a time."""

    preset: str = "gpt2-124m"
    """gpt2-124m, gpt2-350m, gpt2-774m, gpt2-1558m, finetune, demo or tiny: the network's shape."""
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
    steps: int = 20
    """Training steps after which the rungs' losses are compared (fewer where the minutes are up)."""
    rounds: int = 5
    """Turns of each rung; more where the steps need them."""
    only: tuple[str, ...] = ()
    """Rungs to climb, besides the first: tf32 bf16 compile flash nice fused-adamw auto-attention fused-loss."""
    without: tuple[str, ...] = ()
    """Rungs to leave out; those that follow go on without them."""
    out: Path | None = None
    """Directory for ladder.json and ladder.png."""
    json: Json = False
    """Print one JSON object as the last line."""


def main(argv: Sequence[str]) -> Outcome:
    """gpt2 ladder"""
    args = parse(Ladder, argv, "ladder")
    check_out(args.out)
    from gpt2.bench import ladder
    from gpt2.files import write_json

    options = ladder.Options(
        args.preset,
        args.batch,
        args.accumulation,
        args.context,
        args.device,
        args.minutes,
        args.steps,
        args.rounds,
        args.only,
        args.without,
    )
    with prepared(args.data) as data:
        result = ladder.ladder(options, data, lambda line: print(line, file=sys.stderr, flush=True))
    ladder.print_table(result)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        write_json(args.out / "ladder.json", result)
        ladder.plot(result, args.out / "ladder.png")
        say(f"{args.out / 'ladder.json'}, {args.out / 'ladder.png'}")
    return Outcome(result, args.json)


def check_out(out: Path | None) -> None:
    """Raises RequestError where a directory cannot be there: minutes of measuring are not to be lost for it."""
    if out is None:
        return
    existing = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise RequestError(f"cannot write in {out}: {existing} is a file; name another directory")


@contextmanager
def prepared(data: Path | None) -> Iterator[Path]:
    """The given tokens, or those of the embedded corpus, prepared for this call alone."""
    if data is not None:
        yield data
        return
    from gpt2.data.prepare import prepare

    with tempfile.TemporaryDirectory(prefix="gpt2-bench-") as directory:
        prepare(CORPUS, Path(directory, "data"))
        yield Path(directory, "data")
