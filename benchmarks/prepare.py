"""Preparing text: the whole `gpt2 prepare` beside tiktoken's bare rate on one thread, in turn, and its peak memory.

python benchmarks/prepare.py [--megabytes 240] [--rounds 3]     writes results/prepare.json

The corpus is the embedded one, repeated up to the size. Memory is looked at for 12 MB, the size, and 25/6 times
the size (1,000 MB for 240), as many files and as one .txt.
"""

import argparse
import contextlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common

from gpt2.data.sources import embedded_corpus

# Reading and decoding the files is not counted, nor is building the encoder: only encode_ordinary is.
BARE_TIKTOKEN = """
import sys, time
from pathlib import Path
import tiktoken
from gpt2.tokenizer import PATTERN, Tokenizer
ranks = dict(Tokenizer.from_name("gpt2").ranks)
encoding = tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256})
encoding.encode_ordinary("warm up")
seconds = 0.0
for path in sorted(Path(sys.argv[1]).rglob("*.txt")):
    text = path.read_bytes().decode()
    started = time.perf_counter()
    encoding.encode_ordinary(text)
    seconds += time.perf_counter() - started
print(seconds)
"""
MEMORY_METHOD = (
    "largest sum of the resident sets (VmRSS in /proc) of the command and all its child processes, looked at every "
    "50 ms; pages that processes share count once for each"
)


@contextlib.contextmanager
def corpus(megabytes: float, one_file: bool) -> Iterator[tuple[Path, int]]:
    """The embedded corpus, repeated up to about the size: (the file or directory, bytes); removed afterwards."""
    speeches = sorted(embedded_corpus().glob("*.txt"))
    repeats = max(1, round(megabytes * 1e6 / sum(path.stat().st_size for path in speeches)))
    with tempfile.TemporaryDirectory(prefix="corpus-") as directory:
        source = Path(directory, "corpus.txt" if one_file else "corpus")
        if one_file:
            with open(source, "wb") as file:
                for _ in range(repeats):
                    for path in speeches:
                        file.write(path.read_bytes())
        else:
            for i in range(repeats):
                (source / f"{i:03d}").mkdir(parents=True)
                for path in speeches:
                    shutil.copyfile(path, source / f"{i:03d}" / path.name)
        yield source, repeats * sum(path.stat().st_size for path in speeches)


@contextlib.contextmanager
def prepare(source: Path | str) -> Iterator[subprocess.Popen[bytes]]:
    """`gpt2 prepare` under way; waits for it, and removes what it made."""
    with tempfile.TemporaryDirectory(prefix="prepared-") as directory:
        command = [sys.executable, "-m", "gpt2", "prepare", str(source), "--out", f"{directory}/data"]
        process = subprocess.Popen([*command, "--tokenizer", "gpt2"], stdout=subprocess.DEVNULL)
        try:
            yield process
        finally:
            if process.wait() != 0:
                sys.exit(f"gpt2 prepare {source} failed")


def prepare_seconds(source: Path | str) -> float:
    """Wall time of the whole process."""
    started = time.perf_counter()
    with prepare(source) as process:
        process.wait()
        return time.perf_counter() - started


def tiktoken_seconds(directory: Path) -> float:
    """Time within encode_ordinary, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", BARE_TIKTOKEN, str(directory)], check=True, stdout=subprocess.PIPE)
    return float(done.stdout)


def family(pid: int) -> list[int]:
    """The process and all below it."""
    found = [pid]
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += family(int(child))
    return found


def resident_bytes(pid: int) -> int:
    """0 where the process has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return 0


def peak_bytes(source: Path | str) -> int:
    """See MEMORY_METHOD."""
    peak = 0
    with prepare(source) as process:
        while process.poll() is None:
            peak = max(peak, sum(map(resident_bytes, family(process.pid))))
            time.sleep(0.05)
    return peak


def compare(name: str, source: Path | str, directory: Path, size: int, rounds: int) -> dict[str, Any]:
    """Megabytes a second of both, and the ratio of the medians."""
    seconds = common.in_turn(rounds, lambda: prepare_seconds(source), lambda: tiktoken_seconds(directory))
    ours, theirs = (common.spread([size / 1e6 / s for s in values]) for values in seconds)
    result = {
        "name": name,
        "bytes": size,
        "prepare_mb_per_second": ours,
        "tiktoken_one_thread_mb_per_second": theirs,
        "ratio_of_medians": ours["median"] / theirs["median"],
    }
    print(f"{name}: {ours['median']:.1f} MB/s, tiktoken {theirs['median']:.1f}, ratio {result['ratio_of_medians']:.2f}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=240)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    results = []
    with corpus(args.megabytes, one_file=False) as (directory, size):
        results.append(compare(f"{size / 1e6:.0f} MB, repeated corpus", directory, directory, size, args.rounds))
    alone = sum(path.stat().st_size for path in embedded_corpus().glob("*.txt"))
    results.append(compare("the embedded corpus alone", "sotu", embedded_corpus(), alone, args.rounds))
    for megabytes in (12, args.megabytes, args.megabytes * 25 / 6):
        for one_file in (False, True):
            with corpus(megabytes, one_file) as (source, size):
                peak = peak_bytes(source)
            name = f"peak memory, {size / 1e6:.0f} MB as {'one .txt' if one_file else 'many files'}"
            results.append({"name": name, "bytes": size, "peak_bytes": peak})
            print(f"{name}: {peak / 1e6:.0f} MB")
    config = {"megabytes": args.megabytes, "rounds": args.rounds, "tokenizer": "gpt2", "memory": MEMORY_METHOD}
    print(common.write("prepare", config, results))


if __name__ == "__main__":
    main()
