"""The loader's rate, beside the rate of training: batches at random places of a large shard, as training reads.

python benchmarks/loader.py [--tokens 100000000] [--training-rate N]     writes results/loader.json

--training-rate: tokens a second to compare with; by default the fastest in results/train_* and results/ladder_*.
The shard is written first and so lies in the page cache: what is measured is the loader, not the disk.
"""

import argparse
import json
import tempfile
import time
from contextlib import closing
from pathlib import Path

import common
import numpy as np

from gpt2.data.loader import BatchLoader, prefetch
from gpt2.data.shards import Shard, Split, header
from gpt2.files import sha256_file

SHAPES = ((4, 256), (4, 1024), (32, 1024), (512, 1024))


def split_of(tokens: int, directory: Path) -> Split:
    """A shard of random ids."""
    path = directory / "shard.bin"
    ids = np.random.default_rng(0).integers(0, 50257, tokens, dtype=np.uint16)
    path.write_bytes(header(tokens) + ids.tobytes())
    shard = Shard(path, tokens, sha256_file(path), 50257)
    shard.data[0]  # checked once, before the clock runs
    return Split((shard,), 2 * tokens, 1)


def rate(loader: BatchLoader, ahead: bool, seconds: float = 1.0) -> float:
    """Tokens a second over about that long; ahead: by the thread that reads ahead while training runs."""
    tokens, step, started = 0, 0, time.perf_counter()
    if ahead:
        with closing(prefetch(loader, 0)) as batches:
            while time.perf_counter() - started < seconds:
                tokens += next(batches)[1].size
            return tokens / (time.perf_counter() - started)
    while time.perf_counter() - started < seconds:
        tokens += loader.batch(step)[0].size
        step += 1
    return tokens / (time.perf_counter() - started)


def known_training_rate() -> tuple[float, str]:
    """The fastest training that a report in results/ tells of."""
    best = (0.0, "none measured")
    for path in (*common.RESULTS.glob("train_*.json"), *common.RESULTS.glob("ladder_*.json")):
        for result in json.loads(path.read_text(encoding="utf-8"))["results"]:
            best = max(best, (result.get("tokens_per_second") or 0.0, f"{path.name}: {result['name']}"))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000_000)
    parser.add_argument("--training-rate", type=float)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    training, source = (args.training_rate, "given") if args.training_rate else known_training_rate()
    with tempfile.TemporaryDirectory() as directory:
        split = split_of(args.tokens, Path(directory))
        loaders = [BatchLoader(split, context, windows, seed=1) for windows, context in SHAPES]
        for loader in loaders:
            loader.batch(0)  # draws the epoch's order, once
        direct = common.in_turn(args.rounds, *(lambda at=loader: rate(at, ahead=False) for loader in loaders))
        ahead = common.in_turn(args.rounds, *(lambda at=loader: rate(at, ahead=True) for loader in loaders))
    results = []
    for (windows, context), plain, threaded in zip(SHAPES, direct, ahead, strict=True):
        result = {
            "name": f"{windows} windows of {context}",
            "tokens_per_second": common.spread(plain),
            "tokens_per_second_read_ahead": common.spread(threaded),
        }
        if training:
            result["times_the_training_rate"] = result["tokens_per_second_read_ahead"]["median"] / training
        results.append(result)
        print(
            f"{result['name']}: {result['tokens_per_second']['median'] / 1e6:,.0f} M tokens/s, read ahead "
            f"{result['tokens_per_second_read_ahead']['median'] / 1e6:,.0f} M"
            + (f" = {result['times_the_training_rate']:,.0f} x training" if training else "")
        )
    print(common.write("loader", {"tokens": args.tokens, "training_rate": training, "from": source}, results))


if __name__ == "__main__":
    main()
