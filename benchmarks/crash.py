"""SIGKILL at random moments, again and again: does every restart find a good checkpoint, are the final bits the same?

python benchmarks/crash.py [--kills 200] [--compile]     writes results/crash.json or results/crash_compiled.json

The run is tiny (a few milliseconds a step), saves and validates every 5 steps and is killed within a fraction of a
second of its start. Every process is forked from one that has loaded torch.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import common
import torch
from safetensors.torch import load_file

from gpt2.checkpoint.directory import list_checkpoints
from gpt2.data.prepare import prepare
from gpt2.training.metrics import read_metrics

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from processes import kill_and_restart, run_ranks

EVERY = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--longest", type=float, default=0.4, help="seconds from a start to its kill, at most")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="crash-") as name:
        directory = Path(name)
        text = "\n".join(f"line {i} of a text that says little, {i * i % 97} times" for i in range(4000))
        (directory / "text.txt").write_text(text)
        prepare(str(directory / "text.txt"), directory / "data", "bytes")
        # More steps than the kills leave time for: the last start finishes the run.
        steps = str(options.kills * 40)
        argv = ["train", "--data", str(directory / "data"), "--preset", "tiny", "--train.steps", steps]
        argv += ["--checkpoint.every", str(EVERY), "--eval.every", "0", "--model.dropout", "0.1", "--log.every", "1"]
        argv += ["--train.compile"] if options.compile else []
        quiet, killed = directory / "quiet", directory / "killed"
        started = time.perf_counter()
        assert run_ranks(1, [*argv, "--out", str(quiet)], directory / "log", timeout=3600) == [0]
        survived = kill_and_restart(
            [*argv, "--out", str(killed)], killed, directory / "log", options.kills, options.longest, EVERY, seed=0
        )
        expected = load_file(list_checkpoints(quiet)[-1] / "model.safetensors")
        weights = load_file(list_checkpoints(killed)[-1] / "model.safetensors")
        same_weights = all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
        same_losses = losses(quiet) == losses(killed)
        result = {
            "name": "compiled" if options.compile else "eager",
            "steps": int(steps),
            **asdict(survived),
            "same_weights_to_the_bit": same_weights,
            "same_losses_at_every_step": same_losses,
            "seconds": time.perf_counter() - started,
        }
    config = {"kills": options.kills, "longest_seconds": options.longest, "save_every": EVERY}
    common.write("crash_compiled" if options.compile else "crash", config, [result])
    assert same_weights, "the final weights differ"
    assert same_losses, "the losses differ"


def losses(run: Path) -> list[tuple[int, float]]:
    return [(event["step"], event["loss"]) for event in read_metrics(run) if event["event"] == "step"]


if __name__ == "__main__":
    main()
