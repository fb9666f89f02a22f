"""gpt2 train: a new run, or one gone on with."""

import argparse
import dataclasses
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2.commands.common import Json, Outcome, figure, parse, say
from gpt2.config import (
    CheckpointConfig,
    Config,
    EvalConfig,
    GPTConfig,
    GuardConfig,
    LogConfig,
    OptimConfig,
    TrainConfig,
    from_dict,
    preset,
    read_run_config,
    read_toml,
    to_dict,
)
from gpt2.errors import RequestError

if TYPE_CHECKING:
    from gpt2.distributed import Distributed


@dataclass(frozen=True)
class Train:
    """Train a GPT-2. The defaults below are the chosen preset's; all of them can stand in a TOML file."""

    data: str | None = None
    """Directory of token shards (gpt2 prepare)."""
    out: Path | None = None
    """Directory of the run to make; a run of an equal config is gone on with."""
    resume: Path | None = None
    """Run to go on with, under its own config; only fields that change speed or intervals may be given."""
    preset: str = "gpt2-124m"
    """gpt2-124m, gpt2-350m, gpt2-774m, gpt2-1558m, finetune, demo or tiny."""
    config: Path | None = None
    """TOML file with fields to change from the preset."""
    init_from: str | None = None
    """Start from these weights: a run, a checkpoint, a Hugging Face GPT-2 directory or id."""
    json: Json = False
    """Print one JSON object as the last line."""
    model: GPTConfig = field(default_factory=GPTConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    log: LogConfig = field(default_factory=LogConfig)


def main(argv: Sequence[str]) -> Outcome:
    """gpt2 train"""
    # The other options' defaults depend on these: they are read first.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("--preset", "--config", "--resume", "--out", "--train.device"):
        first.add_argument(name, dest=name.strip("-").removeprefix("train."))
    try:
        chosen, _ = first.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise RequestError(f"{error}: see gpt2 train --help") from error
    if chosen.resume and (chosen.preset or chosen.config):
        raise RequestError("--resume goes on with the run's own config: leave --preset and --config out")
    if chosen.resume and chosen.out:
        raise RequestError("--out and --resume exclude each other: a resumed run stays where it is")
    base = preset(chosen.preset or "gpt2-124m")
    if chosen.config:
        base = read_toml(Path(chosen.config), base)
    group: Distributed | None = None
    if chosen.resume and not _asks_for_help(argv):
        from gpt2 import distributed

        group = distributed.Distributed.from_environment(chosen.device or "auto", base.train.collective_timeout)
        # Rank 0 reads: other machines need not hold the run.
        base = from_dict(group.on_main(lambda: to_dict(read_run_config(Path(chosen.resume)))))
    sections = {f.name: getattr(base, f.name) for f in dataclasses.fields(Config)}
    args = parse(Train, argv, "train", Train(**sections))

    train_section = args.train
    if args.data is not None:
        train_section = dataclasses.replace(train_section, data=args.data)
    if args.init_from is not None:
        train_section = dataclasses.replace(train_section, init_from=args.init_from)
    if not train_section.data:
        raise RequestError("--data is missing: give the directory that `gpt2 prepare SOURCE --out DATA` made")
    if args.resume is None and args.out is None:
        raise RequestError("--out is missing: give the run's directory (or --resume RUN to go on with one)")
    if chosen.preset == "finetune" and not train_section.init_from:
        raise RequestError("--init-from is missing: the preset finetune starts from a trained model, name one")
    config = Config(args.model, args.optim, train_section, args.eval, args.checkpoint, args.guard, args.log)

    from gpt2.training import loop, run

    if args.out is not None:
        opened = run.start_run(config, args.out)
    else:
        opened = run.resume_run(Path(chosen.resume), config, group)
    if opened.distributed.is_main:
        for note in opened.notes:
            warnings.warn(note, stacklevel=1)
    try:
        result = loop.train(opened)
    except loop.Stopped as stopped:
        if opened.distributed.is_main:
            print(f"gpt2: {stopped}; go on with: gpt2 train --resume {opened.path}", file=sys.stderr)
        return Outcome({"run": str(opened.path), "stopped": stopped.signal}, args.json, 128 + stopped.signal)
    if not opened.distributed.is_main:
        return Outcome(result)
    say(
        f"{opened.path}: {result['steps']:,} steps in {result['train_seconds']:.1f} s, "
        f"training loss {figure(result['train_loss'])}, validation loss {figure(result['val_loss'])}, "
        f"{figure(result['bits_per_byte'])} bits per byte\n"
        f"next: gpt2 sample {opened.path} --prompt TEXT"
    )
    return Outcome(result, args.json)


def _asks_for_help(argv: Sequence[str]) -> bool:
    return "-h" in argv or "--help" in argv
